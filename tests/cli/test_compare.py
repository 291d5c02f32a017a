"""`s3dit compare`: the cause in the first line, the three named settings, pixels, exit codes, pictures of strangers."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from s3dit import Pipeline
from s3dit.cli.main import main

PROMPT = "a red star above a blue ring"
STEPS = {"seed": 7, "height": 64, "width": 64, "num_inference_steps": 2}


def carrying(path, size=(64, 64), level=0, **texts):
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text if isinstance(text, str) else json.dumps(text))
    Image.fromarray(np.full((*size[::-1], 3), level, np.uint8)).save(path, pnginfo=chunks)
    return path


@pytest.fixture(scope="module")
def metadata():
    """What a picture of PROMPT carries."""
    return Pipeline.load(device="cpu", dtype="fp32")(PROMPT, **STEPS).metadata[0]


@pytest.fixture
def compared(tmp_path, capsys):
    """Exit code and lines of a comparison of two pictures' metadata, their pixels apart by some levels."""

    def run(a, b, *options, levels=1):
        one, other = carrying(tmp_path / "a.png", **a), carrying(tmp_path / "b.png", level=levels, **b)
        code = main(["compare", str(one), str(other), *options])
        return code, capsys.readouterr().out.splitlines()

    return run


def ours(metadata, engine=None, **fields):
    return {"s3dit": metadata | fields | {"engine": metadata["engine"] | (engine or {})}}


CAUSES = [
    ({"seed": 8}, {}, "seed differs (7 | 8)"),
    ({"prompt": "a blue ring"}, {}, f"prompt differs ({PROMPT} | a blue ring)"),
    ({"guidance_scale": 1.0}, {}, "guidance differs (perhaps one number in two forms: cfg 1 is guidance_scale 0)"),
    ({"guidance_scale": 2.5}, {}, "guidance differs (guidance_scale 0 | guidance_scale 2.5)"),
    ({"shift": 6.0}, {"levels": [1.0, 0.8571428, 0.0]}, "schedule differs (level 1 is 0.75 and 0.8571)"),
    ({"num_inference_steps": 1}, {"levels": [1.0, 0.0]}, "schedule differs (2 and 1 steps are taken)"),
    ({}, {"placement": "cpu, bf16"}, "dtype differs (cpu, fp32 | cpu, bf16)"),
    ({}, {"quantized": {"transformer": "int8"}}, "dtype differs (cpu, fp32 | cpu, fp32, transformer in int8)"),
    ({"model": "Z-Image"}, {}, "model differs (embedded | Z-Image)"),
    ({"composite": False}, {}, "composite differs (True | False)"),
    ({"seed": 8, "solver": "heun"}, {}, "seed and solver differ"),
    ({}, {"cpu": "another", "torch": "2.11"}, "same settings, other CPU and torch: rounding"),
    ({}, {"threads": 999}, "same settings, other threads: rounding"),
    ({}, {}, "same settings, same kind of machine: other weights by the same name, or a picture that was changed"),
    ({}, {"replayable": False}, "same settings, same kind of machine: other weights by the same name, or a picture "
                                "that was changed"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "engine", "cause"), CAUSES, ids=[cause for *_, cause in CAUSES])
def test_the_cause_is_said_first(metadata, compared, fields, engine, cause):
    code, lines = compared(ours(metadata), ours(metadata, engine, **fields))
    assert (code, lines[0]) == (1, cause)


def test_other_machines_do_not_make_pictures_of_their_own(metadata, compared):
    _, lines = compared(ours(metadata), ours(metadata, {"cpu": "another"}), levels=90)
    assert lines[0] == "same settings, other CPU: more than rounding"


def test_equal_pixels(metadata, compared):
    code, lines = compared(ours(metadata), ours(metadata), levels=0)
    assert (code, lines[0]) == (0, "equal pixels")
    code, lines = compared(ours(metadata), ours(metadata, seed=8), levels=0)
    assert (code, lines[0]) == (0, "equal pixels, although seed differs")


GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        "model": ["11", 0], "positive": ["6", 0], "negative": ["33", 0], "latent_image": ["13", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPT}},
    "11": {"class_type": "ModelSamplingAuraFlow", "inputs": {"shift": 3, "model": ["29", 0]}},
    "29": {"class_type": "UNETLoader", "inputs": {"unet_name": "z_image.safetensors", "weight_dtype": "fp8_e4m3fn"}},
    "33": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}},
}  # fmt: skip
SD_CPP = (
    f"{PROMPT}\nSteps: 2, CFG scale: 1, Guidance: 3.5, Eta: 0, Seed: 7, Size: 64x64, Model: z_image.gguf, RNG: cuda, "
    "Sampler: euler simple, Version: stable-diffusion.cpp"
)


def row(lines, name):
    return next(line.split(None, 1)[1] for line in lines[1:] if line.split()[0] == name)


