"""SigLIP2's vision tower (NaFlex): a picture of any shape to a grid of features.

A picture keeps its shape: it is resized so that its patches of 16 × 16 pixels are at most 256 in number, and the square
of learned positions is stretched over its grid. Several pictures are packed end to end without padding; each attends to
itself only, so a packed picture has the features it has alone, and those it has padded to 256 in transformers.

The tower ends with its last norm: the pooling head of the official files is not read. Modules carry the official names,
`vision_model.encoder.layers.0.self_attn.q_proj.weight`.

Source: SigLIP 2 (Tschannen et al. 2025, section 2.4.2); transformers' Siglip2VisionModel and Siglip2ImageProcessorPil
for names, the search of the size and rounding. What the transformer makes of the features is in `layout`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from s3dit.kernels.attention import Spans, attention
from s3dit.model.config import VisionConfig, VisionInputConfig
from s3dit.model.hooks import unhookable
from s3dit.model.linear import Linear

# The search for the largest scale stops when it knows it to this.
PRECISION = 1e-5
LARGEST_SCALE = 100.0


def grid_of(height: int, width: int, config: VisionInputConfig) -> tuple[int, int]:
    """Return rows and columns of the patches that a picture of this size is resized to, at most `max_num_patches`."""

    def cells(scale: float) -> tuple[int, int]:
        size = config.patch_size
        return max(1, math.ceil(height * scale / size)), max(1, math.ceil(width * scale / size))

    low, high = PRECISION / 10, LARGEST_SCALE
    while high - low >= PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(cells(middle)) <= config.max_num_patches else (low, middle)
    return cells(low)


def patches_of(image: Image.Image, config: VisionInputConfig) -> tuple[Tensor, tuple[int, int]]:
    """Resize an RGB picture and cut it into patches for the tower.

    -> patches (rows · columns, 3 · size²) fp32, each (row, column, channel), and the grid (rows, columns).
    """
    rows, columns = grid_of(image.height, image.width, config)
    size = config.patch_size
    resized = image.resize((columns * size, rows * size), Image.Resampling.BILINEAR)
    # parity: scaled in float64, rounded, then normalized in float32.
    values = (np.asarray(resized, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean, deviation = (np.array(channels, dtype=np.float32) for channels in (config.image_mean, config.image_std))
    values = (values - mean) / deviation
    cells = torch.from_numpy(values).view(rows, size, columns, size, 3).transpose(1, 2)
    return cells.reshape(rows * columns, -1), (rows, columns)


class VisionEncoder(nn.Module):
    """SigLIP2's vision tower from patches of packed pictures to features."""

    # Patterns of official names that are not read: the pooling head.
    unused = ("vision_model.head.*",)

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_model = Tower(config)

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Compute the features of several pictures, laid end to end.

        patches (n, 3 · size²) of the dtype to compute in, grids: rows and columns of each picture, cells summing to n
        -> (n, hidden). Raises ValueError where they do not agree.
        """
        lengths = tuple(rows * columns for rows, columns in grids)
        if patches.dim() != 2 or sum(lengths) != len(patches) or min(lengths, default=0) < 1:
            raise ValueError(
                f"patches are {tuple(patches.shape)} with grids {list(grids)}; needed (n, patch) of n cells"
            )
        tower, spans = self.vision_model, Spans.of(lengths, patches.device)
        x = tower.embeddings(patches, grids)
        for layer in tower.encoder.layers:
            x = layer(x, spans)
        return tower.post_layernorm(x)


class Tower(nn.Module):
    """The container named `vision_model.` in the official files; it has no forward of its own."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Stack(config)
        self.post_layernorm = LayerNorm(config)


class Stack(nn.Module):
    """The container named `encoder.` in the official files; it has no forward of its own."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, whatever dtype its weights are kept in."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (n, hidden) of any float dtype -> (n, hidden), same dtype."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Embeddings(nn.Module):
    """A linear of each patch, plus its place in the picture: a square of learned places, stretched over the grid."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        # Drawing its random start on the meta device would import two seconds of compiler.
        self.position_embedding = nn.Embedding.from_pretrained(
            torch.empty(config.num_patches, config.hidden_size), freeze=False
        )
        unhookable(self.position_embedding, "only its weight is read")

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Embed patches (n, 3 · size²) of the pictures with these grids -> (n, hidden), same dtype."""
        places = self.position_embedding.weight
        side = math.isqrt(len(places))
        # Antialiasing knows no 16-bit floats on a CPU, and costs nothing in fp32.
        square = places.float().T.reshape(1, -1, side, side)
        runs = [
            F.interpolate(square, grid, mode="bilinear", align_corners=False, antialias=True)[0].flatten(1).T
            for grid in grids
        ]
        # parity: the stretched places are rounded to the dtype that they are kept in.
        return self.patch_embedding(patches) + torch.cat(runs).to(places.dtype).to(patches.dtype)


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, spans: Spans) -> Tensor:
        """Apply to x (n, hidden) of any float dtype -> (n, hidden), same dtype."""
        x = x + self.self_attn(self.layer_norm1(x), spans)
        return x + self.mlp(self.layer_norm2(x))


class Attention(nn.Module):
    """Attention of every patch to all patches of its picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, spans: Spans) -> Tensor:
        """Apply to x (n, hidden) of any float dtype -> (n, hidden), same dtype."""
        q, k, v = (of(x).unflatten(-1, (self.heads, -1)) for of in (self.q_proj, self.k_proj, self.v_proj))  # (n, H, D)
        return self.out_proj(attention(q, k, v, spans, spans).flatten(1))


class MLP(nn.Module):
    """Two linears with the tanh form of GELU between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (n, hidden) of any float dtype -> (n, hidden), same dtype."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
