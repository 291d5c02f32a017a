"""Caches: when a model call is spared, and which velocity takes its place.

A rule looks at one picture, call by call. It is asked at every call that may be spared and says whether it is; between
two computed calls it adds up what it believes to have changed. Two of the rules look at the tokens: `FirstBlock`, and
`ModulatedInput`; the others know all from the times and numbers that were calibrated before, so for every picture the
same. Each is plain arithmetic, and what it looks at are numbers that `research.atlases` shows, too.

What takes the place of a spared velocity is the polynomial in t through the last computed ones (`extrapolated`), of
order 0 the last one itself. A flow's velocity is smooth in t, so order 1 is right where a repeated residual is off.

Sources: first-block caching of ParaAttention and cache-dit; Liu et al. 2024, TeaCache (modulated input); Ma et al.
2025, MagCache (magnitudes); Liu et al. 2025, TaylorSeer (extrapolation). They repeat or extrapolate the residual of
the blocks; here it is the velocity, which is as good from order 1 on, takes a sixtieth of the memory, and needs no
part of the model in a spared call.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from s3dit.cache import Cache

# What the magnitude rule spares in a row at most.
MOST_SPARED = 3


class Rule(Protocol):
    """Decides for one picture."""

    @property
    def looks_at(self) -> Literal["residual", "input", None]:
        """Of what the change is that it is given: the first block's residual, its modulated input, or nothing."""

    def spares(self, i: int, change: float) -> bool:
        """Whether call i is spared; asked in the order of the calls.

        change: of what it looks at, relative, since the last computed call (residual) or the last call (input).
        """

    def computed(self, i: int) -> None:
        """Call i was computed."""


@dataclass(slots=True)
class FirstBlock:
    """Spares calls while the first block's residual is within `threshold` of that of the last computed call."""

    threshold: float
    looks_at: Literal["residual"] = "residual"

    def spares(self, i: int, change: float) -> bool:
        """As `Rule`."""
        return change < self.threshold

    def computed(self, i: int) -> None:
        """As `Rule`."""


@dataclass(slots=True)
class ModulatedInput:
    """Spares calls while the sum of polynomial(change of the modulated input) is below `threshold`."""

    threshold: float
    polynomial: Sequence[float]
    total: float = 0.0
    looks_at: Literal["input"] = "input"

    def spares(self, i: int, change: float) -> bool:
        """As `Rule`."""
        self.total += max(0.0, polynomial(self.polynomial, change))
        return self.total < self.threshold

    def computed(self, i: int) -> None:
        """As `Rule`."""
        self.total = 0.0


@dataclass(slots=True)
class Magnitude:
    """Spares calls while the sum of |1 - magnitude now / magnitude then| is below `threshold`, MOST_SPARED at most.

    magnitudes: of each call, of one's residual; then is the last computed call.
    """

    threshold: float
    magnitudes: Sequence[float]
    last: int = 0
    error: float = 0.0
    looks_at: None = None

    def spares(self, i: int, change: float) -> bool:
        """As `Rule`."""
        self.error += abs(1.0 - self.magnitudes[i] / self.magnitudes[self.last])
        return self.error < self.threshold and i - self.last <= MOST_SPARED

    def computed(self, i: int) -> None:
        """As `Rule`."""
        self.last, self.error = i, 0.0


@dataclass(slots=True)
class Interval:
    """Spares so many calls after each computed one: Taylor prediction."""

    spared: int
    last: int = 0
    looks_at: None = None

    def spares(self, i: int, change: float) -> bool:
        """As `Rule`."""
        return i - self.last <= self.spared

    def computed(self, i: int) -> None:
        """As `Rule`."""
        self.last = i


def rule(cache: Cache, times: Sequence[float]) -> Rule:
    """Make the rule of a calibrated Cache for one picture; times: of the calls, rising."""
    if cache.method == "first-block":
        return FirstBlock(cache.limit)
    if cache.method == "modulation":
        return ModulatedInput(cache.limit, cache.polynomial or ())
    if cache.method == "magnitude":
        return Magnitude(cache.limit, [interpolated(cache.magnitudes or (), t) for t in times])
    return Interval(int(cache.limit))


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Value of a polynomial at x, the coefficient of the highest power first (Horner)."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def interpolated(pairs: Sequence[Sequence[float]], t: float) -> float:
    """Value at t of the lines between pairs (t, value), t rising; outside of them that of the nearest."""
    i = bisect_right(pairs, t, key=lambda pair: pair[0])
    if i in (0, len(pairs)):
        return pairs[min(i, len(pairs) - 1)][1]
    (t0, low), (t1, high) = pairs[i - 1 : i + 1]
    return low + (high - low) * (t - t0) / (t1 - t0)


def extrapolated(past: Sequence[tuple[float, Tensor]], t: float) -> Tensor:
    """Value at t of the polynomial through n pairs (t, tensor), in fp32: exact where a polynomial of order n - 1 is."""
    times = [time for time, _ in past]
    weights = [math.prod((t - other) / (own - other) for other in times if other != own) for own in times]
    return torch.stack([weight * tensor.float() for weight, (_, tensor) in zip(weights, past, strict=True)]).sum(0)
