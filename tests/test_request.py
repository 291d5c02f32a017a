"""Every wrong request is one clear RequestError; None becomes the model's setting, 0.0 stays a value."""

import ast
import collections
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit.control import Control
from s3dit.errors import RequestError
from s3dit.pipeline import Pipeline
from s3dit.request import Request
from s3dit.resolve import resolve
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model

ROOT = Path(__file__).resolve().parents[1]

WRONG = [
    ({"prompt": 5}, "prompt is a int"),
    ({"prompt": b"x"}, "prompt is a bytes"),
    ({"prompt": ["a", 3]}, "prompt holds a int"),
    ({"prompt": []}, "empty list"),
    (
        {"prompt": ["a", "b"], "negative_prompt": ["c"] * 3},
        "negative_prompt has 3 entries; needed 1 or 2 .a prompt each",
    ),
    ({"height": 0}, "height is 0"),
    ({"height": -16}, "height is -16"),
    ({"width": 100}, "nearest that work are 96 or 112"),
    ({"width": 8}, "nearest that work are 16"),
    ({"width": 1 << 20}, "needed 16 to 8192"),
    ({"width": "64"}, "needed an integer"),
    ({"height": [64, 64, 64]}, "3 entries"),
    ({"num_inference_steps": -1}, "needed an integer from 1"),
    ({"num_inference_steps": 0}, "needed an integer from 1"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"max_sequence_length": 0}, "max_sequence_length is 0"),
    ({"guidance_scale": -0.5}, "guidance_scale is -0.5"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ({"cfg": 0.5}, "cfg is 0.5"),
    ({"cfg": 3.0, "guidance_scale": 2.0}, "same knob"),
    ({"guidance_scale": []}, "guidance_scale is "),
    ({"guidance_scale": [2.0, -1.0]}, "guidance_scale is -1.0"),
    (
        {"guidance_scale": [3, 2, 1], "num_inference_steps": 2},
        "guidance_scale has 3 numbers; needed at most one a step",
    ),
    ({"guidance_interval": 0.5}, "guidance_interval is 0.5; needed two times from 0 .noise. to 1"),
    ({"guidance_interval": [0.5, 0.1]}, "needed two times"),
    ({"guidance_interval": [0.5, float("nan")]}, "needed two times"),
    ({"guidance_method": "apg:beta=1"}, "guidance_method is 'apg:beta=1'; needed plain, apg"),
    ({"guidance_method": "apg:eta=0,eta=1"}, "guidance_method is 'apg:eta=0,eta=1'"),
    ({"guidance_method": ""}, "guidance_method is ''"),
    ({"guidance_method": "apg:momentum=-1"}, "momentum within ±0.99"),
    ({"guidance_method": "cfg_zero:zero_init_steps=1.5"}, "needed plain, apg"),
    ({"guidance_method": "cfg_zero:zero_init_steps=8", "guidance_scale": 2}, "is 8; needed fewer than the 8 steps"),
    ({"skip_layers": "2"}, "skip_layers is '2'; needed LAYERS:SCALE"),
    ({"skip_layers": "-2:1"}, "needed LAYERS:SCALE"),
    ({"skip_layers": "2:1@0.5"}, "needed LAYERS:SCALE"),
    ({"skip_layers": "2:nan"}, "needed LAYERS:SCALE"),
    ({"skip_layers": "1,6:1"}, "skip_layers has layer 6; needed layers from 0 to 5 of this model"),
    ({"variation": -0.1}, "variation is -0.1; needed STRENGTH"),
    ({"variation": "0.1:x"}, "variation is '0.1:x'; needed STRENGTH"),
    ({"variation": [0.1, 0.2, 0.3], "prompt": ["a", "b"]}, "variation has 3 entries"),
    ({"strength": 1.5}, "strength is 1.5"),
    ({"strength": 0.5}, "strength is given without a start image"),
    ({"strength": 0, "image": "a.png"}, "strength is 0, which would redraw nothing"),
    ({"strength": -0.1, "image": "a.png"}, "strength is -0.1"),
    ({"strength": float("nan"), "image": "a.png"}, "strength is nan"),
    ({"mask_image": "a.png"}, "mask_image is given without a start image"),
    ({"extend": [16, 0, 0, 0]}, "extend is given without a start image"),
    ({"image": "a.png", "extend": [16, 0, 0]}, "needed four margins"),
    ({"image": "a.png", "extend": 16}, "needed four margins"),
    ({"image": "a.png", "extend": [0, 0, 0, 0]}, "needed four margins"),
    ({"image": "a.png", "extend": [-16, 0, 0, 0]}, "needed four margins"),
    ({"image": "a.png", "extend": [1.5, 0, 0, 0]}, "needed four margins"),
    ({"image": "a.png", "mask_blur": 4}, "about a mask"),
    ({"image": "a.png", "mask_mode": "differential"}, "about a mask"),
    ({"image": "a.png", "mask_image": "b.png", "mask_mode": "soft"}, "needed one of inpaint, differential"),
    ({"image": "a.png", "posterior": "mean"}, "needed one of mode, sample"),
    ({"image": ["a.png"] * 3}, "image has 3 entries"),
    ({"upscale": 0.5}, "upscale is 0.5"),
    ({"upscale": 1}, "upscale is 1; needed more"),
    ({"upscale": 9}, "needed a number from 1 to 8"),
    ({"upscale": 2, "upscale_strength": 0.0}, "upscale_strength is 0"),
    ({"upscale_strength": 0.5}, "without upscale"),
    ({"shift": 0}, "shift is 0"),
    ({"sigmas": [0.5, 0.7]}, "descending"),
    ({"sigmas": []}, "descending"),
    ({"sigmas": [1.0, "x"]}, "numbers"),
    ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "2 sigmas but"),
    ({"solver": "rk4"}, "needed one of euler"),
    ({"schedule": "linear"}, "needed one of official"),
    ({"preset": "comfyui"}, "needed one of comfyui-turbo"),
    ({"convention": "ldm"}, "needed one of own"),
    *(
        ({"batch_place": wrong}, "batch_place is .*needed a place from 0")
        for wrong in (3, [1], [2, 2], [-1, 2], [0, 2e9], [0, 1.5])
    ),
    ({"output_type": "np"}, "needed one of pil"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"latents": torch.zeros(1, 16, 3, 3), "height": 64, "width": 64}, "latents has shape"),
    ({"latents": torch.full((1, 16, 8, 8), float("nan"))}, "NaN"),
    ({"latents": torch.zeros(3)}, r"latents has shape \(3,\)"),
    ({"latents": [0.0]}, "latents is"),
    ({"generator": 42}, "generator is 42; needed a torch.Generator"),
    ({"seed": [None]}, "seed is None"),
    ({"seed": b"a"}, "seed is a bytes"),
    ({"seed": 2**63 - 1, "num_images_per_prompt": 2}, "seed of the last picture is 9223372036854775808"),
    ({"seed": 10**5000}, "seed is an integer of 16610 bits"),
    ({"guidance_scale": True}, "guidance_scale is True"),
    ({"composite": "no"}, "composite is 'no'; needed true or false"),
    ({"solver": ["euler"]}, "solver is "),
    ({"sigmas": 5}, "sigmas is 5; needed a list"),
    ({"sigmas": [1.0, float("nan")]}, "descending"),
    ({"sigmas": [1 - i / 2000 for i in range(1500)]}, "sigmas has 1,500 numbers; needed at most 1001"),
    ({"image": 5}, "image is 5; needed a path"),
    ({"image": ["a.png", None], "prompt": ["a", "b"]}, "image is None"),
    ({"image": "a\0b"}, "which is no path"),
    ({"reference": [["a.png"], 5]}, "reference is 5"),
    ({"reference": ["a.png"] * 17}, "reference has 17 entries; needed at most 16"),
    ({"control": Control("a", 5)}, "control image is 5"),
    ({"control": [Control("a", "b.png")] * 17}, "control has 17 entries; needed at most 16"),
    ({"prompt": "\ud800"}, "no Unicode text"),
    ({"prompt": "a" * 131073}, "prompt has 131,073 characters; needed at most 131,072"),
    ({"prompt": ["a" * 131072] * 33}, "4,325,376 characters in all; needed at most 4,194,304"),
    ({"prompt": ["a"] * 10**6}, "prompt has 1,000,000 entries; needed at most 1024"),
    ({"num_images_per_prompt": 10**9}, "num_images_per_prompt is 1000000000; needed an integer from 1 to 1024"),
    ({"prompt": ["a"] * 33, "num_images_per_prompt": 32}, "1,056 pictures; needed at most 1024"),
    ({"height": 8192, "width": 8192, "num_images_per_prompt": 64}, "4,294,967,296 pixels in all; needed at most 268"),
    ({"height": 4096, "width": 4096, "upscale": 8}, "pixels in all"),
]


