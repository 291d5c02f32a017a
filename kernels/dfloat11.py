"""DFloat11: bf16 weights whose exponents are Huffman codes. About 11 bits a weight, and not one bit is lost.

A layer stays compressed in memory and is decoded to bf16 whenever it is multiplied by, which then is the product of a
plain layer. Its parts, as DFloat11 stores them (files hold several layers in one stream, see `weights.dfloat11`):

- weight (out, in) uint8: sign and mantissa of every number
- codes (n,) uint8: the codes of the exponents, high bits first, without padding between them
- gaps (320 · blocks,) uint8: for each run of 8 bytes of codes in 5 bits, how many of its bits belong to a code that
  began in the run before
- positions (blocks + 1,) int64: the number whose code is the first that begins in a block, which is 512 runs
- luts (tables + 1, 256) uint8: tables by the next byte of a code, of which an entry is an exponent, or from 240 on 256
  less the table for the byte after; at last the length of each exponent's code

So runs are decoded side by side: on a GPU by a thread each, elsewhere in lockstep, up to four codes at a step.
Exponents from 240 on (magnitudes above 10^34, infinity, NaN) have no code in this format.

Source: the format as DFloat11 0.5 writes it; the tests compare with its own encoder.
"""

import functools
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s3dit.errors import CheckpointError
from s3dit.kernels.dispatch import kernel, op, tl
from s3dit.kernels.float_linear import float_linear
from s3dit.kernels.number_format import BLOCK_BYTES, DFLOAT11, FIRST_POINTER, GAP_BYTES, RUN_BYTES, RUNS, Layout
from s3dit.kernels.scheme import QuantizedRows, QuantizedTensors, Scheme, dequantize_rows, spec_of

# Tables that the longest code leads through.
LEVELS = 4
# Bits that the table of steps is indexed by, and codes of a step.
WINDOW, STEP = 16, 4
# Blocks that are decoded at a time: half a million to two million numbers.
BLOCKS_AT_ONCE = 128
# An index past every number.
BEYOND = 1 << 40


@functools.cache
def dfloat11(layout: Callable[[int, int], Layout]) -> Scheme:
    """Return the Scheme of a layer whose parts its NumberFormat's `layout` names."""
    return Scheme(DFLOAT11, None, spec_of(layout), None, _decode, dfloat11_linear, _rows)


@op
def dfloat11_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Multiply a float x (…, in) by a decoded weight, as a plain layer does -> (…, out), dtype of x; see `Scheme`."""
    return float_linear(dequantize_rows(x), decode_exponents(*_ordered(parts)), bias)


def _decode(parts: QuantizedTensors) -> Tensor:
    return decode_exponents(*_ordered(parts)).float()


def _rows(parts: QuantizedTensors, ids: Tensor) -> Tensor:
    width = parts["weight"].shape[1]
    out = torch.empty(len(ids), width, dtype=torch.bfloat16, device=parts["weight"].device)
    for row, number in zip(out, ids.tolist(), strict=True):
        row.copy_(_numbers(*_ordered(parts), first=number * width, last=(number + 1) * width))
    return out


def _ordered(parts: QuantizedTensors) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return parts["weight"], parts["codes"], parts["gaps"], parts["positions"], parts["luts"]


@op
def decode_exponents(weight: Tensor, codes: Tensor, gaps: Tensor, positions: Tensor, luts: Tensor) -> Tensor:
    """Return the bf16 weight (out, in) of a layer's parts; raises CheckpointError for codes that contradict them."""
    return _numbers(weight, codes, gaps, positions, luts, 0, weight.numel()).view(weight.shape)


def _numbers(
    weight: Tensor, codes: Tensor, gaps: Tensor, positions: Tensor, luts: Tensor, first: int, last: int
) -> Tensor:
    """Return the numbers of a layer from `first` to before `last`, (last - first,) bf16."""
    starts, steps, signs = positions.tolist(), _steps(luts), weight.view(-1)
    out = torch.empty(last - first, dtype=torch.int16, device=weight.device)
    block = max(0, bisect_right(starts, first) - 1)
    while block < len(starts) - 1 and starts[block] < last:
        end = min(block + BLOCKS_AT_ONCE, len(starts) - 1)
        exponents = _exponents(codes, gaps, positions, luts, steps, block, end)
        run = slice(max(first, starts[block]), min(last, starts[end]))
        exponents = exponents[run.start - starts[block] : run.stop - starts[block]]
        bits = signs[run].to(torch.int16)
        bits = (bits & 128) << 8 | bits & 127
        torch.bitwise_or(bits, exponents.to(torch.int16) << 7, out=out[run.start - first : run.stop - first])
        block = end
    return out.view(torch.bfloat16)


