"""Solvers of one model call a step, each a rule: the state at the next level from the state and earlier estimates.

In -log sigma and in log-SNR the flow is a decay towards the image, x' = share·x + …, which these rules take exactly, so
that only the image has to be guessed between its estimates. Where a step is infinitely long in that measure, from pure
noise or to the image, and where the past is too short, a rule is first order.

Stochastic rules step past the next level, or halfway, and add noise up to it, in the proportions of the flow: image and
noise stay (1 - sigma) and sigma. (Forms for variance-exploding models, which add noise to a state that is not made
smaller, burn flow models, and are not here.)

Sources: Lu et al. 2022, arXiv 2211.01095 (dpmpp_2m, dpmpp_2m_sde); Zhang et al. 2023, arXiv 2308.02157 (res_multistep);
Cui et al. 2023, arXiv 2309.06169 (er_sde); Luo et al. 2023, arXiv 2310.04378 (lcm).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from s3dit.sampling.step import Keep, Noise, Step, Velocity, pairs

# Points of the integrals of er_sde.
POINTS = 200


class Estimate(NamedTuple):
    """What the model said at a level: sigma () fp32, velocity and image (tokens, 64)."""

    sigma: Tensor
    velocity: Tensor
    image: Tensor


class Past(list[Estimate]):
    """The last three estimates, the newest last."""

    def add(self, sigma: Tensor, velocity: Tensor, image: Tensor) -> None:
        """Add the newest estimate."""
        self.append(Estimate(sigma, velocity, image))
        del self[:-3]


# rule(x, sigma after the step, past, noise) -> the state there
Rule = Callable[[Tensor, Tensor, Past, Noise], Tensor]


def integrate(rule: Rule, velocity: Velocity, x: Tensor, sigmas: Tensor, noise: Noise, keep: Keep) -> Iterator[Step]:
    """Integrate the flow by a rule; arguments and Steps as those of `solvers.solve`."""
    n, past = len(sigmas) - 1, Past()
    for i, sigma, after in pairs(sigmas):
        v, start = velocity(x, sigma), x
        past.add(sigma, v, x + sigma * v)
        x = keep(rule(x, after, past, noise), i, after)
        yield Step(i, n, i, sigma.item(), after.item(), x, start, v)


def log_snr(sigma: Tensor) -> float:
    """Return log((1 - sigma) / sigma): -inf at noise, +inf at the image."""
    s = sigma.double().item()
    return float(np.inf) if s == 0 else float(-np.inf) if s == 1 else float(np.log((1 - s) / s))


def dpmpp_2m(x: Tensor, after: Tensor, past: Past, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++ 2M: the image in the middle of a step, in log-SNR, from its last two estimates."""
    sigma, _, image = past[-1]
    blend = image
    if len(past) > 1:
        h, old_h = log_snr(after) - log_snr(sigma), log_snr(sigma) - log_snr(past[-2].sigma)
        if np.isfinite(h) and np.isfinite(old_h):
            blend = image + (image - past[-2].image) * (h / old_h / 2)
    share = after / sigma
    # (1 - after) - (1 - sigma)·after/sigma, which is 1 - after/sigma
    return share * x + (1 - share) * blend


def dpmpp_2m_sde(x: Tensor, after: Tensor, past: Past, noise: Noise) -> Tensor:
    """DPM-Solver++ 2M of the stochastic flow with eta 1 (midpoint): noise of every step is replaced by fresh noise."""
    sigma, _, image = past[-1]
    if after == 0:
        return image
    h = log_snr(after) - log_snr(sigma)
    decay = math.exp(-h)
    blend = image
    if len(past) > 1 and np.isfinite(old_h := log_snr(sigma) - log_snr(past[-2].sigma)):
        blend = image + (image - past[-2].image) * (h / old_h / 2)
    fresh = 1 - decay**2
    return after / sigma * decay * x + (1 - after) * fresh * blend + after * math.sqrt(fresh) * noise()


def res_multistep(x: Tensor, after: Tensor, past: Past, noise: Noise | None = None, stretch: float = 1.0) -> Tensor:
    """RES multistep: the image is linear in -log sigma through its last two estimates, `stretch` times as far apart."""
    sigma, _, image = past[-1]
    share = after / sigma
    x = share * x + (1 - share) * image
    if len(past) == 1 or after == 0:
        return x
    h, old_h = -math.log(share), stretch * math.log(past[-2].sigma / sigma)
    return x + weight_of_change(share) * h / old_h * (image - past[-2].image)


