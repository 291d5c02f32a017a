"""Whole pictures against diffusers' ZImagePipeline, fp32: every step's latents and the pixels.

Tolerance 1e-5 relative: both do the same operations on fp32; what differs is the order of sums in matrix products of
other shapes (packed against padded), some 1e-7 a block, and a timestep's last bit would show as 1e-6 to 5e-5.
"""

import numpy as np
import pytest
import torch

PROMPTS = ["a red star above a blue ring on a white background", "一只猫坐在雪地里 🦊", ""]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def theirs(reference, **options):
    """Latents after every step, and the pictures."""
    steps = []

    def keep(pipe, i, t, values):
        steps.append(values["latents"].clone())
        return {}

    # diffusers writes the templated prompt into the caller's list: it gets one of its own.
    options = {k: list(v) if isinstance(v, list) else v for k, v in options.items()}
    options = {"output_type": "np", "callback_on_step_end": keep} | options
    return steps, reference(**options).images


def compare(ours, reference, seeds, **options):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    steps, pictures = theirs(reference, generator=generators, **options)
    mine = [s.latents for s in ours.stream(seed=seeds, **options)]
    assert len(mine) == len(steps)
    for a, b in zip(mine, steps, strict=True):
        assert relative(torch.stack(a), b) < 1e-5
    drawn = ours(seed=seeds, **options).images
    for a, b in zip(drawn, pictures, strict=True):
        assert np.abs(np.asarray(a).astype(int) - (b * 255).round().astype(int)).max() <= 1


@pytest.mark.parametrize("prompt", [*PROMPTS, "a blue ring " * 300])
@pytest.mark.sampled(1)
def test_a_prompt(ours, reference, prompt):
    compare(ours, reference, [3], prompt=[prompt], height=128, width=128, num_inference_steps=4, guidance_scale=0.0)


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("size", [(80, 112), (144, 64)])
@pytest.mark.sampled(2)
def test_steps_and_odd_sizes(ours, reference, steps, size):
    compare(
        ours, reference, [5], prompt=PROMPTS[:1], height=size[0], width=size[1], num_inference_steps=steps,
        guidance_scale=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "guidance",
    [
        {"guidance_scale": 3.0},
        {"guidance_scale": 0.5, "negative_prompt": ["a black cross"]},
        {"guidance_scale": 4.0, "negative_prompt": ["white"], "cfg_normalization": True},
        {"guidance_scale": 4.0, "cfg_normalization": 0.7, "cfg_truncation": 0.6},
        {"guidance_scale": 3.0, "cfg_truncation": 0.6},
    ],
)
@pytest.mark.sampled(2)
def test_guidance(ours, reference, guidance):
    compare(ours, reference, [8], prompt=PROMPTS[:1], height=80, width=112, num_inference_steps=4, **guidance)


def test_ragged_batch_of_prompts(ours, reference):
    compare(ours, reference, [1, 2, 3], prompt=PROMPTS, height=96, width=128, num_inference_steps=4, guidance_scale=2.0)


def test_given_latents_and_sigmas(ours, reference):
    latents = torch.randn(1, 16, 16, 12, generator=torch.Generator().manual_seed(1))
    options = {"prompt": PROMPTS[:1], "latents": latents, "height": 128, "width": 96, "sigmas": [1.0, 0.7, 0.35]}
    steps, _ = theirs(reference, num_inference_steps=3, guidance_scale=0.0, **options)
    mine = [s.latents for s in ours.stream(guidance_scale=0.0, **options)]
    for a, b in zip(mine, steps, strict=True):
        assert relative(torch.stack(a), b) < 1e-5
