"""What the texts of a request's guidance options mean: a method of guidance, layers to skip, a variation.

    guidance_method   plain, apg[:eta=0,momentum=-0.5,norm_threshold=0], cfg_zero[:zero_init_steps=1]
    skip_layers       LAYERS:SCALE[@A-B], such as 2,3:1.5@0.1-0.5: A ≤ t ≤ B, t being 0 at noise and 1 at the image
    variation         STRENGTH[:SEED], such as 0.3:7

The same texts serve Python, the command line and the metadata of pictures. Importing this module does not import torch.
Not here: what they do, which is in `sampling/guidance_methods.py`, `sampling/skip_layers.py`, `inputs/variation.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from s3dit import values
from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.values import MOST_STEPS, Kind

# A text that is longer is none of these.
LONGEST = 1000
METHOD_FORM = (
    "plain, apg[:eta=0,momentum=-0.5,norm_threshold=0] (eta from 0 to 10, momentum within ±0.99, norm_threshold from "
    "0) or cfg_zero[:zero_init_steps=1]"
)
SKIP_FORM = "LAYERS:SCALE[@A-B], such as 2,3:1.5@0.1-0.5: a scale from 0 to 100, and t from A to B within 0 and 1"
VARIATION_FORM = "STRENGTH[:SEED], such as 0.3:7: a strength from 0 to 10, and a seed from 0"
# Parameters of each method, with their bounds.
PARAMETERS: dict[str, dict[str, tuple[float, float]]] = {
    "plain": {},
    "apg": {"eta": (0, 10), "momentum": (-0.99, 0.99), "norm_threshold": (0, 1e6)},
    "cfg_zero": {"zero_init_steps": (0, MOST_STEPS)},
}
SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Method:
    """A method of guidance with its parameters; `sampling.guidance_methods` says what they are."""

    name: str = "plain"
    eta: float = 0.0
    momentum: float = -0.5
    norm_threshold: float = 0.0
    zero_init_steps: int = 1

    @classmethod
    def of(cls, text: str | None) -> "Method":
        """Read NAME[:PARAMETER=VALUE,…], None as plain; raises ValueError or KeyError."""
        name, _, rest = ("plain" if text is None else text).partition(":")
        known, given = PARAMETERS[name], dict[str, Any]()
        for key, value in (entry.split("=") for entry in rest.split(",") if rest):
            if key in given:
                raise ValueError(key)
            given[key] = int(value) if key == "zero_init_steps" else float(value)
            low, high = known[key]
            if not low <= given[key] <= high:
                raise ValueError(key)
        return cls(name, **given)


@dataclass(frozen=True, slots=True)
class SkipLayers:
    """Main layers, counted from 0, that a pass for comparison goes without, its weight, and the times t it is made."""

    layers: tuple[int, ...]
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def of(cls, text: str) -> "SkipLayers":
        """Read LAYERS:SCALE[@A-B]; raises ValueError."""
        rest, _, interval = text.partition("@")
        named, _, scale = rest.partition(":")
        layers = tuple(sorted(set(values.integers_of(named))))
        start, end = values.interval_of(interval or "0-1")
        if layers[0] < 0 or not 0 <= float(scale) <= 100 or not 0 <= start <= end <= 1:
            raise ValueError(text)
        return cls(layers, float(scale), (start, end))

    def at(self, t: float) -> float:
        """Return the scale at time t (0 noise, 1 image), 0 where no such pass is made."""
        return self.scale if self.interval[0] <= t <= self.interval[1] else 0.0


@dataclass(frozen=True, slots=True)
class Variation:
    """Noise on the features of a prompt: its norm over theirs, and its seed, None for the picture's own."""

    strength: float
    seed: int | None = None

    @classmethod
    def of(cls, text: str | float) -> "Variation":
        """Read STRENGTH[:SEED]; raises ValueError."""
        strength, _, seed = str(text).partition(":")
        variation = cls(float(strength), int(seed) if seed else None)
        if not 0 <= variation.strength <= 10 or not 0 <= (variation.seed or 0) < SEEDS:
            raise ValueError(text)
        return variation

    def __str__(self) -> str:
        """The text that `of` reads."""
        return f"{self.strength!r}" + ("" if self.seed is None else f":{self.seed}")


def check(name: str, value: Any, read: Callable[[Any], object], form: str) -> None:
    """Check that `read` understands a text, or a variation's number; raises RequestError, which says the form."""
    number = name == "variation" and isinstance(value, int | float) and not isinstance(value, bool)
    if number or (isinstance(value, str) and len(value) <= LONGEST):
        try:
            read(value)
        except (ValueError, KeyError):
            pass
        else:
            return
    raise RequestError(f"{name} is {shown(value)}; needed {form}")


METHOD = Kind(partial(check, read=Method.of, form=METHOD_FORM), str, "NAME[:…]")
SKIPPED = Kind(partial(check, read=SkipLayers.of, form=SKIP_FORM), str, "LAYERS:SCALE[@A-B]")
VARIED = Kind(partial(check, read=Variation.of, form=VARIATION_FORM), str, "X[:SEED]")
