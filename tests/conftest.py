"""Without a GPU, Triton kernels are tested in its interpreter: switched on before the engine is imported.

One thread unless OMP_NUM_THREADS says otherwise: tensors are small here, a second one costs more processor time (a
sixth of the whole run) than it saves, and figures do not depend on a machine's cores.
"""

import importlib.util
import os

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


@pytest.fixture(scope="session")
def triton_cache(pytestconfig, tmp_path_factory):
    """Where Triton keeps what it compiles for GPUs, from run to run: by source, target, options and its own version."""
    cache = getattr(pytestconfig, "cache", None)
    return tmp_path_factory.mktemp("triton") if cache is None else cache.mkdir("triton")
