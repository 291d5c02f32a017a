"""`s3dit convert`: write a model in the official layout, or an adapter under official names (`convert_model`)."""

import argparse
from pathlib import Path

from s3dit import __version__
from s3dit.cli.show import LONG
from s3dit.cli.source import check_directory, check_source, located
from s3dit.errors import RequestError
from s3dit.terminal import bar, say, tell

SUMMARY = "write any checkpoint or adapter that can be read under official names, for any other tool"
EXAMPLES = (
    ("s3dit convert z-image.gguf Z-Image-plain", "the same in the official layout, for any tool"),
    ("s3dit convert embedded tiny --dtype fp32", "the embedded model, every tensor in fp32"),
    ("s3dit convert style-kohya.safetensors style.safetensors", "an adapter under the names of diffusers"),
)
DTYPES = ("bf16", "fp32")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    parser.add_argument(
        "source", metavar="SRC", help="a file or folder of one part or of all, a hub name, org/name/file, or an adapter"
    )
    parser.add_argument(
        "target", type=Path, metavar="DST", help="the new directory, or the new *.safetensors of an adapter"
    )
    parser.add_argument(
        "--dtype", metavar="DTYPE", help="bf16 or fp32 (default: floats as stored, number formats decoded to bf16)"
    )
    parser.add_argument("--force", action="store_true", help="replace the model that is at DST")


def run(args: argparse.Namespace) -> int:
    """Write SRC to DST and print DST; returns the exit code. Raises RequestError and CheckpointError."""
    adapter = args.target.suffix == ".safetensors"
    if args.dtype is not None and adapter:
        raise RequestError(f"--dtype is {args.dtype!r}; an adapter keeps its numbers as stored; leave --dtype out")
    if args.dtype not in (None, *DTYPES):
        raise RequestError(f"--dtype is {args.dtype!r}; needed {' or '.join(DTYPES)}, or none to keep what is stored")
    check_source(args.source)
    if not adapter:
        check_directory(args.target)
    from s3dit.cli.convert_model import check, convert
    from s3dit.weights.convert_adapter import convert_adapter
    from s3dit.weights.split_checkpoint import PARTS

    source = located(args.source)
    if adapter:
        if any((source / part).is_dir() for part in PARTS):
            raise RequestError(
                f"{args.target}: *.safetensors is for an adapter, {args.source} is a model; name a folder"
            )
        for note in convert_adapter(source, args.target, version=__version__, force=args.force).notes:
            say(note)
        tell(args.target)
        return 0
    total = sum(part.nbytes for part in check(source, args.target, args.dtype, force=args.force).parts.values())
    if total >= LONG:
        say("each part is read a second time after it was written: the new files carry the source's hash")
    with bar("converting", total=total, unit="B", unit_scale=True) as done:
        notes = convert(
            source, args.target, version=__version__, dtype=args.dtype, force=args.force, progress=done.update
        )
    for note in notes:
        say(note)
    tell(args.target)
    return 0
