"""The product of a float x and a quantized weight in Triton: `mixed_matmul`.

For few rows of x the time is the reading of the weight: the kernel reads the codes as they are stored and dequantizes
them in registers. For many rows the time is the arithmetic: the weight is first dequantized to memory, once, and torch
multiplies. A number format brings a Triton function that dequantizes a tile (`PackedWeight.dequantize`); the default
serves int8, e4m3 and 4-bit codes in groups, and `gguf_matmul` has others.

Under torch.compile each product is one opaque node, as in `matmul`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import kernel, launcher, tl
from s3dit.kernels.matmul import program_count, store_tile
from s3dit.kernels.rows import flatten_rows

# Up to so many rows a product should take less time than writing its weight dequantized would. Estimated, not measured.
FUSED_ROWS = 192


@kernel
def _dequantize_tile(
    weight: "Any", scale: "Any", zero: "Any", cols: "Any", k: "Any",
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
) -> Any:  # fmt: skip
    """Dequantize weights (cols, BLOCK_K) from k on, in fp32; 8-bit ones without their scale; 0 past K."""
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
def _mixed_kernel(
    x: "Any", weight: "Any", scale: "Any", zero: "Any", bias: "Any", out: "Any", M: "Any", x_stride: "Any",
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEQUANTIZE: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute x (M, K) · weightᵀ, dequantized in registers: out (M, N), or sums (SPLITS, M, N) yet to be added.

    DEQUANTIZE is `_dequantize_tile`, or another format's function, which then applies scales itself (GROUP is not 0).

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
        w = DEQUANTIZE(weight, scale, zero, cols, k, K, GROUP, BLOCK_K)
        sums = tl.dot(w.to(x.dtype.element_ty), b, sums, input_precision="ieee")
    w_scale = scale if GROUP == 0 else None
    if SPLITS == 1:
        store_tile(tl.trans(sums), out, None, w_scale, bias, row, col, M, N, BLOCK_M, BLOCK_N, False)
    else:
        at = out + split.to(tl.int64) * M * N
        store_tile(tl.trans(sums), at, None, None, None, row, col, M, N, BLOCK_M, BLOCK_N, False)


@kernel
def _add_splits_kernel(
    sums: "Any", scale: "Any", bias: "Any", out: "Any", M: "Any",
    N: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
) -> Any:  # fmt: skip
    """Add sums (SPLITS, M, N), always in the same order, and store them; a program takes one row."""
    row, col = tl.program_id(0), tl.program_id(1) * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        at = sums + (split * M + row).to(tl.int64) * N + cols
        total += tl.load(at, mask=cols < N, other=0.0)
    store_tile(total[None, :], out, None, scale, bias, row, col, M, N, 1, BLOCK_N, False)


@kernel
def _dequantize_kernel(
    weight: "Any", scale: "Any", zero: "Any", out: "Any", N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEQUANTIZE: tl.constexpr,
) -> Any:  # fmt: skip
    """Write the dequantized weight (N, K); DEQUANTIZE as in `_mixed_kernel`."""
    cols, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_K
    clamped, depth = tl.minimum(cols, N - 1), k + tl.arange(0, BLOCK_K)
    w = DEQUANTIZE(weight, scale, zero, clamped, k, K, GROUP, BLOCK_K)
    if GROUP == 0:
        w = w * tl.load(scale + clamped).to(tl.float32)[:, None]
    at = out + cols.to(tl.int64)[:, None] * K + depth[None, :]
    tl.store(at, w.to(out.dtype.element_ty), mask=(cols < N)[:, None] & (depth < K)[None, :])


class PackedWeight(NamedTuple):
    """A quantized weight (N, K) as kernels take it.

    codes (N, …) and how a tile of them is dequantized: by `dequantize`, a Triton function with the arguments of
    `_dequantize_tile` · scale (N, 1), or (N, K/G) for 4-bit codes, None where the codes hold their own · zero (N, K/G)
    or None, which means 8 · columns: K.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    columns: int
    dequantize: Any

    @property
    def group(self) -> int:
        """The kernels' GROUP: how many columns share a scale; 0: all of a row; 1: the codes hold their own scales."""
        if self.scale is None:
            return 1
        return self.columns // self.scale.shape[-1] if self.codes.dtype == torch.uint8 else 0


