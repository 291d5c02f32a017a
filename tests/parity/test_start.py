"""Start images against diffusers' img2img and inpaint pipelines, fp32: conditioning latents, every step, pixels.

diffusers samples the autoencoder's answer from the generator that then draws the noise; the engine does so with
posterior "sample". Its default, the mode, is held against diffusers with that one sampling replaced.
Tolerance 1e-5 relative: both do the same operations on fp32; what differs is the order of sums in matrix products of
other shapes (packed against padded), some 1e-7 a block, and a timestep's last bit would show as 1e-6 to 5e-5.
"""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from s3dit.inputs.start_image import StartImage

PROMPTS = ["a red star above a blue ring on a white background", "a green circle"]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def photograph(height, width, seed=0):
    """Smooth noise with all colors."""
    levels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def blot(height, width):
    """A mask with round and straight edges that are no multiple of a cell."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray((((x - 50) ** 2 + (y - 40) ** 2 < 700) | (x > width - 21)).astype(np.uint8) * 255)


@pytest.fixture(scope="module")
def img2img(reference):
    pipe = diffusers.ZImageImg2ImgPipeline(**reference.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def inpaint(reference):
    pipe = diffusers.ZImageInpaintPipeline(**reference.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def mode(monkeypatch):
    """diffusers without the sample: the autoencoder's answer is its mode."""
    kind = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(kind, "sample", lambda self, generator=None: self.mode())


def theirs(pipe, blend=None, **options):
    """Latents after every step, and the pictures; `blend` may change latents after a step."""
    steps = []

    def after(pipe, i, t, values):
        latents = values["latents"] if blend is None else blend(i, values["latents"])
        steps.append(latents.clone())
        return {"latents": latents}

    # diffusers writes templated prompts into the caller's lists: it gets some of its own.
    options = {k: list(v) if isinstance(v, list) else v for k, v in options.items()}
    return steps, pipe(**options, output_type="np", callback_on_step_end=after).images


def compare(ours, pipe, seeds, blend=None, posterior="mode", **options):
    options = {"num_inference_steps": 5, "guidance_scale": 0.0} | options
    sources = [torch.Generator().manual_seed(s) for s in seeds]
    reference = {k: v for k, v in options.items() if k != "mask_mode" and not (blend and k == "mask_image")}
    steps, pictures = theirs(pipe, blend, generator=sources, **reference)
    options |= {"seed": seeds, "posterior": posterior, "composite": False}
    mine = [step.latents for step in ours.stream(**options)]
    assert len(mine) == len(steps)
    errors = [relative(torch.stack(a), b) for a, b in zip(mine, steps, strict=True)]
    assert max(errors) < 1e-5, errors
    for a, b in zip(ours(**options).images, pictures, strict=True):
        assert np.abs(np.asarray(a).astype(int) - (b * 255).round().astype(int)).max() <= 1


@pytest.mark.parametrize("posterior", ["mode", "sample"])
@pytest.mark.parametrize("strength", [0.2, 0.6, 0.79, 1.0])
@pytest.mark.sampled(2)
def test_img2img(ours, img2img, posterior, strength, request):
    if posterior == "mode":
        request.getfixturevalue("mode")
    compare(ours, img2img, [3], prompt=PROMPTS[:1], image=photograph(80, 112), strength=strength, posterior=posterior)


def test_img2img_by_default_and_of_a_size_that_is_cut(ours, img2img, mode):
    compare(ours, img2img, [3], prompt=PROMPTS[:1], image=photograph(93, 121))


@pytest.mark.parametrize("n", [1, 7, 9, 28])
@pytest.mark.parametrize("strength", [0.03, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.9, 1.0])
def test_steps_that_are_left(ours, img2img, n, strength):
    """The rule is in floats: 10 steps of strength 0.3 are 3 or 4 by the last bit of a product."""
    img2img.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / n, n).tolist(), mu=0.0)
    timesteps, left = img2img.get_timesteps(n, strength, "cpu")
    plan = ours.plan(prompt="a", image=photograph(64, 64), strength=strength, num_inference_steps=n)
    assert plan.calls == left == len(timesteps)
    assert torch.equal(torch.tensor(plan.sigmas[:-1]) * 1000, timesteps)


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_a_batch_with_an_image_each_and_guidance(ours, img2img, posterior, request):
    if posterior == "mode":
        request.getfixturevalue("mode")
    images = [photograph(80, 112, seed) for seed in range(2)]
    options = {"guidance_scale": 2.0, "cfg_normalization": 0.8, "negative_prompt": ["white", "black"]}
    compare(ours, img2img, [3, 8], prompt=PROMPTS, image=images, posterior=posterior, **options)