@pytest.fixture(scope="module")
def config():
    return read_model(EMBEDDED)


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", dtype="fp32")


@pytest.mark.parametrize("fields, message", WRONG, ids=[m for _, m in WRONG])
def test_wrong(config, fields, message):
    with pytest.raises(RequestError, match=message) as caught:
        resolve(Request(**({"prompt": "a"} | fields)), config)
    assert "\n" not in str(caught.value)


def test_pixels_are_bounded_where_the_size_is_the_model_s_own(config):
    """1024 pictures of 128² are far from the bound; at 1024² they are four times too many."""
    resolve(Request(prompt="a", num_images_per_prompt=1024), config)
    large = replace(config, settings=replace(config.settings, height=1024, width=1024))
    resolve(Request(prompt="a", num_images_per_prompt=256), large)
    with pytest.raises(RequestError, match="1,073,741,824 pixels in all"):
        resolve(Request(prompt="a", num_images_per_prompt=1024), large)


ODD = [
    None, True, 0, -1, 10**5000, 1.5, float("nan"), "", "x", "\0", "\ud800", "x" * 10**6, b"ab", memoryview(b"ab"), (),
    [None], [[]], {}, {1}, object(), np.int64(3), np.float32(0.5), np.zeros(3), np.array(["a"]), torch.zeros(2),
    torch.zeros(1, 16, 16, 16, dtype=torch.int64), collections.deque([1, 2]), range(10**9), Path("/dev/null"),
    Control(5), Control("a", object()), int, iter([1]), 1j, collections.UserList([1]),
]  # fmt: skip


