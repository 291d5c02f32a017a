"""Planned once: what a picture costs in checks, openings of files and tokenizations; and what a plan remarks on."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit import Pipeline, Request, RequestError
from s3dit.inputs.images import Picture
from s3dit.model.tokenizer import Tokenizer

SIZE = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", dtype="fp32", residency="resident")


@pytest.fixture
def counted(monkeypatch):
    """Counts of `Request.check`, of files opened, and of texts tokenized."""
    counts = Counter()
    check, open_picture, segments = Request.check, Picture.open.__func__, Tokenizer.segments

    def opened(cls, source, name="image"):
        counts["open", str(source)] += 1
        return open_picture(cls, source, name)

    def tokenized(self, text, *args):
        counts["tokenize", text] += 1
        return segments(self, text, *args)

    monkeypatch.setattr(Request, "check", lambda self: (counts.update(["check"]), check(self))[1])
    monkeypatch.setattr(Picture, "open", classmethod(opened))
    monkeypatch.setattr(Tokenizer, "segments", tokenized)
    return counts


def test_one_check_one_opening_one_tokenization(pipe, counted, tmp_path):
    image, mask = tmp_path / "a.png", tmp_path / "mask.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(image)
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(mask)
    wanted = {
        "prompt": ["a red star", "a red star", "a blue ring"], "negative_prompt": "green", "guidance_scale": 1.5,
        "image": str(image), "mask_image": str(mask), "upscale": 1.5, "seed": 3, "num_images_per_prompt": 2,
    }  # fmt: skip
    result = pipe(**wanted, **SIZE)
    assert len(result.latents) == 6
    assert counted == {
        "check": 1, ("open", str(image)): 1, ("open", str(mask)): 1,
        ("tokenize", "a red star"): 1, ("tokenize", "a blue ring"): 1, ("tokenize", "green"): 1,
    }  # fmt: skip


def test_what_is_no_function_is_refused_before_anything_is_drawn(pipe):
    with pytest.raises(RequestError, match="on_step is 3; needed a function"):
        pipe("a red star", on_step=3, **SIZE)


def test_a_plan_is_run_as_it_is(pipe, counted):
    plan = pipe.plan("a red star", seed=1, **SIZE)
    counted.clear()
    first, second = pipe(plan), pipe(plan)
    assert not counted and torch.equal(first.latents[0], second.latents[0])
    with pytest.raises(RequestError, match="a Plan and seed are given"):
        pipe(plan, seed=2)


WITHOUT_EFFECT = [
    ({"negative_prompt": "blue"}, "negative_prompt has no effect: guidance is off"),
    ({"negative_prompt_embeds": torch.zeros(3, 128)}, "negative_prompt_embeds has no effect"),
    ({"cfg_normalization": True}, "cfg_normalization has no effect"),
    ({"cfg_truncation": 0.5}, "cfg_truncation has no effect"),
    ({"guidance_interval": [0.1, 0.5]}, "guidance_interval has no effect: guidance is off"),
    ({"guidance_method": "apg"}, "guidance_method has no effect: guidance is off"),
    ({"skip_layers": "2:0"}, "skip_layers has no effect: its scale is 0"),
    ({"variation": "0:7"}, "variation has no effect: its strength is 0"),
    (
        {"guidance_scale": 1.0, "guidance_method": "cfg_zero:zero_init_steps=1", "image": torch.zeros(3, 64, 64)},
        "zero_init_steps has no effect: the flow begins from a picture",
    ),
    ({"posterior": "sample"}, "posterior has no effect"),
    ({"composite": False}, "composite has no effect"),
    ({"sigmas": [1.0, 0.5], "num_inference_steps": None, "schedule": "simple"}, "the values of sigmas have no effect"),
    (
        {"sigmas": [1.0, 0.5], "num_inference_steps": None, "schedule": "karras"},
        "of sigmas only their number, the first and the last count",
    ),
    ({"latents": torch.zeros(1, 16, 8, 8), "seed": 3}, "seed has no effect"),
    ({"latents": torch.zeros(1, 16, 8, 8), "convention": "diffusers", "batch_place": [1, 2]}, "batch_place has no"),
    (
        {"sigmas": [1.0, 0.5], "num_inference_steps": None, "schedule": "karras", "convention": "comfyui"},
        "the values of sigmas have no effect",
    ),
    ({"latents": torch.zeros(1, 16, 8, 8), "generator": torch.Generator()}, "generator has no effect"),
    ({"prompt": None, "prompt_embeds": torch.zeros(3, 128), "max_sequence_length": 9}, "max_sequence_length has no"),
    ({"solver": "heun"}, "solver heun has no effect: a single step"),
    ({"schedule": "beta"}, "schedule beta has no effect: a single step"),
    ({"image": torch.zeros(3, 64, 64), "strength": 1.0}, "image gives its size and nothing else"),
    ({"guidance_scale": 1.0, "cfg_truncation": 2.0}, "cfg_truncation above 1 has no effect"),
    ({"seed": -1}, "seed -1 is a seed like any other"),
]


@pytest.mark.parametrize(("fields", "note"), WITHOUT_EFFECT, ids=[note for _, note in WITHOUT_EFFECT])
def test_what_has_no_effect_is_said_once(pipe, fields, note):
    wanted = SIZE | {"prompt": "a red star"} | fields
    plan = pipe.plan(**wanted)
    assert [said for said in plan.notes if note in said] == list(plan.unused) and len(plan.unused) == 1
    with pytest.warns(UserWarning, match=note) as caught:
        pipe(**wanted)
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize(
    "fields",
    [
        {"negative_prompt": ""}, {"negative_prompt": "blue", "guidance_scale": 1.0}, {"seed": 5},
        {"latents": torch.zeros(1, 16, 8, 8)}, {"latents": torch.zeros(1, 16, 8, 8), "seed": 1, "upscale": 2},
        {"latents": torch.zeros(1, 16, 8, 8), "seed": 1, "solver": "euler_ancestral", "num_inference_steps": 2},
        {"sigmas": [1.0], "schedule": "official"}, {"cfg_normalization": True, "skip_layers": "2:1"},
    ],
)  # fmt: skip
def test_what_has_an_effect_is_drawn_in_silence(pipe, fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not pipe.plan(**SIZE | {"prompt": "a red star"} | fields).unused
        pipe(**SIZE | {"prompt": "a red star"} | fields)
