"""What the transformer and the encoders share: RMSNorm, the rotary table, and keeping what only sizes determine.

Rotary angles are position × theta^(-2i/d), taken in float64 and kept as float32 cosine and sine, so there is no table
length and no position limit (diffusers cuts its table at `axes_lens`; the values are the same bits).
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from s3dit.kernels.norm import residual_norm, rms_norm
from s3dit.model.hooks import hooked

P = ParamSpec("P")
R = TypeVar("R")


def kept(limit: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function of sizes, which are hashable: its last `limit` results are kept, on their device.

    They are ordinary tensors, whatever mode of torch the caller is in; fake ones are not kept.
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        keeping = lru_cache(limit)(make)

        @wraps(make)
        def call(*args: P.args, **named: P.kwargs) -> R:
            with torch.inference_mode(False):
                real = type(torch.empty(0)) is Tensor
                return keeping(*args, **named) if real else make(*args, **named)  # type: ignore[arg-type]

        return call

    return decorate


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension: x / sqrt(mean(x²) + eps) · weight, computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (…, dim), any float dtype -> same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Add y to x, (n, dim) each of one dtype, and normalize that -> the sum and its norm, by one operation."""
        if not torch.compiler.is_compiling() and hooked(self):
            x = x + y
            return x, self(x)
        return residual_norm(x, y, self.weight, self.eps)


def rope_table(positions: Tensor, axes_dims: tuple[int, ...], theta: float) -> Tensor:
    """Return cosine and sine of the rotary angles of every token.

    positions (N, axes) integers on the CPU -> (N, sum(axes_dims) / 2, 2) fp32 there; the last dimension is (cos, sin),
    pairs are adjacent elements. Source: official `RopeEmbedder.precompute_freqs_cis`.
    """
    tables = []
    for axis, dim in enumerate(axes_dims):
        # float64 lives on the CPU: MPS has none.
        powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles = positions[:, axis].double()[:, None] * (1.0 / theta**powers)
        angles = angles.float()
        tables.append(torch.stack((angles.cos(), angles.sin()), dim=-1))
    return torch.cat(tables, dim=1)
