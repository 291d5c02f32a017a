"""References against float64 formulas and torch.nn; stand-ins against references, over awkward shapes.

fp32 tolerance 1e-6 relative: a sum of some hundred fp32 products and one reciprocal root, a few ulp (6e-8 each).
"""

import pytest
import torch

from s3dit.kernels.norm import gated_residual, qk_norm_rope, rms_norm, rms_norm_modulate
from s3dit.kernels.swiglu import swiglu
from s3dit.layers import rope_table

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
    x, w, table, rest = torch.randn(shape), torch.randn(d), torch.randn(rows, d), torch.randn(shape)
    row = torch.randint(rows, (n,))
    expected = norm64(x, w, 1e-5) * (1 + table[row].double())
    assert relative(rms_norm_modulate(x, w, table, row, 1e-5), expected) < 1e-6
    expected = rest.double() + table[row].double().tanh() * norm64(x, w, 1e-5)
    assert relative(gated_residual(rest, x, w, table, row, 1e-5), expected) < 1e-6


@pytest.mark.parametrize("n", [1, 31, 33])
def test_rotation_in_all_forms(n):
    positions = torch.randint(0, 3000, (n, 3))
    rope = rope_table(positions, (8, 12, 12), 256.0)
    q, k = torch.randn(n, 3, 32), torch.randn(n, 3, 64)[..., ::2]  # k is not contiguous
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
        for got, x, w in zip(form(q, k, wq, wk, rope, 1e-5), (q, k), (wq, wk), strict=True):
            pairs = torch.view_as_complex(norm64(x, w, 1e-5).unflatten(-1, (-1, 2)))
            # 2e-4: an angle of 3000 rad has 1.2e-4 rad to the fp32 ulp, as in the official tables
            assert relative(got, torch.view_as_real(pairs * turn).flatten(-2)) < 2e-4
    both = qk_norm_rope(q, k, wq, wk, rope, 1e-5), qk_norm_rope.reference(q, k, wq, wk, rope, 1e-5)
    assert all(relative(a, b) < 1e-7 for a, b in zip(*both, strict=True))


def test_swiglu():
    gate, up = torch.randn(33, 100), torch.randn(33, 100)
    expected = gate.double() * gate.double().sigmoid() * up.double()
    assert relative(swiglu.reference(gate, up), expected) < 1e-6
    assert relative(swiglu(gate.clone(), up), expected) < 1e-6
