"""Scheme: what a number format is.

A quantized linear layer is a few tensors, its *parts*, named and shaped by `spec`. `encode` makes them of a float
weight, `decode` gives the weight back, and `linear` is the Op that multiplies by it. A format whose `activation` is an
8-bit type rounds the rows of x too (one scale a token, one a output channel: a single scale for a whole tensor breaks
Z-Image, because one outlier takes the range from everything else); its reference is the product of the two rounded
matrices in fp32.

Who makes x may round it already and hand over `QuantizedRows`: the norms and SwiGLU do so in the pass that they make
anyway.

Scales of weights are bf16 numbers (the 8-bit formats keep them in fp32). So the product of a scale and a code is exact
in fp32, and a weight that was decoded encodes to itself, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import Op

QuantizedTensors = Mapping[str, Tensor]
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]

# A row of zeros must not divide by zero, nor a tiny one blow up its rounding noise.
SMALLEST = 1e-8
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Numbers of a weight that are widened at a time on a CPU: 8 MiB of bf16, inside the cache of a small server.
PIECE = 1 << 22
# Numbers of x that are rounded at a time there.
CACHED = 1 << 18


class QuantizedRows(NamedTuple):
    """x in 8 bits: values (…, K) int8 or e4m3, scale (…, 1) fp32, and the dtype that x had; x ≈ values · scale."""

    values: Tensor
    scale: Tensor
    wide: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of x before rounding, and of what a product with it gives."""
        return self.wide

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape

    def dequantize(self) -> Tensor:
        """Give x back, in fp32."""
        return self.values.float() * self.scale


def quantize_rows(x: Tensor | QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
    """Round each row of x (…, K) to int8 or e4m3 by its own largest magnitude; fp32 inside.

    An x that is rounded already is returned as it is. A row that holds NaN or infinity gets a scale that is not finite,
    so whatever is made of it is not finite either.
    """
    if isinstance(x, QuantizedRows):
        return x
    if x.device.type != "cpu" or x.numel() <= CACHED or torch.compiler.is_compiling():
        return QuantizedRows(*_round(x, dtype), x.dtype)
    # A CPU makes its passes over rows that stay in the cache: ten times faster than passes over everything.
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    width = x.shape[-1]
    step = max(1, CACHED // width)
    runs = (t.view(-1, t.shape[-1]).split(step) for t in (values, scale))
    for run, *out in zip(x.reshape(-1, width).split(step), *runs, strict=True):
        for given, made in zip(out, _round(run, dtype), strict=True):
            given.copy_(made)
    return QuantizedRows(values, scale, x.dtype)


def _round(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and scale of `quantize_rows`."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST[dtype]
    scaled = wide / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def upcast(x: Tensor | QuantizedRows) -> Tensor:
    """Return x (…, K) in fp32, dequantized where it is rounded."""
    return x.dequantize() if isinstance(x, QuantizedRows) else x.float()


def dequantize_rows(x: Tensor | QuantizedRows) -> Tensor:
    """Return x (…, K) as a tensor of its dtype, dequantized where it is rounded."""
    return x.dequantize().to(x.dtype) if isinstance(x, QuantizedRows) else x


@dataclass(frozen=True, slots=True)
class Scheme:
    """A number format of linear weights; see the module's docstring.

    spec(out, in) -> name of part -> (shape, dtype), raising ValueError for sizes it cannot take
    encode(weight (out, in), any float) -> parts, raising ValueError for NaN and infinity; None where others write it
    decode(parts) -> weight (out, in) fp32
    linear(x or Rows (…, in), parts, bias or None) -> (…, out), dtype of x
    """

    name: str
    activation: torch.dtype | None
    spec: Callable[[int, int], Spec]
    encode: Callable[[Tensor], dict[str, Tensor]] | None
    decode: Callable[[QuantizedTensors], Tensor]
    linear: Op


def finite(weight: Tensor) -> Tensor:
    """The weight in fp32; ValueError where it holds NaN or infinity, which no scale can bring into range."""
    weight = weight.float()
    # The sum of magnitudes is finite only where every one is, and is found in one pass without a mask.
    if not weight.abs().sum(dtype=torch.float64).isfinite():
        raise ValueError("holds NaN or infinity; needed finite weights; download the file again")
    return weight


def per_channel(dtype: torch.dtype) -> tuple[Callable[[int, int], Spec], Callable[[Tensor], dict[str, Tensor]]]:
    """spec and encode of the formats with one scale an output channel: weight (out, in) 8-bit, scale (out, 1) fp32."""

    def spec(out: int, in_: int) -> Spec:
        return {"weight": ((out, in_), dtype), "scale": ((out, 1), torch.float32)}

    def encode(weight: Tensor) -> dict[str, Tensor]:
        weight, largest = finite(weight), LARGEST[dtype]
        scale = (weight.abs().amax(-1, keepdim=True) / largest).bfloat16().float()
        # A scale was rounded by up to 2^-9, so the largest code may come out as 127.25.
        codes = (weight / scale.masked_fill(scale == 0, 1.0)).clamp_(-largest, largest)
        return {"weight": (codes.round_() if dtype == torch.int8 else codes).to(dtype), "scale": scale}

    return spec, encode


def decode_channels(parts: QuantizedTensors) -> Tensor:
    """weight · scale of a per-channel format, (out, in) fp32."""
    return parts["weight"].float() * parts["scale"]


def pieces(out: int, in_: int) -> Iterator[slice]:
    """Runs of output channels whose weights fit the cache when widened."""
    step = max(1, PIECE // in_)
    yield from (slice(start, min(start + step, out)) for start in range(0, out, step))


def codes_as(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """8-bit numbers in a wider float dtype, exactly."""
    if codes.dtype != torch.float8_e4m3fn or codes.device.type != "cpu" or torch.compiler.is_compiling():
        return codes.to(dtype)
    # torch converts e4m3 one by one. Its bits, shifted, are those of a bf16 that is 2^120 times too small; NaN, which
    # neither encoded weights nor rows with a finite scale hold, becomes 480.
    bits = codes.view(torch.int8).to(torch.int16)
    bits = (bits & 0x7F).bitwise_left_shift_(4).bitwise_or_(bits & -0x8000)
    return bits.view(torch.bfloat16).mul_(2.0**120).to(dtype)


def channels_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """The per-channel product on a CPU: codes widened piece by piece (exactly, even to bf16), scales on the result.

    The buffer is as wide as a piece, so a quantized model needs no second copy of itself.
    """
    codes, scale = parts["weight"], parts["scale"].T
    values = codes_as(x.values, x.dtype) if isinstance(x, QuantizedRows) else x
    out = torch.empty(*x.shape[:-1], len(codes), dtype=x.dtype, device=x.device)
    for run in pieces(*codes.shape):
        product = F.linear(values, codes_as(codes[run], x.dtype)).float().mul_(scale[:, run])
        if isinstance(x, QuantizedRows):
            product.mul_(x.scale)
        out[..., run] = product if bias is None else product.add_(bias[run])
    return out
