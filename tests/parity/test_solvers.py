"""Solvers step for step against diffusers' schedulers, on a flow whose velocity is known."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler

from s3dit.sampling.solvers import solve

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# What a flow to three points is to its velocity: bent, and different for every number.
POINTS = torch.tensor([-1.0, 0.3, 1.5], dtype=torch.float64)


def velocity(x, sigma):
    keep, sigma = 1 - sigma.double(), sigma.double()
    weights = torch.softmax(-((x[..., None] - keep * POINTS) ** 2) / (2 * (0.1 * keep**2 + sigma**2)), -1)
    return ((weights * POINTS).sum(-1) - x) / sigma


SCHEDULERS = {
    "unipc": lambda: UniPCMultistepScheduler(**FLOW, solver_order=2, solver_type="bh2"),
    "dpmpp_2m_sde": lambda: DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++", euler_at_final=False),
    "lcm": lambda: FlowMatchLCMScheduler(shift=3.0),
}


@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_every_step_is_diffusers(solver, n):
    """1e-6: diffusers holds log-SNRs in fp32 (seen: 2.1e-7)."""
    scheduler = SCHEDULERS[solver]()
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(1)
    x, *fresh = torch.randn(n + 1, 40, 64, generator=generator, dtype=torch.float64)
    sigmas, draws = scheduler.sigmas.double(), iter(fresh)
    steps = list(solve(solver, velocity, x, sigmas, lambda: next(draws)))
    # diffusers' LCM draws for itself: the same numbers, in the same order.
    own = torch.Generator().manual_seed(1)
    torch.randn(40, 64, generator=own, dtype=torch.float64)
    given = {
        "unipc": lambda i: {},
        "dpmpp_2m_sde": lambda i: {"variance_noise": fresh[i]},
        "lcm": lambda i: {"generator": own},
    }
    for i, step in enumerate(steps):
        x = scheduler.step(-velocity(x, sigmas[i]), scheduler.timesteps[i], x, return_dict=False, **given[solver](i))[0]
        assert ((step.x - x).norm() / x.norm()).item() < 1e-6
