"""The benchmark of the research instruments, at the size of one head: what it says, and that it leaves no process."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_research  # noqa: E402


def test_functions_are_timed_in_turn():
    called = []
    runs = {name: lambda name=name: called.append(name) or float(len(called)) for name in "ab"}
    times = bench_research.in_turn(runs, 3)
    assert called == list("abbaab") and times == {
        "a": {"median_s": 4.0, "min_s": 1.0},
        "b": {"median_s": 3.0, "min_s": 2.0},
    }


def test_instruments_that_are_unused(monkeypatch):
    compile(bench_research.PICTURES, "pictures", "exec")
    answers = "import sys\nfor line in sys.stdin: print({'without': 2.0, 'after': 3.0}[sys.argv[1]], flush=True)"
    monkeypatch.setattr(bench_research, "PICTURES", answers)
    row = bench_research.unused(2)
    assert row["without"]["median_s"] == 2.0 and row["after"]["min_s"] == 3.0 and row["ratio"] == 1.5


def test_attention_maps(monkeypatch):
    monkeypatch.setattr(bench_research, "HEADS", 1)
    row = bench_research.maps(1)
    assert row["name"].startswith("attention maps of 16 words, 1024² and 4160 tokens") and row["ratio"] > 0
