"""The first half of a feed-forward network of a number format: silu(x · gateᵀ) · (x · upᵀ), in one kernel.

The kernel holds both products of a tile in its accumulators and writes the result once. On an H200, 4,224 tokens and
10,240 columns (tools/results/h200): int8 0.564 ms where two products and SwiGLU take 0.583; e4m3 0.486 ms, as torch's
row-wise products and SwiGLU do; bf16 0.895 ms, as cuBLAS and SwiGLU do.

So int8 takes it, whose products run in the same kernel anyway, e4m3 where torch's row-wise product cannot run, and bf16
has no such form.
"""

import torch
from torch import Tensor

from s3dit.kernels.dispatch import op, overridden, why_unsupported
from s3dit.kernels.fp8 import fp8, row_wise_supported
from s3dit.kernels.int8 import int8
from s3dit.kernels.matmul import scaled_swiglu
from s3dit.kernels.rows import FLOAT_DTYPES, quantize_activations
from s3dit.kernels.scheme import QuantizedRows, QuantizedTensors, Scheme
from s3dit.kernels.swiglu import swiglu

# The formats that the kernel multiplies.
FUSED = (int8, fp8)


@op
def swiglu_linear(
    x: Tensor | QuantizedRows, scheme: Scheme, gate: QuantizedTensors, up: QuantizedTensors,
    input_dtype: torch.dtype | None = None,
) -> Tensor | QuantizedRows:  # fmt: skip
    """Compute silu(x · gateᵀ) · (x · upᵀ) for two weights of one format, without biases.

    x (…, in), a float or QuantizedRows of the scheme's activation · gate, up: parts of weights (out, in) · input_dtype:
    None, or int8 or e4m3 to round the rows for the next layer -> (…, out), dtype of x, or QuantizedRows. The two
    products are rounded to the dtype of x here; the kernel keeps them in fp32.
    """
    product = scheme.linear.reference
    return swiglu.reference(product(x, gate, None), product(x, up, None), input_dtype)


def _separately(
    x: Tensor | QuantizedRows, scheme: Scheme, gate: QuantizedTensors, up: QuantizedTensors,
    input_dtype: torch.dtype | None = None,
) -> Tensor | QuantizedRows:  # fmt: skip
    """Run the Ops of the two products and of SwiGLU."""
    return swiglu(scheme.linear(x, gate, None), scheme.linear(x, up, None), input_dtype)


def _row_wise(x: Tensor | QuantizedRows, scheme: Scheme, gate: QuantizedTensors, *rest: object) -> bool | str:
    return row_wise_supported(x, gate, None) if scheme is fp8 else "not e4m3, which torch multiplies faster"


def _fusible(
    x: Tensor | QuantizedRows, scheme: Scheme, gate: QuantizedTensors, up: QuantizedTensors,
    input_dtype: torch.dtype | None = None,
) -> bool | str:  # fmt: skip
    if not any(scheme is each for each in FUSED):
        return f"the kernel multiplies int8 and e4m3 rows, found {scheme.name}"
    if overridden():
        return "an operation is replaced, perhaps one that the kernel would compute inside"
    return why_unsupported(x, FLOAT_DTYPES, scheme.activation) or True


def _fused(
    x: Tensor | QuantizedRows, scheme: Scheme, gate: QuantizedTensors, up: QuantizedTensors,
    input_dtype: torch.dtype | None = None,
) -> Tensor | QuantizedRows:  # fmt: skip
    assert scheme.activation is not None
    values, scale, dtype = quantize_activations(x, scheme.activation)
    out = scaled_swiglu(values, gate["weight"], up["weight"], scale, gate["scale"], up["scale"], dtype)
    return out if input_dtype is None else quantize_activations(out, input_dtype)


swiglu_linear.on("cuda", "torch", when=_row_wise)(_separately)
swiglu_linear.on("cuda", "triton", when=_fusible)(_fused)
for _device in ("cuda", "cpu", "mps"):
    swiglu_linear.on(_device, "torch")(_separately)
