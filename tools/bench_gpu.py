"""Measure on a CUDA device, in at most 8 minutes: kernels, accuracy, forwards in every number format, pictures, memory.

    python tools/bench.py --gpu --out DIR                    all stages, the most valuable first
    python tools/bench.py --gpu --out DIR --only forward     some stages
    python tools/bench.py --gpu --out DIR --dry              every stage at a tiny size on a CPU
    python tools/bench.py --gpu --table DIR                  the figures of a run as a Markdown table

Nothing is downloaded or read: weights of the official sizes are drawn at random on the device. Each stage
(bench_gpu_stages.py) is a process with a time limit of its own, so that one that crashes or hangs loses nothing of the
others. DIR gets results.jsonl (a JSON object a row, written at once, with GPU, driver, torch, triton and commit),
tests.txt, profile.txt and log.txt. A measurement that failed is a row with "error", one for which no time was left a
row with "skipped"; accuracy is said in the row ("within") and stops nothing.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_gpu_process import mend_links, place, run_process
from bench_machine import ROOT

# Stages in their order, with the seconds that each may take at most.
STAGE_SECONDS = {
    "env": 25.0, "accuracy": 75.0, "forward": 105.0, "picture": 45.0, "tests": 90.0, "micro": 70.0, "profile": 30.0,
    "compile": 35.0, "stream": 20.0,
}  # fmt: skip
LIMIT = 480.0
# Seconds without which a stage is not begun, and those before its end in which it should come to an end by itself.
LEAST, MARGIN = 8.0, 3.0
RESULTS, LOG = "results.jsonl", "log.txt"
# Characters of a row that are printed at the end; the whole is in the file.
PRINTED = 300
Command = Callable[[str, float], Sequence[str]]


def write_row(out: Path, row: Mapping[str, Any]) -> None:
    """Append a row to the results in `out`, at once and whole."""
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, default=str, ensure_ascii=False) + "\n")


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Return all rows of the results in `out`; a line that a killed process left unfinished is left out."""
    rows = []
    path = out / RESULTS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def run_stage(name: str, seconds: float, out: Path, dry: bool, machine: Mapping[str, str]) -> None:
    """Run one stage in this process and write its rows; seconds: how long it may take."""
    import torch
    from bench_gpu_row import Bench
    from bench_gpu_stages import STAGES

    bench = Bench(torch.device("cpu" if dry else "cuda"), seconds, out, dry)
    with torch.no_grad():
        for row in bench.attempt(0, lambda: STAGES[name](bench)):
            write_row(out, {**machine, "stage": name, "at_s": round(time.monotonic() - bench.start, 1), **row})


def run_stages(
    stages: Mapping[str, float], limit: float, out: Path, command: Command, machine: Mapping[str, str]
) -> None:
    """Run stages one after another, each in a process, and write a row on how each ended.

    stages: name -> seconds at most · limit: seconds of all together · command(name, seconds) -> the program of a stage.
    """
    start = time.monotonic()
    for name, most in stages.items():
        began = time.monotonic()
        seconds = min(most, limit - (began - start))
        row: dict[str, Any] = {**machine, "stage": name, "what": "end"}
        if seconds < min(most, LEAST):
            write_row(out, row | {"skipped": f"{seconds:.0f} s left of {limit:.0f}; give --limit or --only"})
            continue
        with (out / LOG).open("a", encoding="utf-8") as file:
            file.write(f"== {name}, at most {seconds:.0f} s\n")
        end = run_process(command(name, max(1.0, seconds - MARGIN)), seconds, out / LOG)
        row |= {"end": end, "seconds": round(time.monotonic() - began, 1)}
        if end != "ended":
            row["error"] = f"stage {name}: {end}; see {LOG}"
        write_row(out, row)
        print(f"{name}: {end}, {row['seconds']} s", flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures of forwards and pictures as a Markdown table, a line for each GPU, format and side."""
    figures: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        if row.get("stage") in ("forward", "picture") and "side" in row:
            cells = figures.setdefault((row["gpu"], row["format"], row["side"]), {})
            for key in ("eager_ms", "graph_ms", "picture_s"):
                if key in row:
                    cells[key] = row[key]
            peaks = [row[key] for key in ("peak_gb", "graph_peak_gb") if key in row]
            cells["peak_gb"] = max([cells.get("peak_gb", 0.0), *peaks])
    lines = ["| GPU | format | side | forward ms | graph ms | picture s | peak GB |", "|---|---|---|---|---|---|---|"]
    for (gpu, number_format, side), cells in figures.items():
        digits = {"eager_ms": 1, "graph_ms": 1, "picture_s": 2, "peak_gb": 1}
        shown = [f"{cells[key]:.{digit}f}" if key in cells else "–" for key, digit in digits.items()]
        lines.append(f"| {gpu} | {number_format} | {side}² | {' | '.join(shown)} |")
    return "\n".join(lines)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return errors, distances out of bounds and failed tests, a line each, and the table."""
    wrong = [row for row in rows if "error" in row or row.get("within") is False or row.get("failures")]
    lines = [
        json.dumps({k: v for k, v in row.items() if k not in ("gpu", "driver", "trace")})[:PRINTED] for row in wrong
    ]
    return "\n".join([f"{len(rows)} rows, of which {len(wrong)} tell of a fault", *lines[:20], "", table(rows)])


def main(argv: list[str]) -> None:
    """Parse the command line and measure; exit code 0 even where stages failed, since the results say so."""
    parser = argparse.ArgumentParser(
        prog="bench.py --gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the result files; earlier results there are kept")
    parser.add_argument("--only", nargs="+", choices=STAGE_SECONDS, metavar="STAGE", help=" ".join(STAGE_SECONDS))
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="of all stages (default 480)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU: proves the program, measures nothing")
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the table of a folder of results and stop")
    # A stage's own process: its name and seconds, and what the figures depend on.
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--machine", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.table is not None:
        print(table(read_rows(args.table)))
        return
    if args.out is None:
        parser.error("--out is missing; needed a folder for the results, such as --out results")
    sys.path.insert(0, str(ROOT))
    if args.stage is not None:
        import bench_gpu_stages  # noqa: F401

        # What the imports made is left out of the search for garbage before every measurement.
        gc.freeze()
        run_stage(args.stage[0], float(args.stage[1]), args.out, args.dry, args.machine)
        return
    mend_links()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    machine = place(args.dry)
    if machine["gpu"] == "none" and not args.dry:
        raise SystemExit(
            "found no GPU (neither nvidia-smi nor torch names any); needed a CUDA device; run this where there is one, "
            "or with --dry"
        )

    def command(name: str, seconds: float) -> list[str]:
        """Return the program of a stage: this one, with the stage's name and seconds."""
        own = [sys.executable, str(ROOT / "tools" / "bench.py"), "--gpu", "--out", str(out), *["--dry"] * args.dry]
        return [*own, "--machine", json.dumps(machine), "--stage", name, str(seconds)]

    stages = {name: most for name, most in STAGE_SECONDS.items() if args.only is None or name in args.only}
    run_stages(stages, args.limit, out, command, machine)
    print(summary(read_rows(out)))
