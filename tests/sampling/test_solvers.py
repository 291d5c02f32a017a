"""Solvers on flows whose answer is known, levels against published values."""

import math
from typing import get_args

import pytest
import torch

from s3dit.request import Schedule, Solver
from s3dit.sampling.multistep import STOCHASTIC
from s3dit.sampling.schedules import sigmas
from s3dit.sampling.solvers import model_calls, solve

TURBO = [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]
BASE = [1, 0.976744, 0.947368, 0.909091, 0.857143, 0.782609, 0.666667, 0.461538, 0]
SOLVERS = get_args(Solver)


def run(solver, velocity, x, levels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(solve(solver, velocity, x, levels, lambda: torch.randn(x.shape, generator=generator)))


@pytest.mark.parametrize("shift, expected", [(3.0, TURBO), (6.0, BASE)])
def test_official_levels(shift, expected):
    assert torch.allclose(sigmas(8, shift), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("n", [1, 2, 8, 50])
def test_levels_fall_from_one_to_zero(schedule, n):
    levels = sigmas(n, 3.0, schedule)
    # TwinFlow's begin a thousandth below.
    first = torch.tensor(0.999 if schedule == "twinflow" else 1.0)
    assert len(levels) == n + 1 and levels[0] == first and levels[-1] == 0
    assert (levels[:-1] > levels[1:]).all()


@pytest.mark.parametrize(("n", "gap"), [(1, 0.5), (2, 0.6), (3, 0.5), (4, 0.5), (8, 0.5)])
def test_twinflow_s_levels(n, gap):
    """Its README: rfba_gap_steps [0.001, 0.5], of two steps [0.001, 0.6], by linspace; no shift changes them."""
    expected = [*(1 - torch.linspace(0.001, 1 - gap, n, dtype=torch.float64)).tolist(), 0.0]
    assert sigmas(n, 3.0, "twinflow").tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(sigmas(n, 6.0, "twinflow"), sigmas(n, 1.0, "twinflow"))


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


# Images are one number, of three Gaussians.
MEANS, WEIGHTS, SPREAD = torch.tensor([-1.0, 0.3, 1.5]).double(), torch.tensor([0.3, 0.5, 0.2]).double(), 0.35


def mixture(x, sigma):
    """The exact velocity to the mixture: (E[image | x] - x) / sigma."""
    keep, sigma = 1 - sigma.double(), sigma.double()
    variance, away = keep**2 * SPREAD**2 + sigma**2, x[..., None] - keep * MEANS
    weights = torch.softmax(WEIGHTS.log() - away**2 / (2 * variance), -1)
    return ((weights * (MEANS + keep * SPREAD**2 / variance * away)).sum(-1) - x) / sigma


def share_below(x, sigma):
    """Share of the states at sigma that are below x, which no state of the flow ever changes."""
    deviation = math.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
    return (WEIGHTS * torch.special.ndtr((x[..., None] - (1 - sigma) * MEANS) / deviation)).sum(-1)


def carried(x, start, end):
    """Where the flow carries x from one level to another, by bisection."""
    below, low, high = share_below(x, start), torch.full_like(x, -20), torch.full_like(x, 20)
    for _ in range(60):
        middle = (low + high) / 2
        short = share_below(middle, end) < below
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (low + high) / 2


ORDERS = {"euler": 1, "heun": 2, "dpmpp_2m": 2, "res_multistep": 2, "res_2s": 2, "unipc": 3}


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver):
    """Doubling the steps divides the error by 2 to the order, from sigma 0.9 to 0.1: at the ends rules are simpler.

    UniPC corrects what a second-order rule predicts, which makes it third order.
    """
    x = torch.linspace(-2, 2, 256, dtype=torch.float64).view(4, 64)
    errors = []
    for n in (64, 128):
        levels = torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64)
        errors.append((run(solver, mixture, x, levels)[-1].x - carried(x, 0.9, 0.1)).norm().item())
    assert abs(math.log2(errors[0] / errors[1]) - ORDERS[solver]) < 0.15


