"""Attention over packed sequences: items of any length laid end to end, without padding or mask.

Every item attends to itself only. Queries and keys have separate spans, so that a rank which owns a part of the
queries can attend to all keys. q, k and v have the same number of heads, and attention is not causal (the text encoder
has its own, grouped, causal attention). An item without queries gives no rows; queries without a key give zeros, with
a log-sum-exp of minus infinity, which is what merging partial results by it needs.

Two Ops: `attention`, and `attention_lse`, which also gives the log-sum-exp of each row of scores, from which maps are
made. The Triton kernel that serves them is in `flash_attention`.

There is no form with scores of int8. On a Hopper a step of 128 queries and 128 keys takes some 3,140 cycles in cuDNN's
bf16 (600 TFLOP/s, published). In Triton it would take 1,540 in tensor cores and some 1,830 of instructions (2,330 were
counted in a compiled kernel with a scale a key, of which scales of whole blocks would save 500), which hardly overlap,
and keys are smoothed in passes of their own: an estimate of 3,600, for an error of 9e-3.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from s3dit.kernels.dispatch import capability, op, why_unsupported
from s3dit.kernels.flash_attention import flash_attention

HALF_DTYPES = (torch.bfloat16, torch.float16)
# FlashAttention-3's equal on Hopper, some 1.7 times the kernel that torch takes by itself.
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Scores that the CPU holds at a time: 4 MiB in fp32.
SCORE_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Spans:
    """The places of the items in a packed sequence.

    lengths: in tokens, on the host · cu_seqlens (items + 1,) int32: their running sum from 0, on the device · on_host:
    the same on the CPU.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    # The running sum on the host too: what a compiled graph carries, because a tuple of numbers would be baked into it.
    on_host: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device | str = "cpu") -> "Spans":
        """Make the spans of items with these lengths, in tokens, with the running sum on `device`."""
        total = torch.tensor((0, *lengths), dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        return cls(lengths, total.to(device), total)


@op
def attention(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    """Compute softmax(q·kᵀ / sqrt(D))·v within each item, in fp32.

    q (N, H, D) · k, v (M, H, D), any float dtype · spans whose lengths sum to N and M -> (N, H, D), dtype of q. Raises
    ValueError (of the Triton kernel) where the spans are not those of the tensors.
    """
    out = []
    for qi, ki, vi in _items(q, k, v, q_span, k_span):
        scores = torch.einsum("nhd,mhd->hnm", qi.float(), ki.float()) * q.shape[-1] ** -0.5
        out.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), vi.float()))
    return torch.cat(out).to(q.dtype)


