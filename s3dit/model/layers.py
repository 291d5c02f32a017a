"""The two layers that the transformer and the encoders share: RMSNorm and the rotary table.

Rotary angles are position × theta^(-2i/d), taken in float64 and kept as float32 cosine and sine, so there is no table
length and no position limit (diffusers cuts its table at `axes_lens`; the values are the same bits).
"""

import torch
from torch import Tensor, nn

from s3dit.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension: x / sqrt(mean(x²) + eps) · weight, computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (…, dim), any float dtype -> same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


def rope_table(positions: Tensor, axes_dims: tuple[int, ...], theta: float) -> Tensor:
    """Return cosine and sine of the rotary angles of every token.

    positions (N, axes) integers -> (N, sum(axes_dims) / 2, 2) fp32 on the same device; the last dimension is
    (cos, sin), pairs are adjacent elements. Source: official `RopeEmbedder.precompute_freqs_cis`.
    """
    tables = []
    for axis, dim in enumerate(axes_dims):
        # float64 lives on the CPU: MPS has none, and the table is made once a request.
        powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles = positions[:, axis].double().cpu()[:, None] * (1.0 / theta**powers)
        angles = angles.float()
        tables.append(torch.stack((angles.cos(), angles.sin()), dim=-1))
    return torch.cat(tables, dim=1).to(positions.device)
