"""What kernel tests share: the device they run on, its dtypes, and outputs that hold NaN until they are written.

The same cases run on a GPU where there is one, and in Triton's interpreter otherwise. The interpreter's bf16 is wrong
(Triton 3.9) or raises (3.6), so bf16 is for the GPU alone; exact fp32 is for the interpreter.
"""

import pytest
import torch

from s3dit.kernels.dispatch import INTERPRETED
from s3dit.kernels.scheme import QuantizedRows

GPU = torch.cuda.is_available()


# A kernel and its reference both round once, from fp32 values some ulp apart: half an ulp of the dtype for those that
# fall on the other side. In 8 bits one step in 127, or in e4m3 one in 16, for a few values in a hundred.
CLOSE = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3, torch.int8: 5e-3, torch.float8_e4m3fn: 4e-2}


def relative(got, expected):
    """‖got - expected‖ / ‖expected‖ in float64; two empty tensors are equal."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.fixture
def assert_close():
    """Compare what a kernel gave with its reference, tensors or QuantizedRows."""

    def check(got, expected):
        if not isinstance(expected, QuantizedRows):
            assert got.dtype == expected.dtype and got.shape == expected.shape
            assert relative(got, expected) < CLOSE[got.dtype]
            return
        assert got.original_dtype == expected.original_dtype and got.values.dtype == expected.values.dtype
        assert got.values.shape == expected.values.shape and got.scale.shape == expected.scale.shape
        # The reference has rounded the largest number of a row once more: half an ulp.
        assert relative(got.scale, expected.scale) < 3 * CLOSE[got.original_dtype]
        # The reference rounds to 16 bits before it rounds to 8: in bf16 by up to a quarter of a step at 127, and the
        # scale by half an ulp, which puts one number in fifteen into the next step (seen on a GPU: 1.02e-2).
        bound = 3 * CLOSE[torch.int8] if got.original_dtype == torch.bfloat16 else 0.0
        assert relative(got.dequantize(), expected.dequantize()) < max(bound, CLOSE[got.values.dtype])

    return check


@pytest.fixture(autouse=True)
def seed():
    """The same numbers every time: near a bound, chance would make a test fail now and then."""
    torch.manual_seed(0)


@pytest.fixture
def device():
    """Where Triton kernels run; skips where they cannot."""
    if not GPU and not INTERPRETED:
        pytest.skip("kernels need a CUDA device, or Triton installed for its interpreter")
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(params=["bf16", "fp16"] if GPU else ["fp16", "fp32"])
def dtype(request):
    """Dtypes of activations."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[request.param]


@pytest.fixture(params=[None, "int8", "fp8"])
def input_dtype(request):
    """What the consumer takes: None, int8 or e4m3."""
    return {None: None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[request.param]


@pytest.fixture
def poison(monkeypatch):
    """Fill new buffers with NaN (integers with their smallest value), so that what a kernel leaves out is seen."""

    def poisoned(make):
        def empty(*args, **kwargs):
            out = make(*args, **kwargs)
            bad = float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min
            return out.copy_(torch.full_like(out, bad, dtype=torch.float32 if out.itemsize == 1 else None))

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def kernel_of():
    """The Triton implementation of an Op."""
    return lambda op: next(each.function for each in op.implementations if each.backend == "triton")
