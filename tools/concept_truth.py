"""Score maps of concepts against the things that are drawn in the embedded model's pictures.

The truth is cut out of the drawn picture by color (`tiny_score.separate`): what share of each cell of the grid of
image tokens a thing covers. Pictures count in which every thing has its color and is where it should be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tiny_score import judge, separate
from tiny_world import SIDE, Scene

# Cells a side of the embedded model's grid of image tokens, and of the finer grid, of 4 × 4 pixels, that is scored.
GRID, FINE = 8, 32


def _finer() -> NDArray[np.float64]:
    """The matrix (64, 1024) that interpolates maps bilinearly, as a picture is enlarged."""
    cells = torch.eye(GRID * GRID, dtype=torch.float64).view(-1, 1, GRID, GRID)
    return F.interpolate(cells, size=FINE, mode="bilinear").flatten(1).numpy()


FINER = _finer()


@dataclass(frozen=True)
class Truth:
    """A thing that was drawn: what it is called, and the share of every fine cell that it, and the other thing, covers.

    own, other: (1024,) float64 in [0, 1]; other None in pictures of one thing.
    """

    colour: str
    shape: str
    own: NDArray[np.float64]
    other: NDArray[np.float64] | None


def truths(picture: NDArray[np.uint8], scene: Scene) -> list[Truth]:
    """Find the things of a scene in its picture (128, 128, 3); none where one lacks its color or its place."""
    verdict = judge(picture, scene)
    if not (verdict.colour and verdict.arrangement):
        return []
    masks = separate(picture)[1]
    # The place was right: the nearest of the regions is the thing.
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    distance = [[np.hypot(columns[m].mean() - t.x, rows[m].mean() - t.y) for m in masks] for t in scene.things]
    shares = [masks[int(np.argmin(of))].reshape(FINE, SIDE // FINE, FINE, -1).mean((1, 3)).ravel() for of in distance]
    return [
        Truth(thing.colour, thing.shape, share, shares[1 - i] if len(shares) == 2 else None)
        for i, (thing, share) in enumerate(zip(scene.things, shares, strict=True))
    ]


MEASURES = ("own before other", "IoU", "AUROC", "point")


def score(maps: NDArray[np.floating], truth: Truth) -> NDArray[np.float64]:
    """Score maps (…, 64) of one thing -> (…, 4) in the order of MEASURES; own before other is NaN without another.

    Of maps enlarged to 32 × 32 · own before other: 1 where the mean is higher over the thing than over the other, 0.5
    where it is the same · IoU of the thing with the highest cells, as many as have its area · AUROC: how often a piece
    of the thing is higher than a piece of the rest, pieces of one cell counting a half · point: whether the thing
    covers at least half of the highest cell.
    """
    maps, own = maps.astype(np.float64) @ FINER, truth.own
    # Highest cell first; whole numbers of 16 bits are sorted ten times as fast, and alike on every machine.
    highest, lowest = maps.max(-1, keepdims=True), maps.min(-1, keepdims=True)
    depth = (highest - maps) / np.maximum(highest - lowest, 1e-30) * 65535
    inside = own[np.argsort(depth.astype(np.uint16), -1, kind="stable")]
    area = own.sum()
    count = max(1, round(area))
    overlap = inside[..., :count].sum(-1)
    outside = 1.0 - inside
    below = outside.sum(-1, keepdims=True) - outside.cumsum(-1)
    auroc = (inside * (below + 0.5 * outside)).sum(-1) / (area * outside.sum(-1))
    before = np.full(maps.shape[:-1], np.nan)
    if truth.other is not None:
        before = 0.5 + 0.5 * np.sign(maps @ (own / area - truth.other / truth.other.sum()))
    return np.stack([before, overlap / (area + count - overlap), auroc, (inside[..., 0] >= 0.5) * 1.0], -1)
