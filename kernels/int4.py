"""INT4: 64 neighbors along the input share a scale and a zero, activations are not rounded (W4A16); 4.5 bits a weight.

w = (code - zero) · scale with codes 0 … 15; element 2j of a row is in the low half of byte j, 2j + 1 in the high half.
The range of a group is clipped a little at either end, as gives the least squared error: 8.3 % of a Gaussian weight,
where nearest gives 9.0 % and a symmetric form of 4.25 bits 9.1 % at best.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op, why_unsupported
from s3dit.kernels.mixed_matmul import mixed_matmul
from s3dit.kernels.number_format import INT4_GROUP, int4_layout
from s3dit.kernels.rows import FLOAT_DTYPES
from s3dit.kernels.scheme import (
    QuantizedRows,
    QuantizedTensors,
    Scheme,
    checked_finite,
    dequantize_rows,
    linear_by_runs,
    spec_of,
    upcast,
)

GROUP_SIZE = INT4_GROUP
MAX_INT4_CODE = 15
# Fractions of a group's range that are tried at either end. With all of it a decoded group encodes to itself; where
# some is clipped, the codes 0 and 15 are in use.
RANGE_FRACTIONS = (1.0, 15 / 16, 15 / 17, 15 / 18)
# A zero is a sixteenth of a code: in bf16 it is exact, and so are its difference to a code and that times a scale.
ZERO_STEPS = 16
# Numbers that are encoded at a time: the search stays in the cache.
ENCODE_CHUNK = 1 << 18
CPU_DTYPES = (torch.bfloat16, torch.float32)


spec = spec_of(int4_layout)


def encode(weight: Tensor) -> dict[str, Tensor]:
    """Round a weight (out, in) of any float dtype to the parts of `int4_layout`.

    Raises ValueError where `in` is not a multiple of 64, and for NaN and infinity.
    """
    spec(*weight.shape)
    runs = [_encode(run) for run in checked_finite(weight).split(max(1, ENCODE_CHUNK // weight.shape[1]))]
    codes, scale, zero = (torch.cat(parts) for parts in zip(*runs, strict=True))
    return {"weight": codes, "scale": scale, "zero": zero}


def _encode(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed codes, scale and zero of least squared error among the clippings of RANGE_FRACTIONS."""
    groups = weight.unflatten(-1, (-1, GROUP_SIZE))
    low, high = groups.amin(-1, keepdim=True).clamp_(max=0.0), groups.amax(-1, keepdim=True).clamp_(min=0.0)
    best = torch.full_like(low, torch.inf)
    kept = torch.zeros_like(low), torch.zeros_like(low)
    for below, above in itertools.product(RANGE_FRACTIONS, RANGE_FRACTIONS):
        scale = ((high * above - low * below) / MAX_INT4_CODE).bfloat16().float()
        zero = (low * below / _divisor(scale) * -ZERO_STEPS).round_() / ZERO_STEPS
        error = (_codes(groups, scale, zero) - zero).mul_(scale).sub_(groups).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        kept = torch.where(better, scale, kept[0]), torch.where(better, zero, kept[1])
    codes = _codes(groups, *kept).to(torch.uint8).flatten(-2)
    return pack(codes), kept[0].squeeze(-1).bfloat16(), kept[1].squeeze(-1).bfloat16()


def _codes(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the nearest codes, 0 … 15, in fp32."""
    return (groups / _divisor(scale)).add_(zero).round_().clamp_(0, MAX_INT4_CODE)


def _divisor(scale: Tensor) -> Tensor:
    """Return the scale, 1 for a group of zeros, whose scale is 0."""
    return scale.masked_fill(scale == 0, 1.0)


def pack(codes: Tensor) -> Tensor:
    """Pack codes (out, in) 0 … 15, uint8, into bytes (out, in / 2): even columns low, odd columns high."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Unpack bytes (out, in / 2) into codes (out, in), uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode(parts: QuantizedTensors) -> Tensor:
    """Dequantize the parts of `int4_layout`: (code - zero) · scale, (out, in) fp32."""
    scale, zero = (parts[name].float()[..., None] for name in ("scale", "zero"))
    groups = unpack(parts["weight"]).float().unflatten(-1, (-1, GROUP_SIZE))
    return ((groups - zero) * scale).flatten(-2)


@op
def int4_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Multiply a float x (…, in) by a weight in int4; bias (out,) or None -> (…, out), dtype of x."""
    return F.linear(upcast(x), decode(parts), None if bias is None else bias.float()).to(x.dtype)


@int4_linear.on("cpu", "torch", when=lambda x, *rest: x.dtype in CPU_DTYPES or "takes bf16 or fp32")
def _dequantized(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Dequantize to the dtype of x, a chunk at a time: a tenth of the time of a product with 1000 tokens."""
    x = dequantize_rows(x)
    packed, scale, zero = parts["weight"], parts["scale"].float(), parts["zero"].float()
    return linear_by_runs(x, len(packed), lambda run: _dequantize(packed[run], scale[run], zero[run]), bias)


def _dequantize(packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Dequantize as `decode` does, to the same fp32; scale and zero (out, in / 64) fp32.

    The two codes of a byte become the low bits of two bf16 in one 32-bit word: 128 + code, whose unit is 1. A zero is a
    multiple of 1/16, so 128 is taken off together with it, exactly.
    """
    words = packed.to(torch.int32)
    words = (words << 12).bitwise_or_(words).bitwise_and_(0x000F000F).bitwise_or_(0x43004300)
    codes = words.view(torch.bfloat16).float().unflatten(-1, (-1, GROUP_SIZE))
    return codes.sub_((zero + 128)[..., None]).mul_(scale[..., None]).flatten(-2)


@int4_linear.on("cuda", "triton", when=lambda x, *rest: why_unsupported(x, FLOAT_DTYPES) or True)
def _triton_mixed(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    return mixed_matmul(dequantize_rows(x), parts["weight"], parts["scale"], parts["zero"], bias)


@int4_linear.on("cuda", "torch")
def _decoded(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Dequantize the whole weight to the dtype of x."""
    return F.linear(dequantize_rows(x), decode(parts).to(x.dtype), None if bias is None else bias.to(x.dtype))


int4 = Scheme("int4", None, spec, encode, decode, int4_linear)
