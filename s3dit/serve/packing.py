"""Joins the model calls of several requests into one, and cuts the answer apart again.

A call packs its items end to end, each with its own time, so calls of other requests are but more items: image streams,
joint streams, captions and rotary tables are laid one behind the other, and what points into them moves along.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.attention import Spans
from s3dit.model.layout import Pack
from s3dit.model.timestep import Modulation
from s3dit.model.transformer import Context


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of a pass without what adds to its streams; as of `Transformer.forward`."""

    x: Tensor
    t: Tensor
    context: Context
    modulation: Modulation

    @property
    def items(self) -> int:
        """Pictures of the pass, with guidance twice as many."""
        return len(self.context.joint.spans.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return len(self.context.gather)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be equal between calls of one pass."""
        modulation = self.modulation
        return self.x.dtype, self.context.text.dtype, self.t.ndim, modulation.alone, modulation.tables.shape[0]


def join(calls: Sequence[Call], context: Context | None = None) -> Call:
    """One call for several of one kind; its answer is theirs end to end.

    context: of the same requests, from an earlier call.
    """
    if len(calls) == 1:
        return calls[0]
    items = [call.items for call in calls]
    t = torch.cat([call.t.expand(n, *call.t.shape[1:]) for call, n in zip(calls, items, strict=True)])
    context = context or _context([call.context for call in calls], items)
    return Call(torch.cat([call.x for call in calls]), t, context, _modulation(calls, context.clean is not None))


def _context(contexts: Sequence[Context], items: Sequence[int]) -> Context:
    """The context of all items; contexts without clean tokens may stand beside those with some."""
    images = [len(context.image.positions) for context in contexts]
    rests = [context.rest for context in contexts]
    if any(len(rest) > 1 for rest in rests):
        pairs = zip(contexts, rests, images, strict=True)
        rests = [rest.to(context.text.dtype).expand(n, -1) for context, rest, n in pairs]
    else:
        # The one pad token of the model.
        rests = rests[:1]
    return Context(
        image=_pack([context.image for context in contexts], items),
        joint=_pack([context.joint for context in contexts], items),
        gather=torch.cat([*_gathers(contexts, images)]),
        text=torch.cat([context.text for context in contexts]),
        image_rope=torch.cat([context.image_rope for context in contexts]),
        joint_rope=torch.cat([context.joint_rope for context in contexts]),
        rest=torch.cat(rests),
        clean=next((context.clean for context in contexts if context.clean is not None), None),
    )


def _pack(packs: Sequence[Pack], items: Sequence[int]) -> Pack:
    """The stream of all items; a clean token reads the row after those of all items."""
    total, rows, places = sum(items), [], []
    firsts = zip(packs, items, _starts(items), _starts([len(pack.positions) for pack in packs]), strict=True)
    for pack, n, item, token in firsts:
        row = pack.modulation_row
        rows.append(torch.where(row == n, total, row + item))
        places.append(pack.token_index + token)
    spans = Spans.of(tuple(length for pack in packs for length in pack.spans.lengths), packs[0].token_index.device)
    return Pack(spans, torch.cat([pack.positions for pack in packs]), torch.cat(rows), torch.cat(places))


def _gathers(contexts: Sequence[Context], images: Sequence[int]) -> Iterator[Tensor]:
    """Where the joint tokens of each context lie in all image streams followed by all texts."""
    texts = [len(context.text) for context in contexts]
    for context, own, image, text in zip(contexts, images, _starts(images), _starts(texts), strict=True):
        gather = context.gather
        yield torch.where(gather < own, gather + image, gather - own + sum(images) + text)


def _modulation(calls: Sequence[Call], clean: bool) -> Modulation:
    """The rows of all items, as the calls computed them, then that of clean tokens if there are any."""
    rows, last = [], None
    for call in calls:
        given, n = call.modulation, call.items
        if call.context.clean is not None:
            last = _rows(given, slice(n, n + 1))
        rows.append(_rows(given, slice(n), n))
    parts = rows if not clean or last is None else [*rows, last]
    times, tables, finals = zip(*parts, strict=True)
    return Modulation(torch.cat(times), torch.cat(tables, 2), torch.cat(finals), calls[0].modulation.alone)


def _rows(given: Modulation, which: slice, repeat: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of a modulation; one row that serves all items is repeated for each."""
    time, tables, final = given.time[which], given.tables[:, :, which], given.final[which]
    if len(time) == 1 and repeat > 1:
        return time.expand(repeat, -1), tables.expand(-1, -1, repeat, -1), final.expand(repeat, -1)
    return time, tables, final


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each of some runs begins that are laid end to end."""
    return [0, *accumulate(lengths)][:-1]
