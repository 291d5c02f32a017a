"""A rank that dies, hangs, freezes or runs out of memory ends all ranks, with a line that names it and no picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = {
    "die": "rank 1 of 2 does not answer for 8 s",
    "first": "rank 0 of 2 does not answer",
    "hang": "rank 1 of 2 hangs: no progress for 8 s amid a model call",
    "idle": "rank 1 of 2 hangs: it did nothing for 8 s between model calls",
    "freeze": "rank 1 of 2 does not answer for 8 s",
    "freeze first": "rank 0 of 2 does not answer for 8 s",
    "memory": "rank 1 of 2 failed: CUDA out of memory. Tried to allocate 2.00 GiB",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    command = [sys.executable, Path(__file__).with_name("failing.py"), folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.slow
def test_all_end_by_name(folder, kind):
    codes, failed = json.loads((folder / "codes.json").read_text()), int("first" not in kind)
    said = (folder / f"{kind}-{1 - failed}").read_text()
    assert WORDS[kind] in said and said.strip().splitlines()[-1].endswith("start them again"), said
    own = {"freeze": -9, "freeze first": -9, "die": 7, "first": 7}.get(kind, 2)
    assert (codes[f"{kind}-{1 - failed}"], codes[f"{kind}-{failed}"]) == (2, own)
    assert not (folder / f"{kind}.png").exists()
