"""What a time does to the transformer: its embedding, and from it the factors and gates of blocks and the final scale.

A block's norms are scaled by (1 + s) before and gated by tanh(g) behind attention and feed-forward; s and g are linear
in the embedded time. Source: official `src/zimage/transformer.py`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3dit.model.config import TransformerConfig
from s3dit.model.linear import Linear

FREQUENCIES = 256


class TimestepEmbedder(nn.Module):
    """Embeds times: cosines and sines of 128 frequencies, then two linears with SiLU between."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(FREQUENCIES, 1024), nn.SiLU(), Linear(1024, out))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed t (R,) fp32, already scaled by t_scale -> (R, out) of dtype."""
        half = FREQUENCIES // 2
        # parity: everything in fp32 and in this order; one ulp of the argument moves the picture by 1e-6.
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * frequencies[None]
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))


def modulation_tables(modulation: Tensor, norms: Tensor) -> Tensor:
    """Compute the factors and gates of blocks, as the Ops of `kernels.norm` take them.

    modulation (…, R, 4 · dim): scale and gate of attention, then of feed-forward, as adaLN answers · norms (…, 4, dim):
    the weights of the norms before and after each -> (…, 4, R, dim) fp32: weight · (1 + scale), weight · tanh(gate), ….
    """
    scales, gates = modulation.float().unflatten(-1, (2, 2, -1)).unbind(-2)  # (…, R, 2, dim)
    tables = torch.stack((1.0 + scales, gates.tanh()), dim=-2).flatten(-3, -2)  # (…, R, 4, dim)
    return norms.float()[..., None, :] * tables.movedim(-2, -3)


@dataclass(frozen=True, slots=True)
class Modulation:
    """What the layers read of a time, computed before a pass: of R rows, one an item or one for all.

    time (R, adaln_dim): embedded · tables (blocks, 4, R, dim) fp32: `modulation_tables` of the noise refiner's and the
    main blocks · final (R, dim): the scale of the final layer · alone: by block, whether it has no table here.
    """

    time: Tensor
    tables: Tensor
    final: Tensor
    alone: tuple[bool, ...]


class FinalLayer(nn.Module):
    """LayerNorm without weights, scaled by (1 + s) of the time, then a linear to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = Linear(config.dim, config.patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.adaln_dim, config.dim))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Apply to x (n, dim), scale (1, dim) or (n, dim), 1 + s of each token's time -> patches (n, patch_dim)."""
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale)
