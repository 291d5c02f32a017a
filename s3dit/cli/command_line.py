"""The command line: `s3dit generate`, `plan`, `look`, `convert`, `quantize`. Flags are made from Request's fields.

Everything the user may get wrong ends in one line on stderr and exit code 2, without a traceback; Ctrl-C ends with
130, SIGTERM with 143, SIGHUP with 129, and nothing half-written is left; where standard output is lost, the pictures
are written all the same, and the exit code is 141 if its reader went away, in silence, else 2. torch is imported only
when there is something to compute, so `--help` is quick.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from s3dit import __version__, files
from s3dit.cli import file_commands
from s3dit.cli.replay import attach, changes, replayed
from s3dit.cli.show import Progress, describe, explain, show
from s3dit.control import FORM, Control
from s3dit.errors import RequestError
from s3dit.request import IMAGES, MaskMode, Positions, Posterior, Request, Schedule, Solver
from s3dit.terminal import event, finish, line, say, stoppable, streams, tell

if TYPE_CHECKING:
    from s3dit.pipeline import Pipeline
    from s3dit.plan import Plan

EXAMPLES = """examples:
  s3dit generate                                        the embedded model draws its own example
  s3dit generate "a red star above a blue ring" -o star.png
  s3dit generate "a fox in the snow" --model Tongyi-MAI/Z-Image-Turbo --height 768 --width 1024
  s3dit generate --prompt-file prompts.txt --seed 7     one prompt a line, one picture each
  s3dit generate "a fox" --model path/to/Z-Image --lora style.safetensors:0.8
  s3dit generate --replay star.png -o again.png         the same picture again, bit for bit
  s3dit generate "a blue star" --image star.png --strength 0.8 -o blue.png
  s3dit generate "a blue star" --image star.png --mask mask.png        white in the mask is painted anew
  s3dit generate "a red star" --image star.png --extend 64,0,64,0      margins: left,top,right,bottom
  s3dit generate "a dancer" --model path/to/Z-Image-Turbo --control path/to/Union-2.1.safetensors:pose.png:0.8:0-0.7
  s3dit plan --model path/to/Z-Image                    what would be loaded, when, how many bytes
  s3dit plan --model path/to/Z-Image --vram 4GiB        how it would be done within 4 GiB of GPU memory
  s3dit look z-image.gguf                               what is in this file, and how to use it
  s3dit convert z-image.gguf Z-Image-plain              the same in the official layout, for any tool
  s3dit quantize path/to/Z-Image small --to int8        the same model in half the memory
  s3dit generate "the fox, in oil" --model path/to/Z-Image-Edit --reference fox.png
environment:
  S3DIT_BACKEND=auto|reference|torch|triton             who computes, where --backend does not say; see plan --kernels