def packed_weight(codes: Tensor, scale: Tensor, zero: Tensor | None) -> PackedWeight:
    """Return the weight of int8, e4m3 or 4-bit codes; arguments as in `mixed_matmul`."""
    return PackedWeight(codes, scale, zero, _columns(codes), _dequantize_tile)


def launch_mixed(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, block_m: int, block_n: int = 64, splits: int | None = None
) -> Tensor:
    """Compute the form of `mixed_matmul` for few rows: each tile of the weight is dequantized as it is read.

    x (…, K) bf16, fp16 or fp32 · bias (N,) · block_m, block_n: rows of x and of the weight that a program takes, powers
    of two from 16 on · splits: runs of K that are summed apart and then added in a fixed order; None: as many as keep
    the device busy -> (…, N), dtype of x.
    """
    (codes, scale, zero, k, dequantize), n, group = weight, weight.codes.shape[0], weight.group
    block_k, lead = 64, x.shape[:-1]
    x = flatten_rows(x)
    m = x.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    across = -(-n // block_n)
    if splits is None:
        # Two programs an SM keep enough reads in flight; a split of less than eight blocks is not worth its sums.
        splits = max(1, min(2 * program_count(x.device) // across, k // (8 * block_k), 8))
    length = -(-k // (splits * block_k)) * block_k
    sums = out if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    if m == 0:
        return out.unflatten(0, lead)
    _mixed_kernel[(across, -(-m // block_m), splits)](
        x, codes, scale, zero, bias, sums, m, x.stride(0), n, k, group, splits, length,
        block_m, block_n, block_k, dequantize, num_warps=4, num_stages=4 if block_m * x.itemsize < 512 else 3,
    )  # fmt: skip
    if splits > 1:
        column = None if group else scale
        _add_splits_kernel[(m, -(-n // 1024))](sums, column, bias, out, m, n, splits, 1024, num_warps=4)
    return out.unflatten(0, lead)


@launcher(lambda weight, scale, zero, dtype: weight.new_empty(weight.shape[0], _columns(weight), dtype=dtype))
def dequantize_weight(weight: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Dequantize the weight of codes, scale and zero as in `mixed_matmul` -> (N, K) in dtype."""
    return launch_dequantize(packed_weight(weight, scale, zero), dtype)


def launch_dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Dequantize a whole weight -> (N, K) in dtype (bf16, fp16 or fp32), rounded once."""
    (codes, scale, zero, k, dequantize), n, group = weight, weight.codes.shape[0], weight.group
    out = torch.empty(n, k, dtype=dtype, device=codes.device)
    block_n, block_k = (32, 64) if group else (16, 256)
    _dequantize_kernel[(-(-n // block_n), -(-k // block_k))](
        codes, scale, zero, out, n, k, group, block_n, block_k, dequantize, num_warps=4
    )
    return out


def _columns(weight: Tensor) -> int:
    """Return K of int8, e4m3 or 4-bit codes (N, K) or (N, K/2)."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def fused_block_rows(x: Tensor) -> int:
    """Return block_m for few rows of x: all in one tile, if it fits, so that each weight is dequantized once."""
    return min(max(16, 1 << (x.shape[:-1].numel() - 1).bit_length()), 512 // x.itemsize)


@launcher(lambda x, weight, scale, zero, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
def mixed_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply x by a quantized weight, transposed, and add the bias.

    x (…, K) bf16, fp16 or fp32 · weight (N, K) int8 or e4m3 with scale (N, 1), or uint8 (N, K/2) holding element 2j in
    the low four bits of byte j and 2j + 1 in the high ones, with scale (N, K/G), G a multiple of 64: (element - zero)
    · scale, zero (N, K/G) or 8 where there is none · bias (N,) -> (…, N), dtype of x.
    """
    if x.shape[:-1].numel() <= FUSED_ROWS:
        return launch_mixed(x, packed_weight(weight, scale, zero), bias, fused_block_rows(x))
    # torch's allocator hands every layer the same memory, also within a CUDA graph and on other streams.
    return F.linear(x, dequantize_weight(weight, scale, zero, x.dtype), None if bias is None else bias.to(x.dtype))
