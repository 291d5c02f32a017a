"""Everything that stands around attention and feed-forward: normalize, modulate, gate, rotate.

All references compute in fp32 and round once, at the end, to the dtype of x. In fp32 they give the bits of diffusers
(x · rsqrt(mean(x²) + eps) · weight, in this order); in bf16 they are nearer to the exact answer, because diffusers
rounds before the product with the weight and the official code rounds everywhere.

Modulation is a table with one row an item and noise state; `row` says which row a token reads. A table of one row is
shared by all tokens and is broadcast, so the ordinary case copies nothing.

An Op whose consumer reads 8 bits (`input_dtype`) gives `QuantizedRows` instead of a tensor, by definition
`quantize_rows` of what it gives otherwise. The Triton kernels read and write every number once: a program has whole
rows.

Source: official ZImageTransformerBlock and Attention.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.dispatch import kernel, launcher, missing, op, tl
from s3dit.kernels.rows import blocks, empty_rows, flat, given, largest, round_rows
from s3dit.kernels.scheme import QuantizedRows, quantize_rows

WIDE = (torch.bfloat16, torch.float16, torch.float32)
# A program holds a whole row in registers.
WIDEST = 16384
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


@kernel
def _normed(x: "Any", weight: "Any", d: "Any", D: tl.constexpr, eps: "Any") -> Any:
    """RMSNorm of x (rows, BLOCK) fp32, whose columns from D on are 0."""
    inverse = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + eps)
    return x * inverse * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)


@kernel
def _modulation(
    table: "Any", stride: "Any", row: "Any", n: "Any", d: "Any", N: "Any", D: tl.constexpr, SHARED: tl.constexpr,
) -> Any:  # fmt: skip
    """Each token's row of a table in fp32, (rows, BLOCK); or the one row that all share, (1, BLOCK)."""
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
    """rms_norm and rms_norm_modulate of ROWS rows."""
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
    """gated_residual and gated_residual_norm of ROWS rows; both tables have as many rows."""
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
        # The norm is of what was stored, as if it had been read again.
        y = _normed(y.to(tl.float32), next_weight, d, D, eps)
        y *= 1.0 + _modulation(table, table_stride, row, n, d, N, D, SHARED)
        if LARGEST > 0:
            y, scale = round_rows(y, LARGEST)
            tl.store(normed_scale + n, scale, mask=n < N)
        tl.store(normed + n * D + d, y.to(normed.dtype.element_ty), mask=inside)


