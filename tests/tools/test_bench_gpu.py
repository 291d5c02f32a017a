"""The GPU benchmark without a GPU: every stage at a tiny size, stages that fail, and lines that only CUDA reaches."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_gpu  # noqa: E402
import bench_gpu_process  # noqa: E402
from bench_gpu_row import Bench  # noqa: E402
from bench_gpu_stages import STAGES, count_outcomes  # noqa: E402
from bench_gpu_timing import Timer  # noqa: E402

MACHINE = {"gpu": "none", "driver": "none", "torch": "2", "triton": "3", "commit": "unknown"}
# What at least one row of a stage tells.
PROMISED = {
    "env": {"gb_s", "tflops", "host_us", "clocks", "python", "pinned"},
    "tests": {"passed", "failed", "failures", "ended"},
    "accuracy": {"format", "options", "distance", "bound", "within", "again_ms"},
    "forward": {"format", "side", "eager_ms", "graph_ms", "host_us", "peak_gb", "distance", "within", "finite"},
    "picture": {"text_ms", "context_ms", "steps_ms", "decode_ms", "picture_s", "peak_gb"},
    "micro": {"op", "implementation", "eager_ms", "graph_ms", "host_us", "share", "tflops", "gb_s"},
    "profile": {"device_ms", "launches", "largest"},
    "compile": {"first_ms", "eager_ms", "compiled_ms", "distance"},
    "stream": {"resident_ms", "streamed_ms", "gb_s", "same_bits"},
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.slow
def test_a_dry_stage_gives_what_is_promised(name, tmp_path):
    bench_gpu.run_stage(name, 100.0, tmp_path, True, MACHINE)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows and not [row for row in rows if "error" in row or "graph_error" in row or "skipped" in row]
    assert all(set(MACHINE) | {"stage", "at_s"} <= set(row) and row["stage"] == name for row in rows)
    assert set().union(*rows) >= PROMISED[name]
    assert all(row["same_bits"] for row in rows if "same_bits" in row)
    assert all(row["finite"] for row in rows if "finite" in row)
    assert not [row for row in rows if row.get("failures")]


def test_every_stage_has_a_limit_and_all_fit_together():
    assert set(STAGES) == set(bench_gpu.STAGE_SECONDS) == set(PROMISED)
    assert sum(bench_gpu.STAGE_SECONDS.values()) <= 500 and bench_gpu.LIMIT == 480


def test_stages_that_fail_are_reported_and_lose_nothing(tmp_path):
    write = (
        f"import json; open({str(tmp_path / 'results.jsonl')!r}, 'a').write(json.dumps({{'stage': 'good'}}) + chr(10))"
    )
    programs = {
        "raises": "raise ValueError('no such kernel')", "hangs": write + "; import time; time.sleep(60)",
        "exits": "import os; os._exit(3)", "killed": "import os; os.kill(os.getpid(), 9)", "good": write,
    }  # fmt: skip
    seconds = dict.fromkeys(programs, 5.0) | {"hangs": 1.0}
    bench_gpu.run_stages(seconds, 60.0, tmp_path, lambda name, _: [sys.executable, "-c", programs[name]], MACHINE)
    rows = bench_gpu.read_rows(tmp_path)
    ends = {row["stage"]: row["end"] for row in rows if row.get("what") == "end"}
    assert ends == {
        "raises": "exit code 1", "hangs": "killed after 1 s", "exits": "exit code 3", "killed": "exit code -9",
        "good": "ended",
    }  # fmt: skip
    assert sum(row == {"stage": "good"} for row in rows) == 2
    assert {row["stage"] for row in rows if "error" in row} == set(programs) - {"good"}
    assert "no such kernel" in (tmp_path / "log.txt").read_text()


def test_a_stage_for_which_no_time_is_left_is_skipped(tmp_path):
    bench_gpu.run_stages({"env": 25.0}, 2.0, tmp_path, lambda *_: pytest.fail("was begun"), MACHINE)
    assert "2 s left of 2" in bench_gpu.read_rows(tmp_path)[0]["skipped"]


@pytest.mark.slow
def test_a_stage_runs_in_a_process_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu_process, "program_output", lambda *_: "")  # neither git nor nvidia-smi
    monkeypatch.setenv("S3DIT_COMMIT", "abc")
    # A machine with other work may take longer than a GPU.
    monkeypatch.setitem(bench_gpu.STAGE_SECONDS, "stream", 300.0)
    bench_gpu.main(["--out", str(tmp_path), "--dry", "--only", "stream"])
    rows = bench_gpu.read_rows(tmp_path)
    assert [row["end"] for row in rows if "end" in row] == ["ended"], (tmp_path / "log.txt").read_text()
    assert len(rows) == 3 and {row["commit"] for row in rows} == {"abc"} and "| GPU |" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) < 8
    with pytest.raises(SystemExit, match="found no GPU"):
        bench_gpu.main(["--out", str(tmp_path)])


def test_an_error_of_a_measurement_is_a_row_and_so_is_a_lack_of_time(tmp_path):
    bench = Bench(torch.device("cpu"), 5.0, tmp_path, True)

    def measure():
        yield {"ms": 1.0}
        raise torch.OutOfMemoryError("of 141 GB")

    first, second = bench.attempt(1, measure, op="swiglu")
    assert first == {"op": "swiglu", "ms": 1.0}
    assert second["error"] == "OutOfMemoryError: of 141 GB" and second["op"] == "swiglu" and second["trace"]
    assert "needed 9" in next(bench.attempt(9, measure))["skipped"]


def test_the_table(tmp_path, capsys):
    rows = [
        {"stage": "forward", "gpu": "H200", "format": "bf16", "side": 1024, "eager_ms": 90.04, "peak_gb": 14.0},
        {"stage": "forward", "gpu": "H200", "format": "bf16", "side": 1024, "graph_ms": 88.0, "graph_peak_gb": 15.5},
        {"stage": "picture", "gpu": "H200", "format": "bf16", "side": 1024, "picture_s": 0.756, "peak_gb": 25.0},
        {"stage": "forward", "gpu": "H200", "format": "fp8", "side": 512, "error": "OutOfMemoryError"},
    ]
    for row in rows:
        bench_gpu.write_row(tmp_path, row)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"stage": "forw')  # a process that was killed while it wrote
    bench_gpu.main(["--table", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "| GPU | format | side | forward ms | graph ms | picture s | peak GB |",
        "|---|---|---|---|---|---|---|",
        "| H200 | bf16 | 1024² | 90.0 | 88.0 | 0.76 | 25.0 |",
        "| H200 | fp8 | 512² | – | – | – | 0.0 |",
    ]


def test_outcomes_of_plain_and_parallel_runs():
    plain = "tests/kernels/test_a.py::test_x[a b] PASSED [ 4%]\ntests/kernels/test_a.py::test_y FAILED [ 8%]\n"
    parallel = (
        "[gw1] [  3%] PASSED tests/kernels/test_a.py::test_z\n[gw0] [ 6%] ERROR tests/kernels/test_b.py::test_w \n"
    )
    row = count_outcomes(plain + parallel + "FAILED tests/kernels/test_a.py::test_y - assert 1 == 2\n2 passed\n")
    assert (row["passed"], row["failed"], row["last_line"]) == (2, 2, "2 passed")
    assert row["failures"] == ["tests/kernels/test_a.py::test_y", "tests/kernels/test_b.py::test_w"]


def test_lost_links_are_made_again(tmp_path, monkeypatch):
    for name in ("kernels", "weights"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "s3dit" / "weights").mkdir(parents=True)
    (tmp_path / "s3dit" / "kernels").write_text("../kernels")  # as git writes a link where it may not make any
    monkeypatch.setattr(bench_gpu_process, "ROOT", tmp_path)
    for _ in range(2):
        bench_gpu_process.mend_links()
        assert all((tmp_path / "s3dit" / name / "__init__.py").exists() for name in ("kernels", "weights"))


def test_every_line_for_cuda_runs_with_a_pretended_one(monkeypatch):
    """Streams, events and graphs that do nothing, but check how they are used."""
    replays = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        synchronize = record

        def elapsed_time(self, end):
            return 24.0

    stream = SimpleNamespace(wait_stream=lambda other: None)
    names = {
        "Event": Event, "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda of: nullcontext(),
        "graph": lambda of: nullcontext(), "synchronize": lambda: None, "empty_cache": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replays.append(1), reset=lambda: None),
        "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: 3e9,
    }  # fmt: skip
    for name, pretended in names.items():
        monkeypatch.setattr(torch.cuda, name, pretended)
    timer = Timer(torch.device("cuda"))
    calls = []
    # A tensor as the result: nothing may ask for its truth.
    row = timer.measure([lambda: calls.append(torch.ones(2)) or torch.ones(2)] * 3, repeats=4)
    assert (row["eager_ms"], row["graph_ms"], len(replays)) == (8.0, 2.0, 5) and row["host_us"] > 0
    assert len(timer.input_sets(lambda: 0, 1e8)) == 2 and len(timer.input_sets(lambda: 0, 1e6)) == 32
    timer.release()
    assert timer.peak_gb() == 3.0
    monkeypatch.setattr(torch.cuda, "graph", lambda of: 1 / 0)
    assert "ZeroDivisionError" in timer.measure([lambda: None])["graph_error"]