def test_a_tensor_is_not_rounded(ours, img2img, mode):
    exact = torch.rand(3, 80, 64, generator=torch.Generator().manual_seed(5))
    compare(ours, img2img, [3], prompt=PROMPTS[:1], image=exact)


@pytest.mark.parametrize("posterior", ["mode", "sample"])
@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.sampled(1)
def test_inpaint(ours, inpaint, posterior, strength, request):
    if posterior == "mode":
        request.getfixturevalue("mode")
    options = {"image": photograph(80, 112), "mask_image": blot(80, 112)}
    options |= {} if strength is None else {"strength": strength}
    compare(ours, inpaint, [3], prompt=PROMPTS[:1], posterior=posterior, **options)


def test_inpaint_with_guidance_two_masks_and_sizes_that_are_cut(ours, inpaint, mode):
    masks = [blot(90, 125), blot(90, 125).transpose(Image.Transpose.ROTATE_180)]
    images = [photograph(90, 125, seed) for seed in range(2)]
    # Without a size diffusers cuts the image itself, and then wants the mask at that size.
    compare(
        ours, inpaint, [3, 4], prompt=PROMPTS, image=images, mask_image=masks, height=80, width=112,
        guidance_scale=3.0, strength=0.8,
    )  # fmt: skip


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_conditioning_latents(ours, img2img, posterior):
    """The encoded image and its first state, of a shared generator and of one a picture."""
    images = [photograph(64, 96, seed) for seed in range(2)]
    pixels = img2img.image_processor.preprocess(images)

    def encoded(generator):
        answer = img2img.vae.encode(pixels).latent_dist
        z = answer.mode() if posterior == "mode" else answer.sample(generator)
        return (z - 0.1159) * 0.3611

    shared = [torch.Generator().manual_seed(7)] * 2
    mine = ours.encode_images(list(pixels), shared if posterior == "sample" else None)
    # 5e-6: one picture at a time against two, in a stack of convolutions
    assert relative(torch.stack(mine), encoded(torch.Generator().manual_seed(7))) < 5e-6


def differential(pipe, image, change, seed, n):
    """The rule of diffusers' community pipeline as a callback.

    Its map is white where the picture stays; at step i of the n that are left (from 0), what is whiter than i / n is
    put back, noised to the next level, except after the last.
    """
    pixels = pipe.image_processor.preprocess(image)
    white = torch.from_numpy(1 - np.asarray(change, np.float32) / 255)[None, None]
    latents = (pipe.vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611
    cells = torch.nn.functional.interpolate(white, size=latents.shape[-2:])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))

    def blend(i, x):
        if i == n - 1:
            return x
        level = pipe.scheduler.sigmas[pipe.scheduler.step_index]
        mask = (cells > i / n).float()
        return (level * noise + (1 - level) * latents) * mask + x * (1 - mask)

    return blend


@pytest.mark.parametrize("strength, n", [(1.0, 6), (0.5, 3)])
def test_differential(ours, img2img, mode, strength, n):
    image = photograph(80, 112)
    ramp = np.tile(np.linspace(0, 255, 112).astype(np.uint8), (80, 1))
    change = Image.fromarray(np.where(np.arange(80)[:, None] < 20, 0, ramp))
    options = {"prompt": PROMPTS[:1], "image": image, "strength": strength, "num_inference_steps": 6}
    blend = differential(img2img, image, change, 3, n)
    compare(ours, img2img, [3], blend, mask_image=change, mask_mode="differential", **options)


def test_composite_is_diffusers_overlay(ours, inpaint):
    """Where the mask is black the input's pixels are laid over, as diffusers' other inpaint pipelines do on request."""
    image, mask = photograph(80, 112), blot(80, 112)
    drawn = photograph(80, 112, 1)
    expected = inpaint.image_processor.apply_overlay(mask, image, drawn)
    pixels = [torch.from_numpy(np.array(one, dtype=np.float32) / 127.5 - 1).movedim(2, 0) for one in (image, drawn)]
    cut = torch.from_numpy(np.array(mask, dtype=np.float32) / 255)[None]
    found = StartImage(pixels[0], cut).over(pixels[1])
    assert np.array_equal(((found + 1) * 127.5).round().byte().movedim(0, 2).numpy(), np.asarray(expected))
