"""A model call of which every rank computes some tokens: `SharedPasses`.

All but attention is done token by token, so a rank runs the transformer as it is on a call of its own, in which only
its tokens stand: a Context cut out of the whole one. Attention is between its queries and the keys of all ranks of its
group, whose spans differ (`SplitSpans`). Keys and values are computed first; while they travel, the queries are
computed, normed and rotated, which takes longer than the transfer on two GPUs and hides a fourth of it on eight (see
s3dit/PARALLEL.md). At the end the velocities are brought together, so every rank goes on with the whole state. Blocks
of ControlNets get the same spans, so they are split as well; number formats, adapters and streamed blocks are layers
and hooks inside a block, and know nothing of it.

Not here: who has which item and token (`placement`), the processes (`ranks`).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.errors import RequestError
from s3dit.kernels.attention import Spans, attention
from s3dit.kernels.dispatch import overridden
from s3dit.kernels.norm import qk_norm_rope
from s3dit.kernels.scheme import QuantizedRows
from s3dit.model.config import TransformerConfig
from s3dit.model.controlnet import Controls
from s3dit.model.layout import Pack
from s3dit.model.linear import joint
from s3dit.model.timestep import Modulation
from s3dit.model.transformer import QK_EPS, Attention, Context, Steering
from s3dit.parallel.placement import Form, groups_of, runs
from s3dit.parallel.ranks import Exchange, Ranks

# Layouts, and contexts, whose cut is kept: with and without guidance, of two sizes.
KEPT = 4


@dataclass(frozen=True, slots=True)
class SplitSpans(Spans):
    """The spans of this rank's queries; keys: those of all keys of its items · exchange: what brings these together."""

    keys: Spans
    exchange: Exchange


class SplitAttention(Attention):
    """Attention of this rank's queries to the keys of all, where its spans are SplitSpans."""

    def forward(self, x: Tensor | QuantizedRows, rope: Tensor, spans: Spans) -> Tensor:
        """Attend within each item: x (n, dim), this rank's tokens, or all of them with plain spans -> (n, dim)."""
        if not isinstance(spans, SplitSpans):
            return super().forward(x, rope, spans)
        k, v = (y.unflatten(-1, (self.heads, -1)) for y in joint(x, (self.to_k, self.to_v)))
        values = spans.exchange.start(v)
        keys = spans.exchange.start(self._rotated(k, self.norm_k.weight, rope))
        q = self._rotated(joint(x, (self.to_q,))[0].unflatten(-1, (self.heads, -1)), self.norm_q.weight, rope)
        return self.to_out[0](attention(q, keys(), values(), spans, spans.keys).flatten(1))

    @staticmethod
    def _rotated(heads: Tensor, weight: Tensor, rope: Tensor) -> Tensor:
        # The Op takes two tensors: here the second is one head of the first, a thirtieth of its work.
        return qk_norm_rope(heads, heads[:, :1], weight, weight, rope, QK_EPS)[0]


def prepare(model: nn.Module) -> None:
    """Let every attention of a transformer or a ControlNet take SplitSpans, in place."""
    for module in model.modules():
        if type(module) is Attention:
            module.__class__ = SplitAttention


@dataclass(frozen=True, slots=True)
class Places:
    """Which rank has which token of a call, by number: image (N_image,), joint (N,), patches (n,) that are denoised."""

    groups: int
    image: Tensor
    joint: Tensor
    patches: Tensor

    @classmethod
    def of(cls, form: Form, image: Pack, joint: Pack, gather: Tensor) -> "Places":
        """Lay out a call; arguments as the fields of a Context. All of it is on the CPU."""
        gather, groups = gather.cpu(), groups_of(form, joint.spans.lengths)
        of_image = _ranks(image.spans.lengths, form, groups)
        # What is no image token: caption and vision tokens, in joint order.
        other = gather >= len(of_image)
        of_joint = of_image[gather.clamp(max=len(of_image) - 1)]
        lengths = [int(part.sum()) for part in other.split(joint.spans.lengths)]
        of_joint[other] = _ranks(lengths, form, groups)
        return cls(groups, of_image, of_joint, of_image[image.token_index.cpu()])

    def sent(self, config: TransformerConfig, itemsize: int, size: int, image: int = 0, joint: int = 0) -> list[int]:
        """Bytes that each rank sends in a call: keys and values of blocks to its group, velocities to all ranks.

        itemsize: bytes of a number of the tokens · image, joint: blocks of ControlNets over either stream. Every rank
        of a group sends as many rows as the one that has most.
        """
        ranks = size // self.groups
        counts = [torch.bincount(of, minlength=size).view(-1, ranks) for of in (self.image, self.joint)]
        most = [count.amax(1).repeat_interleave(ranks) for count in counts]
        rows = (config.n_refiner_layers + image) * most[0] + (config.n_layers + joint) * most[1]
        velocities = torch.bincount(self.patches, minlength=size).max() * config.patch_dim * (size - 1)
        return ((2 * config.dim * (ranks - 1) * rows + velocities) * itemsize).tolist()


