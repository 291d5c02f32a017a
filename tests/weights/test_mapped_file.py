"""Files after they were opened, and files that are larger than memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.errors import CheckpointError
from s3dit.runtime.embedded import EMBEDDED
from s3dit.weights.checkpoint import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"seed": 1, "height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}


def gone(path):
    path.unlink()


def renamed(path):
    path.rename(path.with_name("other.safetensors"))


def replaced(path):
    """By a file of the same size and other numbers, as a downloader does it."""
    other = path.with_name("new.safetensors")
    other.write_bytes(path.read_bytes()[:-4] + bytes(4))
    os.replace(other, path)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_folder(path):
    path.unlink()
    path.mkdir()


CHANGES = [gone, renamed, replaced, cut, a_pipe, a_folder]


@pytest.fixture
def file(tmp_path):
    save_file({"a": torch.arange(64.0), "b": torch.ones(3, 5)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_another_is_not_read(file, change):
    checkpoint = open_checkpoint(file)
    checkpoint.check()
    change(file)
    for read in (checkpoint.check, lambda: checkpoint.load("a")):
        with pytest.raises(CheckpointError, match="load the model again") as error:
            read()
        assert str(file) in str(error.value)


def test_what_was_mapped_stays_what_it_was(file):
    checkpoint = open_checkpoint(file)
    tensor = checkpoint.load("a")
    replaced(file)
    assert torch.equal(tensor, torch.arange(64.0))
    tensor += 1
    assert torch.equal(load_file(file)["a"], torch.arange(64.0))


def test_the_current_folder_may_change(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("x.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(checkpoint.load("a"), torch.arange(64.0))


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
@pytest.mark.parametrize("change", [gone, replaced, shutil.rmtree])
@pytest.mark.sampled(2)
def test_a_pipeline_never_draws_another_picture(part, change, tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    pipe = Pipeline.load(tmp_path / "model", device="cpu", dtype="fp32")
    request = SHORT | {"output_type": "pil", "prompt": "a red star"}
    pipe(**request)
    file = next((tmp_path / "model" / part).glob("*.safetensors"))
    change(file.parent if change is shutil.rmtree else file)
    with pytest.raises(CheckpointError, match="load the model again"):
        pipe(**request)


def test_reading_tensors_again_and_again_keeps_nothing(file):
    checkpoint = open_checkpoint(file)

    def read(times):
        import tracemalloc

        tracemalloc.start()
        for _ in range(times):
            checkpoint.load("a")
            checkpoint.release()
        found = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return found

    read(10)
    # Less than a pointer for each; other threads of this process allocate a little too.
    assert read(4000) - read(10) < 8 * 4000


@pytest.mark.slow
def test_a_file_larger_than_memory_is_opened_and_read(tmp_path):
    """200 GB with nothing in it but the last tensor: opened, looked at, and read at its end."""
    rows = 200 * 10**9 // 4096
    header = {
        "big": {"dtype": "BF16", "shape": [rows, 2048], "data_offsets": [0, 4096 * rows]},
        "last": {"dtype": "F32", "shape": [2], "data_offsets": [4096 * rows, 4096 * rows + 8]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(8 + len(text) + 4096 * rows)
        file.write(torch.tensor([1.0, 2.0]).numpy().tobytes())
    code = (
        "import sys; from s3dit.weights.checkpoint import open_checkpoint as o; c = o(sys.argv[1]); "
        "assert c.load('last').tolist() == [1, 2] and c.load('big')[-1].sum() == 0"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=ROOT, timeout=60)


def test_a_file_is_read_instead_of_mapped(file, tmp_path):
    """Then it may be cut under tensors that were read (under a map that ends the process), and is noticed later."""
    mapped, copied = open_checkpoint(file), open_checkpoint(file)
    copied.disable_mmap()
    for name in ("a", "b"):
        assert torch.equal(mapped.load(name), copied.load(name))
        assert mapped.load(name).data_ptr() != copied.load(name).data_ptr()
    tensors = {name: copied.load(name) for name in copied}
    del mapped
    os.truncate(file, 100)
    assert torch.equal(tensors["a"], torch.arange(64.0)) and torch.equal(tensors["b"], torch.ones(3, 5))
    with pytest.raises(CheckpointError, match="load the model again"):
        copied.load("a")


def test_no_part_of_a_model_is_mapped_where_that_is_disabled(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists a process's maps")
    # A folder of its own: pipelines of other tests in this process may map the embedded model.
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)

    def mapped(pipe):
        pictures.append(pipe(prompt="", **SHORT).latents)
        return any(str(model) in line and ".safetensors" in line for line in maps.read_text().splitlines())

    pictures = []
    kept = Pipeline.load(model, residency="resident", dtype="bf16")
    assert mapped(kept)
    del kept
    assert not mapped(Pipeline.load(model, residency="resident", dtype="bf16", disable_mmap=True))
    assert torch.equal(pictures[0][0], pictures[1][0])
