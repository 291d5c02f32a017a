"""Score maps of concepts against the things that are drawn in the embedded model's pictures.

The truth is cut out of the drawn picture by color (`tiny_score.separate`): what share of each cell of the grid of
image tokens a thing covers. Pictures count in which every thing has its color and is where it should be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tiny_score import judge, separate
from tiny_world import SIDE, Scene

# Cells a side of the embedded model's grid of image tokens.
GRID = 8


@dataclass(frozen=True)
class Truth:
    """A thing that was drawn: what it is called, and the share of every cell that it, and the other thing, covers.

    own, other: (64,) float64 in [0, 1]; other None in pictures of one thing.
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
    shares = [masks[int(np.argmin(of))].reshape(GRID, SIDE // GRID, GRID, -1).mean((1, 3)).ravel() for of in distance]
    return [
        Truth(thing.colour, thing.shape, share, shares[1 - i] if len(shares) == 2 else None)
        for i, (thing, share) in enumerate(zip(scene.things, shares, strict=True))
    ]


MEASURES = ("own before other", "IoU", "AUROC", "point")


def score(maps: NDArray[np.floating], truth: Truth) -> NDArray[np.float64]:
    """Score maps (…, 64) of one thing -> (…, 4) in the order of MEASURES; own before other is NaN without another.

    own before other: 1 where the map's mean is higher over the thing than over the other · IoU of the thing's pixels
    with the pixels of the highest cells, as many as have its area · AUROC of pixels, those of a cell being equal ·
    point: whether the thing covers at least half of the highest cell.
    """
    own = truth.own
    order = np.argsort(-maps, -1, kind="stable")
    inside = own[order]  # (…, 64), highest cell first
    area = own.sum()
    count = max(1, round(area))
    overlap = inside[..., :count].sum(-1)
    # Pairs of a pixel inside and one outside: the share whose map is higher inside; ties within a cell count a half.
    outside = 1.0 - inside
    below = outside.sum(-1, keepdims=True) - outside.cumsum(-1)
    auroc = (inside * (below + 0.5 * outside)).sum(-1) / (area * outside.sum(-1))
    before = np.full(maps.shape[:-1], np.nan)
    if truth.other is not None:
        before = (maps @ own / area > maps @ truth.other / truth.other.sum()).astype(np.float64)
    return np.stack([before, overlap / (area + count - overlap), auroc, (inside[..., 0] >= 0.5) * 1.0], -1)
