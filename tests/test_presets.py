"""Presets: what they stand for, what wins over them, and that their pictures are drawn again as they were."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit.cli.main import main, parse
from s3dit.control import Control
from s3dit.errors import RequestError
from s3dit.inputs.image_metadata import read_metadata
from s3dit.pipeline import Pipeline
from s3dit.presets import PRESETS
from s3dit.request import Request
from s3dit.resolve import resolve
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model

PROMPT = "a red star above a blue ring"
SMALL = {"height": 64, "width": 64}
MODEL = read_model(EMBEDDED)


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(residency="resident")


def resolved(preset, **given):
    return resolve(Request(prompt=PROMPT, preset=preset, **given), MODEL)


# Steps, guidance, shift, schedule, solver, convention: ComfyUI's templates; of the others what their pipelines compute.
SETTINGS = {
    "comfyui-turbo": (8, 0.0, 3.0, "simple", "res_multistep", "comfyui"),
    "comfyui-base": (25, 3.0, 3.0, "simple", "res_multistep", "comfyui"),
    "comfyui-2k": (5, 0.0, 3.0, "beta", "dpmpp_2m_sde", "comfyui"),
    "diffusers": (8, 0.0, 3.0, "official", "euler", "diffusers"),
    "official": (8, 0.0, 3.0, "official", "euler", "diffusers"),
}
NAMES = ("num_inference_steps", "guidance_scale", "shift", "schedule", "solver", "convention")


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_stands_for(preset):
    request = resolved(preset, image="a.png")
    assert tuple(getattr(request, name) for name in NAMES) == SETTINGS[preset]
    assert request.strength == (0.33 if preset == "comfyui-2k" else 0.6)
    assert request.posterior == ("sample" if preset == "diffusers" else "mode")
    # As it is resolved it says all, whatever the preset says: nothing changes when it is resolved anew.
    again = Request.from_json(request.to_json())
    assert resolve(again, MODEL).to_json() == request.to_json()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"solver": "euler", "schedule": "official", "convention": "own"}, {}),
        ({"num_inference_steps": 3, "shift": 5.0}, {}),
        ({"guidance_scale": 0.5}, {}),
        ({"cfg": 2.0}, {"cfg": None, "guidance_scale": 1.0}),
        ({"sigmas": [1.0, 0.5]}, {"num_inference_steps": 2, "schedule": "official", "solver": "res_multistep"}),
    ],
    ids=lambda value: "+".join(value),
)
def test_what_is_given_wins(given, expected):
    """Also where it is the word that nothing given stands for."""
    request = resolved("comfyui-base", **given)
    for name, value in (given | expected).items():
        assert getattr(request, name) == value, name


def test_without_an_image_nothing_is_said_of_one():
    assert resolved("diffusers").posterior == "mode" and resolved("diffusers").strength is None
    with pytest.raises(RequestError, match="preset is comfyui-2k, which redraws"):
        resolved("comfyui-2k")


REFUSED = [
    ({"preset": "comfyui-turbo", "solver": "unipc"}, "convention comfyui has no solver unipc for flows"),
    ({"convention": "comfyui", "solver": "res_multistep_ancestral"}, "is for variance-exploding models"),
    ({"batch_place": [0, 2]}, "give convention too"),
    ({"preset": "official", "generator": torch.Generator(), "batch_place": [0, 2]}, "and no generator"),
    ({"preset": "diffusers", "prompt": ["a", "b"], "height": [64, 80]}, "height has several values"),
    ({"preset": "official", "num_images_per_prompt": 3, "batch_place": [2, 4]}, "room for 2 of 3 pictures"),
    ({"convention": "comfyui", "num_images_per_prompt": 2, "posterior": "sample", "upscale": 2}, "posterior mode"),
    (
        {"convention": "diffusers", "prompt": ["a", "b"], "image": ["a.png", "b.png"], "posterior": "sample"},
        "image has several values, and convention diffusers",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_has_no_meaning_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        resolve(Request(**{"prompt": PROMPT} | fields), MODEL)


def test_what_a_seed_of_its_own_allows():
    resolve(Request(prompt=["a", "b"], preset="diffusers", height=[64, 80], seed=[1, 2]), MODEL)


def test_what_compat_sets_besides():
    """A mask's pixels are not laid over, and what a control does not say itself is as there."""
    own, theirs = Control("net", "a.png"), {"rule": "diffusers", "strength": 0.75}
    request = resolved("diffusers", image="a.png", mask_image="b.png", control=[own, replace(own, strength=0.5)])
    assert request.composite is False
    assert request.controls == [replace(own, **theirs), replace(own, **theirs | {"strength": 0.5})]
    given = replace(own, rule="authors", strength=1.0)
    kept = resolved("diffusers", image="a.png", mask_image="b.png", composite=True, control=given)
    assert kept.composite is True and kept.controls == [given]
    # Where nothing could be laid over, nothing is said of it.
    for fields in ({}, {"image": "a.png", "mask_image": "b.png", "output_type": "latent"}):
        assert resolved("diffusers", **fields).composite is True
    assert resolved("official", control=own).controls == [own]


def test_compat_is_another_word():
    assert Request.of("a", compat="diffusers") == Request.of("a", preset="diffusers")
    with pytest.raises(RequestError, match="no field 'compat'; did you mean preset"):
        Request.of("a", compat="diffusers", preset="official")
    assert parse(["generate", "a", "--compat", "diffusers"]).preset == "diffusers"


