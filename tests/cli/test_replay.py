"""A picture of a stranger: what a replay takes from its metadata, what it never does, and how it says what is wrong.

`dry_run` runs all of a replay up to the first model call; `mutated` makes hostile metadata of honest ones.
"""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import socket
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from s3dit.cli.main import main
from s3dit.inputs.image_metadata import read_metadata
from s3dit.inputs.images import Picture
from s3dit.pipeline import Pipeline

PROMPT = "a red star above a blue ring on a white background"
# Files that Python opens while this is a list. A hook of the interpreter cannot be taken out again.
OPENED: list[str] | None = None


def hear(event, args):
    if event == "open" and OPENED is not None:
        OPENED.append(os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else "")


sys.addaudithook(hear)


class Drawn(BaseException):
    """Everything was in order, and the model would be called."""


def write(path, metadata):
    """A picture with these metadata, JSON or any text."""
    chunks = PngInfo()
    # As JSON a number that is too large for a float.
    text = metadata if isinstance(metadata, str) else json.dumps(metadata).replace("Infinity", "1e999")
    chunks.add_text("s3dit", text)
    Image.new("RGB", (16, 16)).save(path, pnginfo=chunks)
    return path


def close_network(patch):
    """Every way to the network fails, and not with an error that anybody expects."""

    def fail(*args, **options):
        raise AssertionError("the network was asked")

    for name in ("snapshot_download", "hf_hub_download"):
        patch.setattr(huggingface_hub, name, fail)
    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, fail)
    patch.setattr(socket, "getaddrinfo", fail)


def dry_run(path, metadata, *options):
    """Replay metadata without drawing or network -> the request to be drawn and what was said, or what refuses it.

    Whatever is raised and is none of s3dit's errors comes out.
    """
    said, found = io.StringIO(), []

    def stop(pipe, plan, **options):
        found.append(plan.request)
        raise Drawn

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.suppress(Drawn):
        close_network(patch)
        patch.setattr(Pipeline, "__call__", stop)
        patch.setattr(Pipeline, "load", lambda *args, **options: loaded())
        argv = ["generate", "--replay", str(write(path, metadata)), "-o", str(path.with_suffix(".out.png"))]
        assert main([*argv, *map(str, options)]) == 2
    lines = said.getvalue().splitlines()
    return (found[0], lines) if found else lines


def loaded(pipes=[]):  # noqa: B006
    if not pipes:
        pipes.append(LOAD(device="cpu", dtype="fp32"))
    return pipes[0]


