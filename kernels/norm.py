"""Everything that stands around attention and feed-forward: normalize, modulate, gate, rotate.

All references compute in fp32 and round once, at the end, to the dtype of x. In fp32 they give the bits of diffusers
(x · rsqrt(mean(x²) + eps) · weight, in this order); in bf16 they are nearer to the exact answer, because diffusers
rounds before the product with the weight and the official code rounds everywhere.

Modulation is a table with one row an item and noise state; `row` says which row a token reads. A table of one row is
shared by all tokens and is broadcast, so the ordinary case copies nothing.

An Op whose consumer reads 8 bits (`input_dtype`) gives `QuantizedRows` instead of a tensor, by definition
`quantize_rows` of what it gives otherwise. The Triton kernels of all Ops are in `norm_kernels`.

Source: official ZImageTransformerBlock and Attention.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.dispatch import op
from s3dit.kernels.norm_kernels import heads_fit, launch_gated_norm, launch_norm, launch_norm_rope, rows_fit
from s3dit.kernels.rows import given
from s3dit.kernels.scheme import QuantizedRows, quantize_rows

# Rows that the CPU takes at a time: 64 of width 3,840 are 1 MiB in fp32.
PIECE = 64


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS-normalize x (…, D) over D and scale by weight (D,); fp32 inside, dtype of x out."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@op
def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor, row: Tensor, eps: float, input_dtype: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    """RMS-normalize, then scale by (1 + modulation) of each token's row.

    x (N, D) · weight (D,) · scale (R, D) · row (N,) integers below R -> (N, D), dtype of x or 8-bit as `input_dtype`
    says.
    """
    return _given((rms_norm.reference(x.float(), weight, eps) * (1.0 + _rows(scale, row))).to(x.dtype), input_dtype)


@op
def gated_residual(residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, row: Tensor, eps: float) -> Tensor:
    """residual + tanh(gate) · RMSNorm(x): the second half of the sandwich.

    residual, x (N, D) · weight (D,) · gate (R, D), before tanh · row (N,) -> (N, D), dtype of residual.
    """
    gated = _rows(gate, row).tanh() * rms_norm.reference(x.float(), weight, eps)
    return (residual.float() + gated).to(residual.dtype)


@op
def gated_residual_norm(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor, scale: Tensor, row: Tensor,
    eps: float, input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:  # fmt: skip
    """The end of one sandwich and the beginning of the next: gated_residual, and rms_norm_modulate of its result.

    As there; next_weight (D,) and scale (R, D) belong to the second norm -> the new residual (N, D), and it normed.
    """
    residual = gated_residual.reference(residual, x, weight, gate, row, eps)
    return residual, rms_norm_modulate.reference(residual, next_weight, scale, row, eps, input_dtype)


@op
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """RMS-normalize each head of q and k, then rotate adjacent pairs by the token's angles.

    q, k (N, H, D) · weights (D,) · rope (N, D/2, 2) fp32 (cos, sin) -> q, k of the same shape and dtype, q in 8 bits
    where attention `input_dtype` them. k stays wide: before it may be rounded, the mean over all its tokens has to go.
    """
    q_turned = _rotate(rms_norm.reference(q.float(), q_weight, eps), rope).to(q.dtype)
    k_turned = _rotate(rms_norm.reference(k.float(), k_weight, eps), rope).to(k.dtype)
    return _given(q_turned, input_dtype), k_turned


def _rows(table: Tensor, row: Tensor) -> Tensor:
    """Each token's row of the table in fp32, or the one row that all tokens share."""
    return (table if table.shape[0] == 1 else table[row]).float()


def _given(x: Tensor, input_dtype: torch.dtype | None) -> Tensor | QuantizedRows:
    """x as its consumer takes it."""
    return x if input_dtype is None else quantize_rows(x, input_dtype)


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate pairs: (a, b) -> (a·cos - b·sin, a·sin + b·cos); x (N, H, D) fp32."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def _in_pieces(*args: Any) -> bool | str:
    """What the CPU forms need: nobody who fuses the reference better, or wants gradients of what they overwrite."""
    if torch.compiler.is_compiling():
        return "a compiler fuses the reference"
    watched = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
    return not watched or "a gradient needs what would be overwritten"


