"""Files are asked for before they are needed: a part's own, then those of the next turn."""

import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from s3dit import Pipeline
from s3dit.runtime import read_ahead
from s3dit.runtime.read_ahead import ReadAhead, available
from s3dit.weights import mapped_file
from s3dit.weights.checkpoint import open_checkpoint

TINY = {"prompt": "a red star", "seed": 3, "num_inference_steps": 1, "height": 64, "width": 64}
ADVISES = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on files")


@pytest.fixture
def at_once(monkeypatch):
    """Read ahead in the thread that asks, so that the order is one."""

    class Thread:
        def __init__(self, target, args, daemon):
            assert daemon
            self.start = lambda: target(*args)

    monkeypatch.setattr(read_ahead, "threading", type("threading", (), {"Thread": Thread, "Event": threading.Event}))


@pytest.fixture
def asked(monkeypatch):
    """(file, start, bytes) of every piece that the system is asked for."""
    calls = []

    def advise(number, start, count, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append((os.readlink(f"/proc/self/fd/{number}"), start, count))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return calls


@ADVISES
def test_the_next_part_is_asked_for_while_one_computes(at_once, asked):
    pipe = Pipeline.load(device="cpu")
    events = []
    for part in ("text_encoder", "transformer", "vae"):
        module = pipe.parts.component(part).module
        first = module.decoder if part == "vae" else module
        first.register_forward_pre_hook(lambda *_, part=part: events.append((f"{part} computes", len(asked))))
    pipe(**TINY)
    parts = [part for file, *_ in asked for part in ("text_encoder", "transformer", "vae") if f"/{part}/" in file]
    # A part's own files first; the VAE is the last, and nothing follows.
    assert parts == ["text_encoder", "transformer", "transformer", "vae", "vae"]
    first = dict(reversed(events))
    assert first == {"text_encoder computes": 2, "transformer computes": 4, "vae computes": 5}


@ADVISES
@pytest.mark.slow
def test_a_resident_model_reads_each_part_once(at_once, asked):
    pipe = Pipeline.load(device="cpu", residency="resident")
    pipe(**TINY)
    asked.clear()
    pipe(**TINY)
    assert asked == []


@ADVISES
def test_whole_files_are_asked_for_in_pieces(monkeypatch, asked, tmp_path):
    save_file({"x": torch.zeros(1000)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(mapped_file, "AHEAD", 1024)
    checkpoint, size = open_checkpoint(tmp_path), (tmp_path / "model.safetensors").stat().st_size
    for _ in checkpoint.read_ahead():
        pass
    assert [start for _, start, _ in asked] == list(range(0, size, 1024)) and {count for *_, count in asked} == {1024}


def test_what_was_begun_is_left_off_for_the_latest_wish():
    """The first checkpoint goes on until the second is asked for."""
    begun, ended = threading.Event(), threading.Event()

    class Endless:
        nbytes = 0

        def read_ahead(self):
            while True:
                begun.set()
                yield

        def __del__(self):
            ended.set()

    ahead = ReadAhead()
    ahead.read([Endless()])
    assert begun.wait(30)
    ahead.read([])
    assert ended.wait(30)


def test_nothing_is_read_that_would_push_out_the_present(monkeypatch):
    class Checkpoint:
        nbytes = 600

        def __init__(self):
            self.pieces = 0

        def read_ahead(self):
            self.pieces += 1
            yield

    first, second = Checkpoint(), Checkpoint()
    monkeypatch.setattr(read_ahead, "available", lambda: 2000.0)
    read_ahead._read([first, second], threading.Event())
    assert (first.pieces, second.pieces) == (1, 0)


def test_a_file_that_is_gone_or_a_system_without_advice_is_no_error(monkeypatch, tmp_path):
    save_file({"x": torch.zeros(10)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert list(checkpoint.read_ahead()) == []
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert list(checkpoint.read_ahead()) == []


def test_memory_that_can_be_had():
    assert available() > 1 << 26
