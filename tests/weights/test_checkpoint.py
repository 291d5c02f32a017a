"""Containers told by their bytes, refusals that never open what they refuse, and rows that read only rows."""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s3dit.errors import CheckpointError
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.container import sniff

PICKLE = pickle.dumps({"weight": [1.0, 2.0]}, protocol=2)
FOREIGN = {
    "gguf": b"GGUF\x01\x00\x00\x00" + bytes(64),
    "pickle": PICKLE,
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "page": b"\n<!DOCTYPE html><html><body>Log in</body></html>",
    "empty": b"",
    "unknown": b"\x10\x00\x00\x00\x00\x00\x00\x00 not JSON, whatever it is",
}


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def resident(path):
    """Bytes of a mapped file that this process has touched; None when it is not mapped."""
    total, mine = None, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and not line.split(" ")[0].endswith(":"):
            mine = line.endswith(str(path))
        elif mine and line.startswith("Rss:"):
            total = (total or 0) + int(line.split()[1]) * 1024
    return total


@pytest.fixture
def table(tmp_path):
    """A matrix of 16 MiB, every row different, and a vector."""
    path = tmp_path / "table.safetensors"
    matrix = torch.arange(4096.0)[:, None].expand(4096, 1024).contiguous()
    save_file({"matrix": matrix, "vector": torch.ones(4)}, path)
    return path


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_container_is_detected_by_its_bytes(kind, tmp_path):
    """The name says safetensors, the bytes say something else: the bytes win, and the message says what to do."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(FOREIGN[kind])
    assert sniff(path) == kind
    words = {"gguf": "GGUF", "pickle": "never opened", "pointer": "git lfs pull", "page": "web page"}
    with pytest.raises(CheckpointError, match=words.get(kind, "download it again")) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_torch_save_archive_is_a_pickle(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.bin")
    assert sniff(tmp_path / "model.bin") == "pickle"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_pickle_is_never_opened(protocol, name, tmp_path):
    sign = tmp_path / "exploded"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(sign), protocol=protocol))
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match="pickle"):
            open_checkpoint(path)
    assert not sign.exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert sign.exists(), "the bomb of this test is a dud"


def test_safetensors_under_another_name(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "weights.bin")
    assert open_checkpoint(tmp_path / "weights.bin").keys() == ["a"]


def test_missing_path(tmp_path):
    with pytest.raises(CheckpointError, match="not found; needed a .safetensors or .gguf file"):
        open_checkpoint(tmp_path / "nothing.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a plain file"):
        open_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    path.chmod(0)
    with pytest.raises(CheckpointError, match="not readable"):
        open_checkpoint(path)


def test_mapping(table):
    checkpoint = open_checkpoint(table)
    assert list(checkpoint) == checkpoint.keys() == ["matrix", "vector"]
    assert len(checkpoint) == 2 and "matrix" in checkpoint and "nothing" not in checkpoint
    assert checkpoint.nbytes == 4096 * 1024 * 4 + 16


def test_unknown_name(table):
    for ask in (open_checkpoint(table).entry, open_checkpoint(table).load):
        with pytest.raises(CheckpointError, match="no tensor 'nothing' among 2"):
            ask("nothing")


def test_rows(table):
    checkpoint = open_checkpoint(table)
    ids = torch.tensor([4095, 0, 7, 7])
    rows = checkpoint.rows("matrix", ids)
    assert rows.shape == (4, 1024) and torch.equal(rows[:, 5], ids.float())
    assert checkpoint.rows("matrix", ids[:0]).shape == (0, 1024)
    # A tensor of its own: it does not keep the file mapped.
    assert rows.untyped_storage().nbytes() == 4 * 1024 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/smaps")
def test_only_what_is_asked_for_is_read(table):
    """Opening touches the header, `rows` the rows with their neighbors: a page fault may map 2 MiB of 16."""
    checkpoint = open_checkpoint(table)
    checkpoint.entry("matrix")
    assert (resident(table) or 0) < 1 << 20
    kept = checkpoint.load("matrix")
    assert resident(table) < 1 << 20
    checkpoint.rows("matrix", torch.tensor([5, 6, 8]))
    assert 0 < resident(table) <= 1 << 22
    kept.sum()
    assert resident(table) >= 1 << 24


@pytest.mark.parametrize("ids", [[4096], [-1], [0, 9999]])
def test_rows_outside(table, ids):
    with pytest.raises(CheckpointError, match="it has 4096; take the tokenizer from the same model"):
        open_checkpoint(table).rows("matrix", torch.tensor(ids))


def test_rows_of_a_vector(table):
    with pytest.raises(CheckpointError, match="needed a matrix"):
        open_checkpoint(table).rows("vector", torch.tensor([0]))
