"""Schedules: the noise levels (sigmas) that a solver steps through, from 1 (noise) to 0 (image).

Sources: official `src/zimage/pipeline.py`, diffusers' `FlowMatchEulerDiscreteScheduler` (sigmas, bit for bit); Karras
et al. 2022 (karras spacing); Sabour et al. 2024, arXiv 2404.14507 (kl_optimal); Mochi (linear_quadratic); RES4LYF
(bong_tangent); inclusionAI/TwinFlow's README (twinflow); ComfyUI's simple, beta and sgm_uniform schedulers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s3dit.request import Schedule


def sigmas(
    n: int,
    shift: float = 3.0,
    schedule: Schedule = "official",
    explicit: Sequence[float] | None = None,
    dynamic: bool = False,
) -> Tensor:
    """Return the sigmas of n steps: (n + 1,) fp32, from 1 down to 0.

    shift: above 0, 1 changes nothing · schedule: the spacing · explicit: sigmas that replace the even spacing and are
    shifted like it, as diffusers does with its `sigmas` argument; a 0 among them is left out · dynamic: the shift
    follows from the size of the picture, and is applied in the form diffusers then has.
    """
    # parity: float32 from the start, as diffusers' pipelines space them; the last bit of t moves the picture.
    even = torch.linspace(1.0, 1.0 / n, n, dtype=torch.float32).numpy()
    given = even if explicit is None else [sigma for sigma in explicit if sigma > 0]
    spaced = _shift(np.asarray(given, dtype=np.float32), shift, dynamic)
    # parity: the ends of the spacings are Python's floats, of 64 bits.
    high, low = float(spaced[0]), float(spaced[-1])
    # The sigmas of the training.
    table = _shift(np.arange(1, 1001, dtype=np.float32) / np.float32(1000), shift, dynamic)
    if schedule == "simple":
        spaced = table[[-1 - int(i * 1000 / n) for i in range(n)]]
    elif schedule == "sgm_uniform":
        spaced = _shift(np.linspace(1.0, table[0], n + 1)[:-1], shift, dynamic)
    elif schedule in BETWEEN:
        spaced = BETWEEN[schedule](np.linspace(0, 1, n), high, low)
    elif schedule in UNSHIFTED:
        spaced = UNSHIFTED[schedule](n) if n > 1 or schedule == "twinflow" else np.ones(1)
    return torch.from_numpy(np.append(spaced, 0.0).astype(np.float32))


def _shift(sigmas: Any, shift: float, dynamic: bool) -> Any:
    """Shift sigmas toward noise: s·u / (1 + (s - 1)·u); the dynamic form s / (s + (1/u - 1)) rounds differently."""
    if dynamic:
        return shift / (shift + (1 / sigmas - 1))
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _beta_quantile(p: np.ndarray) -> np.ndarray:
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
    """Even levels down to 0.5, or of two steps to 0.6, from where the image is left in one step."""
    return np.linspace(0.999, 0.6 if n == 2 else 0.5, n)


def _karras(ramp: np.ndarray, high: float, low: float) -> np.ndarray:
    high, low = high ** (1 / 7.0), low ** (1 / 7.0)
    return (high + ramp * (low - high)) ** 7.0


# Spacings between the first and the last of the official sigmas, from a ramp from 0 to 1.
BETWEEN: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "karras": _karras,
    "exponential": lambda ramp, high, low: np.exp(math.log(high) + ramp * (math.log(low) - math.log(high))),
    "kl_optimal": lambda ramp, high, low: np.tan(math.atan(high) + ramp * (math.atan(low) - math.atan(high))),
    "beta": lambda ramp, high, low: low + _beta_quantile(1 - ramp) * (high - low),
}
# Spacings of their own, from 1, that no shift changes.
UNSHIFTED = {"linear_quadratic": _linear_quadratic, "bong_tangent": _bong_tangent, "twinflow": _twinflow}
