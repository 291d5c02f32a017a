"""The command line as a user meets it: pictures, replay, JSON lines, and one line for every mistake."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from s3dit.cli.main import main, parse
from s3dit.cli.parser import SPELLINGS, UNCLEAR
from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.model.config import TransformerConfig
from s3dit.model.transformer import Transformer
from s3dit.request import Request
from s3dit.runtime.embedded import EMBEDDED

PROMPT = "a red star above a blue ring on a white background"

ROOT = Path(__file__).resolve().parents[2]


def run(*args):
    return main([str(a) for a in args])


def test_generate_and_replay(tmp_path, capsys):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert run("generate", PROMPT, "--steps", 2, "--seed", 3, "-o", first) == 0
    assert capsys.readouterr().out.strip() == str(first)
    text = Image.open(first).text
    assert text["parameters"].startswith(PROMPT + "\n") and "Seed: 3" in text["parameters"]
    assert run("generate", "--replay", first, "-o", again) == 0
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    assert run("generate", "--replay", first, "--seed", 4, "-o", again) == 0
    assert not np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))


@pytest.mark.slow
def test_a_replay_asks_for_the_parts_and_says_what_is_otherwise(tmp_path, capsys):
    part, first, again = EMBEDDED / "transformer", tmp_path / "first.png", tmp_path / "again.png"
    assert run("generate", PROMPT, "--steps", 1, "--transformer", part, "--model", "embedded", "--quantize", "int8",
               "-o", first) == 0  # fmt: skip
    # Which dtype is the default depends on the machine.
    other = "bf16" if " fp32;" in capsys.readouterr().err else "fp32"
    assert run("generate", "--replay", first, "-o", again) == 2
    err = capsys.readouterr().err
    assert "was drawn with the transformer of 'diffusion_pytorch_model.safetensors'; say where that is" in err
    assert "--transformer" in err and err.count("\n") == 1 and not again.exists()
    options = ("generate", "--replay", first, "--model", "embedded", "--transformer", part, "-o", again)
    assert run(*options) == 0
    said = "drawn with its transformer in 'int8', this is in plain floats (--quantize int8): not the same to the bit\n"
    assert said in capsys.readouterr().err
    assert not np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    assert run(*options, "--quantize", "int8") == 0
    assert "not the same to the bit" not in capsys.readouterr().err
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    assert run(*options, "--quantize", "int8", "--dtype", other, "--backend", "reference") == 0
    err = capsys.readouterr().err
    assert "was drawn on " in err and "by the operations of 'auto', these are of reference (--backend)" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "a", "--steps", "few"], "'few' is not an integer"),
        (["generate", "a", "--mask-mode", "soft"], "invalid choice: 'soft'"),
        (["generate", "a", "--image", "a.png", "--extend", "1,x"], "not four margins in pixels"),
        (["generate", "a", "--nothing"], "there is no option --nothing"),
        (["generate", "a", "--stpes", "2"], "there is no option --stpes; did you mean --steps?"),
        (["generate", "a", "--step", "2"], "did you mean --steps?"),
        (["generate", "a", "-n", "2"], "-n is not clear; say --count"),
        (["generate", "a", "red", "star"], "unexpected 'red'; put a prompt of several words in quotation marks"),
        (["generate", "a", "--size", "big"], "not a width and a height such as 1024x768"),
        (["plan", "a", "--sampler", "dpm"], "invalid choice: 'dpm'"),
        (["draw"], "invalid choice: 'draw'"),
        (["quantize", "a"], "the following arguments are required: DST, --to"),
    ],
)
def test_a_word_that_is_no_option_is_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(args)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and words in err and err.count("\n") == 1 and "--help" in err


@pytest.mark.slow
def test_start_images_and_their_replay(tmp_path, capsys):
    star, mask, drawn, again = (tmp_path / name for name in ("star.png", "mask.png", "drawn.png", "again.png"))
    assert run("generate", PROMPT, "--steps", 2, "--seed", 3, "-o", star) == 0
    white = np.zeros((128, 128), np.uint8)
    white[:64] = 255
    Image.fromarray(white).save(mask)
    options = ("--image", star, "--mask", mask, "--mask-blur", 2, "--extend", "16,0,0,0", "--upscale", 1.5)
    assert run("generate", PROMPT, "--steps", 2, *options, "--preview", "-o", drawn) == 0
    assert Image.open(drawn).size == (224, 192)
    assert run("generate", "--replay", drawn, "-o", again) == 0
    assert np.array_equal(np.asarray(Image.open(drawn)), np.asarray(Image.open(again)))
    capsys.readouterr()
    star.unlink()
    assert run("generate", "--replay", drawn, "-o", again) == 2
    err = capsys.readouterr().err
    assert "star.png', not found beside it nor in this folder; give the file with --image" in err
    Image.new("RGB", (128, 128)).save(star)
    assert run("generate", "--replay", drawn, "-o", again) == 2
    assert "is not what it was then; needed the same pixels; give the file with --image" in capsys.readouterr().err
    assert run("generate", "--replay", drawn, "--image", star, "--no-composite", "-o", again) == 0
    said = f"drawn.png was drawn with another image than {shown(str(star))}: not the same to the bit\n"
    assert said in capsys.readouterr().err


def test_plan_of_start_images(tmp_path, capsys):
    Image.new("RGB", (130, 100)).save(tmp_path / "a.png")
    assert run("plan", PROMPT, "--image", tmp_path / "a.png", "--upscale", 2, "--residency", "resident") == 0
    out = capsys.readouterr().out
    assert "1 picture(s) of 128×96: 8 model calls" in out and "from start images of strength 0.6: 5 steps of 8" in out
    assert "then 2 times as large, noise levels 0.6429 0.5 0.3 0" in out
    assert "2. vae" in out and "1 start images" in out and "a.png is 130×100 pixels; it is scaled to 128×96" in out


def test_prompt_file_and_json_lines(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    assert run("generate", "--prompt-file", prompts, "--steps", 2, "--json", "-o", tmp_path / "a.png") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["start", "step", "step", "saved", "saved"]
    assert [one["seed"] for one in events[0]["pictures"]] == [one["seed"] for one in events[3:]]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["a-1.png", "a-2.png"]


def test_default_prompt_preview_and_no_metadata(tmp_path):
    out = tmp_path / "a.png"
    assert run("generate", "--steps", 2, "--preview", "--no-metadata", "-o", out) == 0
    assert not Image.open(out).text
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_plan(capsys):
    assert run("plan", PROMPT) == 0
    out = capsys.readouterr().out
    assert "8 model calls" in out and "1. text_encoder" in out and "0.9545" in out


def test_plan_within_a_budget(capsys):
    assert run("plan", PROMPT, "--device", "cpu", "--dtype", "fp32", "--vram", "1GiB") == 0
    assert "memory 1.00 GiB: every part stays; at most" in capsys.readouterr().out
    assert run("plan", PROMPT, "--device", "cpu", "--dtype", "fp32", "--vram", "20MiB") == 0
    assert "memory 20.00 MiB: parts take turns; transformer streamed with" in capsys.readouterr().out


def test_plan_within_a_budget_of_the_process(capsys, monkeypatch):
    monkeypatch.setattr("s3dit.runtime.budget.resident", lambda: 0)
    assert run("plan", PROMPT, "--device", "cpu", "--dtype", "bf16", "--size", "64x64", "--ram", "522MiB") == 0
    out = capsys.readouterr().out
    assert re.search(r"2\. transformer +reads 10\.3 MB, \d\.\d MB again each further pass, holds \d\.\d MB", out)
    assert re.search(r"memory 522\.00 MiB: .*transformer streamed with \d of 8 blocks kept; at most 52\d\.\d+ MiB", out)


def test_a_budget_is_said_on_stderr_and_draws_the_same_picture(tmp_path, capsys):
    options = ("generate", PROMPT, "--steps", 1, "--seed", 3, "--device", "cpu", "--dtype", "fp32")
    assert run(*options, "-o", tmp_path / "a.png") == 0
    capsys.readouterr()
    assert run(*options, "--vram", "20MiB", "-o", tmp_path / "b.png") == 0
    assert "s3dit: memory 20.00 MiB: parts take turns; transformer streamed" in capsys.readouterr().err
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))


def test_plan_kernels(capsys):
    assert run("plan", PROMPT, "--device", "cpu", "--kernels", "--guidance", 1) == 0
    out = capsys.readouterr().out
    assert "backend auto, lossless, cpu" in out
    for op in ("attention 192×6×32", "rms_norm_modulate 192×192", "gated_residual", "qk_norm_rope", "swiglu"):
        assert f"× {op}" in out
    assert "not cudnn (torch, lossless): needs cuda tensors, found cpu" in out
    assert "not reference (reference): in_place comes first" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["generate", "x", "--height", "100"], "nearest that work are 96 or 112"),
        (["generate", "x", "--steps", "-1"], "--steps is -1; needed"),
        (["generate", "x", "--dtype", "fp16"], "overflows"),
        (["generate", "x", "--device", "cuda:99"], "device"),
        (["generate", "x", "--model", "no/such/folder/here"], "no/such/folder/here"),
        (["generate", "x", "-o", "a.tif"], "needed a name that ends in .png, .jpg, .jpeg or .webp, or a folder"),
        (["generate", "x", "-o", "n" * 256 + ".png"], "cannot be written (File name too long)"),
        (["generate", "x", "-o", "/dev/full/a.png"], "cannot be written (Not a directory)"),
        (["generate", "x", "--quality", "90"], "PNG has none"),
        (["generate", "x", "--quality", "101", "-o", "a.jpg"], "--quality is 101"),
        (["generate", "a\udcff"], "prompt holds what is no Unicode text"),
        (["generate", "x", "--negative-prompt", "a\udcff"], "--negative-prompt holds what is no Unicode text"),
        (["generate", "x", "--prompt-file", "none.txt"], "a prompt is given twice"),
        (["generate", "x", "-p", "y"], "a prompt is given twice"),
        (["generate", "x", "--size", "64x64", "--width", "64"], "both --size and --width"),
        (["generate", "x", "--model", "./none"], "--model ./none: not found"),
        (["generate", "x", "--lora", "none.safetensors"], "--lora none.safetensors: not found"),
        (["generate", "--prompt-file", "none.txt"], "none.txt: not found"),
        (["generate", "--replay", "none.png"], "none.png"),
        (["generate", "x", "--strength", "1.5"], "strength is 1.5"),
        (["plan", "x", "--residency", "half"], "--residency is 'half'; needed staged, resident or streamed"),
        (["plan", "x", "--vram", "some"], "--vram is 'some'; needed a size such as 4GiB"),
        (["plan", "x", "--vram", "64KiB", "--device", "cpu"], "the smallest budget is"),
        (["plan", "x", "--vram", "1GiB", "--residency", "streamed"], "vram chooses the residency by itself"),
        (["plan", "x", "--ram", "some"], "--ram is 'some'; needed a size such as 4GiB"),
        (["plan", "x", "--ram", "64MiB", "--device", "cpu"], "the smallest budget is"),
        (["plan", "x", "--ram", "1GiB", "--vram", "1GiB"], "both --vram and --ram are given"),
        (["plan", "x", "--device", "cpu", "--graphs"], "graphs need a CUDA device, found cpu"),
        (["plan", "x", "--graphs", "--residency", "streamed"], "graphs need weights that stay where they are"),
        (["generate", "x", "--sigmas", "0.5,0.9"], "descending"),
        (["generate", "x", "--image", "none.png"], "none.png: not found"),
        (["generate", "x", "--mask", "none.png"], "--mask is given without a start image"),
        (["generate", "x", "--mask-blur", "3"], "--mask-blur and --mask-mode are about a mask; give --mask or extend"),
        (["generate", "x", "--count", "9999"], "--count is 9999; needed"),
        (["generate", "x", "--sigmas", "1,0.5", "--steps", "3"], "2 sigmas but --steps 3"),
        (["generate", "x", "--image", "none.png", "--extend", "16,0"], "needed four margins"),
        (["plan", "x", "--image", "none.png", "--strength", "0"], "strength is 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*args) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("s3dit: ") and message in lines[0]
    assert captured.out == "" and list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path, monkeypatch):
    def full(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert run("generate", "x", "-o", tmp_path / "a.png") == 2
    captured = capsys.readouterr()
    assert "a.png: cannot be written (Read-only file system)" in captured.err and "call" not in captured.err


def test_a_part_that_takes_long_shows_its_loading(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("s3dit.cli.show.LONG", 1 << 20)
    assert run("generate", "a red star", "--steps", 1, "-o", tmp_path / "a.png") == 0
    err = capsys.readouterr().err
    assert "loading transformer:" in err and "/10.3M" in err and "loading text_encoder" not in err


@pytest.mark.slow
def test_an_unknown_backend_in_the_environment_is_one_line():
    run = [sys.executable, "-m", "s3dit", "plan", PROMPT]
    done = subprocess.run(run, env=os.environ | {"S3DIT_BACKEND": "cudaa"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        "s3dit: backend is 'cudaa'; needed one of auto, reference, torch, triton\n"
    )


def test_help_names_the_environment(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    out = capsys.readouterr().out
    assert "--kernels" in out and "--vram" in out
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "S3DIT_BACKEND=auto|reference|torch|triton" in out
    assert all(
        f"  s3dit {command} " in out
        for command in ("generate", "plan", "microscope", "inspect", "convert", "quantize", "export")
    )


def test_every_field_has_its_option():
    """Options are made of the fields: one more field has one more option, and nothing here knows its name."""
    args = vars(parse(["generate", "a"]))
    for one in fields(Request):
        assert (one.name in args) == bool(one.metadata["group"]), one.name
        assert one.metadata["help"]
    python_only = {"generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type"}
    assert {one.name for one in fields(Request) if not one.metadata["group"]} == python_only


def test_spellings_of_other_programs_are_taken():
    words = ["-H", "64", "-W", "80", "--sampler", "heun", "--cfg-scale=3", "--num-inference-steps", "4", "-s", "7"]
    args = parse(["generate", "-p", "a fox", *words, "--batch-count", "2", "--init-img", "a.png"])
    found = {name: getattr(args, name) for name in ("height", "width", "solver", "cfg", "num_inference_steps", "seed")}
    assert found == {"height": 64, "width": 80, "solver": "heun", "cfg": 3.0, "num_inference_steps": 4, "seed": 7}
    assert (args.named_prompt, args.num_images_per_prompt, args.image) == ("a fox", 2, "a.png")
    assert parse(["plan", "a", "--size", "1024x768"]).size == (1024, 768)
    assert not set(SPELLINGS) & set(UNCLEAR)


def test_a_missing_file_is_said_before_torch_is_there():
    code = (
        "import sys; from s3dit.cli.main import main; code = main(['generate', 'x', '--model', './none']); "
        "sys.exit(code != 2 or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--model ./none: not found" in done.stderr


def test_a_plan_as_json(capsys):
    assert main(["plan", "--json", "--size", "64x80", "--device", "cpu"]) == 0
    out, said = capsys.readouterr()
    data = json.loads(out)
    assert (data["request"]["width"], data["request"]["height"]) == (64, 80) and data["model_calls"] == 8
    assert [stage["part"] for stage in data["stages"]] == ["text_encoder", "transformer", "vae"]
    assert f"drawing the model's own example: {data['request']['prompt'][0]}" in said


def test_what_nobody_named_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for said in ("", "s3dit: s3dit.png exists; this picture goes to s3dit-2.png\n"):
        assert run("generate", PROMPT, "--steps", 1) == 0
        assert said in capsys.readouterr().err
    assert run("generate", PROMPT, "--steps", 1, "-o", "new/folder/") == 0
    assert capsys.readouterr().out == "new/folder/s3dit.png\n"
    (tmp_path / "s3dit.png").write_bytes(b"mine")
    assert run("generate", PROMPT, "--steps", 1, "--count", 2, "-o", "s3dit.png") == 2
    captured = capsys.readouterr()
    assert "s3dit-2.png; needed names that are free" in captured.err and captured.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "s3dit-2.png", "s3dit.png"]
    assert run("generate", PROMPT, "--steps", 1, "--count", 2, "-o", "s3dit.png", "--overwrite") == 0
    assert capsys.readouterr().out == "s3dit-1.png\ns3dit-2.png\n" and (tmp_path / "s3dit.png").read_bytes() == b"mine"
    assert run("generate", PROMPT, "--steps", 1, "-o", "s3dit.png") == 0 and Image.open("s3dit.png").size == (128, 128)


def test_a_name_taken_while_it_was_drawn_is_not_overwritten(tmp_path, monkeypatch, capsys):
    from s3dit.runtime.encoders import Encoders

    decode = Encoders.decode
    monkeypatch.setattr(Encoders, "decode", lambda *args: (tmp_path / "s3dit.png").write_bytes(b"x") and decode(*args))
    assert run("generate", PROMPT, "--steps", 1, "-o", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path / 's3dit-2.png'}\n" and (tmp_path / "s3dit.png").read_bytes() == b"x"


def test_a_picture_that_cannot_be_saved_does_not_take_the_others(tmp_path, monkeypatch, capsys):
    from s3dit.inputs import save_image

    save = save_image.save_picture

    def full(image, path, *args, **options):
        if path.name == "a-2.png":
            raise RequestError(f"{path}: cannot be written (No space left on device); needed room")
        save(image, path, *args, **options)

    monkeypatch.setattr(save_image, "save_picture", full)
    assert run("generate", PROMPT, "--steps", 1, "--count", 3, "-o", tmp_path / "a.png") == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(f"s3dit: {tmp_path / 'a-2.png'}: cannot be written (No space left on device); "
                                 "needed room\n")  # fmt: skip
    assert captured.out.split() == [str(tmp_path / "a-1.png"), str(tmp_path / "a-3.png")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-1.png", "a-3.png"]


@pytest.mark.slow
def test_every_form_is_drawn_again(tmp_path):
    options = ("generate", PROMPT, "--steps", 1, "--seed", 3)
    exact = []
    for name in ("a.webp", "a.jpg", "a.png"):
        assert run(*options, "-o", tmp_path / name) == 0
        assert run("generate", "--replay", tmp_path / name, "-o", tmp_path / f"{name}.png") == 0
        exact.append(np.asarray(Image.open(tmp_path / f"{name}.png")).tobytes())
    assert len(set(exact)) == 1 and np.asarray(Image.open(tmp_path / "a.webp")).tobytes() == exact[0]
    assert run(*options, "-o", tmp_path / "small.jpg", "--quality", 5, "--no-metadata") == 0
    assert (tmp_path / "small.jpg").stat().st_size < (tmp_path / "a.jpg").stat().st_size / 2
    assert not Image.open(tmp_path / "small.jpg").getexif()


def test_what_a_form_cannot_hold_is_refused_before_it_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("s3dit.pipeline.Pipeline.__call__", lambda *args, **options: pytest.fail("drawn"))
    long = ("generate", "x " * 20_000, "--steps", 1)
    assert run(*long, "-o", tmp_path / "a.jpg") == 2
    assert "needed at most 65,533 for JPEG; save it as .png or .webp" in capsys.readouterr().err
    monkeypatch.setattr("s3dit.inputs.image_metadata.LARGEST_TEXT", 30_000)
    assert run(*long, "-o", tmp_path / "a.png") == 2 and "needed at most 30,000" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_preview_has_a_file_of_its_own(tmp_path, capsys):
    (tmp_path / "a.preview.png").write_bytes(b"mine")
    assert run("generate", PROMPT, "--steps", 1, "--preview", "-o", tmp_path / "a.png") == 0
    assert f"s3dit: the picture forms in {tmp_path / 'a.preview-2.png'}\n" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.preview.png"]
    assert (tmp_path / "a.preview.png").read_bytes() == b"mine"


def test_prompts_of_standard_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffa fox\r\na\u2028star\n".encode())))
    assert run("plan", "--prompt-file", "-") == 0
    assert "2 picture(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "--pipe"],
        ["generate", "--replay"],
        ["generate", "--prompt-file"],
        ["generate", "x", "--image"],
        ["generate", "x", "--image", "a.png", "--mask"],
        ["generate", "x", "--image", "a.png", "--control"],
    ],
)
def test_special_files_are_refused_and_what_is_said_is_printable(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("a.png")
    name = "b\x1b[31m\u202e\u2028\udcff.png"
    os.mkfifo(name)
    with contextlib.suppress(SystemExit):
        assert run(*args, f"x.safetensors:{name}" if args[-1] == "--control" else name) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err[:-1].isprintable()
    assert len(captured.err) <= 601 and sorted(os.listdir()) == ["a.png", name]


def test_words_that_are_no_option_are_shown_on_one_short_line(capsys):
    for args in (
        ["generate", "--\x1b]0;x\x07\n\u2028", "x" * 9999],
        ["\x9b31m" * 400],
        ["plan", "a", "--steps", "\r" * 999],
    ):
        with pytest.raises(SystemExit) as caught:
            main(args)
        err = capsys.readouterr().err
        assert caught.value.code == 2 and err.count("\n") == 1 and err[:-1].isprintable() and len(err) <= 601
        assert err.endswith("--help\n")


def process(*args, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "s3dit", *map(str, args)], text=True, **({"stdout": PIPE, "stderr": PIPE} | options)
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "cp866"])
def test_help_in_any_code_page(encoding):
    run = process("generate", "--help", env=os.environ | {"PYTHONIOENCODING": encoding}, encoding=encoding)
    out, err = run.communicate()
    assert run.returncode == 0 and err == "" and "1024 x 1024" in out and "-1, -2, " in out


@pytest.mark.slow
def test_a_plan_and_a_name_in_ascii(tmp_path):
    """Two in one: what is printed of a plan, and of a file that does not exist."""
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = process("plan", "狐", "--kernels", env=env)
    out, err = run.communicate()
    assert run.returncode == 0 and err == "" and "of 128x128" in out and " x attention " in out
    run = process("generate", "--prompt-file", "狐\udcff.txt", env=env)
    out, err = run.communicate()
    assert run.returncode == 2 and out == "" and err.startswith("s3dit: \\u72d0\\xff.txt: not found; needed text")


@pytest.mark.slow
def test_streams_that_are_closed_or_full_do_not_lose_the_picture(tmp_path):
    """By a shell, as a user would do it; all at once, since each imports torch."""
    command = f"{sys.executable} -m s3dit generate x --steps 1 -o"
    cases = {"a.png 2>&-": "0", "b.png >&-": "2", "c\udcff.png >/dev/full --preview": "2"}
    script = "".join(f"({command} {case}; echo $? >&9) 9>{i} & " for i, case in enumerate(cases))
    root = str(ROOT)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(["bash", "-c", script + "wait"], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert [(tmp_path / str(i)).read_text().strip() for i in range(len(cases))] == list(cases.values())
    for name in cases:
        assert Image.open(tmp_path / name.split()[0]).size == (128, 128)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stderr.count("standard output cannot be written (") == 2 and done.stdout == "a.png\n"
    assert len([*tmp_path.iterdir()]) == 2 * len(cases)


@pytest.mark.parametrize(("number", "moment"), [(signal.SIGINT, "start"), (signal.SIGTERM, "import"),
                                                (signal.SIGTERM, "drawing"), (signal.SIGINT, "drawing")])  # fmt: skip
@pytest.mark.slow
def test_a_signal_ends_it_in_one_line_with_nothing_left(tmp_path, number, moment):
    draw = process("generate", PROMPT, "--steps", 900, "--preview", "--json", "-o", tmp_path / "a.png")
    if moment == "drawing":
        for event in ("start", "step", "step", "step"):
            assert json.loads(draw.stdout.readline())["event"] == event
        assert [p.name for p in tmp_path.iterdir() if p.suffix == ".png"] == ["a.preview.png"]
    else:
        time.sleep({"start": 0.1, "import": 0.6}[moment])
    draw.send_signal(number)
    if moment == "drawing":
        time.sleep(0.02)
        draw.send_signal(signal.SIGINT)
    err = draw.communicate()[1]
    # What a program writes before its last line are the notes of a request that began.
    assert err.endswith("s3dit: stopped; nothing half-written is left\n") and "Traceback" not in err
    assert draw.returncode == 128 + number and list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model that takes seconds to write: the embedded one, its transformer 6 blocks of 57 MB."""
    folder = shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("large") / "model")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {"dim": 1536, "n_heads": 12, "n_kv_heads": 12, "axes_dims": [32, 48, 48]}
    config |= {"n_layers": 4, "n_refiner_layers": 1}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = Transformer(TransformerConfig.from_json(config, "config.json")).state_dict()
    noise = torch.rand(1 << 24, dtype=torch.bfloat16)
    weights = {name: noise[: tensor.numel()].view(tensor.shape).clone() for name, tensor in shapes.items()}
    save_file(weights, next((folder / "transformer").glob("*.safetensors")))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [["convert", "--dtype", "fp32"], ["quantize", "--to", "int4"]])
