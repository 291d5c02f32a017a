"""SwiGLU against float64, and its kernel against the reference."""

import pytest
import torch

from s3dit.kernels.scheme import QuantizedRows
from s3dit.kernels.swiglu import swiglu


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_swiglu():
    gate, up = torch.randn(33, 100), torch.randn(33, 100)
    expected = gate.double() * gate.double().sigmoid() * up.double()
    assert relative(swiglu.reference(gate, up), expected) < 1e-6
    assert relative(swiglu(gate.clone(), up), expected) < 1e-6
    rounded = swiglu(gate.clone(), up, torch.int8)
    # errors are even over a step of 1/127 of the row's largest, which is some five times the rms: 5 / (127 · sqrt(12))
    assert isinstance(rounded, QuantizedRows) and relative(rounded.dequantize(), expected) < 2e-2


@pytest.mark.parametrize("n, width", [(1, 32), (31, 100), (33, 2100), (63, 192)])
@pytest.mark.sampled(6)
def test_swiglu_kernel(n, width, dtype, input_dtype, device, kernel_of, poison, assert_close):
    # halves of one projection, as w1 and w3 may give them
    gate, up = torch.randn(n, 2 * width, device=device).to(dtype).chunk(2, dim=1)
    expected = swiglu.reference(gate, up, input_dtype)
    assert_close(kernel_of(swiglu)(gate, up, input_dtype), expected)
