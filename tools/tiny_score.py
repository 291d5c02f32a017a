"""Score pictures of the tiny model: whether each shows what its scene demands.

Found from pixels alone: the background is the colour of the picture's frame, things are the connected regions that
differ from it, the colour of a thing is the palette colour nearest to its median, its shape is the template of the
same area and centroid that overlaps it best. A shape counts as right only if it also overlaps its template by
``MIN_OVERLAP`` (intersection over union), so that a blob never passes as "nearest to a circle".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from tiny_world import COLOURS, PLACES, RELATIONS, SHAPES, SIDE, Scene, coverage

MIN_OVERLAP = 0.75
MIN_AREA = 80  # pixels; smaller specks are not counted as things
MIN_CONTRAST = 60.0  # RGB distance from the background at which a pixel belongs to a thing
CENTRE_REACH = 14.0  # pixels a centred thing may be off the centre
SMALL_BELOW, LARGE_ABOVE = 27.0, 40.5  # fitted radii in pixels that bound "neither small nor large"

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], np.float32)


@dataclass(frozen=True)
class Region:
    """A thing found in a picture: centroid ``x``, ``y`` and fitted radius ``r`` in pixels, ``overlap`` in [0, 1]."""

    colour: str
    shape: str
    overlap: float
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Verdict:
    """Which demands of a scene a picture meets."""

    background: bool
    colour: bool
    shape: bool
    arrangement: bool

    @property
    def everything(self) -> bool:
        """Whether all four demands are met at once."""
        return self.background and self.colour and self.shape and self.arrangement


def _nearest(rgb: NDArray[np.float32]) -> str:
    return _NAMES[int(np.argmin(((_PALETTE - rgb) ** 2).sum(1)))]


def _label(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the 4-connected regions of a mask by flooding the smallest pixel index; 0 is outside."""
    far = np.int32(mask.size + 1)
    labels = np.where(mask, np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape), far)
    while True:
        padded = np.pad(labels, 1, constant_values=far)
        flood = np.minimum.reduce([labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
        flood = np.where(mask, flood, far)
        # Jump along the pointers that labels are, so that long regions need few rounds.
        flood = np.where(mask, flood.ravel()[np.minimum(flood, mask.size) - 1], far)
        if np.array_equal(flood, labels):
            return np.where(mask, labels, 0)
        labels = flood


_AREAS = {shape: float(coverage(shape, SIDE / 2, SIDE / 2, 40.0).sum()) / 1600.0 for shape in SHAPES}
_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def _centroid(cover: NDArray[np.float32]) -> tuple[float, float, float]:
    area = float(cover.sum())
    return float((cover * _COLUMNS).sum()) / area, float((cover * _ROWS).sum()) / area, area


def _fit(cover: NDArray[np.float32]) -> tuple[str, float, float, float, float]:
    """Find the template of equal area and centroid that overlaps best; returns shape, overlap, x, y, r."""
    x, y, area = _centroid(cover)
    best = ("", -1.0, x, y, 0.0)
    for shape in SHAPES:
        r = (area / _AREAS[shape]) ** 0.5
        template = coverage(shape, x, y, r)
        if not template.any():
            continue
        tx, ty, _ = _centroid(template)
        template = coverage(shape, 2 * x - tx, 2 * y - ty, r)
        overlap = float(np.minimum(cover, template).sum() / np.maximum(cover, template).sum())
        if overlap > best[1]:
            best = (shape, overlap, x, y, r)
    return best


def separate(picture: NDArray[np.uint8]) -> tuple[NDArray[np.float32], list[NDArray[np.bool_]]]:
    """Cut a (128, 128, 3) picture into things: its background's RGB, and the pixels (128, 128) of each thing on it."""
    pixels = picture.astype(np.float32)
    frame = np.concatenate(
        [
            pixels[:3].reshape(-1, 3),
            pixels[-3:].reshape(-1, 3),
            pixels[:, :3].reshape(-1, 3),
            pixels[:, -3:].reshape(-1, 3),
        ]
    )
    ground = np.median(frame, 0)
    labels = _label(np.sqrt(((pixels - ground) ** 2).sum(2)) > MIN_CONTRAST)
    counted = zip(*np.unique(labels[labels > 0], return_counts=True), strict=True)
    return ground, [labels == label for label, area in counted if area >= MIN_AREA]


def find(picture: NDArray[np.uint8]) -> tuple[str, list[Region]]:
    """Read a (128, 128, 3) picture: its background colour and the things on it."""
    pixels = picture.astype(np.float32)
    ground, things = separate(picture)
    regions = []
    for inside in things:
        rgb = np.median(pixels[inside], 0)
        grown = np.pad(inside, 1)
        grown = inside | grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
        axis = rgb - ground
        cover = np.clip((pixels - ground) @ axis / float(axis @ axis), 0, 1).astype(np.float32) * grown
        shape, overlap, x, y, r = _fit(cover)
        regions.append(Region(_nearest(rgb), shape, overlap, x, y, r))
    return _nearest(ground), regions


def _in_place(scene: Scene, regions: tuple[Region, ...]) -> bool:
    first = regions[0]
    dx, dy = first.x - SIDE / 2, first.y - SIDE / 2
    if scene.kind == "two":
        want = RELATIONS[scene.arrangement]
        gap = (first.x - regions[1].x, first.y - regions[1].y)
        along = gap[0] * want[0] + gap[1] * want[1]
        return along > 20 and abs(gap[0] * want[1]) + abs(gap[1] * want[0]) < along
    if scene.kind == "placed":
        third = SIDE / 8
        return tuple(int(np.sign(d)) if abs(d) > third else 0 for d in (dx, dy)) == PLACES[scene.arrangement]
    centred = max(abs(dx), abs(dy)) < CENTRE_REACH
    size = "small" if first.r < SMALL_BELOW else "large" if first.r > LARGE_ABOVE else "centre"
    return centred and size == scene.arrangement


def judge(picture: NDArray[np.uint8], scene: Scene) -> Verdict:
    """Compare a picture with what its scene demands."""
    ground, regions = find(picture)
    if len(regions) != len(scene.things):
        return Verdict(ground == scene.background, False, False, False)
    best: tuple[int, bool, Verdict] | None = None
    # Nothing in the pixels says which region was meant as which thing: take the reading that agrees best.
    for order in permutations(regions):
        pairs = list(zip(order, scene.things, strict=True))
        colours = [region.colour == thing.colour for region, thing in pairs]
        shapes = [region.shape == thing.shape and region.overlap >= MIN_OVERLAP for region, thing in pairs]
        placed = _in_place(scene, order)
        verdict = Verdict(ground == scene.background, all(colours), all(shapes), placed)
        rank = (sum(colours) + sum(shapes), placed, verdict)
        if best is None or rank[:2] > best[:2]:
            best = rank
    assert best is not None
    return best[2]


def table(verdicts: Iterable[tuple[Scene, Verdict]]) -> dict[str, float]:
    """Shares in [0, 1]: of every demand, of everything at once (in all, per kind, held-out, trained), and n."""
    rows = list(verdicts)
    out: dict[str, float] = {"n": len(rows)}

    def share(name: str, hits: list[bool]) -> None:
        """Add the share of hits, where there are any rows."""
        if hits:
            out[name] = round(sum(hits) / len(hits), 4)

    for demand in ("background", "colour", "arrangement", "shape", "everything"):
        share(demand, [bool(getattr(verdict, demand)) for _, verdict in rows])
    share("shape of single objects", [v.shape for s, v in rows if len(s.things) == 1])
    for kind in ("single", "sized", "placed", "two"):
        share(f"everything, {kind}", [v.everything for s, v in rows if s.kind == kind])
    share("everything, trained pairs", [v.everything for s, v in rows if not s.held_out])
    share("everything, held-out pairs", [v.everything for s, v in rows if s.held_out])
    return out
