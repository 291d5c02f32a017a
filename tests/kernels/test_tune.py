"""The tuning table and the estimates in its place: what can be launched, which row applies, what a search needs."""

import json
from pathlib import Path

import pytest
import torch

from s3dit.errors import BackendError
from s3dit.kernels import flash_attention, tune
from s3dit.kernels.flash_attention import CANDIDATES, estimated_config

ROWS = json.loads(Path(tune.__file__).with_name("tune.json").read_text(encoding="utf-8"))


@pytest.fixture
def on(monkeypatch):
    """Pretend to be on a GPU, with a table of one's own if given."""

    def pretend(name, capability, triton="3.6", rows=None):
        tune.measured_config.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(tune, "capability", lambda device: capability)
        monkeypatch.setattr(tune, "triton_version", lambda: triton)
        if rows is not None:
            monkeypatch.setattr(tune, "table", lambda: rows)

    yield pretend
    tune.measured_config.cache_clear()


def test_rows_are_measurements():
    assert len(tune.table()) == len(ROWS)
    for row in ROWS:
        assert set(row) == {"device", "triton", "op", "shape", "config", "ms", "refused"}
        assert row["device"] not in ("*", "interpreter") and row["ms"] > 0
        assert all(isinstance(number, int) for number in row["config"].values())


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_every_gpu_has_an_estimate_that_fits(width, capability, monkeypatch):
    monkeypatch.setattr(flash_attention, "capability", lambda device: capability)
    for long in (False, True):
        config = estimated_config(width, long, torch.device("cuda"))
        q, kv = config["BLOCK_M"] * width * 2, config["BLOCK_N"] * width * 4
        room = 227 if capability[0] in (9, 10) else 99
        assert q + config["num_stages"] * kv <= room * 1024
        assert config in CANDIDATES
    assert config["BLOCK_M"] == 128
    assert estimated_config(width, True, torch.device("cpu"))["BLOCK_M"] == 32


def test_the_most_exact_row_wins(on):
    rows = {
        ("attention", "s", "GPU", "3.6"): {"n": 1},
        ("attention", "s", "GPU", "*"): {"n": 2},
        ("attention", "s", "sm90", "*"): {"n": 3},
        ("attention", "s", "*", "*"): {"n": 4},
    }
    cases = [
        ("GPU", (9, 0), "3.6", 1), ("GPU", (9, 0), "3.9", 2), ("Other", (9, 0), "3.6", 3), ("Other", (12, 0), "3.6", 3),
        ("Other", (8, 0), "3.6", 4),
    ]  # fmt: skip
    for name, capability, triton, n in cases:
        on(name, capability, triton, rows)
        assert tune.measured_config("attention", "s", torch.device("cuda")) == {"n": n}
    assert tune.measured_config("attention", "other", torch.device("cuda")) is None


def test_trying_is_undone():
    device = torch.device("cpu")
    before = tune.config_in_force("attention", "d128 long", device)
    with pytest.raises(ZeroDivisionError), tune.trying("attention", CANDIDATES[0]):
        assert tune.config_in_force("attention", "d128 long", device) == CANDIDATES[0] != before
        1 / 0  # noqa: B018
    assert tune.config_in_force("attention", "d128 long", device) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_search_needs_a_device():
    with pytest.raises(BackendError, match="needs a CUDA device"):
        tune.search("attention", "d128 long", lambda: None, CANDIDATES)
