"""The options of the command line: made from the fields of a Request, in groups that --help shows.

An option of a Request's field is spelled as the field, or as its metadata's `flag`; what other programs call it
(`SPELLINGS`) is taken for it. Nothing is abbreviated: an option that there is not is answered with the nearest one.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_args

from s3dit import __version__, values
from s3dit.cli import file_commands
from s3dit.control import FORM
from s3dit.request import Request
from s3dit.terminal import line

EXAMPLES = """examples, one of each command:
  s3dit generate "a red star above a blue ring" -o star.png         (s3dit generate --help shows more)
  s3dit plan --model path/to/Z-Image --vram 4GiB                    how that would be done within 4 GiB
  s3dit inspect z-image.gguf                                        what is in this file, and how to use it
  s3dit convert z-image.gguf Z-Image-plain                          the same in the official layout, for any tool
  s3dit quantize path/to/Z-Image small --to int8                    the same model in half the memory
environment:
  S3DIT_BACKEND=auto|reference|torch|triton             what computes, where --backend does not say; see plan --kernels
"""
GENERATE = """examples:
  s3dit generate                                        the embedded model draws its own example
  s3dit generate "a fox in the snow" --model Tongyi-MAI/Z-Image-Turbo --size 1024x768 -o fox.png
  s3dit generate --prompt-file prompts.txt --seed 7     one prompt a line, one picture each
  s3dit generate "a fox" --model path/to/Z-Image --lora style.safetensors:0.8
  s3dit generate --replay star.png -o again.png         the same picture again
  s3dit generate "a blue star" --image star.png --strength 0.8 -o blue.png
  s3dit generate "a blue star" --image star.png --mask mask.png        white in the mask is painted anew
  s3dit generate "a red star" --image star.png --extend 64,0,64,0      margins: left,top,right,bottom
  s3dit generate "a dancer" --model path/to/Z-Image-Turbo --control path/to/Union-2.1.safetensors:pose.png:0.8:0-0.7
  s3dit generate "the fox, in oil" --model path/to/Z-Image-Edit --reference fox.png
"""
PLAN = """examples:
  s3dit plan --model path/to/Z-Image                    what would be loaded, when, how many bytes
  s3dit plan --model path/to/Z-Image --vram 4GiB        how it would be done within 4 GiB of GPU memory
  s3dit plan --kernels                                  which implementation runs each operation, and why
"""
# What diffusers, ComfyUI, stable-diffusion.cpp and mflux call the same thing.
SPELLINGS = {
    "-H": "--height", "-W": "--width", "-s": "--seed", "-b": "--count", "-i": "--image", "-m": "--model",
    "--cfg-scale": "--cfg", "--guidance-scale": "--guidance", "--num-images": "--count", "--batch-count": "--count",
    "--sampler": "--solver", "--sampling-method": "--solver", "--scheduler": "--schedule", "--init-img": "--image",
    "--init-image": "--image", "--image-path": "--image", "--image-strength": "--strength", "--denoise": "--strength",
    "--negative": "--negative-prompt", "--lora-paths": "--lora", "--diffusion-model": "--transformer",
    "--llm": "--text-encoder", "--control-net": "--control", "--ref-image": "--reference", "--out": "--output",
}  # fmt: skip
# Spellings that mean one thing here and another there.
UNCLEAR = {"-n": "--count (how many pictures) or --negative-prompt", "-q": "--quantize or --quality"}
SIZE = re.compile(r"(\d+)\s*[x×X*]\s*(\d+)")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as everything here does; abbreviates nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, line(f"s3dit: {message}; see {self.prog} --help") + "\n")

    def note_unknown(self, word: str) -> NoReturn:
        """Exit with 2 because of an option, or a word, that there is not."""
        if not word.startswith("-"):
            self.error(f"unexpected {word!r}; put a prompt of several words in quotation marks")
        name = word.partition("=")[0]
        if name in UNCLEAR:
            self.error(f"{name} is not clear; say {UNCLEAR[name]}")
        near = get_close_matches(name, self._option_string_actions, 1, 0.6)
        self.error(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the words of a command line; exits with 2 where one is wrong, with 0 after --help or --version."""
    parser, commands = _parser()
    command = next((word for word in argv if word in commands), None)
    if command in ("generate", "plan"):
        argv = [_usual(word, commands[command]) for word in argv]
    args, rest = parser.parse_known_args(argv)
    if rest:
        commands.get(str(args.command), parser).note_unknown(rest[0])
    if args.command is None:
        parser.print_help()
    return args