def test_comfyui_and_others_say_the_same_in_other_words(metadata, compared):
    """Schedules by their levels: simple with ComfyUI's shift is the official one in 2 steps. Guidance in one form."""
    _, lines = compared(ours(metadata), {"prompt": GRAPH})
    assert row(lines, "schedule").startswith("same") and "the same 2 steps" in row(lines, "schedule")
    assert row(lines, "guidance") == "same     guidance_scale 0 | cfg 1: the same in the other form"
    assert row(lines, "dtype") == "differs  cpu, fp32 | fp8_e4m3fn"
    _, lines = compared({"parameters": SD_CPP}, {"prompt": GRAPH})
    assert row(lines, "schedule").startswith("same") and row(lines, "guidance") == "same     cfg 1"
    assert lines[0] == "model differs (z_image.gguf | z_image.safetensors)"
    assert any("shift is not told: 3 is taken" in line for line in lines)


def test_one_number_in_two_forms_is_named(metadata, compared):
    graph = GRAPH | {"3": {"inputs": GRAPH["3"]["inputs"] | {"cfg": 4.0, "scheduler": "karras", "seed": 2**63 + 1}}}
    _, lines = compared(ours(metadata, guidance_scale=4.0), {"prompt": graph})
    assert "the same number in two forms: cfg 4 is guidance_scale 3" in row(lines, "guidance")
    assert row(lines, "schedule").startswith("differs") and str(2**63 + 1) in row(lines, "seed")
    graph["3"]["inputs"] |= {"denoise": 0.5, "scheduler": "simple"}
    _, lines = compared({"prompt": GRAPH}, {"prompt": graph})
    assert row(lines, "schedule").startswith("differs") and row(lines, "strength").startswith("differs")


def test_without_metadata_pixels_are_compared(metadata, compared):
    code, lines = compared({}, ours(metadata))
    assert code == 1 and lines[0].startswith("only pixels are compared")
    assert "note: a.png says nothing of how it was drawn" in lines
    assert not any(line.split()[1] == "differs" for line in lines[1:] if line.startswith("  "))


@pytest.mark.parametrize("option, code", [("1", 0), ("0.5", 1), ("48dB", 0), ("49db", 1)])
def test_tolerance(compared, option, code):
    """One level everywhere is a PSNR of 48.13 dB."""
    assert compared({}, {}, "--tolerance", option)[0] == code


@pytest.mark.parametrize("word", ["x", "-1", "nan", "inf", "dB"])
def test_a_tolerance_that_is_none(word, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "a.png", "b.png", f"--tolerance={word}"])
    assert "neither a number of levels such as 2 nor a PSNR such as 40dB" in capsys.readouterr().err


def test_other_sizes(tmp_path, capsys):
    one, other = carrying(tmp_path / "a.png"), carrying(tmp_path / "b.png", (48, 80))
    assert main(["compare", str(one), str(other), "-o", str(tmp_path / "c.png")]) == 1
    assert capsys.readouterr().out.startswith("size differs (64×64 | 48×80)\n")
    assert Image.open(tmp_path / "c.png").size == (112, 80)


def test_json_and_the_picture(metadata, tmp_path, compared, capsys):
    code, lines = compared(ours(metadata), ours(metadata, seed=8), "--json", "-o", str(tmp_path / "c.png"), levels=2)
    said = json.loads("\n".join(lines))
    assert code == 1 and said["cause"] == "seed differs (7 | 8)" and not said["within"]
    assert [row["name"] for row in said["settings"]] == ["schedule", "guidance", "dtype", "model", "seed"]
    assert said["pixels"]["largest"] == 2 and said["pixels"]["psnr"] == pytest.approx(42.11, abs=0.01)
    panels = np.split(np.asarray(Image.open(tmp_path / "c.png")), 3, axis=1)
    assert [panel.max() for panel in panels] == [0, 2, 255]
    assert json.loads("\n".join(compared({}, {}, "--json", levels=0)[1]))["pixels"]["psnr"] is None


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    (tmp_path / "b.png").write_bytes(b"no picture")
    one = carrying(tmp_path / "a.png")
    for argv in ([one, tmp_path / "b.png"], [tmp_path / "none.png", one], [one, one, "-o", one], [one, one, "-o", "x"]):
        assert main(["compare", *map(str, argv)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "texts",
    [
        {"prompt": "{"}, {"prompt": {"1": {"inputs": {"latent_image": 1, "positive": ["1", 0], "seed": 1e999}}}},
        {"parameters": "Steps: 99999999999999999999, Seed: -1e9, Size: 9x, CFG scale: nan, Sampler: euler\x1b[31m"},
        {"parameters": "a\nSteps: 1001, Seed: 1, Sampler: Euler, Schedule type: Simple, CFG scale: inf"},
        {"s3dit": {"prompt": "x", "engine": 5}}, {"s3dit": {"prompt": "x", "seed": [[1]]}}, {"s3dit": "[]"},
        {"s3dit": {"prompt": "x", "engine": {"levels": [1e308, -1e308]}}},
    ],
    ids=range(8),
)  # fmt: skip
def test_metadata_of_strangers(metadata, compared, texts):
    code, lines = compared(ours(metadata), texts)
    assert code == 1 and all(line.isprintable() for line in lines)
    assert compared(texts, texts, levels=0)[0] == 0
