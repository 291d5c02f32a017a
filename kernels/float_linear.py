"""The product with a weight of floats, in the dtype of x, whatever dtype the weight is kept in.

A CPU without bf16 arithmetic multiplies bf16 matrices six to eight times slower than fp32 ones. There the activations
are fp32 and the weight stays bf16; it is upcast piece by piece into one buffer that the cache holds, which costs a few
per cent of the product and needs no second copy of the model.

The answer does not depend on where in memory a weight lies, mapped from a file or copied: products of few rows take it
from an aligned address (`aligned`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.aligned import MAX_ALIGNED_ROWS, aligned

# Rows of the weight upcast at a time: 1024 × 3840 fp32 is 15 MiB, inside the last-level cache of a small server.
ROWS = 1024


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (…, in) of any float dtype by a weight (out, in), transposed, and add bias (out,) -> (…, out)."""
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dtype == x.dtype:
        # A graph is of any number of rows, so it does not ask for theirs.
        if not torch.compiler.is_exporting() and x.shape[:-1].numel() < MAX_ALIGNED_ROWS:
            x, weight = aligned(x), aligned(weight)
        return F.linear(x, weight, bias)
    # Gradients and compilers need the plain form; so does a weight too small to be worth cutting.
    if weight.requires_grad or torch.compiler.is_compiling() or len(weight) <= ROWS:
        return F.linear(x, weight.to(x.dtype), bias)
    out, buffer = x.new_empty(*x.shape[:-1], len(weight)), x.new_empty(ROWS, x.shape[-1])
    for start in range(0, len(weight), ROWS):
        piece = weight[start : start + ROWS]
        part_bias = None if bias is None else bias[start : start + ROWS]
        out[..., start : start + ROWS] = F.linear(x, buffer[: len(piece)].copy_(piece), part_bias)
    return out
