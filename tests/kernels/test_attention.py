"""Packed attention: float64 item by item, over ragged items, with separate spans for queries and keys.

1e-6 relative: fp32 scores and sums over at most a hundred keys.
"""

import pytest
import torch

from s3dit.errors import BackendError
from s3dit.kernels import attention as room
from s3dit.kernels import flash_attention
from s3dit.kernels.attention import Spans, attention, attention_lse
from s3dit.kernels.dispatch import set_backend
from s3dit.kernels.tune import config_in_force, trying

LENGTHS = [((1,), (1,)), ((31,), (31,)), ((32, 32), (32, 32)), ((1, 33, 63), (1, 33, 63)), ((5, 7), (100, 31))]
EMPTY = [((0, 7), (3, 5)), ((4, 7, 2), (3, 0, 5)), ((0,), (0,))]


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def packed(q_lengths, k_lengths, dim, dtype=torch.float32, device="cpu", heads=3):
    """q, and k and v as views of one tensor, with their spans."""
    q = torch.randn(sum(q_lengths), heads, dim, device=device).to(dtype)
    k, v = torch.randn(sum(k_lengths), 2, heads, dim, device=device).to(dtype).unbind(1)
    return q, k, v, Spans.of(q_lengths, device), Spans.of(k_lengths, device)


def exact(q, k, v, q_span, k_span):
    """Output and log-sum-exp in float64; of no keys, zeros and minus infinity."""
    out, lse = [], []
    for qi, ki, vi in zip(q.split(q_span.lengths), k.split(k_span.lengths), v.split(k_span.lengths), strict=True):
        scores = torch.einsum("nhd,mhd->nhm", qi.double(), ki.double()) / q.shape[-1] ** 0.5
        lse.append(scores.logsumexp(-1))
        out.append(torch.einsum("nhm,mhd->nhd", scores.softmax(-1), vi.double()))
    return torch.cat(out), torch.cat(lse)


@pytest.mark.parametrize("q_lengths, k_lengths", LENGTHS)
@pytest.mark.parametrize("dim", [32, 128])
def test_each_item_attends_to_itself(q_lengths, k_lengths, dim):
    args = packed(q_lengths, k_lengths, dim)
    expected, lse = exact(*args)
    for form in (attention, attention.reference):
        assert relative(form(*args), expected) < 1e-6
    out, got = attention_lse.reference(*args)
    assert relative(out, expected) < 1e-6 and relative(got, lse) < 1e-6


# fp32: as above. fp16: weights of 11 bits, and an output of 11 bits; bf16: of 8 bits.
CLOSE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("q_lengths, k_lengths", [*LENGTHS, *EMPTY])
@pytest.mark.parametrize("dim, described", [(32, True), (96, False), (128, True), (128, False)])
@pytest.mark.sampled(8)
def test_flash_kernel(q_lengths, k_lengths, dim, described, dtype, device, kernel_of, poison, monkeypatch):
    if not described:
        monkeypatch.setattr(flash_attention, "describable", lambda *tensors: False)
    args = packed(q_lengths, k_lengths, dim, dtype, device)
    expected, lse = exact(*args)
    got = kernel_of(attention)(*args)
    assert got.dtype == dtype and got.shape == args[0].shape and relative(got, expected) < CLOSE[dtype]
    out, rows = kernel_of(attention_lse)(*args)
    assert torch.equal(out, got) and rows.shape == lse.shape
    # absolute, for it passes through 0: scores of a few units, fp32 sums
    assert torch.equal(rows.isneginf(), lse.isneginf())
    finite = ~lse.isneginf()
    assert ((rows.double() - lse)[finite].abs() < 1e-5).all()


@pytest.mark.parametrize("lengths", [((64, 64), (64, 64)), ((96,), (130,)), ((5, 70), (33, 70))])
def test_every_log_sum_exp_on_a_device(lengths, device):
    """Whatever a device has beside the kernel: cuDNN's, of equal lengths."""
    args = packed(*lengths, 128, torch.float16, device)
    expected, lse = exact(*args)
    ways = [each for each in attention_lse.implementations if not each.why_not(device.type, args)]
    for way in (*ways, attention_lse.reference):
        out, rows = getattr(way, "function", way)(*args)
        assert rows.dtype == torch.float32 and relative(out, expected) < 1e-3
        assert ((rows.double() - lse).abs() < 1e-5).all()


@pytest.mark.parametrize("config", [(16, 64), (64, 16), (128, 64)])
def test_flash_kernel_in_other_tiles(config, device, kernel_of, poison):
    args = packed((33, 70), (100, 31), 64, torch.float16, device, heads=1)
    tiles = {"BLOCK_M": config[0], "BLOCK_N": config[1], "num_warps": 4, "num_stages": 2}
    with trying("attention", tiles):
        assert config_in_force("attention", "d64 short", device) == tiles
        assert relative(kernel_of(attention)(*args), exact(*args)[0]) < 1e-3
    assert config_in_force("attention", "d64 short", device) != tiles


@pytest.mark.parametrize("described", [False, True])
def test_nan_stays_in_its_item(described, device, kernel_of, monkeypatch):
    """Tiles copied by descriptor hold rows of the next item too."""
    if not described:
        monkeypatch.setattr(flash_attention, "describable", lambda *tensors: False)
    for name in "kv":
        q, k, v, *spans = packed((5, 6, 7), (5, 6, 7), 32, torch.float16, device)
        (k if name == "k" else v)[7, 1, 7] = float("nan")
        bad = kernel_of(attention)(q, k, v, *spans).isnan().any(-1)
        assert bad[5:11, 1].all() and not bad[:, [0, 2]].any() and not bad[:5].any() and not bad[11:].any()


