"""Ready-made edits for `observe.edit`: each makes a function of (rows of an item, where) that gives other rows.

    with edit(pipe, {"layers.5.attention.heads": zero(heads=[2])}): …
    with edit(pipe, {"layers.8.output": patch(record)}, tokens="image"): …     # from another run
    with skipped(pipe, [3, 4]): …

`where` is an `instrument.Item`. Rows are the item's, or those of the chosen tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.loaded_model import LoadedModel
from s3dit.model.transformer import Transformer
from s3dit.research.instrument import Item
from s3dit.research.observe import Edit, edit
from s3dit.research.record import Record
from s3dit.research.tokens import ItemTokens


def _at(rows: Tensor, where: Item, heads: Sequence[int] | None, channels: Sequence[int] | None) -> Tensor:
    """A mask (…) over one row's numbers: those of some heads (of sites with heads) or channels, or all."""
    shape = rows.shape[1:]
    mask = torch.ones(shape, dtype=torch.bool, device=rows.device)
    for name, chosen, axis in (("heads", heads, 0), ("channels", channels, -1)):
        if chosen is None:
            continue
        if name == "heads" and len(shape) < 2:
            raise RequestError(f"{where.site.name} has no heads; needed attention.q_rope, .k_rope or .heads")
        wrong = [i for i in chosen if not 0 <= i < shape[axis]]
        if wrong:
            raise RequestError(f"{name} {wrong} of {where.site.name}; needed 0 to {shape[axis] - 1}")
        along = torch.zeros(shape[axis], dtype=torch.bool, device=rows.device)
        along[list(chosen)] = True
        mask &= along.view([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    return mask


def zero(*, heads: Sequence[int] | None = None, channels: Sequence[int] | None = None) -> Edit:
    """Put zeros in place of everything, or of some heads or channels."""
    return lambda rows, where: rows.masked_fill(_at(rows, where, heads, channels), 0)


def mean(*, heads: Sequence[int] | None = None, channels: Sequence[int] | None = None) -> Edit:
    """Put the mean over the rows in place of each: what does not depend on the token stays."""

    def change(rows: Tensor, where: Item) -> Tensor:
        average = rows.float().mean(0, keepdim=True).to(rows.dtype).expand_as(rows)
        return torch.where(_at(rows, where, heads, channels), average, rows)

    return change


def resample(seed: int, *, heads: Sequence[int] | None = None, channels: Sequence[int] | None = None) -> Edit:
    """Put the numbers of another row, drawn without replacement by a seed, in place of each row's."""

    def change(rows: Tensor, where: Item) -> Tensor:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)
        return torch.where(_at(rows, where, heads, channels), rows[order], rows)

    return change


def scale(factor: float, *, heads: Sequence[int] | None = None, channels: Sequence[int] | None = None) -> Edit:
    """Multiply by a factor."""
    return lambda rows, where: torch.where(_at(rows, where, heads, channels), rows * factor, rows)


def steer(vector: Tensor, strength: float = 1.0) -> Edit:
    """Add strength · vector to every row; the vector has the shape of a row."""

    def change(rows: Tensor, where: Item) -> Tensor:
        if vector.shape != rows.shape[1:]:
            raise RequestError(
                f"a vector {tuple(vector.shape)} for {where.site.name}, whose rows are {tuple(rows.shape[1:])}; needed "
                "one of a row's shape"
            )
        return (rows.float() + strength * vector.to(rows.device, torch.float32)).to(rows.dtype)

    return change


@dataclass(frozen=True, slots=True)
class _Patch:
    """The edit of `patch`; choice: fields of the record's keys that are taken in place of the run's."""

    record: Record
    choice: dict[str, Any]

    @property
    def model(self) -> str:
        """The fingerprint of the only model that it fits; `edit` compares it."""
        return self.record.model

    def __call__(self, rows: Tensor, where: Item) -> Tensor:
        key: dict[str, Any] = {"step": where.step, "item": where.item, "branch": where.branch, "call": where.call}
        key |= self.choice
        return self.record.at(where.site.name, **key).to(rows.device, rows.dtype)


def patch(record: Record, *, item: int | None = None, branch: str | None = None, step: int | None = None) -> Edit:
    """Put what another run had at the same site, step, call, item and branch; those given here are taken instead.

    The record is one of `observe` over the same tokens, without `reduce`. Where it has no such tensor, or one of
    another shape, the run stops with a RequestError. So does `edit` where the record is of another model; to patch from
    one all the same, set its `model` to "".
    """
    choice = {"item": item, "branch": branch, "step": step}
    return _Patch(record, {name: value for name, value in choice.items() if value is not None})


@contextmanager
def without_words(
    pipe: LoadedModel, words: str | Sequence[str], *, steps: Sequence[int] | None = None, **choice: Any
) -> Iterator[None]:
    """Let words of the prompt be padding from the first main block on, in some steps or all: as if they were not there.

    Their tokens become the mean of the item's text padding, or zeros where it has none. steps, items, branch: as in
    `edit`. Items whose prompt lacks a word stay; raises RequestError for a word that none has.
    """
    words, met = [words] if isinstance(words, str) else list(words), dict[str, ItemTokens | None]()

    def change(rows: Tensor, where: Item) -> Tensor:
        item = where.tokens
        assert item is not None
        padding, out = item.find("text padding"), rows.clone()
        filler = rows[padding].float().mean(0).to(rows.dtype) if padding else torch.zeros_like(rows[0])
        for word in words:
            if item.has(word):
                out[item.find(word)], met[word] = filler, None
            else:
                met.setdefault(word, item)
        return out

    with edit(pipe, {"layers.0.input": change}, steps=steps, **choice):
        yield
    for word, lacking in met.items():
        if lacking is not None:
            lacking.find(word)


@contextmanager
def skipped(
    pipe: LoadedModel, layers: Sequence[int], *, steps: Sequence[int] | None = None, **choice: Any
) -> Iterator[None]:
    """Let main blocks add nothing to the residual, in some steps or all, as if they were not there."""
    changes = {f"layers.{i}.{site}": zero() for i in layers for site in ("attention.added", "ffn.added")}
    with edit(pipe, changes, steps=steps, **choice):
        yield


@contextmanager
def rearranged(pipe: LoadedModel, order: Sequence[int]) -> Iterator[None]:
    """Run the main blocks in another order: some of them later, several times, or not at all.

    order: indices of blocks in the order in which they are to run. Sites keep the names that blocks have when they are
    looked up, so observe outside of this. Raises RequestError for indices that are none, and for streamed blocks, which
    come into memory in their own order.
    """
    component = pipe.parts.component("transformer")
    model = component.module
    assert isinstance(model, Transformer)
    own = dict(model.layers._modules)
    if not order or not all(0 <= i < len(own) for i in order):
        raise RequestError(f"order is {list(order)}; needed indices from 0 to {len(own) - 1}")
    if component.streamer is not None:
        raise RequestError("blocks of this model are streamed, in their own order; load it without vram and streaming")
    with pipe.parts.lock:
        model.layers._modules = {str(i): own[str(which)] for i, which in enumerate(order)}
    try:
        yield
    finally:
        with pipe.parts.lock:
            model.layers._modules = own
