"""GGUF's number formats: blocks of 32 or 256 neighbors along the input, weights only, as llama.cpp stores them.

A layer has one part, `weight` (out, bytes of a row) uint8, which is the file's own. A block starts or ends with its
scale in fp16; a block of 256 has scales of its sub-blocks too, rounded to 4, 6 or 8 bits. The table BLOCKS has for each
type how many numbers a block holds, its bytes, and the function that decodes it. Decoding is fp32 in the order of
operations of gguf-py, so that both give the same bits. Files in these types are read, not written.

Source: ggml's block structures (ggml-common.h), checked against gguf-py's `dequantize` in the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op, why_unsupported
from s3dit.kernels.gguf_matmul import KERNELS, gguf_matmul
from s3dit.kernels.rows import FLOAT_DTYPES
from s3dit.kernels.scheme import QuantizedRows, QuantizedTensors, Scheme, Spec, dequantize_rows, upcast, weight_chunks

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


def _nibbles(blocks: Tensor, at: int, count: int, run: int) -> Tensor:
    """Unpack `count` half bytes from a byte on: of each run of bytes all low halves, then all high -> (n, count)."""
    packed = blocks[:, at : at + count // 2].unflatten(1, (-1, 1, run))
    return torch.cat((packed & 15, packed >> 4), 2).flatten(1)


def _two_bits(packed: Tensor) -> Tensor:
    """Unpack two-bit numbers of 64 bytes: of each 32 bytes first all lowest bits, and so on -> (n, 256)."""
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=packed.device)[:, None]
    return (packed.unflatten(1, (2, 1, 32)) >> shifts & 3).flatten(1)


def _bits(packed: Tensor, count: int) -> Tensor:
    """Unpack bits 0, 1, … of each byte, bit 0 of all bytes before bit 1 -> (n, count · bytes), 0 or 1."""
    shifts = torch.arange(count, dtype=torch.uint8, device=packed.device)[:, None]
    return (packed[:, None] >> shifts & 1).flatten(1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Unpack the fifth bits of 32 numbers, in order in 4 bytes -> (n, 32), 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (blocks[:, at : at + 4, None] >> shifts & 1).flatten(1) << 4


def _scaled_runs(scales: Tensor, codes: Tensor) -> Tensor:
    """Multiply each run of codes by its scale -> (n, elements) fp32."""
    return (scales[..., None] * codes.float().unflatten(1, (scales.shape[1], -1))).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _fp16_at(b, 0) * (_nibbles(b, 2, 32, 16).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _fp16_at(b, 0) * _nibbles(b, 4, 32, 16).float() + _fp16_at(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _fp16_at(b, 0) * ((_nibbles(b, 6, 32, 16) | _fifth_bits(b, 2)).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _fp16_at(b, 0) * (_nibbles(b, 8, 32, 16) | _fifth_bits(b, 4)).float() + _fp16_at(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _fp16_at(b, 0) * b[:, 2:].view(torch.int8).float()


def _q2_k(b: Tensor) -> Tensor:
    scales = b[:, :16]
    large, small = _fp16_at(b, 80) * (scales & 15).float(), _fp16_at(b, 82) * (scales >> 4).float()
    ones = torch.ones(len(b), 256, dtype=torch.uint8, device=b.device)
    return _scaled_runs(large, _two_bits(b[:, 16:80])) - _scaled_runs(small, ones)


def _q3_k(b: Tensor) -> Tensor:
    packed = b[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=b.device)[:, None]
    high = (packed[:, None, 8:] >> shifts & 3).flatten(1)
    scales = (low | high << 4).float() - 32
    # A bit that is not set takes 4 off.
    codes = _two_bits(b[:, 32:96]).float() - (4 - 4 * _bits(b[:, :32], 8).float())
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
    groups = codes.float().unflatten(1, (8, 32))
    return ((_fp16_at(b, 0) * scales)[..., None] * groups - (_fp16_at(b, 2) * minima)[..., None]).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _decode_k(b, _nibbles(b, 16, 256, 32))


def _q5_k(b: Tensor) -> Tensor:
    return _decode_k(b, _nibbles(b, 48, 256, 32) | _bits(b[:, 16:48], 8) << 4)


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b, 0, 256, 64)
    codes = (low | _two_bits(b[:, 128:192]) << 4).float() - 32
    return _scaled_runs(_fp16_at(b, 208) * b[:, 192:208].view(torch.int8).float(), codes)


def _iq4(codes: Tensor) -> Tensor:
    return torch.tensor(IQ4, dtype=torch.float32, device=codes.device)[codes.to(torch.int32)]


def _iq4_nl(b: Tensor) -> Tensor:
    return _fp16_at(b, 0) * _iq4(_nibbles(b, 2, 32, 16))


def _iq4_xs(b: Tensor) -> Tensor:
    low = torch.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), -1).flatten(1)
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=b.device)
    high = (b[:, 2:4, None] >> shifts & 3).flatten(1)
    scales = _fp16_at(b, 0) * ((low | high << 4).float() - 32)
    return _scaled_runs(scales, _iq4(_nibbles(b, 8, 256, 16)))


BLOCKS = {
    "Q4_0": Block(32, 18, (0,), _q4_0),
    "Q4_1": Block(32, 20, (0, 2), _q4_1),
    "Q5_0": Block(32, 22, (0,), _q5_0),
    "Q5_1": Block(32, 24, (0, 2), _q5_1),
    "Q8_0": Block(32, 34, (0,), _q8_0),
    "Q2_K": Block(256, 84, (80, 82), _q2_k),
    "Q3_K": Block(256, 110, (108,), _q3_k),
    "Q4_K": Block(256, 144, (0, 2), _q4_k),
    "Q5_K": Block(256, 176, (0, 2), _q5_k),
    "Q6_K": Block(256, 210, (208,), _q6_k),
    "IQ4_NL": Block(32, 18, (0,), _iq4_nl),
    "IQ4_XS": Block(256, 136, (0,), _iq4_xs),
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

    def spec(out: int, in_: int) -> Spec:
        if in_ % block.elements:
            raise ValueError(
                f"{kind} needs an input width that is a multiple of {block.elements}, found {in_}; take another file"
            )
        return {"weight": ((out, in_ // block.elements * block.bytes), torch.uint8)}

    def decode(parts: QuantizedTensors) -> Tensor:
        rows = parts["weight"]
        return block.decode(rows.reshape(-1, block.bytes)).view(len(rows), -1)

    @op
    def gguf_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        """Multiply a float x (…, in) by a weight in blocks -> (…, out), dtype of x; see `Scheme`."""
        return F.linear(upcast(x), decode(parts), None if bias is None else bias.float()).to(x.dtype)

    def in_chunks(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        """Decode to the dtype of x a chunk at a time, so that no second copy of the weight is made."""
        x, rows = dequantize_rows(x), parts["weight"]
        out = torch.empty(*x.shape[:-1], len(rows), dtype=x.dtype, device=x.device)
        for run in weight_chunks(len(rows), x.shape[-1]):
            weight = decode({"weight": rows[run]}).to(x.dtype)
            out[..., run] = F.linear(x, weight, None if bias is None else bias[run].to(x.dtype))
        return out

    def in_kernel(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        return gguf_matmul(dequantize_rows(x), parts["weight"], kind, bias)

    if kind in KERNELS:
        gguf_linear.on("cuda", "triton", when=lambda x, *rest: why_unsupported(x, FLOAT_DTYPES) or True)(in_kernel)
    for device in ("cpu", "cuda"):
        gguf_linear.on(device, "torch")(in_chunks)
    return Scheme(kind, None, spec, None, decode, gguf_linear)


# By ggml's names.
GGUF = {kind: _scheme(kind) for kind in BLOCKS}
