"""Packed attention: float64 item by item, over ragged items, with separate spans for queries and keys.

1e-6 relative: fp32 scores and sums over at most a hundred keys.
"""

import pytest
import torch

from s3dit.kernels.attention import Spans, attention

LENGTHS = [((1,), (1,)), ((31,), (31,)), ((32, 32), (32, 32)), ((1, 33, 63), (1, 33, 63)), ((5, 7), (100, 31))]


@pytest.mark.parametrize("q_lengths, k_lengths", LENGTHS)
@pytest.mark.parametrize("dim", [32, 128])
def test_each_item_attends_to_itself(q_lengths, k_lengths, dim):
    q = torch.randn(sum(q_lengths), 3, dim)
    k, v = torch.randn(2, sum(k_lengths), 3, dim)
    spans = Spans.of(q_lengths), Spans.of(k_lengths)
    expected = []
    for qi, ki, vi in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True):
        weights = (torch.einsum("nhd,mhd->hnm", qi.double(), ki.double()) / dim**0.5).softmax(-1)
        expected.append(torch.einsum("hnm,mhd->nhd", weights, vi.double()))
    expected = torch.cat(expected)
    for form in (attention, attention.reference):
        got = form(q, k, v, *spans)
        assert ((got - expected).norm() / expected.norm()).item() < 1e-6


def test_spans():
    spans = Spans.of((32, 64))
    assert spans.lengths == (32, 64)
    assert spans.cu_seqlens.tolist() == [0, 32, 96]
    assert spans.cu_seqlens.dtype == torch.int32
