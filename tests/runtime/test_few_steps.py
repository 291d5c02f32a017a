"""A distill LoRA on a model of many steps: its settings are taken where none are given, and said."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from s3dit import Pipeline
from s3dit.cli.main import main
from s3dit.runtime.embedded import EMBEDDED

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weights"))
import few_step_files  # noqa: E402

SMALL = {"prompt": "a red star", "height": 32, "width": 48, "output_type": "latent"}
NAME = "Z-Image-Fun-Lora-Distill-4-Steps-2603"
BASE = (28, 4.0, 6.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the embedded weights as if they were Z-Image's, and distill LoRAs for them in both spellings."""
    folder = tmp_path_factory.mktemp("few")
    shutil.copytree(EMBEDDED, folder / "base")
    (folder / "base" / "s3dit.json").write_text('{"variant": "base", "height": 128, "width": 128}')
    scheduler = folder / "base" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": 6.0}))
    weights = few_step_files.transformer_of(EMBEDDED)
    few_step_files.distill_lora(folder / f"{NAME}.safetensors", weights)
    few_step_files.distill_lora(folder / f"{NAME}-ComfyUI.safetensors", weights, comfyui=True)
    said = json.dumps({"num_inference_steps": 2, "shift": 2.0})
    few_step_files.distill_lora(folder / "few.safetensors", weights, metadata={"few_steps": said})
    few_step_files.distill_lora(folder / "style.safetensors", weights, seed=1)
    return folder


@pytest.fixture
def pipe(files):
    return Pipeline.load(files / "base", device="cpu", dtype="fp32", residency="resident")


def settings(plan):
    request = plan.request
    return request.num_inference_steps, request.guidance_scale, request.shift


def test_settings_are_taken_where_none_are_given_and_said(pipe, files):
    assert settings(pipe.plan(**SMALL)) == BASE
    report = pipe.lora.attach(files / f"{NAME}.safetensors", 0.8)
    assert str(report).endswith("; distilled for 4 steps, no guidance, shift 3, strength 0.8 (by its name)")
    plan = pipe.plan(**SMALL)
    assert settings(plan) == (4, 0.0, 3.0) and plan.calls == 4 and not plan.unused
    assert plan.sigmas == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    (note,) = [note for note in plan.notes if "is a distill" in note]
    assert note == (
        f"{NAME} is a distill LoRA; taken from it, as the request does not give it: num_inference_steps 4, "
        "guidance_scale 0, shift 3"
    )
    assert settings(pipe.plan(**SMALL, solver="lcm")) == (4, 0.0, 3.0)


@pytest.mark.parametrize(
    ("given", "found", "words"),
    [
        ({"num_inference_steps": 9}, (9, 0.0, 3.0), "given otherwise: num_inference_steps 9"),
        ({"guidance_scale": 4.0}, (4, 4.0, 3.0), "given otherwise: guidance_scale 4"),
        ({"cfg": 2.0}, (4, 1.0, 3.0), "given otherwise: guidance_scale 1"),
        ({"guidance_scale": [3, 0.5]}, (4, [3.0, 0.5], 3.0), "given otherwise: guidance_scale 3,0.5"),
        ({"shift": 6.0}, (4, 0.0, 6.0), "given otherwise: shift 6"),
        ({"sigmas": [1.0, 0.6, 0.0]}, (2, 0.0, 3.0), "given otherwise: num_inference_steps 2"),
        ({"preset": "comfyui-base"}, (25, 3.0, 3.0), "given otherwise: num_inference_steps 25, guidance_scale 3"),
        ({"cfg": 1.0}, (4, 0.0, 3.0), "does not give it: num_inference_steps 4, shift 3"),
    ],
)
@pytest.mark.sampled(2)
def test_what_is_given_wins_and_is_said(pipe, files, given, found, words):
    pipe.lora.attach(files / f"{NAME}.safetensors")
    plan = pipe.plan(**SMALL, **given)
    assert settings(plan) == found
    (note,) = [note for note in plan.notes if "is a distill" in note]
    assert words in note and ("otherwise" in words or "otherwise" not in note)
    # As guidance does on Turbo, it works against the model, of which a call warns.
    against = [said for said in plan.unused if "its adapters, is distilled to draw without guidance" in said]
    assert len(against) == bool(found[1])


def test_only_adapters_that_act_count_and_of_several_the_last(pipe, files):
    pipe.lora.attach(files / "style.safetensors")
    assert settings(pipe.plan(**SMALL)) == BASE
    pipe.lora.attach(files / f"{NAME}.safetensors", 0.8, name="first")
    pipe.lora.attach(files / "few.safetensors", 1.0, name="second")
    plan = pipe.plan(**SMALL)
    assert settings(plan) == (2, 0.0, 2.0)
    assert "2 distill LoRAs act at once; the settings are those of second, the last" in plan.notes
    pipe.lora.scale("second", 0.0)
    assert settings(pipe.plan(**SMALL)) == (4, 0.0, 3.0)
    pipe.lora.detach("second")
    pipe.lora.merge("first")
    assert settings(pipe.plan(**SMALL)) == (4, 0.0, 3.0)


def test_both_spellings_draw_the_same(pipe, files):
    drawn = []
    for end in ("", "-ComfyUI"):
        pipe.lora.attach(files / f"{NAME}{end}.safetensors", 0.8)
        drawn.append(pipe(**SMALL, seed=1, solver="lcm").latents[0])
        pipe.lora.detach()
    assert torch.equal(*drawn)
    plain = pipe(**SMALL, seed=1, solver="lcm", num_inference_steps=4, guidance_scale=0, shift=3).latents[0]
    assert not torch.allclose(drawn[0], plain)


def test_command_line_and_replay(files, tmp_path, capsys):
    """What was taken stands in the picture as if it had been given: it is drawn again whatever the file is called."""
    base, lora = str(files / "base"), str(files / f"{NAME}.safetensors")
    assert main(["inspect", lora]) == 0
    said = capsys.readouterr().out
    assert "4 steps, no guidance, shift 3, strength 0.8 (by its name)" in said and f"{NAME}.safetensors:0.8" in said
    drawn, again, plain = (str(tmp_path / f"{name}.png") for name in ("drawn", "again", "plain"))
    small = ["--size", "48x32", "--seed", "3", "--model", base]
    assert main(["generate", "a red star", *small, "--lora", f"{lora}:0.8", "-o", drawn]) == 0
    said = capsys.readouterr().err
    assert f"{NAME} is a distill LoRA" in said and "--steps 4, --guidance 0, shift 3" in said
    shutil.copy(lora, tmp_path / "renamed.safetensors")
    renamed = str(tmp_path / "renamed.safetensors")
    assert main(["generate", "--replay", drawn, "--model", base, "--lora", renamed, "-o", again]) == 0
    assert Image.open(drawn).tobytes() == Image.open(again).tobytes()
    assert main(["generate", "a red star", *small, "--steps", "2", "--lora", lora, "-o", plain]) == 0
    assert "given otherwise: --steps 2" in capsys.readouterr().err
