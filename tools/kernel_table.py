"""The kernel report as tables: Markdown for `tools/KERNELS.md`, and for a terminal."""

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- kernel report: begin -->", "<!-- kernel report: end -->"
# Rows of the document: at 1024², 4,224 tokens with a caption of 120, and the two sizes of the decoder's ends.
SHOWN = "1024²"
Row = dict[str, Any]


def report_files(results: Path) -> list[Path]:
    """Return the files of results, that of the newest Triton first."""
    return sorted(results.glob("kernel_report-triton*.json"), key=lambda path: _numbers(path.stem), reverse=True)


def _numbers(name: str) -> list[int]:
    """The numbers of a version: 3.9 comes before 3.10."""
    return [int(part) for part in name.partition("triton")[2].split(".") if part.isdigit()]


def markdown(head: list[str], body: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def size_of(row: Row) -> str:
    """Return what a kernel took in a few words: its first tensor, its weight, and the 8-bit dtype that it writes."""
    tensors = row["tensors"].split(" · ")
    words = tensors[: 2 if row["group"] == "products" else 1]
    dtypes = [each.split()[-1] for each in tensors]
    narrow = [dtype for dtype in dtypes[1:] if dtype in ("e4m3", "int8")]
    if row["group"] == "rows" and narrow and dtypes[0] not in ("e4m3", "int8"):
        words.append(f"→ {narrow[-1]}")
    return " ".join(words)


def floor_cells(row: Row) -> list[str]:
    """Return the floors of a kernel on Hopper: issue, tensor, copies, and issue by what it should stay below."""
    if "issue_us" not in row:
        return [""] * 5
    largest = row["tensor_us"] if row["mma"] and row["gflop"] else row["copy_us_H200"]
    ratio = f"{row['issue_us'] / largest:.2f}" if largest else ""
    tensor = f"{row['tensor_us']:.1f}" if row["tensor_us"] else ""
    return [f"{row['issue_us']:.1f}", tensor, f"{row['copy_us_H100']:.1f}", f"{row['copy_us_H200']:.1f}", ratio]


KERNEL_HEAD = [
    "kernel", "Op", "size", "warps", "registers", "spills", "shared KiB", "occupancy", "tensor cores", "copies",
    "instructions", "MB", "issue µs", "tensor µs", "copy µs H100", "H200", "issue ÷ floor",
]  # fmt: skip


def kernel_cells(row: Row) -> list[str]:
    """Return the cells of a kernel; instructions are those outside of the hot loop + those of a pass of it."""
    counted = str(row["outside"]) + (f" + {row['loop']}" if row["loop"] else "")
    return [
        row["kernel"].removesuffix("_kernel"), row["op"], size_of(row), str(row["warps"]), str(row["registers"]),
        str(row["spills"]), f"{row['shared'] / 1024:.0f}", f"{row['occupancy']:.0%}", row["mma"], row["copies"],
        counted, f"{row['mb']:.1f}", *floor_cells(row),
    ]  # fmt: skip


def kernel_table(rows: list[Row]) -> str:
    """Return the table of kernels."""
    return markdown(KERNEL_HEAD, [kernel_cells(row) for row in rows])


def pass_table(rows: list[Row]) -> str:
    """Return the table of whole passes: launches, bytes, multiplications, and estimated milliseconds."""
    groups = ("products", "attention", "rows", "dequantization", "convolutions", "other")
    head = ["pass", "launches", "GB", "TFLOP", *groups, "H200 ms", "H100 ms"]
    body = []
    for row in rows:
        ms = [_span(row["ms"]["H200"].get(name)) for name in groups]
        whole = [_span(row["ms"][name].get("all")) for name in ("H200", "H100")]
        body.append([row["pass"], str(row["launches"]), f"{row['gb']:.1f}", f"{row['tflop']:.1f}", *ms, *whole])
    return markdown(head, body)


def _span(ms: list[float] | None) -> str:
    """Milliseconds (low, high) in words."""
    if not ms:
        return ""
    low, high = (f"{value:.1f}" for value in ms)
    return low if low == high else f"{low}–{high}"


def architecture_table(rows: list[Row]) -> str:
    """Return registers, shared memory, spills and tensor-core instructions of each kernel on each kind of GPU."""
    archs = sorted({row["arch"] for row in rows})
    by_kernel: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        by_kernel.setdefault((row["kernel"].removesuffix("_kernel"), row["op"], size_of(row)), {})[row["arch"]] = row
    body = []
    for key, found in by_kernel.items():
        body.append([*key, *(_made_of(found[arch]) if arch in found else "–" for arch in archs)])
    return markdown(["kernel", "Op", "size", *(f"sm_{arch}" for arch in archs)], body)


def _made_of(row: Row) -> str:
    """Registers, KiB of shared memory, spills if any, and the tensor-core instruction."""
    spills = f", {row['spills']} spills" if row["spills"] else ""
    mma = row["mma"].split(" + ")[0].split(" ")[-1].split(".")[0] if row["mma"] else ""
    return f"{row['registers']}, {row['shared'] / 1024:.0f} KiB{spills}{', ' + mma if mma else ''}"


def table(text: str, results: Path) -> str:
    """Return a document with what stands between its marks made anew from the results of the newest Triton."""
    newest, *others = [json.loads(path.read_text(encoding="utf-8")) for path in report_files(results)]
    shown = [row for row in newest["kernels"] if SHOWN in row["pass"] or "tokens" in row["pass"]]
    versions = f"Triton {newest['triton']}, torch {newest['torch']}, commit {newest['commit']}"
    parts = [
        f"{versions}; the same for Triton {', '.join(each['triton'] for each in others) or 'none'} is in `results/`.",
        "### Passes", pass_table(newest["passes"]),
        "### Kernels on Hopper (sm_90)", kernel_table([row for row in shown if row["arch"] == 90]),
        "### On other GPUs", architecture_table([row for row in shown if "forward" in row["pass"]]),
    ]  # fmt: skip
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + rest.split(END)[1]
