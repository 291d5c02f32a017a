"""Everything that stands around attention and feed-forward: normalize, modulate, gate, rotate.

All references compute in fp32 and round once, at the end, to the dtype of x. In fp32 they give the bits of diffusers
(x · rsqrt(mean(x²) + eps) · weight, in this order); in bf16 they are nearer to the exact answer, because diffusers
rounds before the product with the weight and the official code rounds everywhere.

Modulation is a table with one row an item and noise state; `row` says which row a token reads. A table of one row is
shared by all tokens and is broadcast, so the ordinary case copies nothing.

Source: official ZImageTransformerBlock and Attention.
"""

import torch
from torch import Tensor

from s3dit.kernels.dispatch import op


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS-normalize x (…, D) over D and scale by weight (D,); fp32 inside, dtype of x out."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@op
def rms_norm_modulate(x: Tensor, weight: Tensor, scale: Tensor, row: Tensor, eps: float) -> Tensor:
    """RMS-normalize, then scale by (1 + modulation) of each token's row.

    x (N, D) · weight (D,) · scale (R, D) · row (N,) integers below R -> (N, D), dtype of x.
    """
    return (rms_norm.reference(x.float(), weight, eps) * (1.0 + _rows(scale, row))).to(x.dtype)


@op
def gated_residual(residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, row: Tensor, eps: float) -> Tensor:
    """residual + tanh(gate) · RMSNorm(x): the second half of the sandwich.

    residual, x (N, D) · weight (D,) · gate (R, D), before tanh · row (N,) -> (N, D), dtype of residual.
    """
    gated = _rows(gate, row).tanh() * rms_norm.reference(x.float(), weight, eps)
    return (residual.float() + gated).to(residual.dtype)


@op
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMS-normalize each head of q and k, then rotate adjacent pairs by the token's angles.

    q, k (N, H, D) · weights (D,) · rope (N, D/2, 2) fp32 (cos, sin) -> q, k of the same shape and dtype.
    """
    return _rotate(rms_norm.reference(q.float(), q_weight, eps), rope).to(q.dtype), _rotate(
        rms_norm.reference(k.float(), k_weight, eps), rope
    ).to(k.dtype)


def _rows(table: Tensor, row: Tensor) -> Tensor:
    """Each token's row of the table in fp32, or the one row that all tokens share."""
    return (table if table.shape[0] == 1 else table[row]).float()


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate pairs: (a, b) -> (a·cos - b·sin, a·sin + b·cos); x (N, H, D) fp32."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


@qk_norm_rope.on("cpu", "torch", when=lambda *args: not torch.compiler.is_compiling())
def _complex_rotation(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same rotation as one complex product: strided pair access makes the real form several times slower on CPU."""
    turn = torch.view_as_complex(rope)[:, None]

    def rotate(x: Tensor, weight: Tensor) -> Tensor:
        wide = rms_norm.reference(x.float(), weight, eps)
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    return rotate(q, q_weight), rotate(k, k_weight)
