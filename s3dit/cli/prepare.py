"""From the options that `generate` and `plan` share to a request, then to a pipeline and a plan.

`read_request` finds whatever is wrong without torch before torch is imported: values, what does not go together, files
that are not there. `load` opens the model and plans. Their errors name options, not fields (`option_names`); what a
replayed picture's metadata say wrong is named as it stands there.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from s3dit import files
from s3dit.cli.importing import importing
from s3dit.cli.option_names import FIELDS, NAMES, speaking_of_options
from s3dit.cli.options import check_format
from s3dit.cli.replay import NOTHING, Replay, attach, changes, replayed
from s3dit.control import IMAGES as CONTROL_IMAGES
from s3dit.errors import RequestError
from s3dit.request import IMAGES, Request
from s3dit.runtime.embedded import FOLDERS
from s3dit.terminal import say

if TYPE_CHECKING:
    from s3dit.pipeline import Pipeline
    from s3dit.plan import Plan

# Options that name a model or a part of one.
MODELS = ("model", "transformer", "text_encoder", "vae", "tokenizer")


def read_request(args: argparse.Namespace) -> tuple[Request, Replay]:
    """The request of the options, and the picture that it replays, if any; raises RequestError."""
    prompt = _prompt(args)
    check_options(args)
    replay = NOTHING
    if (picture := getattr(args, "replay", None)) is not None:
        files.check_file("--replay", str(picture), "a picture that s3dit drew")
        replay = replayed(args, prompt)
    given = {name: getattr(args, name) for name in FIELDS} | {"prompt": prompt}
    with speaking_of_options():
        request = Request(**replay.request | {name: value for name, value in given.items() if value is not None})
    files.check_models([*models(args), *(("--control", str(control.model)) for control in request.controls)])
    for option, path in _images(request):
        files.check_file(option, path, "a picture")
    return request, replay


def load(
    args: argparse.Namespace, request: Request, replay: Replay, parallel: str | None = None
) -> "tuple[Pipeline, Plan]":
    """Load the model that the options name, attach its adapters, and plan the request.

    parallel: as of `Pipeline.load`.
    Says on standard error in what this differs from what drew a replayed picture, what became of each adapter, and
    which prompt is drawn if none is given. Raises RequestError, BackendError, CheckpointError.
    """
    pipe = load_with_adapters(args, replay, parallel=parallel)
    with speaking_of_options():
        plan = pipe.plan(request)
    if request.prompt is None and not request.region:
        say(f"no prompt is given; drawing the model's own example: {plan.request.prompts[0]}")
    return pipe, plan


def load_with_adapters(
    args: argparse.Namespace, replay: Replay = NOTHING, report: Callable[[str], object] = say,
    parallel: str | None = None,
) -> "Pipeline":  # fmt: skip
    """Load the model that the options name, and attach its adapters; raises as `load` does.

    report: called with what differs from what drew a replayed picture, and what became of each adapter · parallel: as
    of `Pipeline.load`.
    """
    pipe = load_pipeline(args, parallel)
    with speaking_of_options():
        for change in changes(pipe, replay.engine):
            report(f"{args.replay} was drawn {change}: not the same to the bit")
        for attached in attach(pipe, args, replay.adapters):
            report(f"adapter {attached}")
    return pipe


def load_pipeline(args: argparse.Namespace, parallel: str | None = None) -> "Pipeline":
    """Open the model that the options name; raises RequestError, BackendError, CheckpointError.

    parallel: as of `Pipeline.load`.
    """
    with importing():
        from s3dit.pipeline import Pipeline

    with speaking_of_options():
        return Pipeline.load(
            args.model, transformer=args.transformer, text_encoder=args.text_encoder, vae=args.vae,
            tokenizer=args.tokenizer, quantize=args.quantize, quantize_text=args.quantize_text,
            device=args.device, dtype=args.dtype, residency=args.residency, backend=args.backend,
            numerics=args.numerics, vram=args.vram, ram=args.ram, compile=args.compile, graphs=args.graphs,
            disable_mmap=args.disable_mmap, parallel=parallel,
        )  # fmt: skip


def _prompt(args: argparse.Namespace) -> Any:
    """The prompt, or the prompts of a file, in whichever way they are given; None where they are not."""
    given = [prompt for prompt in (args.prompt, args.named_prompt, args.prompt_file) if prompt is not None]
    if len(given) > 1:
        raise RequestError("a prompt is given twice; needed one of: a word, -p, --prompt-file")
    if args.prompt_file is not None:
        return files.prompts(args.prompt_file)
    return given[0] if given else None


def check_options(args: argparse.Namespace) -> None:
    """Check options that are no fields of a request and need no model; --size becomes height and width."""
    if args.size is not None:
        if args.width is not None or args.height is not None:
            raise RequestError("both --size and --width or --height are given; needed one of them")
        args.width, args.height = args.size
    for option, name in (("--quantize", args.quantize), ("--quantize-text", args.quantize_text)):
        check_format(option, name)


def models(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Options and the files of weights or models that they name."""
    for name in MODELS:
        if (value := getattr(args, name)) not in (None, *FOLDERS):
            yield NAMES[name], value
    yield from (("--lora", file) for file in (option.file for option in args.lora))


def _images(request: Request) -> Iterator[tuple[str, str]]:
    """Options and the pictures that they name."""
    for name in IMAGES:
        yield from ((FIELDS[name], path) for path in _paths(getattr(request, name)))
    yield from ((FIELDS["reference"], path) for path in _paths(request.reference))
    yield from (("--region", path) for region in request.regions()[0] for path in _paths(region.mask))
    for control in request.controls:
        yield from (("--control", path) for name in CONTROL_IMAGES for path in _paths(getattr(control, name)))


def _paths(images: Any) -> list[str]:
    return [images] if isinstance(images, str) else [path for path in images or () if isinstance(path, str)]
