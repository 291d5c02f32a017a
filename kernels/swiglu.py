"""SwiGLU's product: silu(gate) · up, the only element-wise work of the feed-forward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op


@op
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up; gate, up (N, F) -> (N, F), dtype of gate; silu is fp32 inside.

    The gate is given away: a stand-in may reuse its memory.
    """
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@swiglu.on("cpu", "torch", when=lambda gate, up: not (torch.is_grad_enabled() and gate.requires_grad))
def _in_place(gate: Tensor, up: Tensor) -> Tensor:
    """Reuses the gate's memory: a fresh buffer of this size costs more in page faults than the arithmetic does."""
    return F.silu(gate, inplace=True).mul_(up)
