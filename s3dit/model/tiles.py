"""Tiles: a large picture as overlapping squares of one size, each computed alone, feathered together.

The weights of what overlaps sum to one. The peak of memory is that of one tile; the result is approximate, because
statistics and attention are of a tile in place of the picture.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# The smallest tile, in latent cells: below it a tile is mostly overlap and its statistics say little of the picture.
SMALLEST_TILE = 8


def check_tile(tile: int) -> None:
    """Raise ValueError for a tile that is too small."""
    if tile < SMALLEST_TILE:
        raise ValueError(f"tile is {tile} latent cells; needed {SMALLEST_TILE} or more, or None for no tiles")


def by_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, cell: int, out_cell: int) -> Tensor:
    """Run an encoder or decoder over tiles of x (B, C, H, W), `tile` latent cells a side -> (B, out, H', W').

    A latent cell is `cell` positions a side of x, and `out_cell` of the result.
    """
    rows, columns = x.shape[2] // cell, x.shape[3] // cell
    result: Tensor | None = None
    for top, height, fade_y in feathers(rows, tile, out_cell):
        for left, width, fade_x in feathers(columns, tile, out_cell):
            done = run(x[:, :, top * cell : (top + height) * cell, left * cell : (left + width) * cell])
            if result is None:
                result = done.new_zeros(*done.shape[:2], rows * out_cell, columns * out_cell)
            done = done * fade_y.to(done)[:, None] * fade_x.to(done)
            y, z = top * out_cell, left * out_cell
            result[:, :, y : y + done.shape[2], z : z + done.shape[3]] += done
    assert result is not None
    return result


def feathers(cells: int, tile: int, out_cell: int) -> list[tuple[int, int, Tensor]]:
    """Cut one axis into equal overlapping tiles: (start, length) in cells and the weight of each result position.

    At least a quarter of a tile overlaps its neighbor; the weights fall linearly to the edge, where a convolution saw
    zeros instead of the neighbor, and sum to one everywhere.
    """
    if cells <= tile:
        return [(0, cells, torch.ones(cells * out_cell, dtype=torch.float32))]
    overlap = tile // 4
    count = math.ceil((cells - overlap) / (tile - overlap))
    starts = [round(i * (cells - tile) / (count - 1)) for i in range(count)]
    position = torch.arange(tile * out_cell, dtype=torch.float64) + 0.5
    weights = torch.zeros(count, cells * out_cell, dtype=torch.float64)
    for i, start in enumerate(starts):
        rise = position if i > 0 else position.new_full((), math.inf)
        fall = position.flip(0) if i < count - 1 else position.new_full((), math.inf)
        fade = (torch.minimum(rise, fall) / (overlap * out_cell)).clamp(max=1.0)
        weights[i, start * out_cell : (start + tile) * out_cell] = fade
    weights /= weights.sum(0)
    return [(s, tile, weights[i, s * out_cell : (s + tile) * out_cell].float()) for i, s in enumerate(starts)]
