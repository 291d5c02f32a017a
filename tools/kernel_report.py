"""What the GPU kernels are made of and how fast they could be, without a GPU: `python tools/kernel_report.py`.

Whole passes of the model run on a pretended device, whose kernels Triton compiles and nobody runs: see `kernel_device`.
Of every kernel that they launch, at every size, the report has registers, spills, memory, occupancy, tensor-core and
copy instructions, instructions executed, and floors in time; of every pass launches, bytes, multiplications and an
estimate for H100 and H200. Estimates say what is worth measuring, and replace no measurement.

    python tools/kernel_report.py                     all, into tools/results/kernel_report-triton<version>.json
    python tools/kernel_report.py --only rows         kernels whose group, name, Op or pass has the word, in a minute
    python tools/kernel_report.py --only attention --arch 89 90
    python tools/kernel_report.py --table             writes tools/KERNELS.md from the results

Other versions of Triton: put them first on PYTHONPATH. Compiled kernels are kept in Triton's cache.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import kernel_device  # noqa: E402
from kernel_estimate import ASSUMPTIONS, rows  # noqa: E402
from kernel_passes import Pass, passes, quick_passes, short_passes  # noqa: E402
from kernel_sass import Code, analyze, disassemble, tool  # noqa: E402
from kernel_table import kernel_table, pass_table, table  # noqa: E402

RESULTS = ROOT / "tools" / "results"
DOCUMENT = ROOT / "tools" / "KERNELS.md"
# What --only looks for its word in.
SEARCHED = ("group", "kernel", "op", "pass")
Row = dict[str, Any]


def measure(capability: int, some: list[Pass]) -> dict[str, list[Row]]:
    """Run passes on a pretended device, once in a process -> rows, of "kernels", "passes" and "failed"."""
    warnings.filterwarnings("ignore", module="triton")
    kernel_device.pretend(capability)
    # Only now: the engine asks for the device when it is imported.
    import kernel_model

    from s3dit.kernels.dispatch import use_backend

    # Layouts are made on the host, before tensors are fake.
    layouts = {each: kernel_model.layout(each) for each in some}
    codes: dict[int, Code] = {}
    found: dict[str, list[Row]] = {"kernels": [], "passes": [], "failed": []}
    with kernel_device.fake_tensors():
        for each in some:
            start = time.monotonic()
            try:
                with use_backend(each.backend):
                    record = kernel_model.run(each, kernel_model.faked(layouts[each]))
            except Exception as error:  # A GPU that cannot do it is a result, and must not lose the others.
                said = f"{type(error).__name__}: {error}"[:300]
                found["failed"].append({"arch": capability, "pass": str(each), "error": said})
                print(f"sm_{capability} {each}: {said}", file=sys.stderr)
                continue
            for launch in record.launches:
                if launch.kernel is not None and id(launch.kernel) not in codes:
                    codes[id(launch.kernel)] = analyze(*disassemble(launch.kernel.asm["cubin"]))
            for kind, row in rows(capability, each, record, codes):
                found[kind].append(row)
            took = time.monotonic() - start
            print(f"sm_{capability} {each}: {len(record.launches)} launches, {took:.1f} s", file=sys.stderr)
    return found


def measure_all(tasks: list[tuple[int, list[Pass]]], processes: int) -> dict[str, list[Row]]:
    """Run passes in processes side by side, each for one GPU -> their rows, in the order of the tasks."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[Row]] = {"kernels": [], "passes": [], "failed": []}
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(measure, *task) for task in tasks]
        for _ in as_completed(futures):
            pass
        for future in futures:
            for kind, some in future.result().items():
                found[kind] += some
    # The same kernel at the same size is launched by several passes: the first of them is named.
    kernels: dict[tuple[Any, ...], Row] = {}
    for row in found["kernels"]:
        kernels.setdefault(row_key(row), row)
    return found | {"kernels": list(kernels.values())}


def row_key(row: Row) -> tuple[Any, ...]:
    """Return what a row of a kernel is known by: GPU, kernel, Op, shapes and dtypes."""
    return row["arch"], row["kernel"], row["op"], row["tensors"]


def results_path() -> Path:
    """Return the file of the results of the Triton that is installed."""
    return RESULTS / f"kernel_report-triton{version('triton')}.json"


def described() -> Row:
    """Return what the figures depend on: versions, commit, programs that are missing, assumptions."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    missing = [name for name in ("cuobjdump", "nvdisasm", "ptxas") if tool(name) is None]
    return {
        "triton": version("triton"), "torch": version("torch"), "commit": commit.stdout.strip() or "unknown",
        "missing": missing, "assumptions": ASSUMPTIONS,
    }  # fmt: skip


def written(report: Row) -> str:
    """Return the report as JSON with a line for each row."""
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in report.items()
             if not isinstance(value, list) or key == "missing"]  # fmt: skip
    for key in ("passes", "failed", "kernels"):
        body = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in report[key])
        lines.append(f" {json.dumps(key)}: [\n{body}\n ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def chosen(rows_of: dict[str, list[Row]], word: str) -> dict[str, list[Row]]:
    """Return the rows that have a word in what SEARCHED names; failed passes all."""
    return {
        kind: [row for row in some if kind == "failed" or any(word in str(row.get(key, "")) for key in SEARCHED)]
        for kind, some in rows_of.items()
    }


def tasks(arguments: argparse.Namespace) -> list[tuple[int, list[Pass]]]:
    """Return the GPUs and passes that the options ask for, the longest first.

    A word of --only that some passes have leaves the others out; with any other, the short passes run.
    """
    if arguments.quick:
        return [(capability, quick_passes()) for capability in arguments.arch]
    found = [(capability, some) for capability in arguments.arch for some in passes(capability)]
    if arguments.only:
        named = [(capability, [each for each in some if arguments.only in str(each)]) for capability, some in found]
        short = [(capability, short_passes()) for capability in arguments.arch]
        return [task for task in named if task[1]] or short
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0], epilog="\n".join(lines[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=kernel_device.TARGETS, metavar="CC",
        help="compute capabilities without their point, of 80 89 90 100 120 (all; with --only 90)",
    )  # fmt: skip
    parser.add_argument("--only", metavar="WORD", help="a word of group, kernel, Op or pass")
    parser.add_argument("--quick", action="store_true", help="only what a forward in bf16 and fp8 at 1024² launches")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where the JSON goes (tools/results; with --only nowhere)"
    )
    parser.add_argument("--processes", type=int, default=2, help="processes side by side (2)")
    parser.add_argument("--table", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)} from the results")
    arguments = parser.parse_args(argv)
    if arguments.table:
        DOCUMENT.write_text(table(DOCUMENT.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
        return
    arguments.arch = arguments.arch or ([90] if arguments.only or arguments.quick else list(kernel_device.TARGETS))
    found = measure_all(tasks(arguments), arguments.processes)
    if arguments.only:
        found = chosen(found, arguments.only)
        print(kernel_table(found["kernels"]), pass_table(found["passes"]), sep="\n\n")
    if arguments.out or not arguments.only:
        (arguments.out or results_path()).write_text(written(described() | found), encoding="utf-8")


if __name__ == "__main__":
    main()
