"""What convert and quantize take out of a model folder that somebody else made, and what they leave behind."""

import os
import shutil
import warnings

import pytest

from s3dit.cli.convert_model import convert
from s3dit.errors import CheckpointError
from s3dit.kernels.schemes import SCHEMES
from s3dit.runtime.embedded import EMBEDDED
from s3dit.weights import quantize as room
from s3dit.weights.model_folder import building, left_out, put_in_place
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
        put_in_place(tmp_path / "work" / "built", tmp_path / "old")
    assert (tmp_path / "old").is_dir()


@pytest.mark.parametrize("mapped", [0, 1 << 29])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_source_that_is_replaced_meanwhile_is_noticed(tmp_path, monkeypatch, writer, mapped):
    """By the next map of it, or at the end: the hash that is written down, and all tensors, are of one file."""
    monkeypatch.setattr(room, "MAPPED_BYTES", mapped)
    source = shutil.copytree(EMBEDDED, tmp_path / "source")
    (weights,) = (source / "transformer").glob("*.safetensors")
    seen = []

    def progress(count):
        seen.append(count)
        if len(seen) == 5:
            os.replace(shutil.copyfile(weights, tmp_path / "another"), weights)

    with pytest.raises(CheckpointError, match="replaced or changed since it was opened"):
        WRITERS[writer](source, tmp_path / "target", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert (len(seen) == 5) == (mapped == 0 and writer == "quantize")


@pytest.mark.parametrize("fault", [None, OSError, KeyboardInterrupt])
def test_nothing_is_left_beside_a_folder_that_was_built(tmp_path, monkeypatch, fault):
    """Nor where the end is asked for while the old one is being removed."""
    target = tmp_path / "model"
    target.mkdir()
    rmtree, asked = shutil.rmtree, []

    def interrupted(path, **options):
        asked.append(path)
        if len(asked) == 1:
            raise KeyboardInterrupt
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), building(target) as built:
        built.mkdir()
        (built / "new").touch()
        if fault:
            raise fault("of the builder")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (target / "new").exists() == (fault is None)
