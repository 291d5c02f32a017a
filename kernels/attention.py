"""Attention over packed sequences: items of any length laid end to end, no padding, no mask.

Every item attends to itself only. Queries and keys have separate spans, so that a rank which owns a part of the
queries can attend to all keys. Heads are equal in number for q, k and v; there is no causality here (the text encoder
has its own, grouped, causal attention).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op


@dataclass(frozen=True, slots=True)
class Spans:
    """Where the items of a packed sequence stand: lengths on the host, their running sum (items + 1) on the device."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    # The running sum on the host too: what a compiled graph carries, because a tuple of numbers would be baked into it.
    on_host: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device | str = "cpu") -> "Spans":
        """Make the spans of items with these lengths, in tokens."""
        total = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(lengths, total.to(device), total)


@op
def attention(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    """softmax(q·kᵀ / sqrt(D))·v within each item, fp32 inside.

    q (N, H, D) · k, v (M, H, D) · spans whose lengths sum to N and M -> (N, H, D), dtype of q.
    """
    out = []
    for qi, ki, vi in _items(q, k, v, q_span, k_span):
        scores = torch.einsum("nhd,mhd->hnm", qi.float(), ki.float()) * q.shape[-1] ** -0.5
        out.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), vi.float()))
    return torch.cat(out).to(q.dtype)


def _items(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut the packed tensors into items."""
    lengths = q_span.lengths, k_span.lengths
    return zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    """torch's own attention: one call where all items have one length (a free view), else one call an item."""
    if len(set(q_span.lengths)) == 1 == len(set(k_span.lengths)):
        batch = len(q_span.lengths)
        q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    out = torch.empty_like(q)
    for oi, (qi, ki, vi) in zip(out.split(q_span.lengths), _items(q, k, v, q_span, k_span), strict=True):
        qi, ki, vi = (x.transpose(0, 1)[None] for x in (qi, ki, vi))  # (1, H, L, D)
        oi.copy_(F.scaled_dot_product_attention(qi, ki, vi)[0].transpose(0, 1))
    return out


for _device in ("cpu", "cuda", "mps"):
    attention.on(_device, "torch")(_sdpa)


@torch.library.custom_op("s3dit::attention", mutates_args=())
def _opaque(q: Tensor, k: Tensor, v: Tensor, q_cu: Tensor, q_host: Tensor, k_cu: Tensor, k_host: Tensor) -> Tensor:
    """The Op as one node of a compiled graph: who serves, and where items are cut, is decided when the graph runs."""
    spans = [Spans(tuple(host.diff().tolist()), cu, host) for cu, host in ((q_cu, q_host), (k_cu, k_host))]
    # What a graph is promised: rows that lie one after another.
    return attention(q, k, v, *spans).contiguous()


@_opaque.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_cu: Tensor, q_host: Tensor, k_cu: Tensor, k_host: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@attention.in_graphs
def _node(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    return _opaque(q, k, v, q_span.cu_seqlens, q_span.on_host, k_span.cu_seqlens, k_span.on_host)
