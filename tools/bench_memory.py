"""Draw from full-size quantized files within budgets of memory: what a process has resident, and seconds a step.

    python tools/bench_memory.py int4            s3dit's int4: transformer and text encoder, 8 GB of disk
    python tools/bench_memory.py gguf            a Q4_K_M transformer and a Q4_K text encoder, 7 GB of disk
    python tools/bench_memory.py int4 --cold     also with nothing of the files in the system's cache
    python tools/bench_memory.py table FILE      the README's table from a file of results

Each draws a picture of --side pixels in --steps steps with random weights, in a process of its own, as a user would: by
default, and with each --ram. One JSON line each: peaks of resident memory, all and of its kinds, seconds a step (by the
clock and of the processor, the first step with its loading left out), and whether the picture has the bits of the one
without a budget. With --cold also the seconds of reading the same files, with and without reading ahead.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_files import COMFY, LLAMA, shapes, write_gguf, write_vae
from bench_machine import machine, watched, write_checkpoint

from s3dit.configs.infer_config import TEXT_ENCODER, TRANSFORMER
from s3dit.model.text_encoder import TextEncoder
from s3dit.model.transformer import Transformer
from s3dit.runtime.embedded import EMBEDDED

KINDS = ("int4", "gguf")
# Bytes read at a time while the disk is measured.
PIECE = 1 << 24
PROGRAM = ["-m", "s3dit"]
# The same without reading the next files ahead.
NO_AHEAD = [
    "-c",
    "import runpy, s3dit.runtime.read_ahead as it; it.ReadAhead.read = lambda *_: None; "
    "runpy.run_module('s3dit', run_name='__main__')",
]


def write(kind: str, folder: Path) -> list[str]:
    """Write the files of a kind into a folder where they are not there yet -> the options that name them."""
    if kind == "int4":
        if not (folder / "int4").is_dir():
            write_checkpoint(folder / "int4", "int4")
        return ["--model", str(folder / "int4")]
    files = {name: folder / f"{name}.gguf" for name in ("transformer", "text-encoder")}
    files["vae"] = folder / "vae.safetensors"
    if not files["vae"].exists():
        write_gguf(files["transformer"], "lumina2", shapes(Transformer, TRANSFORMER, COMFY), "Q4_K")
        write_gguf(files["text-encoder"], "qwen3", shapes(TextEncoder, TEXT_ENCODER, LLAMA), "Q4_K")
        write_vae(files["vae"])
    named = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return [*named, "--tokenizer", str(EMBEDDED / "tokenizer")]


def weights(options: list[str]) -> list[Path]:
    """The files of weights that options name."""
    paths = (Path(word) for word in options if not word.startswith("--"))
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return sorted(file for file in files if file.suffix in (".safetensors", ".gguf"))


def forget(files: list[Path]) -> None:
    """Drop files from the system's cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of_reading(files: list[Path]) -> float:
    """Seconds that plain reading of files takes, none of them in the system's cache."""
    forget(files)
    start, buffer = time.perf_counter(), bytearray(PIECE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def picture(
    options: list[str], args: argparse.Namespace, path: Path, *more: str, program: list[str] = PROGRAM
) -> dict[str, Any]:
    """Draw a picture into a file -> what `watched` says, and a hash of the file."""
    command = [sys.executable, *program, "generate", "a red circle", *options, *more, "--device", "cpu"]
    command += ["--size", f"{args.side}x{args.side}", "--steps", str(args.steps), "--guidance", "0", "--seed", "1"]
    row = watched([*command, "--json", "--verbose", "--no-metadata", "--overwrite", "-o", str(path)])
    return row | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None}


def bench(kind: str, args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a kind of files."""
    options, path = write(kind, folder), folder / "picture.png"
    files, bits = weights(options), None
    name = f"{args.side}² from full-size {kind}, {args.steps} steps"
    for budget in (None, *args.ram):
        row = picture(options, args, path, *([] if budget is None else ["--ram", budget]))
        bits = bits or row["sha256"]
        yield {"name": name, "ram": budget, "same_bits": row["sha256"] == bits} | row
    if args.cold:
        size = round(sum(file.stat().st_size for file in files) / 1e9, 2)
        yield {"name": f"plain reading of {size} GB, {kind}", "seconds": round(seconds_of_reading(files), 1)}
        for what, program in (("nothing cached", PROGRAM), ("nothing cached, no reading ahead", NO_AHEAD)):
            forget(files)
            yield {"name": f"{name}, {what}", "ram": None} | picture(options, args, path, program=program)


def table(path: Path) -> str:
    """The table of a file of results."""
    lines = ["| files | `--ram` | resident | of it mapped files | seconds a step |", "|---|---|---|---|---|"]
    for row in map(json.loads, path.read_text().splitlines()):
        if "peak_resident_gb" in row:
            cells = [
                f"{row['peak_resident_gb'] / 1.073741824:.2f} GiB",
                f"{row['peak_mapped_gb'] / 1.073741824:.2f} GiB",
            ]
            lines.append(f"| {row['name']} | {row['ram'] or '–'} | {' | '.join(cells)} | {row.get('step_s', '–')} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*KINDS, "table"))
    parser.add_argument("file", nargs="?", type=Path, help="results, for table")
    parser.add_argument("--ram", nargs="*", default=["4GiB", "2GiB"], metavar="SIZE", help="budgets (4GiB 2GiB)")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cold", action="store_true", help="also from the disk, beside plain reading")
    parser.add_argument("--folder", type=Path, help="where the files go, and stay (default: a temporary one)")
    args = parser.parse_args()
    if args.what == "table":
        print(table(args.file))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for row in bench(args.what, args, args.folder or Path(temporary)):
            print(json.dumps(row | {"machine": machine()}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
