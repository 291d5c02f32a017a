"""`s3dit plan`: print what a request will load and compute, without reading weights."""

import argparse

from s3dit.cli.options import add_model, add_request, add_runtime
from s3dit.cli.prepare import load, read_request
from s3dit.cli.show import describe, explain, kernels_text, to_json
from s3dit.terminal import event, tell

SUMMARY = "print what a request will load and compute"
EXAMPLES = (
    ("s3dit plan --model path/to/Z-Image --vram 4GiB", "how it would be done within 4 GiB of GPU memory"),
    ("s3dit plan --model path/to/Z-Image", "what would be loaded, when, how many bytes"),
    ("s3dit plan --size 64x64 --kernels", "which implementation runs each operation, and why"),
    ("s3dit plan --size 64x64 --json", "the same for a program"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    add_request(parser)
    add_model(parser)
    add_runtime(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--kernels", action="store_true", help="also print which implementation runs each operation, and why"
    )
    group.add_argument("--json", action="store_true", help="the plan as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plan of the request that the options say; returns the exit code."""
    pipe, plan = load(args, *read_request(args))
    kernels = explain(pipe, plan) if args.kernels else None
    if args.json:
        event(**to_json(pipe, plan), **({} if kernels is None else {"kernels": kernels}))
        return 0
    tell(describe(pipe, plan))
    if kernels is not None:
        tell(kernels_text(kernels))
    return 0