@kernel
def _turned(
    x: "Any", token: "Any", head: "Any", weight: "Any", cos: "Any", sin: "Any", n: "Any", h: "Any", d: "Any",
    eps: "Any", H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """All heads of one token, normalized and rotated: (HEADS, BLOCK) fp32."""
    wide = tl.load(x + n * token + h * head + d, mask=(h < H) & (d < D), other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(_normed(wide, weight, d, D, eps), (HEADS, BLOCK // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (HEADS, BLOCK))


@kernel
def _rotation_kernel(
    q: "Any", q_token: "Any", q_head: "Any", k: "Any", k_token: "Any", k_head: "Any", q_weight: "Any", k_weight: "Any",
    rope: "Any", q_out: "Any", q_scale: "Any", k_out: "Any", eps: "Any", H: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
) -> Any:  # fmt: skip
    """qk_norm_rope of one token: its angles are read once for all heads of q and k."""
    n = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (h < H) & (d < D)
    cos, sin = tl.split(tl.reshape(tl.load(rope + n * D + d, mask=d < D, other=0.0), (1, BLOCK // 2, 2)))
    place = n * H * D + h * D + d
    y = _turned(k, k_token, k_head, k_weight, cos, sin, n, h, d, eps, H, D, HEADS, BLOCK)
    tl.store(k_out + place, y.to(k_out.dtype.element_ty), mask=inside)
    y = _turned(q, q_token, q_head, q_weight, cos, sin, n, h, d, eps, H, D, HEADS, BLOCK)
    if LARGEST > 0:
        y, scale = round_rows(y, LARGEST)
        tl.store(q_scale + n * H + h, scale, mask=h < H)
    tl.store(q_out + place, y.to(q_out.dtype.element_ty), mask=inside)


def _fake_norm(
    x: Tensor, weight: Tensor, table: Tensor | None, row: Tensor | None, eps: float, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    return empty_rows(x, input_dtype)


@launcher(_fake_norm)
def _norm_rows(
    x: Tensor, weight: Tensor, table: Tensor | None, row: Tensor | None, eps: float, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    out, out_scale = empty_rows(x, input_dtype)
    x = flat(x)
    n, width = x.shape
    programs, rows, block, warps = blocks(n, width)
    shared = table is None or len(table) == 1
    table = x if table is None else flat(table)
    if n:
        _norm_kernel[(programs,)](
            x, x.stride(0), weight, table, table.stride(0), row, out, out_scale, n, eps, width, rows, block,
            table is not x, shared, largest(input_dtype), num_warps=warps,
        )  # fmt: skip
    return out, out_scale


def _fake_gated(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor | None, table: Tensor | None,
    row: Tensor, eps: float, input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    normed, scale = empty_rows(residual[:0] if next_weight is None else residual, input_dtype)
    return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device), normed, scale


@launcher(_fake_gated)
def _gated_rows(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor | None, table: Tensor | None,
    row: Tensor, eps: float, input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, normed, scale = _fake_gated(residual, x, weight, gate, next_weight, table, row, eps, input_dtype)
    residual, x, gate = flat(residual), flat(x), flat(gate)
    n, width = x.shape
    programs, rows, block, warps = blocks(n, width)
    table = gate if table is None else flat(table)
    if n:
        _gated_kernel[(programs,)](
            residual, residual.stride(0), x, x.stride(0), weight, gate, gate.stride(0), next_weight, table,
            table.stride(0), row, out, normed, scale, n, eps, width, rows, block, next_weight is not None,
            len(gate) == 1, largest(input_dtype), num_warps=warps,
        )  # fmt: skip
    return out, normed, scale


def _fake_rotated(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return *empty_rows(q, input_dtype), torch.empty(k.shape, dtype=k.dtype, device=k.device)


@launcher(_fake_rotated)
def _rotated(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    q_out, q_scale, k_out = _fake_rotated(q, k, q_weight, k_weight, rope, eps, input_dtype)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    n, heads, width = q.shape
    _, _, block, _ = blocks(1, width)
    if n:
        _rotation_kernel[(n,)](
            q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), q_weight, k_weight, rope.contiguous(), q_out,
            q_scale, k_out, eps, heads, width, 1 << (heads - 1).bit_length(), block, largest(input_dtype), num_warps=4,
        )  # fmt: skip
    return q_out, q_scale, k_out


def _rows_fit(x: Tensor, input_dtype: torch.dtype | None = None) -> bool | str:
    """What a row kernel needs: a known dtype, a GPU that has `input_dtype`, and a row that registers hold."""
    if x.shape[-1] > WIDEST:
        return f"rows of at most {WIDEST} numbers, found {x.shape[-1]}"
    return missing(x, WIDE, input_dtype) or True


@rms_norm.on("cuda", "triton", when=lambda x, weight, eps: _rows_fit(x))
def _triton_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm_rows(x, weight, None, None, eps, None)[0]


@rms_norm_modulate.on("cuda", "triton", when=lambda x, w, scale, row, eps, input_dtype=None: _rows_fit(x, input_dtype))
def _triton_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor, row: Tensor, eps: float, input_dtype: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    out, out_scale = _norm_rows(x, weight, scale, row, eps, input_dtype)
    return given(out, out_scale, x.dtype)


@gated_residual.on("cuda", "triton", when=lambda residual, *args: _rows_fit(residual))
def _triton_gated(residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, row: Tensor, eps: float) -> Tensor:
    return _gated_rows(residual, x, weight, gate, None, None, row, eps, None)[0]


@gated_residual_norm.on(
    "cuda", "triton", when=lambda residual, *args: _rows_fit(residual, args[7] if len(args) > 7 else None)
)
def _triton_gated_norm(
    residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, next_weight: Tensor, scale: Tensor, row: Tensor,
    eps: float, input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:  # fmt: skip
    out, normed, normed_scale = _gated_rows(residual, x, weight, gate, next_weight, scale, row, eps, input_dtype)
    return out, given(normed, normed_scale, residual.dtype)


def _heads_fit(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
) -> bool | str:
    if q.shape[-1] % 2 or q.shape[-1] > 256:
        return f"an even head size of at most 256, found {q.shape[-1]}"
    if q.shape != k.shape:
        return f"as many heads of k as of q, found {tuple(k.shape)} and {tuple(q.shape)}"
    return missing(q, WIDE, input_dtype) or True


@qk_norm_rope.on("cuda", "triton", when=_heads_fit)
def _triton_rotation(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor | QuantizedRows, Tensor]:
    q_out, q_scale, k_out = _rotated(q, k, q_weight, k_weight, rope, eps, input_dtype)
    return given(q_out, q_scale, q.dtype), k_out
