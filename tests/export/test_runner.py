"""The functions of `runner.py`, and what it refuses; its pictures are compared in `test_graphs`."""

import ast
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit import Pipeline
from s3dit.export import graphs, runner
from s3dit.inputs.images import Picture
from s3dit.model.layout import patchify
from s3dit.sampling.schedules import sigmas

SIZE = (48, 80)
SETTINGS = {
    "form": "export", "height": 64, "width": 64, "steps": 2, "guidance_scale": 0,
    "shift": {"slope": 0, "offset": 3, "exponential": False}, "vocabulary": 64,
}  # fmt: skip


def picture(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "turned"])
def test_it_reads_a_picture_as_the_engine_does(mode, tmp_path):
    image = Image.fromarray(picture(1, (40, 50))).convert("RGB" if mode == "turned" else mode)
    exif = image.getexif()
    if mode == "RGBA":
        image.putalpha(Image.fromarray(picture(2, (40, 50))[..., 0]))
    if mode == "turned":
        exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    for size in ((32, 32), None):
        found = runner.read(str(tmp_path / "a.png"), size)
        wanted = Picture.open(tmp_path / "a.png").pixels(size or ((48, 32) if mode == "turned" else (32, 48)))
        assert np.array_equal(runner.as_pixels(found, found.shape[:2], 1, "it")[0], wanted.numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (40, 64)}, "size 40x64, 1 seeds; needed multiples of 16"),
        ({"steps": 0}, "number of steps is 0; needed 1 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance scale is nan"),
        ({"negative": "blue"}, "guidance, which is off"),
        ({"seeds": [2**63]}, "a seed is 9223372036854775808"),
        ({"size": (16, 1 << 20)}, "a side is 1048576; needed 16 to 8192"),
        ({"prompts": [[1, 64]]}, "a token id is 64; needed 0 to 63"),
        ({"prompts": [[-1]]}, "a token id is -1"),
        ({"prompts": [[]]}, "number of token ids is 0"),
        ({"prompts": [], "seeds": []}, "0 seeds; needed"),
        ({"control": runner.Control(picture(1), 3.0), "size": SIZE}, "strength is 3.0; needed 0 to 2"),
        ({"control": runner.Control(picture(1), end=2.0), "size": SIZE}, "end is 2.0; needed 0 to 1"),
        ({"start": runner.Start(picture(1), strength=0.0)}, "strength is 0; needed a number above 0"),
        ({"start": runner.Start(picture(1)), "size": (64, 64)}, r"image is \(48, 80, 3\) of uint8; needed uint8, \(64"),
        ({"start": runner.Start(picture(1) / 255)}, "image is .* of float64; needed uint8"),
        ({"start": runner.Start(picture(1), np.zeros(SIZE, bool))}, "mask has no white place"),
        ({"start": runner.Start(picture(1), np.ones((64, 64), bool))}, r"mask is \(64, 64\)"),
        ({"control": runner.Control()}, "a control needs an image, or inpaint and mask"),
        ({"control": runner.Control(picture(1), inpaint=picture(1)), "size": SIZE}, "a control needs an image, or"),
        ({"control": runner.Control(picture(1), start=0.5, end=0.5), "size": SIZE}, "from 0.5 to 0.5; needed start"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(options, message, tmp_path):
    """Before any graph is loaded: there is none."""
    own = {"control": {"channels": 33, "strength": 0.9}} if "control" in options else {}
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS | own))
    with pytest.raises(ValueError, match=message):
        runner.Model(tmp_path).draw(**{"prompts": [[1, 2]], "seeds": [1]} | options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mask m.png", "needed --image too"),
        ("--strength 0.5", "needed --image too"),
        ("--image none.png", "No such file"),
        ("--image cut.png", "cut.png: image file is truncated"),
        ("--image small.png", "small.png is 8x80 pixels; needed 16x16 at least"),
        ("--model broken", "settings.json is not of a folder that `s3dit export` wrote"),
        ("", "text_encoder.pt2 is not whole"),
        ("-o a.png/b.png", "File exists"),
        ("--image a.png", "vae_encoder.pt2 is not there, which reads pictures; needed a whole folder: write it anew"),
        ("--control-image a.png", "this folder has no ControlNet; write one with `s3dit export MODEL -o DIR --control"),
        ("--control-strength 1", "this folder has no ControlNet"),
        ("--size 7", "is '7'; needed WxH"),
    ],
)
def test_its_command_says_what_is_missing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(1)).save("a.png")
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:900])
    Image.fromarray(picture(1, (80, 8))).save("small.png")
    Path("broken").mkdir()
    Path("broken/settings.json").write_text("{}")
    Path("settings.json").write_text(json.dumps(SETTINGS))
    Path("text_encoder.pt2").write_bytes(b"PK")
    with pytest.raises(SystemExit):
        runner.main(["--ids", "1,2", "--model", ".", *words.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5])
def test_its_noise_is_that_of_torch(seed):
    latents = torch.randn(16, 6, 10, generator=torch.Generator().manual_seed(seed))
    found = runner.noise(seed, 3, 5).reshape(15, 64)
    # Logarithm and cosine of two libraries.
    assert np.abs(found - patchify(latents).numpy()).max() < 2e-6


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (8, 3.0), (28, 6.0), (5, 0.5)])
def test_its_noise_levels_are_the_official_ones(steps, shift):
    assert np.abs(runner.noise_levels(steps, shift) - sigmas(steps, shift).numpy()).max() < 1e-7


def test_a_shift_that_follows_from_the_size_is_written():
    pipe = Pipeline.load(device="cpu")
    scheduler = pipe.config.scheduler
    for kind in ("exponential", "linear"):
        changed = type(scheduler)(shift=1.0, use_dynamic_shifting=True, time_shift_type=kind)
        object.__setattr__(pipe.config, "scheduler", changed)
        shift = graphs.settings(pipe, "export")["shift"]
        value = shift["slope"] * 1000 + shift["offset"]
        assert (np.exp(value) if shift["exponential"] else value) == pytest.approx(changed.shift_at(1000))
    object.__setattr__(pipe.config, "scheduler", scheduler)


def test_its_png_is_read_by_others():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(runner.png(pixels)))), pixels)


def test_it_imports_nothing_of_the_engine():
    tree = ast.parse(graphs.RUNNER.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert own == {"numpy", "torch", "onnxruntime", "tokenizers", "PIL"}


def test_inputs_go_to_the_device_that_the_graphs_are_of(tmp_path, monkeypatch):
    """Without a GPU: "meta" stands for the other device, and the answer is brought back from where it is."""
    (tmp_path / "settings.json").write_text('{"form": "export", "device": "meta"}')
    zipfile.ZipFile(tmp_path / "vae.pt2", "w").close()
    seen = []

    def graph(*given):
        seen.extend(each.device.type for each in given)
        return torch.ones(1, dtype=torch.bfloat16)

    monkeypatch.setattr(torch.export, "load", lambda path: type("Graph", (), {"module": lambda self: graph})())
    answer = runner.Model(tmp_path).run("vae", np.zeros(2, np.float32), np.zeros(1, np.int64))
    assert seen == ["meta", "meta"] and answer.dtype == np.float32 and answer.tolist() == [1.0]
