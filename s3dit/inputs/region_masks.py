"""Prepares the regions of a request: reads their masks, and shares every picture out among its prompts.

At every pixel a region has its weight times its mask, and the request's own prompt has its `base_weight` and besides
what no mask covers; divided by their sum these are shares, which sum to 1. A prompt without any share is not drawn.

Not here: the blending of velocities (sampling/regions.py), what a user may ask for (region.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.inputs.images import Pictures
from s3dit.model.layout import patchify
from s3dit.region import Region
from s3dit.request import Request
from s3dit.sampling.regions import Copy

# Channels of latents.
CHANNELS = 16


@dataclass(frozen=True, slots=True)
class Share:
    """What one prompt has of a picture.

    prompt: a region's, or None for the request's own · share (H, W) fp32, in [0, 1] · centered: as in Region · number:
    of the region from 1, 0 for the request's own prompt · sha256: of its mask, empty for a box.
    """

    prompt: str | None
    share: Tensor
    centered: bool = False
    number: int = 0
    sha256: str = ""


# The shares of every picture; none at all where a request has no regions.
Shares = tuple[tuple[Share, ...], ...]


def read(request: Request, pictures: Pictures, notes: list[str]) -> Shares:
    """Read and check the masks of a resolved request -> shares of every picture; adds notes, raises RequestError."""
    regions = request.regions()
    if not any(regions):
        return ()
    sizes = list(zip(request.per_image("height"), request.per_image("width"), strict=True))
    made: dict[tuple[object, ...], tuple[Share, ...]] = {}
    for of_picture, size in zip(regions, sizes, strict=True):
        if (key := (*map(id, of_picture), size)) not in made:
            made[key] = tuple(_shares(request, of_picture, size, pictures, notes))
    shares = tuple(made[(*map(id, of_picture), size)] for of_picture, size in zip(regions, sizes, strict=True))
    most = max(map(len, shares))
    notes.append(f"regions: a picture stands in each model call up to {most} times, once a prompt, without guidance")
    return shares


def _shares(
    request: Request, regions: Sequence[Region], size: tuple[int, int], pictures: Pictures, notes: list[str]
) -> Iterator[Share]:
    """The shares of one picture of `size` (height, width)."""
    masks, hashes = [], []
    for number, region in enumerate(regions, 1):
        name = f"region {number} mask"
        if region.box is None:
            picture = pictures.open(region.mask, name)
            masks.append(picture.mask(size, cut=False)[0])
            hashes.append(picture.sha256)
            if picture.size != size:
                (h, w), (height, width) = picture.size, size
                changed = "" if 0.9 < height * w / (width * h) < 1.1 else ", which changes its proportions"
                notes.append(f"{picture.name} is {w}×{h} pixels; it is scaled to {width}×{height}{changed}")
            name = picture.name
        else:
            masks.append(_box(region.box, size))
            hashes.append("")
        if not masks[-1].any():
            raise RequestError(f"{name} is black everywhere, so its prompt would draw nothing; needed white there")
        if bool((masks[-1] == 1).all()):
            notes.append(f"region {number} is the whole picture of {size[1]}×{size[0]}: its mask is white everywhere")
    own = request.base_weight + (1 - sum(masks, torch.zeros(size))).clamp(min=0)
    weights = [own, *(mask * region.weight for mask, region in zip(masks, regions, strict=True))]
    total = sum(weights[1:], own)
    if own.any():
        yield Share(None, own / total)
    elif any(request.prompts) or request.embeds:
        notes.append("prompt has no effect where regions cover the picture; base_weight, such as 0.2, gives it a share")
    for number, (region, weight, sha256) in enumerate(zip(regions, weights[1:], hashes, strict=True), 1):
        yield Share(region.prompt, weight / total, region.centered, number, sha256)


def _box(box: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    """The mask (H, W) of a box, pixels at its edges in part; RequestError where it reaches beyond the picture."""
    height, width = size
    left, top, w, h = (side * of for side, of in zip(box, (width, height) * 2, strict=True)) if max(box) <= 1 else box
    if left + w > width + 1e-6 or top + h > height + 1e-6:
        raise RequestError(
            f"region box {','.join(f'{side:g}' for side in box)} reaches beyond the picture of {width}×{height}; "
            "needed left,top,width,height inside it, in pixels or, where none is above 1, in fractions"
        )

    def covered(start: float, length: float, count: int) -> Tensor:
        """How much of every pixel of a side a stretch covers: (count,) in [0, 1]."""
        edges = torch.arange(count + 1, dtype=torch.float64).clamp(start, start + length)
        return edges.diff().float()

    return covered(top, h, height)[:, None] * covered(left, w, width)


def items(shares: Shares, count: int) -> Iterator[tuple[int, Share | None]]:
    """Yield the picture and the share of every item of a pass without guidance: the first item of each comes first."""
    if not shares:
        yield from ((i, None) for i in range(count))
    for k in range(max(map(len, shares), default=0)):
        yield from ((i, of_picture[k]) for i, of_picture in enumerate(shares) if k < len(of_picture))


def copies(shares: Shares, grids: Sequence[tuple[int, int]]) -> Iterator[Copy]:
    """Yield what `RegionBlend` is made of, in the order of `items`; grids: of the pass, which may be larger."""
    for picture, share in items(shares, len(grids)):
        assert share is not None
        rows, columns = grids[picture]
        # Means of the pixels of a cell: they sum to 1, as what they are of does.
        cells = F.interpolate(share.share[None, None], (2 * rows, 2 * columns), mode="area")[0]
        roll = _to_the_middle(cells[0]) if share.centered else (0, 0)
        yield Copy(picture, patchify(cells.expand(CHANNELS, -1, -1).contiguous()), roll)


def _to_the_middle(cells: Tensor) -> tuple[int, int]:
    """Rows and columns of patches from the center of gravity of a mask, (2 · rows, 2 · columns), to the picture's."""
    moves = []
    for side in (cells.sum(1), cells.sum(0)):
        places = torch.arange(len(side)) + 0.5
        moves.append(round(float(len(side) / 2 - (places * side).sum() / side.sum()) / 2))
    return moves[0], moves[1]


def hashes(shares: Shares, i: int) -> dict[str, str]:
    """Return the SHA-256 of every mask of picture i that is no box, under names such as "region 1 mask"."""
    of_picture = shares[i] if shares else ()
    return {f"region {share.number} mask": share.sha256 for share in of_picture if share.sha256}
