"""FP8 (e4m3): a scale for each output channel, and for each token where activations are rounded too.

`fp8` rounds both sides (W8A8) and runs on the 8-bit tensor cores of Hopper and later; `fp8-weights` rounds the weights
only, which saves memory and loses next to nothing. e4m3 has 3 bits of mantissa and reaches 448.

One scale for a whole tensor is not offered, although it is the fastest form on some libraries: a few tokens and
channels of Z-Image are hundreds of times larger than the rest, they take the range, and the picture drowns in noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op, why_unsupported
from s3dit.kernels.matmul import scaled_matmul
from s3dit.kernels.mixed_matmul import mixed_matmul
from s3dit.kernels.rows import FLOAT_DTYPES, quantize_activations
from s3dit.kernels.scheme import (
    QuantizedRows,
    QuantizedTensors,
    Scheme,
    channels_linear,
    decode_channels,
    dequantize_rows,
    per_channel,
    quantize_rows,
    upcast,
)

DTYPE = torch.float8_e4m3fn


@op
def fp8_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Multiply x, rounded to e4m3 by rows, by a weight in e4m3.

    x (…, in) or e4m3 QuantizedRows · parts: weight (out, in) e4m3, scale (out, 1) fp32 · bias (out,) or None -> (…,
    out), dtype of x.
    """
    return F.linear(quantize_rows(x, DTYPE).dequantize(), decode_channels(parts), _fp32(bias)).to(x.dtype)


@op
def fp8_weights_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Multiply a float x (…, in) by a weight in e4m3; parts and result as in `fp8_linear`."""
    return F.linear(upcast(x), decode_channels(parts), _fp32(bias)).to(x.dtype)


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


@fp8_linear.on("cpu", "torch")
def _dequantized(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Multiply the codes in the dtype of x: no CPU multiplies e4m3, and its numbers are exact in bf16."""
    return channels_linear(quantize_rows(x, DTYPE), parts, bias)


fp8_weights_linear.on("cpu", "torch")(channels_linear)


def _supported(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> bool | str:
    return why_unsupported(x, FLOAT_DTYPES, DTYPE) or True


def _scaled_mm_supported(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> bool | str:
    if x.dtype != torch.bfloat16 or any(size % 16 for size in parts["weight"].shape):
        return "torch's row-wise product gives bf16 only, for widths that are multiples of 16"
    return _supported(x, parts, bias)


# Tried first, which no measurement has confirmed. Without fast accumulation the row-wise form is several times slower.
@fp8_linear.on("cuda", "torch", when=_scaled_mm_supported)
def _scaled_mm(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Run torch's row-wise product, which is CUTLASS's or cuBLAS's."""
    values, scale, dtype = quantize_activations(x, DTYPE)
    out = torch._scaled_mm(
        values.reshape(-1, values.shape[-1]),
        parts["weight"].T,
        scale_a=scale.reshape(-1, 1),
        scale_b=parts["scale"].T,
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.view(*x.shape[:-1], -1)


@fp8_linear.on("cuda", "triton", when=_supported)
def _triton_scaled(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    values, scale, dtype = quantize_activations(x, DTYPE)
    return scaled_matmul(values, parts["weight"], scale, parts["scale"], bias, dtype)


@fp8_weights_linear.on("cuda", "triton", when=_supported)
def _triton_mixed(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    return mixed_matmul(dequantize_rows(x), parts["weight"], parts["scale"], None, bias)


# GPUs without 8-bit floating point.
fp8_linear.on("cuda", "torch")(_dequantized)
fp8_weights_linear.on("cuda", "torch")(channels_linear)


_spec, _encode = per_channel(DTYPE)
fp8 = Scheme("fp8", DTYPE, _spec, _encode, decode_channels, fp8_linear)
fp8_weights = Scheme("fp8-weights", None, _spec, _encode, decode_channels, fp8_weights_linear)
