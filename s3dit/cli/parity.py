"""`s3dit parity`: compare a picture's stages with diffusers', or with a record; name the first that parts."""

import argparse
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3dit import files
from s3dit.cli.option_names import in_options, speaking_of_options
from s3dit.cli.options import add_model, add_request, add_runtime
from s3dit.cli.prepare import load, read_request
from s3dit.errors import RequestError
from s3dit.request import Request
from s3dit.runtime.embedded import FOLDERS
from s3dit.terminal import event, say, tell

if TYPE_CHECKING:
    from s3dit.parity.session import Choice, Outcome
    from s3dit.pipeline import Pipeline
    from s3dit.plan import Plan

SUMMARY = "compare a picture stage by stage with diffusers, or with a record"
EXAMPLES = (
    ("s3dit parity", "the embedded model against diffusers"),
    ("s3dit parity --model Tongyi-MAI/Z-Image-Turbo --steps 1", "a folder, a file, or a name on the hub"),
    ("s3dit parity --model DIR --inside layers.3 --inside vae.decoder.mid_block", "every module inside of these, too"),
    ("s3dit parity --model DIR --dtype bf16 --device cuda --truth-device cpu", "who is nearer to the fp32 truth?"),
    ("s3dit parity --model DIR --image a.png --strength 0.6 --lora style.safetensors", "as any picture is made"),
    ("s3dit parity --model DIR --also residency=streamed --also numerics=exact", "other settings, the same reference"),
    ("s3dit parity --record a.safetensors", "keep this engine's stages, without diffusers"),
    ("s3dit parity --against a.safetensors --report parity/", "compare with them elsewhere, and write a page"),
)
# Larger pictures cost more and show no more: sizes are a matter of positions, which are a stage of their own.
SIDE, STEPS = 256, 2
# Drawn by a model that brings no example of its own.
PROMPT = "a red fox in the snow"
# Settings that --also may change, and how their values are read.
ALSO: dict[str, Callable[[str], Any]] = {
    "residency": str, "vram": str, "ram": str, "backend": str, "numerics": str, "quantize": str, "quantize_text": str,
    "dtype": str, "compile": lambda word: word == "true", "graphs": lambda word: word == "true",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    add_request(parser, ("upscale", "upscale_strength"))
    add_model(parser)
    add_runtime(parser)
    add = parser.add_argument_group("what is compared").add_argument
    add("--replay", type=Path, metavar="FILE", help="as this picture was drawn; other options change it")
    add(
        "--inside", action="append", default=[], metavar="MODULE",
        help="look at every module inside of this one, with queries and keys as they are multiplied: layers.3, "
        "text.layers.*, vae.decoder.mid_block; may be repeated",
    )  # fmt: skip
    add(
        "--tolerance", action="append", default=[], metavar="[STAGE=]X",
        help="largest relative error (default: 1e-5 in fp32, else what fits), or that of a stage, such as "
        "'layers.*=2e-5'; may be repeated",
    )  # fmt: skip
    add(
        "--margin", type=float, default=2.0, metavar="X",
        help="in 16 bits: times the reference's own error, or the usual one (default: %(default)s)",
    )  # fmt: skip
    add(
        "--also", action="append", default=[], metavar="NAME=VALUE[,…]",
        help=f"hold other settings to the same reference: {', '.join(ALSO)}; may be repeated",
    )  # fmt: skip
    add = parser.add_argument_group("with what").add_argument
    add("--against", type=Path, metavar="FILE", help="stages on record in the place of diffusers")
    add("--stages", type=Path, metavar="FILE", help="stages on record in the place of this engine")
    add("--official", type=Path, metavar="DIR", help="a checkout of Tongyi-MAI/Z-Image, for its transformer")
    add("--truth-device", metavar="DEVICE", help="where the fp32 truth of 16 bits is computed, block by block: cpu")
    add = parser.add_argument_group("output").add_argument
    add("--record", type=Path, metavar="FILE", help="keep this engine's stages as safetensors; needs no diffusers")
    add("--record-reference", type=Path, metavar="FILE", help="keep the reference's, for machines without it")
    add("--report", type=Path, metavar="DIR", help="a folder for index.html, with the pictures, and report.json")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Compare what the options ask for -> 0 all stages agree, 1 a stage parts; 2 comes of the errors that it raises."""
    request, replay = read_request(_defaults(args))
    settings = [_settings(text) for text in args.also]
    choice = _choice(args)
    pipe, plan = load(args, request, replay)
    request = _small(pipe, plan, request, replay.request)
    with speaking_of_options():
        plan = pipe.plan(request)
    # Said once, also for other settings.
    request = replace(request, prompt=plan.request.prompts) if request.prompt is None else request
    from s3dit.parity.session import run as compare

    say(f"{pipe.folder.name} on {pipe.placement}")
    for note in map(in_options, plan.notes):
        say(note)

    def again(changed: dict[str, Any]) -> "tuple[Pipeline, Plan]":
        """The same model and request with other settings."""
        other = copy(args)
        vars(other).update(changed)
        return load(other, request, replay)

    also = [(text, lambda changed=changed: again(changed)) for text, changed in zip(args.also, settings, strict=True)]
    with speaking_of_options():
        outcome = compare(pipe, plan, choice, also)
    return _told(outcome, args)


def _defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what a comparison takes where the options say nothing: little, on the CPU, in fp32, from one seed."""
    args.dtype = args.dtype or "fp32"
    args.device = args.device or "cpu"
    if args.replay is not None:
        return args
    args.seed = 0 if args.seed is None else args.seed
    if args.num_inference_steps is None and args.sigmas is None:
        args.num_inference_steps = STEPS
    if args.model not in (None, *FOLDERS) and not (args.prompt or args.named_prompt or args.prompt_file):
        args.named_prompt = PROMPT
    return args


def _small(pipe: "Pipeline", plan: "Plan", request: Request, replayed: Any) -> Request:
    """The request with sides of SIDE at most where nothing says them."""
    given = (request.height, request.width, request.image, request.reference, request.latents)
    if replayed or any(each is not None for each in given):
        return request
    settings = pipe.config.settings
    return replace(request, height=min(settings.height, SIDE), width=min(settings.width, SIDE))


def _settings(text: str) -> dict[str, Any]:
    """Read settings such as residency=streamed,numerics=exact; raises RequestError."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    for name, _, value in pairs:
        if name not in ALSO or not value:
            raise RequestError(f"--also is {text!r}; needed NAME=VALUE with a name of {', '.join(ALSO)}")
    return {name: ALSO[name](value) for name, _, value in pairs}


def _choice(args: argparse.Namespace) -> "Choice":
    """What the options say about the comparison; raises RequestError."""
    for name in ("against", "stages"):
        if (path := getattr(args, name)) is not None:
            files.check_file(f"--{name}", str(path), "stages that s3dit parity wrote")
    if args.margin <= 0:
        raise RequestError(f"--margin is {args.margin}; needed more than 0")
    if args.against is not None and (args.official is not None or args.record_reference is not None):
        raise RequestError("--against takes the place of the reference; leave --official and --record-reference out")
    if args.stages is not None and (args.record is not None or args.also):
        raise RequestError("--stages takes the place of this engine; leave --record and --also out")
    from s3dit.parity.judge import Bounds, tolerances
    from s3dit.parity.session import Choice
    from s3dit.parity.taps import Inside

    tolerance, by_stage = tolerances(args.tolerance)
    only = args.record is not None and not (args.record_reference or args.report or args.also or args.official)
    return Choice(
        inside=Inside(tuple(args.inside)), bounds=Bounds(by_stage=by_stage, margin=args.margin), tolerance=tolerance,
        stages=args.stages, against=args.against, record=args.record, record_reference=args.record_reference,
        official=args.official, truth_device=args.truth_device, reference=not only,
    )  # fmt: skip


def _told(outcome: "Outcome", args: argparse.Namespace) -> int:
    """Print what came of it, write the report -> the exit code."""
    from s3dit.parity.report import as_json, lines, write

    if args.report is not None and outcome.verdict is not None:
        say(f"report in {write(outcome, args.report)}")
    if args.json:
        event(**as_json(outcome))
    else:
        for line in lines(outcome):
            tell(line)
    if args.record is not None:
        say(f"{len(outcome.mine)} stages of this engine in {args.record}")
    return 1 if outcome.parts else 0
