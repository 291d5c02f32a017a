"""The number formats that this engine writes, by name (SCHEMES), and the product with a weight in any (`linear`).

A new format is a file beside this one, a name in the tuple below, and its parts in `number_format.FORMATS`, by which it
is read; `README.md` has an example. Formats that are only read, of other producers, are made by `grouped` and `gguf`.
"""

from torch import Tensor

from s3dit.kernels.dfloat11 import dfloat11
from s3dit.kernels.fp8 import fp8, fp8_weights
from s3dit.kernels.gguf import GGUF
from s3dit.kernels.grouped import grouped
from s3dit.kernels.int4 import int4
from s3dit.kernels.int8 import int8, int8_weights
from s3dit.kernels.number_format import DFLOAT11, NumberFormat
from s3dit.kernels.scheme import QuantizedRows, QuantizedTensors, Scheme

SCHEMES: dict[str, Scheme] = {s.name: s for s in (fp8, fp8_weights, int8, int8_weights, int4)}


def scheme_of(number_format: NumberFormat) -> Scheme:
    """Return the Scheme of a format that a file is in, the same object at each call."""
    if number_format.form is not None:
        return grouped(number_format.name, number_format.form)
    if number_format.name == DFLOAT11:
        return dfloat11(number_format.layout)
    return (GGUF | SCHEMES)[number_format.name]


def linear(x: Tensor | QuantizedRows, scheme: Scheme, parts: QuantizedTensors, bias: Tensor | None = None) -> Tensor:
    """Multiply x by a quantized weight, transposed, and add the bias.

    x (…, in) bf16, fp16 or fp32, or QuantizedRows of `scheme.activation` · parts: the scheme's tensors by name, on the
    device of x · bias (out,) -> (…, out), dtype of x. Raises BackendError where a forced backend cannot run.
    """
    return scheme.linear(x, parts, bias)
