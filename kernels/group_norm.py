"""GroupNorm of pictures in channels last, in two Ops: `group_moments`, and `normalize_rows` by them, with SiLU or not.

torch's GroupNorm of a CPU adds up plain squares in fp32 where memory is channels last: at 1024² positions it is off by
2e-4, by 3e-3 where the mean is 3 deviations, by a quarter where it is 30. That of CUDA copies such a picture to the
other layout, and takes the moments with one program a group. And both make a normalized copy of all of it: with the
moments at hand, rows are normalized where they are needed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import kernel, launcher, op, tl
from s3dit.kernels.pictures import in_kernel
from s3dit.kernels.rows import PROGRAM_NUMBERS, holding

# Numbers of a group whose moments are taken at a time: sums of so few, in fp32, are accurate, and stay in the cache.
CHUNK = 1 << 13
# Keeps the scale of a group of equal numbers finite; far below any variance that counts.
SMALLEST_EPS = 1e-30

# Programs that a picture is shared among.
PROGRAMS = 512

# Mean and variance of every channel's group, (C,) each.
Moments = tuple[Tensor, Tensor]


@op
def group_moments(picture: Tensor, groups: int, offset: Tensor | None = None) -> Moments:
    """Take mean and variance (divided by n) of each group of adjacent channels, over all positions.

    picture (1, C, H, W) of any float dtype · groups: a divisor of C · offset (C,): a bias that the picture still lacks
    -> for each channel those of its group, two of (C,), fp32 or wider: what `normalize_rows` takes to normalize
    picture + offset, the mean less the channel's offset.
    """
    upcast = torch.promote_types(picture.dtype, torch.float32)
    bias = torch.zeros(picture.shape[1], device=picture.device) if offset is None else offset
    whole = picture.double() + bias.double()[:, None, None]
    variance, mean = torch.var_mean(whole.unflatten(1, (groups, -1)), dim=(0, 2, 3, 4), correction=0)
    size = picture.shape[1] // groups
    return (mean.repeat_interleave(size) - bias).to(upcast), variance.repeat_interleave(size).to(upcast)


def _channels_last(picture: Tensor, groups: int, offset: Tensor | None = None) -> bool | str:
    if offset is not None:
        return "takes pictures with their bias"
    return picture.is_contiguous(memory_format=torch.channels_last) or "takes pictures in channels last"


@group_moments.on("cpu", "torch", when=_channels_last, bound=256.0)
def _by_chunks(picture: Tensor, groups: int, offset: None = None) -> Moments:
    """Take the moments of chunks of rows in fp32, and put them together in fp64.

    Off by 1e-6 of a deviation and 4e-6 of the variance; in 16 bits by up to 5e-5 of the variance.
    """
    channels, height, width = picture.shape[1:]
    upcast = torch.promote_types(picture.dtype, torch.float32)
    size = channels // groups
    # Around the mean of a row: squares of what is far from 0 would lose the digits that differ. Numbers of 16 bits are
    # upcast for it, which takes longer than all else here, so only where a group lies more than 2 deviations off.
    row = picture[:, :, :1].to(upcast).unflatten(1, (groups, size))
    variance, near = torch.var_mean(row, dim=(2, 3, 4), correction=0)
    centered = picture.dtype == upcast or bool((near.square() > 4 * variance).any())
    near = (near if centered else torch.zeros_like(near)).repeat_interleave(size, 1)[:, :, None, None]
    # With weights of its own, torch gives the moments of 16-bit floats in fp32.
    weights = torch.ones(channels, dtype=upcast), torch.zeros(channels, dtype=upcast)
    means, variances, shares = [], [], []
    for chunk in picture.split(max(1, CHUNK // (size * width)), dim=2):
        positions = chunk.shape[2] * width
        numbers = chunk.to(upcast) - near if centered else chunk
        # A difference of a single row has strides that torch then refuses; this says the same places in its own.
        numbers = numbers[0].movedim(0, -1)[None].movedim(-1, 1)
        # No other function of torch takes both moments so fast; what it normalizes is small, and thrown away.
        _, mean, scale = torch.native_group_norm(numbers, *weights, 1, channels, positions, groups, SMALLEST_EPS)
        means.append(mean[0].double())
        variances.append(scale[0].double().pow(-2))
        shares.append(positions / (height * width))
    share = torch.tensor(shares, dtype=torch.float64)[:, None]
    each = torch.stack(means)
    mean = (share * each).sum(0)
    variance = (share * (torch.stack(variances) + (each - mean).square())).sum(0)
    mean = mean.repeat_interleave(size) + near.double().flatten()
    return mean.to(upcast), variance.repeat_interleave(size).to(upcast)


@op
def normalize_rows(
    rows: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """Compute (rows - mean) / sqrt(variance + eps) · weight + bias, and SiLU of that if asked for.

    rows (1, C, h, W) · mean, variance (C,) of at least fp32 · weight, bias (C,) -> same shape and dtype.
    """
    normed = F.batch_norm(rows, mean, variance, weight.to(mean.dtype), bias.to(mean.dtype), eps=eps)
    return F.silu(normed, inplace=not torch.is_grad_enabled()) if silu else normed


@kernel
def _moments_kernel(
    x: "Any", partial: "Any", N: "Any", STEPS: "Any", C: tl.constexpr, ROWS: tl.constexpr,
) -> Any:  # fmt: skip
    """Take mean and sum of squares around it of each channel, of STEPS · ROWS positions -> partial (2, programs, C)."""
    channel = tl.arange(0, C)
    start = tl.program_id(0).to(tl.int64) * STEPS * ROWS
    # Around the first position: squares of what is far from 0 would lose the digits that differ.
    near = tl.load(x + start * C + channel).to(tl.float32)
    total, squares = tl.zeros((ROWS, C), tl.float32), tl.zeros((ROWS, C), tl.float32)
    for step in range(STEPS):
        n = (start + step * ROWS + tl.arange(0, ROWS))[:, None]
        y = tl.load(x + n * C + channel[None, :], mask=n < N, other=0.0).to(tl.float32) - near[None, :]
        y = tl.where(n < N, y, 0.0)
        total += y
        squares += y * y
    count = tl.minimum(N - start, STEPS * ROWS).to(tl.float32)
    mean = tl.sum(total, 0) / count
    at = partial + tl.program_id(0) * C + channel
    tl.store(at, near + mean)
    tl.store(at + tl.num_programs(0) * C, tl.maximum(tl.sum(squares, 0) - count * mean * mean, 0.0))


@kernel
def _combine_kernel(
    partial: "Any", offset: "Any", moments: "Any", N: "Any", EACH: "Any", PROGRAMS: "Any", C: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Put a group's partial moments together -> moments (2, C): mean, less offset, and variance of its channels."""
    channel = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    program = tl.arange(0, BLOCK)[:, None]
    inside = program < PROGRAMS
    count = tl.where(inside, tl.minimum(N - program * EACH, EACH), 0).to(tl.float32)
    at = partial + program * C + channel[None, :]
    bias = tl.zeros((SIZE,), tl.float32) if offset is None else tl.load(offset + channel).to(tl.float32)
    means = tl.load(at, mask=inside, other=0.0) + bias[None, :]
    # Not N.to: a 1 is a constant to the compiler.
    numbers = tl.cast(N, tl.float32) * SIZE
    # Around one of the means, for the digits again.
    near = tl.load(partial + tl.program_id(0) * SIZE) + tl.sum(tl.where(tl.arange(0, SIZE) == 0, bias, 0.0), 0)
    mean = near + tl.sum(tl.sum((means - near) * count, 1), 0) / numbers
    squares = tl.load(at + PROGRAMS * C, mask=inside, other=0.0) + count * (means - mean) * (means - mean)
    variance = tl.sum(tl.sum(squares, 1), 0) / numbers
    tl.store(moments + channel, mean - bias)
    tl.store(moments + C + channel, variance + tl.zeros((SIZE,), tl.float32))


