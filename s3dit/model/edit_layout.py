"""Where the tokens of Omni and Edit models stand, which look at reference pictures beside their captions.

The caption comes in segments, with the pictures between them; each segment of each stream is
filled up by itself; a reference's tokens are clean, which is to say that they, and the caption before them, read the
modulation of t = 1; the joint order is caption, image, vision.

Source: `patchify_and_embed_omni` and `forward` of diffusers' transformer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s3dit.model.layout import Grid, Layout, Segment, interleave, padded


def edit(
    grids: Sequence[Grid],
    text_lengths: Sequence[Sequence[int]],
    references: Sequence[Sequence[tuple[Grid, Grid]]],
    device: torch.device | str = "cpu",
    *,
    slide: bool = True,
) -> Layout:
    """Lay out B items of an Omni model, each with any number of reference pictures, none included.

    grids: of each picture to be drawn · text_lengths: real tokens of each caption segment, n + 2 segments for n > 0
    references, else one · references: each one's grids, of its latents' patches and of its vision features · slide:
    positions of captions as in the released code; False gives every segment its own. Joint order caption, image,
    vision. Raises ValueError for another number of caption segments.
    """
    items = [
        _edited(grid, lengths, given) for grid, lengths, given in zip(grids, text_lengths, references, strict=True)
    ]
    streams = tuple((name, tuple(tuple(item[name]) for item in items)) for name in ("image", "text", "vision"))
    return interleave(streams, ("text", "image", "vision"), device, slide)


def _edited(grid: Grid, lengths: Sequence[int], references: Sequence[tuple[Grid, Grid]]) -> dict[str, list[Segment]]:
    """The segments of one item; `edit` has the arguments."""
    n = len(references)
    if len(lengths) != (n + 2 if n else 1):
        raise ValueError(f"{len(lengths)} caption segments for {n} references; needed n + 2, or one without references")
    item: dict[str, list[Segment]] = {"image": [], "text": [], "vision": []}
    pictures = [*references, (grid, None)]
    place = 1
    for i, length in enumerate(lengths):
        clean = i < n
        item["text"].append(Segment(length, (padded(length), 1, 1), (place, 0, 0), clean))
        # Padding runs on past this, into the positions of what follows.
        place += length
        if i < len(pictures):
            (rows, columns), seen = pictures[i]
            item["image"].append(Segment(rows * columns, (1, rows, columns), (place, 0, 0), clean))
            if seen is not None:
                # Over the cells of the latents, not over the tokens, which are half as many a side.
                stretch = (2 * rows, 2 * columns)
                item["vision"].append(Segment(seen[0] * seen[1], (1, *seen), (place + 1, 0, 0), clean, stretch))
            elif n:
                item["vision"].append(Segment(0, (0, 0, 0), (0, 0, 0)))
        place += 2
    return item


def released_order(features: Tensor) -> Tensor:
    """Reorder a picture's vision features (n, D) as the transformer reads them: -> (n, D).

    The released code lays them out feature by feature and reads them token by token, so that a token holds pieces of
    many features. It looks unintended, but it is what a model was trained with that is run by that code.
    """
    return features.T.reshape(features.shape)
