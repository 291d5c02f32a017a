"""FP8 (e4m3): one scale an output channel, and one a token where activations are rounded too.

`fp8` rounds both sides (W8A8) and runs on the 8-bit tensor cores of Hopper and later; `fp8-weights` rounds the weights
only, which saves memory and loses next to nothing. e4m3 has 3 bits of mantissa and reaches 448.

One scale for a whole tensor is not offered, although it is the fastest form on some libraries: a few tokens and
channels of Z-Image are hundreds of times larger than the rest, they take the range, and the picture drowns in noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op
from s3dit.kernels.scheme import Parts, Rows, Scheme, channels_linear, decode_channels, per_channel, rows, wide

DTYPE = torch.float8_e4m3fn


@op
def fp8_linear(x: Tensor | Rows, parts: Parts, bias: Tensor | None) -> Tensor:
    """Both sides in e4m3: x (…, in) or its Rows -> (…, out), dtype of x; see `Scheme`."""
    return F.linear(rows(x, DTYPE).dequantize(), decode_channels(parts), _fp32(bias)).to(x.dtype)


@op
def fp8_weights_linear(x: Tensor | Rows, parts: Parts, bias: Tensor | None) -> Tensor:
    """Weights in e4m3, x as it comes: x (…, in) -> (…, out), dtype of x."""
    return F.linear(wide(x), decode_channels(parts), _fp32(bias)).to(x.dtype)


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


@fp8_linear.on("cpu", "torch")
def _rounded(x: Tensor | Rows, parts: Parts, bias: Tensor | None) -> Tensor:
    """No CPU multiplies e4m3; its numbers are exact in bf16, so this is right, and as fast as bf16 at best."""
    return channels_linear(rows(x, DTYPE), parts, bias)


fp8_weights_linear.on("cpu", "torch")(channels_linear)

_spec, _encode = per_channel(DTYPE)
fp8 = Scheme("fp8", DTYPE, _spec, _encode, decode_channels, fp8_linear)
fp8_weights = Scheme("fp8-weights", None, _spec, _encode, decode_channels, fp8_weights_linear)
