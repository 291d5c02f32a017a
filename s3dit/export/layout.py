"""The token layout of a graph: a batch of pictures of one size, with captions filled up to one length.

A graph has no lists of lengths: items, rows, columns and caption length are sizes of its inputs, and all that is here
is computed from them. Each item has the tokens, positions and modulation row that `model.layout.text_to_image` gives
it; of a caption, what is filled up beyond its own multiple of 32 is hidden from attention by a mask.

Streams are flat, and places in them come from whole-number arithmetic: a graph must never ask how sizes compare, or it
is one of these sizes only. Source: `model/layout.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.attention import Spans
from s3dit.model.layout import MULTIPLE, Layout, Pack

Length = TypeVar("Length", int, Tensor)


@dataclass(frozen=True, slots=True)
class Batch:
    """Items of N tokens each: stands in a graph where Spans stand elsewhere.

    items: how many · length: N · mask (items, 1, 1, N) bool: the keys that are attended to; None: all.
    """

    items: int
    length: int
    mask: Tensor | None = None


def batched_attention(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    """Compute the Op `attention` for spans that are a Batch: q, k, v (items · N, H, D) -> the same shape."""
    batch = cast(Batch, k_span)
    q, k, v = (x.unflatten(0, (batch.items, batch.length)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask)
    return out.transpose(1, 2).contiguous().flatten(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class BatchPack(Pack):
    """One stream of a Batch: source (N,) are the tokens that its places take, where is_token (N,) says that they do."""

    source: Tensor
    is_token: Tensor

    def fill(self, tokens: Tensor, rest: Tensor) -> Tensor:
        """Put tokens (n, D), as many of every item, at their places in a stream (N, D), `rest` (1, D) elsewhere."""
        # By index, because a graph must not ask whether there is anything to fill up.
        return torch.where(self.is_token[:, None], tokens[self.source], rest.to(tokens.dtype))


def filled(length: Length) -> Length:
    """Return `padded` of a number or of every number of a tensor, in the form that symbols of a graph are known in."""
    return (length + MULTIPLE - 1) // MULTIPLE * MULTIPLE


def rectangle(grid: Sequence[int], lengths: Tensor, longest: int) -> Layout:
    """Lay out a batch with captions of `lengths` (B,) int64 tokens, each at most `longest`.

    grid: B, and rows and columns of patches of every picture. Joint order image, caption, as in `text_to_image`. The
    numbers may be symbols of a graph.
    """
    items, rows, columns = grid
    count, own = rows * columns, filled(lengths)
    image_length, text_length = filled(count), filled(longest)
    length = image_length + text_length
    image_item, place = _places(items, image_length)
    cell = torch.stack((own[image_item] + 1, *_divided(place, columns)), -1)
    image = _pack(
        (items, image_length, None),
        cell * (place < count)[:, None],
        image_item * count + place.clamp(max=count - 1),
        place < count,
        count,
    )
    text_item, place = _places(items, text_length)
    heard = place < own[text_item]
    text = _pack(
        (items, text_length, heard),
        torch.stack((place + 1, torch.zeros_like(place), torch.zeros_like(place)), -1),
        text_item * longest + place.clamp(max=longest - 1),
        place < lengths[text_item],
        longest,
    )
    item, place = _places(items, length)
    pictured = place < image_length
    gather = torch.where(
        pictured, item * image_length + place, items * image_length + item * text_length + place - image_length
    )
    positions = torch.cat((image.positions, text.positions))[gather]
    joint = _pack((items, length, torch.cat((image_item >= 0, heard))[gather]), positions, gather, pictured, count)
    return Layout(image, text, joint, gather)


def _places(items: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the item and the place in it of every token of a stream (items · length,)."""
    return _divided(torch.arange(items * length), length)


def _divided(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return quotient and remainder of whole numbers by a size."""
    # By a tensor, because ONNX has no remainder by a size; of index - index // size * size inductor makes nothing.
    return index // size, index % torch.full_like(index, size)


def _pack(
    batch: tuple[int, int, Tensor | None], positions: Tensor, source: Tensor, is_token: Tensor, count: int
) -> BatchPack:
    """Make a pack: batch: items, their length, and which places are attended to, or None for all · count: its tokens.

    count: of each item, which come first in it; the rest is as in BatchPack.
    """
    items, length, attended = batch
    mask = None if attended is None else attended.unflatten(0, (items, 1, 1, length))
    item, place = _places(items, count)
    row = _places(items, length)[0]
    return BatchPack(cast(Spans, Batch(items, length, mask)), positions, row, item * length + place, source, is_token)
