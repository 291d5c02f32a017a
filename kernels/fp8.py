"""FP8 (e4m3): a scale for each output channel, and for each token where activations are rounded too.

`fp8` rounds both sides (W8A8) and runs on the 8-bit tensor cores of Hopper and later; `fp8-weights` rounds the weights
only, which saves memory and loses next to nothing. e4m3 has 3 bits of mantissa and reaches 448.

One scale for a whole tensor is not offered, although it is the fastest form on some libraries: a few tokens and
channels of Z-Image are hundreds of times larger than the rest, they take the range, and the picture drowns in noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from s3dit.kernels.dispatch import launcher, op, why_unsupported
from s3dit.kernels.matmul import scaled_matmul
from s3dit.kernels.mixed_matmul import mixed_matmul
from s3dit.kernels.number_format import FORMATS
from s3dit.kernels.rows import FLOAT_DTYPES, quantize_activations
from s3dit.kernels.scheme import (
    QuantizedRows,
    QuantizedTensors,
    Scheme,
    channel_encoder,
    channels_linear,
    decode_channels,
    dequantize_rows,
    quantize_rows,
    spec_of,
    upcast,
)

DTYPE = torch.float8_e4m3fn
# Rows from which on torch's row-wise product is taken to accept any number of them.
TRIED_ROWS = 256


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


def row_wise_supported(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> bool | str:
    """Return True, or why torch's row-wise product cannot run; arguments as those of `fp8_linear`."""
    if x.dtype != torch.bfloat16 or any(size % 16 for size in parts["weight"].shape):
        return "torch's row-wise product gives bf16 only, for widths that are multiples of 16"
    # A compiled graph must not depend on the number of rows: there the product itself looks at the try.
    answer = _supported(x, parts, bias)
    if answer is not True or torch.compiler.is_compiling():
        return answer
    return why_refused(x.shape[:-1].numel(), parts["weight"], bias is not None) or True


# (device, rows, N, K, has bias) -> why torch's row-wise product refuses such sizes, "" where it takes them.
_refusals: dict[tuple[torch.device, int, int, int, bool], str] = {}


def why_refused(rows: int, weight: Tensor, has_bias: bool) -> str:
    """Return the error that torch's row-wise product raises for a weight (N, K) and rows of x, "" where it runs.

    Some libraries refuse some sizes (few rows and a large K) or devices (capability 12.0) that they are documented to
    take, so the first call of each kind tries zeros of these sizes. Nothing is tried while a CUDA graph is recorded,
    which follows a pass that was not, nor for fake tensors, which have no device to ask.
    """
    rows = min(rows, TRIED_ROWS)
    n, k = weight.shape
    key = weight.device, rows, n, k, has_bias
    if key not in _refusals and rows and not isinstance(weight, FakeTensor):
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return "torch's row-wise product was not tried with these sizes before recording"
        x, codes = (torch.zeros(size, k, device=weight.device, dtype=DTYPE) for size in (rows, n))
        x_scale, w_scale = (torch.ones(size, 1, device=weight.device) for size in (rows, n))
        try:
            _row_wise(x, codes, x_scale, w_scale, w_scale[:, 0] if has_bias else None, torch.bfloat16)
            if weight.is_cuda:
                torch.cuda.synchronize(weight.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _refusals[key] = f"torch's row-wise product refuses: {str(error).splitlines()[0]}"
        else:
            _refusals[key] = ""
    return _refusals.get(key, "")


def _row_wise(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Run torch's row-wise product: arguments and result as those of `scaled_matmul`, x (rows, K)."""
    bias = None if bias is None else bias.to(dtype)
    # Without fast accumulation the row-wise form is several times slower.
    return torch._scaled_mm(
        x, weight.T, scale_a=x_scale, scale_b=w_scale.T, bias=bias, out_dtype=dtype, use_fast_accum=True
    )


@launcher(lambda x, weight, x_scale, w_scale, bias, dtype: x.new_empty(len(x), len(weight), dtype=dtype))
def row_wise_matmul(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Run torch's row-wise product, or ours for sizes that it refuses; as `scaled_matmul`, x (rows, K)."""
    product = scaled_matmul if why_refused(len(x), weight, bias is not None) else _row_wise
    return product(x, weight, x_scale, w_scale, bias, dtype)


# Tried first, which no measurement has confirmed.
@fp8_linear.on("cuda", "torch", when=row_wise_supported)
def _scaled_mm(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Run torch's row-wise product, which is CUTLASS's or cuBLAS's."""
    values, scale, dtype = quantize_activations(x, DTYPE)
    matrix, rows = values.reshape(-1, values.shape[-1]), scale.reshape(-1, 1)
    return row_wise_matmul(matrix, parts["weight"], rows, parts["scale"], bias, dtype).view(*x.shape[:-1], -1)


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


_spec, _encode = spec_of(FORMATS["fp8"].layout), channel_encoder(DTYPE)
fp8 = Scheme("fp8", DTYPE, _spec, _encode, decode_channels, fp8_linear)
fp8_weights = Scheme("fp8-weights", None, _spec, _encode, decode_channels, fp8_weights_linear)
