"""Where every token of a request stands: the heart of the model's data flow.

All modes of Z-Image differ only in where tokens stand, which modulation row they read and which are padding. A Layout
says this once; the transformer has no modes. Streams of several items are laid end to end, so a ragged batch (other
sizes, other prompts) is the ordinary case and no attention mask exists.

Facts kept from the official model: each stream of an item is filled up to a multiple of 32 with a learned pad token
that *is* attended to; caption tokens, pads included, stand at (1 … padded length, 0, 0); image tokens at
(padded caption length + 1, row, column); image pads at (0, 0, 0); the joint order is image, then caption.
Source: `patchify_and_embed` and `forward` of the official transformer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s3dit.kernels.attention import Spans

# Tokens of a stream are filled up to a multiple of this (official SEQ_MULTI_OF).
MULTIPLE = 32


def padded(length: int) -> int:
    """The length of a stream with its padding."""
    return -(-length // MULTIPLE) * MULTIPLE


@dataclass(frozen=True, slots=True)
class Segment:
    """One run of tokens: `length` real ones on a grid (frames, rows, columns) that starts at `origin`.

    A grid with more cells than `length` gives positions to the padding too (captions); padding beyond the grid
    stands at (0, 0, 0) (images).
    """

    length: int
    grid: tuple[int, int, int]
    origin: tuple[int, int, int]

    @property
    def padded(self) -> int:
        """Length with padding."""
        return padded(self.length)

    def positions(self) -> Tensor:
        """Positions of all tokens, padding included: (padded, 3) int64."""
        axes = [torch.arange(start, start + size) for start, size in zip(self.origin, self.grid, strict=True)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
        return torch.cat((grid, grid.new_zeros(self.padded - len(grid), 3)))


@dataclass(frozen=True, slots=True)
class Pack:
    """One stream of several items, end to end, N tokens in all.

    spans: the items · positions (N, 3) int64 · row (N,) int64, the item of each token, which is the row of the
    modulation table that it reads · real (n,) int64, the places of the tokens that are not padding.
    """

    spans: Spans
    positions: Tensor
    row: Tensor
    real: Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device | str) -> "Pack":
        """Lay one segment an item end to end."""
        lengths = tuple(s.padded for s in segments)
        rows = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(lengths))
        real = torch.cat([torch.arange(s.padded) < s.length for s in segments]).nonzero()[:, 0]
        positions = torch.cat([s.positions() for s in segments])
        return cls(Spans.of(lengths, device), positions.to(device), rows.to(device), real.to(device))

    def fill(self, tokens: Tensor, pad: Tensor) -> Tensor:
        """Put tokens (n, D) in their places and the pad token (1, D) everywhere else -> (N, D)."""
        if len(tokens) == len(self.positions):
            return tokens
        return pad.to(tokens.dtype).repeat(len(self.positions), 1).index_copy_(0, self.real, tokens)


@dataclass(frozen=True, slots=True)
class Layout:
    """A request's tokens: the image and text streams, and the joint sequence in which `layers` run.

    gather (N,) takes the concatenation of the image pack and the text pack into joint order; `whole.real` are the
    places, in joint order, of the image tokens that are denoised.
    """

    image: Pack
    text: Pack
    whole: Pack
    gather: Tensor


def text_to_image(
    grids: Sequence[tuple[int, int]], text_lengths: Sequence[int], device: torch.device | str = "cpu"
) -> Layout:
    """Lay out B text-to-image items.

    grids: (rows, columns) of 2 × 2 latent patches an item (pixels / 16) · text_lengths: real caption tokens an item.
    """
    texts = [Segment(n, (padded(n), 1, 1), (1, 0, 0)) for n in text_lengths]
    images = [
        Segment(rows * columns, (1, rows, columns), (text.padded + 1, 0, 0))
        for (rows, columns), text in zip(grids, texts, strict=True)
    ]
    image, text = Pack.of(images, device), Pack.of(texts, device)
    return _join(image, text, device)


def _join(image: Pack, text: Pack, device: torch.device | str) -> Layout:
    """Interleave two streams item by item: image of item 0, text of item 0, image of item 1, …"""
    n_image = len(image.positions)
    places = torch.arange(n_image + len(text.positions), device=device)
    runs = zip(places[:n_image].split(image.spans.lengths), places[n_image:].split(text.spans.lengths), strict=True)
    gather = torch.cat([part for run in runs for part in run])
    is_target = torch.zeros_like(places, dtype=torch.bool)
    is_target[image.real] = True
    lengths = tuple(a + b for a, b in zip(image.spans.lengths, text.spans.lengths, strict=True))
    whole = Pack(
        spans=Spans.of(lengths, device),
        positions=torch.cat((image.positions, text.positions))[gather],
        row=torch.cat((image.row, text.row))[gather],
        real=is_target[gather].nonzero()[:, 0],
    )
    return Layout(image, text, whole, gather)


def patchify(latents: Tensor) -> Tensor:
    """Cut one item's latents (C, H, W) into patches (H/2 · W/2, 4·C), each (row, column, channel)."""
    c, h, w = latents.shape
    return latents.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).reshape(-1, 4 * c)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undo `patchify`: patches (rows · columns, 4·C) -> latents (C, 2·rows, 2·columns)."""
    rows, columns = grid
    c = patches.shape[-1] // 4
    return patches.view(rows, columns, 2, 2, c).permute(4, 0, 2, 1, 3).reshape(c, 2 * rows, 2 * columns)
