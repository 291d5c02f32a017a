"""`s3dit inspect`: say what is in a file or folder, what is missing to draw with it, and the command that does."""

import argparse
from pathlib import Path
from typing import Any

from s3dit.cli.importing import importing
from s3dit.cli.source import check_source
from s3dit.runtime.embedded import FOLDERS
from s3dit.terminal import event, say, tell

SUMMARY = "say what is in a file or folder, what is missing to draw with it, and the command that does"
EXAMPLES = (
    ("s3dit inspect z-image.gguf", "what is in this file, and how to draw with it"),
    ("s3dit inspect star.png", "what made this picture, and how to draw it again"),
    ("s3dit inspect Tongyi-MAI/Z-Image-Turbo", "a model of the Hub; no weights are downloaded"),
    ("s3dit inspect embedded --json", "the embedded model, for a program"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    parser.add_argument(
        "path", metavar="FILE",
        help="a file or folder of weights or settings, a tokenizer, an adapter, a picture, embedded, or a hub name, of "
        "which no weights are downloaded",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what FILE is; returns the exit code. Raises RequestError and CheckpointError."""
    if args.command == "look":
        say("look is called inspect now: s3dit inspect FILE")
    check_source(args.path)
    from s3dit.cli.inspect_pictures import is_picture, picture

    # A picture is read without torch.
    report: Any = picture(path) if is_picture(path := Path(args.path)) else _weights(args.path)
    if args.json:
        event(**report.to_json())
    else:
        tell(report)
    return 0


def _weights(name: str) -> Any:
    """The report on anything but a picture."""
    with importing():
        from s3dit.cli.inspect_weights import absent, inspect_path
        from s3dit.weights.hub import peek

    path, lacking = (FOLDERS[name], []) if name in FOLDERS else peek(name)
    return absent(name, path, lacking) if lacking else inspect_path(path, str(path) if lacking is None else name)
