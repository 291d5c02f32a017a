"""`s3dit calibrate-cache`: draw a few pictures and write the numbers that caches need of a model into a file."""

import argparse
import json
from pathlib import Path

from s3dit import files
from s3dit.cache import FILE
from s3dit.cli.option_names import in_options, speaking_of_options
from s3dit.cli.options import add_model, add_request, add_runtime
from s3dit.cli.prepare import load, read_request
from s3dit.errors import RequestError
from s3dit.terminal import bar, say, tell

SUMMARY = "measure what --cache modulation and --cache magnitude need of a model"
EXAMPLES = (
    (
        "s3dit calibrate-cache --model Tongyi-MAI/Z-Image --prompt-file prompts.txt -o cache.json",
        "a picture of each prompt, at the model's own steps and guidance",
    ),
    ("s3dit calibrate-cache --steps 28 -o cache.json", "of the embedded model"),
)
# Fields of pictures in several passes, of start images, and the cache itself.
WITHOUT = (
    "upscale", "upscale_strength", "image", "mask_image", "strength", "extend", "mask_mode", "mask_blur", "composite",
    "posterior", "control", "reference", "reference_area", "reference_positions", "cache",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    add_request(parser, WITHOUT)
    add_model(parser)
    add_runtime(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", default=FILE, help=f"a .json file (default: {FILE})")
    group.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(args: argparse.Namespace) -> int:
    """Draw what the options ask for and write the file; returns the exit code."""
    path = Path(args.output)
    if path.suffix != ".json":
        raise RequestError(f"--output is {path.name!r}; needed a name that ends in .json")
    if files.taken(path) and not args.overwrite:
        raise RequestError(f"--output is {path}, which exists; name another, or replace it with --overwrite")
    pipe, plan = load(args, *read_request(args))
    from s3dit.research.cache_calibration import calibrate

    say(f"{pipe.folder.name} on {pipe.placement}; {plan.request.count} pictures of {len(plan.sigmas) - 1} steps")
    for note in map(in_options, plan.notes):
        say(note)
    with bar("calibrating", total=plan.calls * plan.request.count) as done, speaking_of_options():
        calibration = calibrate(pipe, plan.request, on_step=lambda step: done.update())
    say(f"R² of the polynomial {calibration['r2']:.3f} over {calibration['points']} steps")
    with files.whole(path) as file:
        file.write((json.dumps(calibration) + "\n").encode())
    tell(path)
    return 0