def _ranks(lengths: Sequence[int], form: Form, groups: int) -> Tensor:
    """The rank of every token of a stream whose items have these lengths."""
    ranks, counts = zip(*runs(lengths, form, groups), strict=True)
    return torch.repeat_interleave(torch.tensor(ranks), torch.tensor(counts))


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """What of a layout is this rank's: its packs, and the rows of whole tensors that it takes, on the device.

    items: its items, of all · image_rows, joint_rows, text_rows: of the streams, text being all but image · patches: of
    the denoised tokens · answer: brings all velocities together.
    """

    items: slice
    image: Pack
    joint: Pack
    gather: Tensor
    image_rows: Tensor
    joint_rows: Tensor
    text_rows: Tensor
    patches: Tensor
    answer: Exchange

    @classmethod
    def of(cls, ranks: Ranks, context: Context) -> "Cut":
        """Cut the layout of a context."""
        places = Places.of(ranks.form, context.image, context.joint, context.gather)
        of_group = ranks.size // places.groups
        group, each = ranks.rank // of_group, len(context.joint.spans.lengths) // places.groups
        items = slice(group * each, (group + 1) * each)
        image_rows, joint_rows = ((of == ranks.rank).nonzero()[:, 0] for of in (places.image, places.joint))
        gather = context.gather.cpu()[joint_rows]
        is_text = gather >= len(places.image)
        text_rows = gather[is_text] - len(places.image)
        # Where this rank's rows stand in its own streams, the image tokens first.
        where = torch.zeros(len(places.image), dtype=torch.int64)
        where[image_rows] = torch.arange(len(image_rows))
        local = where[gather.clamp(max=len(places.image) - 1)]
        local[is_text] = len(image_rows) + torch.arange(len(text_rows))
        patches = [(places.patches == rank).nonzero()[:, 0] for rank in range(ranks.size)]
        answer = Exchange.of(ranks, 1, [[len(rows)] for rows in patches])
        order = torch.cat(patches).argsort()
        given = torch.arange(len(order)) if answer.order is None else answer.order.cpu()
        device = context.gather.device
        return cls(
            items=items,
            image=_part(ranks, places.groups, context.image, places.image, items),
            joint=_part(ranks, places.groups, context.joint, places.joint, items),
            gather=local.to(device),
            image_rows=image_rows.to(device),
            joint_rows=joint_rows.to(device),
            text_rows=text_rows.to(device),
            patches=patches[ranks.rank].to(device),
            answer=replace(answer, order=given[order].to(device)),
        )


