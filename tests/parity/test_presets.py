"""Presets diffusers and official against the programs themselves, where a batch shares one generator."""

import math
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from s3dit.inputs.start_image import remaining_sigmas
from s3dit.model.config import SchedulerConfig
from s3dit.notes import without_effect
from s3dit.request import Request
from s3dit.resolve import resolve
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model
from s3dit.sampling.solvers import solve

PROMPT = "a red star above a blue ring on a white background"
SIZE = {"height": 80, "width": 112}
MODEL = read_model(EMBEDDED)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def velocity(x, sigma):
    keys = torch.arange(x.numel(), dtype=torch.float64).view(x.shape).sin().to(x)
    return torch.tanh(1.3 * x * keys + sigma) + 0.4 * torch.tanh(x) * sigma


def plan(preset, n, **fields):
    request = resolve(Request(prompt="", preset=preset, num_inference_steps=n, **SIZE, **fields), MODEL)
    return request, remaining_sigmas(request, MODEL.scheduler)


@pytest.mark.parametrize("n", [*range(4, 61), 76, 122])
def test_trajectories_are_those_of_the_scheduler(n):
    """The same bits, with the sigmas that diffusers' pipeline gives its scheduler."""
    request, levels = plan("diffusers", n)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=diffusers.pipelines.z_image.pipeline_z_image.get_default_z_image_sigmas(n))
    assert torch.equal(levels, scheduler.sigmas)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(n))
    steps = solve(request.solver, velocity, x, levels, torch.Tensor, None, request.convention)
    for t, sigma, step in zip(scheduler.timesteps, levels, steps, strict=False):
        x = scheduler.step(-velocity(x, sigma), t, x, return_dict=False)[0]
        assert torch.equal(step.x, x)


@pytest.mark.parametrize("n", [*range(4, 61), 76, 122])
def test_the_official_sigmas_and_steps(n):
    """The official `src/zimage/scheduler.py`, its sigma_min set to 0 by `pipeline.py`: 1 - i/n, shifted; Euler.

    1e-6 for sigmas, which it rounds to fp32 once and the engine as diffusers does; 1e-5 for a state of fp32.
    """
    request, levels = plan("official", n)
    even = np.linspace(1000.0, 0.0, n + 1)[:-1] / 1000
    expected = np.append(3.0 * even / (1 + 2.0 * even), 0.0)
    assert np.abs(levels.numpy() - expected).max() < 1e-6
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    steps = list(solve(request.solver, velocity, x.float(), levels, torch.Tensor, None, request.convention))
    for sigma, after in zip(expected[:-1], expected[1:], strict=True):
        # Its model output is minus the velocity.
        x = x + (after - sigma) * -velocity(x, torch.tensor(sigma))
    assert relative(steps[-1].x, x) < 1e-5


@pytest.mark.slow
def test_a_batch_of_one_generator(ours, reference):
    """`generator=` one object, two pictures a prompt: 1e-5 as in test_pipeline."""
    options = {**SIZE, "num_inference_steps": 4, "guidance_scale": 2.0, "num_images_per_prompt": 2}
    theirs = reference(prompt=[PROMPT], generator=torch.Generator().manual_seed(3), output_type="latent", **options)
    for preset in ("diffusers", "official"):
        mine = ours(prompt=PROMPT, preset=preset, seed=3, output_type="latent", **options).latents
        assert relative(torch.stack(mine), theirs.images) < 1e-5


def test_a_batch_from_one_start_image(ours, reference):
    """One sample of the image's posterior for all, then the noise of the batch, from one generator."""
    pipe = diffusers.ZImageImg2ImgPipeline(**reference.components)
    pipe.set_progress_bar_config(disable=True)
    colors = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    image = Image.fromarray(colors).resize((112, 80), Image.Resampling.BICUBIC)
    options = {"image": image, "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 0.0}
    theirs = pipe(
        prompt=[PROMPT], generator=torch.Generator().manual_seed(3), num_images_per_prompt=2, output_type="latent",
        **SIZE, **options,
    )  # fmt: skip
    mine = ours(prompt=PROMPT, preset="diffusers", seed=3, num_images_per_prompt=2, output_type="latent", **options)
    assert relative(torch.stack(mine.latents), theirs.images) < 1e-5


# The spacings of a model with dynamic shifting, from its time shift of even or of training sigmas, in float64.
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(
    "schedule", ["simple", "sgm_uniform", "kl_optimal", "exponential", "linear_quadratic", "bong_tangent"]
)
@pytest.mark.parametrize("n", [2, 5, 28])
def test_dynamic_shift_and_schedules(kind, schedule, n):
    """diffusers' `calculate_shift` and `time_shift`, re-derived; spacings that no shift changes say nothing of it."""
    said = {"shift": 3.0, "use_dynamic_shifting": True, "time_shift_type": kind}
    config = replace(MODEL, scheduler=SchedulerConfig.from_json(said, "scheduler_config.json"))
    request = resolve(Request(prompt="", height=512, width=768, num_inference_steps=n, schedule=schedule), config)
    found = remaining_sigmas(request, config.scheduler).double().numpy()
    mu = 0.5 + (1.15 - 0.5) * (512 * 768 / 256 - 256) / (4096 - 256)
    strength = math.exp(mu) if kind == "exponential" else mu

    def shifted(u):
        return strength / (strength + 1 / u - 1)

    even, i = shifted(1 - np.arange(n) / n), np.arange(n)
    low, high, least = even[-1], even[0], shifted(0.001)
    ramp = i / (n - 1)
    expected = {
        "simple": lambda: shifted((1000 - np.floor(i * 1000 / n)) / 1000),
        "sgm_uniform": lambda: shifted(1 + i / n * (least - 1)),
        "kl_optimal": lambda: np.tan(ramp * np.arctan(low) + (1 - ramp) * np.arctan(high)),
        "exponential": lambda: np.exp(ramp * np.log(low) + (1 - ramp) * np.log(high)),
    }
    if schedule in expected:
        assert np.abs(found - np.append(expected[schedule](), 0)).max() < 1e-6
    else:
        plain = resolve(replace(request, shift=7.0), MODEL)
        assert np.array_equal(found, remaining_sigmas(plain).double().numpy())
    # A shift that nobody gave is not said to have no effect.
    assert not any("shift" in note for note in without_effect(request, SimpleNamespace(config=config)))