@pytest.mark.parametrize("name", [one.name for one in fields(Request)])
@pytest.mark.sampled(10)
def test_nothing_but_a_request_error_whatever_a_field_holds(pipe, name):
    """Of every type there is, and deep enough to be read, counted and compared: no field lets a foreign error out."""
    nested: list = []
    for _ in range(2000):
        nested = [nested]
    start = {"image": Image.new("RGB", (32, 32)), "mask_image": Image.new("L", (32, 32), 255), "upscale": 2.0}
    for value in (*ODD, nested):
        for base in ({}, start):
            try:
                pipe.plan(**{"prompt": "a red star"} | base | {name: value})
            except RequestError as error:
                assert "\n" not in str(error) and len(str(error)) < 600


def test_none_is_the_model_s_setting_and_zero_is_a_value(config):
    resolved = resolve(Request(prompt="a"), config)
    assert (resolved.height, resolved.width, resolved.num_inference_steps) == (128, 128, 8)
    assert (resolved.guidance_scale, resolved.shift) == (0.0, 3.0)
    assert resolve(Request(prompt="a", guidance_scale=0.0), config).guidance_scale == 0.0
    assert resolve(Request(prompt="a", cfg=4.0), config).guidance_scale == 3.0


def test_how_much_is_redrawn_where_nothing_is_said(config):
    def strength(**fields):
        return resolve(Request(prompt="a", **fields), config).strength

    assert strength() is None and strength(image="a.png") == 0.6
    assert strength(image="a.png", mask_image="b.png") == 1.0 == strength(image="a.png", extend=[16, 0, 0, 0])
    assert strength(image="a.png", mask_image="b.png", strength=0.4) == 0.4
    assert resolve(Request(prompt="a", upscale=2), config).upscale_strength == 0.35


def test_images_are_named_in_json_where_they_are_files():
    request = Request(prompt=["a", "b"], image=[Path("a.png"), "b.png"], mask_image="m.png", strength=0.5)
    data = request.to_json()
    assert data["image"] == ["a.png", "b.png"] and data["mask_image"] == "m.png"
    assert Request.from_json(data).image == ["a.png", "b.png"]
    assert "image" not in Request(prompt="a", image=torch.zeros(3, 16, 16)).to_json()


