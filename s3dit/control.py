"""Control: one ControlNet of a request, with its picture, its strength and the steps in which it acts.

In Python `Control("Union-2.1.safetensors", "pose.png", 0.8, end=0.7)`; on the command line the same in one word,
`Union-2.1.safetensors:pose.png:0.8:0-0.7`, with `name=value` behind it for what is rarer (`inpaint`, `mask`, `version`,
`rule`). Importing this module does not import torch. What is wrong raises ValueError, which a Request turns into its
own error. Not here: files and pictures, which `inputs/control_hints.py` opens.
"""

import re
import sys
from dataclasses import dataclass, fields
from os import PathLike, path
from typing import Any, Literal, Self, get_args

Version = Literal["1.0", "2.0", "2.1"]
Rule = Literal["authors", "diffusers"]

FORM = "FILE:IMAGE[:STRENGTH][:START-END][:inpaint=IMAGE:mask=IMAGE][:version=2.0][:rule=diffusers]"
# Fields that hold images, one for all pictures or one a prompt or picture.
IMAGES = ("image", "inpaint", "mask")
# What the command line's form says by name.
WORDS = ("inpaint", "mask", "version", "rule")
# Twice what a ControlNet was trained for is no use any more, and more is a slip of the pen.
STRONGEST = 2.0
# Characters of a path: what Linux takes.
LONGEST_PATH = 4096
# Where a name may end: not at the colon of a Windows drive, behind which Windows takes either slash.
COLON = r":(?![\\/])" if sys.platform == "win32" else r":(?!\\)"


