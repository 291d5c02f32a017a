"""Pages of mapped files: given back and read again, never where somebody wrote; counted as Linux counts a map."""

import sys
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s3dit.weights import mapped_file
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.mapped_file import ask_for, give_back

sys.path.insert(0, str(Path(__file__).parent))
from mapped_pages import held  # noqa: E402

SIZE = 1 << 20


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "x.safetensors"
    save_file({name: torch.randint(0, 255, (4, SIZE // 4), dtype=torch.uint8) for name in "abc"}, path)
    return path


def test_pages_leave_and_come_again(file):
    checkpoint = open_checkpoint(file)
    a, b = checkpoint.load("a"), checkpoint.load("b")
    sums = int(a.sum()), int(b.sum())
    assert held(a) + held(b) >= 2 * (SIZE - 2 * PAGESIZE)
    give_back(a, b[1:3])
    assert held(a) == held(b[1:3]) == 0 < held(b[0]) + held(b[3])
    assert (int(a.sum()), int(b.sum())) == sums
    give_back(a, b)
    ask_for(a, b)
    assert held(a) == held(b) == 0, "what is asked for is the system's, not this process's"


@pytest.mark.parametrize("how", ["in place", "data", "numpy"])
def test_what_somebody_wrote_stays(file, how):
    a = open_checkpoint(file).load("a")
    written = {"in place": a, "data": torch.nn.Parameter(a, requires_grad=False).data, "numpy": a.numpy()}[how]
    written[2, 100_000] = 7
    expected = a.clone()
    give_back(a)
    assert torch.equal(a, expected)
    assert not torch.equal(a, open_checkpoint(file).load("a")), "the file is as it was"


def test_what_is_no_view_of_a_file_is_left_alone(file):
    plain, a = torch.ones(SIZE, dtype=torch.uint8), open_checkpoint(file).load("a")
    strided, empty = a[:, ::2], a[:0]
    int(a.sum())
    give_back(plain, strided, empty, torch.empty(3, device="meta"), torch.ones(()))
    ask_for(plain, strided, empty)
    assert int(plain.sum()) == SIZE and held(a) >= SIZE - 2 * PAGESIZE


def test_without_the_systems_word_nothing_is_given_back(file, monkeypatch, tmp_path):
    a = open_checkpoint(file).load("a")
    a[0, 0] = 1
    expected = a.clone()
    for pagemap in (tmp_path / "missing", tmp_path / "empty"):
        (tmp_path / "empty").write_bytes(b"")
        monkeypatch.setattr(mapped_file, "PAGEMAP", pagemap)
        give_back(a)
        assert torch.equal(a, expected) and held(a) >= SIZE - 2 * PAGESIZE


def test_which_tensors_are_views(file, tmp_path):
    checkpoint = open_checkpoint(file)
    assert all(checkpoint.is_mapped(name) for name in "abc")
    checkpoint.disable_mmap()
    assert not any(checkpoint.is_mapped(name) for name in "abc")