"""
KINDS: dict[str, Any] = {
    "height": int, "width": int, "num_inference_steps": int, "guidance_scale": float, "cfg": float,
    "cfg_normalization": float, "cfg_truncation": float, "num_images_per_prompt": int, "seed": int, "shift": float,
    "max_sequence_length": int, "negative_prompt": str, "image": str, "mask_image": str, "strength": float,
    "mask_blur": float, "upscale": float, "upscale_strength": float, "reference_area": int,
}  # fmt: skip
SHORT = {
    "num_inference_steps": ["--steps"], "guidance_scale": ["--guidance"], "num_images_per_prompt": ["--count"],
    "mask_image": ["--mask"],
}  # fmt: skip
CHOICES = {
    "solver": get_args(Solver), "schedule": get_args(Schedule), "mask_mode": get_args(MaskMode),
    "posterior": get_args(Posterior), "reference_positions": get_args(Positions),
}  # fmt: skip
# Fields of a request whose option is spelled otherwise, as messages name them: no such word is used for anything else.
OPTIONS = {
    name: SHORT.get(name, [f"--{name.replace('_', '-')}"])[0] for name in (*KINDS, *CHOICES) if "_" in name
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as everything here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, line(f"s3dit: {message}; see {self.prog} --help") + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="s3dit",
        description="Draw pictures with Z-Image models (S3-DiT), or look at what drawing would take.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"s3dit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{generate,plan,look,convert,quantize}")
    for name, text in (("generate", "draw pictures"), ("plan", "print what a request will load and compute")):
        command = commands.add_parser(
            name, help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        _add_model(command)
        _add_request(command)
        if name == "generate":
            _add_output(command)
        else:
            command.add_argument(
                "--kernels", action="store_true", help="also print which implementation serves each operation, and why"
            )
    file_commands.add(commands)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help="embedded (default), a folder in the official layout, one file of all parts, or a hub name"
    )
    for part in ("transformer", "text encoder", "vae"):
        group.add_argument(
            f"--{part.replace(' ', '-')}",
            metavar="FILE",
            help=f"take the {part} from this file, folder or hub name instead, or embedded",
        )
    group.add_argument("--tokenizer", metavar="DIR", help="take the tokenizer from this folder, or embedded")
    group.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    group.add_argument("--dtype", help="bf16 or fp32 (default: bf16 where the device computes it natively)")
    group.add_argument(
        "--residency", metavar="MODE",
        help="staged: parts take turns in memory (default); resident: all stay; streamed: blocks come in one by one",
    )  # fmt: skip
    group.add_argument(
        "--vram",
        metavar="SIZE",
        help="stay within 4GiB, 4GB, 4096MiB, …: chooses residency and tiles (on a CPU: of RAM)",
    )
    group.add_argument(
        "--disable-mmap", action="store_true",
        help="read weights into memory instead of mapping their files (for files that may be cut while in use)",
    )  # fmt: skip
    group.add_argument("--compile", action="store_true", help="compile the transformer's blocks, in the first pass")
    group.add_argument("--graphs", action="store_true", help="record the transformer's passes as CUDA graphs")
    group.add_argument(
        "--quantize", metavar="NAME",
        help="number format of the transformer: fp8, int8, int4, fp8-weights or int8-weights (default: as stored)",
    )  # fmt: skip
    group.add_argument("--quantize-text", metavar="NAME", help="the same for the text encoder (default: as stored)")
    group.add_argument(
        "--lora", type=_lora, action="append", default=[], metavar="FILE[:SCALE]",
        help="an adapter (LoRA, LoHa, LoKr, DoRA, …): a file, or org/name/file of the Hub; may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--lora-allow-partial", action="store_true", help="use an adapter although some of it fits no layer"
    )
    group.add_argument("--backend", help="auto (default), reference, torch or triton")


def _add_request(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("request")
    group.add_argument("prompt", nargs="?", help="what to draw (default: the embedded model's example)")
    group.add_argument(
        "--prompt-file", metavar="FILE", help="one prompt a line, one picture each; - reads standard input"
    )
    for field in fields(Request):
        if field.name in KINDS or field.name in CHOICES:
            _add_field(group, field)
    group.add_argument(
        "--control", action="append", metavar="FILE:IMAGE[:…]",
        help=f"steer with a ControlNet and a control image; may be repeated; in full: {FORM.replace('%', '%%')}",
    )  # fmt: skip
    group.add_argument(
        "--sigmas", type=_floats, metavar="A,B,…", help="explicit noise levels before the shift, such as 1,0.75,0.4"
    )
    group.add_argument(
        "--extend", type=_margins, metavar="L,T,R,B",
        help="margins in pixels to paint around the start image: left,top,right,bottom",
    )  # fmt: skip
    group.add_argument(
        "--reference", action="append", metavar="FILE",
        help="picture for an Omni or Edit model to look at, once for each; the last one's size is the default",
    )  # fmt: skip
    group.add_argument(
        "--no-composite", dest="composite", action="store_const", const=False,
        help="do not lay the start image's own pixels over what the mask keeps",
    )  # fmt: skip


def _add_field(group: Any, field: "Field[Any]") -> None:
    flags = [*SHORT.get(field.name, []), "--" + field.name.replace("_", "-")]
    help_text = field.metadata.get("help", "")
    if field.name in CHOICES:
        group.add_argument(
            *flags, dest=field.name, choices=CHOICES[field.name], help=f"{help_text} (default: {field.default})"
        )
    else:
        kind = KINDS[field.name]
        metavar = "FILE" if field.name in IMAGES else {int: "N", float: "X", str: "TEXT"}[kind]
        group.add_argument(*flags, dest=field.name, type=kind, metavar=metavar, help=help_text)


def _add_output(parser: argparse.ArgumentParser) -> None:
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
        "--replay", type=Path, metavar="FILE", help="draw again what made this picture; other flags change it"
    )
    group.add_argument(
        "--preview", action="store_true", help="show the picture forming: in the terminal, and FILE.preview.png"
    )
    group.add_argument("--json", action="store_true", help="progress as JSON lines on stdout instead of a bar")
    group.add_argument("--no-metadata", action="store_true", help="write no prompt and no settings into the file")


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,0.75,0.4") from None


def _lora(text: str) -> tuple[str, float | None]:
    """A file and its strength, if one is given; a colon that no number follows belongs to the name."""
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path and not Path(text).exists() else (text, None)
    except ValueError:
        return text, None


def _margins(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not four margins in pixels such as 64,0,64,0") from None


def main(argv: Sequence[str] | None = None, *, early: Callable[[int, object], None] | None = None) -> int:
    """Run the command line; returns the exit code. early: what a signal does while torch is imported (`stoppable`)."""
    with streams():
        try:
            with stoppable(early):
                code = _command(argv)
        except SystemExit as done:
            # argparse has said what there was to say.
            raise SystemExit(finish(int(done.code or 0))) from None
        except KeyboardInterrupt as stopped:
            say("stopped; nothing half-written is left")
            return getattr(stopped, "code", 130)
        except (ValueError, RuntimeError, OSError) as error:
            if not _ours(error):
                raise
            say(error)
            return 2
        return finish(code)


def _command(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    return file_commands.COMMANDS.get(args.command, _run)(args)


def _ours(error: Exception) -> bool:
    """Whether an error is one of the three that speak to the user, told by its home: its module may not import."""
    return type(error).__module__.startswith("s3dit.")


def _run(args: argparse.Namespace) -> int:
    names = (*KINDS, *CHOICES, "sigmas", "extend", "composite", "reference")
    wanted = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.control:
        wanted["control"] = _controls(args.control)
    prompt: Any = args.prompt
    if args.prompt_file is not None:
        if prompt is not None:
            raise RequestError("both a prompt and --prompt-file are given; needed one of them")
        prompt = files.prompts(args.prompt_file)
    adapters: list[Any] = []
    engine: dict[str, Any] = {}
    if args.command == "generate" and args.replay is not None:
        made_with, adapters, engine = replayed(args, prompt)
        wanted = made_with | wanted
    if prompt is not None:
        wanted["prompt"] = prompt
    # Whatever can be found wrong without torch is found before it is imported.
    try:
        request = Request(**wanted)
    except RequestError as error:
        # What a picture's metadata say wrong is named as it stands there.
        raise error if getattr(args, "replay", None) else RequestError(_in_options(str(error))) from None
    if args.command == "generate":
        args.paths, args.replace = _outputs(args, request.count)
    from s3dit.pipeline import Pipeline

    pipe = Pipeline.load(
        args.model, transformer=args.transformer, text_encoder=args.text_encoder, vae=args.vae,
        tokenizer=args.tokenizer, quantize=args.quantize, quantize_text=args.quantize_text,
        device=args.device, dtype=args.dtype, residency=args.residency, backend=args.backend,
        vram=args.vram, compile=args.compile, graphs=args.graphs, disable_mmap=args.disable_mmap,
    )  # fmt: skip
    for change in changes(pipe, engine):
        say(f"{args.replay} was drawn {change}: not the same to the bit")
    for report in attach(pipe, args, adapters):
        say(f"adapter {report}")
    plan = pipe.plan(request)
    if args.command == "plan":
        tell(describe(pipe, plan))
        if args.kernels:
            tell(explain(pipe, plan))
        return 0
    return _generate(pipe, plan, args)


def _in_options(text: str) -> str:
    """A message in the names of the options instead of the request's fields."""
    return re.sub(rf"(?<![\w./\\-])({'|'.join(OPTIONS)})(?![\w./\\-])", lambda found: OPTIONS[found[0]], text)


