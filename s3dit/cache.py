"""Cache: how a request spares model calls, by a method, its threshold and what was calibrated for it.

In Python `Cache("taylor", 1)`; on the command line and as text the same in one word, `taylor:1`, with `name=value`
behind it for what is rarer, and at the end the file of a calibration: `magnitude:0.06:order=1:cache.json`. The numbers
of that file are taken in, so that a request, and a replay of its picture, need it no more. Importing this module does
not import torch. What is wrong raises ValueError, which a Request turns into its own error.

Not here: when a call is spared and what takes its place (`sampling/caches.py`).
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, get_args

from s3dit.control import shown

Method = Literal["first-block", "modulation", "magnitude", "taylor"]

FORM = "METHOD[:THRESHOLD][:order=N][:first=N][:last=N][:calibration.json]"
# Thresholds that are taken where none is given.
THRESHOLDS: dict[str, float] = {"first-block": 0.08, "modulation": 0.1, "magnitude": 0.03, "taylor": 2}
# What the form says by name.
RARE = ("order", "first", "last")
NUMBER = re.compile(r"[\d.+-]+(e[+-]?\d+)?", re.IGNORECASE)
# Which numbers of a calibration a method needs.
CALIBRATED = {"modulation": "polynomial", "magnitude": "magnitudes"}
# A file of a calibration is a few KB; its lists have at most as many entries as a run has steps.
LARGEST_FILE, MOST_NUMBERS = 1 << 20, 1001
# The name of a model's own calibration, in its folder.
FILE = "cache.json"


@dataclass(frozen=True, slots=True)
class Cache:
    """How model calls of a request are spared.

    method: first-block (a call is spared while the first block's residual is within `threshold` of that of the last
    computed call), modulation (while the accumulated change of the modulated input, rescaled by a polynomial, is),
    magnitude (while the accumulated deviation of calibrated magnitudes is) or taylor (so many calls after each computed
    one) · threshold: 0 spares none (default: THRESHOLDS) · order: of the extrapolation through the last computed
    velocities, 0 repeats the last (default: taylor 1, else 0) · first, last: so many calls at the start (default: a
    fifth of all, at least two) and at the end are computed always · polynomial: coefficients, the highest power first ·
    magnitudes: pairs (t, magnitude), t rising from 0 to 1; both are of a calibration.
    """

    method: Method
    threshold: float | None = None
    order: int | None = None
    first: int | None = None
    last: int = 1
    polynomial: Sequence[float] | None = None
    magnitudes: Sequence[Sequence[float]] | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the form of the command line (FORM), and read the calibration that it names; raises ValueError."""
        method, *pieces = text.split(":")
        values: dict[str, Any] = {}
        file = None
        while pieces and file is None:
            name, equals, value = (piece := pieces.pop(0)).partition("=")
            if equals and name in RARE and name not in values:
                values[name] = _number(int, value, text)
            elif "threshold" not in values and NUMBER.fullmatch(piece):
                values["threshold"] = _number(float, piece, text)
            elif (rest := ":".join([piece, *pieces])).endswith(".json"):
                file = rest
            else:
                raise ValueError(f"cache {text!r} has {piece!r} in it; needed {FORM}")
        cache = cls(method, **values)  # type: ignore[arg-type]
        if file is not None and method in THRESHOLDS and cache.missing is None:
            raise ValueError(f"cache {method} reads no calibration; leave {shown(file)} out")
        return cache if file is None else cache.calibrated(read_calibration(file))

    @property
    def limit(self) -> float:
        """The threshold, or the method's own."""
        return THRESHOLDS[self.method] if self.threshold is None else self.threshold

    @property
    def degree(self) -> int:
        """The order, or the method's own."""
        return int(self.method == "taylor") if self.order is None else self.order

    def always(self, calls: int) -> tuple[int, int]:
        """Return the first call of a run that may be spared, and the end of those that may."""
        return max(2, math.ceil(calls / 5)) if self.first is None else self.first, calls - self.last

    @property
    def missing(self) -> str | None:
        """The field of a calibration that the method needs and this lacks; None where it has all."""
        needed = CALIBRATED.get(self.method)
        return needed if needed is not None and getattr(self, needed) is None else None

    def calibrated(self, calibration: dict[str, Any]) -> Self:
        """Take in what the method needs of a calibration; raises ValueError where it is not there."""
        if (name := self.missing) is None:
            return self
        if name not in calibration:
            raise ValueError(f"the calibration has no {name}; needed a file that s3dit calibrate-cache wrote")
        cache = replace(self, **{name: calibration[name]})
        cache.check()
        return cache

    def check(self) -> None:
        """Check every field; raises ValueError."""
        if not isinstance(self.method, str) or self.method not in get_args(Method):
            raise ValueError(f"cache method is {shown(self.method)}; needed one of {', '.join(get_args(Method))}")
        whole = (("order", 3), ("first", 1000), ("last", 1000), *([("threshold", 1000)] * (self.method == "taylor")))
        for name, high in whole:
            value = getattr(self, name)
            right = _is_number(value) and value in range(high + 1) and (isinstance(value, int) or name == "threshold")
            if not right and not (value is None and name != "last"):
                raise ValueError(f"cache {name} is {shown(value)}; needed an integer from 0 to {high}")
        if self.threshold is not None and not (_is_number(self.threshold) and 0 <= self.threshold <= 1000):
            raise ValueError(f"cache threshold is {shown(self.threshold)}; needed a number from 0 to 1000")
        for name in CALIBRATED.values():
            if getattr(self, name) is not None and name != CALIBRATED.get(self.method):
                raise ValueError(f"cache {self.method} reads no {name}; leave {name} out")
        if self.polynomial is not None and not _numbers(self.polynomial, 8):
            raise ValueError(f"cache polynomial is {shown(self.polynomial)}; needed 1 to 8 coefficients")
        if (pairs := self.magnitudes) is not None:
            right = isinstance(pairs, Sequence) and 2 <= len(pairs) <= MOST_NUMBERS
            right = right and all(_numbers(pair, 2) and len(pair) == 2 and pair[1] > 0 for pair in pairs)
            if not right or not all(0 <= a[0] < b[0] <= 1 for a, b in pairwise(pairs)):
                raise ValueError(f"cache magnitudes are {shown(pairs)}; needed pairs (t, above 0), t rising in 0 to 1")

    def to_json(self) -> dict[str, Any]:
        """Return what is not a default, as plain JSON values."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        lists = {name: [list(entry) if isinstance(entry, Sequence) else entry for entry in given[name]]
                 for name in ("polynomial", "magnitudes") if name in given}  # fmt: skip
        return given | lists

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Make a Cache of what `to_json` gave; raises ValueError on unknown or missing keys and wrong values."""
        if not isinstance(data, dict) or "method" not in data or set(data) - {f.name for f in fields(cls)}:
            raise ValueError(f"replay data has a cache {shown(data)}; needed the JSON that this program writes")
        cache = cls(**data)
        cache.check()
        return cache

    def __str__(self) -> str:
        """Return the form that `parse` reads, without a calibration."""
        rare = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)
                if f.name in RARE and getattr(self, f.name) != f.default]  # fmt: skip
        return ":".join([self.method, f"{self.limit:g}", *rare])


def read_calibration(path: str | Path) -> dict[str, Any]:
    """Read a file that `s3dit calibrate-cache` wrote; raises ValueError."""
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(LARGEST_FILE))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cache calibration {shown(str(path))} cannot be read: {type(error).__name__}; needed a "
                         "file that s3dit calibrate-cache wrote") from None  # fmt: skip
    if not isinstance(data, dict):
        raise ValueError(f"cache calibration {shown(str(path))} holds {shown(data)}; needed a JSON object")
    return data


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number of Python's; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _numbers(values: Any, most: int) -> bool:
    """Whether a value is a list of 1 to `most` finite numbers."""
    return isinstance(values, list | tuple) and 0 < len(values) <= most and all(map(_is_number, values))


def _number(kind: Any, text: str, whole: str) -> Any:
    """The number that a piece of the form `whole` is; raises ValueError."""
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"cache {whole!r} has {text!r} for a number; needed {FORM}") from None
