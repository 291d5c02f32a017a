"""Whole pictures with references against diffusers' ZImageOmniPipeline, fp32: conditioning, every step, the pixels.

diffusers rounds the references' pixels to bf16 whatever it computes in, and then fails on an fp32 autoencoder; here
that one cast is taken out of it, so that both sides are fp32 throughout.

Tolerance 1e-5 relative, as for text-to-image: the same fp32 operations in matrix products of other shapes.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit import Pipeline, Region
from s3dit.inputs.images import Pictures
from s3dit.inputs.references import read
from s3dit.request import Request

PROMPTS = ["make it a red star on a white background", "a blue ring"]


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


# Not multiples of 16: they are cut; of several shapes.
REFERENCES = [picture(80, 119, 1), picture(97, 64, 2), picture(70, 150, 3)]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(autouse=True)
def really_fp32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)


def theirs(reference, seeds, images, **options):
    """Latents after every step, and the pictures."""
    steps = []

    def keep(pipe, i, t, values):
        steps.append(values["latents"].clone())
        return {}

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {k: list(v) if isinstance(v, list) else v for k, v in options.items()}
    drawn = reference(
        image=images or None, generator=generators, output_type="np", callback_on_step_end=keep, **options
    ).images
    return steps, drawn


def compare(omni, reference, seeds, images, **options):
    steps, pictures = theirs(reference, seeds, images, **options)
    mine = [step.latents for step in omni.stream(seed=seeds, reference=images, **options)]
    assert len(mine) == len(steps)
    for a, b in zip(mine, steps, strict=True):
        assert relative(torch.stack(a), b) < 1e-5
    drawn = omni(seed=seeds, reference=images, **options).images
    for a, b in zip(drawn, pictures, strict=True):
        assert np.abs(np.asarray(a).astype(int) - (b * 255).round().astype(int)).max() <= 1


@pytest.mark.parametrize("guidance", [0.0, 2.5])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.sampled(2)
def test_references(omni, omni_reference, n, guidance):
    """The size is the last reference's where there is one."""
    options = {} if n else {"height": 80, "width": 112}
    compare(
        omni, omni_reference, [3], REFERENCES[:n], prompt=PROMPTS[:1], num_inference_steps=3, guidance_scale=guidance,
        **options,
    )  # fmt: skip


@pytest.mark.slow
def test_another_size_than_the_reference(omni, omni_reference):
    """And a reference so large that it is scaled to the picture's area."""
    compare(
        omni, omni_reference, [4], [picture(1100, 1000, 5), REFERENCES[1]], prompt=PROMPTS[:1], height=96, width=144,
        num_inference_steps=2, guidance_scale=3.0, negative_prompt=["a black cross"], cfg_normalization=0.9,
    )  # fmt: skip


@pytest.mark.slow
def test_a_batch_of_prompts(omni, omni_reference):
    compare(
        omni, omni_reference, [1, 2], REFERENCES[:2], prompt=PROMPTS, num_inference_steps=2, guidance_scale=2.0,
        cfg_truncation=0.5,
    )  # fmt: skip


@torch.inference_mode()
def test_what_the_model_reads_of_a_reference(omni, omni_reference):
    """Conditioning latents and features, apart."""
    _, rows = read(Request(prompt="x", reference=REFERENCES), omni.config, omni.folder, Pictures(), [])
    looks = omni.look(rows[0])
    cut = [
        omni_reference.image_processor.preprocess(
            one, height=one.height // 16 * 16, width=one.width // 16 * 16, resize_mode="crop"
        )
        for one in REFERENCES
    ]
    latents = omni_reference.prepare_image_latents(cut, 1, "cpu", torch.float32)[0]
    seen = omni_reference.prepare_siglip_embeds(REFERENCES, 1, "cpu", torch.float32)[0]
    patchify = omni_reference.transformer._patchify_image
    for one, look, pixels, a, b in zip(rows[0], looks, cut, latents, seen, strict=True):
        assert torch.equal(one.pixels, pixels[0])
        assert relative(look.patches, patchify(a, 2, 1)[0]) < 1e-5
        assert one.seen == b.shape[:2]
        assert relative(look.features, b.permute(2, 0, 1).reshape(look.features.shape)) < 1e-5


