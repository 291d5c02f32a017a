"""INT4: 64 neighbors along the input share a scale, activations stay wide (W4A16); 4.25 bits a weight.

w = (code - 8) · scale with codes 0 … 15; element 2j of a row is in the low half of byte j, 2j + 1 in the high half. The
scale has a sign, so that the largest weight of a group takes the longer side, -8; among a few scales the one of least
squared error is kept. Together this brings the error of a Gaussian weight from 10.3 % (nearest, symmetric) to 9.1 %;
a zero point besides would bring 8.3 % for a quarter of a bit, and every kernel would carry it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import missing, op
from s3dit.kernels.matmul import WIDE, mixed_matmul, plain
from s3dit.kernels.scheme import Parts, Rows, Scheme, Spec, finite, pieces, wide

GROUP = 64
ZERO = 8
# The largest weight of a group is given this code: below 8 the rest is finer, above 8 it is clipped. The whole numbers
# find the scale of a group that was decoded, whatever its largest code is, so encoding again changes nothing.
CODES = (8.0, 7.0, 7.5, 6.5, 6.0, 8.5, 9.0, 10.0, 5.0, 4.0, 3.0, 2.0, 1.0)
# Rows are encoded some at a time, so that the search needs little memory.
ENCODED = 1 << 22
WIDENED = (torch.bfloat16, torch.float32)


def spec(out: int, in_: int) -> Spec:
    """weight (out, in / 2) uint8 of two codes each, scale (out, in / 64) bf16; ValueError for other widths."""
    if in_ % GROUP:
        raise ValueError(f"int4 needs an input width that is a multiple of {GROUP}, found {in_}; use int8 or fp8")
    return {"weight": ((out, in_ // 2), torch.uint8), "scale": ((out, in_ // GROUP), torch.bfloat16)}


def encode(weight: Tensor) -> dict[str, Tensor]:
    """Round a weight (out, in) of any float dtype; see the module's docstring."""
    spec(*weight.shape)
    runs = [_encode(run) for run in finite(weight).split(max(1, ENCODED // weight.shape[1]))]
    codes, scale = (torch.cat(parts) for parts in zip(*runs, strict=True))
    return {"weight": pack(codes), "scale": scale}


def _encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) uint8 and scales (out, in / 64) bf16 of least squared error among CODES."""
    groups = weight.unflatten(-1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.full_like(largest, torch.inf)
    kept = torch.zeros_like(largest)
    for code in CODES:
        scale = (largest / -code).bfloat16().float()
        error = (_codes(groups, scale) * scale - groups).square_().sum(-1, keepdim=True)
        better = error < best
        best, kept = torch.where(better, error, best), torch.where(better, scale, kept)
    codes = (_codes(groups, kept) + ZERO).to(torch.uint8)
    return codes.flatten(-2), kept.squeeze(-1).bfloat16()


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    """The nearest codes, -8 … 7; 0 where the scale is 0."""
    return (groups / scale.masked_fill(scale == 0, 1.0)).round_().clamp_(-ZERO, ZERO - 1)


def pack(codes: Tensor) -> Tensor:
    """Codes (out, in) 0 … 15, uint8 -> bytes (out, in / 2): the even one low, the odd one high."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Bytes (out, in / 2) -> codes (out, in), uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode(parts: Parts) -> Tensor:
    """(code - 8) · scale, (out, in) fp32."""
    groups = unpack(parts["weight"]).float().sub_(ZERO).unflatten(-1, (-1, GROUP))
    return (groups * parts["scale"].float()[..., None]).flatten(-2)


@op
def int4_linear(x: Tensor | Rows, parts: Parts, bias: Tensor | None) -> Tensor:
    """Weights in int4, x as it comes: x (…, in) -> (…, out), dtype of x; see `Scheme`."""
    return F.linear(wide(x), decode(parts), None if bias is None else bias.float()).to(x.dtype)


@int4_linear.on("cpu", "torch", when=lambda x, *rest: x.dtype in WIDENED or "takes bf16 or fp32")
def _widened(x: Tensor | Rows, parts: Parts, bias: Tensor | None) -> Tensor:
    """Codes to the dtype of x, piece by piece: a tenth of the time of a product with 1000 tokens."""
    x = x.dequantize().to(x.dtype) if isinstance(x, Rows) else x
    packed, scale = parts["weight"], parts["scale"].to(x.dtype)
    out = torch.empty(*x.shape[:-1], len(packed), dtype=x.dtype)
    for run in pieces(*packed.shape):
        out[..., run] = F.linear(x, _widen(packed[run], scale[run]), None if bias is None else bias[run].to(x.dtype))
    return out


def _widen(packed: Tensor, scale: Tensor) -> Tensor:
    """decode, in the dtype of the scale: exact in fp32, rounded once in bf16.

    The two codes of a byte become the low bits of two bf16 in one 32-bit word: 128 + code, whose unit is 1.
    """
    words = packed.to(torch.int32)
    words = (words << 12).bitwise_or_(words).bitwise_and_(0x000F000F).bitwise_or_(0x43004300)
    codes = words.view(torch.bfloat16).to(scale.dtype).sub_(128 + ZERO)
    return codes.unflatten(-1, (-1, GROUP)).mul_(scale[..., None]).flatten(-2)


@int4_linear.on("cuda", "triton", when=lambda x, *rest: missing(x, WIDE) or True)
def _triton(x: Tensor | Rows, parts: Parts, bias: Tensor | None) -> Tensor:
    return mixed_matmul(plain(x), parts["weight"], parts["scale"], None, bias)


@int4_linear.on("cuda", "torch")
def _decoded(x: Tensor | Rows, parts: Parts, bias: Tensor | None) -> Tensor:
    """The whole weight in the dtype of x."""
    return F.linear(plain(x), decode(parts).to(x.dtype), None if bias is None else bias.to(x.dtype))


int4 = Scheme("int4", None, spec, encode, decode, int4_linear)
