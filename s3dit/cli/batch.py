"""`s3dit batch`: draw the rows of a file of JSON lines, each into files of its own, by several workers."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from s3dit import files
from s3dit.batch.cluster import on_cluster
from s3dit.batch.processes import in_processes
from s3dit.batch.results import Results
from s3dit.batch.rows import Row, read_rows
from s3dit.batch.stores import RESULTS, open_store
from s3dit.batch.worker import Job, Result, head, in_process
from s3dit.cli.option_names import FIELDS, LOAD, speaking_of_options
from s3dit.cli.options import add_model, add_request, add_runtime
from s3dit.cli.prepare import MODELS, check_options, models
from s3dit.errors import RequestError
from s3dit.request import LARGEST_SEED, Request
from s3dit.runtime.embedded import FOLDERS
from s3dit.runtime.ray_cluster import check_address
from s3dit.terminal import bar, event, say, tell

SUMMARY = "draw the rows of a file, by several processes or a Ray cluster; a run that was stopped goes on"
EXAMPLES = (
    ("s3dit batch prompts.jsonl -o pictures", 'a row is {"prompt": "a red star", "id": "star", "seed": 7, …}'),
    ("s3dit batch prompts.jsonl -o pictures --workers 8", "a process for each of eight GPUs, or parts of a CPU"),
    ("s3dit batch prompts.jsonl -o pictures --steps 4 --size 512x512", "of rows that do not say it themselves"),
    ("s3dit batch prompts.jsonl -o s3://bucket/pictures --ray auto", "by the workers of a Ray cluster"),
)
# Fields that belong to rows: prompts, what names files, and what needs such files.
WITHOUT = (
    "prompt", "seed", "image", "mask_image", "strength", "extend", "mask_mode", "mask_blur", "composite", "posterior",
    "control", "reference", "reference_area", "reference_positions", "region", "base_weight", "batch_place",
)  # fmt: skip
# Options of the model that decide what is drawn, beside the rows.
DECIDING = (*MODELS, "quantize", "quantize_text", "dtype", "numerics", "format", "quality", "no_metadata")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    parser.add_argument("rows", type=Path, metavar="ROWS", help="JSON lines: an object of a request's fields a line; "
                        "names of files in it begin in its folder")  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", metavar="PLACE", required=True,
        help=f"a folder, or a bucket such as s3://name/place: pictures by their rows' ids, and {RESULTS}",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="draw all rows anew, also those that are done")
    group.add_argument("--format", choices=("png", "jpg", "webp"), default="png", metavar="NAME",
                       help="of pictures: png (default), jpg or webp")  # fmt: skip
    group.add_argument("--quality", type=int, metavar="N", help="of jpg (default: 95) or webp (default: lossless)")
    group.add_argument("--no-metadata", action="store_true", help="write no prompts and no settings into pictures")
    group.add_argument("--json", action="store_true", help="each result as a JSON line on stdout instead of a bar")
    group = parser.add_argument_group("workers")
    group.add_argument(
        "--workers", type=int, metavar="N",
        help="processes, each with a model of its own, and with a GPU of several (default: 1, the command's own); on "
        "Ray: at most so many (default: what the cluster has room for at the start)",
    )  # fmt: skip
    group.add_argument(
        "--worker-threads", dest="threads", type=int, metavar="N",
        help="of a worker on a CPU (default: the cores by the workers; on Ray 1)",
    )  # fmt: skip
    group.add_argument(
        "--batch-size", dest="pass_size", type=int, default=1, metavar="N",
        help="rows with the same settings that are drawn in one pass (default: 1, for the bits of pictures "
        "drawn alone; in company they are equal within rounding)",
    )  # fmt: skip
    group.add_argument("--ray", metavar="ADDRESS", help="draw on a Ray cluster: local, auto or HOST:PORT")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="from which, and from its id, a row that gives no seed has its own (default: 0)",
    )  # fmt: skip
    add_request(parser, WITHOUT)
    # None by now, as all fields that have no option here.
    parser.set_defaults(seed=0)
    add_model(parser)
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the rows that are not done; returns the exit code: 1 where a row failed."""
    _check(args)
    settings = _settings(args)
    rows = read_rows(args.rows, args.seed, _defaults(args), settings)
    with Results(open_store(args.output), settings, args.overwrite) as results:
        left = results.left(rows)
        if len(left) < len(rows):
            say(f"{len(rows) - len(left):,} of {len(rows):,} rows are done; {len(left):,} are drawn")
        with bar("drawing", total=len(left), unit="row", disable=args.json) as done:
            for result in _results(args, left):
                if results.add(result):
                    done.update(1)
                    if args.json:
                        event(**result)
    return _finish(args, results)


