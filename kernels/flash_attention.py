"""The flash-attention kernel in Triton, over packed items, in 16 bits or with int8 scores, and its launch.

It takes tensors only: where items begin comes as running sums of their lengths (items + 1,) int32 on the device; the
longest item comes as a number, which gives the grid its length. `attention` has the Ops, their references and the
checks of arguments: a kernel would read past the end of tensors that are too short for their running sums.

Source: FlashAttention-2 (Dao 2023, algorithm 1) for the loop, SageAttention (Zhang et al. 2024, section 4) for the mean
of the keys. P·V stays in 16 bits: in e4m3 it would need V stored transposed.
"""

import math
from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.dispatch import capability, kernel, launcher, tl
from s3dit.kernels.rows import round_rows
from s3dit.kernels.scheme import QuantizedRows
from s3dit.kernels.tune import Config, config_in_force

# Up to so many queries an item, tiles of 128 would leave a third of a Hopper's processors without work at the end.
SHORT_TOKENS = 2048
# Keys that a program of `_smooth_keys_kernel` takes.
SMOOTH_ROWS = 64
# What a search tries.
CANDIDATES: tuple[Config, ...] = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, warps in ((64, 4), (128, 4), (128, 8))
    for n in (32, 64, 128)
    for stages in (2, 3, 4)
)


@kernel
def _load_rows(x: "Any", n: "Any", token: "Any", d: "Any", length: "Any", D: tl.constexpr, WHOLE: tl.constexpr) -> Any:
    """Load rows n of x (tokens, D). WHOLE: none is outside. Columns from D on, and rows outside, are 0."""
    place = x + n[:, None] * token + d[None, :]
    if WHOLE and d.shape[0] == D:
        tile = tl.load(place)
    elif WHOLE:
        tile = tl.load(place, mask=d[None, :] < D, other=0)
    else:
        tile = tl.load(place, mask=(n[:, None] < length) & (d[None, :] < D), other=0)
    return tile


