"""The number formats that this engine writes, by name (SCHEMES), and the product with a weight in any (`linear`).

A new format is a file beside this one and a name in the tuple below; `README.md` has an example. Formats that are only
read, of other producers, are made by `grouped` and `gguf` instead.
"""

from torch import Tensor

from s3dit.kernels.fp8 import fp8, fp8_weights
from s3dit.kernels.int4 import int4
from s3dit.kernels.int8 import int8, int8_weights
from s3dit.kernels.scheme import QuantizedRows, QuantizedTensors, Scheme

SCHEMES: dict[str, Scheme] = {s.name: s for s in (fp8, fp8_weights, int8, int8_weights, int4)}


def linear(x: Tensor | QuantizedRows, scheme: Scheme, parts: QuantizedTensors, bias: Tensor | None = None) -> Tensor:
    """Multiply x by a quantized weight, transposed, and add the bias.

    x (…, in) bf16, fp16 or fp32, or QuantizedRows of `scheme.activation` · parts: the scheme's tensors by name, on the
    device of x · bias (out,) -> (…, out), dtype of x. Raises BackendError where a forced backend cannot run.
    """
    return scheme.linear(x, parts, bias)
