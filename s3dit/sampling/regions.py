"""Several prompts in one picture: every prompt sees the whole state, and each has its share of the velocity.

A picture stands in the pack once a prompt, all copies with the same state, as it does for guidance; no attention is
masked. At every cell of the latents the velocities of a picture's copies are averaged with weights that sum to 1, so
that all copies go on with one state, in which they see what the others have drawn. A copy may stand rolled in its
rows: its tokens are the picture's, moved around its borders.

Sources: Bar-Tal et al. 2023, MultiDiffusion (the average; there of crops of a larger picture).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of a picture in a pass, for one of its prompts.

    picture: its index · shares (n, 64) fp32: weight of its velocity, those of a picture's copies sum to 1 · roll: rows
    and columns of patches by which it is moved.
    """

    picture: int
    shares: Tensor
    roll: tuple[int, int] = (0, 0)


class RegionBlend:
    """From the state of pictures to that of their copies, and from the copies' velocities to the pictures'."""

    def __init__(self, copies: Sequence[Copy], grids: Sequence[tuple[int, int]], device: torch.device | str) -> None:
        """grids: rows and columns of patches of every picture."""
        starts = [0, *accumulate(rows * columns for rows, columns in grids)]
        # Of every copy: the rows of the state that its tokens are, and their shares.
        self._copies: list[tuple[Tensor, Tensor]] = []
        for copy in copies:
            patches = torch.arange(len(copy.shares)).view(grids[copy.picture]).roll(copy.roll, (0, 1)).flatten()
            self._copies.append(((patches + starts[copy.picture]).to(device), copy.shares[patches].to(device)))
        self._index = torch.cat([rows for rows, _ in self._copies])

    def spread(self, x: Tensor) -> Tensor:
        """Rows (tokens, D) of the pictures, such as the state -> those of all copies, end to end (n, D)."""
        return x[self._index]

    def blend(self, velocity: Tensor, x: Tensor) -> Tensor:
        """The velocity of all copies (n, 64) fp32 -> the pictures', of the shape of their state x (tokens, 64)."""
        blended = torch.zeros_like(x)
        pieces = velocity.split([len(rows) for rows, _ in self._copies])
        # One copy after the other: a sum in a fixed order, whatever else is in the batch.
        for (rows, shares), piece in zip(self._copies, pieces, strict=True):
            blended[rows] += shares * piece
        return blended
