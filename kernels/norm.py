"""The Ops around attention and feed-forward: RMSNorm, modulation, gated residual, rotary position embedding.

All references compute in fp32 and round once, at the end, to the dtype of x. In fp32 they give the bits of diffusers
(x · rsqrt(mean(x²) + eps) · weight, in this order); in bf16 they are nearer to the exact answer, because diffusers
rounds before the product with the weight and the official code rounds everywhere.

Modulation is a table (R, D) with a row an item and noise state; `modulation_row` (N,) holds the row of each token. A
table of a single row is shared by all tokens and is broadcast, so the ordinary case copies nothing.

An Op whose result is read in 8 bits (`input_dtype`) returns `QuantizedRows` instead of a tensor: by definition
`quantize_rows` of what it returns otherwise. The Triton kernels of all Ops are in `norm_kernels`.

Source: official ZImageTransformerBlock and Attention.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.dispatch import op
from s3dit.kernels.norm_kernels import heads_supported, launch_gated_norm, launch_norm, launch_norm_rope, rows_supported
from s3dit.kernels.rows import as_output
from s3dit.kernels.scheme import QuantizedRows, quantize_rows

# Rows that the CPU takes at a time: 64 of width 3,840 are 1 MiB in fp32.
CHUNK_ROWS = 64


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS-normalize x (…, D) over D and scale it by weight (D,), in fp32 -> (…, D), dtype of x."""
    upcast = x.float()
    return (upcast * torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@op
def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor, modulation_row: Tensor, eps: float, input_dtype: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    """RMS-normalize x, then scale it by 1 + the modulation of each token, in fp32.

    x (N, D) · weight (D,) · scale (R, D) · modulation_row (N,) integers below R · input_dtype: None, int8 or e4m3 ->
    (N, D), dtype of x, or QuantizedRows of input_dtype.
    """
    return _as_input(
        (rms_norm.reference(x.float(), weight, eps) * (1.0 + _modulation_rows(scale, modulation_row))).to(x.dtype),
        input_dtype,
    )


@op
def gated_residual(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, modulation_row: Tensor, eps: float
) -> Tensor:
    """Compute residual + tanh(gate) · RMSNorm(x), in fp32.

    residual, x (N, D) · weight (D,) · gate (R, D), before tanh · modulation_row (N,) -> (N, D), dtype of residual.
    """
    gated = _modulation_rows(gate, modulation_row).tanh() * rms_norm.reference(x.float(), weight, eps)
    return (residual.float() + gated).to(residual.dtype)


@op
def gated_residual_norm(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor, scale: Tensor,
    modulation_row: Tensor, eps: float, input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:  # fmt: skip
    """Compute gated_residual, and rms_norm_modulate of its result for the next layer.

    Arguments as there; next_weight (D,) and scale (R, D) are those of the second norm -> the residual (N, D), and its
    norm (N, D) or QuantizedRows of input_dtype.
    """
    residual = gated_residual.reference(residual, x, weight, gate, modulation_row, eps)
    return residual, rms_norm_modulate.reference(residual, next_weight, scale, modulation_row, eps, input_dtype)


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

    q, k (N, H, D) · weights (D,) · rope (N, D/2, 2) fp32 (cos, sin) -> q, k of the same shape and dtype; q as
    QuantizedRows where input_dtype is int8. k is not rounded here: its mean over all tokens is subtracted first.
    """
    q_rotated = _rotate(rms_norm.reference(q.float(), q_weight, eps), rope).to(q.dtype)
    k_rotated = _rotate(rms_norm.reference(k.float(), k_weight, eps), rope).to(k.dtype)
    return _as_input(q_rotated, input_dtype), k_rotated


def _modulation_rows(table: Tensor, modulation_row: Tensor) -> Tensor:
    """Return each token's row of the table (N, D) in fp32, or the single row that all tokens share (1, D)."""
    return (table if table.shape[0] == 1 else table[modulation_row]).float()


def _as_input(x: Tensor, input_dtype: torch.dtype | None) -> Tensor | QuantizedRows:
    """Return x as the next layer reads it: itself, or QuantizedRows of input_dtype."""
    return x if input_dtype is None else quantize_rows(x, input_dtype)


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate pairs: (a, b) -> (a·cos - b·sin, a·sin + b·cos); x (N, H, D) fp32."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


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


# On a CPU every pass of a reference goes through memory, and every result of a pass faults new pages in. The same
# arithmetic on a few rows at a time, in place, stays in the cache and gives the same bits. 1,088 tokens of width 3,840
# on one (shared) core of a Zen 5, bf16: 1.8 to 4 times less time than the references, 6 for the rotation.
@rms_norm_modulate.on("cpu", "torch", when=_can_overwrite, numerics="exact")
def _norm_modulate_in_chunks(
    x: Tensor, weight: Tensor, scale: Tensor, modulation_row: Tensor, eps: float, input_dtype: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    out, weight, table = torch.empty_like(x), weight.float(), 1.0 + scale.float()
    for chunk in _chunks(len(x)):
        out[chunk] = _norm_in_place(x[chunk], weight, eps).mul_(_modulation_rows(table, modulation_row[chunk]))
    return _as_input(out, input_dtype)


@gated_residual.on("cpu", "torch", when=_can_overwrite, numerics="exact")
def _gated_in_chunks(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, modulation_row: Tensor, eps: float
) -> Tensor:
    out, weight, gate = torch.empty_like(residual), weight.float(), gate.float().tanh()
    for chunk in _chunks(len(x)):
        out[chunk] = (
            _norm_in_place(x[chunk], weight, eps)
            .mul_(_modulation_rows(gate, modulation_row[chunk]))
            .add_(residual[chunk])
        )
    return out


@gated_residual_norm.on("cpu", "torch", when=_can_overwrite, numerics="exact")
def _gated_norm_in_chunks(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor, scale: Tensor,
    modulation_row: Tensor, eps: float, input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:  # fmt: skip
    residual = _gated_in_chunks(residual, x, weight, gate, modulation_row, eps)
    return residual, _norm_modulate_in_chunks(residual, next_weight, scale, modulation_row, eps, input_dtype)


@qk_norm_rope.on("cpu", "torch", when=_can_overwrite, numerics="exact")
def _rotation_in_chunks(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """Rotate by a complex product: strided access to pairs makes the real form several times slower on a CPU."""
    rotation = torch.view_as_complex(rope)[:, None]

    def rotate(x: Tensor, weight: Tensor) -> Tensor:
        out, weight = torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.float()
        for chunk in _chunks(len(x)):
            upcast = _norm_in_place(x[chunk], weight, eps)
            torch.view_as_complex(upcast.unflatten(-1, (-1, 2))).mul_(rotation[chunk])
            out[chunk] = upcast
        return out

    return _as_input(rotate(q, q_weight), input_dtype), rotate(k, k_weight)


@rms_norm.on("cuda", "triton", when=lambda x, weight, eps: rows_supported(x))
def _triton_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return launch_norm(x, weight, None, None, eps, None)[0]


@rms_norm_modulate.on(
    "cuda", "triton", when=lambda x, w, scale, modulation_row, eps, input_dtype=None: rows_supported(x, input_dtype)
)
def _triton_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor, modulation_row: Tensor, eps: float, input_dtype: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    out, out_scale = launch_norm(x, weight, scale, modulation_row, eps, input_dtype)
    return as_output(out, out_scale, x.dtype)


@gated_residual.on("cuda", "triton", when=lambda residual, *args: rows_supported(residual))
def _triton_gated(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, modulation_row: Tensor, eps: float
) -> Tensor:
    return launch_gated_norm(residual, x, weight, gate, None, None, modulation_row, eps, None)[0]


@gated_residual_norm.on(
    "cuda", "triton", when=lambda residual, *args: rows_supported(residual, args[7] if len(args) > 7 else None)
)
def _triton_gated_norm(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor, scale: Tensor,
    modulation_row: Tensor, eps: float, input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:  # fmt: skip
    out, normed, normed_scale = launch_gated_norm(
        residual, x, weight, gate, next_weight, scale, modulation_row, eps, input_dtype
    )
    return out, as_output(normed, normed_scale, residual.dtype)


@qk_norm_rope.on("cuda", "triton", when=heads_supported)
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
    return as_output(q_out, q_scale, q.dtype), k_out