@pytest.mark.parametrize(
    ("size", "asked"), [((1500, 900), {}), ((1024, 1024), {}), ((1100, 1300), {"height": 2048, "width": 512})]
)
def test_large_references_are_scaled_as_theirs(omni, omni_reference, size, asked):
    image, processor = picture(*size), omni_reference.image_processor
    area = asked["height"] * asked["width"] if asked else 1024 * 1024
    scaled = processor._resize_to_target_area(image, area) if size[0] * size[1] > 1024 * 1024 else image
    height, width = scaled.height // 16 * 16, scaled.width // 16 * 16
    wanted = Request(prompt="x", reference=image, **asked)
    request, rows = read(wanted, omni.config, omni.folder, Pictures(), [])
    expected = processor.preprocess(scaled, height=height, width=width, resize_mode="crop")[0]
    assert torch.equal(rows[0][0].pixels, expected)
    assert (request.height[0], request.width[0]) == (asked.get("height", height), asked.get("width", width))
    given = omni_reference.siglip_processor(images=[scaled], return_tensors="pt")
    assert torch.equal(rows[0][0].patches, given.pixel_values[0, : len(rows[0][0].patches)])


@pytest.mark.slow
def test_each_prompt_with_its_own_references(omni):
    """One, none, three and two of them, in one pass, are what they are alone; diffusers has no such batch."""
    prompts = [*PROMPTS, "a green circle", ""]
    rows = [REFERENCES[:1], [], REFERENCES, REFERENCES[1:]]
    sizes = {"height": [80, 96, 64, 112], "width": [64, 80, 112, 64]}
    options = {"num_inference_steps": 2, "guidance_scale": 1.5, "output_type": "latent"}
    together = omni(prompt=prompts, reference=rows, seed=[1, 2, 3, 4], **sizes, **options).latents
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        size = {name: values[i] for name, values in sizes.items()}
        alone = omni(prompt=prompt, reference=row or None, seed=i + 1, **size, **options).latents[0]
        assert relative(together[i], alone) < 1e-5


def test_regions_with_references(omni):
    """Halves of one prompt are the prompt, each picture with its own references, none included."""
    options = {"num_inference_steps": 2, "guidance_scale": 1.5, "output_type": "latent", "seed": [1, 2, 3]}
    options |= {"reference": [REFERENCES[:2], [], REFERENCES[:1]], "height": 64, "width": 96}
    prompts = [*PROMPTS, PROMPTS[0]]
    whole = omni(prompt=prompts, **options).latents
    halves = [[Region((0, 0, 0.5, 1), prompt), Region((0.5, 0, 0.5, 1), prompt)] for prompt in prompts[:2]]
    split = omni(prompt=prompts, region=[*halves, None], **options).latents
    assert max(relative(a, b) for a, b in zip(split, whole, strict=True)) < 1e-5


def test_intended_positions_are_another_picture(omni):
    options = {"prompt": PROMPTS[0], "reference": REFERENCES[:1], "seed": 1, "num_inference_steps": 1}
    released, intended = (
        omni(reference_positions=rule, output_type="latent", **options).latents[0] for rule in ("released", "intended")
    )
    assert relative(intended, released) > 1e-4


def test_staged_streamed_and_budgeted_are_the_same(omni_dir):
    options = {"prompt": PROMPTS[0], "reference": REFERENCES[:2], "seed": 1, "num_inference_steps": 1}
    answers = []
    for kind in ({"residency": "resident"}, {"residency": "staged"}, {"residency": "streamed"}, {"vram": "24MiB"}):
        pipe = Pipeline.load(omni_dir, device="cpu", dtype="fp32", **kind)
        answers.append(pipe(output_type="latent", **options).latents[0])
        stages = [(stage.part, stage.work) for stage in pipe.plan(**options).stages]
        # what was looked at once is not looked at again
        assert [part for part, _ in stages] == ["transformer", "vae"]
    assert all(torch.equal(answer, answers[0]) for answer in answers[1:])
