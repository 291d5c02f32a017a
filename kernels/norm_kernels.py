"""The Triton kernels of the norms, and their launches: what `norm` runs on a GPU.

A program has whole rows in registers, so every number is read and written once; a kernel whose consumer reads 8 bits
rounds its rows before it writes them. All arithmetic is fp32, rounded once at the end. What is computed is defined by
the references in `norm`; a weight (D,) is a table of factors with a single row.
"""

from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.dispatch import kernel, launcher, tl, why_unsupported
from s3dit.kernels.rows import (
    FLOAT_DTYPES,
    MAX_ROW_WIDTH,
    empty_rows,
    encode_rows,
    flatten_rows,
    holding,
    magnitude_bits,
    max_code,
    round_rows,
    row_blocks,
)


@kernel
def _factors(
    table: "Any", stride: "Any", row: "Any", n: "Any", d: "Any", N: "Any", D: tl.constexpr, SHARED: tl.constexpr,
) -> Any:  # fmt: skip
    """Load each token's row of a table in fp32, (rows, BLOCK); or the single row that all share, (1, BLOCK)."""
    if SHARED:
        values = tl.load(table + d, mask=d < D, other=0.0)
    else:
        which = tl.load(row + n, mask=n < N, other=0).to(tl.int64)
        values = tl.load(table + which * stride + d, mask=(n < N) & (d < D), other=0.0)
    return values.to(tl.float32)


@kernel
def _inverse_rms(squares: "Any", D: tl.constexpr, eps: "Any") -> Any:
    """Return 1 / sqrt(mean + eps) of each row (rows, 1), from its squares (rows, BLOCK), which are 0 from D on."""
    return tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / D + eps)


@kernel
def _write_normed(
    y: "Any", factors: "Any", out: "Any", out_scale: "Any", n: "Any", d: "Any", N: "Any", eps: "Any", D: tl.constexpr,
    MAX_CODE: tl.constexpr,
) -> Any:  # fmt: skip
    """Normalize rows n, y (rows, BLOCK) fp32, scale them by the factors and write them, rounded where MAX_CODE > 0."""
    inverse = _inverse_rms(y * y, D, eps)
    y *= factors
    if MAX_CODE > 0:
        # Codes do not depend on what all numbers of a row are multiplied by; only the scale does.
        y, scale = encode_rows(y, magnitude_bits(y), inverse, MAX_CODE)
        tl.store(out_scale + n, scale, mask=n < N)
    else:
        y *= inverse
    tl.store(out + n * D + d, y.to(out.dtype.element_ty), mask=(n < N) & (d < D))