def _pieces(rows: int) -> Iterator[slice]:
    """Runs of PIECE rows."""
    return (slice(start, start + PIECE) for start in range(0, rows, PIECE))


def _norm_in_place(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm of a copy of x in fp32, in the copy's own memory; weight fp32."""
    wide = x.to(torch.float32, copy=True)
    return wide.mul_(torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).mul_(weight)


# On a CPU every pass of a reference goes through memory, and every result of a pass faults new pages in. The same
# arithmetic on a few rows at a time, in place, stays in the cache and gives the same bits. 1,088 tokens of width 3,840
# on one (shared) core of a Zen 5, bf16: 1.8 to 4 times less time than the references, 6 for the rotation.
@rms_norm_modulate.on("cpu", "torch", when=_in_pieces)
def _norm_modulate_in_pieces(
    x: Tensor, weight: Tensor, scale: Tensor, row: Tensor, eps: float, input_dtype: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    out, weight, table = torch.empty_like(x), weight.float(), 1.0 + scale.float()
    for piece in _pieces(len(x)):
        out[piece] = _norm_in_place(x[piece], weight, eps).mul_(_rows(table, row[piece]))
    return _given(out, input_dtype)


@gated_residual.on("cpu", "torch", when=_in_pieces)
def _gated_in_pieces(residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, row: Tensor, eps: float) -> Tensor:
    out, weight, gate = torch.empty_like(residual), weight.float(), gate.float().tanh()
    for piece in _pieces(len(x)):
        out[piece] = _norm_in_place(x[piece], weight, eps).mul_(_rows(gate, row[piece])).add_(residual[piece])
    return out


@gated_residual_norm.on("cpu", "torch", when=_in_pieces)
def _gated_norm_in_pieces(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor, scale: Tensor, row: Tensor,
    eps: float, input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:  # fmt: skip
    residual = _gated_in_pieces(residual, x, weight, gate, row, eps)
    return residual, _norm_modulate_in_pieces(residual, next_weight, scale, row, eps, input_dtype)


@qk_norm_rope.on("cpu", "torch", when=_in_pieces)
def _rotation_in_pieces(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """The same rotation as one complex product: strided pair access makes the real form several times slower on CPU."""
    turn = torch.view_as_complex(rope)[:, None]

    def rotate(x: Tensor, weight: Tensor) -> Tensor:
        out, weight = torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.float()
        for piece in _pieces(len(x)):
            wide = _norm_in_place(x[piece], weight, eps)
            torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turn[piece])
            out[piece] = wide
        return out

    return _given(rotate(q, q_weight), input_dtype), rotate(k, k_weight)


@rms_norm.on("cuda", "triton", when=lambda x, weight, eps: rows_fit(x))
def _triton_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return launch_norm(x, weight, None, None, eps, None)[0]


@rms_norm_modulate.on("cuda", "triton", when=lambda x, w, scale, row, eps, input_dtype=None: rows_fit(x, input_dtype))
def _triton_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor, row: Tensor, eps: float, input_dtype: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    out, out_scale = launch_norm(x, weight, scale, row, eps, input_dtype)
    return given(out, out_scale, x.dtype)


@gated_residual.on("cuda", "triton", when=lambda residual, *args: rows_fit(residual))
def _triton_gated(residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, row: Tensor, eps: float) -> Tensor:
    return launch_gated_norm(residual, x, weight, gate, None, None, row, eps, None)[0]


@gated_residual_norm.on(
    "cuda", "triton", when=lambda residual, *args: rows_fit(residual, args[7] if len(args) > 7 else None)
)
def _triton_gated_norm(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor, scale: Tensor, row: Tensor,
    eps: float, input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:  # fmt: skip
    out, normed, normed_scale = launch_gated_norm(residual, x, weight, gate, next_weight, scale, row, eps, input_dtype)
    return out, given(normed, normed_scale, residual.dtype)


@qk_norm_rope.on("cuda", "triton", when=heads_fit)
def _triton_rotation(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor | QuantizedRows, Tensor]:
    q_out, q_scale, k_out = launch_norm_rope(q, k, q_weight, k_weight, rope, eps, input_dtype)
    return given(q_out, q_scale, q.dtype), k_out
