"""`s3dit microscope` draws what `generate` draws, writes a report, and says what is wrong in a line."""

import json

import numpy as np
import pytest
from PIL import Image

from s3dit.cli.main import main, parse

PROMPT = "a red circle left of a blue star"
FAST = ("--steps", "1", "--size", "64x64", "--seed", "3")


def run(*args):
    return main([str(arg) for arg in args])


def test_it_draws_what_generate_draws(tmp_path, capsys):
    picture, folder = tmp_path / "a.png", tmp_path / "report"
    assert run("generate", PROMPT, "--steps", 2, "--seed", 3, "-o", picture) == 0
    capsys.readouterr()
    assert run("microscope", PROMPT, "--steps", 2, "--seed", 3, "-o", f"{folder}/") == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(folder / "index.html")
    assert "seed 3; a report in " in printed.err and "Traceback" not in printed.err
    drawn, looked = Image.open(picture), Image.open(folder / "picture.png")
    assert np.array_equal(np.asarray(drawn), np.asarray(looked)) and drawn.text == looked.text
    again = tmp_path / "again"
    assert run("microscope", "--replay", picture, "-o", again) == 0
    assert (again / "index.html").read_bytes() == (folder / "index.html").read_bytes()


def test_names_that_are_free_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("microscope", PROMPT, *FAST) == 0 and run("microscope", PROMPT, *FAST, "--json") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "report/index.html"
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["start", "step", "saved"]
    assert events[0] == {"event": "start", "seed": 3, "prompt": PROMPT, "path": "report-2"}
    assert events[-1]["path"] == "report-2/index.html" and (tmp_path / "report-2" / "data.safetensors").exists()
    before = (tmp_path / "report" / "index.html").read_bytes()
    assert run("microscope", "a star", *FAST, "-o", "report") == 2
    assert "--output is report, which holds index.html, data.safetensors, picture.png" in capsys.readouterr().err
    assert (tmp_path / "report" / "index.html").read_bytes() == before
    assert run("microscope", "a star", *FAST, "-o", "report", "--overwrite") == 0
    assert (tmp_path / "report" / "index.html").read_bytes() != before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["a", "-o", "file.txt"], "file.txt"),
        (["--prompt-file", "prompts.txt"], "the request is for 2 pictures; needed 1"),
        (["a", "--steps", "0"], "--steps is 0"),
        (["--replay", "file.txt"], "file.txt"),
    ],
)
def test_what_is_wrong_is_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("no folder")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    before = sorted(tmp_path.iterdir())
    assert run("microscope", *args) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("s3dit: ") and words in last and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("option", ["--count", "--upscale", "--upscale-strength"])
def test_options_of_several_pictures_or_passes_are_those_of_generate(option, capsys):
    with pytest.raises(SystemExit):
        parse(["microscope", "a", option, "2"])
    assert f"there is no option {option} here; s3dit generate has it" in capsys.readouterr().err
