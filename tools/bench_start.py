"""How long processes take to start: each beside one that only imports torch, as ratios."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_machine import ROOT

# What each process may take by the clock, as a share of one that imports torch, on a machine with nothing else to do.
BOUNDS = {
    "import s3dit": 0.1, "import Pipeline": 1.3, "a picture": 1.2, "inspect a picture": 0.4, "inspect a model": 0.4,
}  # fmt: skip


def bench_start(repeat: int) -> dict[str, Any]:
    """Seconds of fresh processes, the least of `repeat` each, run in turn: by the clock, with ratios, and processor's.

    Byte code is compiled in a first round that does not count, as it is by an installation.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "star.png")
        line = ("-m", "s3dit")
        commands = {
            "import torch": ("-c", "import torch"),
            "a picture": (*line, "generate", "a red star above a blue ring", "--seed", "1", "-o", picture),
            "import s3dit": ("-c", "import s3dit"),
            "import Pipeline": ("-c", "from s3dit import Pipeline"),
            "inspect a picture": (*line, "inspect", picture),
            "inspect a model": (*line, "inspect", "embedded"),
        }
        own = {"PYTHONPYCACHEPREFIX": str(Path(folder) / "compiled"), "PYTHONPATH": str(ROOT)}
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        rounds = [{name: _run(words, kept | own) for name, words in commands.items()} for _ in range(repeat + 1)]
    least = {
        name: {
            "cpu_s": min(each[name][0] for each in rounds[1:]),
            "wall_s": min(each[name][1] for each in rounds[1:]),
        }
        for name in commands
    }
    base = least["import torch"]["wall_s"]
    for row in least.values():
        row |= {"ratio": row["wall_s"] / base}
    rows = {name: {key: round(value, 3) for key, value in row.items()} for name, row in least.items()}
    over = [name for name, bound in BOUNDS.items() if rows[name]["ratio"] > bound]
    return {"name": "start of a process", "processes": rows, "bounds": BOUNDS, "over": over}


def _run(words: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run Python with these words -> seconds of the processor, and by the clock."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True, capture_output=True)
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return used, wall
