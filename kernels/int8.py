"""INT8: a scale for each output channel, and for each token where activations are rounded too.

`int8` rounds both sides (W8A8): sums are exact in 32-bit integers, and 8-bit products are the fastest that both GPUs
before Hopper and CPUs with VNNI have. `int8-weights` rounds the weights only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op, why_unsupported
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

DTYPE = torch.int8
# Output channels of one integer product on a CPU, so that its sums are still in the cache when they are scaled.
COLUMN_CHUNK = 1024
# CPU features with 8-bit dot products; oneDNN without them adds pairs of products in 16 bits, which saturate.
_DOT_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8")


def _cpu_product_is_exact() -> bool:
    """Return whether torch._int_mm on this CPU sums int8 products without saturation, checked on extreme values.

    The features alone do not tell it: ONEDNN_MAX_CPU_ISA may forbid them to a CPU that has them.
    """
    # On the CPU by name: this runs at import, when a caller's default device may be meta or cuda.
    extreme = torch.full((32, 64), 127, dtype=DTYPE, device="cpu")
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in _DOT_FEATURES) and bool(
        (torch._int_mm(extreme, extreme.T) == 64 * 127**2).all()
    )


INTEGER_DOT = _cpu_product_is_exact()


@op
def int8_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Multiply x, rounded to int8 by rows, by a weight in int8.

    x (…, in) or int8 QuantizedRows · parts: weight (out, in) int8, scale (out, 1) fp32 · bias (out,) or None -> (…,
    out), dtype of x.
    """
    return F.linear(quantize_rows(x, DTYPE).dequantize(), decode_channels(parts), _fp32(bias)).to(x.dtype)


@op
def int8_weights_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Multiply a float x (…, in) by a weight in int8; parts and result as in `int8_linear`."""
    return F.linear(upcast(x), decode_channels(parts), _fp32(bias)).to(x.dtype)


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


@int8_linear.on("cpu", "torch", when=lambda *args: INTEGER_DOT or "needs a CPU with 8-bit dot products (VNNI)")
def _integers(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Run oneDNN's integer product, which reads the weight in place (in a mapped file, say); sums are exact.

    Twice as fast as bf16 on a CPU with both. The prepacked form is no faster and would be a second copy of the model.
    """
    if torch.compiler.is_exporting():
        # Chunks would fix the number of rows.
        return _int_mm(x, parts, bias)
    values, row_scale, _ = quantize_rows(x, DTYPE)
    codes, scale = parts["weight"], parts["scale"].T
    matrix = values.reshape(-1, codes.shape[1])
    out = torch.empty(len(matrix), len(codes), dtype=x.dtype, device=x.device)
    for start in range(0, len(codes), COLUMN_CHUNK):
        run = slice(start, start + COLUMN_CHUNK)
        product = torch._int_mm(matrix, codes[run].T).float()
        product.mul_(scale[:, run]).mul_(row_scale.view(-1, 1))
        out[:, run] = product if bias is None else product.add_(bias[run])
    return out.view(*x.shape[:-1], len(codes))


@int8_linear.on("cpu", "torch")
def _dequantized(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Multiply the same codes in floating point: other CPUs are slower in integers, or saturate."""
    return channels_linear(quantize_rows(x, DTYPE), parts, bias)


int8_weights_linear.on("cpu", "torch")(channels_linear)


def _supported(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> bool | str:
    return why_unsupported(x, FLOAT_DTYPES) or True


@int8_linear.on("cuda", "triton", when=_supported)
def _triton_scaled(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    values, scale, dtype = quantize_activations(x, DTYPE)
    return scaled_matmul(values, parts["weight"], scale, parts["scale"], bias, dtype)


def _int_mm_supported(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> bool | str:
    # An exported graph is of any number of rows, and does not ask for theirs.
    fits = (torch.compiler.is_exporting() or x.shape[:-1].numel() > 16) and not any(
        size % 8 for size in parts["weight"].shape
    )
    return fits or "torch's integer product takes more than 16 rows, and widths that are multiples of 8"


@int8_linear.on("cuda", "torch", when=_int_mm_supported)
def _int_mm(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Run cuBLAS's integer product; its sums are written to memory and read before they are scaled."""
    values, scale, dtype = quantize_activations(x, DTYPE)
    product = torch._int_mm(values.reshape(-1, values.shape[-1]), parts["weight"].T).view(*x.shape[:-1], -1)
    product = product.float() * scale * parts["scale"].T
    return (product if bias is None else product + bias).to(dtype)


@int8_weights_linear.on("cuda", "triton", when=_supported)
def _triton_mixed(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    return mixed_matmul(dequantize_rows(x), parts["weight"], parts["scale"], None, bias)


int8_linear.on("cuda", "torch")(_dequantized)
int8_weights_linear.on("cuda", "torch")(channels_linear)


_spec, _encode = spec_of(FORMATS["int8"].layout), channel_encoder(DTYPE)
int8 = Scheme("int8", DTYPE, _spec, _encode, decode_channels, int8_linear)
int8_weights = Scheme("int8-weights", None, _spec, _encode, decode_channels, int8_weights_linear)
