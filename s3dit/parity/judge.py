"""Which stages part: every error beside the bound that fits what the two sides computed in.

In fp32 both sides do the same operations in products of other shapes, and a bound holds for all stages. In bf16 there
is no exact answer: where the reference's own distance to the fp32 truth is known, that times a margin is the bound of
each stage. Where it is not, as between records of two machines, it is what bf16 is apart in this model, times the
margin. A quantized model beside its unquantized weights is as far as its number format.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from s3dit.errors import RequestError
from s3dit.parity.taps import FINE
from s3dit.research.trace import Row, compare, pattern_regex

TOLERANCE, MARGIN = 1e-5, 2.0
# In 16 bits, errors of fp32's own rounding are no errors.
ROUNDING = 1e-6
# Relative distance of two runs in bf16 on two machines.
BF16 = 2e-2
# Of a model in a number format from its unquantized weights, as relative error of the velocity.
FORMATS = {"fp8": 0.06, "fp8-weights": 0.06, "int8": 0.03, "int8-weights": 0.03, "int4": 0.25}
# Stages behind guidance, which makes what prompts are apart larger, and the rounding of either with it.
GUIDED = re.compile(r"(velocity|latents|vae\.decoder|VAE decode|pixels).*|.*, step \d+")
DECODED = re.compile(r"(vae\.decoder|VAE decode|pixels).*")
# Stages that are numbers of their own, which no rounding moves.
EXACT = ("token ids",)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest relative error of a stage.

    tolerance: of all · by_stage: (pattern of names, tolerance), the last that matches counts · errors: the reference's
    own, by stage, to which `margin` is applied; None in fp32 · coarse: of 16 bits or a number format, so that bytes of
    pictures may differ by more than one · guidance: of the request, whose scale then widens what is behind it.
    """

    tolerance: float = TOLERANCE
    by_stage: tuple[tuple[str, float], ...] = ()
    margin: float = MARGIN
    errors: Mapping[str, float] | None = None
    coarse: bool = False
    guidance: float = 0.0

    def of(self, name: str) -> float:
        """The bound of a stage."""
        for pattern, bound in reversed(self.by_stage):
            if pattern_regex(pattern).fullmatch(name):
                return bound
        if name.endswith(EXACT):
            return 0.0
        if self.errors is None:
            # Of pos + s·(pos - neg), both with errors of their own.
            wider = math.hypot(1 + self.guidance, self.guidance) if self.coarse and GUIDED.fullmatch(name) else 1.0
            return self.tolerance * wider
        # What is an edge in the picture may fall to either side of a cell.
        wider = 2.0 if DECODED.fullmatch(name) else 1.0
        return max(wider * self.margin * self.errors.get(name, 0.0), ROUNDING)

    def parts(self, row: Row) -> bool:
        """Whether a stage is beyond its bound; bytes of fp32 pictures may differ by one, a rounding of near values."""
        plain = row.name.startswith("pixels") and self.errors is None and not self.coarse
        if plain and not any(pattern_regex(pattern).fullmatch(row.name) for pattern, _ in self.by_stage):
            return not row.largest <= 1
        return not row.error <= self.of(row.name)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage compared: its errors, its bound, the reference's own error (16 bits only), and whether it parts."""

    row: Row
    bound: float
    reference: float | None
    parts: bool

    def __str__(self) -> str:
        """A line of a table."""
        beside = "" if self.reference is None else f"{self.reference:9.2e} "
        return f"{'PARTS' if self.parts else '   ok'} {beside}{self.row}"

    def to_json(self) -> dict[str, object]:
        """JSON values; an infinite error (missing, another shape, not finite on one side) is null."""
        errors = {"error": self.row.error, "largest": self.row.largest, "reference_error": self.reference}
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in errors.items()}
        return {
            "name": self.row.name, "parts": self.parts, "bound": self.bound, **finite, "shapes": self.row.shapes
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """All stages that both sides have, and the names of those that were left out."""

    stages: list[Stage]
    left_out: list[str] = field(default_factory=list)

    @property
    def first(self) -> Stage | None:
        """The first stage that parts."""
        return next((stage for stage in self.stages if stage.parts), None)


def judge(
    mine: Mapping[str, Tensor], truth: Mapping[str, Tensor], bounds: Bounds = Bounds(), *, partial: bool = False
) -> Verdict:
    """Compare stage by stage, in the order of mine.

    Of what is finer than a block, only what both have is compared; partial: of everything. Elsewhere a stage that one
    side lacks parts.
    """
    stages, left_out = [], []
    for row in compare(mine, truth):
        if None in row.shapes and (partial or FINE.fullmatch(row.name)):
            left_out.append(row.name)
            continue
        own = None if bounds.errors is None else bounds.errors.get(row.name, 0.0)
        stages.append(Stage(row, bounds.of(row.name), own, bounds.parts(row)))
    if not stages:
        raise RequestError("the two sides have no stage in common; needed records of this version of s3dit parity")
    return Verdict(stages, left_out)


def errors_of(theirs: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The reference's own distance to the truth, by stage."""
    return {row.name: row.error for row in compare(theirs, truth) if math.isfinite(row.error)}


def tolerances(words: Sequence[str]) -> tuple[float | None, tuple[tuple[str, float], ...]]:
    """Read `1e-5` and `layers.*=2e-5` -> the tolerance of all, if said, and those of stages; raises RequestError."""
    everything, by_stage = None, []
    for word in words:
        name, equals, number = word.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not value >= 0:
            raise RequestError(
                f"tolerance is {word!r}; needed a number such as 1e-5, or one of a stage: 'layers.*=2e-5'"
            )
        if equals:
            by_stage.append((name, value))
        else:
            everything = value
    return everything, tuple(by_stage)
