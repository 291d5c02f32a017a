"""Scheme, which describes a number format, and QuantizedRows, activations in 8 bits.

A quantized linear layer consists of several tensors, its *parts* (`QuantizedTensors`), named and shaped by `spec`.
`encode` makes them from a float weight, `decode` gives the weight back, and `linear` is the Op that multiplies by it. A
format whose `activation` is an 8-bit type rounds the rows of x too (a scale for each token and each output channel: a
single scale for a whole tensor breaks Z-Image, because an outlier takes the range from everything else); its reference
is the product of the two rounded matrices in fp32.

The Op that computes x may round it already and return `QuantizedRows`: the norms and SwiGLU do so in the pass that they
make anyway.

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
from s3dit.kernels.number_format import Layout

QuantizedTensors = Mapping[str, Tensor]
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]

# A row of zeros must not divide by zero, nor a tiny one blow up its rounding noise.
MIN_MAGNITUDE = 1e-8
MAX_CODES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Numbers of a weight that are dequantized at a time on a CPU: 8 MiB of bf16, inside the cache of a small server.
WEIGHT_CHUNK = 1 << 22
# Numbers that are decoded at a time: larger temporaries are new memory at each turn, which costs more than passes.
DECODE_CHUNK = 1 << 20
# Numbers of x that are rounded at a time there.
INPUT_CHUNK = 1 << 18


class QuantizedRows(NamedTuple):
    """Activations x ≈ values · scale, rounded to 8 bits by rows.

    values (…, K) int8 or e4m3 · scale (…, 1) fp32 · original_dtype: that of x before rounding.
    """

    values: Tensor
    scale: Tensor
    original_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the values."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of x before rounding, which is also that of a product with it."""
        return self.original_dtype

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the values."""
        return self.values.shape

    def dequantize(self) -> Tensor:
        """Return values · scale, (…, K) fp32."""
        return self.values.float() * self.scale


def quantize_rows(x: Tensor | QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
    """Round each row of x (…, K) to int8 or e4m3 by its own largest magnitude; fp32 inside.

    An x that is rounded already is returned as it is. A row that holds NaN or infinity gets a scale that is not finite,
    so whatever is made of it is not finite either.
    """
    if isinstance(x, QuantizedRows):
        return x
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() <= INPUT_CHUNK:
        return QuantizedRows(*_round(x, dtype), x.dtype)
    # A CPU makes its passes over rows that stay in the cache: ten times faster than passes over everything.
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    width = x.shape[-1]
    step = max(1, INPUT_CHUNK // width)
    runs = (t.view(-1, t.shape[-1]).split(step) for t in (values, scale))
    for run, *out in zip(x.reshape(-1, width).split(step), *runs, strict=True):
        for target, source in zip(out, _round(run, dtype), strict=True):
            target.copy_(source)
    return QuantizedRows(values, scale, x.dtype)


def _round(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return values and scale of `quantize_rows`; a row takes one division, its numbers are multiplied."""
    upcast_x = x.float()
    magnitude = upcast_x.abs().amax(-1, keepdim=True).clamp(min=MIN_MAGNITUDE)
    # A tensor, because torch multiplies by the reciprocal of a number instead of dividing by it, on CUDA for one.
    largest = torch.full_like(magnitude, MAX_CODES[dtype])
    scaled = upcast_x * (largest / magnitude)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), magnitude / largest


def upcast(x: Tensor | QuantizedRows) -> Tensor:
    """Return x (…, K) in fp32, dequantized where it is rounded."""
    return x.dequantize() if isinstance(x, QuantizedRows) else x.float()


def dequantize_rows(x: Tensor | QuantizedRows) -> Tensor:
    """Return x (…, K) as a tensor of its dtype, dequantized where it is rounded."""
    return x.dequantize().to(x.dtype) if isinstance(x, QuantizedRows) else x


@dataclass(frozen=True, slots=True)
class Scheme:
    """A number format of linear weights; see the module's docstring.

    name: in files and options · activation: int8 or e4m3 where x is rounded too, else None
    spec(out, in) -> name of part -> (shape, dtype), raising ValueError for sizes it cannot take
    encode(weight (out, in), any float) -> parts, raising ValueError for NaN and infinity; None for formats only read
    decode(parts) -> weight (out, in) fp32
    linear(x or QuantizedRows (…, in), parts, bias (out,) or None) -> (…, out), dtype of x
    rows(parts, ids (n,) int64) -> these rows of the weight, any float; None where the rows of the parts are decoded
    """

    name: str
    activation: torch.dtype | None
    spec: Callable[[int, int], Spec]
    encode: Callable[[Tensor], dict[str, Tensor]] | None
    decode: Callable[[QuantizedTensors], Tensor]
    linear: Op
    rows: Callable[[QuantizedTensors, Tensor], Tensor] | None = None


