"""`runner.py` draws the engine's picture from a written folder, by torch or onnxruntime, without the engine."""

import ast
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit import Control, Pipeline
from s3dit.export import graphs, runner
from s3dit.export.runner import Start
from s3dit.inputs.images import Picture
from s3dit.model.layout import patchify
from s3dit.sampling.schedules import sigmas

SLOW = pytest.mark.skipif(not os.environ.get("S3DIT_SLOW"), reason="takes a minute; set S3DIT_SLOW=1 to run it")
PAGE = Path(__file__).resolve().parents[2] / "s3dit" / "EXPORT.md"
PROMPTS = ["a red star above a blue ring", "a green square"]


SIZE = (48, 80)


def picture(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def mask(size=SIZE):
    """White on the right, from a place inside of a patch on."""
    white = np.zeros(size, np.uint8)
    white[:, 24:] = 255
    return white


def near(found, wanted):
    """Whether pixels are equal, but where a number lies between two integers, and the last bit decides."""
    off = np.abs(found.astype(int) - np.asarray(wanted).astype(int))
    return off.max() <= 1 and (off > 0).mean() < 1e-2


# Of the engine's request, and of the runner; in all of them two steps or three.
WAYS = {
    "words": ({}, {}),
    "image": ({"image": picture(1), "strength": 0.7, "guidance_scale": 2.0},
              {"start": Start(picture(1), None, 0.7), "guidance_scale": 2.0}),
    "mask": ({"image": picture(1), "mask_image": mask()}, {"start": Start(picture(1), mask() > 0)}),
}  # fmt: skip
# With the ControlNet of the fixture, and the image of both.
CONTROLS = [
    ({"strength": 0.8, "end": 0.5}, {"guidance_scale": 2.0}), ({"inpaint": picture(3), "mask": mask()}, {}),
]  # fmt: skip


def check(model: runner.Model, pipe: Pipeline, wanted: dict, found: dict) -> None:
    """Compare two pictures of a written model with the pipeline's."""
    found = model.draw(PROMPTS, [3, 4], SIZE, steps=3, **found)
    for i, prompt in enumerate(PROMPTS):
        options = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 3, **wanted}
        assert near(found[i], pipe(prompt, seed=3 + i, **options).images[0])


@pytest.mark.parametrize("way", WAYS)
def test_it_draws_the_pictures_of_the_engine(pipe, model, way):
    check(model, pipe, *WAYS[way])


@pytest.mark.parametrize(("values", "options"), CONTROLS, ids=["image", "inpaint"])
def test_it_draws_by_a_controlnet(pipe, net, model, values, options):
    control = {"control": Control(net, picture(2), **values)} | options
    check(model, pipe, control, {"control": runner.Control(picture(2), **values)} | options)


def test_a_folder_is_whole(model):
    assert sorted(path.name for path in model.folder.iterdir()) == [
        "runner.py", "settings.json", "text_encoder.pt2", "tokenizer.json", "transformer.pt2", "vae.pt2",
        "vae_encoder.pt2",
    ]  # fmt: skip


