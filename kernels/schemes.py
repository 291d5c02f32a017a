"""The one door for a product with a quantized weight: SCHEMES by name, and `linear`.

A new format is one file beside this one and one name in the tuple below.
"""

from torch import Tensor

from s3dit.kernels.fp8 import fp8, fp8_weights
from s3dit.kernels.int4 import int4
from s3dit.kernels.int8 import int8, int8_weights
from s3dit.kernels.scheme import QuantizedRows, QuantizedTensors, Scheme

SCHEMES: dict[str, Scheme] = {s.name: s for s in (fp8, fp8_weights, int8, int8_weights, int4)}


def linear(x: Tensor | QuantizedRows, scheme: Scheme, parts: QuantizedTensors, bias: Tensor | None = None) -> Tensor:
    """x (…, in), or its Rows where the scheme takes them, times the weight that the parts stand for -> (…, out)."""
    return scheme.linear(x, parts, bias)
