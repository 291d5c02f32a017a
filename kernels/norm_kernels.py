"""The Triton kernels of the norms, and their launches: what `norm` runs on a GPU.

A program has whole rows in registers, so every number is read and written once; a kernel whose consumer reads 8 bits
rounds its rows before it writes them. All arithmetic is fp32, rounded once at the end. What is computed is defined by
the references in `norm`.
"""

from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.dispatch import kernel, launcher, tl, why_unsupported
from s3dit.kernels.rows import FLOAT_DTYPES, MAX_ROW_WIDTH, empty_rows, flatten_rows, max_code, round_rows, row_blocks


@kernel
def _normed(x: "Any", weight: "Any", d: "Any", D: tl.constexpr, eps: "Any") -> Any:
    """Normalize x (rows, BLOCK) fp32, whose columns from D on are 0, and scale it by weight."""
    inverse = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + eps)
    return x * inverse * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)


@kernel
def _modulation(
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
def _norm_kernel(
    x: "Any", x_stride: "Any", weight: "Any", table: "Any", table_stride: "Any", row: "Any", out: "Any",
    out_scale: "Any", N: "Any", eps: "Any", D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    MODULATED: tl.constexpr, SHARED: tl.constexpr, LARGEST: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute rms_norm or rms_norm_modulate of ROWS rows."""
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (n < N) & (d < D)
    y = _normed(tl.load(x + n * x_stride + d, mask=inside, other=0.0).to(tl.float32), weight, d, D, eps)
    if MODULATED:
        y *= 1.0 + _modulation(table, table_stride, row, n, d, N, D, SHARED)
    if LARGEST > 0:
        y, scale = round_rows(y, LARGEST)
        tl.store(out_scale + n, scale, mask=n < N)
    tl.store(out + n * D + d, y.to(out.dtype.element_ty), mask=inside)


@kernel
def _gated_kernel(
    residual: "Any", residual_stride: "Any", x: "Any", x_stride: "Any", weight: "Any", gate: "Any", gate_stride: "Any",
    next_weight: "Any", table: "Any", table_stride: "Any", row: "Any", out: "Any", normed: "Any", normed_scale: "Any",
    N: "Any", eps: "Any", D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, NEXT: tl.constexpr,
    SHARED: tl.constexpr, LARGEST: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute gated_residual or gated_residual_norm of ROWS rows; both tables have as many rows."""
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (n < N) & (d < D)
    y = _normed(tl.load(x + n * x_stride + d, mask=inside, other=0.0).to(tl.float32), weight, d, D, eps)
    opening = _modulation(gate, gate_stride, row, n, d, N, D, SHARED)
    # tanh, which Triton has only in a library that its interpreter lacks.
    y *= 2.0 * tl.sigmoid(2.0 * opening) - 1.0
    y += tl.load(residual + n * residual_stride + d, mask=inside, other=0.0).to(tl.float32)
    y = y.to(out.dtype.element_ty)
    tl.store(out + n * D + d, y, mask=inside)
    if NEXT:
        # The norm is of the numbers as they were stored, rounded.
        y = _normed(y.to(tl.float32), next_weight, d, D, eps)
        y *= 1.0 + _modulation(table, table_stride, row, n, d, N, D, SHARED)
        if LARGEST > 0:
            y, scale = round_rows(y, LARGEST)
            tl.store(normed_scale + n, scale, mask=n < N)
        tl.store(normed + n * D + d, y.to(normed.dtype.element_ty), mask=inside)


@kernel
def _normed_rope(
    x: "Any", token: "Any", head: "Any", weight: "Any", cos: "Any", sin: "Any", n: "Any", h: "Any", d: "Any",
    eps: "Any", H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Normalize and rotate all heads of one token -> (HEADS, BLOCK) fp32."""
    heads = tl.load(x + n * token + h * head + d, mask=(h < H) & (d < D), other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(_normed(heads, weight, d, D, eps), (HEADS, BLOCK // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (HEADS, BLOCK))


@kernel
def _norm_rope_kernel(
    q: "Any", q_token: "Any", q_head: "Any", k: "Any", k_token: "Any", k_head: "Any", q_weight: "Any", k_weight: "Any",
    rope: "Any", q_out: "Any", q_scale: "Any", k_out: "Any", eps: "Any", H: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute qk_norm_rope of one token: its angles are read once for all heads of q and k."""
    n = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (h < H) & (d < D)
    cos, sin = tl.split(tl.reshape(tl.load(rope + n * D + d, mask=d < D, other=0.0), (1, BLOCK // 2, 2)))
    place = n * H * D + h * D + d
    y = _normed_rope(k, k_token, k_head, k_weight, cos, sin, n, h, d, eps, H, D, HEADS, BLOCK)
    tl.store(k_out + place, y.to(k_out.dtype.element_ty), mask=inside)
    y = _normed_rope(q, q_token, q_head, q_weight, cos, sin, n, h, d, eps, H, D, HEADS, BLOCK)
    if LARGEST > 0:
        y, scale = round_rows(y, LARGEST)
        tl.store(q_scale + n * H + h, scale, mask=h < H)
    tl.store(q_out + place, y.to(q_out.dtype.element_ty), mask=inside)


def _fake_norm(
    x: Tensor, weight: Tensor, table: Tensor | None, row: Tensor | None, eps: float, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    return empty_rows(x, input_dtype)


@launcher(_fake_norm)
def launch_norm(
    x: Tensor, weight: Tensor, table: Tensor | None, row: Tensor | None, eps: float, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """RMS-normalize x (…, D) and scale it by weight (D,) and, where `table` (R, D) is given, by 1 + its row of a token.

    row (N,) integers, unused with a table of one row · input_dtype: int8 or e4m3 to round the result by rows -> values
    and scales as `rows.empty_rows` shapes them.
    """
    out, out_scale = empty_rows(x, input_dtype)
    x = flatten_rows(x)
    n, width = x.shape
    programs, rows, block, warps = row_blocks(n, width)
    shared = table is None or len(table) == 1
    table = x if table is None else flatten_rows(table)
    if n:
        _norm_kernel[(programs,)](
            x, x.stride(0), weight, table, table.stride(0), row, out, out_scale, n, eps, width, rows, block,
            table is not x, shared, max_code(input_dtype), num_warps=warps,
        )  # fmt: skip
    return out, out_scale


def _fake_gated(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor | None, table: Tensor | None,
    row: Tensor, eps: float, input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    normed, scale = empty_rows(residual[:0] if next_weight is None else residual, input_dtype)
    return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device), normed, scale


@launcher(_fake_gated)
def launch_gated_norm(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor | None, table: Tensor | None,
    row: Tensor, eps: float, input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute residual + tanh(gate) · RMSNorm(x), and where `next_weight` is given the modulated RMSNorm of that.

    residual, x (N, D) · weight, next_weight (D,) · gate, table (R, D), both of as many rows · row (N,) -> the residual
    (N, D), and values and scales of the second norm as `rows.empty_rows` shapes them, of no rows where there is none.
    """
    out, normed, scale = _fake_gated(residual, x, weight, gate, next_weight, table, row, eps, input_dtype)
    residual, x, gate = flatten_rows(residual), flatten_rows(x), flatten_rows(gate)
    n, width = x.shape
    programs, rows, block, warps = row_blocks(n, width)
    table = gate if table is None else flatten_rows(table)
    if n:
        _gated_kernel[(programs,)](
            residual, residual.stride(0), x, x.stride(0), weight, gate, gate.stride(0), next_weight, table,
            table.stride(0), row, out, normed, scale, n, eps, width, rows, block, next_weight is not None,
            len(gate) == 1, max_code(input_dtype), num_warps=warps,
        )  # fmt: skip
    return out, normed, scale


def _fake_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return *empty_rows(q, input_dtype), torch.empty(k.shape, dtype=k.dtype, device=k.device)


@launcher(_fake_norm_rope)
def launch_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS-normalize and rotate the heads of q and k (N, H, D), D even and at most 256; rope (N, D/2, 2) fp32.

    -> q as values and scales as `rows.empty_rows` shapes them, and k (N, H, D) in its own dtype.
    """
    q_out, q_scale, k_out = _fake_norm_rope(q, k, q_weight, k_weight, rope, eps, input_dtype)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    n, heads, width = q.shape
    _, _, block, _ = row_blocks(1, width)
    if n:
        _norm_rope_kernel[(n,)](
            q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), q_weight, k_weight, rope.contiguous(), q_out,
            q_scale, k_out, eps, heads, width, 1 << (heads - 1).bit_length(), block, max_code(input_dtype), num_warps=4,
        )  # fmt: skip
    return q_out, q_scale, k_out


def rows_supported(x: Tensor, input_dtype: torch.dtype | None = None) -> bool | str:
    """Return True, or why these kernels cannot take rows x (…, D): their width, their dtype, or a GPU's capability."""
    if x.shape[-1] > MAX_ROW_WIDTH:
        return f"rows of at most {MAX_ROW_WIDTH} numbers, found {x.shape[-1]}"
    return why_unsupported(x, FLOAT_DTYPES, input_dtype) or True


def heads_supported(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
) -> bool | str:
    """Return True, or why the kernel of qk_norm_rope cannot take these arguments: head size, heads, dtype or GPU."""
    if q.shape[-1] % 2 or q.shape[-1] > 256:
        return f"an even head size of at most 256, found {q.shape[-1]}"
    if q.shape != k.shape:
        return f"as many heads of k as of q, found {tuple(k.shape)} and {tuple(q.shape)}"
    return why_unsupported(q, FLOAT_DTYPES, input_dtype) or True
