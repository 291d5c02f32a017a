"""Products with GGUF's blocks in Triton: the commonest types are dequantized inside the kernels of `mixed_matmul`.

Each function returns the weights (cols, BLOCK_K) from k on in fp32, 0 past K, and reads sub-blocks of 32 numbers: what
a sub-block shares is loaded once, and its codes as bytes, because blocks are aligned to two bytes only. Few rows of x
are multiplied by the blocks as they are stored, many rows by a weight that was dequantized once, as in `mixed_matmul`.

Layouts: see `gguf`, whose decoders are the reference.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import kernel, launcher, tl
from s3dit.kernels.mixed_matmul import FUSED_ROWS, PackedWeight, fused_block_rows, launch_dequantize, launch_mixed


@kernel
def _load_fp16(at: "Any", inside: "Any") -> Any:
    """Load the fp16 at a byte, which need not be aligned, as fp32."""
    low = tl.load(at, mask=inside, other=0).to(tl.uint16)
    high = tl.load(at + 1, mask=inside, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@kernel
def _q8_0(
    weight: "Any", scale: "Any", zero: "Any", cols: "Any", k: "Any",
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
) -> Any:  # fmt: skip
    sub, element = k // 32 + tl.arange(0, BLOCK_K // 32), tl.arange(0, 32)
    inside = (sub < K // 32)[None, :]
    at = weight + cols.to(tl.int64)[:, None] * (K // 32 * 34) + sub[None, :] * 34
    codes = tl.load(at[:, :, None] + 2 + element[None, None, :], mask=inside[:, :, None], other=0)
    w = codes.to(tl.int8, bitcast=True).to(tl.float32) * _load_fp16(at, inside)[:, :, None]
    return tl.reshape(w, (cols.shape[0], BLOCK_K))


@kernel
def _q4_0(
    weight: "Any", scale: "Any", zero: "Any", cols: "Any", k: "Any",
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
) -> Any:  # fmt: skip
    sub, element = k // 32 + tl.arange(0, BLOCK_K // 32), tl.arange(0, 32)[None, None, :]
    inside = (sub < K // 32)[None, :]
    at = weight + cols.to(tl.int64)[:, None] * (K // 32 * 18) + sub[None, :] * 18
    two = tl.load(at[:, :, None] + 2 + element % 16, mask=inside[:, :, None], other=0).to(tl.int32)
    codes = (two >> (element // 16 * 4)) & 15
    w = (codes - 8).to(tl.float32) * _load_fp16(at, inside)[:, :, None]
    return tl.reshape(w, (cols.shape[0], BLOCK_K))


@kernel
def _load_six_bit_scales(at: "Any", j: "Any", inside: "Any") -> Any:
    """Load scale and minimum of sub-block j of Q4_K and Q5_K, whose block starts at `at`, in fp32."""
    own = tl.load(at + 4 + j, mask=inside, other=0).to(tl.int32)
    after = tl.load(at + 8 + j, mask=inside, other=0).to(tl.int32)
    before = tl.load(at + 4 + tl.maximum(j - 4, 0), mask=inside, other=0).to(tl.int32)
    scale = tl.where(j < 4, own & 63, (after & 15) | (before >> 6 << 4))
    minimum = tl.where(j < 4, after & 63, (after >> 4) | (own >> 6 << 4))
    return scale.to(tl.float32) * _load_fp16(at, inside), minimum.to(tl.float32) * _load_fp16(at + 2, inside)


@kernel
def _q4_k(
    weight: "Any", scale: "Any", zero: "Any", cols: "Any", k: "Any",
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
) -> Any:  # fmt: skip
    sub, element = (k // 32 + tl.arange(0, BLOCK_K // 32))[None, :], tl.arange(0, 32)[None, None, :]
    inside = sub < K // 32
    at = weight + cols.to(tl.int64)[:, None] * (K // 256 * 144) + sub // 8 * 144
    j = sub % 8
    unit, least = _load_six_bit_scales(at, j, inside)
    two = tl.load((at + 16 + j // 2 * 32)[:, :, None] + element, mask=inside[:, :, None], other=0).to(tl.int32)
    codes = (two >> (j % 2 * 4)[:, :, None]) & 15
    return tl.reshape(codes.to(tl.float32) * unit[:, :, None] - least[:, :, None], (cols.shape[0], BLOCK_K))


@kernel
def _q5_k(
    weight: "Any", scale: "Any", zero: "Any", cols: "Any", k: "Any",
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
) -> Any:  # fmt: skip
    sub, element = (k // 32 + tl.arange(0, BLOCK_K // 32))[None, :], tl.arange(0, 32)[None, None, :]
    inside = sub < K // 32
    at = weight + cols.to(tl.int64)[:, None] * (K // 256 * 176) + sub // 8 * 176
    j = sub % 8
    unit, least = _load_six_bit_scales(at, j, inside)
    two = tl.load((at + 48 + j // 2 * 32)[:, :, None] + element, mask=inside[:, :, None], other=0).to(tl.int32)
    fifth = tl.load(at[:, :, None] + 16 + element, mask=inside[:, :, None], other=0).to(tl.int32)
    codes = ((two >> (j % 2 * 4)[:, :, None]) & 15) | (((fifth >> j[:, :, None]) & 1) << 4)
    return tl.reshape(codes.to(tl.float32) * unit[:, :, None] - least[:, :, None], (cols.shape[0], BLOCK_K))


@kernel
def _q6_k(
    weight: "Any", scale: "Any", zero: "Any", cols: "Any", k: "Any",
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
) -> Any:  # fmt: skip
    sub, element = (k // 32 + tl.arange(0, BLOCK_K // 32))[None, :], tl.arange(0, 32)[None, None, :]
    inside = sub < K // 32
    at = weight + cols.to(tl.int64)[:, None] * (K // 256 * 210) + sub // 8 * 210
    j, known = sub % 8, inside[:, :, None]
    half, quarter = j // 4, j % 4
    low = tl.load((at + half * 64 + quarter % 2 * 32)[:, :, None] + element, mask=known, other=0).to(tl.int32)
    high = tl.load((at + 128 + half * 32)[:, :, None] + element, mask=known, other=0).to(tl.int32)
    codes = ((low >> (quarter // 2 * 4)[:, :, None]) & 15) | (((high >> (quarter * 2)[:, :, None]) & 3) << 4)
    small = tl.load((at + 192 + j * 2)[:, :, None] + element // 16, mask=known, other=0)
    unit = small.to(tl.int8, bitcast=True).to(tl.float32) * _load_fp16(at + 208, inside)[:, :, None]
    return tl.reshape((codes - 32).to(tl.float32) * unit, (cols.shape[0], BLOCK_K))


# Numbers and bytes of a block, and the Triton function that dequantizes a tile of it.
KERNELS: dict[str, tuple[int, int, Any]] = {
    "Q8_0": (32, 34, _q8_0),
    "Q4_0": (32, 18, _q4_0),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}


@launcher(lambda weight, kind, dtype: weight.new_empty(len(weight), _columns(weight, kind), dtype=dtype))
def gguf_dequantize(weight: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight (N, bytes of a row) uint8 of a type of KERNELS -> (N, K) in dtype."""
    return launch_dequantize(packed_blocks(weight, kind), dtype)


def _columns(weight: Tensor, kind: str) -> int:
    """Return K of a stored weight."""
    elements, size, _ = KERNELS[kind]
    return weight.shape[1] // size * elements


def packed_blocks(weight: Tensor, kind: str) -> PackedWeight:
    """Return a stored weight (N, bytes of a row) uint8 as the kernels of `mixed_matmul` take it."""
    return PackedWeight(weight, None, None, _columns(weight, kind), KERNELS[kind][2])


@launcher(lambda x, weight, kind, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
def gguf_matmul(x: Tensor, weight: Tensor, kind: str, bias: Tensor | None) -> Tensor:
    """Multiply x (…, K) bf16, fp16 or fp32 by a stored weight (N, bytes of a row), transposed, and add bias (N,).

    kind: a key of KERNELS -> (…, N), dtype of x.
    """
    if x.shape[:-1].numel() <= FUSED_ROWS:
        return launch_mixed(x, packed_blocks(weight, kind), bias, fused_block_rows(x))
    return F.linear(x, gguf_dequantize(weight, kind, x.dtype), None if bias is None else bias.to(x.dtype))
