"""Solvers that ask the model again where a step has come to: in its middle, or at its end, where the next one asks.

Sources: Zhang et al. 2023, arXiv 2308.02157 (res_2s); Zhao et al. 2023, arXiv 2302.04867 (unipc).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from s3dit.sampling.multistep import Past, dpmpp_2m, log_snr, weight_of_change
from s3dit.sampling.step import Keep, Step, Velocity, all_is_free, pairs


def res_2s(velocity: Velocity, x: Tensor, sigmas: Tensor, keep: Keep = all_is_free) -> Iterator[Step]:
    """Integrate by RES, a second-order exponential Runge-Kutta method in -log sigma, with a call in the middle of it.

    The image is taken to be linear in -log sigma between both calls; the last step, to 0, is Euler's.
    """
    n, calls = len(sigmas) - 1, 0
    for i, sigma, after in pairs(sigmas):
        v, start, calls = velocity(x, sigma), x, calls + 1
        image, share = x + sigma * v, after / sigma
        if after == 0:
            x = keep(image, i, after)
        else:
            middle, half = (sigma * after).sqrt(), share.sqrt()
            # Where the model is asked, so that what is kept is on its course there too.
            between, calls = keep(half * x + (1 - half) * image, i, middle), calls + 1
            second = between + middle * velocity(between, middle)
            x = keep(share * x + (1 - share) * image + weight_of_change(share) * 2 * (second - image), i, after)
        yield Step(i, n, calls, sigma.item(), after.item(), x, start, v)


def unipc(velocity: Velocity, x: Tensor, sigmas: Tensor, keep: Keep = all_is_free) -> Iterator[Step]:
    """Integrate by UniPC of second order, B(h) = e^h - 1, in the log-SNR: DPM-Solver++ 2M, and each step corrected.

    The estimate of the image at the end of a step, which the next one needs anyway, corrects the state there: one call
    a step. The Steps hold what was predicted, of which the velocity was taken.
    """
    n, past, before = len(sigmas) - 1, Past(), x
    for i, sigma, after in pairs(sigmas):
        v, start = velocity(x, sigma), x
        image = x + sigma * v
        if past:
            x = keep(_corrected(x, before, sigma, image, past), i - 1, sigma)
        past.add(sigma, v, image)
        before, x = x, keep(dpmpp_2m(x, after, past), i, after)
        yield Step(i, n, i, sigma.item(), after.item(), x, start, v)


def _corrected(x: Tensor, before: Tensor, sigma: Tensor, image: Tensor, past: Past) -> Tensor:
    """Take the step from `before`, the state at the last level of the past, to sigma again, now with the image there.

    x: the state as it was predicted, which stays after a step from pure noise, infinitely far in log-SNR.
    """
    last = past[-1]
    h = log_snr(sigma) - log_snr(last.sigma)
    if not math.isfinite(h):
        return x
    weight, weight_before, change_before = 0.5, 0.0, torch.zeros_like(x)
    if len(past) > 1 and math.isfinite(ratio := (log_snr(past[-2].sigma) - log_snr(last.sigma)) / h):
        # What the change may be multiplied by so that it is exact if the image is linear, and quadratic, in log-SNR.
        grown = -math.expm1(-h)
        linear, quadratic = 1 / grown - 1 / h, (1 - 2 * (1 - grown / h) / h) / grown
        weight_before = (quadratic - linear) / (ratio - 1)
        weight = linear - weight_before
        change_before = (past[-2].image - last.image) / ratio
    share = sigma / last.sigma
    blend = last.image + weight * (image - last.image) + weight_before * change_before
    return share * before + (1 - share) * blend
