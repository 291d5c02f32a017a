"""How the command line calls what Python calls by a parameter's name, and messages in those names.

A Request's field `num_inference_steps` is the option --steps; messages of the engine name the field. `in_options` puts
the option in its place, where it is certain that the field is meant.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import Any

from s3dit.errors import BackendError, RequestError
from s3dit.request import Request

# Parameters of `Pipeline.load` whose options are spelled as they are, with dashes for underscores.
LOAD = (
    "model", "transformer", "text_encoder", "vae", "tokenizer", "device", "dtype", "residency", "vram", "ram",
    "disable_mmap", "compile", "graphs", "quantize", "quantize_text", "backend", "numerics", "parallel",
)  # fmt: skip


def flag(field: "Field[Any]") -> str:
    """The option of a Request's field, as messages name it: its short spelling, else the field's name with dashes."""
    return str(field.metadata["flag"] or _dashed(field.name))


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


# Option by the name of a field of Request that has one; and of a parameter of `Pipeline.load` and `files.outputs`.
FIELDS = {field.name: flag(field) for field in fields(Request) if field.metadata["group"]}
NAMES = {name: _dashed(name) for name in (*LOAD, "output")} | FIELDS
# Names of two words and more are no words of a sentence, unless they stand in a path.
UNMISTAKABLE = "|".join(name for name in FIELDS | {"quantize_text": ""} if "_" in name)
ANYWHERE = re.compile(rf"(?<![\w./\\-])({UNMISTAKABLE})(?![\w./\\-])")
# A name of one word is the subject of a message: "shift is -1", "dtype fp16 overflows", "seed of …".
VERBS = "is|are|has|holds|needs?|mixes|makes|acts|overflows|does|and|of"
SUBJECT = re.compile(rf"^({'|'.join(NAMES)})(?=(?: [\w.:']+)? (?:{VERBS})\b)|^(control)(?= )")
PAIR = re.compile(rf"^both ({'|'.join(NAMES)}) and ({'|'.join(NAMES)})\b")
# Or what its last part asks for: "give image too, or leave strength out".
ADVICE = re.compile(rf"\b(give|leave|without) ({'|'.join(NAMES)})(?= too\b| out\b| or\b| and\b|[,;]|$)")


def in_options(message: str) -> str:
    """Put the options of the command line in the place of names of fields and parameters in a message."""
    message = PAIR.sub(lambda match: f"both {NAMES[match[1]]} and {NAMES[match[2]]}", message)
    message = ANYWHERE.sub(lambda match: NAMES[match[1]], message)
    message = SUBJECT.sub(lambda match: NAMES[match[0]], message)
    return ADVICE.sub(lambda match: f"{match[1]} {NAMES[match[2]]}", message)


@contextmanager
def speaking_of_options() -> Iterator[None]:
    """While inside, messages name options: of RequestError and BackendError that are raised, and of warnings."""
    show = warnings.showwarning

    def translated(message: Warning | str, *rest: Any, **more: Any) -> None:
        """Show a warning with the names of the options."""
        show(in_options(str(message)), *rest, **more)

    warnings.showwarning = translated
    try:
        yield
    except (RequestError, BackendError) as error:
        raise type(error)(in_options(str(error))) from None
    finally:
        warnings.showwarning = show
