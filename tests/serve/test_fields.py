"""The table of fields: a value is taken where its schema fits, and nowhere else; nothing of a Request is forgotten."""

from dataclasses import fields

import pytest

from s3dit.request import Request
from s3dit.serve import values
from s3dit.serve.bounds import Limits
from s3dit.serve.errors import ApiError
from s3dit.serve.fields import ALIASES, APART, DOORS, FILES, REFUSED, Fields
from s3dit.serve.wanted import wanted

TABLE = Fields("tiny", Limits(), ("style", "ink"))
# OpenAI's fields of createImage and createImageEdit, as the client of version 3.57 has them.
OPENAI = {
    "prompt", "background", "complexity", "frame_count", "frame_duration_ms", "model", "moderation", "n",
    "output_compression", "output_format", "partial_images", "quality", "response_format", "safety_identifier", "size",
    "stream", "style", "svg", "user", "image", "mask", "input_fidelity", "markup",
}  # fmt: skip
PEERS = {
    "negative_prompt", "num_inference_steps", "guidance_scale", "true_cfg_scale", "seed", "generator_device",
    "flow_shift", "max_sequence_length", "lora", "solver", "schedule", "width", "height", "strength", "mask_image",
    "reference", "reference_image",
}  # fmt: skip
# Values around the bounds of all kinds of fields.
TRIED = [
    None, True, False, 0, 1, -1, 0.5, 8.0, 15, 16, 17, 64, 100, 101, 200, 201, 512, 4096, 4112, 32768, 32769, 2**63,
    -(2**63), 1e300, "", "auto", "64x64", "64 x 64", "0x64", "euler", "png", "style", "a" * 600, [], [0.5], [1, 0.5],
    [0.1, 0.8], [0, 0, 0, 16], [3, 4], {}, {"name": "style"}, {"name": "ink", "scale": 2}, {"name": "none"},
    {"name": "ink", "file": "x"}, ["style", {"name": "ink"}], {"mask": [0, 0, 1, 1], "prompt": "x"},
    {"mask": "x.png", "prompt": "x"}, {"method": "taylor", "threshold": 2}, {"method": "taylor", "rest": 1}, [[1]],
]  # fmt: skip
# What a schema cannot say: multiples and order within a text or list, forms of small languages, numbers that rise.
BEYOND = {
    "size", "sigmas", "guidance_interval", "guidance_method", "skip_layers", "variation", "cache", "extend",
    "batch_place", "region", "lora",
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE.table)
def test_a_field_takes_what_its_schema_says(name):
    validator = pytest.importorskip("jsonschema_rs").validator_for
    field = TABLE.table[name]
    fits = validator({"$schema": "https://json-schema.org/draft/2020-12/schema", **field.schema}).is_valid
    sent = {} if name == "prompt" else {"prompt": "x"}
    taken = 0
    for value in TRIED[1:]:
        try:
            TABLE.checked({**sent, name: value}, field.doors[0])
            works = True
        except ApiError as error:
            works = False
            assert error.param == name and error.status == (404 if name == "model" else 400)
        taken += works
        assert not works or fits(value), f"{value!r} is taken, and the document says no"
        assert works or not fits(value) or name in BEYOND, f"{value!r} is refused, and the document says yes"
    words = field.schema.get("enum", ())
    assert all(TABLE.checked({**sent, name: word}, field.doors[0]) for word in words)
    assert taken or words or name in ("style", "guidance_method", "skip_layers")


def test_every_name_has_an_answer():
    """OpenAI's and peers' names are taken or refused with a reason, and a Request's options all have a place."""
    assert {*TABLE.table, *FILES, *REFUSED} >= OPENAI | PEERS
    assert not set(TABLE.table) & ({*FILES} | {*REFUSED})
    ours = {spec.name for spec in fields(Request) if spec.metadata["group"]}
    assert {*APART} <= ours
    assert ours - {*TABLE.table} == {"image", "mask_image", "reference", "control", "num_images_per_prompt"}
    assert {*ALIASES.values()} <= ours


def test_what_is_sent_becomes_a_request():
    sent = {
        "prompt": "a star", "n": 2, "size": "96x64", "num_inference_steps": 4.0, "true_cfg_scale": 3, "flow_shift": 2.5,
        "seed": [5, 9], "negative_prompt": "red", "lora": ["style", {"name": "ink", "scale": -0.5}], "user": None,
        "region": {"mask": [0, 0, 0.5, 1], "prompt": "a ring"}, "output_format": "webp", "output_compression": 0,
        "cache": {"method": "taylor", "threshold": 1}, "stream": True, "partial_images": 3,
    }  # fmt: skip
    asked = wanted(TABLE, TABLE.checked(sent, "generations"), (), False)
    request = asked.request
    assert (request.width, request.height, request.num_inference_steps, request.num_images_per_prompt) == (96, 64, 4, 2)
    assert (request.cfg, request.shift, request.seeds()) == (3, 2.5, [5, 9])
    assert (request.cache.method, request.region[0].box) == ("taylor", (0, 0, 0.5, 1))
    assert asked.loras == {"style": 1.0, "ink": -0.5}
    assert (asked.form, asked.compression, asked.partial_images, asked.user) == ("webp", 0, 3, None)