@kernel
def _norm_kernel(
    x: "Any", x_stride: "Any", factor: "Any", factor_stride: "Any", row: "Any", out: "Any", out_scale: "Any", N: "Any",
    eps: "Any", D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr, MAX_CODE: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute rms_norm or rms_norm_modulate of ROWS rows."""
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    y = tl.load(x + n * x_stride + d, mask=(n < N) & (d < D), other=0.0).to(tl.float32)
    factors = _factors(factor, factor_stride, row, n, d, N, D, SHARED)
    _write_normed(y, factors, out, out_scale, n, d, N, eps, D, MAX_CODE)


@kernel
def _residual_kernel(
    residual: "Any", residual_stride: "Any", x: "Any", x_stride: "Any", gate: "Any", gate_stride: "Any",
    factor: "Any", factor_stride: "Any", row: "Any", out: "Any", normed: "Any", normed_scale: "Any", N: "Any",
    eps: "Any", D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, NEXT: tl.constexpr,
    SHARED: tl.constexpr, MAX_CODE: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute gated_residual, gated_residual_norm or (not GATED) residual_norm of ROWS rows."""
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (n < N) & (d < D)
    y = tl.load(x + n * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y = y * _inverse_rms(y * y, D, eps) * _factors(gate, gate_stride, row, n, d, N, D, SHARED)
    y += tl.load(residual + n * residual_stride + d, mask=inside, other=0.0).to(tl.float32)
    y = y.to(out.dtype.element_ty)
    tl.store(out + n * D + d, y, mask=inside)
    if NEXT:
        # The norm is of the numbers as they were stored, rounded.
        factors = _factors(factor, factor_stride, row, n, d, N, D, SHARED)
        _write_normed(y.to(tl.float32), factors, normed, normed_scale, n, d, N, eps, D, MAX_CODE)


@kernel
def _load_pairs(
    x: "Any", rows: "Any", inside: "Any", D: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
) -> Any:  # fmt: skip
    """Load the first and the second numbers of all pairs of rows of D, in fp32, two (ROWS, HALF).

    rows, inside (ROWS, 1): where each row starts after x, and whether there is one.
    """
    if HALVES:
        i = tl.arange(0, HALF)[None, :]
        a = tl.load(x + rows + i, mask=inside & (i < D // 2), other=0.0)
        b = tl.load(x + rows + D // 2 + i, mask=inside & (i < D // 2), other=0.0)
    else:
        d = tl.arange(0, 2 * HALF)[None, :]
        both = tl.load(x + rows + d, mask=inside & (d < D), other=0.0)
        a, b = tl.split(tl.reshape(both, (ROWS, HALF, 2)))
    return a.to(tl.float32), b.to(tl.float32)


@kernel
def _rotate_heads(
    x: "Any", token: "Any", head: "Any", weight: "Any", cos: "Any", sin: "Any", out: "Any", out_scale: "Any", n: "Any",
    eps: "Any", H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
    MAX_CODE: tl.constexpr,
) -> Any:  # fmt: skip
    """Normalize, rotate and write all H heads of token n; HEADS and HALF are powers of two that hold H and D / 2."""
    h = tl.arange(0, HEADS)[:, None]
    a, b = _load_pairs(x + n * token, h * head, h < H, D, HEADS, HALF, HALVES)
    zero = tl.zeros((1, 1), tl.int32)
    a_weight, b_weight = _load_pairs(weight, zero, zero == 0, D, 1, HALF, HALVES)
    inverse = _inverse_rms(a * a + b * b, D, eps)
    a, b = a * inverse * a_weight, b * inverse * b_weight
    y = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (HEADS, 2 * HALF))
    if MAX_CODE > 0:
        y, scale = round_rows(y, MAX_CODE)
        tl.store(out_scale + n * H + h, scale, mask=h < H)
    y = y.to(out.dtype.element_ty)
    place = out + (n * H + h) * D
    if HALVES:
        i = tl.arange(0, HALF)[None, :]
        a, b = tl.split(tl.reshape(y, (HEADS, HALF, 2)))
        tl.store(place + i, a, mask=(h < H) & (i < D // 2))
        tl.store(place + D // 2 + i, b, mask=(h < H) & (i < D // 2))
    else:
        d = tl.arange(0, 2 * HALF)[None, :]
        tl.store(place + d, y, mask=(h < H) & (d < D))


@kernel
def _norm_rope_kernel(
    q: "Any", q_token: "Any", q_head: "Any", k: "Any", k_token: "Any", k_head: "Any", q_weight: "Any", k_weight: "Any",
    rope: "Any", q_out: "Any", q_scale: "Any", k_out: "Any", eps: "Any", Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    D: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
    MAX_CODE: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute qk_norm_rope of one token: its angles are read once for all heads of q and k."""
    n = tl.program_id(0).to(tl.int64)
    zero = tl.zeros((1, 1), tl.int32)
    cos, sin = _load_pairs(rope + n * D, zero, zero == 0, D, 1, HALF, False)
    _rotate_heads(
        k, k_token, k_head, k_weight, cos, sin, k_out, q_scale, n, eps, K_HEADS, D, K_BLOCK, HALF, HALVES, 0.0
    )  # fmt: skip
    _rotate_heads(
        q, q_token, q_head, q_weight, cos, sin, q_out, q_scale, n, eps, Q_HEADS, D, Q_BLOCK, HALF, HALVES, MAX_CODE
    )  # fmt: skip


def _fake_norm(
    x: Tensor, factor: Tensor, row: Tensor | None, eps: float, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    return empty_rows(x, input_dtype)


@launcher(_fake_norm)
def launch_norm(
    x: Tensor, factor: Tensor, row: Tensor | None, eps: float, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """RMS-normalize x (…, D) and scale it by factor: (D,), or (R, D) of which each row of x reads one.

    row (N,) integers, unused with a factor of one row · input_dtype: int8 or e4m3 to round the result by rows -> values
    and scales as `rows.empty_rows` shapes them.
    """
    out, out_scale = empty_rows(x, input_dtype)
    x, factor = flatten_rows(x), flatten_rows(factor)
    n, width = x.shape
    programs, rows, block, warps = row_blocks(n, width)
    if n:
        _norm_kernel[(programs,)](
            x, x.stride(0), factor, factor.stride(0), row, out, out_scale, n, eps, width, rows, block,
            len(factor) == 1, max_code(input_dtype), num_warps=warps,
        )  # fmt: skip
    return out, out_scale


def _fake_residual_norm(
    residual: Tensor, x: Tensor, gate: Tensor | None, factor: Tensor | None, row: Tensor | None, eps: float,
    input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if factor is None:
        return out, out.new_empty(0), out.new_empty(0)
    return out, *empty_rows(residual, input_dtype)


@launcher(_fake_residual_norm)
def launch_residual_norm(
    residual: Tensor, x: Tensor, gate: Tensor | None, factor: Tensor | None, row: Tensor | None, eps: float,
    input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute residual + RMSNorm(x) · gate (x itself without a gate) and, where `factor` is given, RMSNorm · factor.

    residual, x (N, D) · gate, factor (D,) or (R, D), both of as many rows · row (N,), unused where that is one -> the
    sum (N, D), and values and scales of its norm as `rows.empty_rows` shapes them, empty where there is none.
    """
    out, normed, scale = _fake_residual_norm(residual, x, gate, factor, row, eps, input_dtype)
    residual, x = flatten_rows(residual), flatten_rows(x)
    n, width = x.shape
    gates, factors = (x if table is None else flatten_rows(table) for table in (gate, factor))
    programs, rows, block, warps = row_blocks(n, width)
    if n:
        _residual_kernel[(programs,)](
            residual, residual.stride(0), x, x.stride(0), gates, gates.stride(0), factors, factors.stride(0), row, out,
            normed, scale, n, eps, width, rows, block, gate is not None, factor is not None,
            len(gates if factor is None else factors) == 1, max_code(input_dtype), num_warps=warps,
        )  # fmt: skip
    return out, normed, scale


def _fake_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float,
    input_dtype: torch.dtype | None, halves: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return *empty_rows(q, input_dtype), torch.empty(k.shape, dtype=k.dtype, device=k.device)


@launcher(_fake_norm_rope)
def launch_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float,
    input_dtype: torch.dtype | None, halves: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """RMS-normalize and rotate the heads of q (N, H, D) and k (N, KV, D), D even and at most 256.

    rope (N, D/2, 2) fp32 · halves: pairs are (i, i + D/2) instead of adjacent numbers -> q as values and scales as
    `rows.empty_rows` shapes them, and k (N, KV, D) in its own dtype.
    """
    q_out, q_scale, k_out = _fake_norm_rope(q, k, q_weight, k_weight, rope, eps, input_dtype, halves)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    n, heads, width = q.shape
    if n:
        _norm_rope_kernel[(n,)](
            q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), q_weight, k_weight, rope.contiguous(), q_out,
            q_scale, k_out, eps, heads, k.shape[1], width, holding(heads), holding(k.shape[1]),
            max(8, holding(width // 2)), halves, max_code(input_dtype), num_warps=4,
        )  # fmt: skip
    return q_out, q_scale, k_out


def rows_supported(x: Tensor, input_dtype: torch.dtype | None = None) -> bool | str:
    """Return True, or why these kernels cannot take rows x (…, D): their width, their dtype, or a GPU's capability."""
    if x.shape[-1] > MAX_ROW_WIDTH:
        return f"rows of at most {MAX_ROW_WIDTH} numbers, found {x.shape[-1]}"
    return why_unsupported(x, FLOAT_DTYPES, input_dtype) or True


def heads_supported(q: Tensor, input_dtype: torch.dtype | None = None) -> bool | str:
    """Return True, or why the kernel of qk_norm_rope cannot take heads q (N, H, D): their size, dtype, or the GPU."""
    if q.shape[-1] % 2 or q.shape[-1] > 256:
        return f"an even head size of at most 256, found {q.shape[-1]}"
    return why_unsupported(q, FLOAT_DTYPES, input_dtype) or True
