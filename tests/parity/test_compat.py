"""`compat="diffusers"` against diffusers' own pipelines in fp32, and what differs without it: s3dit/DIFFERENCES.md.

A case is a call of diffusers with its own defaults, and the same request here with `compat`, and with what one switch
of it undoes. With it the latents are within 1e-5 relative, as whole pictures are everywhere in this folder (the same
fp32 operations in products of other shapes); with the switch undone they are away by what the page says, to two digits.
"""

import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from s3dit import Control
from s3dit.errors import RequestError

PROMPT = "a red star above a blue ring on a white background"
SIZE = {"height": 80, "width": 112}
STEPS = {"num_inference_steps": 4, "guidance_scale": 0.0}
PAGE = (Path(__file__).resolve().parents[2] / "s3dit" / "DIFFERENCES.md").read_text(encoding="utf-8")


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def photograph(height=80, width=112, seed=0):
    """Smooth noise of all colors."""
    levels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def blot(height, width):
    """A mask with straight edges that are no multiple of a cell, in proportion to its size."""
    levels = np.zeros((height, width), np.uint8)
    levels[height // 5 : height * 3 // 4, width // 3 : width * 5 // 6] = 255
    return Image.fromarray(levels)


def noise(seed, count=1):
    return torch.randn(count, 16, 10, 14, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def control(randomized, tmp_path_factory):
    """(diffusers' ControlNet 2.1, the folder that it writes)."""
    model = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 2], control_refiner_layers_places=[0, 1], control_in_dim=33,
        add_control_noise_refiner="control_noise_refiner", dim=192, n_refiner_layers=2, n_heads=6, n_kv_heads=6,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("control") / "net"
    randomized(model, 7).save_pretrained(folder)
    return model, folder


@pytest.fixture
def bf16_pixels(monkeypatch):
    """diffusers' Omni pipeline in fp32, which as it is fails: pixels rounded to bf16, in the autoencoder's dtype."""
    rounded = torch.Tensor.bfloat16
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: rounded(self).to(self.dtype))


OWN = {"convention": "own"}
ONE = {"prompt": [PROMPT], "image": photograph(), "strength": 0.6}
INPAINT = {"prompt": [PROMPT], "image": photograph(), "mask_image": blot(80, 112)}
# Fields of a control are told from those of a request by their name.
STEER = {"prompt": [PROMPT], "control image": photograph(seed=2), **SIZE}
REFERENCES = {"prompt": [PROMPT], "reference": [photograph(80, 119, 1), photograph(97, 64, 2)]}
# What each case is, by the name that the page says it by: diffusers' pipeline, the fields of both sides, the seed of a
# generator or a list of them, and what undoes the one switch that the case is about.
CASES = {
    "a batch of one generator": ("", {"prompt": [PROMPT, "a blue ring"], "num_images_per_prompt": 2} | SIZE, 3, OWN),
    "a start image": ("Img2Img", ONE, 3, {"posterior": "mode"}),
    "a batch from one start image": ("Img2Img", ONE | {"num_images_per_prompt": 2}, 3, OWN),
    "an image each": ("Img2Img", ONE | {"prompt": [PROMPT, ""], "image": [photograph(), photograph(seed=1)]}, [3, 8],
                      {"posterior": "mode"}),
    "latents beside a start image": ("Img2Img", ONE | {"latents": noise(5)}, 3, OWN),
    "latents beside a mask": ("Inpaint", INPAINT | {"latents": noise(5)}, 3, OWN),
    "a mask": ("Inpaint", INPAINT, 3, {"posterior": "mode"}),
    "the rule of a ControlNet": ("ControlNet", STEER, 3, {"control rule": "authors"}),
    "the strength of a ControlNet": ("ControlNet", STEER, 3, {"control strength": 0.9}),
    "references": ("Omni", REFERENCES, 3, OWN),
    "positions of captions": ("Omni", REFERENCES, 3, {"reference_positions": "intended"}),
    "guidance below 1": ("", {"prompt": [PROMPT], "guidance_scale": 0.5} | SIZE, 3, {"guidance_scale": 0.0}),
}  # fmt: skip
# What would be refused here without it, and the words of the refusal.
REFUSED = {
    "a mask of another size": ("Inpaint", INPAINT | {"mask_image": blot(40, 56)}, "needed the size of"),
    "a ControlNet's mask of another size": (
        "ControlNetInpaint", STEER | {"control inpaint": photograph(), "control mask": blot(40, 56)},
        "needed the size of",
    ),
}  # fmt: skip
# Where both do the same, although one reads it as a difference.
SAME = {
    "cfg_truncation above 1": {"guidance_scale": 2.0, "cfg_truncation": 1.5},
    "cfg_truncation of 1": {"guidance_scale": 2.0, "cfg_truncation": 1.0},
    "an empty prompt": {"prompt": [""]},
    "a long prompt": {"prompt": ["a blue ring " * 300]},
}


@pytest.fixture
def theirs(request):
    """Latents, or with output_type np pictures, of a pipeline of diffusers."""

    def call(kind, fields, seeds):
        pipe = request.getfixturevalue("omni_reference" if kind == "Omni" else "reference")
        if kind == "Omni":
            request.getfixturevalue("bf16_pixels")
        else:
            net = {"controlnet": request.getfixturevalue("control")[0]} if kind.startswith("ControlNet") else {}
            pipe = getattr(diffusers, f"ZImage{kind}Pipeline")(**pipe.components, **net)
            pipe.set_progress_bar_config(disable=True)
        names = {"control image": "control_image", "control inpaint": "image", "control mask": "mask_image",
                 "reference": "image"}  # fmt: skip
        # It writes into the lists that it is given.
        given = {names.get(k, k): list(v) if isinstance(v, list) else v for k, v in fields.items()}
        made = [torch.Generator().manual_seed(seed) for seed in np.atleast_1d(seeds).tolist()]
        generator = made if isinstance(seeds, list) else made[0]
        return pipe(**STEPS | {"output_type": "latent"} | given, generator=generator).images

    return call


