"""GGUF's number formats: blocks of 32 or 256 neighbors along the input, weights only, as llama.cpp stores them.

A layer has one part, `weight` (out, bytes of a row) uint8, which is the file's own. A block starts or ends with its
scale in fp16; a block of 256 has scales of its sub-blocks too, rounded to 4, 6 or 8 bits. The table BLOCKS has for each
type how many numbers a block holds, its bytes, and the function that decodes it. Decoding is fp32 in the order of
operations of gguf-py, so that both give the same bits. Files in these types are read, not written.

Source: ggml's block structures (ggml-common.h), checked against gguf-py's `dequantize` in the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op, why_unsupported
from s3dit.kernels.gguf_matmul import KERNELS, gguf_matmul
from s3dit.kernels.number_format import BLOCK_SIZES, block_layout
from s3dit.kernels.rows import FLOAT_DTYPES
from s3dit.kernels.scheme import (
    QuantizedRows,
    QuantizedTensors,
    Scheme,
    dequantize_rows,
    linear_by_runs,
    spec_of,
    upcast,
)

# The values of the codes of IQ4_NL and IQ4_XS.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Block:
    """A type of block.

    elements: numbers of a block · bytes: its size · scales: the bytes where its fp16 scales begin · decode: blocks (n,
    bytes) uint8 -> (n, elements) fp32.
    """

    elements: int
    bytes: int
    scales: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]


def _fp16_at(blocks: Tensor, at: int) -> Tensor:
    """Return the fp16 at a byte of each block (n, bytes) -> (n, 1) fp32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _bytes(blocks: Tensor, at: int, count: int) -> Tensor:
    """Return some bytes of each block, in memory of their own: operations on short runs would take longer."""
    return blocks[:, at : at + count].contiguous()


