"""The linear layer of every model here: computes in the dtype of its input, whatever dtype its weight is kept in.

A CPU without bf16 arithmetic multiplies bf16 matrices six to eight times slower than fp32 ones. There the activations
are fp32 and the weight stays bf16, as it lies in the (memory-mapped) file; it is widened piece by piece into one
buffer that the cache holds, which costs a few per cent of the product and needs no second copy of the model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of the weight widened at a time: 1024 × 3840 fp32 is 15 MiB, inside the last-level cache of a small server.
ROWS = 1024


class Linear(nn.Linear):
    """`x (…, in) @ weight (out, in).T + bias`, in the dtype of x; the weight may be of a narrower float dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (…, in) of any float dtype -> (…, out), same dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, bias)
        # Gradients and compilers need the plain form; so does a weight too small to be worth cutting.
        if self.weight.requires_grad or torch.compiler.is_compiling() or self.out_features <= ROWS:
            return F.linear(x, self.weight.to(x.dtype), bias)
        return self._widened(x, bias)

    def _widened(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by pieces of the weight, each widened into the same buffer."""
        out = x.new_empty(*x.shape[:-1], self.out_features)
        buffer = x.new_empty(ROWS, self.in_features)
        for start in range(0, self.out_features, ROWS):
            piece = self.weight[start : start + ROWS]
            wide = buffer[: piece.shape[0]].copy_(piece)
            part = None if bias is None else bias[start : start + ROWS]
            out[..., start : start + ROWS] = F.linear(x, wide, part)
        return out
