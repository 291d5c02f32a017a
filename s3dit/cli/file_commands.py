"""The commands that deal with files instead of pictures: `s3dit inspect`, `s3dit convert` and `s3dit quantize`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s3dit import __version__
from s3dit.errors import RequestError
from s3dit.terminal import bar, event, say, tell


def add(commands: Any) -> None:
    """Give a parser's commands those of this room."""
    text = "say what is in a file or folder, what is missing to draw with it, and the command that does"
    command = commands.add_parser("inspect", aliases=["look"], help=text, description=text)
    command.add_argument(
        "path", metavar="FILE",
        help="a file or folder of weights or settings, a tokenizer, an adapter, a picture, embedded, or a hub name, of "
        "which no weights are downloaded",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="the same as one JSON object")
    text = "write any checkpoint or adapter that can be read under official names, for any other tool"
    _add_convert(commands.add_parser("convert", help=text, description=text))
    text = "write a model directory in a number format"
    _add_quantize(commands.add_parser("quantize", help=text, description=text))


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a model in the official layout, or a hub name")
    parser.add_argument("target", type=Path, metavar="DST", help="the new model directory")
    parser.add_argument(
        "--to", required=True, metavar="NAME", help="of the transformer: fp8, int8, int4, fp8-weights or int8-weights"
    )
    parser.add_argument("--text", metavar="NAME", help="of the text encoder but its last layers (default: as it is)")
    parser.add_argument("--force", action="store_true", help="replace the model that is at DST")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="a file or folder of one part or of all, a hub name, org/name/file, or an adapter"
    )
    parser.add_argument(
        "target", type=Path, metavar="DST", help="the new directory, or the new *.safetensors of an adapter"
    )
    parser.add_argument("--dtype", help="bf16 or fp32 (default: floats as stored, number formats decoded to bf16)")
    parser.add_argument("--force", action="store_true", help="replace the model that is at DST")


def _inspect(args: argparse.Namespace) -> int:
    if args.command == "look":
        say("look is called inspect now: s3dit inspect FILE")
    from s3dit.cli.inspect import absent, look
    from s3dit.pipeline import EMBEDDED
    from s3dit.weights.hub import peek

    path, lacking = (EMBEDDED, []) if args.path == "embedded" else peek(args.path)
    if lacking:
        report: Any = absent(args.path, path, lacking)
    else:
        report = look(path, str(path) if lacking is None else args.path)
    if args.json:
        event(**report.to_json())
    else:
        tell(report)
    return 0


def _source(name: str) -> Path:
    """Where a model that a user names lies: "embedded", a path, or a Hub name."""
    from s3dit.pipeline import EMBEDDED
    from s3dit.weights.hub import resolve

    return EMBEDDED if name == "embedded" else resolve(name)


def _convert(args: argparse.Namespace) -> int:
    from s3dit.cli.convert import check, convert
    from s3dit.weights.convert_adapter import convert_adapter

    source = _source(args.source)
    if args.target.suffix == ".safetensors":
        if args.dtype is not None:
            raise RequestError(f"dtype is {args.dtype!r}; an adapter keeps its numbers as stored; leave --dtype out")
        for note in convert_adapter(source, args.target, version=__version__, force=args.force).notes:
            say(note)
        tell(args.target)
        return 0
    total = sum(part.nbytes for part in check(source, args.target, args.dtype, force=args.force).parts.values())
    with bar("converting", total=total, unit="B", unit_scale=True) as done:
        notes = convert(
            source, args.target, version=__version__, dtype=args.dtype, force=args.force, progress=done.update
        )
    for note in notes:
        say(note)
    tell(args.target)
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from s3dit.weights.quantize import check, quantize, scheme_named

    named = {"transformer": args.to, "text_encoder": args.text}
    schemes = {part: scheme_named(name) for part, name in named.items() if name is not None}
    source = _source(args.source)
    total = sum(checkpoint.nbytes for checkpoint in check(source, args.target, schemes, force=args.force).values())
    with bar("quantizing", total=total, unit="B", unit_scale=True) as done:
        quantize(source, args.target, schemes, version=__version__, force=args.force, progress=done.update)
    tell(args.target)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "look": _inspect,
    "convert": _convert,
    "quantize": _quantize,
}
