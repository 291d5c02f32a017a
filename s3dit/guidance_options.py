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
from typing import TYPE_CHECKING, Any

from s3dit import values
from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.values import MOST_STEPS, Kind

if TYPE_CHECKING:
    from s3dit.request import Request

# A text that is longer is none of these.
LONGEST = 1000
METHOD_FORM = (
    "plain, apg[:eta=0,momentum=-0.5,norm_threshold=0] (eta from 0 to 10, momentum within ±0.99, norm_threshold from 0) "
    "or cfg_zero[:zero_init_steps=1]"
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
        name, _, rest = (text or "plain").partition(":")
        known, given = PARAMETERS[name], dict[str, Any]()
        for key, value in (entry.split("=") for entry in rest.split(",") if rest):
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


def guidance_scale(request: "Request", default: float) -> float | list[float]:
    """The scale or scales of a request in Z-Image's form: 0.0 where all are 0."""
    given = request.guidance_scale if request.cfg is None else [weight - 1.0 for weight in values.as_list(request.cfg)]
    several = [float(scale) for scale in ([default] if given is None else values.as_list(given))]
    return several[0] if len(several) == 1 else several if any(several) else 0.0


def check_guidance(request: "Request", layers: int) -> None:
    """Hold a resolved request's guidance to its steps and to the model's main layers; raises RequestError."""
    steps = request.num_inference_steps or 1
    if (given := len(values.as_list(request.guidance_scale))) > steps:
        raise RequestError(f"guidance_scale has {given} numbers; needed at most one a step, of which there are {steps}")
    if request.strength is None and (left_out := zero_init_steps(request)) >= steps:
        raise RequestError(f"zero_init_steps of guidance_method is {left_out}; needed fewer than the {steps} steps")
    if request.skip_layers is not None and (last := SkipLayers.of(request.skip_layers).layers[-1]) >= layers:
        raise RequestError(f"skip_layers has layer {last}; needed layers from 0 to {layers - 1} of this model")


def zero_init_steps(request: "Request") -> int:
    """The first steps of a resolved request that have no velocity, by its method of guidance."""
    method = Method.of(request.guidance_method)
    return method.zero_init_steps if method.name == "cfg_zero" and request.guidance_scale else 0


def variations(request: "Request") -> list[Variation]:
    """The variation of every picture, none being of strength 0; seeds count up over the pictures that share one."""
    if request.variation is None:
        return [Variation(0.0)] * request.count
    each = request.count // len(values.as_list(request.variation))
    made = []
    for i, (text, own) in enumerate(zip(request.per_image("variation"), request.seeds() or [0], strict=True)):
        given = Variation.of(text)
        made.append(Variation(given.strength, (own if given.seed is None else given.seed + i % each) % SEEDS))
    return made


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
