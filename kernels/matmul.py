"""Matrix products in Triton: what a linear layer of every number format is made of.

`scaled_matmul` multiplies x by a weight of the same type (bf16, fp16, e4m3, int8) and gives the sums their row and
column scales on their way out. `mixed_matmul` multiplies wide x by an 8-bit or 4-bit weight: few rows read the weight
as it is stored, because there the time is the reading; many rows first make the weight wide, once, because there the
time is the arithmetic. `quantize_rows` rounds an x that its maker has not rounded.

All weights are (N, K) with K contiguous, which is how tensor cores take 8-bit operands. N and K are compile-time
constants, so that a K of whole blocks pays for no mask; M is not, so that a prompt compiles nothing (but, once, what is
no multiple of 16). One program an SM walks over the tiles, a few rows of tiles at a time, whose x then stays in the L2
cache; with tensor descriptors the copies need no registers.

Under torch.compile each product is one opaque node: nothing can be fused into it, and the graph must not depend on M.

Annotations of run-time arguments are in quotes because Triton looks up the names in them, and finds only its own.

Sources: the persistent products among Triton's tutorials for the walk and its second counter. Deliberately not here:
references and parts, which belong to the formats.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import capability, kernel, launcher, missing, op, tl
from s3dit.kernels.rows import blocks, empty_rows, flat, largest, round_rows
from s3dit.kernels.scheme import QuantizedRows, rows
from s3dit.kernels.tune import chosen

# Up to so many rows a product should take less time than making its weight wide would. Computed, not yet measured.
FEW = 192
# Dtypes of an x that is not rounded, and of results.
WIDE = (torch.bfloat16, torch.float16, torch.float32)


class Tile(NamedTuple):
    """How a product is cut: rows, columns and depth of a tile, its warps, and the copies in flight."""

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 3
    # Rows of tiles that are walked together.
    group: int = 8
    # Send a tile out in two halves: takes half the shared memory, which is worth another stage or an fp32 output.
    halves: bool = False
    # e4m3 only: add up the blocks of k in fp32; a Hopper tensor core by itself keeps about 14 bits of a sum.
    promote: bool = False
    # Let Triton start on the next tile while this one goes out.
    flat: bool = True


def tiles(itemsize: int, out_itemsize: int, described: bool) -> dict[Tile, float]:
    """Tiles to choose among, each with the share of the peak that it should reach when all programs are busy.

    With descriptors a program has 227 KiB of shared memory, otherwise as little as 99.
    """
    depth = 128 // itemsize
    if not described:
        return {Tile(128, 128, depth // 2, 8, 4): 1.0, Tile(64, 128, depth // 2, 4, 4): 0.8}
    return {
        Tile(128, 256, depth, 8, 4 if out_itemsize <= 2 else 3, halves=True): 1.0,
        Tile(128, 128, depth, 8, 4): 0.9,
        Tile(64, 256, depth, 4, 3): 0.85,
        Tile(64, 128, depth, 4, 4): 0.7,
        Tile(64, 64, depth, 4, 6): 0.45,
    }


def choose(m: int, n: int, itemsize: int, out_itemsize: int, programs: int, described: bool) -> Tile:
    """The tile that should finish (m, n) soonest on this many programs: full waves count as much as large tiles."""
    shares = tiles(itemsize, out_itemsize, described)

    def time(tile: Tile) -> float:
        waves = -(-(-(-m // tile.m) * -(-n // tile.n)) // programs)
        return waves * tile.m * tile.n / shares[tile]

    return min(shares, key=time)


def candidates(itemsize: int, out_itemsize: int, described: bool) -> Iterator[dict[str, int]]:
    """Tiles worth timing, as tune.search takes them: our own, two more large ones, other walks and loops."""
    depth = 128 // itemsize
    more = (Tile(256, 128, depth, 8, 4, halves=True), Tile(128, 256, depth, 8, 3)) if described else ()
    for tile in (*tiles(itemsize, out_itemsize, described), *more):
        for group, fused in itertools.product((4, 8, 16), (True, False)):
            yield tile._replace(group=group, flat=fused)._asdict()


@kernel
def _place(
    tile: "Any", M: "Any", N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
) -> Any:
    """First row and column of a tile."""
    across = tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * across) * GROUP_M
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    within = tile % (GROUP_M * across)
    return (first + within % rows) * BLOCK_M, within // rows * BLOCK_N


@kernel
def _send(
    sums: "Any", out: "Any", x_scale: "Any", w_scale: "Any", bias: "Any", row: "Any", col: "Any", M: "Any",
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
) -> Any:  # fmt: skip
    """Scale sums (BLOCK_M, BLOCK_N), add the bias, and store them at (row, col) of out (M, N)."""
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    y = sums.to(tl.float32)
    if x_scale is not None:
        y = y * tl.load(x_scale + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    if w_scale is not None:
        y = y * tl.load(w_scale + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y = y + tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if DESCRIBED:
        out.store([row, col], y.to(out.dtype))
    else:
        at = out + rows.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@kernel
def _tile(
    tile: "Any", sent: "Any", x: "Any", weight: "Any", out: "Any", x_scale: "Any", w_scale: "Any", bias: "Any",
    M: "Any", x_stride: "Any", weight_stride: "Any", N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    INTEGER: tl.constexpr, DESCRIBED: tl.constexpr, HALVES: tl.constexpr, IMPRECISE: tl.constexpr,
) -> Any:  # fmt: skip
    """One tile of out; `sent` is the same number as `tile`, for the epilogue."""
    row, col = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    depth = tl.arange(0, BLOCK_K)
    # What lies past the end reads the last row instead of a mask; it is never stored.
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    cols = tl.minimum(col + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
    for k in range(0, K, BLOCK_K):
        if DESCRIBED:
            a = x.load([row, k])
            b = weight.load([col, k])
        else:
            a_at = x + rows[:, None] * x_stride + (k + depth)[None, :]
            b_at = weight + cols[:, None] * weight_stride + (k + depth)[None, :]
            if K % BLOCK_K == 0:
                a, b = tl.load(a_at), tl.load(b_at)
            else:
                inside = (k + depth < K)[None, :]
                a, b = tl.load(a_at, mask=inside, other=0.0), tl.load(b_at, mask=inside, other=0.0)
        sums = tl.dot(
            a, tl.trans(b), sums, input_precision="ieee", max_num_imprecise_acc=IMPRECISE, out_dtype=sums.dtype
        )
    # Computed anew from its own counter, so that in a flat loop no value of the prologue must outlive the sums.
    row, col = _place(sent, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if HALVES:
        pair = tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(pair)
        _send(left, out, x_scale, w_scale, bias, row, col, M, N, BLOCK_M, BLOCK_N // 2, DESCRIBED)
        _send(right, out, x_scale, w_scale, bias, row, col + BLOCK_N // 2, M, N, BLOCK_M, BLOCK_N // 2, DESCRIBED)
    else:
        _send(sums, out, x_scale, w_scale, bias, row, col, M, N, BLOCK_M, BLOCK_N, DESCRIBED)


@kernel
def _scaled(
    x: "Any", weight: "Any", out: "Any", x_scale: "Any", w_scale: "Any", bias: "Any",
    M: "Any", x_stride: "Any", weight_stride: "Any", N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    INTEGER: tl.constexpr, DESCRIBED: tl.constexpr, HALVES: tl.constexpr, IMPRECISE: tl.constexpr, FLAT: tl.constexpr,
) -> Any:  # fmt: skip
    """x (M, K) · weight (N, K)ᵀ; both and out (M, N) are descriptors or, more portably, pointers."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    step = tl.num_programs(0)
    sent = tl.program_id(0) - step
    for tile in tl.range(tl.program_id(0), tiles, step, flatten=FLAT):
        sent += step
        _tile(
            tile, sent, x, weight, out, x_scale, w_scale, bias, M, x_stride, weight_stride, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, INTEGER, DESCRIBED, HALVES, IMPRECISE,
        )  # fmt: skip


