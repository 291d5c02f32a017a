"""`s3dit calibrate-cache`: a file of numbers, a picture that is drawn with it, and that picture again without it."""

import json

import numpy as np
import pytest
from PIL import Image

from s3dit.cli.main import main


@pytest.mark.slow
def test_from_a_calibration_to_a_replay(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate-cache", "a red star", "--seed", "3", "--steps", "9"]) == 0
    said = capsys.readouterr()
    assert said.out == "cache.json\n" and "R² of the polynomial" in said.err
    assert set(json.loads((tmp_path / "cache.json").read_text())) >= {"polynomial", "magnitudes", "r2"}
    drawing = ["generate", "a red star", "--seed", "3", "--steps", "9", "--size", "64x64"]
    drawing += ["--cache", "magnitude:0.5:cache.json"]
    assert main([*drawing, "-o", "a.png"]) == 0
    said = capsys.readouterr().err
    assert "of 9 model calls are computed, the others predicted" in said and "of 9 model calls were predicted" in said
    (tmp_path / "cache.json").unlink()
    assert main(["generate", "--replay", "a.png", "-o", "b.png"]) == 0
    assert np.array_equal(*(np.asarray(Image.open(name)) for name in ("a.png", "b.png")))
    assert main(["microscope", "--replay", "a.png", "-o", "report"]) == 0
    assert "was drawn with a cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "numbers.txt"], "--output is 'numbers.txt'; needed a name that ends in .json"),
        (["-o", "there.json"], "--output is there.json, which exists"),
        (["--cache", "taylor:1"], "there is no option --cache here; s3dit generate has it"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("{}")
    try:
        code = main(["calibrate-cache", "a red star", *options])
    except SystemExit as done:
        code = done.code
    assert code == 2 and message in capsys.readouterr().err
