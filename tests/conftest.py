"""Without a GPU, Triton kernels are tested in its interpreter: switched on before the engine is imported.

One thread unless OMP_NUM_THREADS says otherwise: tensors are small here, a second one costs more processor time (a
sixth of the whole run) than it saves, and figures do not depend on a machine's cores.

The default run keeps to six minutes of two cores. What it leaves out runs with S3DIT_SLOW=1, and in `.ci/run`:

- `@pytest.mark.slow`: the test;
- `@pytest.mark.sampled(n)`: all but n of its cases, which are chosen at random, the same ones every time;
- `@pytest.mark.longer`: what the test itself does more when it is set.
"""

import importlib.util
import os
import random
from collections import defaultdict

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import triton
    from triton import language as tl
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _convert_float(given, source, target, rounding):
        """To e4m3 as torch rounds, to nearest even: the interpreter cuts the carry off, and knows no NaN."""
        if target != tl.float8e4nv or source not in (tl.float32, tl.float16):
            return _convert(given, source, target, rounding)
        wide = np.ascontiguousarray(given).view({32: np.float32, 16: np.float16}[source.primitive_bitwidth])
        return torch.from_numpy(wide.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(given.shape)

    interpreter._convert_float = _convert_float

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        _patch = interpreter._patch_lang_tensor

        def _patch_lang_tensor(tensor, scope):
            """A run-time bound of a loop is an array of one number, which numpy 2.4 no longer takes for an index."""
            _patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

        interpreter._patch_lang_tensor = _patch_lang_tensor

SLOW = os.environ.get("S3DIT_SLOW") == "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless S3DIT_SLOW=1")
    config.addinivalue_line("markers", "sampled(n): n of the cases by default, all with S3DIT_SLOW=1")
    config.addinivalue_line("markers", "longer: does more with S3DIT_SLOW=1")


def pytest_report_header():
    return None if SLOW else "left out: slow tests and most cases of large grids; S3DIT_SLOW=1 runs them too"


def pytest_collection_modifyitems(config, items):
    """Leave out what is slow, and what is not among the sample of a test's cases, unless it is asked for by name."""
    if SLOW or any("::" in given for given in config.args):
        return
    cases, left_out = defaultdict(list), set()
    for item in items:
        if item.get_closest_marker("slow"):
            left_out.add(item)
        elif item.get_closest_marker("sampled"):
            cases[item.path, item.cls, item.originalname].append(item)
    for (_, _, name), group in cases.items():
        (count,) = group[0].get_closest_marker("sampled").args
        left_out.update(random.Random(name).sample(group, max(len(group) - count, 0)))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


@pytest.fixture(scope="session")
def triton_cache(pytestconfig, tmp_path_factory):
    """Where Triton keeps what it compiles for GPUs, from run to run: by source, target, options and its own version."""
    cache = getattr(pytestconfig, "cache", None)
    return tmp_path_factory.mktemp("triton") if cache is None else cache.mkdir("triton")