@kernel
def _wide(
    weight: "Any", scale: "Any", zero: "Any", cols: "Any", k: "Any",
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
) -> Any:  # fmt: skip
    """Weights (cols, BLOCK_K) from k on, in fp32: 4-bit ones with their group's scale, 8-bit ones without; 0 past K."""
    if GROUP == 0:
        depth = k + tl.arange(0, BLOCK_K)
        at = weight + cols.to(tl.int64)[:, None] * K + depth[None, :]
        w = tl.load(at, mask=(depth < K)[None, :], other=0.0).to(tl.float32)
    else:
        pair = k // 2 + tl.arange(0, BLOCK_K // 2)
        inside = pair < K // 2
        at = weight + cols.to(tl.int64)[:, None] * (K // 2) + pair[None, :]
        two = tl.load(at, mask=inside[None, :], other=0)
        steps = tl.interleave(two & 15, two >> 4).to(tl.float32)
        # A block lies within one group.
        group = cols * (K // GROUP) + tl.minimum(k, K - 1) // GROUP
        origin = 8.0 if zero is None else tl.load(zero + group).to(tl.float32)[:, None]
        w = (steps - origin) * tl.load(scale + group).to(tl.float32)[:, None]
    return w


@kernel
def _mixed(
    x: "Any", weight: "Any", scale: "Any", zero: "Any", bias: "Any", out: "Any", M: "Any", x_stride: "Any",
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
) -> Any:  # fmt: skip
    """x (M, K) · weightᵀ, the weight made wide in registers: out (M, N), or sums (SPLITS, M, N) yet to be added.

    WIDEN is `_wide`, or the like of it for other formats, which then scales (GROUP is not 0).

    Computes the transpose, because only its first operand may a Hopper tensor core take from registers.
    """
    col, row, split = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M, tl.program_id(2)
    cols = tl.minimum(col + tl.arange(0, BLOCK_N), N - 1)
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(0, LENGTH, BLOCK_K):
        k = split * LENGTH + step
        depth = k + tl.arange(0, BLOCK_K)
        b = tl.load(x + rows[None, :] * x_stride + depth[:, None], mask=(depth < K)[:, None], other=0.0)
        w = WIDEN(weight, scale, zero, cols, k, K, GROUP, BLOCK_K)
        sums = tl.dot(w.to(x.dtype.element_ty), b, sums, input_precision="ieee")
    w_scale = scale if GROUP == 0 else None
    if SPLITS == 1:
        _send(tl.trans(sums), out, None, w_scale, bias, row, col, M, N, BLOCK_M, BLOCK_N, False)
    else:
        at = out + split.to(tl.int64) * M * N
        _send(tl.trans(sums), at, None, None, None, row, col, M, N, BLOCK_M, BLOCK_N, False)


@kernel
def _add_splits(
    sums: "Any", scale: "Any", bias: "Any", out: "Any", M: "Any",
    N: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
) -> Any:  # fmt: skip
    """Add sums (SPLITS, M, N) in one order, always the same, and send them out; a program takes one row."""
    row, col = tl.program_id(0), tl.program_id(1) * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        at = sums + (split * M + row).to(tl.int64) * N + cols
        total += tl.load(at, mask=cols < N, other=0.0)
    _send(total[None, :], out, None, scale, bias, row, col, M, N, 1, BLOCK_N, False)


@kernel
def _dequantize(
    weight: "Any", scale: "Any", zero: "Any", out: "Any", N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
) -> Any:  # fmt: skip
    """Write the weight (N, K) that the parts stand for; WIDEN as in `_mixed`."""
    cols, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_K
    clamped, depth = tl.minimum(cols, N - 1), k + tl.arange(0, BLOCK_K)
    w = WIDEN(weight, scale, zero, clamped, k, K, GROUP, BLOCK_K)
    if GROUP == 0:
        w = w * tl.load(scale + clamped).to(tl.float32)[:, None]
    at = out + cols.to(tl.int64)[:, None] * K + depth[None, :]
    tl.store(at, w.to(out.dtype.element_ty), mask=(cols < N)[:, None] & (depth < K)[None, :])


@kernel
def _quantize_rows(
    x: "Any", values: "Any", scale: "Any", N: "Any", x_stride: "Any", K: tl.constexpr, LARGEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Round ROWS rows (N, K); each is read once and kept."""
    n, k = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (n < N) & (k < K)
    y, unit = round_rows(tl.load(x + n * x_stride + k, mask=inside, other=0.0).to(tl.float32), LARGEST)
    tl.store(values + n * K + k, y.to(values.dtype.element_ty), mask=inside)
    tl.store(scale + n, unit, mask=n < N)


def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _describable(*tensors: Tensor) -> bool:
    """Whether to copy tiles of them by descriptor: aligned to 16 bytes, on a data-center GPU from Hopper on.

    Blackwell's for consumers (12.0) have descriptors too, but less shared memory than our tiles take with them.
    """
    device = tensors[0].device
    return (device.type != "cuda" or (9, 0) <= capability(device) < (12, 0)) and all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 and t.stride(0) >= t.shape[1] for t in tensors
    )


def _tuned(m: int, weight: Tensor, out: Tensor, programs: int, described: bool) -> Tile:
    """The tile of the table, whose shapes are (m in 128s)x(n)x(k), else the one that should be good."""
    n, k = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    try:
        fields: dict[str, Any] = {**chosen(f"matmul {dtype}", f"{-(-m // 128)}x{n}x{k}", weight.device)}
        return Tile(**fields)
    except KeyError:
        return choose(m, n, weight.itemsize, out.itemsize, programs, described)


def launch_scaled(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None,
    dtype: torch.dtype, tile: Tile | None = None, described: bool | None = None,
) -> Tensor:  # fmt: skip
    """`scaled_matmul` with a tile of your choice; described=False keeps to pointers."""
    lead, (n, k) = x.shape[:-1], weight.shape
    # Rows may be cut from longer ones.
    x_scale = None if x_scale is None else x_scale.contiguous()
    x = flat(x)
    m = x.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if m == 0:
        return out.unflatten(0, lead)
    if described is None:
        described = _describable(x, weight, out)
    programs = _programs(x.device)
    tile = tile or _tuned(m, weight, out, programs, described)
    operands: tuple[Any, ...] = x, weight, out
    if described:
        from triton.tools.tensor_descriptor import TensorDescriptor

        blocks = (tile.m, tile.k), (tile.n, tile.k), (tile.m, tile.n // 2 if tile.halves else tile.n)
        operands = tuple(TensorDescriptor.from_tensor(t, list(b)) for t, b in zip(operands, blocks, strict=True))
    count = -(-m // tile.m) * -(-n // tile.n)
    _scaled[(min(count, programs),)](
        *operands, x_scale, w_scale, bias, m, x.stride(0), weight.stride(0), n, k, tile.m, tile.n, tile.k, tile.group,
        x.dtype == torch.int8, described, tile.halves, tile.k if tile.promote else None, tile.flat,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out.unflatten(0, lead)


@launcher(lambda x, weight, x_scale, w_scale, bias, dtype: x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype))
def scaled_matmul(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x · weightᵀ) · x_scale · w_scale + bias; sums in fp32, or int32 for int8.

    x (…, K) · weight (N, K), K contiguous, of the same dtype: bf16, fp16, fp32, e4m3 or int8 · x_scale (…, 1), w_scale
    (N, 1) fp32 · bias (N,) -> (…, N) in dtype (bf16, fp16, fp32).
    """
    return launch_scaled(x, weight, x_scale, w_scale, bias, dtype)


def launch_mixed(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None,
    block_m: int, block_n: int = 64, splits: int | None = None, widen: Any = _wide,
) -> Tensor:  # fmt: skip
    """The form of `mixed_matmul` for few rows: the weight is made wide as it is read."""
    (n, _), k = weight.shape, x.shape[-1]
    group = _group(weight, scale, k)
    block_k, lead = 64, x.shape[:-1]
    x = flat(x)
    m = x.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    across = -(-n // block_n)
    if splits is None:
        # Two programs an SM keep enough reads in flight; a split of less than eight blocks is not worth its sums.
        splits = max(1, min(2 * _programs(x.device) // across, k // (8 * block_k), 8))
    length = -(-k // (splits * block_k)) * block_k
    sums = out if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    if m == 0:
        return out.unflatten(0, lead)
    _mixed[(across, -(-m // block_m), splits)](
        x, weight, scale, zero, bias, sums, m, x.stride(0), n, k, group, splits, length,
        block_m, block_n, block_k, widen, num_warps=4, num_stages=4 if block_m * x.itemsize < 512 else 3,
    )  # fmt: skip
    if splits > 1:
        column = None if group else scale
        _add_splits[(m, -(-n // 1024))](sums, column, bias, out, m, n, splits, 1024, num_warps=4)
    return out.unflatten(0, lead)


@launcher(lambda weight, scale, zero, dtype: weight.new_empty(weight.shape[0], _width(weight), dtype=dtype))
def dequantize(weight: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight that the parts stand for, (N, K) in dtype; parts as in `mixed_matmul`."""
    return launch_dequantize(weight, scale, zero, dtype, _width(weight))


def launch_dequantize(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, dtype: torch.dtype, k: int, widen: Any = _wide
) -> Tensor:
    """`dequantize` for a weight of K columns that `widen` makes wide."""
    n, group = weight.shape[0], _group(weight, scale, k)
    out = torch.empty(n, k, dtype=dtype, device=weight.device)
    block_n, block_k = (32, 64) if group else (16, 256)
    _dequantize[(-(-n // block_n), -(-k // block_k))](
        weight, scale, zero, out, n, k, group, block_n, block_k, widen, num_warps=4
    )
    return out


def _group(weight: Tensor, scale: Tensor | None, k: int) -> int:
    """GROUP of a stored weight: how many columns share a scale, 0 for all; 1 where the format brings its own."""
    return 1 if scale is None else k // scale.shape[-1] if weight.dtype == torch.uint8 else 0


def _width(weight: Tensor) -> int:
    """K of a stored weight."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def few_rows(x: Tensor) -> int:
    """BLOCK_M for few rows of x: all in one tile, if it fits, so that each weight is read and made wide once."""
    return min(max(16, 1 << (x.shape[:-1].numel() - 1).bit_length()), 512 // x.itemsize)


@launcher(lambda x, weight, scale, zero, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
def mixed_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """x times a stored weight, transposed, plus bias.

    x (…, K) bf16, fp16 or fp32 · weight (N, K) int8 or e4m3 with scale (N, 1), or uint8 (N, K/2) holding element 2j in
    the low four bits of byte j and 2j + 1 in the high ones, with scale (N, K/G), G a multiple of 64: (element - zero)
    · scale, zero (N, K/G) or 8 where there is none · bias (N,) -> (…, N), dtype of x.
    """
    if x.shape[:-1].numel() <= FEW:
        return launch_mixed(x, weight, scale, zero, bias, few_rows(x))
    # torch's allocator hands every layer the same memory again, also within a CUDA graph and on other streams.
    return F.linear(x, dequantize(weight, scale, zero, x.dtype), None if bias is None else bias.to(x.dtype))


@launcher(empty_rows)
def _quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values, scale = empty_rows(x, dtype)
    x = flat(x)
    n, k = x.shape
    programs, each, block, warps = blocks(n, k)
    if n:
        _quantize_rows[(programs,)](
            x, values, scale, n, x.stride(0), k, largest(dtype), each, block, num_warps=warps
        )  # fmt: skip
    return values, scale


def quantize_rows(x: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Round each row of x (…, K) to int8 or e4m3 by its own largest magnitude, as scheme.quantize_rows does."""
    values, scale = _quantized(x, dtype)
    return QuantizedRows(values, scale, x.dtype)


@op
def rounded(x: Tensor | QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
    """x in int8 or e4m3, where its maker has not rounded it already."""
    return rows(x, dtype)


@rounded.on("cuda", "triton", when=lambda x, dtype: missing(x, WIDE, dtype) or True)
def _triton_rounded(x: Tensor | QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
    return x if isinstance(x, QuantizedRows) else quantize_rows(x, dtype)


def plain(x: Tensor | QuantizedRows) -> Tensor:
    """x in the dtype that it has, or had before it was rounded."""
    return x.dequantize().to(x.dtype) if isinstance(x, QuantizedRows) else x
