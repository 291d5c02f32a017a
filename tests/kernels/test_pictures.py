"""Sums and repetition of pictures: the kernels against float64 and torch, in channels last and out of it."""

import pytest
import torch
import torch.nn.functional as F

from s3dit.errors import BackendError
from s3dit.kernels.dispatch import use_backend
from s3dit.kernels.pictures import add_pictures, repeat_pixels

LAST = torch.channels_last


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 64, 5, 7), (1, 512, 9, 3), (1, 16, 0, 4)])
def test_kernels(shape, dtype, device, kernel_of, poison, assert_close):
    a, b = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=LAST) for _ in range(2))
    offset = torch.randn(shape[1], device=device).to(dtype)
    got = kernel_of(add_pictures)(a, b, offset)
    assert_close(got, (a.double() + b.double() + offset.double()[:, None, None]).to(dtype))
    larger = kernel_of(repeat_pixels)(a)
    assert larger.shape[2:] == (2 * shape[2], 2 * shape[3]) and larger.is_contiguous(memory_format=LAST)
    expected = a.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(larger, expected)


def test_references():
    a, b, offset = torch.randn(2, 6, 5, 7), torch.randn(2, 6, 5, 7), torch.randn(6)
    assert torch.equal(add_pictures(a, b, offset), a + b + offset[:, None, None])
    # Rounded once: 256 + 1 + 1 is 258 in bf16, and 256 if it is rounded twice.
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    assert add_pictures(256 * one, one, one[0, 0, 0]).item() == 258
    assert torch.equal(repeat_pixels(a), F.interpolate(a, scale_factor=2.0, mode="nearest"))


def test_what_kernels_do_not_take_is_named(device):
    x = torch.randn(1, 6, 4, 4, device=device).contiguous(memory_format=LAST)
    with use_backend("triton"), pytest.raises(BackendError, match="power of two"):
        repeat_pixels(x)


def test_what_needs_a_gradient_gets_one(device):
    """No kernel has a derivative: it would cut the graph in silence."""
    x = torch.randn(1, 16, 4, 4, device=device).contiguous(memory_format=LAST).requires_grad_()
    repeat_pixels(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4.0))
    with use_backend("triton"), pytest.raises(BackendError, match="no gradient"):
        repeat_pixels(x)
    with use_backend("triton"), torch.no_grad():
        assert repeat_pixels(x).shape == (1, 16, 8, 8)