def _part(ranks: Ranks, groups: int, pack: Pack, owner: Tensor, items: slice) -> Pack:
    """This rank's tokens of a pack, of some of its items; owner (N,): the rank of each token."""
    lengths, device = pack.spans.lengths, pack.token_index.device
    first = ranks.rank // (ranks.size // groups) * (ranks.size // groups)
    of_items = owner.split(lengths)[items]
    counts = [[int((of == rank).sum()) for of in of_items] for rank in range(first, first + ranks.size // groups)]
    rows = (owner == ranks.rank).nonzero()[:, 0]
    denoised = torch.zeros(len(owner), dtype=torch.bool)
    denoised[pack.token_index.cpu()] = True
    row = pack.modulation_row.cpu()[rows]
    # The row of clean tokens stands behind those of the items, here as there.
    row = torch.where(row == len(lengths), len(of_items), row - items.start)
    own = Spans.of(tuple(counts[ranks.rank - first]), device)
    spans = own
    if ranks.size > groups:
        keys = Spans.of(lengths[items], device)
        exchange = Exchange.of(ranks, groups, counts)
        spans = SplitSpans(own.lengths, own.cu_seqlens, own.on_host, keys, exchange)
    return Pack(spans, pack.positions[rows], row.to(device), denoised[rows].nonzero()[:, 0].to(device))


class SharedPasses:
    """Calls a transformer for this rank's share of every call; called like it, and gives the whole answer."""

    def __init__(self, run: Callable[..., Tensor], ranks: Ranks) -> None:
        """run: as `Transformer.forward`, of a model that was made by `prepare`."""
        self._run, self._ranks = run, ranks
        # By identity, which is kept with them: layouts of one size are one object (`model.layout.interleave`).
        self._contexts: OrderedDict[int, tuple[Context, Cut, Context]] = OrderedDict()

    def __call__(
        self, x: Tensor, t: Tensor, context: Context, control: Steering | None = None,
        modulation: Modulation | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Transformer.forward`, of all patches x (n, patch_dim) -> (n, patch_dim)."""
        if overridden():
            raise RequestError(
                "operations are replaced (op.using) in a call that is shared among ranks, where each sees some tokens; "
                "needed whole calls; load the model without parallel"
            )
        with self._ranks.section():
            cut, own = self._cut(context)
            count = len(context.joint.spans.lengths)
            times = t if len(t) == 1 else t[cut.items]
            rows = None if modulation is None else _of_items(modulation, cut.items, count)
            steering = None if control is None else _steered(control, cut.patches, len(x))
            out = self._run(x[cut.patches], times, own, steering, rows)
            return cut.answer.start(out)()

    def _cut(self, context: Context) -> tuple[Cut, Context]:
        """This rank's part of a context, kept for the calls to come."""
        if id(context) not in self._contexts:
            cut = _cut_of(self._ranks, context)
            text = context.text[cut.text_rows]
            ropes = context.image_rope[cut.image_rows], context.joint_rope[cut.joint_rows]
            rest = context.rest if len(context.rest) == 1 else context.rest[cut.image_rows]
            own = Context(cut.image, cut.joint, cut.gather, text, *ropes, rest, context.clean)
            self._contexts[id(context)] = context, cut, own
            while len(self._contexts) > KEPT:
                self._contexts.popitem(last=False)
        _, cut, own = self._contexts[id(context)]
        return cut, own


def _cut_of(ranks: Ranks, context: Context) -> Cut:
    """The cut of a layout, kept by the ranks, so that calls of one size are recorded once (`graphs`)."""
    kept: OrderedDict[int, tuple[Tensor, Cut]] = ranks.cuts
    if id(context.gather) not in kept:
        kept[id(context.gather)] = context.gather, Cut.of(ranks, context)
        while len(kept) > KEPT:
            kept.popitem(last=False)
    return kept[id(context.gather)][1]


def _of_items(modulation: Modulation, items: slice, count: int) -> Modulation:
    """The rows of some of a call's `count` items, and of clean tokens behind them; the one row of all as it is."""
    if len(modulation.time) == 1:
        return modulation
    rows = torch.tensor([*range(count)[items], *range(count, len(modulation.time))], device=modulation.time.device)
    return replace(
        modulation, time=modulation.time[rows], tables=modulation.tables[:, :, rows], final=modulation.final[rows]
    )


def _steered(control: Steering, patches: Tensor, count: int) -> Steering:
    """The same ControlNets with control patches of this rank's tokens, of all `count` that are denoised."""
    if not isinstance(control, Controls):
        raise RequestError(f"a {type(control).__name__} steers a call that is shared among ranks; needed ControlNets")
    nets: list[Any] = []
    for net in control.nets:
        # As in `ControlNet.refine`.
        whole = net.patches[:count] if len(net.patches) > count else net.patches.repeat(count // len(net.patches), 1)
        nets.append(replace(net, patches=whole[patches]))
    return Controls(tuple(nets))
