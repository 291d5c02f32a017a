"""GGUF's number formats: blocks of 32 or 256 neighbors along the input, weights only, as llama.cpp stores them.

A layer has one part, `weight` (out, bytes of a row) uint8, which is the file's own. A block starts or ends with its
scale in fp16; a block of 256 has scales of its sub-blocks too, rounded to 4, 6 or 8 bits. The table at the end says of
each type how many numbers a block holds, its bytes, and who decodes it. Decoding is fp32 in the order of operations of
gguf-py, so that both give the same bits.

Source: ggml's block structures (ggml-common.h), held to gguf-py's `dequantize` in the tests. There is no encoding here:
which numbers of a model deserve which type is an art of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op, why_unsupported
from s3dit.kernels.gguf_matmul import KERNELS, gguf_matmul
from s3dit.kernels.rows import WIDE
from s3dit.kernels.scheme import QuantizedRows, QuantizedTensors, Scheme, Spec, dequantize_rows, pieces, upcast

# The table of IQ4_NL and IQ4_XS: where 16 values serve weights best.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Block:
    """A type of block: how many numbers in how many bytes, where its fp16 scales lie, and how it is decoded."""

    elements: int
    bytes: int
    scales: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 at a byte of each block (n, bytes) -> (n, 1) fp32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(blocks: Tensor, at: int, count: int, run: int) -> Tensor:
    """`count` half bytes from a byte on: of each run of bytes all low halves, then all high ones -> (n, count)."""
    packed = blocks[:, at : at + count // 2].unflatten(1, (-1, 1, run))
    return torch.cat((packed & 15, packed >> 4), 2).flatten(1)


def _pairs(packed: Tensor) -> Tensor:
    """Two-bit numbers of 64 bytes: of each 32 bytes first all lowest bits, and so on -> (n, 256)."""
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=packed.device)[:, None]
    return (packed.unflatten(1, (2, 1, 32)) >> shifts & 3).flatten(1)


def _bits(packed: Tensor, count: int) -> Tensor:
    """Bits 0, 1, … of each byte, one bit of all bytes after the other -> (n, count · bytes), 0 or 1."""
    shifts = torch.arange(count, dtype=torch.uint8, device=packed.device)[:, None]
    return (packed[:, None] >> shifts & 1).flatten(1)


def _fifth(blocks: Tensor, at: int) -> Tensor:
    """The fifth bits of 32 numbers, in order in 4 bytes -> (n, 32), 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (blocks[:, at : at + 4, None] >> shifts & 1).flatten(1) << 4


def _spread(scales: Tensor, codes: Tensor) -> Tensor:
    """Each scale times its run of codes (n, elements) fp32."""
    return (scales[..., None] * codes.float().unflatten(1, (scales.shape[1], -1))).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b, 2, 32, 16).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b, 4, 32, 16).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_nibbles(b, 6, 32, 16) | _fifth(b, 2)).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b, 8, 32, 16) | _fifth(b, 4)).float() + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[:, 2:].view(torch.int8).float()


def _q2_k(b: Tensor) -> Tensor:
    scales = b[:, :16]
    large, small = _half(b, 80) * (scales & 15).float(), _half(b, 82) * (scales >> 4).float()
    ones = torch.ones(len(b), 256, dtype=torch.uint8, device=b.device)
    return _spread(large, _pairs(b[:, 16:80])) - _spread(small, ones)


def _q3_k(b: Tensor) -> Tensor:
    packed = b[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=b.device)[:, None]
    high = (packed[:, None, 8:] >> shifts & 3).flatten(1)
    scales = (low | high << 4).float() - 32
    # A bit that is not set takes 4 off.
    codes = _pairs(b[:, 32:96]).float() - (4 - 4 * _bits(b[:, :32], 8).float())
    return _spread(_half(b, 108) * scales, codes)


def _six(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of Q4_K and Q5_K, 6 bits each in 12 bytes -> (n, 8) fp32 twice."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, last & 15 | first >> 6 << 4), 1)
    minima = torch.cat((second & 63, last >> 4 | second >> 6 << 4), 1)
    return scales.float(), minima.float()


def _k(b: Tensor, codes: Tensor) -> Tensor:
    """Q4_K and Q5_K, which differ in their codes (n, 256)."""
    scales, minima = _six(b[:, 4:16])
    groups = codes.float().unflatten(1, (8, 32))
    return ((_half(b, 0) * scales)[..., None] * groups - (_half(b, 2) * minima)[..., None]).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _k(b, _nibbles(b, 16, 256, 32))


def _q5_k(b: Tensor) -> Tensor:
    return _k(b, _nibbles(b, 48, 256, 32) | _bits(b[:, 16:48], 8) << 4)


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b, 0, 256, 64)
    codes = (low | _pairs(b[:, 128:192]) << 4).float() - 32
    return _spread(_half(b, 208) * b[:, 192:208].view(torch.int8).float(), codes)


def _iq4(codes: Tensor) -> Tensor:
    return torch.tensor(IQ4, dtype=torch.float32, device=codes.device)[codes.to(torch.int32)]


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b, 0) * _iq4(_nibbles(b, 2, 32, 16))


def _iq4_xs(b: Tensor) -> Tensor:
    low = torch.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), -1).flatten(1)
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=b.device)
    high = (b[:, 2:4, None] >> shifts & 3).flatten(1)
    scales = _half(b, 0) * ((low | high << 4).float() - 32)
    return _spread(scales, _iq4(_nibbles(b, 8, 256, 16)))


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


def scales_of(kind: str, weight: Tensor) -> Tensor:
    """The fp16 scales of all blocks of a stored weight (out, bytes of a row), (blocks, 1 or 2) fp32."""
    block = BLOCKS[kind]
    blocks = weight.reshape(-1, block.bytes)
    return torch.cat([_half(blocks, at) for at in block.scales], 1)


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
        """Weights in blocks, x as it comes: x (…, in) -> (…, out), dtype of x; see `Scheme`."""
        return F.linear(upcast(x), decode(parts), None if bias is None else bias.float()).to(x.dtype)

    def pieced(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        """Blocks to the dtype of x, piece by piece, so that no second copy of the layer is made."""
        x, rows = dequantize_rows(x), parts["weight"]
        out = torch.empty(*x.shape[:-1], len(rows), dtype=x.dtype, device=x.device)
        for run in pieces(len(rows), x.shape[-1]):
            weight = decode({"weight": rows[run]}).to(x.dtype)
            out[..., run] = F.linear(x, weight, None if bias is None else bias[run].to(x.dtype))
        return out

    def in_kernel(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        return gguf_matmul(dequantize_rows(x), parts["weight"], kind, bias)

    if kind in KERNELS:
        gguf_linear.on("cuda", "triton", when=lambda x, *rest: why_unsupported(x, WIDE) or True)(in_kernel)
    for device in ("cpu", "cuda"):
        gguf_linear.on(device, "torch")(pieced)
    return Scheme(kind, None, spec, None, decode, gguf_linear)


# By ggml's names.
GGUF = {kind: _scheme(kind) for kind in BLOCKS}
