"""The options that `generate` and `plan` share: of a Request, made from its fields, and of the model.

An option of a Request's field is spelled as the field, or as its metadata's `flag`; its group in --help, its metavar
and its text come from the field as well.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any, get_args

from s3dit import values
from s3dit.cache import FORM as CACHE_FORM
from s3dit.cli.lora_option import LoraOption
from s3dit.cli.option_names import flag
from s3dit.control import FORM as CONTROL_FORM
from s3dit.errors import RequestError
from s3dit.parallel.placement import Form
from s3dit.region import FORM as REGION_FORM
from s3dit.request import Request

# The whole form of values that are several in one, by their metavar; its parser says itself what is wrong.
FORMS = {values.CONTROLS.metavar: CONTROL_FORM, values.REGIONS.metavar: REGION_FORM, values.CACHE.metavar: CACHE_FORM}
SIZE = re.compile(r"(\d+)\s*[x×X*]\s*(\d+)")
# Number formats that --quantize and `s3dit quantize` make; any other comes with its file.
OWN_FORMATS = ("fp8", "int8", "int4", "fp8-weights", "int8-weights")


def add_request(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Add the options of a Request to a parser, in the groups that its fields name, but those of fields `without`."""
    parser.set_defaults(**dict.fromkeys(without))
    groups: dict[str, Any] = {}
    for field in fields(Request):
        title = field.metadata["group"]
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        if field.name == "prompt":
            prompts = groups[title]
            if field.name not in without:
                _add_prompts(prompts, field.metadata["help"])
            prompts.add_argument("--size", type=_size, metavar="WxH", help="width and height at once, such as 1024x768")
        elif title and field.name not in without:
            _add_field(groups[title], field)


def _add_prompts(group: Any, text: str) -> None:
    """The three ways to give prompts."""
    group.add_argument("prompt", nargs="?", metavar="PROMPT", help=text)
    group.add_argument("-p", "--prompt", dest="named_prompt", metavar="TEXT", help="the same, by name")
    group.add_argument(
        "--prompt-file", metavar="FILE", help="one prompt a line, one picture each; - reads standard input"
    )


def _add_field(group: Any, field: "Field[Any]") -> None:
    kind, text = field.metadata["kind"], field.metadata["help"].replace("%", "%%")
    flags = list(dict.fromkeys((flag(field), "--" + field.name.replace("_", "-"))))
    if kind is values.SWITCH:
        group.add_argument(*flags, dest=field.name, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif kind is values.CHOICE:
        choices = get_args(field.metadata["bounds"][0])
        group.add_argument(
            *flags, dest=field.name, choices=choices, metavar="NAME",
            help=f"{text}; one of {', '.join(choices)}" + (f" (default: {field.default})" if field.default else ""),
        )  # fmt: skip
    else:
        text += f"; in full: {FORMS[kind.metavar]}" if kind.metavar in FORMS else ""
        group.add_argument(
            *flags, dest=field.name, type=_reader(kind), metavar=kind.metavar, help=text,
            action="append" if kind.several else "store",
        )  # fmt: skip


def _reader(kind: values.Kind) -> Any:
    """What argparse reads a value of this kind with."""

    def read(text: str) -> Any:
        """Read one value; argparse shows the message of what is raised as it is."""
        assert kind.parse is not None
        try:
            return kind.parse(text)
        except ValueError as error:
            message = str(error) if kind.metavar in FORMS else f"{text!r} is not {kind.name}"
            raise argparse.ArgumentTypeError(message) from None

    return read


def _size(text: str) -> tuple[int, int]:
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width and a height such as 1024x768")
    return int(match[1]), int(match[2])


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model draws: its parts, its tokenizer, its adapters and its number formats."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="MODEL",
        help="embedded (default), embedded-base, a folder in the official layout, one file of all parts, or a hub "
        "name (org/name@main asks for a newer revision than the one in the cache)",
    )  # fmt: skip
    for part in ("transformer", "text encoder", "vae"):
        group.add_argument(
            f"--{part.replace(' ', '-')}", metavar="FILE",
            help=f"take the {part} from this file, folder or hub name instead, or embedded",
        )  # fmt: skip
    group.add_argument("--tokenizer", metavar="DIR", help="take the tokenizer from this folder, or embedded")
    group.add_argument(
        "--lora", type=_lora, action="append", default=[], metavar="FILE[:SCALE][@…]",
        help="an adapter (LoRA, LoHa, LoKr, DoRA, …): a file, or org/name/file of the Hub; may be given several times; "
        "behind an @ strength by block and by step, as in style.safetensors:0.8@layers.0-9=0,steps=0-0.5",
    )  # fmt: skip
    group.add_argument(
        "--lora-allow-partial", action="store_true", help="use an adapter although some of it fits no layer"
    )
    group.add_argument(
        "--quantize", metavar="FORMAT",
        help=f"number format of the transformer: {', '.join(OWN_FORMATS)} (default: as stored)",
    )  # fmt: skip
    group.add_argument("--quantize-text", metavar="FORMAT", help="the same for the text encoder (default: as stored)")


def add_runtime(parser: argparse.ArgumentParser, parallel: bool = False) -> None:
    """Add the options that say where and how a model is kept and computed; parallel: by several processes, too."""
    group = parser.add_argument_group("memory and speed")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda or mps (default: the best there is)")
    group.add_argument(
        "--dtype", metavar="DTYPE", help="bf16 or fp32 (default: bf16 where the device computes it natively)"
    )
    group.add_argument(
        "--residency", metavar="MODE",
        help="staged: parts take turns in memory (default); resident: all stay; streamed: blocks come in one by one",
    )  # fmt: skip
    group.add_argument(
        "--vram", metavar="SIZE",
        help="stay within 4GiB, 4GB, 4096MiB, … of the device's memory: chooses residency and tiles (on a CPU only "
        "weights in use and arithmetic count)",
    )  # fmt: skip
    group.add_argument(
        "--ram", metavar="SIZE",
        help="on a CPU: the same for all memory that the process has resident, Python and torch too",
    )  # fmt: skip
    group.add_argument(
        "--disable-mmap", action="store_true",
        help="read weights into memory instead of mapping their files (for files that may be cut while in use)",
    )  # fmt: skip
    group.add_argument("--compile", action="store_true", help="compile the transformer's blocks, in the first pass")
    group.add_argument("--graphs", action="store_true", help="record the transformer's passes as CUDA graphs")
    group.add_argument(
        "--backend", metavar="NAME", help="which implementations compute: auto (default), reference, torch or triton"
    )
    group.add_argument(
        "--numerics", metavar="NAME", default="lossless",
        help="how near they are to the references: exact (the same bits), lossless (sums in another order; default), "
        "approximate (also with a stated error; none at present)",
    )  # fmt: skip
    if parallel:
        group.add_argument(
            "--parallel", type=_parallel, metavar="N",
            help="draw with N processes, a GPU each: torchrun --nproc-per-node N --no-python s3dit generate … "
            "--parallel N; or GxT: pictures and negative prompts in at most G groups, T processes each (PARALLEL.md)",
        )  # fmt: skip


def _parallel(text: str) -> Form:
    """The value of --parallel."""
    try:
        return Form.of(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("parallel is ")) from None


def check_format(option: str, name: str | None) -> None:
    """Raise RequestError for the value of an option that is no number format which this engine makes."""
    if name is not None and name not in OWN_FORMATS:
        raise RequestError(f"{option} is {name!r}; needed one of {', '.join(OWN_FORMATS)}")


def _lora(text: str) -> LoraOption:
    """The value of --lora."""
    try:
        return LoraOption.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
