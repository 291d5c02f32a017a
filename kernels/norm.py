"""The Ops around attention and feed-forward: RMSNorm, modulation, gated residual, rotary position embedding.

All references compute in fp32 and round once, at the end, to the dtype of x. In fp32 they give the bits of diffusers
(x · rsqrt(mean(x²) + eps) · weight, in this order); in bf16 they are nearer to the exact answer, because diffusers
rounds before the product with the weight and the official code rounds everywhere.

Modulation comes as tables of factors (R, D) fp32, with a row an item and noise state: weight · (1 + scale) of the first
norm of a branch, weight · tanh(gate) of the second. They are computed once by the caller, not once a token.
`modulation_row` (N,) holds the row of each token. A table of a single row is shared by all tokens and is broadcast, so
the ordinary case copies nothing.

An Op whose result is read in 8 bits (`input_dtype`) returns `QuantizedRows` instead of a tensor: by definition
`quantize_rows` of what it returns otherwise. The Triton kernels of all Ops are in `norm_kernels`.

Source: official ZImageTransformerBlock and Attention.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from s3dit.kernels.dispatch import op
from s3dit.kernels.norm_kernels import (
    heads_supported,
    launch_norm,
    launch_norm_rope,
    launch_residual_norm,
    rows_supported,
)
from s3dit.kernels.rows import as_output
from s3dit.kernels.scheme import QuantizedRows, quantize_rows

# Which numbers of a head are rotated together; see `qk_norm_rope`.
Pairs = Literal["adjacent", "halves"]
# Rows that the CPU takes at a time: 64 of width 3,840 are 1 MiB in fp32.
CHUNK_ROWS = 64


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS-normalize x (…, D) over D and scale it by weight (D,), in fp32 -> (…, D), dtype of x."""
    upcast = x.float()
    return (upcast * torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@op
def rms_norm_modulate(
    x: Tensor, factor: Tensor, modulation_row: Tensor, eps: float, input_dtype: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    """RMS-normalize x and scale it by each token's row of the factors, in fp32.

    x (N, D) · factor (R, D) fp32, weight · (1 + scale) · modulation_row (N,) integers below R · input_dtype: None, int8
    or e4m3 -> (N, D), dtype of x, or QuantizedRows of input_dtype.
    """
    normed = rms_norm.reference(x.float(), _rows_of(factor, modulation_row), eps)
    return _as_input(normed.to(x.dtype), input_dtype)


@op
def gated_residual(residual: Tensor, x: Tensor, gate: Tensor, modulation_row: Tensor, eps: float) -> Tensor:
    """Compute residual + RMSNorm(x) · gate, in fp32.

    residual, x (N, D) · gate (R, D) fp32, weight · tanh(gate) · modulation_row (N,) -> (N, D), dtype of residual.
    """
    gated = rms_norm.reference(x.float(), _rows_of(gate, modulation_row), eps)
    return (residual.float() + gated).to(residual.dtype)


@op
def gated_residual_norm(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    factor: Tensor,
    modulation_row: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:
    """Compute gated_residual, and rms_norm_modulate of its result for the next layer.

    Arguments as there, both tables of as many rows -> the residual (N, D), and its norm (N, D) or QuantizedRows of
    input_dtype.
    """
    residual = gated_residual.reference(residual, x, gate, modulation_row, eps)
    return residual, rms_norm_modulate.reference(residual, factor, modulation_row, eps, input_dtype)


@op
def residual_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute residual + x, and its rms_norm for the next layer: the border between layers without modulation.

    residual, x (N, D) of one dtype · weight (D,) -> the sum and its norm, (N, D) each, dtype of residual.
    """
    residual = residual + x
    return residual, rms_norm.reference(residual, weight, eps)


@op
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
    pairs: Pairs = "adjacent",
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """RMS-normalize each head of q and k, then rotate pairs of its numbers by the token's angles.

    q (N, H, D), k (N, KV, D) · weights (D,) · rope (N, D/2, 2) fp32 (cos, sin) · pairs: numbers 2i and 2i + 1
    ("adjacent"), or i and i + D/2 ("halves", as Qwen3) -> q, k of the same shape and dtype; q as QuantizedRows where
    input_dtype is int8. k is not rounded here: its mean over all tokens is subtracted first.
    """
    q_rotated = _rotate(rms_norm.reference(q.float(), q_weight, eps), rope, pairs).to(q.dtype)
    k_rotated = _rotate(rms_norm.reference(k.float(), k_weight, eps), rope, pairs).to(k.dtype)
    return _as_input(q_rotated, input_dtype), k_rotated


def _rows_of(table: Tensor, modulation_row: Tensor) -> Tensor:
    """Return each token's row of a table (N, D), or the single row that all tokens share (1, D)."""
    return table if table.shape[0] == 1 else table[modulation_row]


def _as_input(x: Tensor, input_dtype: torch.dtype | None) -> Tensor | QuantizedRows:
    """Return x as the next layer reads it: itself, or QuantizedRows of input_dtype."""
    return x if input_dtype is None else quantize_rows(x, input_dtype)


def _rotate(x: Tensor, rope: Tensor, pairs: Pairs) -> Tensor:
    """Rotate pairs: (a, b) -> (a·cos - b·sin, a·sin + b·cos); x (N, H, D) fp32."""
    shape, axis = ((-1, 2), -1) if pairs == "adjacent" else ((2, -1), -2)
    a, b = x.unflatten(-1, shape).unbind(axis)
    cos, sin = rope[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=axis).flatten(-2)


def _can_overwrite(*args: Any) -> bool | str:
    """Return whether the CPU forms may run: not under a compiler, which fuses the reference, nor with gradients."""
    if torch.compiler.is_compiling():
        return "a compiler fuses the reference"
    watched = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
    return not watched or "a gradient needs what would be overwritten"


def _chunks(rows: int) -> Iterator[slice]:
    """Return slices of CHUNK_ROWS rows."""
    return (slice(start, start + CHUNK_ROWS) for start in range(0, rows, CHUNK_ROWS))


def _norm_in_place(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return rms_norm of x in fp32, computed in the memory of an fp32 copy; weight fp32."""
    upcast = x.to(torch.float32, copy=True)
    return upcast.mul_(torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + eps)).mul_(weight)


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor | None = None) -> Tensor:
    """Rotate adjacent pairs of x (n, H, D) fp32 by complex factors (n, 1, D/2), or halves by cos and ∓sin (n, 1, D).

    Access to pairs by strides, as in the reference, is several times slower on a CPU.
    """
    if sin is None:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(cos)
        return x
    exchanged = x.roll(x.shape[-1] // 2, -1).mul_(sin)
    return x.mul_(cos).add_(exchanged)


# On a CPU every pass of a reference goes through memory, and every result of a pass faults new pages in. The same
# arithmetic on a few rows at a time, in place, stays in the cache and gives the same bits. 1,088 tokens of width 3,840
# on one (shared) core of a Zen 5, bf16: 1.8 to 4 times less time than the references, 6 for the rotation.
@rms_norm_modulate.on("cpu", "torch", when=_can_overwrite, numerics="exact")
def _norm_modulate_in_chunks(
    x: Tensor, factor: Tensor, modulation_row: Tensor, eps: float, input_dtype: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    out = torch.empty_like(x)
    for chunk in _chunks(len(x)):
        out[chunk] = _norm_in_place(x[chunk], _rows_of(factor, modulation_row[chunk]), eps)
    return _as_input(out, input_dtype)


@gated_residual.on("cpu", "torch", when=_can_overwrite, numerics="exact")
def _gated_in_chunks(residual: Tensor, x: Tensor, gate: Tensor, modulation_row: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(residual)
    for chunk in _chunks(len(x)):
        out[chunk] = _norm_in_place(x[chunk], _rows_of(gate, modulation_row[chunk]), eps).add_(residual[chunk])
    return out


@gated_residual_norm.on("cpu", "torch", when=_can_overwrite, numerics="exact")
def _gated_norm_in_chunks(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    factor: Tensor,
    modulation_row: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:
    residual = _gated_in_chunks(residual, x, gate, modulation_row, eps)
    return residual, _norm_modulate_in_chunks(residual, factor, modulation_row, eps, input_dtype)


@qk_norm_rope.on("cpu", "torch", when=_can_overwrite, numerics="exact")
def _rotation_in_chunks(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
    pairs: Pairs = "adjacent",
) -> tuple[Tensor | QuantizedRows, Tensor]:
    factors: tuple[Tensor, ...]
    if pairs == "adjacent":
        factors = (torch.view_as_complex(rope)[:, None],)
    else:
        factors = rope.movedim(-1, 0).repeat(1, 1, 2)[:, :, None].unbind()
        factors[1][..., : rope.shape[1]].neg_()

    def rotate(x: Tensor, weight: Tensor) -> Tensor:
        out, weight = torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.float()
        for chunk in _chunks(len(x)):
            out[chunk] = _rotate_in_place(_norm_in_place(x[chunk], weight, eps), *(each[chunk] for each in factors))
        return out

    return _as_input(rotate(q, q_weight), input_dtype), rotate(k, k_weight)


@rms_norm.on("cuda", "triton", when=lambda x, weight, eps: rows_supported(x))
def _triton_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return launch_norm(x, weight, None, eps, None)[0]


@rms_norm_modulate.on(
    "cuda", "triton", when=lambda x, factor, modulation_row, eps, input_dtype=None: rows_supported(x, input_dtype)
)
def _triton_norm_modulate(
    x: Tensor, factor: Tensor, modulation_row: Tensor, eps: float, input_dtype: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    return as_output(*launch_norm(x, factor, modulation_row, eps, input_dtype), x.dtype)


@gated_residual.on("cuda", "triton", when=lambda residual, *args: rows_supported(residual))
def _triton_gated(residual: Tensor, x: Tensor, gate: Tensor, modulation_row: Tensor, eps: float) -> Tensor:
    return launch_residual_norm(residual, x, gate, None, modulation_row, eps, None)[0]


@gated_residual_norm.on(
    "cuda",
    "triton",
    when=lambda residual, x, gate, factor, modulation_row, eps, input_dtype=None: rows_supported(residual, input_dtype),
)
def _triton_gated_norm(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    factor: Tensor,
    modulation_row: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:
    out, normed, scale = launch_residual_norm(residual, x, gate, factor, modulation_row, eps, input_dtype)
    return out, as_output(normed, scale, residual.dtype)


@residual_norm.on("cuda", "triton", when=lambda residual, x, weight, eps: rows_supported(residual))
def _triton_residual_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return launch_residual_norm(residual, x, None, weight, None, eps, None)[:2]


@qk_norm_rope.on(
    "cuda",
    "triton",
    when=lambda q, k, q_weight, k_weight, rope, eps, input_dtype=None, pairs=None: heads_supported(q, input_dtype),
)
def _triton_rotation(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
    pairs: Pairs = "adjacent",
) -> tuple[Tensor | QuantizedRows, Tensor]:
    q_out, q_scale, k_out = launch_norm_rope(q, k, q_weight, k_weight, rope, eps, input_dtype, pairs == "halves")
    return as_output(q_out, q_scale, q.dtype), k_out
