"""References against float64 formulas and torch.nn; implementations against references, over awkward shapes.

fp32 tolerance 1e-6 relative: a sum of some hundred fp32 products and one reciprocal root, a few ulp (6e-8 each).
"""

import pytest
import torch

from s3dit.errors import BackendError
from s3dit.kernels.dispatch import set_backend, why_unsupported
from s3dit.kernels.norm import (
    gated_residual,
    gated_residual_norm,
    qk_norm_rope,
    residual_norm,
    rms_norm,
    rms_norm_modulate,
)
from s3dit.model.layers import rope_table

SHAPES = [(1, 32), (31, 96), (33, 100), (63, 192)]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def norm64(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape):
    x, w = torch.randn(shape), torch.randn(shape[-1])
    assert relative(rms_norm(x, w, 1e-5), norm64(x, w, 1e-5)) < 1e-6
    module = torch.nn.RMSNorm(shape[-1], eps=1e-5)
    module.weight.data.copy_(w)
    assert relative(rms_norm(x, w, 1e-5), module(x)) < 1e-6
    # bf16: one rounding at the end, half a unit in the last of 8 bits
    assert relative(rms_norm(x.bfloat16(), w, 1e-5), norm64(x.bfloat16(), w, 1e-5)) < 2**-8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_modulation_and_gate(shape, rows):
    n, d = shape
    x, table, rest = torch.randn(shape), torch.randn(rows, d), torch.randn(shape)
    row = torch.randint(rows, (n,))
    expected = norm64(x, table[row], 1e-5)
    assert relative(rms_norm_modulate(x, table, row, 1e-5), expected) < 1e-6
    assert relative(gated_residual(rest, x, table, row, 1e-5), rest.double() + expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_norm(shape):
    residual, x, w = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    total, normed = residual_norm(residual, x, w, 1e-5)
    assert relative(total, residual.double() + x.double()) < 1e-7
    assert relative(normed, norm64(residual.double() + x.double(), w, 1e-5)) < 1e-6
    # The sum is rounded before it is normalized: the same bits as two steps, in 16 bits too.
    residual, x, w = residual.bfloat16(), x.bfloat16(), w.bfloat16()
    total, normed = residual_norm(residual, x, w, 1e-5)
    assert torch.equal(total, residual + x) and torch.equal(normed, rms_norm(residual + x, w, 1e-5))


def test_halves_are_rotated_as_qwen3_does():
    """In fp32 the bits of transformers' x · cos + rotate_half(x) · sin."""
    x, w, rope = torch.randn(31, 4, 32), torch.randn(32), rope_table(torch.arange(31)[:, None], (32,), 1e6)
    normed, (cos, sin) = rms_norm(x, w, 1e-6), rope.repeat(1, 2, 1)[:, None].unbind(-1)
    first, second = normed.chunk(2, -1)
    expected = normed * cos + torch.cat((-second, first), -1) * sin
    assert torch.equal(qk_norm_rope.reference(x, x, w, w, rope, 1e-6, "halves")[0], expected)


@pytest.mark.parametrize("pairs", ["adjacent", "halves"])
@pytest.mark.parametrize("n", [1, 31, 33])
def test_rotation_in_all_forms(n, pairs):
    positions = torch.randint(0, 3000, (n, 3))
    rope = rope_table(positions, (8, 12, 12), 256.0)
    q, k = torch.randn(n, 6, 32), torch.randn(n, 3, 64)[..., ::2]  # k is not contiguous
    wq, wk = torch.randn(32), torch.randn(32)
    # float64: angle of pair j of axis a is position_a · 256^(-2j/dim_a)
    angles = torch.cat(
        [
            positions[:, a, None].double() * 256.0 ** (-torch.arange(0, dim, 2).double() / dim)
            for a, dim in enumerate((8, 12, 12))
        ],
        dim=1,
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    for form in (qk_norm_rope, qk_norm_rope.reference):
        for got, x, w in zip(form(q, k, wq, wk, rope, 1e-5, pairs), (q, k), (wq, wk), strict=True):
            first, second = norm64(x, w, 1e-5).unflatten(-1, (-1, 2)).unbind(-1)
            if pairs == "halves":
                first, second = norm64(x, w, 1e-5).chunk(2, -1)
            turned = torch.view_as_real(torch.complex(first, second) * turn)
            turned = turned.flatten(-2) if pairs == "adjacent" else turned.mT.flatten(-2)
            # 2e-4: an angle of 3000 rad has 1.2e-4 rad to the fp32 ulp, as in the official tables
            assert relative(got, turned) < 2e-4
    args = q, k, wq, wk, rope, 1e-5, pairs
    assert all(torch.equal(a, b) for a, b in zip(qk_norm_rope(*args), qk_norm_rope.reference(*args), strict=True))


def modulated(n, d, rows, dtype, device):
    """residual, x, a gate and a factor that are views of a wider table, row; x is every other row of a wider tensor."""
    x = torch.randn(2 * n, d + 3, device=device).to(dtype)[::2, :d]
    gate, factor = torch.randn(rows, 4 * d, device=device).chunk(4, dim=1)[1:3]
    return torch.randn(n, d, device=device).to(dtype), x, gate, factor, torch.arange(n, device=device) % rows


@pytest.mark.parametrize("n, d", [(1, 32), (31, 96), (33, 100), (100, 64), (3, 4100), (2, 3840)])
def test_rms_norm_kernels(n, d, dtype, device, kernel_of, poison, assert_close):
    residual, x, *_ = modulated(n, d, 1, dtype, device)
    w = torch.randn(d, device=device).to(dtype)
    assert_close(kernel_of(rms_norm)(x, w, 1e-5), rms_norm.reference(x, w, 1e-5))
    args = residual, x, w, 1e-5
    for got, expected in zip(kernel_of(residual_norm)(*args), residual_norm.reference(*args), strict=True):
        assert_close(got, expected)
    x = x.unflatten(-1, (2, -1))
    assert_close(kernel_of(rms_norm)(x, w[: d // 2], 1e-5), rms_norm.reference(x, w[: d // 2], 1e-5))


@pytest.mark.parametrize("n, d, rows", [(1, 32, 1), (31, 96, 3), (33, 100, 1), (63, 192, 63), (0, 32, 1), (3, 3840, 2)])
@pytest.mark.sampled(8)
def test_modulating_kernels(n, d, rows, dtype, input_dtype, device, kernel_of, poison, assert_close):
    residual, x, gate, factor, row = modulated(n, d, rows, dtype, device)
    args = x, factor, row, 1e-5, input_dtype
    assert_close(kernel_of(rms_norm_modulate)(*args), rms_norm_modulate.reference(*args))
    args = residual, x, gate, row, 1e-5
    assert_close(kernel_of(gated_residual)(*args), gated_residual.reference(*args))
    args = residual, x, gate, factor, row, 1e-5, input_dtype
    for got, expected in zip(kernel_of(gated_residual_norm)(*args), gated_residual_norm.reference(*args), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("pairs", ["adjacent", "halves"])
@pytest.mark.parametrize(
    "n, heads, shared, dim", [(1, 1, 1, 32), (31, 3, 3, 128), (33, 5, 2, 96), (2, 32, 8, 128), (0, 2, 2, 32)]
)
@pytest.mark.sampled(3)
def test_rotation_kernel(n, heads, shared, dim, pairs, dtype, device, kernel_of, poison, assert_close):
    # q and k as a joint projection gives them: views of one tensor
    both = torch.randn(n, (heads + 2 * shared) * dim, device=device).to(dtype).unflatten(1, (-1, dim))
    q, k, _ = both.split([heads, shared, shared], 1)
    wq, wk = torch.randn(2, dim, device=device).to(dtype)
    rope = rope_table(torch.randint(0, 99, (n, 1)), (dim,), 256.0).to(device)
    args = q, k, wq, wk, rope, 1e-5, pairs
    for got, expected in zip(kernel_of(qk_norm_rope)(*args), qk_norm_rope.reference(*args), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_stay_so_and_alone(value, input_dtype, device, kernel_of):
    _, x, _, factor, row = modulated(5, 64, 1, torch.float16, device)
    x[2, 7] = value
    out = kernel_of(rms_norm_modulate)(x, factor, row, 1e-5, input_dtype)
    # Without rounding, infinity is divided by itself and the rest of its row by infinity.
    if value == float("inf") and input_dtype is None:
        assert out[2, 7].isnan() and out[2, :7].count_nonzero() == 0
        x[2, 7] = float("nan")
        out = kernel_of(rms_norm_modulate)(x, factor, row, 1e-5, input_dtype)
    out = out.dequantize() if input_dtype else out
    assert out.isfinite().all(1).tolist() == [True, True, False, True, True]
    assert not out[2].isfinite().any()


def test_what_kernels_refuse(device):
    set_backend("triton")
    try:
        with pytest.raises(BackendError, match="float64"):
            rms_norm(torch.ones(2, 32, device=device).double(), torch.ones(32, device=device), 1e-5)
        with pytest.raises(BackendError, match="at most 16384 numbers, found 20000"):
            rms_norm(torch.ones(2, 20000, device=device), torch.ones(20000, device=device), 1e-5)
        x, w, rope = torch.ones(2, 1, 33, device=device), torch.ones(33, device=device), torch.ones(2, 17, 2)
        with pytest.raises(BackendError, match="even head size of at most 256, found 33"):
            qk_norm_rope(x, x, w, w, rope, 1e-5)
    finally:
        set_backend("auto")


@pytest.mark.parametrize(
    "found, input_dtype, words", [((7, 5), None, "8.0, found 7.5"), ((8, 6), torch.float8_e4m3fn, "8.9")]
)
def test_old_gpus_are_refused(found, input_dtype, words, monkeypatch):
    monkeypatch.setattr("s3dit.kernels.dispatch.capability", lambda device: found)
    assert words in why_unsupported(torch.ones(1, dtype=torch.float16), (torch.float16,), input_dtype)


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, rows", [(1, 1), (63, 3), (100, 1), (130, 130)])
def test_chunks_on_the_cpu_give_the_same_bits(n, rows, wide, input_dtype, poison):
    residual, x, gate, factor, row = modulated(n, 100, rows, wide, "cpu")
    calls = [
        (rms_norm_modulate, (x, factor, row, 1e-5, input_dtype)),
        (gated_residual, (residual, x, gate, row, 1e-5)),
        (gated_residual_norm, (residual, x, gate, factor, row, 1e-5, input_dtype)),
    ]
    for op, args in calls:
        assert op.choose(*args) is not op.reference
        for got, expected in zip(parts(op(*args)), parts(op.reference(*args)), strict=True):
            assert torch.equal(got.float(), expected.float())


def parts(answer):
    """The tensors of an answer, one after another."""
    if isinstance(answer, torch.Tensor):
        return [answer]
    return [x for part in answer if not isinstance(part, torch.dtype) for x in parts(part)]


def test_a_gradient_takes_the_reference():
    x = torch.randn(2, 32, requires_grad=True)
    args = x, torch.ones(1, 32), torch.zeros(2, dtype=torch.long), 1e-5
    assert rms_norm_modulate.choose(*args) is rms_norm_modulate.reference
    rms_norm_modulate(*args).sum().backward()
    assert x.grad.isfinite().all()