@pytest.mark.slow
def test_a_signal_while_a_model_is_written_leaves_the_old_one(large, tmp_path, command, number):
    old = shutil.copytree(EMBEDDED, tmp_path / "out")
    before = {path.relative_to(old): path.stat().st_mtime_ns for path in old.rglob("*")}
    write = process(*command, "--force", large, old)
    until = time.monotonic() + 60
    # The work has begun when the hidden folder is there.
    while len([*tmp_path.iterdir()]) == 1 and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(0.1)
    assert write.poll() is None and len([*tmp_path.iterdir()]) == 2
    write.send_signal(number)
    out, err = write.communicate()
    assert err.endswith("s3dit: stopped; nothing half-written is left\n") and "Traceback" not in err and out == ""
    assert write.returncode == 128 + number
    assert [*tmp_path.iterdir()] == [old]
    assert {path.relative_to(old): path.stat().st_mtime_ns for path in old.rglob("*")} == before


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, capsys):
    from s3dit.runtime.encoders import Encoders

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoders, "decode", stop)
    assert run("generate", PROMPT, "--steps", 1, "-o", tmp_path / "a.png") == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["plan", PROMPT], ["inspect", EMBEDDED]])
@pytest.mark.sampled(1)
def test_a_reader_that_goes_away_ends_it_quietly(args):
    run = subprocess.Popen([sys.executable, "-m", "s3dit", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 141


def test_help_does_not_import_torch():
    code = "import sys; from s3dit.cli.main import main; main(['--help']); assert 'torch' not in sys.modules"
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    code = f"import sys\ntry:\n exec({code!r})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_is_quick():
    """Under half a second; the best of three, for a busy machine."""
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "s3dit", "--help"], check=True, capture_output=True)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5