def test_the_caller_s_list_is_left_alone(config):
    prompts = ["a", "b"]
    resolve(Request(prompt=prompts), config)
    assert prompts == ["a", "b"]


def test_seeds_count_up_and_spread():
    assert Request(prompt=["a", "b"], seed=7, num_images_per_prompt=2).seeds() == [7, 8, 9, 10]
    assert Request(prompt=["a", "b"], seed=[3, 5], num_images_per_prompt=2).seeds() == [3, 4, 5, 6]
    assert Request(prompt=["a", "b"], seed=[3], num_images_per_prompt=2).seeds() == [3, 4, 5, 6]
    assert Request(prompt=["a", "b"], seed=[9, 8, 7, 6], num_images_per_prompt=2).seeds() == [9, 8, 7, 6]


def test_json_round_trip():
    request = Request(prompt="a", sigmas=[1.0, 0.5], seed=3, cfg_normalization=True)
    assert Request.from_json(request.to_json()) == request
    with pytest.raises(RequestError, match="unknown keys"):
        Request.from_json({"prompt": "a", "nonsense": 1})


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"seed": np.int64(3)}, {"seed": 3}),
        ({"seed": np.array([3, 4]), "prompt": ["a", "b"]}, {"seed": [3, 4], "prompt": ["a", "b"]}),
        ({"seed": torch.tensor([3, 4]), "prompt": ["a", "b"]}, {"seed": [3, 4], "prompt": ["a", "b"]}),
        ({"height": [np.int32(64), 80], "prompt": ["a", "b"]}, {"height": [64, 80], "prompt": ["a", "b"]}),
        ({"variation": torch.tensor(0.5)}, {"variation": 0.5}),
        ({"guidance_scale": np.float64(2.5)}, {"guidance_scale": 2.5}),
        ({"shift": torch.tensor(3.0)}, {"shift": 3.0}),
        ({"num_inference_steps": np.uint8(4)}, {"num_inference_steps": 4}),
        ({"sigmas": np.linspace(1, 0.25, 4)}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
        ({"composite": np.bool_(False)}, {"composite": False}),
    ],
)
def test_numbers_of_numpy_and_torch_are_numbers(given, plain):
    ours, theirs = Request(**{"prompt": "a"} | given), Request(**{"prompt": "a"} | plain)
    assert json.dumps(ours.to_json()) == json.dumps(theirs.to_json())


@pytest.mark.parametrize(
    "fields",
    [{"seed": np.float64(1.5)}, {"seed": np.zeros((2, 2), int)}, {"height": np.float32(64)}, {"sigmas": np.zeros(0)},
     {"guidance_scale": np.array([[1.0]])}, {"shift": np.complex64(1)}, {"seed": np.bool_(True)}],
)  # fmt: skip
def test_numbers_of_the_wrong_kind_are_refused(fields):
    with pytest.raises(RequestError):
        Request(**{"prompt": "a"} | fields)


def test_one_source_of_noise():
    with pytest.raises(RequestError, match="both seed and generator"):
        Request(prompt="a", seed=1, generator=torch.Generator())


def test_a_list_of_one_serves_all():
    request = Request(prompt=["a", "b"], height=[64], seed=[3])
    assert request.per_image("height") == [64, 64] and request.seeds() == [3, 4]


def test_the_keywords_of_a_call_are_the_fields():
    """What a type checker knows of `pipe(...)`; both files spell the types out, for readers."""

    def annotations(room, name):
        tree = ast.parse((ROOT / "s3dit" / f"{room}.py").read_text(encoding="utf-8"))
        (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
        found = {node.target.id: ast.unparse(node.annotation) for node in body if isinstance(node, ast.AnnAssign)}
        return {field: kind.strip("'") for field, kind in found.items()}

    assert annotations("request_fields", "RequestFields") == annotations("request", "Request")


def test_a_field_of_the_command_line_or_of_another_program_is_named():
    for wrong, right in (("steps", "num_inference_steps"), ("count", "num_images_per_prompt"), ("mask", "mask_image")):
        with pytest.raises(RequestError, match=f"no field '{wrong}'; did you mean {right}"):
            Request.of("a", **{wrong: 2})
