"""Noise levels and single steps against diffusers' FlowMatchEulerDiscreteScheduler."""

import diffusers
import pytest
import torch
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from s3dit.conditioning import Keep, noised
from s3dit.sampler import euler, sigmas


def theirs(n, shift, **options):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **options)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(n))
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0, 2.7])
@pytest.mark.parametrize("n", [1, 4, 7, 8, 9, 28, 50])
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


def test_a_start_image_and_what_is_kept_are_the_same_bits():
    """The scheduler's own mixture to start from, and after each step the inpaint pipeline's blend with it."""
    scheduler, levels = theirs(8, 3.0), sigmas(8, 3.0)[3:]
    image, noise = torch.randn(2, 1, 16, 8, 8)
    paint = (torch.rand(1, 1, 8, 8) > 0.5).float().expand_as(image)
    timesteps = scheduler.timesteps[3:]
    scheduler.set_begin_index(3)
    x = scheduler.scale_noise(image, timesteps[:1], noise)
    assert torch.equal(noised(image, noise, levels[0]), x)
    keep = Keep(image, noise, paint, 5, False)
    velocities = iter(torch.randn(5, *image.shape))
    for i, step in enumerate(euler(lambda x, s: next(velocities), x, levels, keep)):
        x = scheduler.step(-step.velocity, timesteps[i], x, return_dict=False)[0]
        known = image if i == 4 else scheduler.scale_noise(image, timesteps[i + 1 : i + 2], noise)
        x = (1 - paint) * known + paint * x
        assert torch.equal(step.x, x)