@op
def attention_lse(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> tuple[Tensor, Tensor]:
    """Compute `attention`, and the log-sum-exp of the scores of each query and head.

    Arguments as there -> out (N, H, D), dtype of q, and log(sum(exp(scores))) (N, H) fp32; exp(score - it) is a weight.
    """
    rows = [
        (torch.einsum("nhd,mhd->nhm", qi.float(), ki.float()) * q.shape[-1] ** -0.5).logsumexp(-1)
        for qi, ki, _ in _items(q, k, v, q_span, k_span)
    ]
    return attention.reference(q, k, v, q_span, k_span), torch.cat(rows)


def _items(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Split the packed tensors into items."""
    lengths = q_span.lengths, k_span.lengths
    return zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)


def _equal_lengths(q: Any, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> bool | str:
    """Return whether all items have the same length, so that the packed tensor is a batch."""
    equal = len(set(q_span.lengths)) == 1 == len(set(k_span.lengths))
    return equal or "items differ in length"


def _has_keys(q: Any, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> bool | str:
    """Return whether every item has keys: torch does not define attention to none."""
    return 0 not in k_span.lengths or "an item has no keys"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    """Run torch's own attention: a single call where all items have the same length (a view), else a call an item."""
    if _equal_lengths(q, k, v, q_span, k_span) is True:
        batch = len(q_span.lengths)
        q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    out = []
    for item in _items(q, k, v, q_span, k_span):
        qi, ki, vi = (x.transpose(0, 1)[None] for x in item)  # (1, H, L, D)
        out.append(F.scaled_dot_product_attention(qi, ki, vi)[0].transpose(0, 1))
    return torch.cat(out)


def _single_core(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> bool | str:
    """Return whether `_by_heads` was measured to be faster: bf16, one thread, AVX512-BF16 but no matrix tiles (AMX)."""
    if q.dtype != torch.bfloat16 or torch.get_num_threads() > 1:
        return "takes bf16 on one thread"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "gives no gradient"
    cpu = torch.cpu
    return (cpu._is_avx512_bf16_supported() and not cpu._is_amx_tile_supported()) or "needs AVX512-BF16 without AMX"


def _by_heads(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    """Compute a head at a time: scores by fp32 products, then weights times values in bf16, as torch's own does it.

    Against torch's own, on one (shared) core of a Zen 5, 30 heads of 128: 1.2, 1.3 and 1.4 times its speed at 288,
    1,088 and 2,112 tokens, error 2.3e-3 against its 2.2e-3. Scores by bf16 products would be 2.6 times as fast, but
    have an error of 1e-2 where scores are three times as large.
    """
    out = torch.empty_like(q)
    for oi, (qi, ki, vi) in zip(out.split(q_span.lengths), _items(q, k, v, q_span, k_span), strict=True):
        rows = max(1, SCORE_CHUNK // len(ki))
        for head in range(q.shape[1]):
            keys, values = ki[:, head].float().t().contiguous(), vi[:, head].contiguous()
            queries = qi[:, head].float() * q.shape[-1] ** -0.5
            for start in range(0, len(qi), rows):
                weights = (queries[start : start + rows] @ keys).softmax(-1)
                oi[start : start + rows, head] = weights.to(v.dtype) @ values
    return out


def _cudnn(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    """Run torch's own attention of a batch with cuDNN's kernel first."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return _sdpa(q, k, v, q_span, k_span)


def _cudnn_lse(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> tuple[Tensor, Tensor]:
    """Run cuDNN's attention of a batch, which gives the log-sum-exp for a gradient."""
    batch = len(q_span.lengths)
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)[:2]
    return out.transpose(1, 2).flatten(0, 1), lse.reshape(q.shape[:-1]).transpose(1, 2).flatten(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    """Run torch's FlashAttention over packed items."""
    longest = max(q_span.lengths), max(k_span.lengths)
    # Imports torch's compiler, which takes a second: only where this implementation runs.
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, q_span.cu_seqlens, k_span.cu_seqlens, *longest)
    assert isinstance(out, Tensor)
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    _check_spans(q, k, q_span, k_span)
    return flash_attention(q, k, v, q_span.cu_seqlens, k_span.cu_seqlens, max(q_span.lengths), False)[0]


def _native_lse_takes(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> bool | str:
    """Return True, or why torch's kernel for CPUs cannot take these arguments: it checks few of them itself."""
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v of one dtype, found {q.dtype}, {k.dtype} and {v.dtype}"
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return "takes one head size"
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return "takes rows whose numbers lie side by side"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "gives no gradient of the log-sum-exp"
    return (0 not in (*q_span.lengths, *k_span.lengths) and len(q_span.lengths) > 0) or "an item is empty"


def _native_lse(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> tuple[Tensor, Tensor]:
    """Run the kernel behind torch's own attention on a CPU, which gives the log-sum-exp too, an item at a time.

    In fp32 at least, which took a tenth less time than bf16 on one core of a Zen 4: in 16 bits the log-sum-exp has an
    error of 3e-5.
    """
    kernel, wide = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.promote_types(q.dtype, torch.float)
    items = [
        kernel(*(x.to(wide).transpose(0, 1)[None] for x in item)) for item in _items(q, k, v, q_span, k_span)
    ]  # (1, H, N, D), (1, H, N)
    out, lse = (torch.cat([part[0].transpose(0, 1) for part in parts]) for parts in zip(*items, strict=True))
    return out.to(q.dtype), lse.float()


def _flash_lse(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> tuple[Tensor, Tensor]:
    _check_spans(q, k, q_span, k_span)
    return flash_attention(q, k, v, q_span.cu_seqlens, k_span.cu_seqlens, max(q_span.lengths), True)


def _check_spans(q: Tensor, k: Tensor, q_span: Spans, k_span: Spans) -> None:
    """Raise ValueError where the spans are not those of the tensors: a kernel would read past their end."""
    actual = (q.shape[0], k.shape[0], len(k_span.lengths))
    needed = (sum(q_span.lengths), sum(k_span.lengths), len(q_span.lengths))
    if actual != needed:
        raise ValueError(
            f"queries, keys and items are {actual}, the spans say {needed}; give the spans of these tensors"
        )


def _flash_supported(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> bool | str:
    """Return True, or why the flash kernel cannot take these arguments."""
    if q.shape[-1] % 16 or q.shape[-1] > 128:
        return f"head sizes are multiples of 16 up to 128, found {q.shape[-1]}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v of one dtype, found {q.dtype}, {k.dtype} and {v.dtype}"
    return why_unsupported(k, HALF_DTYPES) or True


def _hopper(q: Tensor, *rest: Any) -> bool | str:
    return capability(q.device) >= (9, 0) or "not the fastest before Hopper"


def _takes_half(q: Tensor, *rest: Any) -> bool | str:
    return (
        q.dtype in HALF_DTYPES and capability(q.device) >= (8, 0)
    ) or "takes bf16 or fp16 on a GPU of capability 8.0"


def _first_refusal(*conditions: Any) -> Any:
    """Return a condition that holds where all of these do, and otherwise gives the reason of the first that fails."""

    def when(*args: Any) -> bool | str:
        return next((answer for answer in (condition(*args) for condition in conditions) if answer is not True), True)

    return when


# On an H200, 4,224 tokens of 30 heads of 128: cuDNN 638 TFLOP/s, our kernel 382, torch's own choice and its
# FlashAttention-2 of ragged items 338 to 339 (tools/results/h200). Before Hopper nothing was measured.
attention.on("cuda", "torch", when=_first_refusal(_equal_lengths, _has_keys, _hopper, _takes_half))(_cudnn)
attention.on("cuda", "torch", when=_first_refusal(_equal_lengths, _has_keys))(_sdpa)
attention.on("cuda", "triton", when=_first_refusal(_hopper, _flash_supported))(_flash)
attention.on("cuda", "torch", when=_first_refusal(_takes_half, _has_keys))(_varlen)
attention.on("cuda", "triton", when=_flash_supported)(_flash)
attention.on("cpu", "torch", when=_first_refusal(_has_keys, _single_core))(_by_heads)
for _device in ("cpu", "cuda", "mps"):
    attention.on(_device, "torch", when=_has_keys)(_sdpa)
attention_lse.on("cuda", "torch", when=_first_refusal(_equal_lengths, _has_keys, _hopper, _takes_half))(_cudnn_lse)
attention_lse.on("cuda", "triton", when=_flash_supported)(_flash_lse)
attention_lse.on("cpu", "torch", when=_native_lse_takes)(_native_lse)


@torch.library.custom_op("s3dit::attention", mutates_args=())
def _attention_node(
    q: Tensor, k: Tensor, v: Tensor, q_cu: Tensor, q_host: Tensor, k_cu: Tensor, k_host: Tensor
) -> Tensor:
    """Run the Op inside a compiled graph: the implementation, and the items, are chosen when the graph runs."""
    spans = [Spans(tuple(host.diff().tolist()), cu, host) for cu, host in ((q_cu, q_host), (k_cu, k_host))]
    # The fake result of a graph is contiguous, so the real result must be.
    return attention(q, k, v, *spans).contiguous()


@_attention_node.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_cu: Tensor, q_host: Tensor, k_cu: Tensor, k_host: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@attention.in_graphs
def _traced(q: Tensor, k: Tensor, v: Tensor, q_span: Spans, k_span: Spans) -> Tensor:
    return _attention_node(q, k, v, q_span.cu_seqlens, q_span.on_host, k_span.cu_seqlens, k_span.on_host)