def _nibbles(blocks: Tensor, at: int, count: int, run: int) -> Tensor:
    """Unpack `count` half bytes from a byte on: of each run of bytes all low halves, then all high -> (n, count)."""
    packed = _bytes(blocks, at, count // 2)
    return torch.stack([half.unflatten(1, (-1, run)) for half in (packed & 15, packed >> 4)], 2).flatten(1)


def _two_bits(blocks: Tensor, at: int) -> Tensor:
    """Unpack two-bit numbers of 64 bytes: of each 32 bytes first all lowest bits, and so on -> (n, 256)."""
    packed = _bytes(blocks, at, 64)
    # Shifts by a number, which are vectorized; those by a tensor are not.
    return torch.stack([(packed >> shift & 3).unflatten(1, (2, 32)) for shift in (0, 2, 4, 6)], 2).flatten(1)


def _bits(blocks: Tensor, at: int, place: int) -> Tensor:
    """Unpack the bits of 32 bytes, bit 0 of all bytes before bit 1 -> (n, 256), 0 or 2^place."""
    packed = _bytes(blocks, at, 32)
    moved = (packed << place - bit if bit <= place else packed >> bit - place for bit in range(8))
    return torch.cat([bits & 1 << place for bits in moved], 1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Unpack the fifth bits of 32 numbers, in order in 4 bytes -> (n, 32), 0 or 16."""
    packed = blocks[:, at : at + 4]
    return torch.stack([packed >> shift & 1 for shift in range(8)], 2).flatten(1) << 4


def _floats(codes: Tensor, less: int = 0) -> Tensor:
    """Convert codes (n, count) uint8 less a number, which are between -128 and 127, to fp32; overwrites them.

    As int8, whose conversion is vectorized; that of uint8 is ten times slower.
    """
    return (codes.sub_(less) if less else codes).view(torch.int8).float()


def _joined(codes: Tensor, high: Tensor) -> Tensor:
    """Put high bits into codes, both (n, a multiple of 8) uint8, in place, eight at a time."""
    codes.view(torch.int64).bitwise_or_(high.view(torch.int64))
    return codes


def _scaled_runs(scales: Tensor, codes: Tensor) -> Tensor:
    """Multiply each run of codes (n, elements) fp32 by its scale, in place."""
    return codes.unflatten(1, (scales.shape[1], -1)).mul_(scales[..., None]).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _floats(_nibbles(b, 2, 32, 16), 8).mul_(_fp16_at(b, 0))


def _q4_1(b: Tensor) -> Tensor:
    return _floats(_nibbles(b, 4, 32, 16)).mul_(_fp16_at(b, 0)).add_(_fp16_at(b, 2))


def _q5_0(b: Tensor) -> Tensor:
    return _floats(_joined(_nibbles(b, 6, 32, 16), _fifth_bits(b, 2)), 16).mul_(_fp16_at(b, 0))


def _q5_1(b: Tensor) -> Tensor:
    codes = _joined(_nibbles(b, 8, 32, 16), _fifth_bits(b, 4))
    return _floats(codes).mul_(_fp16_at(b, 0)).add_(_fp16_at(b, 2))


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8).float().mul_(_fp16_at(b, 0))


def _q2_k(b: Tensor) -> Tensor:
    scales = b[:, :16]
    large, small = _fp16_at(b, 80) * (scales & 15).float(), _fp16_at(b, 82) * (scales >> 4).float()
    return _scaled_runs(large, _floats(_two_bits(b, 16))).unflatten(1, (16, 16)).sub_(small[..., None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    packed = b[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=b.device)[:, None]
    high = (packed[:, None, 8:] >> shifts & 3).flatten(1)
    scales = (low | high << 4).float() - 32
    # A bit that is not set takes 4 off.
    codes = _floats(_joined(_two_bits(b, 32), _bits(b, 0, 2)), 4)
    return _scaled_runs(_fp16_at(b, 108) * scales, codes)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the 8 scales and 8 minima of Q4_K and Q5_K, 6 bits each in 12 bytes -> (n, 8) fp32 twice."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, last & 15 | first >> 6 << 4), 1)
    minima = torch.cat((second & 63, last >> 4 | second >> 6 << 4), 1)
    return scales.float(), minima.float()


def _decode_k(b: Tensor, codes: Tensor) -> Tensor:
    """Decode Q4_K or Q5_K, which differ in their codes (n, 256)."""
    scales, minima = _six_bit_scales(b[:, 4:16])
    groups = _floats(codes).unflatten(1, (8, 32)).mul_((_fp16_at(b, 0) * scales)[..., None])
    return groups.sub_((_fp16_at(b, 2) * minima)[..., None]).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _decode_k(b, _nibbles(b, 16, 256, 32))


def _q5_k(b: Tensor) -> Tensor:
    return _decode_k(b, _joined(_nibbles(b, 48, 256, 32), _bits(b, 16, 4)))


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b, 0, 256, 64)
    codes = _floats(_joined(low, _two_bits(b, 128) << 4), 32)
    return _scaled_runs(_fp16_at(b, 208) * b[:, 192:208].view(torch.int8).float(), codes)


def _iq4(codes: Tensor) -> Tensor:
    table = torch.tensor(IQ4, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def _iq4_nl(b: Tensor) -> Tensor:
    return _fp16_at(b, 0) * _iq4(_nibbles(b, 2, 32, 16))


def _iq4_xs(b: Tensor) -> Tensor:
    low = torch.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), -1).flatten(1)
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=b.device)
    high = (b[:, 2:4, None] >> shifts & 3).flatten(1)
    scales = _fp16_at(b, 0) * ((low | high << 4).float() - 32)
    return _scaled_runs(scales, _iq4(_nibbles(b, 8, 256, 16)))


BLOCKS = {
    "Q4_0": Block(*BLOCK_SIZES["Q4_0"], (0,), _q4_0),
    "Q4_1": Block(*BLOCK_SIZES["Q4_1"], (0, 2), _q4_1),
    "Q5_0": Block(*BLOCK_SIZES["Q5_0"], (0,), _q5_0),
    "Q5_1": Block(*BLOCK_SIZES["Q5_1"], (0, 2), _q5_1),
    "Q8_0": Block(*BLOCK_SIZES["Q8_0"], (0,), _q8_0),
    "Q2_K": Block(*BLOCK_SIZES["Q2_K"], (80, 82), _q2_k),
    "Q3_K": Block(*BLOCK_SIZES["Q3_K"], (108,), _q3_k),
    "Q4_K": Block(*BLOCK_SIZES["Q4_K"], (0, 2), _q4_k),
    "Q5_K": Block(*BLOCK_SIZES["Q5_K"], (0, 2), _q5_k),
    "Q6_K": Block(*BLOCK_SIZES["Q6_K"], (208,), _q6_k),
    "IQ4_NL": Block(*BLOCK_SIZES["IQ4_NL"], (0,), _iq4_nl),
    "IQ4_XS": Block(*BLOCK_SIZES["IQ4_XS"], (0,), _iq4_xs),
}


def block_scales(kind: str, weight: Tensor) -> Tensor:
    """Return the fp16 scales of all blocks of a weight (out, bytes of a row) uint8 -> (blocks, 1 or 2) fp32.

    kind: a key of BLOCKS.
    """
    block = BLOCKS[kind]
    blocks = weight.reshape(-1, block.bytes)
    return torch.cat([_fp16_at(blocks, at) for at in block.scales], 1)


def _scheme(kind: str) -> Scheme:
    block = BLOCKS[kind]

    def decode(parts: QuantizedTensors) -> Tensor:
        rows = parts["weight"]
        return block.decode(rows.reshape(-1, block.bytes)).view(len(rows), -1)

    @op
    def gguf_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        """Multiply a float x (…, in) by a weight in blocks -> (…, out), dtype of x; see `Scheme`."""
        return F.linear(upcast(x), decode(parts), None if bias is None else bias.float()).to(x.dtype)

    def in_chunks(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        """Decode to the dtype of x a chunk at a time, so that no second copy of the weight is made."""
        rows = parts["weight"]
        return linear_by_runs(dequantize_rows(x), len(rows), lambda run: decode({"weight": rows[run]}), bias)

    def in_kernel(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        return gguf_matmul(dequantize_rows(x), parts["weight"], kind, bias)

    if kind in KERNELS:
        gguf_linear.on("cuda", "triton", when=lambda x, *rest: why_unsupported(x, FLOAT_DTYPES) or True)(in_kernel)
    for device in ("cpu", "cuda"):
        gguf_linear.on(device, "torch")(in_chunks)
    return Scheme(kind, None, spec_of(partial(block_layout, kind)), None, decode, gguf_linear)


# By ggml's names.
GGUF = {kind: _scheme(kind) for kind in BLOCKS}
