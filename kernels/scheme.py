"""Scheme: what a number format is.

A quantized linear layer is a few tensors, its *parts*, named and shaped by `spec`. `encode` makes them of a float
weight, `decode` gives the weight back, and `linear` is the Op that multiplies by it. A format whose `activation` is an
8-bit type rounds the rows of x too (one scale a token, one a output channel: a single scale for a whole tensor breaks
Z-Image, because one outlier takes the range from everything else); its reference is the product of the two rounded
matrices in fp32.

Who makes x may round it already and hand over `Rows`: the norms and SwiGLU do so in the pass that they make anyway.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s3dit.kernels.dispatch import Op

Parts = Mapping[str, Tensor]

# A row of zeros must not divide by zero, nor a tiny one blow up its rounding noise.
SMALLEST = 1e-8
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Rows(NamedTuple):
    """x in 8 bits: values (…, K) int8 or e4m3, scale (…, 1) fp32, and the dtype that x had; x ≈ values · scale."""

    values: Tensor
    scale: Tensor
    wide: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of x before rounding, and of what a product with it gives."""
        return self.wide

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape

    def dequantize(self) -> Tensor:
        """Give x back, in fp32."""
        return self.values.float() * self.scale


def quantize_rows(x: Tensor, dtype: torch.dtype) -> Rows:
    """Round each row of x (…, K) to int8 or e4m3 by its own largest magnitude; fp32 inside."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST[dtype]
    scaled = wide / scale
    return Rows((scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale, x.dtype)


@dataclass(frozen=True, slots=True)
class Scheme:
    """A number format of linear weights; see the module's docstring.

    spec(out, in) -> name of part -> (shape, dtype), raising ValueError for sizes it cannot take
    encode(weight (out, in), any float) -> parts · decode(parts) -> weight (out, in) fp32
    linear(x or Rows (…, in), parts, bias or None) -> (…, out), dtype of x
    """

    name: str
    activation: torch.dtype | None
    spec: Callable[[int, int], dict[str, tuple[tuple[int, ...], torch.dtype]]]
    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Callable[[Parts], Tensor]
    linear: Op