@kernel
def _attend_block(
    queries: "Any", fold: "Any", k: "Any", k_token: "Any", k_scale: "Any", v: "Any", v_token: "Any", start: "Any",
    length: "Any", d: "Any", acc: "Any", total: "Any", peak: "Any", D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, INT8: tl.constexpr,
) -> Any:  # fmt: skip
    """Add BLOCK_N keys to the running sums.

    `fold` is the product of 1 / sqrt(D), the scale of q, and log2(e), since weights are computed as powers of two.
    """
    n = start + tl.arange(0, BLOCK_N)
    scores = tl.dot(queries, tl.trans(_load_rows(k, n, k_token, d, length, D, WHOLE)), input_precision="ieee")
    scores = scores.to(tl.float32) * fold
    if INT8:
        scores *= tl.load(k_scale + n * HEADS, mask=n < length, other=0.0)[None, :]
    if not WHOLE:
        scores = tl.where(n[None, :] < length, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(peak - higher)
    values = _load_rows(v, n, v_token, d, length, D, WHOLE)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(weights, 1), higher


@kernel
def _flash_kernel(
    q: "Any", q_token: "Any", q_head: "Any", q_scale: "Any", k: "Any", k_token: "Any", k_head: "Any", k_scale: "Any",
    v: "Any", v_token: "Any", v_head: "Any", out: "Any", lse: "Any", q_cu: "Any", k_cu: "Any", fold: "Any",
    D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LSE: tl.constexpr, INT8: tl.constexpr, ROUND: tl.constexpr,
) -> Any:  # fmt: skip
    """BLOCK_M queries of one head against all keys of their item. ROUND: q is a float and becomes int8 here."""
    head, item = tl.program_id(1), tl.program_id(2)
    q_start, k_start = tl.load(q_cu + item).to(tl.int64), tl.load(k_cu + item).to(tl.int64)
    q_length = (tl.load(q_cu + item + 1) - q_start).to(tl.int32)
    k_length = (tl.load(k_cu + item + 1) - k_start).to(tl.int32)
    first = tl.program_id(0) * BLOCK_M
    # The grid is as long as the longest item.
    if first >= q_length:
        return
    m, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK)
    queries = _load_rows(q + q_start * q_token + head * q_head, m, q_token, d, q_length, D, False)
    if ROUND:
        rounded, unit = round_rows(queries.to(tl.float32), 127.0)
        queries, fold = rounded.to(tl.int8), unit * fold
    elif INT8:
        unit = tl.load(q_scale + (q_start + m) * HEADS + head, mask=m < q_length, other=0.0)
        fold = unit[:, None] * fold
    k += k_start * k_token + head * k_head
    v += k_start * v_token + head * v_head
    if INT8:
        k_scale += k_start * HEADS + head
    acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = k_length // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc, total, peak = _attend_block(
            queries, fold, k, k_token, k_scale, v, v_token, start, k_length, d, acc, total, peak, D, HEADS, BLOCK_N,
            True, INT8,
        )  # fmt: skip
    if whole < k_length:
        acc, total, peak = _attend_block(
            queries, fold, k, k_token, k_scale, v, v_token, whole, k_length, d, acc, total, peak, D, HEADS, BLOCK_N,
            False, INT8,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (q_start + m[:, None]) * HEADS + head
    inside = m[:, None] < q_length
    tl.store(out + place * D + d[None, :], acc.to(out.dtype.element_ty), mask=inside & (d[None, :] < D))
    if LSE:
        # back from powers of two: log(2)
        tl.store(lse + place, ((peak + tl.log2(total)) * 0.6931471805599453)[:, None], mask=inside)


@kernel
def _smooth_keys_kernel(
    k: "Any", token: "Any", head_stride: "Any", mean: "Any", out: "Any", scale: "Any", cu: "Any", D: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
) -> Any:  # fmt: skip
    """ROWS keys of one head, less the mean of their item, in int8."""
    head, item = tl.program_id(1), tl.program_id(2)
    start, length = tl.load(cu + item).to(tl.int64), (tl.load(cu + item + 1) - tl.load(cu + item)).to(tl.int32)
    n, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    keys = _load_rows(k + start * token + head * head_stride, n, token, d, length, D, False).to(tl.float32)
    middle = tl.load(mean + (item * HEADS + head) * D + d, mask=d < D, other=0.0)
    values, unit = round_rows(keys - middle[None, :], 127.0)
    place = (start + n[:, None]) * HEADS + head
    inside = n[:, None] < length
    tl.store(out + place * D + d[None, :], values.to(tl.int8), mask=inside & (d[None, :] < D))
    tl.store(scale + place, unit, mask=inside)


def _launch(
    q: Tensor | QuantizedRows, k: Tensor | QuantizedRows, v: Tensor, q_cu: Tensor, k_cu: Tensor, longest: int,
    out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """Run the flash kernel into `out` (and `lse`); where k is quantized, q is too, or is rounded by the kernel."""
    q_values, q_scale = (q.values, q.scale.contiguous()) if isinstance(q, QuantizedRows) else (q, None)
    k_values, k_scale = (k.values, k.scale) if isinstance(k, QuantizedRows) else (k, None)
    q_values, k_values, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_values, k_values, v))
    if not longest:
        return
    heads, width = q_values.shape[1:]
    block = _block(width)
    name = "attention" if k_scale is None else "attention8"
    long = longest > SHORT_TOKENS
    measured = config_in_force(name, f"d{block} {'long' if long else 'short'}", v.device)
    config = measured or estimated_config(block, long, k_scale is not None, v.device)
    fold = math.log2(math.e) * width**-0.5
    _flash_kernel[(-(-longest // config["BLOCK_M"]), heads, len(q_cu) - 1)](
        q_values, q_values.stride(0), q_values.stride(1), q_scale, k_values, k_values.stride(0), k_values.stride(1),
        k_scale, v, v.stride(0), v.stride(1), out, lse, q_cu, k_cu, fold, D=width, HEADS=heads, BLOCK=block,
        LSE=lse is not None, INT8=k_scale is not None, ROUND=k_scale is not None and q_scale is None, **config,
    )  # fmt: skip


def estimated_config(block: int, long: bool, int8: bool, device: torch.device) -> Config:
    """Return an estimated launch configuration, for devices of which the tuning table has no measurement.

    An estimate, computed from shared memory and occupancy and never timed: large tiles reuse keys most; the tiles of q,
    k and v in flight must fit 227 KiB of shared memory on Hopper and data-center Blackwell, 99 KiB on other GPUs from
    Ampere on; and short sequences need more programs to fill the processors, so smaller tiles of queries. The
    interpreter has no such limits and gets tiles that are small enough to be tested at their edges.

    block: width of a head, rounded up to a power of two · long: the longest item exceeds SHORT_TOKENS · int8: scores
    are products of int8 numbers.
    """
    queries, keys, warps, stages = 128, 64, 4, 2
    if device.type != "cuda" or capability(device) < (8, 0):
        queries, keys = 32, 32
    elif (9, 0) <= capability(device) < (12, 0):
        if not long:
            queries, stages = 64, 3
        elif block > 64 and not int8:
            warps, stages = 8, 3
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


def smooth_keys(k: Tensor, mean: Tensor, k_cu: Tensor, longest: int) -> QuantizedRows:
    """Round the keys, less the mean of their item, to int8 by rows.

    k (M, H, D) · mean (items, H, D) fp32 · k_cu (items + 1,) int32 · longest: keys of the longest item -> values (M, H,
    D) int8 with scales (M, H) fp32.
    """
    tokens, heads, width = k.shape
    k = k if k.stride(-1) == 1 else k.contiguous()
    values = torch.empty(k.shape, dtype=torch.int8, device=k.device)
    scale = torch.empty((tokens, heads), dtype=torch.float32, device=k.device)
    if tokens:
        _smooth_keys_kernel[(-(-longest // SMOOTH_ROWS), heads, len(k_cu) - 1)](
            k, k.stride(0), k.stride(1), mean, values, scale, k_cu, width, heads, _block(width), SMOOTH_ROWS,
            num_warps=4,
        )  # fmt: skip
    return QuantizedRows(values, scale, k.dtype)


def flash_attention8(
    q: Tensor | QuantizedRows, k: QuantizedRows, v: Tensor, q_cu: Tensor, k_cu: Tensor, longest: int
) -> Tensor:
    """Attend within each item with int8 scores: `flash_attention` for keys of `smooth_keys` -> (N, H, D), dtype of q.

    q (N, H, D), a float that the kernel rounds, or int8 rows.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _launch(q, k, v, q_cu, k_cu, longest, out, None)
    return out
