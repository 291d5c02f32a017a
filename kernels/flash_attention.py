"""The flash-attention kernel in Triton, over packed items, and its launch.

It takes tensors only: where items begin comes as running sums of their lengths (items + 1,) int32 on the device; the
longest item comes as a number, which gives the grid its length. `attention` has the Ops, their references and the
checks of arguments: a kernel would read past the end of tensors that are too short for their running sums.

Where descriptors serve (`matmul.describable`), tiles of q, k and v are copied by them, without registers or addresses.
Such a tile may reach into the next item, which is in the tensor: its keys get no weight, and its values count as 0.

Source: FlashAttention-2 (Dao 2023, algorithm 1).
"""

import math
from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.dispatch import capability, kernel, launcher, tl
from s3dit.kernels.matmul import describable
from s3dit.kernels.tune import Config, config_in_force

# Up to so many queries an item, tiles of 128 would leave a third of a Hopper's processors without work at the end.
SHORT_TOKENS = 2048
# What a search tries.
CANDIDATES: tuple[Config, ...] = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, warps in ((64, 4), (128, 4), (128, 8))
    for n in (32, 64, 128)
    for stages in (2, 3, 4)
)


@kernel
def _load_rows(
    x: "Any", item: "Any", head: "Any", n: "Any", start: "Any", token: "Any", head_stride: "Any", d: "Any",
    length: "Any", D: tl.constexpr, WHOLE: tl.constexpr, DESCRIBED: tl.constexpr,
) -> Any:  # fmt: skip
    """Load rows n, from `start` on, of the item of x (tokens, heads, D) that starts at `item`, of one head.

    WHOLE: none is outside. Columns from D on are 0, and so are rows outside, unless they are copied by descriptor.
    """
    if DESCRIBED:
        tile = x.load([(item + start).to(tl.int32), head * D])
    else:
        place = x + item * token + head * head_stride + n[:, None] * token + d[None, :]
        if WHOLE and d.shape[0] == D:
            tile = tl.load(place)
        elif WHOLE:
            tile = tl.load(place, mask=d[None, :] < D, other=0)
        else:
            tile = tl.load(place, mask=(n[:, None] < length) & (d[None, :] < D), other=0)
    return tile


@kernel
def _attend_block(
    queries: "Any", fold: "Any", k: "Any", k_token: "Any", k_head: "Any", v: "Any", v_token: "Any", v_head: "Any",
    k_start: "Any", head: "Any", start: "Any", length: "Any", d: "Any", acc: "Any", total: "Any", peak: "Any",
    D: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, DESCRIBED: tl.constexpr,
) -> Any:  # fmt: skip
    """Add BLOCK_N keys to the running sums.

    `fold` is the product of 1 / sqrt(D) and log2(e), since weights are computed as powers of two. It scales the scores
    where their peak is subtracted, in one instruction.
    """
    n = start + tl.arange(0, BLOCK_N)
    keys = _load_rows(k, k_start, head, n, start, k_token, k_head, d, length, D, WHOLE, DESCRIBED)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if not WHOLE:
        scores = tl.where(n[None, :] < length, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * fold)
    weights = tl.exp2(scores * fold - higher[:, None])
    shrink = tl.exp2(peak - higher)
    values = _load_rows(v, k_start, head, n, start, v_token, v_head, d, length, D, WHOLE, DESCRIBED)
    if DESCRIBED and not WHOLE:
        # What the next item has there may be NaN, which a weight of 0 does not silence.
        values = tl.where(n[:, None] < length, values, 0.0)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(weights, 1), higher


