"""Noise levels and single steps against diffusers' FlowMatchEulerDiscreteScheduler."""

from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas

from s3dit.inputs.start_image import InpaintBlend, noised, remaining_sigmas
from s3dit.model.config import SchedulerConfig
from s3dit.request import Request
from s3dit.resolve import resolve
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model
from s3dit.sampling.schedules import sigmas
from s3dit.sampling.solvers import euler

MODEL = read_model(EMBEDDED)


def theirs(n, shift, **options):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **options)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(n))
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0, 2.7])
@pytest.mark.parametrize("n", [1, 4, 7, 8, 9, 28, 50])
def test_official_levels_are_the_same_bits(n, shift):
    assert torch.equal(sigmas(n, shift), theirs(n, shift).sigmas)


@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize("n", [1, 2, 8, 30])
def test_spacings_are_the_same_bits(n, name):
    assert torch.equal(sigmas(n, 3.0, name), theirs(n, 3.0, **{f"use_{name}_sigmas": True}).sigmas)


NUMBERS = {"base_shift": 0.4, "max_shift": 1.3, "base_image_seq_len": 64, "max_image_seq_len": 2048}


def said_by(said, height, width, **fields):
    """The levels that a scheduler_config.json gives a request here, and in ZImageImg2ImgPipeline's own steps."""
    config = SchedulerConfig.from_json(said, "scheduler_config.json")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(said)
    n, strength = fields.get("num_inference_steps", 8), fields.get("strength")
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(height * width // 256, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sigmas=fields.get("sigmas") or get_default_z_image_sigmas(n), mu=mu)
    found = scheduler.sigmas
    if strength is not None:
        theirs = SimpleNamespace(scheduler=scheduler)
        timesteps, _ = ZImageImg2ImgPipeline.get_timesteps(theirs, len(found) - 1, strength, "cpu")
        found = found[len(found) - 1 - len(timesteps) :]
    request = Request(prompt="", height=height, width=width, **fields, image=None if strength is None else "a.png")
    return remaining_sigmas(resolve(request, replace(MODEL, scheduler=config)), config), found


@pytest.mark.parametrize("size", [(128, 128), (512, 1024), (1024, 1024), (2048, 1536)])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("numbers", [{}, NUMBERS], ids=["diffusers' numbers", "others"])
@pytest.mark.parametrize("fields", [{}, {"num_inference_steps": 28}, {"strength": 0.6}, {"sigmas": [1.0, 0.7, 0.2]}])
def test_dynamic_shifting_is_the_same_bits(size, kind, numbers, fields):
    said = {"shift": 3.0, "use_dynamic_shifting": True, "time_shift_type": kind, **numbers}
    ours, found = said_by(said, *size, **fields)
    assert torch.equal(ours, found) and not torch.equal(ours, said_by({"shift": 3.0}, *size, **fields)[0])


@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_model_s_own_spacing_is_the_same_bits(spacing, dynamic):
    ours, found = said_by({"shift": 3.0, "use_dynamic_shifting": dynamic, spacing: True}, 512, 512)
    assert torch.equal(ours, found)


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
    keep = InpaintBlend(image, noise, paint, 5, False)
    velocities = iter(torch.randn(5, *image.shape))
    for i, step in enumerate(euler(lambda x, s: next(velocities), x, levels, keep)):
        x = scheduler.step(-step.velocity, timesteps[i], x, return_dict=False)[0]
        known = image if i == 4 else scheduler.scale_noise(image, timesteps[i + 1 : i + 2], noise)
        x = (1 - paint) * known + paint * x
        assert torch.equal(step.x, x)