@pytest.fixture
def mine(request):
    """The same of this engine: a tensor of all latents, or pictures."""

    def call(kind, fields, seeds):
        pipe = request.getfixturevalue("omni" if kind == "Omni" else "ours")
        of_control = {name.split()[1]: value for name, value in fields.items() if name.startswith("control ")}
        given = {name: value for name, value in fields.items() if not name.startswith("control ")}
        if of_control:
            given["control"] = Control(request.getfixturevalue("control")[1], **of_control)
        result = pipe(**STEPS | {"output_type": "latent"} | given, seed=seeds)
        return result.images or torch.stack(result.latents)

    return call


def said(name):
    """What the page says of a case: the figure of its row."""
    (figure,) = re.findall(rf"^\|.*\| ([\d.e-]+) \| {re.escape(name)} \|$", PAGE, re.MULTILINE)
    return float(figure)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(3)
def test_with_compat_and_without(theirs, mine, name):
    kind, fields, seeds, undone = CASES[name]
    expected = theirs(kind, fields, seeds)
    compat, other = (
        relative(mine(kind, fields | {"compat": "diffusers"} | also, seeds), expected) for also in ({}, undone)
    )
    print(f"\n{name}: {compat:.1e} {other:.2g}")
    assert compat < 1e-5
    assert other == pytest.approx(said(name), rel=0.06)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_else_refused(theirs, mine, name):
    kind, fields, words = REFUSED[name]
    assert relative(mine(kind, fields | {"compat": "diffusers"}, 3), theirs(kind, fields, 3)) < 1e-5
    with pytest.raises(RequestError, match=words):
        mine(kind, fields, 3)
    assert name in " ".join(PAGE.split())


@pytest.mark.parametrize("name", SAME)
@pytest.mark.sampled(1)
def test_what_is_the_same_without(theirs, mine, name):
    fields = {"prompt": [PROMPT]} | SIZE | SAME[name]
    assert relative(mine("", fields, 3), theirs("", fields, 3)) < 1e-5
    assert name in " ".join(PAGE.split())


def test_what_is_laid_over_a_picture(theirs, mine):
    """diffusers decodes what was kept, too; rounding to 8 bits may fall to either side."""
    fields = INPAINT | {"output_type": "np"}
    expected = np.round(theirs("Inpaint", fields, 3)[0] * 255)
    fields = INPAINT | {"compat": "diffusers", "output_type": "pil"}
    found, laid = (np.asarray(mine("Inpaint", fields | also, 3)[0], float) for also in ({}, {"composite": True}))
    assert np.abs(found - expected).max() <= 1
    away = np.linalg.norm(laid - expected) / np.linalg.norm(expected)
    print(f"\nwhat is kept of a picture: {away:.2g}")
    assert away == pytest.approx(said("what is kept of a picture"), rel=0.06)


def test_one_image_for_several_generators(ours, theirs, mine):
    """Without a switch, which a note says: diffusers samples by the first; with an image each, both do the same."""
    fields = ONE | {"prompt": [PROMPT, ""]}
    expected, found = theirs("Img2Img", fields, [3, 8]), mine("Img2Img", fields | {"compat": "diffusers"}, [3, 8])
    assert relative(found[0], expected[0]) < 1e-5
    away = relative(found[1], expected[1])
    print(f"\none image for several generators: {away:.2g}")
    assert away == pytest.approx(said("one image for several generators"), rel=0.06)
    assert any(
        "give both an image a picture" in note for note in ours.plan(**fields, seed=[3, 8], compat="diffusers").notes
    )
    fields["image"] = [ONE["image"]] * 2
    assert relative(mine("Img2Img", fields | {"compat": "diffusers"}, [3, 8]), theirs("Img2Img", fields, [3, 8])) < 1e-5


def test_several_images_for_more_pictures(theirs, mine, monkeypatch):
    """diffusers takes its images in turn where it takes its prompts one after another; without posterior, for once."""
    kind = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(kind, "sample", lambda self, generator=None: self.mode())
    images, seeds = [photograph(), photograph(seed=1)], [1, 2, 3, 4]
    fields = ONE | {"prompt": [PROMPT, ""], "image": images, "num_images_per_prompt": 2}
    expected = theirs("Img2Img", fields, seeds)
    away = relative(mine("Img2Img", fields, seeds), expected)
    print(f"\nimages of several pictures: {away:.2g}")
    assert away == pytest.approx(said("images of several pictures"), rel=0.06)
    assert relative(mine("Img2Img", fields | {"image": images * 2}, seeds), expected) < 1e-5


def test_noise_in_bf16():
    """What diffusers' pipelines with a start image draw in bf16, on a CPU: the same numbers, rounded."""
    rounded = torch.randn(1, 16, 10, 14, generator=torch.Generator().manual_seed(5), dtype=torch.bfloat16)
    assert torch.equal(rounded, noise(5).bfloat16())
    assert relative(rounded, noise(5)) == pytest.approx(said("noise in bf16"), rel=0.06)
