"""`s3dit generate` and `s3dit plan`: from options to a request, a pipeline, and pictures in files."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3dit import files
from s3dit.cli.options import flag
from s3dit.cli.replay import attach, changes, replayed
from s3dit.cli.show import Progress, describe, explain, show, to_json
from s3dit.errors import RequestError
from s3dit.request import Request
from s3dit.terminal import event, say, tell

if TYPE_CHECKING:
    from s3dit.pipeline import Pipeline
    from s3dit.plan import Plan

# Arguments of `Pipeline.load` that begin a message about them.
LOADING = re.compile(r"^(vram|residency|quantize_text|quantize)\b")


def run(args: argparse.Namespace) -> int:
    """Draw what the options ask for, or with `plan` say how; returns the exit code.

    Whatever can be found wrong without torch is found before it is imported.
    """
    prompt = _prompt(args)
    wanted: dict[str, Any] = {}
    adapters: list[Any] = []
    engine: dict[str, Any] = {}
    if getattr(args, "replay", None) is not None:
        wanted, adapters, engine = replayed(args, prompt)
    if args.size is not None:
        if args.width is not None or args.height is not None:
            raise RequestError("both --size and --width or --height are given; needed one of them")
        args.width, args.height = args.size
    given = {one.name: getattr(args, one.name) for one in fields(Request) if one.metadata["group"]} | {"prompt": prompt}
    wanted |= {name: value for name, value in given.items() if value is not None}
    try:
        request = Request(**wanted)
    except RequestError as error:
        # What a picture's metadata say wrong is named as it stands there.
        raise error if getattr(args, "replay", None) else RequestError(_in_options(str(error))) from None
    files.check_named(_named(args, request))
    if args.command == "generate":
        args.paths, args.replace = _outputs(args, request.count)
    from s3dit.pipeline import Pipeline

    try:
        pipe = Pipeline.load(
            args.model, transformer=args.transformer, text_encoder=args.text_encoder, vae=args.vae,
            tokenizer=args.tokenizer, quantize=args.quantize, quantize_text=args.quantize_text,
            device=args.device, dtype=args.dtype, residency=args.residency, backend=args.backend,
            vram=args.vram, compile=args.compile, graphs=args.graphs, disable_mmap=args.disable_mmap,
        )  # fmt: skip
    except RequestError as error:
        raise RequestError(LOADING.sub(lambda found: "--" + found[0].replace("_", "-"), str(error))) from None
    for change in changes(pipe, engine):
        say(f"{args.replay} was drawn {change}: not the same to the bit")
    for report in attach(pipe, args, adapters):
        say(f"adapter {report}")
    plan = pipe.plan(request)
    if request.prompt is None:
        say(f"no prompt is given; this is the model's own example: {plan.request.prompts[0]}")
    if args.command == "plan":
        if args.json:
            event(**to_json(pipe, plan))
        else:
            tell(describe(pipe, plan))
        if args.kernels:
            tell(explain(pipe, plan))
        return 0
    return _generate(pipe, plan, args)


def _prompt(args: argparse.Namespace) -> Any:
    """The prompt, or the prompts of a file, in whichever way they are given; None where they are not."""
    given = [one for one in (args.prompt, args.named_prompt, args.prompt_file) if one is not None]
    if len(given) > 1:
        raise RequestError("a prompt is given twice; needed one of: a word, -p, --prompt-file")
    if args.prompt_file is not None:
        return files.prompts(args.prompt_file)
    return given[0] if given else None


def _named(args: argparse.Namespace, request: Request) -> Iterator[tuple[str, str]]:
    """Options and the files or models that they name."""
    for name in ("model", "transformer", "text_encoder", "vae", "tokenizer"):
        if (value := getattr(args, name)) not in (None, "embedded"):
            yield f"--{name.replace('_', '-')}", value
    yield from (("--lora", file) for file, _ in args.lora)
    yield from (("--control", str(one.model)) for one in request.controls)


def _in_options(text: str) -> str:
    """A message in the names of the options instead of the request's fields: those that are no words by themselves."""
    names = {one.name: flag(one) for one in fields(Request) if "_" in one.name and one.metadata["group"]}
    return re.sub(rf"(?<![\w./\\-])({'|'.join(names)})(?![\w./\\-])", lambda found: names[found[0]], text)


def _outputs(args: argparse.Namespace, count: int) -> tuple[list[Path], bool]:
    """The files of all pictures, and whether they may be replaced."""
    paths, replace = files.outputs(args.output, count, args.overwrite)
    if args.quality is not None and not 1 <= args.quality <= 100:
        raise RequestError(f"--quality is {args.quality}; needed 1 to 100")
    if args.quality is not None and paths[0].suffix.lower() == ".png":
        raise RequestError(f"--quality is given for {paths[0]}; PNG has none; name a .jpg or .webp with -o")
    return paths, replace


def _generate(pipe: "Pipeline", plan: "Plan", args: argparse.Namespace) -> int:
    from s3dit.inputs.image_metadata import carried

    last = plan if plan.then is None else plan.then
    for record, path, *size in zip(
        pipe.records(plan), args.paths, last.request.per_image("width"), last.request.per_image("height"), strict=True
    ):
        # What a file cannot hold is found before it is drawn.
        carried(None if args.no_metadata else record, (size[0], size[1]), files.ENDINGS[path.suffix.lower()])
    say(f"{pipe.folder.name} on {pipe.placement}; seed {plan.request.seed}")
    for note in (*plan.notes, *([] if plan.memory is None else [plan.memory])):
        say(note)
    if args.output is None and len(args.paths) == 1 and args.paths[0].name != files.DEFAULT:
        say(f"{files.DEFAULT} exists; this picture goes to {args.paths[0]}")
    if args.compile:
        say("the first step compiles the transformer's blocks, which takes a minute or more")
    if args.json:
        rows = zip(plan.request.seeds(), _prompts(plan), map(str, args.paths), strict=True)
        event(event="start", pictures=[dict(zip(("seed", "prompt", "path"), row, strict=True)) for row in rows])
    with Progress(pipe, plan, args) as progress:
        result = pipe(plan, on_step=progress)
    code = 0
    for path, picture, metadata in zip(args.paths, result.images, result.metadata, strict=True):
        try:
            found = _save(picture, path, None if args.no_metadata else metadata, args)
        except RequestError as error:
            # The others are drawn, too, and are not to be lost.
            say(error)
            code = 2
            continue
        if args.json:
            event(event="saved", path=str(found), seed=metadata["seed"], prompt=metadata["prompt"])
        else:
            tell(found)
    if args.preview and not args.json:
        show(result.images[0])
    return code


def _prompts(plan: "Plan") -> list[str]:
    """The prompt of every picture."""
    return [prompt for prompt in plan.request.prompts for _ in range(plan.request.num_images_per_prompt)]


def _save(picture: Any, path: Path, metadata: Any, args: argparse.Namespace) -> Path:
    """Save one picture -> the file, another one than was meant if somebody took the name meanwhile."""
    from s3dit.inputs.save_image import save_picture

    if args.replace:
        save_picture(picture, path, metadata, quality=args.quality)
        return path
    with files.claimed(path) as free:
        save_picture(picture, free, metadata, quality=args.quality)
    return free