def _controls(texts: Sequence[str]) -> list[Control]:
    try:
        return [Control.parse(text) for text in texts]
    except ValueError as error:
        raise RequestError(str(error)) from None


def _outputs(args: argparse.Namespace, count: int) -> tuple[list[Path], bool]:
    """The files of all pictures, and whether they may be replaced."""
    paths, replace = files.outputs(args.output, count, args.overwrite)
    if args.quality is not None and not 1 <= args.quality <= 100:
        raise RequestError(f"--quality is {args.quality}; needed 1 to 100")
    if args.quality is not None and paths[0].suffix.lower() == ".png":
        raise RequestError(f"--quality is given for {paths[0]}; PNG has none; name a .jpg or .webp with -o")
    return paths, replace


def _generate(pipe: "Pipeline", plan: "Plan", args: argparse.Namespace) -> int:
    from s3dit.inputs.images import carried

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
            event(event="saved", path=str(found))
        else:
            tell(found)
    if args.preview and not args.json:
        show(result.images[0])  # type: ignore[arg-type]
    return code


def _save(picture: Any, path: Path, metadata: Any, args: argparse.Namespace) -> Path:
    """Save one picture -> the file, another one than was meant if somebody took the name meanwhile."""
    from s3dit.inputs.images import save_picture

    if args.replace:
        save_picture(picture, path, metadata, quality=args.quality)
        return path
    with files.claimed(path) as free:
        save_picture(picture, free, metadata, quality=args.quality)
    return free
