"""`s3dit microscope`: draw one picture with everything looked at, and write a page that shows it."""

import argparse
from dataclasses import replace
from pathlib import Path

from s3dit import files
from s3dit.cli.option_names import in_options, speaking_of_options
from s3dit.cli.options import add_model, add_request, add_runtime
from s3dit.cli.prepare import load, read_request
from s3dit.cli.show import Progress
from s3dit.terminal import event, say, tell

SUMMARY = "draw a picture and show what happens inside: words, heads, layers, steps"
EXAMPLES = (
    ('s3dit microscope "a red circle left of a blue star" -o report/', "open report/index.html in a browser"),
    ('s3dit microscope "a red circle left of a blue star" --concepts circle,star', "also maps of what words mean"),
    ("s3dit microscope --replay star.png -o report/", "how a picture that is there came about"),
    (
        's3dit microscope "a fox in the snow" --model Tongyi-MAI/Z-Image-Turbo --quantize int8 -o fox/',
        "a full-size model; any number format and --vram do",
    ),
    ('s3dit microscope "a blue star" --image star.png --strength 0.8', "of a start image"),
)
# Fields that a report of one picture in one pass has no use for.
WITHOUT = ("num_images_per_prompt", "upscale", "upscale_strength", "cache")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    add_request(parser, WITHOUT)
    add_model(parser)
    add_runtime(parser)
    group = parser.add_argument_group("what is looked at")
    group.add_argument(
        "--concepts", metavar="WORDS", type=_words, default=(),
        help="also show maps of concepts, such as circle,star: what in the picture is like a word, where attention "
        "says what looks at it (words, kinds of token, heads and layers are always shown)",
    )  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", metavar="DIR",
        help="a folder for index.html (a page that needs nothing else), data.safetensors (the numbers behind it) and "
        "picture.png (default: report, or the next name that is free)",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    group.add_argument("--replay", type=Path, metavar="FILE", help="look at how this picture was drawn; other options "
                       "change it")  # fmt: skip
    group.add_argument("--json", action="store_true", help="progress as JSON lines on stdout instead of a bar")


def _words(text: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def run(args: argparse.Namespace) -> int:
    """Draw what the options ask for and write the report; returns the exit code."""
    with speaking_of_options():
        folder = files.report_folder(args.output, args.overwrite)
    request, replay = read_request(args)
    if request.cache is not None:
        say(f"{args.replay} was drawn with a cache, whose spared steps have nothing to show: it is drawn without")
        request = replace(request, cache=None)
    pipe, plan = load(args, request, replay)
    from s3dit.research.report import look

    say(f"{pipe.folder.name} on {pipe.placement}; seed {plan.request.seed}; a report in {folder}")
    for note in (*map(in_options, plan.notes), *([] if plan.memory is None else [plan.memory])):
        say(note)
    if args.json:
        event(event="start", seed=plan.request.seed, prompt=plan.request.prompts[0], path=str(folder))
    with speaking_of_options(), Progress(pipe, plan, json=args.json, preview=None) as progress:
        page = look(pipe, plan, concepts=args.concepts, on_step=progress).save(folder)
    if args.json:
        event(event="saved", path=str(page))
    else:
        tell(page)
    return 0
