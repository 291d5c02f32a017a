"""Solvers of the flow, as generators of Steps, by name. `step.py` says what they are given.

One step of euler is one model call: 8 steps are 8 calls (older diffusers releases spent a ninth at sigma 0). Others,
which no model is published with, are in `multistep.py`, with rules that look back on earlier estimates of the image,
and in `corrected.py`.

Sources: diffusers' `FlowMatchEulerDiscreteScheduler` (euler, bit for bit); Karras et al. 2022 (heun).
"""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from s3dit.request import Convention, Solver
from s3dit.sampling import comfyui
from s3dit.sampling.corrected import res_2s, unipc
from s3dit.sampling.multistep import RULES, integrate
from s3dit.sampling.step import Keep, Noise, Step, Velocity, all_is_free, pairs

# Of solvers that call the model twice a step, but once in the last, to the image.
TWICE = ("heun", "res_2s")


def model_calls(solver: Solver, sigmas: Tensor) -> int:
    """Return how often a solver calls the model for these sigmas (n + 1,)."""
    n = len(sigmas) - 1
    return 2 * n - 1 if solver in TWICE else n


def solve(
    solver: Solver, velocity: Velocity, x: Tensor, sigmas: Tensor, noise: Noise, keep: Keep | None = None,
    convention: Convention = "own",
) -> Iterator[Step]:  # fmt: skip
    """Integrate the flow from x (tokens, 64) fp32 at sigmas[0] to sigmas[-1]; yields a Step after every step.

    sigmas (n + 1,) fp32 on the CPU, falling · noise: called by stochastic solvers (`multistep.STOCHASTIC`) only · keep:
    may put parts of the state back on their course after every step · convention: whose solver of that name.
    """
    own = {"euler": euler, "heun": heun, "res_2s": res_2s, "unipc": unipc}
    rules = RULES | comfyui.RULES if convention == "comfyui" else RULES
    run = own.get(solver) or partial(integrate, rules[solver], noise=noise)
    return run(velocity, x, sigmas, keep=keep or all_is_free)


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, keep: Keep = all_is_free) -> Iterator[Step]:
    """Integrate by Euler's method: x + (sigma - sigma_next)·v; the bits of FlowMatchEulerDiscreteScheduler."""
    n = len(sigmas) - 1
    for i, sigma, after in pairs(sigmas):
        v, start = velocity(x, sigma), x
        x = keep(x + (sigma - after) * v, i, after)
        yield Step(i, n, i, sigma.item(), after.item(), x, start, v)


def heun(velocity: Velocity, x: Tensor, sigmas: Tensor, keep: Keep = all_is_free) -> Iterator[Step]:
    """Integrate by Heun's method: the mean of the velocities at both ends of a step; the last, to 0, is Euler's."""
    n, calls = len(sigmas) - 1, 0
    for i, sigma, after in pairs(sigmas):
        v, start, calls = velocity(x, sigma), x, calls + 1
        x = keep(start + (sigma - after) * v, i, after)
        if after > 0:
            ahead, calls = velocity(x, after), calls + 1
            x = keep(start + (sigma - after) * (v + ahead) / 2, i, after)
        yield Step(i, n, calls, sigma.item(), after.item(), x, start, v)
