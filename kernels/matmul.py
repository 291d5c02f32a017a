"""Products of two matrices of one dtype in Triton, with scales of rows and columns: `scaled_matmul`, `scaled_swiglu`.

x and the weight are both bf16, fp16, e4m3 or int8; the sums (fp32, or int32 for int8) get their scales and the bias on
their way out. `mixed_matmul` has the product of a float x and a quantized weight.

All weights are (N, K) with K contiguous, which is how tensor cores take 8-bit operands. N and K are compile-time
constants, so that a K of whole blocks pays for no mask; M is not, so that a prompt compiles nothing (but, once, what is
no multiple of 16). One program an SM walks over the tiles, a few rows of tiles at a time, whose x then stays in the L2
cache; with tensor descriptors the copies need no registers.

Under torch.compile each product is one opaque node: nothing can be fused into it, and the graph must not depend on M.

Annotations of run-time arguments are in quotes because Triton looks up the names in them, and knows only its own.

Source: the persistent products among Triton's tutorials for the walk and its second counter.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s3dit.kernels.dispatch import capability, kernel, launcher, tl
from s3dit.kernels.rows import flatten_rows
from s3dit.kernels.tune import config_in_force

# Bytes between two weights that the stride of a tensor descriptor cannot reach.
MAX_GAP = 1 << 40


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
    flatten: bool = True


def tile_shares(itemsize: int, out_itemsize: int, described: bool) -> dict[Tile, float]:
    """Return the tiles to choose among, each with its estimated share of peak speed when all SMs are busy.

    itemsize, out_itemsize: bytes of a number of x and of the result · described: whether tiles are copied by
    descriptor; a program then has 227 KiB of shared memory, otherwise as little as 99.
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


