"""Builds the token layout of a request: where every token stands, what it reads, what is padding.

All modes of Z-Image differ only in where tokens stand, which modulation row they read and which are padding. A Layout
says this once; the transformer has no modes. Streams of several items are laid end to end, so a ragged batch (other
sizes, other prompts) is the ordinary case and no attention mask exists.

Facts kept from the official model: each stream of an item is filled up to a multiple of 32 with a learned pad token
that *is* attended to; caption tokens, pads included, stand at (1 … padded length, 0, 0); image tokens at
(padded caption length + 1, row, column); image pads at (0, 0, 0); the joint order is image, then caption.

Omni and Edit models are laid out by `edit_layout`.

Source: `patchify_and_embed` and `forward` of the official transformer and diffusers'.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s3dit.kernels.attention import Spans
from s3dit.model.layers import kept

# Tokens of a stream are filled up to a multiple of this (official SEQ_MULTI_OF).
MULTIPLE = 32

# Rows and columns: of 2 × 2 latent cells for pictures (pixels / 16), of patches for the vision tower's features.
Grid = tuple[int, int]


def padded(length: int) -> int:
    """Return the length of a stream with its padding: the next multiple of 32."""
    return -(-length // MULTIPLE) * MULTIPLE


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens: `length` real ones on a grid (frames, rows, columns) that starts at `origin`.

    A grid with more cells than `length` gives positions to the padding too (captions); padding beyond the grid
    stands at (0, 0, 0) (images). A segment without real tokens is one run of padding.

    clean: whether its tokens are no noisy ones, so that they read the modulation of t = 1 · stretch (rows, columns):
    the grid is spread over one of this size, positions rounded down.
    """

    length: int
    grid: tuple[int, int, int]
    origin: tuple[int, int, int]
    clean: bool = False
    stretch: Grid | None = None

    @property
    def padded(self) -> int:
        """Tokens of the segment with its padding; at least one multiple of 32."""
        return padded(max(self.length, 1))

    def positions(self) -> Tensor:
        """Return the positions (t, row, column) of all tokens, padding included: (padded, 3) int64."""
        axes = [torch.arange(start, start + size) for start, size in zip(self.origin, self.grid, strict=True)]
        for axis, extent in enumerate(self.stretch or (), 1):
            # parity: in float32 and in this order, because what is rounded down may lie just below a whole number.
            axes[axis] = (axes[axis].float() / max(self.grid[axis] - 1, 1) * (extent - 1)).long()
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
        return torch.cat((grid, grid.new_zeros(self.padded - len(grid), 3)))


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One stream of several items, laid end to end: N tokens in all.

    spans: the items that have tokens in it · positions (N, 3) int64, on the CPU · modulation_row (N,) int64, the row of
    the modulation table that each token reads: its item's, or for clean tokens the one after all items' · token_index
    (n,) int64, the places that tokens are put into from outside: of the image stream those that are denoised, of the
    others all but padding.
    """

    spans: Spans
    positions: Tensor
    modulation_row: Tensor
    token_index: Tensor

    @classmethod
    def of(cls, items: Sequence[Sequence[Segment]], slide: bool = False) -> "Pack":
        """Lay the segments of all items end to end, on the CPU; `slide` as in `_places`."""
        segments = [segment for item in items for segment in item]
        rows = [len(items) if s.clean else i for i, item in enumerate(items) for s in item]
        modulation_row = torch.repeat_interleave(torch.tensor(rows), torch.tensor([s.padded for s in segments]))
        token_index = torch.cat([torch.arange(s.padded) < s.length for s in segments]).nonzero()[:, 0]
        positions = torch.cat([_places(item, slide) for item in items])
        spans = Spans.of(tuple(length for item in items if (length := _length(item))))
        return cls(spans, positions, modulation_row, token_index)

    def to(self, device: torch.device | str) -> "Pack":
        """Return the same pack on a device."""
        spans = Spans.of(self.spans.lengths, device)
        return Pack(spans, self.positions, self.modulation_row.to(device), self.token_index.to(device))

    def fill(self, tokens: Tensor, rest: Tensor) -> Tensor:
        """Put tokens (n, D) at `token_index` of a stream (N, D), in their dtype; the other tokens are those of `rest`.

        rest: the pad token (1, D), or a whole stream (N, D).
        """
        if len(tokens) == len(self.positions):
            return tokens
        return (
            rest.to(tokens.dtype).repeat(len(self.positions) // len(rest), 1).index_copy_(0, self.token_index, tokens)
        )


def _length(segments: Sequence[Segment]) -> int:
    """Tokens of one item in one stream."""
    return sum(segment.padded for segment in segments)


def _places(segments: Sequence[Segment], slide: bool) -> Tensor:
    """Positions of one item's tokens in one stream: (length, 3).

    slide: as the released code has it, where the padding of a caption segment is counted twice, so that every later
    segment stands behind its positions; one segment alone is not concerned.
    """
    runs = [segment.positions() for segment in segments] or [torch.zeros(0, 3, dtype=torch.int64)]
    if slide:
        # parity: the released code appends (0, 0, 0) for padding that has positions already, and cuts off the end.
        runs = [torch.cat((run, run.new_zeros(len(run) - s.length, 3))) for run, s in zip(runs, segments, strict=True)]
    return torch.cat(runs)[: _length(segments)]


@dataclass(frozen=True, slots=True)
class Layout:
    """The tokens of a request: its streams, and the joint sequence in which the main blocks run.

    gather (N,) takes the concatenation of the image, text and vision packs into joint order; `joint.token_index` are
    the places, in joint order, of the image tokens that are denoised. Only where there are references: vision, the
    stream of their features, and clean (n,), the places in the image pack of their latents' patches.
    """

    image: Pack
    text: Pack
    joint: Pack
    gather: Tensor
    vision: Pack | None = None
    clean: Tensor | None = None


def text_to_image(grids: Sequence[Grid], text_lengths: Sequence[int], device: torch.device | str = "cpu") -> Layout:
    """Lay out B text-to-image items, joint order image, caption.

    grids: rows and columns of patches of each item's picture · text_lengths: real caption tokens of each item.
    """
    texts = [Segment(n, (padded(n), 1, 1), (1, 0, 0)) for n in text_lengths]
    images = [
        Segment(rows * columns, (1, rows, columns), (text.padded + 1, 0, 0))
        for (rows, columns), text in zip(grids, texts, strict=True)
    ]
    streams = (("image", tuple((image,) for image in images)), ("text", tuple((text,) for text in texts)))
    return interleave(streams, ("image", "text"), device)


# Requests of one size have one layout, and with guidance a second.
@kept(4)
def interleave(
    streams: tuple[tuple[str, tuple[tuple[Segment, ...], ...]], ...],
    order: tuple[str, ...],
    device: torch.device | str,
    slide: bool = False,
) -> Layout:
    """Join the streams item by item, in `order`: image of item 0, text of item 0, image of item 1, and so on.

    streams: by name, the segments of every item; a stream without any segment is left out.
    """
    packs = {name: Pack.of(items, slide and name == "text") for name, items in streams if any(items)}
    lengths = {name: [_length(item) for item in items] for name, items in streams if any(items)}
    gather = _joint_order(lengths, [name for name in order if name in packs])
    image, clean, items = packs["image"], None, dict(streams)["image"]
    if any(segment.clean for item in items for segment in item):
        image, clean = _separate_clean(image, len(items))
        clean = clean.to(device)
    is_target = torch.zeros(len(gather), dtype=torch.bool)
    is_target[image.token_index] = True
    joint = Pack(
        spans=Spans.of(tuple(sum(of_item) for of_item in zip(*lengths.values(), strict=True))),
        positions=torch.cat([pack.positions for pack in packs.values()])[gather],
        modulation_row=torch.cat([pack.modulation_row for pack in packs.values()])[gather],
        token_index=is_target[gather].nonzero()[:, 0],
    )
    vision = packs["vision"].to(device) if "vision" in packs else None
    return Layout(image.to(device), packs["text"].to(device), joint.to(device), gather.to(device), vision, clean)


def _joint_order(lengths: dict[str, list[int]], order: Sequence[str]) -> Tensor:
    """Indices (N,) that take the streams, one behind the other, into joint order: every item's runs in `order`.

    lengths: tokens of every item, by stream, in the order in which the streams are concatenated.
    """
    runs: dict[str, list[Tensor]] = {}
    start = 0
    for name, of_items in lengths.items():
        runs[name] = []
        for length in of_items:
            runs[name].append(torch.arange(start, start + length))
            start += length
    items = range(len(runs[order[0]]))
    return torch.cat([runs[name][item] for item in items for name in order])


def _separate_clean(image: Pack, count: int) -> tuple[Pack, Tensor]:
    """Take the clean tokens, which read modulation row `count`, out of the token_index of an image pack of count items.

    -> the pack, and the places of the clean tokens (n,) int64.
    """
    is_clean = image.modulation_row[image.token_index] == count
    return replace(image, token_index=image.token_index[~is_clean]), image.token_index[is_clean]


def patchify(latents: Tensor) -> Tensor:
    """Cut one item's latents (C, H, W) into patches (H/2 · W/2, 4·C), each (row, column, channel)."""
    c, h, w = latents.shape
    return latents.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).reshape(-1, 4 * c)


def unpatchify(patches: Tensor, grid: Grid) -> Tensor:
    """Undo `patchify`: patches (rows · columns, 4·C) -> latents (C, 2·rows, 2·columns)."""
    rows, columns = grid
    c = patches.shape[-1] // 4
    return patches.view(rows, columns, 2, 2, c).permute(4, 0, 2, 1, 3).reshape(c, 2 * rows, 2 * columns)