def test_its_command_takes_words_or_ids(pipe, model, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Model", lambda folder: model)
    monkeypatch.chdir(tmp_path)
    ids = ",".join(map(str, pipe.tokenizer.encode(PROMPTS[0])))
    for words, name in ((PROMPTS[:1], "words.png"), (["--ids", ids], "ids.png")):
        runner.main([*words, "--size", "64x48", "--steps", "1", "-o", name])
    assert Path("words.png").read_bytes() == Path("ids.png").read_bytes()
    assert Image.open("ids.png").size == (64, 48)
    with pytest.raises(SystemExit):
        runner.main([])


def test_its_command_takes_pictures(pipe, net, model, tmp_path, monkeypatch):
    """A start image that has to be scaled, with a mask, and a control picture of another size."""
    monkeypatch.setattr(runner, "Model", lambda folder: model)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(1, (50, 83))).save("a.png")
    Image.fromarray(mask((50, 83))).save("m.png")
    Image.fromarray(picture(2, (64, 64))).save("c.png")
    words = "--image a.png --mask m.png --strength 0.9 --control-image c.png --control-end 0.5 --steps 2 --seed 5"
    runner.main([PROMPTS[0], *words.split(), "-o", "drawn.png"])
    options = {"image": "a.png", "mask_image": "m.png", "strength": 0.9, "control": Control(net, "c.png", end=0.5)}
    wanted = pipe(PROMPTS[0], seed=5, num_inference_steps=2, **options).images[0]
    assert near(np.asarray(Image.open("drawn.png")), wanted)


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
        ({"start": Start(picture(1), strength=0.0)}, "strength is 0; needed a number above 0"),
        ({"start": Start(picture(1)), "size": (64, 64)}, r"image is \(48, 80, 3\) of uint8; needed \(64, 64, 3\)"),
        ({"start": Start(picture(1) / 255)}, "image is .* of float64; needed"),
        ({"start": Start(picture(1), np.zeros(SIZE, bool))}, "mask has no white place"),
        ({"start": Start(picture(1), mask((64, 64)))}, r"mask is \(64, 64\)"),
        ({"control": runner.Control()}, "a control needs an image, or inpaint and mask"),
        ({"control": runner.Control(picture(1), inpaint=picture(1)), "size": SIZE}, "a control needs an image, or"),
        ({"control": runner.Control(picture(1), start=0.5, end=0.5), "size": SIZE}, "from 0.5 to 0.5; needed start"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.draw(PROMPTS[:1], [1], **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mask m.png", "needed --image too"),
        ("--strength 0.5", "needed --image too"),
        ("--image none.png", "No such file"),
        ("--image a.png", "vae_encoder.pt2 is not there, which reads pictures; needed a whole folder: write it anew"),
        ("--control-image a.png", "this folder has no ControlNet; write one with `s3dit export MODEL -o DIR --control"),
        ("--control-strength 1", "this folder has no ControlNet"),
        ("--size 7", "is '7'; needed WxH"),
    ],
)
def test_its_command_says_what_is_missing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(1)).save("a.png")
    shift = {"slope": 0, "offset": 3, "exponential": False}
    settings = {"form": "export", "height": 64, "width": 64, "steps": 2, "guidance_scale": 0, "shift": shift}
    Path("settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        runner.main(["--ids", "1,2", "--model", ".", *words.split()])
    assert message in capsys.readouterr().err


def test_the_examples_of_the_page_run(model, monkeypatch, capsys):
    """Writing and loading are those of the fixture."""
    written = []
    monkeypatch.setattr(graphs, "write", lambda pipe, folder: written.append((type(pipe), folder)))
    monkeypatch.setattr(runner, "Model", lambda folder: model)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    exec(compile("\n".join(examples), PAGE.name, "exec"), {})
    assert written == [(Pipeline, "stars")] and capsys.readouterr().out == "(2, 64, 96, 3) uint8\n"


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
    (tmp_path / "vae.pt2").touch()
    seen = []

    def graph(*given):
        seen.extend(each.device.type for each in given)
        return torch.ones(1, dtype=torch.bfloat16)

    monkeypatch.setattr(torch.export, "load", lambda path: type("Graph", (), {"module": lambda self: graph})())
    answer = runner.Model(tmp_path).run("vae", np.zeros(2, np.float32), np.zeros(1, np.int64))
    assert seen == ["meta", "meta"] and answer.dtype == np.float32 and answer.tolist() == [1.0]


@SLOW
@pytest.mark.parametrize("form", ["compiled", "onnx"])
def test_other_forms_draw_the_same(form, pipe, net, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
        pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    graphs.write(pipe, tmp_path / "model", form, control=Control(net))
    assert json.loads((tmp_path / "model" / "settings.json").read_text())["form"] == form
    model = runner.Model(tmp_path / "model")
    for way in WAYS.values():
        check(model, pipe, *way)
    for values, options in CONTROLS:
        control = {"control": Control(net, picture(2), **values)} | options
        check(model, pipe, control, {"control": runner.Control(picture(2), **values)} | options)