def checked_finite(weight: Tensor) -> Tensor:
    """Return a weight in fp32; raises ValueError where it holds NaN or infinity, which no scale can represent."""
    weight = weight.float()
    # The sum of magnitudes is finite only where each is, and takes a single pass without a mask.
    if not weight.abs().sum(dtype=torch.float64).isfinite():
        raise ValueError("holds NaN or infinity; needed finite weights; download the file again")
    return weight


def spec_of(layout: Callable[[int, int], Layout]) -> Callable[[int, int], Spec]:
    """Return the `spec` of a Scheme whose parts a NumberFormat's `layout` names."""

    def spec(out: int, in_: int) -> Spec:
        return {part: (shape, getattr(torch, dtype)) for part, (shape, dtype) in layout(out, in_).items()}

    return spec


def channel_encoder(dtype: torch.dtype) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return `encode` of a format with a scale for each output channel; dtype: int8 or e4m3.

    Its parts are those of `number_format.per_channel_layout`; scales are bf16 numbers. It raises ValueError for NaN and
    infinity.
    """

    def encode(weight: Tensor) -> dict[str, Tensor]:
        weight, largest = checked_finite(weight), MAX_CODES[dtype]
        scale = (weight.abs().amax(-1, keepdim=True) / largest).bfloat16().float()
        # A scale was rounded by up to 2^-9, so the largest code may come out as 127.25.
        codes = (weight / scale.masked_fill(scale == 0, 1.0)).clamp_(-largest, largest)
        return {"weight": (codes.round_() if dtype == torch.int8 else codes).to(dtype), "scale": scale}

    return encode


def decode_channels(parts: QuantizedTensors) -> Tensor:
    """Dequantize the parts of a per-channel format: weight (out, in) · scale (out, 1) -> (out, in) fp32."""
    return parts["weight"].float() * parts["scale"]


def weight_chunks(out: int, in_: int) -> Iterator[slice]:
    """Yield slices of output channels whose dequantized weights fit the cache, for a weight (out, in)."""
    step = max(1, WEIGHT_CHUNK // in_)
    yield from (slice(start, min(start + step, out)) for start in range(0, out, step))


def linear_by_runs(x: Tensor, out: int, decode: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """Multiply x (…, in) by a weight (out, in) that is decoded a piece at a time, into one buffer.

    decode(piece) -> these rows of the weight, in any float dtype; they are rounded to that of x · bias (out,) or None
    -> (…, out).
    """
    width = x.shape[-1]
    result = torch.empty(*x.shape[:-1], out, dtype=x.dtype, device=x.device)
    weight, rows = x.new_empty(0, width), max(1, DECODE_CHUNK // width)
    for run in weight_chunks(out, width):
        # The first run is the longest.
        weight = weight[: run.stop - run.start] if run.start else x.new_empty(run.stop, width)
        for start in range(run.start, run.stop, rows):
            stop = min(start + rows, run.stop)
            weight[start - run.start : stop - run.start] = decode(slice(start, stop))
        result[..., run] = F.linear(x, weight, None if bias is None else bias[run].to(x.dtype))
    return result


def cast_codes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert 8-bit codes (int8, e4m3 or e5m2) to a float dtype that holds them exactly."""
    if codes.dtype != torch.float8_e4m3fn or codes.device.type != "cpu" or torch.compiler.is_compiling():
        return codes.to(dtype)
    # torch converts e4m3 number by number. Its bits, shifted, are those of a bf16 that is 2^120 times too small; NaN,
    # which neither encoded weights nor rows with a finite scale hold, becomes 480.
    bits = codes.view(torch.int8).to(torch.int16)
    bits = (bits & 0x7F).bitwise_left_shift_(4).bitwise_or_(bits & -0x8000)
    return bits.view(torch.bfloat16).mul_(2.0**120).to(dtype)


def channels_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Multiply x by a per-channel weight on any device: codes are converted to the dtype of x, the sums are scaled.

    x (…, in) or QuantizedRows · weight (out, in) int8 or e4m3 with scale (out, 1) · bias (out,) -> (…, out), dtype of
    x. Codes are exact even in bf16, and are converted a chunk at a time, so no second copy of the weight is made.
    """
    codes, scale = parts["weight"], parts["scale"].T
    values = cast_codes(x.values, x.dtype) if isinstance(x, QuantizedRows) else x
    out = torch.empty(*x.shape[:-1], len(codes), dtype=x.dtype, device=x.device)
    for run in weight_chunks(*codes.shape):
        product = F.linear(values, cast_codes(codes[run], x.dtype)).float().mul_(scale[:, run])
        if isinstance(x, QuantizedRows):
            product.mul_(x.scale)
        out[..., run] = product if bias is None else product.add_(bias[run])
    return out