LOAD = Pipeline.load


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Metadata of a picture that the command line drew, with every kind of entry that a replay may find."""
    folder = tmp_path_factory.mktemp("honest")
    out = folder / "out.png"
    options = ["--steps", "1", "--seed", "3", "--height", "64", "--width", "64", "--dtype", "fp32", "--device", "cpu"]
    assert main(["generate", PROMPT, *options, "-o", str(out)]) == 0
    return read_metadata(out)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder of a user."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


HUGE = 10**400
HASH = "0" * 64
ADAPTER = {"file": "style.safetensors", "sha256": HASH, "scale": 0.8}
CONTROL = {"model": "union.safetensors", "image": "pose.png", "strength": 0.8, "end": 0.7}
NESTED = json.loads("[" * 900 + "]" * 900)
# Changes of honest metadata, and words of the one line that refuses them.
REFUSED = [
    ({"sigmas": 5}, "sigmas is 5"),
    ({"sigmas": ["1", "0.5"]}, "sigmas holds something else"),
    ({"sigmas": [True, 0.5]}, "sigmas holds something else"),
    ({"sigmas": [1 - i / 2000 for i in range(1500)]}, "sigmas has 1,500 numbers"),
    ({"seed": [None]}, "seed is None"),
    ({"seed": "3"}, "seed is '3'"),
    ({"seed": True}, "seed is True"),
    ({"seed": HUGE}, "seed is an integer of 1329 bits"),
    ({"seed": 1.0}, "seed is 1.0"),
    ({"seed": {}}, "seed is a dict"),
    ({"seed": NESTED}, "seed is a list"),
    ({"num_images_per_prompt": None}, "num_images_per_prompt is None"),
    ({"num_images_per_prompt": 10**9}, "num_images_per_prompt is 1000000000"),
    ({"num_images_per_prompt": 64}, "asks for 64 pictures; needed 1"),
    ({"prompt": ["a"] * 1024}, "asks for 1024 pictures"),
    ({"prompt": ["a"] * 1000, "num_images_per_prompt": 1000}, "1,000,000 pictures; needed at most 1024"),
    ({"prompt": ["a"] * 90_000}, "prompt has 90,000 entries; needed at most 1024"),
    ({"prompt": "a" * 200_000}, "prompt has 200,000 characters"),
    ({"prompt": ["a" * 100_000] * 5, "num_images_per_prompt": 1}, "asks for 5 pictures"),
    ({"prompt": [["a"]]}, "prompt holds a list"),
    ({"prompt": None}, "has no prompt"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": "\ud800"}, "prompt holds what is no Unicode"),
    ({"negative_prompt": [[]]}, "negative_prompt holds a list"),
    ({"negative_prompt": 5}, "negative_prompt is a int"),
    ({"height": [64] * 64, "width": 8192}, "height has 64 entries"),
    ({"height": "64"}, "height is '64'"),
    ({"height": HUGE}, "height is an integer of"),
    ({"height": 64.0}, "height is 64.0"),
    ({"height": 8192, "width": 8192, "upscale": 8}, "pixels in all; needed at most 268,435,456"),
    ({"num_inference_steps": 10**9}, "num_inference_steps is 1000000000"),
    ({"num_inference_steps": True}, "num_inference_steps is True"),
    ({"max_sequence_length": None}, "max_sequence_length is None"),
    ({"guidance_scale": "4"}, "guidance_scale is '4'"),
    ({"guidance_scale": True}, "guidance_scale is True"),
    ({"guidance_scale": HUGE}, "guidance_scale is an integer of"),
    ({"cfg_normalization": None}, "cfg_normalization is None"),
    ({"shift": [3.0]}, "shift is [3.0]"),
    ({"solver": ["euler"]}, "solver is ['euler']"),
    ({"solver": None}, "solver is None"),
    ({"mask_mode": {}}, "mask_mode is a dict"),
    ({"composite": 1}, "composite is 1"),
    ({"composite": "yes"}, "composite is 'yes'"),
    ({"upscale": "2"}, "upscale is '2'"),
    ({"mask_blur": None}, "mask_blur is None"),
    ({"extend": "16,0"}, "extend is '16,0'"),
    ({"extend": [16, 0, 0, HUGE]}, "extend is [16, 0, 0, an integer of"),
    ({"reference_area": "x"}, "reference_area is 'x'"),
    ({"generator": 5}, "unknown keys ['generator']"),
    ({"latents": [[0.0]]}, "unknown keys ['latents']"),
    ({"output_type": "latent"}, "unknown keys ['output_type']"),
    ({"nonsense": 1}, "unknown keys ['nonsense']"),
    ({str(i): i for i in range(1000)}, "unknown keys ['0', '1', '10'"),
    ({"image": 5}, "image of 5; needed paths"),
    ({"image": NESTED}, "image of a list; needed paths"),
    ({"image": {"a": 1}}, "image of a dict; needed paths"),
    ({"image": "a\0b", "engine": {"inputs": {"image": HASH}}}, "image is 'a\\x00b', which is no path"),
    ({"image": "a" * 5000, "engine": {"inputs": {"image": HASH}}}, "which is no path"),
    ({"image": "a" * 3000, "engine": {"inputs": {"image": HASH}}}, "not found beside it nor in this folder"),
    ({"reference": [["a", 3]]}, "reference of a list; needed paths"),
    ({"reference": ["a"] * 10_000}, "reference has 10,000 entries; needed at most 16"),
    ({"control": 5}, "control of 5"),
    ({"control": [5]}, "a control 5"),
    ({"control": [CONTROL | {"weight": 1}]}, "a control a dict"),
    ({"control": [CONTROL] * 1000}, "control of a list; needed at most 16"),
    ({"control": [CONTROL | {"image": [5]}]}, "a control whose image is [5]"),
    ({"control": [CONTROL | {"strength": "1"}]}, "control strength is '1'"),
    ({"control": [CONTROL | {"version": [1]}]}, "control version is [1]"),
    ({"control": [CONTROL]}, "what it is to follow, with --control 'union.safetensors:pose.png:0.8:0.0-0.7'"),
    ({"control": [CONTROL | {"model": "some/repo"}]}, "--control 'repo:pose.png"),
    ({"adapters": [ADAPTER]}, "drawn with the adapter 'style.safetensors:0.8'; give them with --lora"),
    ({"adapters": [ADAPTER | {"file": "some/repo/x.safetensors"}]}, "'x.safetensors:0.8'; give them with --lora"),
    ({"adapters": 5}, "its adapters are 5"),
    ({"adapters": None}, "its adapters are None"),
    ({"adapters": [5]}, "its adapter is 5"),
    ({"adapters": [ADAPTER] * 1000}, "its adapters are a list; needed a list of at most 64"),
    ({"adapters": [{"file": "x"}]}, "its adapter has no scale, sha256"),
    ({"adapters": [ADAPTER | {"name": "x"}]}, "its adapter has ['name'], unknown here"),
    ({"adapters": [ADAPTER | {"scale": True}]}, "its adapter has a scale of True"),
    ({"adapters": [ADAPTER | {"scale": HUGE}]}, "its adapter has a scale of an integer"),
    ({"adapters": [ADAPTER | {"sha256": "../x"}]}, "its adapter has a sha256 of '../x'"),
    ({"adapters": [ADAPTER | {"merged": "yes"}]}, "its adapter has a merged of 'yes'"),
    ({"model": "some/repo"}, "drawn with 'some/repo'; say where that is with --model"),
    ({"model": 5}, "its model is 5"),
    ({"model": ["some/repo"]}, "its model is ['some/repo']"),
    ({"engine": 5}, "its engine is 5"),
    ({"engine": None}, "its engine is None"),
    ({"engine": {"inputs": 5}}, "its engine has a inputs of 5"),
    ({"engine": {"inputs": {"image": "x"}}}, "its hash of 'image' is 'x'; needed sha256"),
    ({"engine": {"inputs": {"image": HASH.upper().replace("0", "F")}}}, "needed sha256"),
    ({"engine": {"inputs": {"image": HASH + "\n"}}}, "needed sha256"),
    ({"engine": {"inputs": {"reference": [HASH, 5]}}}, "its hash of 'reference' is"),
    ({"engine": {"inputs": {"/etc/passwd": HASH}}}, "its hashes are of '/etc/passwd'"),
    ({"engine": {"inputs": {"image": HASH}}}, "it names nothing for image, 0 in all, and has 1 hashes"),
    ({"engine": {"quantized": []}}, "its engine has a quantized of []"),
    ({"engine": {"quantized": {"transformer": 5}}}, "its engine has a quantized of a dict"),
    ({"engine": {"placement": 5}}, "its engine has a placement of 5"),
    ({"engine": {"mixed": {"replay": "x"}}}, "its engine has a part 'replay'"),
    ({"engine": {"mixed": {"transformer": "some/repo"}}}, "say where that is with --transformer"),
    ({"engine": {"replayable": 0}}, "its engine has a replayable of 0"),
    ({"engine": {"replayable": False}}, "given from Python"),
    ({"engine": {"levels": "x"}}, "its engine has a levels of 'x'"),
    ({"engine": {"levels": [None]}}, "its engine has a levels of [None]"),
    ({"engine": {"levels": [0.5] * 100_000}}, "its engine has a levels of a list"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"), REFUSED, ids=[f"{i}-{words[:40]}" for i, (_, words) in enumerate(REFUSED)]
)
@pytest.mark.sampled(20)
def test_what_is_refused_is_one_line_that_names_the_picture(honest, folder, change, words):
    (said,) = dry_run(folder / "bad.png", honest | change)
    assert said.startswith(f"s3dit: {folder / 'bad.png'}: ") and words in said
    assert len(said) < 600 + len(str(folder))


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "{", '{"seed": NaN}', '{"seed": -Infinity}', "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"]
)
def test_metadata_that_are_no_record(folder, text):
    (said,) = dry_run(folder / "bad.png", text)
    assert "bad.png" in said and "s3dit metadata is" in said


def test_a_way_to_the_network_would_be_seen(honest, folder):
    with pytest.raises(AssertionError, match="the network was asked"):
        dry_run(folder / "a.png", honest | {"adapters": [ADAPTER]}, "--lora", "some/repo")


def test_a_number_that_is_too_large_for_a_float(honest, folder):
    text = json.dumps(honest | {"shift": 0.5}).replace('"shift": 0.5', '"shift": 1e999')
    assert "1e999 is not a number of JSON" in dry_run(folder / "bad.png", text)[0]
    assert "shift is 1e+300; needed a number from" in dry_run(folder / "bad.png", honest | {"shift": 1e300})[0]


def test_a_picture_speaks_of_one_picture_and_the_user_of_more(honest, folder):
    request, _ = dry_run(folder / "a.png", honest)
    assert request.count == 1 and request.seeds() == [3]
    request, _ = dry_run(folder / "a.png", honest | {"num_images_per_prompt": 1000}, "--count", 2)
    assert request.seeds() == [3, 4]
    request, _ = dry_run(folder / "a.png", honest | {"seed": [3], "height": [64], "prompt": [PROMPT]}, "--count", 2)
    assert request.seeds() == [3, 4] and request.prompt == [PROMPT]
    prompts = folder / "prompts.txt"
    prompts.write_text("a red star\na blue ring\n")
    request, _ = dry_run(folder / "a.png", honest | {"prompt": ["x"] * 9}, "--prompt-file", prompts)
    assert request.prompts == ["a red star", "a blue ring"]


def test_what_the_user_says_is_stronger(honest, folder):
    request, _ = dry_run(folder / "a.png", honest, "--cfg", 3, "--seed", 5)
    assert (request.guidance_scale, request.seed) == (2.0, 5)
    request, _ = dry_run(folder / "a.png", honest, "--sigmas", "1,0.5")
    assert (request.sigmas, request.num_inference_steps) == ([1.0, 0.5], 2)
    request, _ = dry_run(folder / "a.png", honest | {"sigmas": [1.0, 0.5], "num_inference_steps": 2}, "--steps", 3)
    assert (request.sigmas, request.num_inference_steps) == (None, 3)


def noise(path, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return Picture.open(path).sha256


def started(honest, named, sha256, **more):
    return (
        honest
        | {"image": str(named), "strength": 0.5, "engine": honest["engine"] | {"inputs": {"image": sha256}}}
        | more
    )


def test_an_image_is_taken_from_beside_the_picture_or_from_here(honest, folder, monkeypatch):
    sha256 = noise(folder / "in.png")
    for named in (
        "in.png",
        "/somewhere/else/in.png",
        "C:\\pictures\\in.png",
        "\\\\host\\share\\in.png",
        "../../in.png",
    ):
        request, _ = dry_run(folder / "out.png", started(honest, named, sha256))
        assert request.image == str(folder / "in.png"), named
    (folder / "sub" / "deep").mkdir(parents=True)
    request, _ = dry_run(folder / "sub" / "out.png", started(honest, "in.png", sha256))
    assert request.image == "in.png"
    # A path that was relative then is relative now; another picture of its name is in no way.
    (folder / "in.png").rename(folder / "sub" / "deep" / "in.png")
    noise(folder / "in.png", 1)
    for out in (folder / "out.png", folder / "sub" / "out.png"):
        request, _ = dry_run(
            out, started(honest, "deep/in.png" if out.parent.name == "sub" else "sub/deep/in.png", sha256)
        )
        assert Picture.open(request.image).sha256 == sha256


def test_an_image_that_is_not_there_says_which_option_gives_it(honest, folder):
    data = started(honest, "in.png", HASH)
    (said,) = dry_run(folder / "out.png", data)
    assert "it was drawn with 'in.png', not found beside it nor in this folder; give the file with --image" in said
    noise(folder / "in.png")
    (said,) = dry_run(folder / "out.png", data)
    assert "in.png' is not what it was then; needed the same pixels; give the file with --image" in said
    request, said = dry_run(folder / "out.png", data, "--image", "in.png")
    assert request.image == "in.png" and any("was drawn with another image than 'in.png'" in line for line in said)
    (folder / "in.png").write_bytes(b"no picture")
    assert "is not what it was then" in dry_run(folder / "out.png", data)[0]
    mask = started(honest, "in.png", noise(folder / "in.png"), mask_image="mask.png")
    assert "it names 'mask.png' for mask_image, 1 in all, and has 0 hashes" in dry_run(folder / "out.png", mask)[0]
    assert "give what is to be drawn with --mask" in dry_run(folder / "out.png", mask)[0]


@pytest.fixture
def opened(monkeypatch):
    """Files that were opened in a test."""
    found = []
    monkeypatch.setattr(sys.modules[__name__], "OPENED", found)
    return found


@pytest.mark.parametrize(
    "name", ["/{}", "../{}", "here/../../{}", "./../{}", "sub/../../{}", "..\\{}", "~/{}", "link/{}"]
)
@pytest.mark.parametrize("known", [True, False])
def test_no_file_elsewhere_is_opened(honest, folder, opened, monkeypatch, name, known):
    """Neither without its hash nor with it: a hash that a stranger knows opens no other folder."""
    monkeypatch.setenv("HOME", str(folder.parent))
    private = folder.parent / "private.png"
    sha256 = noise(private)
    named = name.format("private.png") if name != "/{}" else str(private)
    data = started(honest, named, sha256, extend=[16, 0, 0, 0])
    if not known:
        del data["engine"]["inputs"]
    opened.clear()
    (said,) = dry_run(folder / "out.png", data)
    assert "give" in said and "--image" in said
    assert str(folder / "out.png") in opened, "the hook hears"
    assert not [path for path in opened if Path(path).name == "private.png"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_special_files_are_not_read(honest, folder, kind):
    if kind == "pipe":
        os.mkfifo(folder / "in.png")
    elif kind == "folder":
        (folder / "in.png").mkdir()
    else:
        (folder / "in.png").symlink_to("/dev/zero")
    (said,) = dry_run(folder / "out.png", started(honest, "in.png", HASH))
    assert "not found beside it nor in this folder" in said


def test_adapters_and_controls_that_lie_there_are_not_loaded(honest, folder, opened):
    names = ("style.safetensors", "union.safetensors", "pose.png")
    for name in names:
        noise(folder / name) if name.endswith("png") else (folder / name).write_bytes(b"\0" * 100)
    opened.clear()
    for change in ({"adapters": [ADAPTER]}, {"control": [CONTROL]}, {"model": str(folder)}):
        assert len(dry_run(folder / "out.png", honest | change)) == 1
    assert not {Path(path).name for path in opened} & {*names}


ESCAPES = "\x1b[31m\x1b]0;title\x07\r\n\u202eevil\u2028"


@pytest.mark.parametrize(
    "change",
    [
        {"model": ESCAPES},
        {"engine": {"placement": ESCAPES}},
        {"engine": {"variant": ESCAPES}},
        {"engine": {"quantized": {ESCAPES: ESCAPES, "transformer": ESCAPES}}},
        {"engine": {"mixed": {"transformer": ESCAPES}}},
        {"engine": {"mixed": {ESCAPES: ESCAPES}}},
        {"engine": {ESCAPES: ESCAPES}},
        {"engine": {"inputs": {ESCAPES: HASH}}},
        {"adapters": [ADAPTER | {"file": ESCAPES}]},
        {"adapters": [ADAPTER | {ESCAPES: 1}]},
        {"control": [CONTROL | {"model": ESCAPES}]},
        {"control": [CONTROL | {"image": ESCAPES}]},
        {"control": [CONTROL | {"rule": ESCAPES}]},
        {"image": ESCAPES, "engine": {"inputs": {"image": HASH}}},
        {"image": ESCAPES},
        {"solver": ESCAPES},
        {ESCAPES: 1},
    ],
)
@pytest.mark.sampled(3)
def test_nothing_of_a_picture_reaches_the_terminal_raw(honest, folder, change):
    found = dry_run(folder / "bad.png", honest | change)
    said = "\n".join(found[1] if isinstance(found, tuple) else found)
    assert "evil" in said
    assert not [one for one in said if not one.isprintable() and one != "\n"] and "\nevil" not in said


def test_what_drew_it_is_told_with_the_option_that_undoes_it(honest, folder):
    engine = honest["engine"]
    odd = {
        "variant": "Turbo",
        "placement": "cuda, bf16",
        "quantized": {"transformer": "int8", "text_encoder": "fp8-weights"},
        "colour": "blue",
    }
    _, said = dry_run(folder / "a.png", honest | {"engine": engine | odd})
    said = "\n".join(said)
    assert "was drawn with a model of the variant 'Turbo', this is " in said and "(--model): not the same" in said
    assert "was drawn on 'cuda, bf16', this is on cpu" in said and "(--device, --dtype)" in said
    assert "its transformer in 'int8', this is in plain floats (--quantize int8)" in said
    assert "its text_encoder in 'fp8-weights', this is in plain floats (--quantize-text fp8-weights)" in said
    assert "was drawn with ['colour'], of which this version knows nothing" in said
    _, said = dry_run(folder / "a.png", honest)
    assert not [line for line in said if "was drawn" in line]


def test_one_s_own_picture_is_drawn_again_in_another_folder(tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    noise(first / "in.png")
    monkeypatch.chdir(first)
    options = ["--dtype", "fp32", "--device", "cpu"]
    assert main(["generate", PROMPT, "--image", "in.png", "--steps", "2", *options, "-o", "out.png"]) == 0
    monkeypatch.chdir(second)
    assert main(["generate", "--replay", "../first/out.png", *options, "-o", "again.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(first / "out.png")))
    shutil.move(first / "out.png", "moved.png")
    capsys.readouterr()
    assert main(["generate", "--replay", "moved.png", *options, "-o", "b.png"]) == 2
    assert "give the file with --image" in capsys.readouterr().err
    assert main(["generate", "--replay", "moved.png", "--image", "../first/in.png", *options, "-o", "b.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("b.png")))
    assert "was drawn" not in capsys.readouterr().err


# What takes the place of an honest value, wherever it stands.
HOSTILE = [
    None, True, False, 0, -1, 1, 2, 16, 64, 8192, 2**31, 2**63, -(2**63), HUGE, -HUGE, 0.0, -0.0, 1e-320, 0.5, 1e300,
    1e999, "", "x", "\0", "\ud800", ESCAPES, "a" * 100_000, "/dev/zero", "in.png", "some/repo", "NaN", HASH, "euler",
    "comfyui", "comfyui-turbo", "comfyui-2k", "sample",
    [], [None], [[]], [[[]]], [[None]], ["x"], [1, 2], [0.5, 0.2], [16, 0, 0, 0], ["in.png"], NESTED, [0] * 5000, {},
    {"x": 1}, {"model": "x"}, [CONTROL], [ADAPTER], {"method": "taylor", "first": 1}, {"method": "magnitude"},
    [{"mask": "in.png", "prompt": "a"}], [{"mask": [0, 0, HUGE, 1], "prompt": "a"}], "0.3:7", "apg", "1:0.5@0-1",
]  # fmt: skip
KEYS = [
    "sigmas", "cfg", "image", "mask_image", "strength", "extend", "mask_mode", "mask_blur", "upscale",
    "upscale_strength", "control", "reference", "reference_area", "adapters", "model", "engine", "negative_prompt",
    "height", "width", "seed", "num_images_per_prompt", "prompt", "posterior", "shift", "x",
    "preset", "convention", "batch_place", "cache", "region", "base_weight", "variation", "guidance_scale",
    "guidance_method", "guidance_interval", "skip_layers", "target_timestep",
]  # fmt: skip
ENTRIES = ["inputs", "mixed", "quantized", "placement", "replayable", "levels", "threads", "x"]


def mutated(honest, seed):
    """Honest metadata with one to three changes, the same ones for a seed."""
    chance, data = random.Random(seed), copy.deepcopy(honest)
    for _ in range(chance.randint(1, 3)):
        place, names = data, [*honest, *KEYS]
        if isinstance(data.get("engine"), dict) and chance.random() < 0.3:
            place, names = data["engine"], [*honest["engine"], *ENTRIES]
            if isinstance(place.get("inputs"), dict) and chance.random() < 0.5:
                place, names = place["inputs"], ["image", "mask_image", "reference", "control 1 image"]
        name = chance.choice(names)
        if chance.random() < 0.1:
            place.pop(name, None)
        elif isinstance(place.get(name), str) and chance.random() < 0.3:
            text = place[name]
            at = chance.randrange(len(text) + 1)
            place[name] = text[:at] + chance.choice(["\x1b", "\0", "é", "../", "x" * 300]) + text[at + 1 :]
        else:
            value = chance.choice(HOSTILE)
            place[name] = dict(value) if isinstance(value, dict) else value
    return data


def outcome(folder, honest, seed):
    """What becomes of a mutant: of a plain picture, or of one with a start image and a mask that lie beside it."""
    if seed % 2:
        hashes = {"image": noise(folder / "in.png"), "mask_image": noise(folder / "mask.png", 1)}
        images = {"image": "in.png", "mask_image": "mask.png", "strength": 0.5, "upscale": 2.0, "upscale_strength": 0.5}
        honest = honest | images | {"engine": honest["engine"] | {"inputs": hashes}}
    found = dry_run(folder / "mutant.png", mutated(honest, seed))
    assert isinstance(found, tuple) or (len(found) == 1 and found[0].startswith("s3dit: ")), found
    return found


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return tmp_path_factory.mktemp("mutants")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
@pytest.mark.slow
def test_mutated_metadata_end_in_a_plan_or_in_one_line(honest, shelf, seed):
    outcome(shelf, honest, seed)


@pytest.mark.slow
def test_a_mutant_is_the_same_for_a_seed_and_some_are_drawn(honest, shelf):
    """The fuzzer above is not blind: of its mutants some pass, and more do not."""
    assert mutated(honest, 5) == mutated(honest, 5) != mutated(honest, 6)
    drawn = sum(isinstance(outcome(shelf, honest, seed), tuple) for seed in range(60))
    assert 3 < drawn < 40