@kernel
def _flash_kernel(
    q: "Any", q_token: "Any", q_head: "Any", k: "Any", k_token: "Any", k_head: "Any", v: "Any", v_token: "Any",
    v_head: "Any", out: "Any", lse: "Any", q_cu: "Any", k_cu: "Any", fold: "Any", D: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, LSE: tl.constexpr, DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:  # fmt: skip
    """BLOCK_M queries of one head against all keys of their item; q, k and v are pointers or descriptors."""
    head, item = tl.program_id(1), tl.program_id(2)
    q_start, k_start = tl.load(q_cu + item).to(tl.int64), tl.load(k_cu + item).to(tl.int64)
    q_length = (tl.load(q_cu + item + 1) - q_start).to(tl.int32)
    k_length = (tl.load(k_cu + item + 1) - k_start).to(tl.int32)
    first = tl.program_id(0) * BLOCK_M
    # The grid is as long as the longest item.
    if first >= q_length:
        return
    m, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK)
    queries = _load_rows(q, q_start, head, m, first, q_token, q_head, d, q_length, D, False, DESCRIBED)
    acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = k_length // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc, total, peak = _attend_block(
            queries, fold, k, k_token, k_head, v, v_token, v_head, k_start, head, start, k_length, d, acc, total, peak,
            D, BLOCK_N, True, DESCRIBED,
        )  # fmt: skip
    if whole < k_length:
        acc, total, peak = _attend_block(
            queries, fold, k, k_token, k_head, v, v_token, v_head, k_start, head, whole, k_length, d, acc, total, peak,
            D, BLOCK_N, False, DESCRIBED,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (q_start + m[:, None]) * HEADS + head
    inside = m[:, None] < q_length
    tl.store(out + place * D + d[None, :], acc.to(out.dtype.element_ty), mask=inside & (d[None, :] < D))
    if LSE:
        # back from powers of two: log(2)
        tl.store(lse + place, ((peak + tl.log2(total)) * 0.6931471805599453)[:, None], mask=inside)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, q_cu: Tensor, k_cu: Tensor, longest: int, out: Tensor, lse: Tensor | None
) -> None:
    """Run the flash kernel into `out` (and `lse`)."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if not longest:
        return
    heads, width = q.shape[1:]
    block = _block(width)
    long = longest > SHORT_TOKENS
    measured = config_in_force("attention", f"d{block} {'long' if long else 'short'}", v.device)
    config = measured or estimated_config(block, long, v.device)
    operands: list[Any] = [q, k, v]
    flat = width == block and all(x.stride(1) == width for x in (q, k, v))
    described = flat and describable(*(x.flatten(1) for x in (q, k, v)))
    if described:
        from triton.tools.tensor_descriptor import TensorDescriptor

        rows = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_N"]
        pairs = zip(operands, rows, strict=True)
        operands = [TensorDescriptor.from_tensor(x.flatten(1), [count, width]) for x, count in pairs]
    places = [arg for x, given in zip((q, k, v), operands, strict=True) for arg in (given, x.stride(0), x.stride(1))]
    _flash_kernel[(-(-longest // config["BLOCK_M"]), heads, len(q_cu) - 1)](
        *places, out, lse, q_cu, k_cu, math.log2(math.e) * width**-0.5, D=width, HEADS=heads, BLOCK=block,
        LSE=lse is not None, DESCRIBED=described, **config,
    )  # fmt: skip


def estimated_config(block: int, long: bool, device: torch.device) -> Config:
    """Return an estimated launch configuration, for devices of which the tuning table has no measurement.

    An estimate, computed from shared memory and occupancy and never timed: large tiles reuse keys most; the tiles of q,
    k and v in flight must fit 227 KiB of shared memory on Hopper and data-center Blackwell, 99 KiB on other GPUs from
    Ampere on; and short sequences need more programs to fill the processors, so smaller tiles of queries. For heads of
    128 on Hopper, 128 keys at a time take 28 % fewer instructions a key than 64, counted in compiled code. The
    interpreter has no such limits and gets tiles that are small enough to be tested at their edges.

    block: width of a head, rounded up to a power of two · long: the longest item exceeds SHORT_TOKENS.
    """
    queries, keys, warps, stages = 128, 64, 4, 2
    if device.type != "cuda" or capability(device) < (8, 0):
        queries, keys = 32, 32
    elif (9, 0) <= capability(device) < (12, 0):
        if not long:
            queries, stages = 64, 3
        else:
            keys, warps = 128, 8
    else:
        broad = block > 64
        queries, keys, warps = 128 if long else 64, 32 if broad else 64, 8 if broad and long else 4
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def _block(width: int) -> int:
    """Return the power of two that holds a head."""
    return max(32, 1 << (width - 1).bit_length())


def _fake_flash(
    q: Tensor, k: Tensor, v: Tensor, q_cu: Tensor, k_cu: Tensor, longest: int, with_lse: bool
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty((len(q), q.shape[1] if with_lse else 0), dtype=torch.float32, device=q.device)


@launcher(_fake_flash)
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, q_cu: Tensor, k_cu: Tensor, longest: int, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """Attend within each item in the dtype of q, k and v, fp32 inside.

    q (N, H, D), k, v (M, H, D) bf16, fp16 or (interpreted) fp32, D a multiple of 16 up to 128 · q_cu, k_cu (items + 1,)
    int32 · longest: queries of the longest item -> out (N, H, D) and the log-sum-exp (N, H) fp32, or (N, 0).
    """
    out, lse = _fake_flash(q, k, v, q_cu, k_cu, longest, with_lse)
    _launch(q, k, v, q_cu, k_cu, longest, out, lse if with_lse else None)
    return out, lse