def test_latents_beside_a_start_image(pipe):
    """diffusers' meaning: they are the state, so that an image without a mask is not looked at."""
    pixels, latents = torch.rand(2, 3, 64, 64), torch.randn(1, 16, 8, 8)
    options = {"prompt": PROMPT, "latents": latents, "strength": 0.5, "seed": 1, **SMALL, "num_inference_steps": 4}
    unseeded = {name: value for name, value in options.items() if name != "seed"}
    one, other = (next(pipe.stream(image=each, convention="diffusers", **unseeded)) for each in pixels)
    assert torch.equal(one.start, other.start) and torch.equal(one.x, other.x)
    notes = pipe.plan(image=pixels[0], convention="diffusers", **options).notes
    assert any("latents are the state to start from" in note for note in notes)
    assert any("seed has no effect" in note for note in notes)
    # With a mask, what is kept gets noise of the seed.
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:50] = 1
    options |= {"image": pixels[0], "mask_image": mask, "convention": "diffusers"}
    assert not any("seed has no effect" in note for note in pipe.plan(**options).notes)
    one, other = (next(pipe.stream(**options | {"seed": seed})) for seed in (1, 2))
    assert torch.equal(one.start, other.start) and not torch.equal(one.x, other.x)


NOTES = [
    (
        {"preset": "diffusers", "prompt": ["a", "b"], "image": torch.zeros(3, 64, 64), "seed": [1, 2]},
        "give both an image a picture",
    ),
    ({"preset": "comfyui-2k", "image": torch.zeros(3, 64, 64)}, "torchsde's Brownian tree"),
    ({"preset": "comfyui-turbo", "solver": "er_sde"}, "that of ComfyUI on a CPU"),
    ({"preset": "diffusers"}, "one on a GPU draws other numbers"),
    ({"preset": "official", "guidance_scale": 1.0}, "the official code takes 1 and less for none"),
]


@pytest.mark.parametrize(("fields", "note"), NOTES, ids=[note for _, note in NOTES])
def test_what_a_preset_cannot_give_is_said(pipe, fields, note):
    assert any(note in said for said in pipe.plan(**{"prompt": PROMPT} | SMALL | fields).notes)


def test_the_state_starts_from_the_first_noise(pipe):
    first = next(pipe.stream(PROMPT, preset="comfyui-turbo", seed=5, num_images_per_prompt=2, **SMALL)).start
    expected = torch.randn(2, 16, 8, 8, generator=torch.manual_seed(5))
    assert torch.equal(
        first, torch.cat([each.view(16, 4, 2, 4, 2).permute(1, 3, 2, 4, 0).reshape(16, 64) for each in expected])
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"preset": "comfyui-turbo"}, {"preset": "comfyui-turbo", "solver": "er_sde"}, {"preset": "official"},
        {"preset": "comfyui-2k"}, {"preset": "diffusers", "strength": 0.5}, {"preset": "comfyui-turbo", "upscale": 1.5},
    ],
    ids=lambda fields: "+".join(map(str, fields.values())),
)  # fmt: skip
@pytest.mark.sampled(1)
def test_a_picture_of_a_batch_is_drawn_again_alone(pipe, fields, tmp_path):
    """From its own record, whose seed is the batch's."""
    if fields["preset"] == "comfyui-2k" or "strength" in fields:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
        fields = fields | {"image": str(tmp_path / "a.png")}
    drawn = pipe(PROMPT, seed=3, num_images_per_prompt=3, num_inference_steps=2, **SMALL, **fields)
    record = {k: v for k, v in drawn.metadata[1].items() if k not in ("engine", "model")}
    assert record["seed"] == 3 and record["batch_place"] == [1, 3]
    again = pipe(Request.from_json(record))
    assert torch.equal(again.latents[0], drawn.latents[1])
    assert not torch.equal(drawn.latents[0], drawn.latents[1])


@pytest.mark.slow
def test_the_command_line_and_its_replay(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["generate", PROMPT, "--size", "64x64", "--seed", "3", "--count", "2", "--preset", "comfyui-turbo"]
    assert main([*words, "--steps", "2", "-o", "a.png"]) == 0
    assert main(["generate", "--replay", "a-2.png", "-o", "b.png"]) == 0
    pixels = [np.asarray(Image.open(name)) for name in ("a-2.png", "b.png")]
    assert np.array_equal(*pixels) and read_metadata("b.png")["batch_place"] == [1, 2]
    # Our own convention has no places, and no option could take the picture's away.
    assert main(["generate", "--replay", "a-2.png", "--convention", "own", "-o", "own.png"]) == 0
    assert "batch_place" not in read_metadata("own.png")
    # Another preset takes the place of what the picture says; what is given beside it wins again.
    words = ["generate", "--replay", "a-1.png", "--preset", "comfyui-base", "--solver", "euler", "-o", "c.png"]
    assert main(words) == 0
    record = read_metadata("c.png")
    found = [record[name] for name in ("num_inference_steps", "guidance_scale", "solver", "schedule", "seed")]
    assert found == [25, 3.0, "euler", "simple", 3]
    assert main(["generate", PROMPT, "--preset", "comfyui-2k"]) == 2
    assert "--preset is comfyui-2k, which redraws a picture; give --image too" in capsys.readouterr().err
    assert main(["generate", PROMPT, "--batch-place", "1,2"]) == 2
    assert "--batch-place is about a batch" in capsys.readouterr().err
