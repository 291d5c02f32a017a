"""`s3dit generate`: draw what the options ask for, and write each picture into a file."""

import argparse
import os
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from s3dit import files
from s3dit.cli.option_names import in_options, speaking_of_options
from s3dit.cli.options import add_model, add_request, add_runtime
from s3dit.cli.prepare import load, read_request
from s3dit.cli.show import Progress, show
from s3dit.errors import RequestError
from s3dit.terminal import event, follows, say, tell

if TYPE_CHECKING:
    from s3dit.pipeline import Pipeline
    from s3dit.plan import Plan

SUMMARY = "draw pictures"
EXAMPLES = (
    ('s3dit generate "a red star above a blue ring" -o star.png', "drawn by the embedded model"),
    ("s3dit generate", "the embedded model draws its own example"),
    (
        's3dit generate "a star on a white background" --model embedded-base --negative-prompt red',
        "its undistilled twin: guidance, negative prompts",
    ),
    (
        's3dit generate "a fox in the snow" --model Tongyi-MAI/Z-Image-Turbo --size 1024x768 -o fox.png',
        "a model of the Hub, downloaded once",
    ),
    ("s3dit generate --prompt-file prompts.txt --seed 7", "one prompt a line, one picture each"),
    ('s3dit generate "a fox" --model path/to/Z-Image --lora style.safetensors:0.8', "an adapter and its strength"),
    ("s3dit generate --replay star.png -o again.png", "the same picture again"),
    ('s3dit generate "a blue star" --image star.png --strength 0.8', "redraw a start image"),
    ('s3dit generate "a blue star" --image star.png --mask mask.png', "white in the mask is painted anew"),
    ('s3dit generate "a red star" --image star.png --extend 64,0,64,0', "margins: left,top,right,bottom"),
    (
        's3dit generate "a white background" --region 0,0,64,128:"a red star at the left on a white background" '
        '--region ring.png:"a blue ring at the right on a white background"',
        "prompts for parts of the picture: boxes, or masks",
    ),
    (
        's3dit generate "a dancer" --model path/to/Z-Image-Turbo '
        '--control path/to/Union-2.1.safetensors:pose.png:0.8:0-0.7',
        "steered by a pose in the first 70 % of the steps",
    ),
    ('s3dit generate "the fox, in oil" --model path/to/Z-Image-Edit --reference fox.png', "edit a picture"),
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    add_request(parser)
    add_model(parser)
    add_runtime(parser, parallel=True)
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", metavar="FILE",
        help="a .png, .jpg or .webp, or a folder (default: s3dit.png, or the next name that is free); several "
        "pictures get -1, -2, … before the suffix",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace any output that exists, not only one FILE")
    group.add_argument(
        "--quality", type=int, metavar="N", help="of .jpg (default: 95) or .webp (default: lossless), 1 to 100"
    )
    group.add_argument(
        "--replay", type=Path, metavar="FILE", help="draw again what made this picture; other options change it"
    )
    group.add_argument(
        "--preview", action="store_true", help="show the picture forming: in the terminal, and FILE.preview.png"
    )
    group.add_argument("--json", action="store_true", help="progress as JSON lines on stdout instead of a bar")
    group.add_argument("-v", "--verbose", action="store_true", help="say at the end how many seconds each stage took")
    group.add_argument("--no-metadata", action="store_true", help="write no prompt and no settings into the file")


def run(args: argparse.Namespace) -> int:
    """Draw what the options ask for; returns the exit code."""
    started = perf_counter()
    _check_parallel(args)
    request, replay = read_request(args)
    if args.parallel is not None and follows():
        # Rank 0 writes, and says what there is to say.
        pipe, plan = load(args, request, replay, str(args.parallel))
        pipe(plan)
        return 0
    paths, replace = _outputs(args, request.count)
    pipe, plan = load(args, request, replay, args.parallel and str(args.parallel))
    return _draw(pipe, plan, paths, replace, args, perf_counter() - started)


def _check_parallel(args: argparse.Namespace) -> None:
    """Raise RequestError where one of several processes would write what all do, or decode by itself."""
    count = os.environ.get("WORLD_SIZE", "1")
    if args.parallel is None and "TORCHELASTIC_RUN_ID" in os.environ and count != "1":
        raise RequestError(f"torchrun started {count} processes that would draw the same; give --parallel {count}")
    if args.parallel is not None and args.preview:
        raise RequestError("both --parallel and --preview are given; all would decode it; leave one of them out")
    if args.parallel is not None:
        # Before torch is imported, which else writes pages about every connection to a rank that ended.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def _draw(
    pipe: "Pipeline", plan: "Plan", paths: list[Path], replace: bool, args: argparse.Namespace, start: float
) -> int:
    """Draw a plan and save its pictures; returns the exit code: 2 where one could not be saved.

    start: the seconds that were spent before, for --verbose.
    """
    _check_metadata(pipe, plan, paths, args)
    _introduce(pipe, plan, paths, args)
    with Progress(pipe, plan, json=args.json, preview=paths[0] if args.preview else None) as progress:
        result = pipe(plan, on_step=progress)
    if plan.request.cache is not None:
        reused = [record["engine"]["reused"] for record in result.metadata]
        say(f"cache: {', '.join(map(str, reused))} of {plan.calls} model calls were predicted")
    code, drawn = 0, perf_counter()
    for path, picture, metadata in zip(paths, result.images, result.metadata, strict=True):
        try:
            saved = _save(picture, path, None if args.no_metadata else metadata, args.quality, replace)
        except RequestError as error:
            # The others are drawn, too, and are not to be lost.
            say(error)
            code = 2
            continue
        if args.json:
            event(event="saved", path=str(saved), seed=metadata["seed"], prompt=metadata["prompt"])
        else:
            tell(saved)
    if args.verbose:
        _tell_seconds({"start": start} | result.seconds | {"save": perf_counter() - drawn}, args.json)
    if args.preview and not args.json:
        show(result.images[0])
    return code


