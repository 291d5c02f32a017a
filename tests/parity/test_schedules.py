"""Noise levels and single steps against diffusers' FlowMatchEulerDiscreteScheduler."""

import diffusers
import numpy as np
import pytest
import torch

from s3dit.sampler import euler, sigmas


def theirs(n, shift, **options):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **options)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / n, n).tolist())
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0, 2.7])
@pytest.mark.parametrize("n", [1, 4, 8, 9, 28, 50])
def test_official_levels_are_the_same_bits(n, shift):
    assert torch.equal(sigmas(n, shift), theirs(n, shift).sigmas)


@pytest.mark.parametrize("n", [2, 8, 30])
def test_karras(n):
    # 1e-6: the seventh root and power are taken in another precision
    assert torch.allclose(sigmas(n, 3.0, "karras"), theirs(n, 3.0, use_karras_sigmas=True).sigmas, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [2, 8, 30])
def test_beta(n):
    pytest.importorskip("scipy", reason="diffusers computes the beta schedule with scipy")
    # 1e-5: the quantile is read off a table of 200,000 sums
    assert torch.allclose(sigmas(n, 3.0, "beta"), theirs(n, 3.0, use_beta_sigmas=True).sigmas, rtol=1e-5, atol=1e-5)


def test_euler_s_steps_are_the_same_bits():
    scheduler, x = theirs(8, 3.0), torch.randn(1, 16, 8, 8)
    velocities = iter(torch.randn(8, 1, 16, 8, 8))
    steps = list(euler(lambda x, s: next(velocities), x, sigmas(8, 3.0)))
    y = x
    for t, step in zip(scheduler.timesteps, steps, strict=True):
        # their model output is minus ours
        y = scheduler.step(-step.velocity, t, y, return_dict=False)[0]
        assert torch.equal(step.x, y)
