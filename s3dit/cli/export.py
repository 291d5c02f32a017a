"""`s3dit export`: write a model as graphs that draw without s3dit (`s3dit.export.graphs`)."""

import argparse
from pathlib import Path

from s3dit import files
from s3dit.cli.option_names import speaking_of_options
from s3dit.cli.options import OWN_FORMATS, check_format
from s3dit.cli.source import check_directory, check_source
from s3dit.control import Control
from s3dit.errors import RequestError
from s3dit.terminal import say, tell

SUMMARY = "write a model as graphs that draw without s3dit: for torch.export, AOTInductor or onnxruntime"
EXAMPLES = (
    (
        "s3dit export path/to/Z-Image-Turbo -o turbo",
        'then: python turbo/runner.py "a red fox" --size 768x512 -o fox.png',
    ),
    ("s3dit export path/to/Z-Image-Turbo -o turbo --compile", "compiled for this machine's GPU, or its CPU"),
    ("s3dit export path/to/Z-Image-Turbo -o small --quantize int8", "with products of integers"),
    (
        "s3dit export path/to/Z-Image-Turbo -o posed --control path/to/Union-2.1.safetensors",
        'then: python posed/runner.py "a dancer" --control-image pose.png -o dancer.png',
    ),
    ("s3dit export path/to/Z-Image-Turbo -o turbo --onnx", "for onnxruntime; pip install onnxscript first"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    parser.add_argument("source", metavar="MODEL", help="embedded, a folder in the official layout, a file, a hub name")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR",
        help="a new folder: a graph of each part, which takes any size, prompt and batch; tokenizer.json, "
        "settings.json, and runner.py, which draws with them and needs torch or onnxruntime",
    )  # fmt: skip
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument(
        "--compile", action="store_const", dest="form", const="compiled", default="export",
        help="compile the graphs by AOTInductor, for this kind of machine only (default: graphs of torch.export, which "
        "torch runs operation by operation)",
    )  # fmt: skip
    forms.add_argument("--onnx", action="store_const", dest="form", const="onnx", help="write for onnxruntime, in fp32")
    parser.add_argument("--quantize", metavar="FORMAT", help=f"of the transformer: {', '.join(OWN_FORMATS)}")
    parser.add_argument("--quantize-text", metavar="FORMAT", help="the same for the text encoder")
    parser.add_argument(
        "--control", metavar="FILE[::STRENGTH][:version=2.0][:rule=diffusers]",
        help="a ControlNet that becomes a part of the transformer's graph; its pictures are given to runner.py",
    )  # fmt: skip
    parser.add_argument("--device", metavar="DEVICE", help="where the graphs will run: cpu or cuda (default: the best)")
    parser.add_argument("--dtype", metavar="DTYPE", help="bf16 or fp32 (default: bf16 where the device computes it)")


def run(args: argparse.Namespace) -> int:
    """Write the graphs and print the folder; returns the exit code. Raises RequestError, BackendError."""
    check_source(args.source)
    check_directory(args.output)
    check_format("--quantize", args.quantize)
    check_format("--quantize-text", args.quantize_text)
    control = _control(args.control)
    if args.output.exists():
        raise RequestError(f"{args.output} exists; needed the name of a new folder")
    from s3dit.export.graphs import write
    from s3dit.pipeline import Pipeline

    dtype = "fp32" if args.form == "onnx" and args.dtype is None else args.dtype
    with speaking_of_options():
        pipe = Pipeline.load(
            args.source, quantize=args.quantize, quantize_text=args.quantize_text, device=args.device, dtype=dtype
        )
        say(f"{pipe.folder.name} on {pipe.placement}")
        for note in pipe.sources.notes:
            say(note)
        for note in write(pipe, args.output, args.form, lambda part: say(f"writing {part}"), control):
            say(note)
    tell(args.output)
    return 0


def _control(text: str | None) -> Control | None:
    """Parse --control; raises RequestError."""
    if text is None:
        return None
    try:
        control = Control.parse(text)
    except ValueError as error:
        raise RequestError(str(error)) from None
    files.check_models([("--control", str(control.model))])
    return control
