"""Region: a prompt for a part of a picture, and the mask that says which part.

In Python `Region("left.png", "a red star", weight=0.5)`, or with a box for a mask, `Region((0, 0, 64, 128), …)`; on the
command line the same in one word, `left.png@0.5:a red star` and `0,0,64,128:a red star`. Importing this module does not
import torch. What is wrong raises ValueError, which a Request turns into its own error. Not here: files and
pictures, which `inputs/region_masks.py` opens; the blending (sampling/regions.py).
"""

import re
from dataclasses import dataclass, fields, replace
from os import PathLike, path
from typing import Any, Self

from s3dit.control import LONGEST_PATH, shown

FORM = "MASK[@WEIGHT][@centered]:PROMPT, MASK a picture (white is the region) or a box LEFT,TOP,WIDTH,HEIGHT"
# More would leave nothing of the others; less is nothing, and in the end no number that fp32 can divide by.
LIGHTEST, HEAVIEST = 1e-6, 100.0
# Beyond any picture.
FARTHEST = 1 << 16
BOX = re.compile(r"[\d.]+(?:,[\d.]+){3}")


@dataclass(frozen=True, slots=True)
class Region:
    """A prompt for the part of a picture that a mask says.

    mask: white where the prompt holds, gray in part: a path, a Pillow image, an array or a tensor; or a box (left, top,
    width, height), in pixels of the picture, or in fractions of its sides where none of the four is above 1 · prompt ·
    weight: from 1e-6 to 100, against other regions' and the request's `base_weight` where they overlap · centered: the
    region is drawn as though it lay in the middle of the picture, for prompts that do not say where things are.
    """

    mask: Any
    prompt: str
    weight: float = 1.0
    centered: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the command line's form (FORM); raises ValueError. A colon ends a name unless a file has it in its own.

        A file's name is the longest that there is; without one, the mask ends at the first colon.
        """
        # Not at the colon of a Windows drive.
        ends = [match.start() for match in re.finditer(r":(?!\\)", text)]
        for end in reversed(ends):
            name, settings = _settings(text[:end])
            if path.exists(name):
                break
        else:
            if not ends:
                raise ValueError(f"region {shown(text)} has no colon; needed {FORM}")
            end = ends[0]
            name, settings = _settings(text[:end])
        box = BOX.fullmatch(name) and not path.exists(name)
        try:
            mask = tuple(float(number) if "." in number else int(number) for number in name.split(",")) if box else name
        except ValueError:
            raise ValueError(f"region {shown(text)} has {name!r} for a box; needed {FORM}") from None
        return cls(mask, text[end + 1 :].strip(), **settings)

    @property
    def box(self) -> tuple[float, ...] | None:
        """The box, if the mask is one."""
        given = self.mask if isinstance(self.mask, tuple | list) else ()
        given = [side.item() if getattr(side, "ndim", None) == 0 else side for side in given]
        numbers = all(isinstance(side, int | float) and not isinstance(side, bool) for side in given)
        return tuple(given) if len(given) == 4 and numbers else None

    def check(self) -> None:
        """Check every field but the prompt's text, without opening anything; raises ValueError."""
        if isinstance(self.mask, str | PathLike):
            if not 0 < len(str(self.mask)) <= LONGEST_PATH or "\0" in str(self.mask):
                raise ValueError(f"region mask is {shown(self.mask)}, which is no path; needed the path of a picture")
        elif self.box is None and not hasattr(self.mask, "size"):
            raise ValueError(
                f"region mask is {shown(self.mask)}; needed a picture, or a box (left, top, width, height)"
            )
        if self.box is not None:
            left, top, width, height = self.box
            if not (left >= 0 and top >= 0 and width > 0 and height > 0 and max(self.box) <= FARTHEST):
                raise ValueError(
                    f"region box is {shown(self.box)}; needed left, top from 0, width, height above 0, in the picture"
                )
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not LIGHTEST <= self.weight <= HEAVIEST:
            raise ValueError(
                f"region weight is {shown(self.weight)}; needed a number from {LIGHTEST:g} to {HEAVIEST:g}"
            )
        if not isinstance(self.centered, bool):
            raise ValueError(f"region centered is {shown(self.centered)}; needed true or false")

    @property
    def named(self) -> bool:
        """Whether its mask is a path or a box, so that a replay has it."""
        return self.box is not None or isinstance(self.mask, str | PathLike)

    def to_json(self) -> dict[str, Any]:
        """Return what is not a default, as plain JSON values; the mask only where it is a path or a box."""
        mask = list(self.box) if self.box is not None else str(self.mask) if self.named else None
        given = {"mask": mask, "prompt": self.prompt, "weight": self.weight, "centered": self.centered}
        return {f.name: given[f.name] for f in fields(self) if given[f.name] not in (None, f.default)}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Make a Region of what `to_json` gave; raises ValueError on unknown or missing keys, and masks of no kind."""
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or not {"mask", "prompt"} <= set(data) <= known:
            raise ValueError(f"replay data has a region {shown(data)}; needed the JSON that this program writes")
        region = cls(**data)
        if not region.named:
            raise ValueError(f"replay data has a region whose mask is {shown(region.mask)}; needed a path or a box")
        return replace(region, mask=region.box or region.mask)

    def __str__(self) -> str:
        """Return the form that `parse` reads, of a Region whose mask is a path or a box."""
        mask = ",".join(map(str, self.box)) if self.box is not None else str(self.mask)
        settings = f"@{self.weight!r}" * (self.weight != 1) + "@centered" * self.centered
        return f"{mask}{settings}:{self.prompt}"


def _settings(text: str) -> tuple[str, dict[str, Any]]:
    """Take the settings off the end of a mask's name: @0.5 and @centered."""
    settings: dict[str, Any] = {}
    while not path.exists(text) and (match := re.fullmatch(r"(.+)@(centered|[\d.]+)", text)):
        text = match[1]
        try:
            settings |= {"centered": True} if match[2] == "centered" else {"weight": float(match[2])}
        except ValueError:
            raise ValueError(f"region weight is {match[2]!r}; needed a number, in {FORM}") from None
    return text, settings
