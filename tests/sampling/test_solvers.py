"""Solvers on flows whose answer is known, levels against published values."""

import math

import pytest
import torch

from s3dit.sampling.schedules import sigmas
from s3dit.sampling.solvers import model_calls, solve

TURBO = [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]
BASE = [1, 0.976744, 0.947368, 0.909091, 0.857143, 0.782609, 0.666667, 0.461538, 0]
SOLVERS = ["euler", "heun", "dpmpp_2m", "euler_ancestral"]


def run(solver, velocity, x, levels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(solve(solver, velocity, x, levels, lambda: torch.randn(x.shape, generator=generator)))


@pytest.mark.parametrize("shift, expected", [(3.0, TURBO), (6.0, BASE)])
def test_official_levels(shift, expected):
    assert torch.allclose(sigmas(8, shift), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("schedule", ["official", "simple", "beta", "karras"])
@pytest.mark.parametrize("n", [1, 2, 8, 50])
def test_levels_fall_from_one_to_zero(schedule, n):
    levels = sigmas(n, 3.0, schedule)
    assert len(levels) == n + 1 and levels[0] == 1 and levels[-1] == 0
    assert (levels[:-1] > levels[1:]).all()


def test_explicit_levels_are_shifted_and_ended():
    assert torch.equal(sigmas(2, 1.0, explicit=[1.0, 0.5, 0.0]), torch.tensor([1.0, 0.5, 0.0]))
    assert torch.allclose(sigmas(2, 3.0, explicit=[1.0, 0.5]), torch.tensor([1.0, 0.75, 0.0]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_flow_is_solved_exactly(solver):
    """All noise goes to one image: the velocity at (x, sigma) is (image - x)/sigma, the first image is the last."""
    image = torch.randn(40, 64)
    steps = run(solver, lambda x, s: (image - x) / s, torch.randn(40, 64), sigmas(6, 3.0))
    assert torch.allclose(steps[-1].x, image, atol=1e-5)
    assert torch.allclose(steps[0].start + steps[0].sigma * steps[0].velocity, image, atol=1e-5)
    assert steps[-1].calls == model_calls(solver, sigmas(6, 3.0))
    assert [s.i for s in steps] == list(range(1, 7))


def gaussian(x, sigma):
    """The exact velocity where images are N(0, s²): E[image - noise | x]."""
    s2 = 0.25
    keep = 1 - sigma
    return (keep * s2 - sigma) / (keep**2 * s2 + sigma**2) * x


def spread(sigma):
    """Deviation of the state at sigma in that flow; a state moves in proportion to it."""
    return math.sqrt((1 - sigma) ** 2 * 0.25 + sigma**2)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(solver, order):
    """Doubling the steps divides the error by 2 to the order (away from both ends, where steps are first order)."""
    errors = []
    for n in (32, 64):
        levels = torch.linspace(0.95, 0.05, n + 1, dtype=torch.float64)
        last = run(solver, gaussian, torch.ones(1, 64, dtype=torch.float64), levels)[-1].x
        errors.append((last - spread(0.05) / spread(0.95)).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2


def test_ancestral_keeps_the_flow_s_own_variance():
    """Starting from noise of the right size, fresh noise must leave N(0, 0.25), not burn it."""
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    last = run("euler_ancestral", gaussian, x, sigmas(100, 1.0))[-1].x
    assert abs(last.std().item() - 0.5) < 0.02
    other = run("euler_ancestral", gaussian, x, sigmas(100, 1.0), seed=2)[-1].x
    assert (last - other).std() > 0.3
