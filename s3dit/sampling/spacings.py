"""Spacings of sigmas that no model is published with but karras and exponential, in float64.

Sources: Karras et al. 2022 (karras); Sabour et al. 2024, arXiv 2404.14507 (kl_optimal); Mochi (linear_quadratic);
RES4LYF (bong_tangent); Lee et al. 2024, arXiv 2407.12173 (beta).
"""

import math
from collections.abc import Callable

import numpy as np


def beta_quantile(p: np.ndarray) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6): its density by the substitution x = sin², which tames both ends, summed finely."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    middle = (angle[1:] + angle[:-1]) / 2
    mass = np.append(0.0, np.cumsum((np.sin(middle) * np.cos(middle)) ** 0.2))
    return np.sin(np.interp(p, mass / mass[-1], angle)) ** 2


def _linear_quadratic(n: int) -> np.ndarray:
    """Half of the steps in even pieces of the first 0.025 from noise, the others quadratic on to the image."""
    first, start = n // 2, 0.025
    i, rest, slope = np.arange(n), n - first, start / first
    # A parabola through the end of the straight part, with its slope there, and through 1 at n.
    bend = (1 - start - slope * rest) / rest**2
    return 1 - np.where(i < first, slope * i, start + slope * (i - first) + bend * (i - first) ** 2)


def _bong_tangent(n: int) -> np.ndarray:
    """Two arcs of arctangents, from 1 to 1/2 and on to 0, flat in the middle of each."""
    steps = n + 2
    pivot = int(steps * 0.6)
    slope = 0.2 / (steps / 40)

    def arc(length: int, middle: int, start: float, end: float) -> np.ndarray:
        fall = np.arctan(-slope * (np.arange(length) - middle))
        return end + (fall - fall[-1]) / (fall[0] - fall[-1]) * (start - end)

    first, second = arc(pivot, pivot, 1.0, 0.5), arc(steps - pivot, 0, 0.5, 0.0)
    return np.concatenate([first[:-1], second[:-1]])


def _twinflow(n: int) -> np.ndarray:
    """Even levels from 0.999 down to 0.5, or of two steps to 0.6, from where one step is to reach the image."""
    return np.linspace(0.999, 0.6 if n == 2 else 0.5, n)


def _karras(ramp: np.ndarray, high: float, low: float) -> np.ndarray:
    high, low = high ** (1 / 7.0), low ** (1 / 7.0)
    return (high + ramp * (low - high)) ** 7.0


# Spacings between the first and the last of the official sigmas, from a ramp from 0 to 1.
BETWEEN: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "karras": _karras,
    "exponential": lambda ramp, high, low: np.exp(math.log(high) + ramp * (math.log(low) - math.log(high))),
    "kl_optimal": lambda ramp, high, low: np.tan(math.atan(high) + ramp * (math.atan(low) - math.atan(high))),
    "beta": lambda ramp, high, low: low + beta_quantile(1 - ramp) * (high - low),
}
# Spacings of their own, from 1, that no shift changes.
UNSHIFTED = {"linear_quadratic": _linear_quadratic, "bong_tangent": _bong_tangent, "twinflow": _twinflow}
