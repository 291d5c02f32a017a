"""INT8: one scale an output channel, and one a token where activations are rounded too.

`int8` rounds both sides (W8A8): sums are exact in 32-bit integers, and 8-bit products are the fastest that both GPUs
before Hopper and CPUs with VNNI have. `int8-weights` rounds the weights only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op
from s3dit.kernels.scheme import Parts, Rows, Scheme, channels_linear, decode_channels, per_channel, rows, wide

DTYPE = torch.int8


@op
def int8_linear(x: Tensor | Rows, parts: Parts, bias: Tensor | None) -> Tensor:
    """Both sides in int8: x (…, in) or its Rows -> (…, out), dtype of x; see `Scheme`."""
    return F.linear(rows(x, DTYPE).dequantize(), decode_channels(parts), _fp32(bias)).to(x.dtype)


@op
def int8_weights_linear(x: Tensor | Rows, parts: Parts, bias: Tensor | None) -> Tensor:
    """Weights in int8, x as it comes: x (…, in) -> (…, out), dtype of x."""
    return F.linear(wide(x), decode_channels(parts), _fp32(bias)).to(x.dtype)


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


int8_weights_linear.on("cpu", "torch")(channels_linear)

_spec, _encode = per_channel(DTYPE)
int8 = Scheme("int8", DTYPE, _spec, _encode, decode_channels, int8_linear)
int8_weights = Scheme("int8-weights", None, _spec, _encode, decode_channels, int8_weights_linear)