def _look_up(luts: Tensor, window: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return the exponents of codes at the top of windows of 32 bits, and their lengths, 0 where `levels` do not do."""
    tables = luts.to(torch.int64).view(-1)
    value = tables[window >> 24]
    for level in range(1, levels):
        table = torch.where(value < FIRST_POINTER, 0, 256 - value)
        following = tables[table * 256 + (window >> 24 - 8 * level & 255)]
        value = torch.where(value < FIRST_POINTER, value, following)
    length = tables[(len(luts) - 1) * 256 + value]
    return value, torch.where(value < FIRST_POINTER, length, 0)


def _steps(luts: Tensor) -> Tensor:
    """Return for every window of 16 bits the codes that it holds whole, STEP at most -> (65536,) int64.

    From the low byte on: their exponents; where the second, third and fourth begin, 128 if the window lacks them; their
    length together, 0 where the first is longer than the window.
    """
    window = torch.arange(1 << WINDOW, device=luts.device)
    symbols, lengths = _look_up(luts, window << 32 - WINDOW, WINDOW // 8)
    at, entry = torch.zeros_like(window), torch.zeros_like(window)
    for i in range(STEP):
        rest = window << at & (1 << WINDOW) - 1
        fits = (lengths[rest] > 0) & (at + lengths[rest] <= WINDOW)
        entry |= torch.where(fits, symbols[rest], 0) << 8 * i
        if i:
            entry |= torch.where(fits, at, 128) << 8 * (STEP - 1 + i)
        at += torch.where(fits, lengths[rest], 0)
    return entry | at << 56


def _exponents(
    codes: Tensor, gaps: Tensor, positions: Tensor, luts: Tensor, steps: Tensor, first: int, last: int
) -> Tensor:
    """Return the exponents of the numbers whose codes begin in blocks `first` to before `last`, uint8."""
    high, low = _words(codes[first * BLOCK_BYTES : last * BLOCK_BYTES + RUN_BYTES], (last - first) * RUNS)
    used = _unpack_gaps(gaps[first * GAP_BYTES : last * GAP_BYTES])
    count, found = torch.zeros_like(used), []
    # Every step takes a bit at least, whatever the tables say.
    for _ in range(8 * RUN_BYTES):
        window = high << used | low >> 63 - used
        entry = steps.index_select(0, window >> 64 - WINDOW & (1 << WINDOW) - 1)
        if not entry.min() >> 56:
            long = (entry >> 56 == 0).nonzero().view(-1)
            symbol, length = _look_up(luts, window[long] >> 32 & 0xFFFFFFFF, LEVELS)
            entry[long] = symbol | 0x808080 << 32 | length.clamp(1, 32) << 56
        parts, begun = entry.view(torch.uint8).view(-1, 8), used.to(torch.uint8)
        found.append((parts, count.masked_fill(used >= 64, BEYOND)))
        count += used < 64
        for i in range(1, STEP):
            count += parts[:, STEP - 1 + i] + begun < 64
        used = (used + (entry >> 56)).clamp_(max=64)
        if used.min() >= 64:
            break
    # The last run of a stream may hold bits that are no code; what follows it is nothing.
    stored = -(-len(codes[first * BLOCK_BYTES : last * BLOCK_BYTES]) // RUN_BYTES)
    count[stored:] = 0
    return _in_order(found, count.view(-1, RUNS), positions[first : last + 1], count[stored - 1])


def _words(codes: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Return the 64 bits of each run, (runs,) int64, and the 63 bits that follow; 0 past the end."""
    stored = codes.new_zeros((runs + 1) * RUN_BYTES)
    stored[: len(codes)] = codes
    words = stored.view(-1, RUN_BYTES).flip(1).view(torch.int64).view(-1)
    return words[:-1], words[1:] >> 1 & (1 << 63) - 1


def _unpack_gaps(gaps: Tensor) -> Tensor:
    """Return the numbers of 5 bits, high bits first, that 8 in 5 bytes are packed to, int64."""
    word = torch.zeros(len(gaps) // 5, dtype=torch.int64, device=gaps.device)
    for column in gaps.view(-1, 5).unbind(1):
        word = word << 8 | column
    return torch.stack([word >> 35 - 5 * i & 31 for i in range(8)], 1).view(-1)


def _in_order(found: list[tuple[Tensor, Tensor]], count: Tensor, starts: Tensor, slack: Tensor) -> Tensor:
    """Return the exponents that the steps of all runs found, in the order of their codes, uint8.

    found: of each step the bytes of its entries (runs, 8), and how many exponents their runs had before · count: of
    each run (blocks, 512) · starts (blocks + 1,) · slack: how many of the last may be none. Raises CheckpointError
    where they differ.
    """
    excess = count.sum(1) - starts.diff()
    if excess[:-1].any() or not 0 <= excess[-1] <= slack:
        raise CheckpointError(
            "a DFloat11 layer holds another number of codes than its output_positions say; its file is damaged; "
            "download it again"
        )
    total = int(starts[-1] - starts[0])
    begin = (count.cumsum(1) - count + (starts[:-1] - starts[0])[:, None]).view(-1)
    out = torch.empty(total + 1, dtype=torch.uint8, device=count.device)
    # An entry that holds fewer writes what is overwritten afterwards: the number of that place is in a lower column.
    for i in reversed(range(STEP)):
        for parts, before in found:
            out.scatter_(0, (begin + i).add_(before).clamp_(max=total), parts[:, i])
    return out[:total]


@kernel
def _code_at(high: "Any", low: "Any", used: "Any", luts: "Any", inside: "Any", TABLES: tl.constexpr) -> Any:
    """Return the exponent of the code at a bit of each run, and the code's length; 0 and 0 outside."""
    window = ((high << used) | (low >> (63 - used))) >> 32
    value = tl.load(luts + (window >> 24), mask=inside, other=0).to(tl.int32)
    for level in tl.static_range(1, 4):
        follows = inside & (value >= 240)
        table = tl.minimum(256 - value, TABLES - 1)
        at = luts + table * 256 + ((window >> (24 - 8 * level)) & 255).to(tl.int32)
        value = tl.where(follows, tl.load(at, mask=follows, other=0).to(tl.int32), value)
    length = tl.load(luts + TABLES * 256 + value, mask=inside, other=0)
    return value, length.to(tl.uint64)


@kernel
def _decode_kernel(
    weight: "Any", codes: "Any", gaps: "Any", positions: "Any", luts: "Any", out: "Any", NUMBERS: "Any", BYTES: "Any",
    TABLES: tl.constexpr, RUNS: tl.constexpr,
) -> Any:  # fmt: skip
    """Decode a block, whose runs are first counted, then written; no more codes than there are bits in a run."""
    block, run = tl.program_id(0).to(tl.int64), tl.arange(0, RUNS)
    byte = (block * RUNS + run) * 8
    high, low = tl.zeros((RUNS,), tl.uint64), tl.zeros((RUNS,), tl.uint64)
    for i in tl.static_range(8):
        high = (high << 8) | tl.load(codes + byte + i, mask=byte + i < BYTES, other=0).to(tl.uint64)
        low = (low << 8) | tl.load(codes + byte + 8 + i, mask=byte + 8 + i < BYTES, other=0).to(tl.uint64)
    low = low >> 1
    gap = gaps + block * (RUNS * 5 // 8) + run * 5 // 8
    pair = tl.load(gap).to(tl.uint32) << 8 | tl.load(gap + 1, mask=run % 8 != 7, other=0).to(tl.uint32)
    begin = ((pair >> (11 - run * 5 % 8)) & 31).to(tl.uint64)
    used, count = begin, tl.zeros((RUNS,), tl.int64)
    step = 0
    while (step < 64) & (tl.min(used.to(tl.int32)) < 64):
        inside = used < 64
        value, length = _code_at(high, low, tl.minimum(used, 63), luts, inside, TABLES)
        count += inside.to(tl.int64)
        used += length
        step += 1
    at = tl.load(positions + block) + tl.cumsum(count) - count
    end = tl.minimum(tl.load(positions + block + 1), NUMBERS)
    used, steps, step = begin, step, 0
    while step < steps:
        inside = used < 64
        value, length = _code_at(high, low, tl.minimum(used, 63), luts, inside, TABLES)
        mine = inside & (at >= 0) & (at < end)
        sign = tl.load(weight + at, mask=mine, other=0).to(tl.int32)
        tl.store(out + at, ((sign & 128) << 8 | value << 7 | sign & 127).to(tl.int16), mask=mine)
        at += 1
        used += length
        step += 1


def _empty_weight(weight: Tensor, codes: Tensor, gaps: Tensor, positions: Tensor, luts: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bfloat16)


def launch_decode(weight: Tensor, codes: Tensor, gaps: Tensor, positions: Tensor, luts: Tensor) -> Tensor:
    """Decode the parts of a layer in Triton; what `decode_exponents` raises for is decoded to something else."""
    # As integers: the interpreter's bf16 is wrong.
    out = torch.empty(weight.shape, dtype=torch.int16, device=weight.device)
    blocks = len(positions) - 1
    if blocks:
        _decode_kernel[(blocks,)](
            weight, codes, gaps, positions, luts, out, weight.numel(), len(codes), len(luts) - 1, RUNS, num_warps=8
        )
    return out.view(torch.bfloat16)


@decode_exponents.on("cuda", "triton", numerics="exact")
def _triton_decode(weight: Tensor, codes: Tensor, gaps: Tensor, positions: Tensor, luts: Tensor) -> Tensor:
    return launch_decode(weight, codes, gaps, positions, luts)


@torch.library.custom_op("s3dit::decode_exponents", mutates_args=())
def _node(weight: Tensor, codes: Tensor, gaps: Tensor, positions: Tensor, luts: Tensor) -> Tensor:
    """Run the Op inside a compiled graph, which could not follow its loops."""
    return decode_exponents(weight, codes, gaps, positions, luts)


_node.register_fake(_empty_weight)
decode_exponents.in_graphs(_node)
