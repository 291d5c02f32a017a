"""The command line as a user meets it: pictures, replay, JSON lines, and one line for every mistake."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from s3dit.cli import main
from s3dit.pipeline import EMBEDDED

PROMPT = "a red star above a blue ring on a white background"


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


def test_a_replay_asks_for_the_parts_and_says_what_is_otherwise(tmp_path, capsys):
    part, first, again = EMBEDDED / "transformer", tmp_path / "first.png", tmp_path / "again.png"
    assert run("generate", PROMPT, "--steps", 1, "--transformer", part, "--model", "embedded", "--quantize", "int8",
               "-o", first) == 0  # fmt: skip
    capsys.readouterr()
    assert run("generate", "--replay", first, "-o", again) == 2
    err = capsys.readouterr().err
    assert "was drawn with the transformer of diffusion_pytorch_model.safetensors; say where it is" in err
    assert "--transformer" in err and err.count("\n") == 1 and not again.exists()
    options = ("generate", "--replay", first, "--model", "embedded", "--transformer", part, "-o", again)
    assert run(*options) == 0
    said = "was drawn with its transformer in int8, this is in plain floats: not the same to the bit\n"
    assert said in capsys.readouterr().err
    assert not np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    assert run(*options, "--quantize", "int8") == 0
    assert "not the same to the bit" not in capsys.readouterr().err
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    assert run(*options, "--quantize", "int8", "--dtype", "fp32") == 0
    assert "was drawn on " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "a", "--steps", "few"], "invalid int value: 'few'"),
        (["generate", "a", "--mask-mode", "soft"], "invalid choice: 'soft'"),
        (["generate", "a", "--image", "a.png", "--extend", "1,x"], "not four margins in pixels"),
        (["generate", "a", "--nothing"], "unrecognized arguments: --nothing"),
        (["draw"], "invalid choice: 'draw'"),
        (["quantize", "a"], "the following arguments are required: DST, --to"),
    ],
)
def test_a_word_that_is_no_option_is_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(args)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and words in err and err.count("\n") == 1 and "--help" in err


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
    assert f"s3dit: {star}: not found" in capsys.readouterr().err
    Image.new("RGB", (128, 128)).save(star)
    assert run("generate", "--replay", drawn, "-o", again) == 2
    assert "is not what it was when" in capsys.readouterr().err
    assert run("generate", "--replay", drawn, "--image", star, "--no-composite", "-o", again) == 0


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
    assert [e["event"] for e in events] == ["step", "step", "saved", "saved"]
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
    assert "backend auto, cpu" in out
    for op in ("attention 192×6×32", "rms_norm_modulate 192×192", "gated_residual", "qk_norm_rope", "swiglu"):
        assert f"× {op}" in out
    assert "not cudnn (torch): needs cuda tensors, found cpu" in out
    assert "not reference (reference): in_place comes first" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["generate", "x", "--height", "100"], "nearest that work are 96 or 112"),
        (["generate", "x", "--steps", "-1"], "num_inference_steps is -1"),
        (["generate", "x", "--dtype", "fp16"], "overflows"),
        (["generate", "x", "--device", "cuda:99"], "device"),
        (["generate", "x", "--model", "no/such/folder/here"], "no/such/folder/here"),
        (["generate", "x", "-o", "no/such/folder/a.png"], "does not exist"),
        (["generate", "x", "-o", "a.jpg"], "needed a name that ends in .png"),
        (["generate", "x", "--prompt-file", "none.txt"], "both a prompt"),
        (["generate", "--prompt-file", "none.txt"], "cannot be read"),
        (["generate", "--replay", "none.png"], "none.png"),
        (["generate", "x", "--strength", "1.5"], "strength is 1.5"),
        (["plan", "x", "--residency", "half"], "residency is 'half'; needed staged, resident or streamed"),
        (["plan", "x", "--vram", "some"], "vram is 'some'; needed a size such as 4GiB"),
        (["plan", "x", "--vram", "64KiB", "--device", "cpu"], "the smallest budget is"),
        (["plan", "x", "--vram", "1GiB", "--residency", "streamed"], "vram chooses the residency by itself"),
        (["plan", "x", "--device", "cpu", "--graphs"], "graphs need a CUDA device, found cpu"),
        (["plan", "x", "--graphs", "--residency", "streamed"], "graphs need weights that stay where they are"),
        (["generate", "x", "--sigmas", "0.5,0.9"], "descending"),
        (["generate", "x", "--image", "none.png"], "none.png: not found"),
        (["generate", "x", "--mask", "none.png"], "mask_image is given without a start image"),
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
    assert "a.png cannot be written" in captured.err and "call" not in captured.err


def test_a_part_that_takes_long_shows_its_loading(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("s3dit.cli_show.LONG", 1 << 20)
    assert run("generate", "a red star", "--steps", 1, "-o", tmp_path / "a.png") == 0
    err = capsys.readouterr().err
    assert "loading transformer:" in err and "/10.3M" in err and "loading text_encoder" not in err


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
    assert "S3DIT_BACKEND=auto|reference|torch|triton" in out and "--kernels" in out and "--vram" in out


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, capsys):
    from s3dit.pipeline import Pipeline

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "_decode", stop)
    assert run("generate", PROMPT, "--steps", 1, "-o", tmp_path / "a.png") == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["plan", PROMPT], ["look", EMBEDDED]])
def test_a_reader_that_goes_away_ends_it_quietly(args):
    run = subprocess.Popen([sys.executable, "-m", "s3dit", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 141


def test_help_does_not_import_torch():
    code = "import sys, s3dit.cli; s3dit.cli.main(['--help']); assert 'torch' not in sys.modules"
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