def _tell_seconds(seconds: dict[str, float], as_json: bool) -> None:
    """Say the seconds of every stage: for people, or as an event."""
    if as_json:
        event(event="seconds", **{name.replace(" ", "_"): round(value, 4) for name, value in seconds.items()})
    else:
        from s3dit.runtime.stopwatch import shown_seconds

        say(f"seconds: {shown_seconds(seconds)}")


def _outputs(args: argparse.Namespace, count: int) -> tuple[list[Path], bool]:
    """The files of all pictures, and whether they may be replaced."""
    with speaking_of_options():
        paths, replace = files.outputs(args.output, count, args.overwrite)
    if args.quality is not None and not 1 <= args.quality <= 100:
        raise RequestError(f"--quality is {args.quality}; needed 1 to 100")
    if args.quality is not None and paths[0].suffix.lower() == ".png":
        raise RequestError(f"--quality is given for {paths[0]}; PNG has none; name a .jpg or .webp with -o")
    return paths, replace


def _check_metadata(pipe: "Pipeline", plan: "Plan", paths: list[Path], args: argparse.Namespace) -> None:
    """Raise the RequestError of what a file cannot hold before it is drawn."""
    from s3dit.inputs.image_metadata import carried

    last = plan if plan.then is None else plan.then
    widths, heights = last.request.per_image("width"), last.request.per_image("height")
    for record, path, *size in zip(pipe.records(plan), paths, widths, heights, strict=True):
        carried(None if args.no_metadata else record, (size[0], size[1]), files.ENDINGS[path.suffix.lower()])


def _introduce(pipe: "Pipeline", plan: "Plan", paths: list[Path], args: argparse.Namespace) -> None:
    """Say what will be drawn, where it goes and what takes long; with --json also the first event."""
    say(f"{pipe.folder.name} on {pipe.placement}; seed {plan.request.seed}")
    for note in (*map(in_options, plan.notes), *([] if plan.memory is None else [plan.memory])):
        say(note)
    if args.output is None and len(paths) == 1 and paths[0].name != files.DEFAULT:
        say(f"{files.DEFAULT} exists; this picture goes to {paths[0]}")
    if args.compile:
        say("the first step compiles the transformer's blocks, which takes a minute or more")
    if args.json:
        prompts = [prompt for prompt in plan.request.prompts for _ in range(plan.request.num_images_per_prompt)]
        rows = zip(plan.request.seeds(), prompts, map(str, paths), strict=True)
        event(event="start", pictures=[dict(zip(("seed", "prompt", "path"), row, strict=True)) for row in rows])


def _save(picture: Any, path: Path, metadata: Any, quality: int | None, replace: bool) -> Path:
    """Save one picture -> the file, another one than was meant if somebody took the name meanwhile."""
    from s3dit.inputs.save_image import save_picture

    if replace:
        save_picture(picture, path, metadata, quality=quality)
        return path
    with files.claimed(path) as free:
        save_picture(picture, free, metadata, quality=quality)
    return free
