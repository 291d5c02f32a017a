"""Moments of groups of channels, for GroupNorm of pictures that are taken in pieces: the Op `group_moments`.

torch's GroupNorm of a CPU adds up plain squares in fp32 where memory is channels last: at 1024² positions it is off by
2e-4, by 3e-3 where the mean is 3 deviations, by a quarter where it is 30. And it makes a normalized copy of the whole
picture at once. With the moments at hand, rows are normalized wherever they are needed (`normalize`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import op

# Numbers of a group whose moments are taken at a time: sums of so few, in fp32, are accurate, and stay in the cache.
CHUNK = 1 << 13
# Keeps the scale of a group of equal numbers finite; far below any variance that counts.
SMALLEST_EPS = 1e-30

# Mean and variance of every channel's group, (C,) each.
Moments = tuple[Tensor, Tensor]


@op
def group_moments(picture: Tensor, groups: int) -> Moments:
    """Take mean and variance (divided by n) of each group of adjacent channels, over all positions.

    picture (1, C, H, W) of any float dtype · groups: a divisor of C -> for each channel those of its group, two of
    (C,), fp32 or wider.
    """
    upcast = torch.promote_types(picture.dtype, torch.float32)
    variance, mean = torch.var_mean(picture.double().unflatten(1, (groups, -1)), dim=(0, 2, 3, 4), correction=0)
    size = picture.shape[1] // groups
    return mean.repeat_interleave(size).to(upcast), variance.repeat_interleave(size).to(upcast)


def _channels_last(picture: Tensor, groups: int) -> bool | str:
    return picture.is_contiguous(memory_format=torch.channels_last) or "takes pictures in channels last"


@group_moments.on("cpu", "torch", when=_channels_last, bound=256.0)
def _by_chunks(picture: Tensor, groups: int) -> Moments:
    """Take the moments of chunks of rows in fp32, and put them together in fp64.

    Off by 1e-6 of a deviation, relative to the variance 1e-6 to 2e-5; of numbers of 16 bits that lie 30 deviations off
    zero, which have hardly a digit left, by 3e-3.
    """
    channels, height, width = picture.shape[1:]
    upcast = torch.promote_types(picture.dtype, torch.float32)
    size = channels // groups
    near = torch.zeros(1, channels, 1, 1, dtype=upcast)
    if picture.dtype == upcast:
        # Around a mean of few pixels: squares of what is far from 0 would lose the digits that differ.
        near = picture[:, :, :1].mean(3, keepdim=True).unflatten(1, (groups, size)).mean(2).repeat_interleave(size, 1)
    # With weights of its own, torch gives the moments of 16-bit floats in fp32.
    weights = torch.ones(channels, dtype=upcast), torch.zeros(channels, dtype=upcast)
    means, variances, shares = [], [], []
    for chunk in picture.split(max(1, CHUNK // (size * width)), dim=2):
        positions = chunk.shape[2] * width
        centered = chunk - near if picture.dtype == upcast else chunk
        # No other function of torch takes both moments so fast; what it normalizes is small, and thrown away.
        _, mean, scale = torch.native_group_norm(centered, *weights, 1, channels, positions, groups, SMALLEST_EPS)
        means.append(mean[0].double())
        variances.append(scale[0].double().pow(-2))
        shares.append(positions / (height * width))
    share = torch.tensor(shares, dtype=torch.float64)[:, None]
    each = torch.stack(means)
    mean = (share * each).sum(0)
    variance = (share * (torch.stack(variances) + (each - mean).square())).sum(0)
    mean = mean.repeat_interleave(size) + near.double().flatten()
    return mean.to(upcast), variance.repeat_interleave(size).to(upcast)


def normalize(rows: Tensor, moments: Moments, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize rows of a picture (1, C, h, W) by moments of the whole, scale and shift -> same shape and dtype."""
    mean, variance = moments
    return F.batch_norm(rows, mean, variance, weight.to(mean.dtype), bias.to(mean.dtype), eps=eps)