@pytest.mark.parametrize(
    ("sent", "param", "words"),
    [
        ({"promt": "x"}, "promt", "did you mean prompt?"),
        ({"prompt": "x", "strength": 0.5}, "strength", "POST /v1/images/edits"),
        ({"prompt": "x", "image": "/etc/passwd"}, "image", "as a file in POST"),
        ({"prompt": "x", "mask_image": "x.png"}, "mask_image", "as a file in POST"),
        ({"prompt": "x", "svg": {}}, "svg", "no vectors"),
        ({"prompt": "x", "control": "x"}, "control", "not served"),
        ({"prompt": "x", "steps": 3}, "steps", "num_inference_steps"),
        ({"prompt": "x", "prompt_embeds": []}, "prompt_embeds", "there is no field"),
        ({"prompt": "x", "output_type": "latent"}, "output_type", "did you mean output_format?"),
        ({"prompt": ["x", "y"]}, "prompt", "needed text"),
        ({"prompt": "x" * 32_001}, "prompt", "32,001 characters; needed at most 32,000"),
        ({"prompt": "\ud800"}, "prompt", "no Unicode text"),
        ({}, "prompt", "missing"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": "x", "lora": "../style.safetensors"}, "lora", "not served here"),
        ({"prompt": "x", "lora": {"name": "style", "path": "/x"}}, "lora", "no file is read"),
        ({"prompt": "x", "lora": {"name": "style", "scale": 1e9}}, "lora", "needed a number"),
        ({"prompt": "x", "cache": "magnitude:0.1:/etc/passwd.json"}, "cache", "needed METHOD"),
        ({"prompt": "x", "region": {"mask": "/etc/x.png", "prompt": "y"}}, "region", "needed a box"),
        ({"prompt": "x", "size": "64x64", "width": 64}, "size", "both size and width"),
        ({"prompt": "x", "size": "4096x16", "upscale": 2}, "size", "a side of 8,192 pixels; needed at most 4,096"),
        ({"prompt": "x", "user": "a", "safety_identifier": "b"}, "user", "both user and safety_identifier"),
        ({"prompt": "x", "cfg": 2, "true_cfg_scale": 3}, "true_cfg_scale", "both cfg and true_cfg_scale"),
        ({"prompt": "x", "true_cfg_scale": 2, "guidance_scale": 3}, "true_cfg_scale", "both true_cfg_scale and guid"),
        ({"prompt": "x", "partial_images": 1}, "partial_images", "without stream"),
        ({"prompt": "x", "stream": True, "response_format": "file"}, "stream", "events hold no files"),
        ({"prompt": "x", "output_compression": 50}, "output_compression", "png, which has none"),
        ({"prompt": "x", "n": 2, "seed": [1, 2, 3]}, "seed", "3 entries"),
        ({"prompt": "x", "n": 8, "size": "2048x2048"}, "size", "needed at most 8,388,608"),
        ({"prompt": "x", "sigmas": [1 - i / 201 for i in range(201)]}, "sigmas", "201 levels above 0, a step each"),
        ({"prompt": "x", "size": "6\uff14x64"}, "size", "needed auto, or a width and a height"),
        ({"prompt": "x", "width": 64, "height": 64, "upscale": 8, "upscale_strength": 0}, "upscale_strength", "is 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_of_its_field(sent, param, words):
    with pytest.raises(ApiError) as caught:
        wanted(TABLE, TABLE.checked(sent, "generations"), (), False)
    error = caught.value.body()["error"]
    assert error["param"] == param and words in error["message"], error
    assert error["type"] == "invalid_request_error" and caught.value.status == 400


def test_numbers_are_those_of_json():
    """A truth value is no number, NaN none at all, and 8.0 is 8."""
    for name, value in (("n", True), ("seed", 1.5), ("guidance_scale", float("nan")), ("stream", 1)):
        with pytest.raises(ApiError):
            TABLE.checked({"prompt": "x", name: value}, "generations")
    assert TABLE.checked({"prompt": "x", "n": 8.0}, "generations")["n"] == 8
    cache = TABLE.checked({"prompt": "x", "cache": {"method": "taylor", "first": 3.0}}, "generations")["cache"]
    assert isinstance(cache["first"], int)


def test_doors_differ_where_they_must():
    drawn, edited = (set(TABLE.of(door)) for door in DOORS)
    assert edited - drawn == {"strength", "extend", "mask_mode", "mask_blur", "composite", "posterior",
                              "reference_area", "reference_positions"}  # fmt: skip
    assert drawn - edited == {"style", "moderation"}
    assert values.size_of("64x32") == (64, 32) and values.size_of("64x") is None