@pytest.mark.parametrize("solver", STOCHASTIC)
@pytest.mark.sampled(1)
def test_fresh_noise_leaves_the_mixture_s_own_variance(solver):
    """200 steps of even levels end at the images' mean 0.15 and deviation 0.946.

    lcm is for models that know the image at once: with exact velocities it ends at what is expected, too narrow.
    """
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    levels = torch.cat([torch.linspace(1, 0.01, 200, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    mean = (WEIGHTS * MEANS).sum()
    deviation = ((WEIGHTS * (MEANS**2 + SPREAD**2)).sum() - mean**2).sqrt()
    last = run(solver, mixture, x, levels)[-1].x
    other = run(solver, mixture, x, levels, seed=2)[-1].x
    assert abs(last.mean() - mean) < 0.03 and (last - other).std() > 0.3
    # 19,200 numbers have a deviation within 0.005; euler_ancestral is off by 0.01 at 200 steps
    assert abs(last.std() - deviation) < (0.25 if solver == "lcm" else 0.025)


def along(levels, image):
    """Solve a flow whose image is image(sigma), whatever the state, without noise -> the last state, from 0."""

    def velocity(x, sigma):
        return (image(sigma.double()) - x) / sigma.double()

    x, steps = torch.zeros(1, 64, dtype=torch.float64), torch.tensor(levels, dtype=torch.float64)
    return lambda solver: list(solve(solver, velocity, x, steps, lambda: x))[-1].x.mean()


def integral(values, points):
    """By the trapezoid rule, points falling."""
    return -torch.trapezoid(values, points)


def test_rules_are_exact_where_the_image_changes_as_they_assume():
    """Variation of constants in float64: x' = share·x0 + ∫ image, for a straight image in the rule's own measure."""
    levels = [0.9, 0.8, 0.6]
    fine = torch.linspace(0.9, 0.6, 200_001, dtype=torch.float64)
    straight = along(levels, lambda sigma: 2 - 3 * sigma.log())
    # dx/dsigma = (x - image)/sigma
    expected = 0.6 * integral((2 - 3 * fine.log()) / fine**2, fine)
    assert abs(straight("res_2s") / expected - 1) < 1e-9
    # A multistep rule's first step is Euler's, exact where the image stays the same in it.
    knee = math.log(0.8)
    bent = along(levels, lambda sigma: 2 - 3 * (sigma.log() - knee))
    first = (1 - 0.8 / 0.9) * (2 - 3 * (math.log(0.9) - knee))
    fine = torch.linspace(0.8, 0.6, 200_001, dtype=torch.float64)
    expected = 0.6 / 0.8 * first + 0.6 * integral((2 - 3 * (fine.log() - knee)) / fine**2, fine)
    assert abs(bent("res_multistep") / expected - 1) < 1e-9


def test_er_sde_is_its_own_integral():
    """Cui et al. 2023: y = φ(end)/φ(begin)·y0 + φ(end)·∫ φ'/φ²·image, y = x/(1 - sigma), by quadrature in float64.

    The image in it is the Taylor series at the begin, by differences of its last three estimates. 1e-4: the rule takes
    its integrals at 200 points.
    """
    levels = torch.tensor([0.9, 0.85, 0.8, 0.7], dtype=torch.float64)
    ratios = levels / (1 - levels)

    def image(ratio):
        return 1 + 0.5 * ratio - 0.2 * ratio**2

    def scale(ratio):
        return ratio * ((ratio**0.3).exp() + 10)

    def velocity(x, sigma):
        return (image(sigma / (1 - sigma)) - x) / sigma

    steps = list(solve("er_sde", velocity, torch.ones(1, 64).double(), levels, lambda: torch.zeros(1, 64)))
    first, second, begin, end = ratios
    slope, old_slope = ((image(b) - image(a)) / (b - a) for a, b in ((second, begin), (first, second)))
    bend = (slope - old_slope) / ((begin - first) / 2)
    fine = torch.linspace(begin.item(), end.item(), 200_001, dtype=torch.float64).requires_grad_()
    (growth,) = torch.autograd.grad(scale(fine).sum(), fine)
    fine = fine.detach()
    series = image(begin) + slope * (fine - begin) + bend / 2 * (fine - begin) ** 2
    y = scale(end) / scale(begin) * steps[1].x / (1 - levels[2])
    y = y + scale(end) * integral(growth / scale(fine) ** 2 * series, fine)
    assert (steps[2].x / ((1 - levels[3]) * y) - 1).abs().max() < 1e-4