def _usual(word: str, parser: Parser) -> str:
    """An option as it is spelled here."""
    name, given, value = word.partition("=")
    if name in parser._option_string_actions or name not in SPELLINGS:
        return word
    return f"{SPELLINGS[name]}={value}" if given else SPELLINGS[name]


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="s3dit",
        description="Draw pictures with Z-Image models (S3-DiT), or look at what drawing would take.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"s3dit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{generate,plan,inspect,convert,quantize}")
    for name, text, examples in (
        ("generate", "draw pictures", GENERATE), ("plan", "print what a request will load and compute", PLAN),
    ):  # fmt: skip
        command = commands.add_parser(name, help=text, description=text, epilog=examples)
        _add_request(command)
        _add_model(command)
        if name == "generate":
            _add_output(command)
        else:
            command.add_argument(
                "--kernels", action="store_true", help="also print which implementation runs each operation, and why"
            )
            command.add_argument("--json", action="store_true", help="the plan as one JSON object")
    file_commands.add(commands)
    return parser, dict(commands.choices)


def _add_request(parser: argparse.ArgumentParser) -> None:
    groups: dict[str, Any] = {}
    for field in fields(Request):
        title = field.metadata["group"]
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        if field.name == "prompt":
            prompts = groups[title]
            prompts.add_argument("prompt", nargs="?", help=field.metadata["help"])
            prompts.add_argument("-p", "--prompt", dest="named_prompt", metavar="TEXT", help="the same, by name")
            prompts.add_argument(
                "--prompt-file", metavar="FILE", help="one prompt a line, one picture each; - reads standard input"
            )
            prompts.add_argument("--size", type=_size, metavar="WxH", help="width and height at once, such as 1024x768")
        elif title:
            _add_field(groups[title], field)


def flag(field: "Field[Any]") -> str:
    """The option of a Request's field, as messages name it."""
    return str(field.metadata["flag"] or "--" + field.name.replace("_", "-"))


def _add_field(group: Any, field: "Field[Any]") -> None:
    kind, text = field.metadata["kind"], field.metadata["help"].replace("%", "%%")
    flags = list(dict.fromkeys((flag(field), "--" + field.name.replace("_", "-"))))
    if kind is values.SWITCH:
        group.add_argument(*flags, dest=field.name, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif kind is values.CHOICE:
        choices = get_args(field.metadata["bounds"][0])
        group.add_argument(*flags, dest=field.name, choices=choices, help=f"{text} (default: {field.default})")
    else:
        if kind is values.CONTROLS:
            text += f"; in full: {FORM}"
        group.add_argument(
            *flags, dest=field.name, type=_reader(kind), metavar=kind.metavar, help=text,
            action="append" if kind.several else "store",
        )  # fmt: skip


def _reader(kind: values.Kind) -> Any:
    """What argparse reads a value with, whose errors it shows as they are."""

    def read(text: str) -> Any:
        assert kind.parse is not None
        try:
            return kind.parse(text)
        except ValueError as error:
            own = kind is values.CONTROLS
            raise argparse.ArgumentTypeError(str(error) if own else f"{text!r} is not {kind.name}") from None

    return read


def _size(text: str) -> tuple[int, int]:
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width and a height such as 1024x768")
    return int(found[1]), int(found[2])


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


def _lora(text: str) -> tuple[str, float | None]:
    """A file and its strength, if one is given; a colon that no number follows belongs to the name."""
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path and not Path(text).exists() else (text, None)
    except ValueError:
        return text, None