def test_what_the_kernel_refuses(device, kernel_of):
    args = packed((5,), (5,), 32, torch.float16, device)
    with pytest.raises(ValueError, match="the spans say"):
        kernel_of(attention)(*args[:3], Spans.of((6,), device), args[4])
    set_backend("triton")
    try:
        for dim in (24, 144):
            with pytest.raises(BackendError, match=f"multiples of 16 up to 128, found {dim}"):
                attention(*packed((5,), (5,), dim, torch.float16, device))
        with pytest.raises(BackendError, match="one dtype"):
            attention(args[0].float(), *args[1:])
        with pytest.raises(BackendError, match="found torch.float64"):
            attention(*packed((5,), (5,), 32, torch.float64, device))
    finally:
        set_backend("auto")


def test_an_item_without_keys_gives_zeros():
    args = packed((4, 7), (0, 5), 32)
    assert not attention(*args)[:4].any()
    assert attention(*args)[4:].isfinite().all()


@pytest.mark.parametrize("q_lengths, k_lengths", [*LENGTHS, ((0, 7), (3, 5))])
def test_head_by_head_on_one_core(q_lengths, k_lengths, monkeypatch, poison):
    monkeypatch.setattr(room, "SCORE_CHUNK", 100)
    args = packed(q_lengths, k_lengths, 32, torch.bfloat16)
    # weights and values of 8 bits, as in torch's own
    assert relative(room._by_heads(*args), exact(*args)[0]) < 5e-3


@pytest.mark.parametrize("q_lengths, k_lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_log_sum_exp_of_torchs_own_kernel_on_a_cpu(q_lengths, k_lengths, dtype, poison):
    args = packed(q_lengths, k_lengths, 128, dtype)
    assert attention_lse.choose(*args) is room._native_lse
    out, rows = attention_lse(*args)
    expected, lse = exact(*args)
    assert out.dtype == dtype and rows.dtype == torch.float32 and rows.shape == lse.shape
    assert relative(out, expected) < CLOSE.get(dtype, 1e-6) and (rows.double() - lse).abs().max() < 1e-5


def test_what_torchs_own_kernel_on_a_cpu_would_get_wrong():
    """Empty items stop the process, and numbers that do not lie side by side are misread: the reference takes them."""
    q, k, v, *spans = packed((4, 7), (5, 6), 32)
    scattered = q.mT.contiguous().mT
    for args, why in (
        (packed((0, 7), (3, 5), 32), "empty"),
        (packed((4, 7), (0, 5), 32), "empty"),
        ((scattered, k, v, *spans), "side by side"),
        ((q.requires_grad_(), k, v, *spans), "gradient"),
        ((q.detach().double(), k, v, *spans), "one dtype"),
        ((q.detach(), k, v[..., :16], *spans), "one head size"),
    ):
        assert attention_lse.choose(*args) is attention_lse.reference
        assert any(why in line[2] for line in attention_lse.explain(*args))
        out, rows = attention_lse(*args)
        expected, lse = exact(*args)
        assert relative(out, expected) < 1e-6
        assert torch.allclose(rows.double(), lse, atol=1e-5)


def fake(x, device):
    """Arguments that only say where they are."""
    return type("Fake", (), {"device": torch.device(device), "dtype": x.dtype, "shape": x.shape})()


@pytest.mark.parametrize(
    "capability, dtype, lengths, name",
    [
        ((9, 0), torch.bfloat16, (64, 64), "cudnn"),
        ((9, 0), torch.bfloat16, (64, 32), "flash"),
        ((9, 0), torch.float32, (64, 64), "sdpa"),
        ((9, 0), torch.float32, (64, 32), "sdpa"),
        ((8, 0), torch.bfloat16, (64, 64), "sdpa"),
        ((8, 0), torch.bfloat16, (64, 32), "varlen"),
        ((8, 0), torch.bfloat16, (64, 0), "flash"),
        ((7, 5), torch.float16, (64, 32), "sdpa"),
    ],
)
def test_the_implementation_on_a_gpu(capability, dtype, lengths, name, monkeypatch):
    monkeypatch.setattr(room, "capability", lambda device: capability)
    monkeypatch.setattr("s3dit.kernels.dispatch.capability", lambda device: capability)
    q = fake(torch.empty(sum(lengths), 3, 128, dtype=dtype), "cuda")
    spans = Spans.of(lengths)
    lines = attention.explain(q, q, q, spans, spans)
    assert [line[0] for line in lines if line[2] == "chosen"] == [name], lines


def test_one_node_of_a_graph():
    args = packed((5, 7), (5, 7), 32)
    graph = torch.compile(lambda q, k, v, a, b: attention(q + 0, k, v, a, b), fullgraph=True, backend="eager")
    assert torch.equal(graph(*args), attention(*args))


def test_spans():
    spans = Spans.of((32, 64))
    assert spans.lengths == (32, 64)
    assert spans.cu_seqlens.tolist() == [0, 32, 96]
    assert spans.cu_seqlens.dtype == torch.int32