def shown(value: Any) -> str:
    """Return a value as messages show it: short, whatever it is; only short lists are spelled out."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        # The end of a path says most.
        return repr(value if len(value) <= 80 else f"{value[:40]}…{value[-39:]}")
    if value is None or isinstance(value, int | float):
        return repr(value)
    if (
        isinstance(value, list | tuple)
        and len(value) <= 8
        and not any(isinstance(item, list | tuple) for item in value)
    ):
        return f"[{', '.join(map(shown, value))}]"
    return f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class Control:
    """A ControlNet of a request, the picture that it follows, and how it acts.

    model: a file, a folder as diffusers writes it, or a hub name · image: the control image (canny, depth, pose, …) ·
    strength: factor of its hints, 0 to 2 (default: as its authors use it, 0.75 or 0.9) · start, end: it acts in the
    steps i of n with start <= i/n < end · inpaint, mask: for 2.x, a picture to paint into and where (white) · version:
    when the tensors do not distinguish 2.0 from 2.1 rightly · rule: where the refiner's hints are added, see
    model/controlnet.py (default: authors; with preset diffusers its own). Images are a path, a Pillow image, an array
    or a tensor, or a sequence of them, one a prompt or picture.
    """

    model: str | PathLike[str]
    image: Any = None
    strength: float | None = None
    start: float = 0.0
    end: float = 1.0
    inpaint: Any = None
    mask: Any = None
    version: Version | None = None
    rule: Rule | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the command line's form (FORM); raises ValueError.

        A colon ends a name, unless there is a file that has it in its own.
        """
        pieces = re.split(COLON, text)
        model = _name(pieces)
        values: dict[str, Any] = {}
        if pieces and pieces[0].partition("=")[0] not in WORDS:
            values["image"] = _name(pieces) or None
        while pieces:
            word, equals, value = (piece := pieces[0]).partition("=")
            if equals and word in WORDS and word not in values:
                pieces[0] = value
                values[word] = _name(pieces) if word in IMAGES else pieces.pop(0)
                continue
            if "start" not in values and (span := re.fullmatch(r"([\d.]+)-([\d.]+)", piece)):
                values |= {"start": _number(span[1], text), "end": _number(span[2], text)}
            elif "strength" not in values:
                values["strength"] = _number(piece, text)
            else:
                raise ValueError(f"control {text!r} has {piece!r} in it; needed {FORM}")
            del pieces[0]
        return cls(model, **values)

    def check(self) -> None:
        """Check every field without opening anything; raises ValueError."""
        if not isinstance(self.model, str | PathLike) or not 0 < len(str(self.model)) <= LONGEST_PATH:
            raise ValueError(f"control model is {shown(self.model)}; needed a file, a folder or a hub name")
        for name, low, high in (("strength", 0.0, STRONGEST), ("start", 0.0, 1.0), ("end", 0.0, 1.0)):
            value = getattr(self, name)
            fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
            if not fits and not (value is None and name == "strength"):
                raise ValueError(f"control {name} is {shown(value)}; needed a number from {low:g} to {high:g}")
        if self.start >= self.end:
            raise ValueError(
                f"control acts from {self.start:g} to {self.end:g} of the steps, which is none; needed start below end"
            )
        for name, kinds in (("version", (*get_args(Version), None)), ("rule", (*get_args(Rule), None))):
            value = getattr(self, name)
            if not isinstance(value, str | None) or value not in kinds:
                needed = ", ".join(filter(None, kinds))
                raise ValueError(f"control {name} is {shown(value)}; needed one of {needed}")
        if (self.inpaint is None) != (self.mask is None):
            given, other = ("inpaint", "mask") if self.mask is None else ("mask", "inpaint")
            raise ValueError(f"control has {given} but no {other}; needed both, a picture and where to paint in it")
        if self.image is None and self.inpaint is None:
            raise ValueError(f"control {self.model} has no image; needed the picture that it is to follow")

    def acts(self, i: int, n: int) -> bool:
        """Return whether it acts in step i (from 0) of n."""
        return self.strength != 0 and self.start <= i / n < self.end

    @property
    def named(self) -> bool:
        """Whether all of its images are given as paths, so that a replay can open them."""
        given = [getattr(self, name) for name in IMAGES]
        return all(image is None or _paths(image) is not None for image in given)

    def to_json(self) -> dict[str, Any]:
        """Return what is not a default, as plain JSON values; images only where they are paths."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        paths = {name: _paths(values[name]) for name in ("model", *IMAGES)}
        others = {f.name: f.default for f in fields(self) if f.name not in paths}
        return {name: given for name, given in paths.items() if given is not None} | {
            name: values[name] for name, default in others.items() if values[name] != default
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Make a Control of what `to_json` gave; raises ValueError on unknown or missing keys."""
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or "model" not in data or set(data) - known:
            raise ValueError(f"replay data has a control {shown(data)}; needed the JSON that this program writes")
        for name in set(IMAGES) & set(data):
            if data[name] is not None and _paths(data[name]) is None:
                raise ValueError(f"replay data has a control whose {name} is {shown(data[name])}; needed a path")
        return cls(**data)

    def __str__(self) -> str:
        """Return the form that `parse` reads, of a Control whose images are single paths."""
        span = f"{self.start!r}-{self.end!r}" if (self.start, self.end) != (0, 1) else None
        words = {name: getattr(self, name) for name in WORDS if getattr(self, name) not in (None, "authors")}
        pieces = (
            self.model,
            self.image or "",
            self.strength,
            span,
            *(f"{name}={word}" for name, word in words.items()),
        )
        return ":".join(str(piece) for piece in pieces if piece is not None)


def _paths(given: Any) -> str | list[str] | None:
    """Paths as text: of a single one, or of a sequence of them; None where there is anything else."""
    if isinstance(given, str | PathLike):
        return str(given)
    whole = isinstance(given, list | tuple) and given and all(isinstance(item, str | PathLike) for item in given)
    return [str(item) for item in given] if whole else None


def _name(pieces: list[str]) -> str:
    """Take a name off the front: of as many pieces as a file that exists has, else the first."""
    whole = (i for i in range(len(pieces), 1, -1) if path.exists(":".join(pieces[:i])))
    end = next(whole, 1)
    name = ":".join(pieces[:end])
    del pieces[:end]
    return name


def _number(text: str, whole: str) -> float:
    """The number that a piece of the form `whole` is; raises ValueError."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"control {whole!r} has {text!r} for a number; needed {FORM}") from None