@kernel
def _normalize_kernel(
    x: "Any", mean: "Any", variance: "Any", weight: "Any", bias: "Any", out: "Any", N: "Any", eps: "Any",
    C: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute normalize_rows of ROWS positions."""
    channel = tl.arange(0, C)[None, :]
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    factor = tl.rsqrt(tl.load(variance + channel) + eps) * tl.load(weight + channel).to(tl.float32)
    y = tl.load(x + n * C + channel, mask=n < N, other=0.0).to(tl.float32) - tl.load(mean + channel)
    y = y * factor + tl.load(bias + channel).to(tl.float32)
    if SILU:
        # The sigmoid as the square of a reciprocal root, as in `swiglu`.
        root = tl.rsqrt(1.0 + tl.exp2(y * -1.4426950408889634))
        y = y * (root * root)
    tl.store(out + n * C + channel, y.to(out.dtype.element_ty), mask=n < N)


@launcher(lambda picture, groups, offset: picture.new_empty(2, picture.shape[1], dtype=torch.float32))
def launch_moments(picture: Tensor, groups: int, offset: Tensor | None) -> Tensor:
    """Take `group_moments` of a picture (1, C, H, W) in channels last, C a power of two -> (2, C) fp32."""
    channels, positions = picture.shape[1], picture.shape[2] * picture.shape[3]
    rows = max(1, PROGRAM_NUMBERS // channels)
    steps = max(1, -(-positions // (rows * PROGRAMS)))
    programs = -(-positions // (rows * steps))
    partial = torch.empty(2, programs, channels, dtype=torch.float32, device=picture.device)
    moments = torch.empty(2, channels, dtype=torch.float32, device=picture.device)
    _moments_kernel[(programs,)](picture, partial, positions, steps, channels, rows, num_warps=4)
    _combine_kernel[(groups,)](
        partial, offset, moments, positions, rows * steps, programs, channels, channels // groups, holding(programs),
        num_warps=8,
    )  # fmt: skip
    return moments


@launcher(lambda rows, *args: torch.empty_like(rows))
def launch_normalize(
    rows: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """Compute `normalize_rows` of rows (1, C, h, W) in channels last, C a power of two."""
    out = torch.empty_like(rows)
    channels, positions = rows.shape[1], rows.shape[2] * rows.shape[3]
    each = max(1, PROGRAM_NUMBERS // channels)
    if positions:
        _normalize_kernel[(-(-positions // each),)](
            rows, mean, variance, weight, bias, out, positions, eps, channels, each, silu, num_warps=4
        )
    return out


@group_moments.on("cuda", "triton", when=in_kernel, bound=256.0)
def _triton_moments(picture: Tensor, groups: int, offset: Tensor | None = None) -> Moments:
    moments = launch_moments(picture, groups, offset)
    return moments[0], moments[1]


@normalize_rows.on("cuda", "triton", when=in_kernel)
def _triton_normalize(
    rows: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    return launch_normalize(rows, mean, variance, weight, bias, eps, silu)