def _results(args: argparse.Namespace, rows: Sequence[Row]) -> Iterator[Result]:
    """The result of every row: those of rows that are wrong as they stand first."""
    yield from (head(row) | {"error": row.error} for row in rows if row.error is not None)
    right = [row for row in rows if row.error is None]
    if not right:
        return
    job = Job(
        options=_options(args), start=Path.cwd(), folder=args.rows.resolve().parent,
        output=args.output if files.ADDRESS.match(args.output) else os.path.abspath(args.output),
        ending=f".{args.format}", quality=args.quality, metadata=not args.no_metadata, threads=args.threads,
        size=args.pass_size,
    )  # fmt: skip
    if args.ray is not None:
        yield from on_cluster(job, right, args.ray, args.workers)
    elif (args.workers or 1) == 1:
        yield from in_process(job, right)
    else:
        yield from in_processes(job, right, args.workers)


def _check(args: argparse.Namespace) -> None:
    """Check the options that need no model; raises RequestError."""
    check_options(args)
    for option, value, low, high in (
        ("--workers", args.workers, 1, 4096), ("--worker-threads", args.threads, 1, 4096),
        ("--batch-size", args.pass_size, 1, 1024), ("--seed", args.seed, -LARGEST_SEED, LARGEST_SEED),
        ("--quality", args.quality, 1, 100),
    ):  # fmt: skip
        if value is not None and not low <= value <= high:
            raise RequestError(f"{option} is {value}; needed {low} to {high}")
    if args.quality is not None and args.format == "png":
        raise RequestError("--quality is given for png, which has none; give --format jpg or webp, or leave it out")
    files.check_models(models(args))
    if args.residency is None and args.vram is None and args.ram is None:
        args.residency = "resident"
    if args.ray is not None:
        check_address(args.ray)
        args.threads = args.threads or 1
    elif args.threads is None and (args.workers or 1) > 1:
        args.threads = max(1, (os.cpu_count() or 1) // args.workers)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides beside the rows what is drawn, as JSON values: no device, no backend, which only round."""
    given = {name: getattr(args, name) for name in DECIDING if getattr(args, name) is not None}
    given |= {"lora": [asdict(option) for option in args.lora]} if args.lora else {}
    return json.loads(json.dumps(given))


def _options(args: argparse.Namespace) -> argparse.Namespace:
    """The options of the model, its files by absolute paths: workers change their current folder."""
    kept = {*LOAD, "lora", "lora_allow_partial"} - {"parallel"}
    options = argparse.Namespace(**{name: getattr(args, name) for name in kept})
    for name in MODELS:
        given = getattr(args, name)
        if given is not None and given not in FOLDERS and os.path.exists(os.path.expanduser(given)):
            setattr(options, name, os.path.abspath(os.path.expanduser(given)))
    return options


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    """JSON values of the fields that options give to all rows, checked; raises RequestError."""
    given = {name: getattr(args, name) for name in FIELDS if name not in WITHOUT and getattr(args, name) is not None}
    kinds = {spec.name: spec.metadata["kind"] for spec in fields(Request)}
    with speaking_of_options():
        request = Request(prompt="", **given)
    return {name: kinds[name].to_json(getattr(request, name)) for name in given}


def _finish(args: argparse.Namespace, results: Results) -> int:
    """Say what was drawn and how fast; returns the exit code."""
    rate = f", {results.pictures / results.seconds:.3g} a second" if results.seconds else ""
    say(f"{results.pictures:,} pictures in {results.seconds:.1f} s{rate}, after loading")
    if results.failed:
        say(f"{len(results.failed):,} rows failed; see {results.store.results}; the same command tries them again")
    if not args.json:
        tell(f"{args.output.rstrip('/')}/{results.store.results}")
    return 1 if results.failed else 0