def best_tile(m: int, n: int, itemsize: int, out_itemsize: int, programs: int, described: bool) -> Tile:
    """Return the tile that is estimated to finish a result (m, n) first on this many programs.

    Full waves of programs count as much as large tiles; arguments as in `tile_shares`.
    """
    shares = tile_shares(itemsize, out_itemsize, described)

    def time(tile: Tile) -> float:
        waves = -(-(-(-m // tile.m) * -(-n // tile.n)) // programs)
        return waves * tile.m * tile.n / shares[tile]

    return min(shares, key=time)


def tile_candidates(itemsize: int, out_itemsize: int, described: bool) -> Iterator[dict[str, int]]:
    """Yield the tiles worth timing, as tune.search takes them: those of `tile_shares`, two larger ones, other walks."""
    depth = 128 // itemsize
    more = (Tile(256, 128, depth, 8, 4, halves=True), Tile(128, 256, depth, 8, 3)) if described else ()
    for tile in (*tile_shares(itemsize, out_itemsize, described), *more):
        for group, fused in itertools.product((4, 8, 16), (True, False)):
            yield tile._replace(group=group, flatten=fused)._asdict()


@kernel
def _tile_origin(
    tile: "Any", M: "Any", N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
) -> Any:
    """Return the first row and column of a tile."""
    across = tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * across) * GROUP_M
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    within = tile % (GROUP_M * across)
    return (first + within % rows) * BLOCK_M, within // rows * BLOCK_N


@kernel
def _scale_tile(
    sums: "Any", x_scale: "Any", w_scale: "Any", rows: "Any", cols: "Any", M: "Any", N: tl.constexpr,
) -> Any:  # fmt: skip
    """Return sums (rows, cols) in fp32, times the scales of their rows and columns, where there are any."""
    y = sums.to(tl.float32)
    if x_scale is not None:
        y = y * tl.load(x_scale + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    if w_scale is not None:
        y = y * tl.load(w_scale + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return y


@kernel
def _write_tile(
    y: "Any", out: "Any", row: "Any", col: "Any", rows: "Any", cols: "Any", M: "Any", N: tl.constexpr,
    DESCRIBED: tl.constexpr,
) -> Any:  # fmt: skip
    if DESCRIBED:
        out.store([row, col], y.to(out.dtype))
    else:
        at = out + rows.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@kernel
def store_tile(
    sums: "Any", out: "Any", x_scale: "Any", w_scale: "Any", bias: "Any", row: "Any", col: "Any", M: "Any",
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
) -> Any:  # fmt: skip
    """Scale sums (BLOCK_M, BLOCK_N), add the bias, and store them at (row, col) of out (M, N)."""
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    y = _scale_tile(sums, x_scale, w_scale, rows, cols, M, N)
    if bias is not None:
        y = y + tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    _write_tile(y, out, row, col, rows, cols, M, N, DESCRIBED)


@kernel
def _store_swiglu(
    gate: "Any", up: "Any", out: "Any", x_scale: "Any", gate_scale: "Any", up_scale: "Any", row: "Any", col: "Any",
    M: "Any", N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
) -> Any:  # fmt: skip
    """Store silu(gate) · up, of sums (BLOCK_M, BLOCK_N) that are scaled first, at (row, col) of out (M, N)."""
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    g = _scale_tile(gate, x_scale, gate_scale, rows, cols, M, N)
    # The square of a reciprocal root takes a third of the instructions of the division in a sigmoid.
    root = tl.rsqrt(1.0 + tl.exp(-g))
    y = (g * root) * (_scale_tile(up, x_scale, up_scale, rows, cols, M, N) * root)
    _write_tile(y, out, row, col, rows, cols, M, N, DESCRIBED)


@kernel
def _compute_tile(
    tile: "Any", stored: "Any", x: "Any", weight: "Any", out: "Any", x_scale: "Any", w_scale: "Any", bias: "Any",
    M: "Any", x_stride: "Any", weight_stride: "Any", gap: "Any", second_scale: "Any", N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    INTEGER: tl.constexpr, DESCRIBED: tl.constexpr, HALVES: tl.constexpr, IMPRECISE: tl.constexpr, GATE: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute one tile of out; `stored` is the same number as `tile`, for the epilogue."""
    WIDTH: tl.constexpr = BLOCK_N if GATE is None else BLOCK_N // 2
    row, col = _tile_origin(tile, M, N, BLOCK_M, WIDTH, GROUP_M)
    depth = tl.arange(0, BLOCK_K)
    # What lies past the end reads the last row instead of a mask; it is never stored.
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_N)
    cols = tl.minimum(col + lanes % WIDTH, N - 1).to(tl.int64) * weight_stride + (lanes // WIDTH).to(tl.int64) * gap
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
    for k in range(0, K, BLOCK_K):
        if DESCRIBED:
            a = x.load([row, k])
            b = weight.load([col, k]) if GATE is None else tl.reshape(weight.load([0, col, k]), (BLOCK_N, BLOCK_K))
        else:
            a_at = x + rows[:, None] * x_stride + (k + depth)[None, :]
            b_at = weight + cols[:, None] + (k + depth)[None, :]
            if K % BLOCK_K == 0:
                a, b = tl.load(a_at), tl.load(b_at)
            else:
                inside = (k + depth < K)[None, :]
                a, b = tl.load(a_at, mask=inside, other=0.0), tl.load(b_at, mask=inside, other=0.0)
        sums = tl.dot(
            a, tl.trans(b), sums, input_precision="ieee", max_num_imprecise_acc=IMPRECISE, out_dtype=sums.dtype
        )
    # Computed anew from its own counter, so that in a flat loop no value of the prologue must outlive the sums.
    row, col = _tile_origin(stored, M, N, BLOCK_M, WIDTH, GROUP_M)
    if HALVES or GATE is not None:
        pair = tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(pair)
    if GATE == 0:
        _store_swiglu(left, right, out, x_scale, w_scale, second_scale, row, col, M, N, BLOCK_M, WIDTH, DESCRIBED)
    elif GATE == 1:
        _store_swiglu(right, left, out, x_scale, second_scale, w_scale, row, col, M, N, BLOCK_M, WIDTH, DESCRIBED)
    elif HALVES:
        store_tile(left, out, x_scale, w_scale, bias, row, col, M, N, BLOCK_M, BLOCK_N // 2, DESCRIBED)
        store_tile(right, out, x_scale, w_scale, bias, row, col + BLOCK_N // 2, M, N, BLOCK_M, BLOCK_N // 2, DESCRIBED)
    else:
        store_tile(sums, out, x_scale, w_scale, bias, row, col, M, N, BLOCK_M, BLOCK_N, DESCRIBED)


@kernel
def _scaled_kernel(
    x: "Any", weight: "Any", out: "Any", x_scale: "Any", w_scale: "Any", bias: "Any",
    M: "Any", x_stride: "Any", weight_stride: "Any", gap: "Any", second_scale: "Any", N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    INTEGER: tl.constexpr, DESCRIBED: tl.constexpr, HALVES: tl.constexpr, IMPRECISE: tl.constexpr, GATE: tl.constexpr,
    FLAT: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute x (M, K) · weight (N, K)ᵀ; both and out (M, N) are descriptors or, more portably, pointers.

    GATE: None, or SwiGLU of two products whose weights, with a scale each, lie `gap` numbers apart; a tile has as many
    columns of both. It says which of the two is the gate.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N if GATE is None else BLOCK_N // 2)
    step = tl.num_programs(0)
    stored = tl.program_id(0) - step
    for tile in tl.range(tl.program_id(0), tiles, step, flatten=FLAT):
        stored += step
        _compute_tile(
            tile, stored, x, weight, out, x_scale, w_scale, bias, M, x_stride, weight_stride, gap, second_scale, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, INTEGER, DESCRIBED, HALVES, IMPRECISE, GATE,
        )  # fmt: skip


@functools.cache
def program_count(device: torch.device) -> int:
    """Return how many programs fill a device: the processors (SMs) of a GPU, or 4 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def describable(*tensors: Tensor) -> bool:
    """Return whether to copy tiles of them by descriptor: aligned to 16 bytes, on a data-center GPU from Hopper on.

    Blackwell's for consumers (12.0) have descriptors too, but less shared memory than our tiles take with them.
    """
    device = tensors[0].device
    return (device.type != "cuda" or (9, 0) <= capability(device) < (12, 0)) and all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 and t.stride(0) >= t.shape[1] for t in tensors
    )


def _tuned_tile(m: int, weight: Tensor, out: Tensor, programs: int, described: bool, gated: bool = False) -> Tile:
    """Return the tile of the tuning table, whose shapes are (m in 128s)x(n)x(k), else the estimated best.

    gated: a second weight is multiplied too, so that there are 2 · n columns.
    """
    n, k = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    name, n = ("swiglu", 2 * n) if gated else ("matmul", n)
    config: dict[str, Any] | None = config_in_force(f"{name} {dtype}", f"{-(-m // 128)}x{n}x{k}", weight.device)
    return Tile(**config) if config else best_tile(m, n, weight.itemsize, out.itemsize, programs, described)


def launch_scaled(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None,
    dtype: torch.dtype, tile: Tile | None = None, described: bool | None = None,
    up: Tensor | None = None, up_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute `scaled_matmul`, or, with a second weight, `scaled_swiglu`, with a given tile.

    Arguments and result as there · tile: None takes the tuning table's, else the estimated best · described: whether to
    copy tiles by tensor descriptor, which needs addresses and strides of a multiple of 16 bytes; None decides by the
    tensors and the device, False uses pointers.
    """
    lead, (n, k) = x.shape[:-1], weight.shape
    # Rows may be cut from longer ones.
    x_scale = None if x_scale is None else x_scale.contiguous()
    x = flatten_rows(x)
    m = x.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if m == 0:
        return out.unflatten(0, lead)
    gate, gap, second_scale = None, 0, None
    if up is not None:
        gap = (up.data_ptr() - weight.data_ptr()) // weight.itemsize
        gate, second_scale = int(gap < 0), up_scale
        if gate:
            # Descriptors only reach forward, so the weight at the lower address comes first.
            gap, weight, w_scale, second_scale = -gap, up, up_scale, w_scale
    if described is None:
        described = describable(x, weight, out) and gap * weight.itemsize < MAX_GAP and gap * weight.itemsize % 16 == 0
    programs = program_count(x.device)
    tile = tile or _tuned_tile(m, weight, out, programs, described, gate is not None)
    width = tile.n if gate is None else tile.n // 2
    operands: tuple[Any, ...] = x, weight, out
    if described:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a = TensorDescriptor.from_tensor(x, [tile.m, tile.k])
        if gate is None:
            b = TensorDescriptor.from_tensor(weight, [tile.n, tile.k])
        else:
            b = TensorDescriptor(weight, [2, n, k], [gap, *weight.stride()], [2, width, tile.k])
        columns = tile.n // 2 if tile.halves else width
        operands = a, b, TensorDescriptor.from_tensor(out, [tile.m, columns])
    count = -(-m // tile.m) * -(-n // width)
    _scaled_kernel[(min(count, programs),)](
        *operands, x_scale, w_scale, bias, m, x.stride(0), weight.stride(0), 0 if described else gap, second_scale,
        n, k, tile.m, tile.n, tile.k, tile.group, x.dtype == torch.int8, described, tile.halves,
        tile.k if tile.promote else None, gate, tile.flatten, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out.unflatten(0, lead)


@launcher(lambda x, weight, x_scale, w_scale, bias, dtype: x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype))
def scaled_matmul(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute (x · weightᵀ) · x_scale · w_scale + bias; sums in fp32, or int32 for int8.

    x (…, K) · weight (N, K), K contiguous, of the same dtype: bf16, fp16, fp32, e4m3 or int8 · x_scale (…, 1), w_scale
    (N, 1) fp32 · bias (N,) -> (…, N) in dtype (bf16, fp16, fp32).
    """
    return launch_scaled(x, weight, x_scale, w_scale, bias, dtype)


def _fake_swiglu(
    x: Tensor, gate: Tensor, up: Tensor, x_scale: Tensor, gate_scale: Tensor, up_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate.shape[0], dtype=dtype)


@launcher(_fake_swiglu)
def scaled_swiglu(
    x: Tensor, gate: Tensor, up: Tensor, x_scale: Tensor, gate_scale: Tensor, up_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute silu(a) · b of the two products a and b of `scaled_matmul`, in fp32 between the sums and the result.

    x (…, K) int8 or e4m3 · gate, up (N, K), K contiguous, of its dtype · x_scale (…, 1), gate_scale, up_scale (N, 1)
    fp32 -> (…, N) in dtype (bf16, fp16, fp32).
    """
    return launch_scaled(x, gate, x_scale, gate_scale, None, dtype, up=up, up_scale=up_scale)
