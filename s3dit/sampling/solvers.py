"""Solvers of the flow, as generators of Steps.

The flow goes from sigma 1 (noise) to 0 (image); the state is x = (1 - sigma)·image + sigma·noise, and the model's
velocity v points from noise to image, so that its estimate of the image is x + sigma·v. A solver knows a function
`velocity(x, sigma)` and nothing else: not guidance, not text, not shapes. The state is one flat fp32 tensor of patches
(tokens, 64) for all pictures together; every solver here is element-wise, so pictures do not see each other. The one
thing from outside is `keep`, which has the state after every step and may put parts of it back on a course of theirs.

One step of euler is one model call: 8 steps are 8 calls (older diffusers releases spent a ninth at sigma 0).

Sources: diffusers' `FlowMatchEulerDiscreteScheduler` (euler, bit for bit); Karras et al. 2022 (heun); Lu et al. 2022
(DPM-Solver++ 2M, with log-SNR log((1 - sigma)/sigma)).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from s3dit.model.layout import unpatchify
from s3dit.request import Solver

# velocity(x (tokens, 64) fp32, sigma () fp32) -> (tokens, 64) fp32
Velocity = Callable[[Tensor, Tensor], Tensor]
# noise() -> (tokens, 64) fp32, fresh at every call
Noise = Callable[[], Tensor]
# keep(x (tokens, 64), i from 1, sigma after step i) -> x (tokens, 64)
Keep = Callable[[Tensor, int, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step of a solver: `i` of `n`, from 1, after `calls` model calls.

    x (tokens, 64) fp32: the state now, at `sigma_next` · start: the state at `sigma`, where `velocity` was taken ·
    grids: (rows, columns) of patches of every picture, filled in by the pipeline.
    """

    i: int
    n: int
    calls: int
    sigma: float
    sigma_next: float
    x: Tensor
    start: Tensor
    velocity: Tensor
    grids: tuple[tuple[int, int], ...] = ()

    @property
    def latents(self) -> list[Tensor]:
        """The state as latents, one fp32 (16, H/8, W/8) for each picture."""
        return split_latents(self.x, self.grids)

    @property
    def denoised(self) -> list[Tensor]:
        """The model's estimate of the image at this step, start + sigma · velocity, as latents: a preview."""
        return split_latents(self.start + self.sigma * self.velocity, self.grids)


def split_latents(x: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cut the flat state (tokens, 64) into latents, one (16, H/8, W/8) for each picture."""
    pieces = x.split([rows * columns for rows, columns in grids])
    return [unpatchify(piece, grid) for piece, grid in zip(pieces, grids, strict=True)]


def model_calls(solver: Solver, sigmas: Tensor) -> int:
    """Return how often a solver calls the model for these sigmas (n + 1,)."""
    n = len(sigmas) - 1
    return 2 * n - 1 if solver == "heun" else n


def all_is_free(x: Tensor, i: int, sigma: Tensor) -> Tensor:
    """Return x as it is: the `keep` of a request without a mask."""
    return x


def solve(
    solver: Solver, velocity: Velocity, x: Tensor, sigmas: Tensor, noise: Noise, keep: Keep | None = None
) -> Iterator[Step]:
    """Integrate the flow from x (tokens, 64) fp32 at sigmas[0] to sigmas[-1]; yields a Step after every step.

    sigmas (n + 1,) fp32 on the CPU, falling · noise: called by euler_ancestral only · keep: may put parts of the state
    back on their course after every step.
    """
    keep = keep or all_is_free
    if solver == "euler_ancestral":
        return euler_ancestral(velocity, x, sigmas, noise, keep)
    return {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}[solver](velocity, x, sigmas, keep)


def _pairs(sigmas: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (i, sigma, sigma_next) of every step, as fp32 scalars on the CPU."""
    return zip(range(1, len(sigmas)), sigmas[:-1], sigmas[1:], strict=True)


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, keep: Keep = all_is_free) -> Iterator[Step]:
    """Integrate by Euler's method: x + (sigma - sigma_next)·v; the bits of FlowMatchEulerDiscreteScheduler."""
    n = len(sigmas) - 1
    for i, sigma, after in _pairs(sigmas):
        v, start = velocity(x, sigma), x
        x = keep(x + (sigma - after) * v, i, after)
        yield Step(i, n, i, sigma.item(), after.item(), x, start, v)


def heun(velocity: Velocity, x: Tensor, sigmas: Tensor, keep: Keep = all_is_free) -> Iterator[Step]:
    """Integrate by Heun's method: the mean of the velocities at both ends of a step; the last, to 0, is Euler's."""
    n, calls = len(sigmas) - 1, 0
    for i, sigma, after in _pairs(sigmas):
        v, start, calls = velocity(x, sigma), x, calls + 1
        x = keep(start + (sigma - after) * v, i, after)
        if after > 0:
            ahead, calls = velocity(x, after), calls + 1
            x = keep(start + (sigma - after) * (v + ahead) / 2, i, after)
        yield Step(i, n, calls, sigma.item(), after.item(), x, start, v)


def dpmpp_2m(velocity: Velocity, x: Tensor, sigmas: Tensor, keep: Keep = all_is_free) -> Iterator[Step]:
    """Integrate by DPM-Solver++ 2M: second order in the log-SNR, from the last two image estimates; one call a step.

    The first step has no history and the last one (to sigma 0) infinite length in log-SNR: both are first order.
    """
    n, old, old_h = len(sigmas) - 1, None, float("inf")
    for i, sigma, after in _pairs(sigmas):
        v, start = velocity(x, sigma), x
        image = x + sigma * v
        h = _log_snr(after) - _log_snr(sigma)
        blend = image
        if old is not None and np.isfinite(h) and np.isfinite(old_h):
            blend = image + (image - old) * (h / old_h / 2)
        share = after / sigma
        # (1 - after) - (1 - sigma)·after/sigma, which is 1 - after/sigma
        x = keep(share * x + (1 - share) * blend, i, after)
        old, old_h = image, h
        yield Step(i, n, i, sigma.item(), after.item(), x, start, v)


def _log_snr(sigma: Tensor) -> float:
    """log((1 - sigma) / sigma), -inf at noise, +inf at the image."""
    s = sigma.double().item()
    return float(np.inf) if s == 0 else float(-np.inf) if s == 1 else float(np.log((1 - s) / s))


def euler_ancestral(
    velocity: Velocity, x: Tensor, sigmas: Tensor, noise: Noise, keep: Keep = all_is_free
) -> Iterator[Step]:
    """Integrate by ancestral Euler: past the next sigma, then back up to it with fresh noise, mixed as the flow does.

    For a flow the image's weight is 1 - sigma, so after stepping down to `down` the state is scaled by
    (1 - after)/(1 - down) and the noise that is missing to variance after² is added. (The variance-exploding form,
    which adds noise without scaling, burns flow models.)
    """
    n = len(sigmas) - 1
    for i, sigma, after in _pairs(sigmas):
        v, start = velocity(x, sigma), x
        down = after * (after / sigma)
        x = x + (sigma - down) * v
        if after > 0:
            scale = (1 - after) / (1 - down)
            x = scale * x + (after**2 - (scale * down) ** 2).sqrt() * noise()
        x = keep(x, i, after)
        yield Step(i, n, i, sigma.item(), after.item(), x, start, v)