def weight_of_change(share: Tensor) -> float:
    """Return what a step in -log sigma adds of the image's change over it, where the state keeps `share` of itself.

    It is h·φ2(-h), h = -log share: 1/2 h for a short step.
    """
    kept = share.double().item()
    return 1 + (1 - kept) / math.log(kept)


def euler_ancestral(x: Tensor, after: Tensor, past: Past, noise: Noise) -> Tensor:
    """Euler past the next level, then back up to it with fresh noise."""
    sigma, v, _ = past[-1]
    down = after * (after / sigma)
    return _raised(x + (sigma - down) * v, down, after, noise)


def res_multistep_ancestral(x: Tensor, after: Tensor, past: Past, noise: Noise) -> Tensor:
    """RES multistep past the next level, then back up to it with fresh noise.

    Steps go twice as far as the levels lie apart, and so, as in ComfyUI, does the distance of the estimates: with the
    real one the change of the image would be continued too far for few steps.
    """
    down = after * (after / past[-1].sigma)
    return _raised(res_multistep(x, down, past, stretch=2.0), down, after, noise)


def _raised(x: Tensor, down: Tensor, after: Tensor, noise: Noise) -> Tensor:
    """Raise a state at the level `down` to `after`.

    For a flow the image's weight is 1 - sigma, so the state is scaled by (1 - after)/(1 - down) and the noise that is
    missing to variance after² is added.
    """
    if after == 0:
        return x
    scale = (1 - after) / (1 - down)
    return scale * x + (after**2 - (scale * down) ** 2).sqrt() * noise()


def lcm(x: Tensor, after: Tensor, past: Past, noise: Noise) -> Tensor:
    """The image, and fresh noise: what consistency and few-step models are trained for."""
    image = past[-1].image
    return image if after == 0 else (1 - after) * image + after * noise()


def er_sde(x: Tensor, after: Tensor, past: Past, noise: Noise, middle: float = 0.5) -> Tensor:
    """ER-SDE-Solver-3 in lambda = sigma / (1 - sigma), with noise scale φ = lambda·(exp(lambda^0.3) + 10).

    The image is quadratic in lambda through its last three estimates, as far as they are: from pure noise, where lambda
    is infinite, nothing is known of its change. middle: where in their POINTS pieces integrals are taken, 0 to 1 from
    the end of the step.
    """
    if after == 0:
        return past[-1].image
    levels = [_noise_ratio(each.sigma) for each in past]
    end, begin = _noise_ratio(after), levels[-1]
    scale = _noise_scale(end)
    kept = 0.0 if begin == math.inf else scale / _noise_scale(begin)
    # In units of the image: the state over 1 - sigma, whose noise has deviation lambda.
    image = past[-1].image
    whole = (1 - kept) * image
    if begin < math.inf:
        whole = whole + kept * (1 + begin) * x
    h = end - begin
    at = end + (np.arange(POINTS) + middle) * (-h / POINTS)
    if len(past) > 1 and levels[-2] < math.inf:
        density = 1 / np.array([_noise_scale(each) for each in at]) * (-h / POINTS)
        slope = (image - past[-2].image) / (begin - levels[-2])
        whole = whole + (h + scale * density.sum()) * slope
        if len(past) > 2 and levels[-3] < math.inf:
            old_slope = (past[-2].image - past[-3].image) / (levels[-2] - levels[-3])
            bend = (slope - old_slope) / ((begin - levels[-3]) / 2)
            whole = whole + (h**2 / 2 + scale * ((at - begin) * density).sum()) * bend
    left = 0.0 if begin == math.inf else begin * kept
    return (1 - after) * (whole + math.sqrt(end**2 - left**2) * noise())


def _noise_ratio(sigma: Tensor) -> float:
    """Noise over image: sigma / (1 - sigma), infinite at noise."""
    s = sigma.double().item()
    return math.inf if s == 1 else s / (1 - s)


def _noise_scale(ratio: float) -> float:
    return float(ratio * (math.exp(ratio**0.3) + 10))


RULES: dict[str, Rule] = {
    "dpmpp_2m": dpmpp_2m, "euler_ancestral": euler_ancestral, "res_multistep": res_multistep,
    "res_multistep_ancestral": res_multistep_ancestral, "dpmpp_2m_sde": dpmpp_2m_sde, "er_sde": er_sde, "lcm": lcm,
}  # fmt: skip
# Solvers that draw noise.
STOCHASTIC = ("euler_ancestral", "res_multistep_ancestral", "dpmpp_2m_sde", "er_sde", "lcm")
