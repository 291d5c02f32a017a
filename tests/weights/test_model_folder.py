"""What convert and quantize take out of a model folder that somebody else made, and what they leave behind."""

import os
import shutil
import warnings

import pytest

from s3dit.convert import convert
from s3dit.kernels.linear import SCHEMES
from s3dit.pipeline import EMBEDDED
from s3dit.weights.model_folder import left_out, put
from s3dit.weights.quantize import quantize

WRITERS = {
    "convert": lambda source, target, **options: convert(source, target, version="1", **options),
    "quantize": lambda source, target, **options: quantize(
        source, target, {"transformer": SCHEMES["int8"]}, version="1", **options
    ),
}


@pytest.fixture
def model(tmp_path):
    """A model folder with a link to a secret, a link to a device and a program in its tokenizer's folder."""
    shutil.copytree(EMBEDDED, tmp_path / "model")
    (tmp_path / "secret.json").write_text('{"token": "x"}')
    words = tmp_path / "model" / "tokenizer"
    (words / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    (words / "zero.txt").symlink_to("/dev/zero")
    (words / "run.py").write_text("print(1)")
    return tmp_path / "model"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_links_and_programs_stay_behind(write, model, tmp_path):
    with pytest.warns(UserWarning, match="not copied"):
        write(model, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out" / "tokenizer").iterdir()}
    assert "tokenizer.json" in found and not found & {"special_tokens_map.json", "zero.txt", "run.py"}


def test_links_of_a_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0f"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to(os.path.join("..", "..", "blobs", "1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert left_out(snapshot)(str(snapshot), ["config.json", ".hidden"]) == [".hidden"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_an_interrupted_run_leaves_what_was_there(write, tmp_path):
    write(EMBEDDED, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(EMBEDDED, tmp_path / "out", force=True, progress=stop)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_be_put(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "work").mkdir()
    with pytest.raises(FileNotFoundError):
        put(tmp_path / "work" / "built", tmp_path / "old")
    assert (tmp_path / "old").is_dir()
