"""`s3dit quantize`: write a model directory in a number format (`weights.quantize`)."""

import argparse
from pathlib import Path

from s3dit import __version__
from s3dit.cli.options import OWN_FORMATS, check_format
from s3dit.cli.source import check_directory, check_source, located
from s3dit.errors import RequestError
from s3dit.terminal import bar, tell

SUMMARY = "write a model directory in a number format"
EXAMPLES = (
    ("s3dit quantize path/to/Z-Image small --to int8", "the same model in half the memory"),
    ("s3dit quantize embedded tiny --to int4 --text int8-weights", "both, transformer and text encoder"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    parser.add_argument("source", metavar="SRC", help="a model in the official layout, embedded, or a hub name")
    parser.add_argument("target", type=Path, metavar="DST", help="the new model directory")
    parser.add_argument(
        "--to", required=True, metavar="FORMAT", help=f"of the transformer: {', '.join(OWN_FORMATS)}"
    )  # fmt: skip
    parser.add_argument("--text", metavar="FORMAT", help="of the text encoder but its last layers (default: as it is)")
    parser.add_argument("--force", action="store_true", help="replace the model that is at DST")


def run(args: argparse.Namespace) -> int:
    """Write SRC to DST in the format and print DST; returns the exit code. Raises RequestError and CheckpointError."""
    check_format("--to", args.to)
    check_format("--text", args.text)
    check_source(args.source)
    if args.source == "embedded-base":
        raise RequestError(
            "embedded-base shares parts with embedded; needed a whole folder; write one with "
            "`s3dit convert embedded-base DIR` and quantize that"
        )
    check_directory(args.target)
    from s3dit.weights.quantize import check, quantize, scheme_named

    named = {"transformer": args.to, "text_encoder": args.text}
    schemes = {part: scheme_named(name) for part, name in named.items() if name is not None}
    source = located(args.source)
    total = sum(checkpoint.nbytes for checkpoint in check(source, args.target, schemes, force=args.force).values())
    with bar("quantizing", total=total, unit="B", unit_scale=True) as done:
        quantize(source, args.target, schemes, version=__version__, force=args.force, progress=done.update)
    tell(args.target)
    return 0
