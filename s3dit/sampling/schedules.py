"""Schedules: the noise levels (sigmas) that a solver steps through, from 1 (noise) to 0 (image).

Sources: official `src/zimage/pipeline.py`, diffusers' `FlowMatchEulerDiscreteScheduler` (sigmas, bit for bit); Karras
et al. 2022 (karras spacing); ComfyUI's simple and beta schedulers.
"""

import math
from collections.abc import Sequence

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
    even = (
        torch.linspace(1.0, 1.0 / n, n, dtype=torch.float32).numpy()
        if explicit is None
        else [sigma for sigma in explicit if sigma > 0]
    )
    spaced = _shift(np.asarray(even, dtype=np.float32), shift, dynamic)
    # parity: the ends of the spacings are Python's floats, of 64 bits.
    high, low = float(spaced[0]), float(spaced[-1])
    if schedule == "simple":
        # n picks out of the 1000 sigmas of the training, the largest first.
        table = _shift(np.arange(1, 1001, dtype=np.float32) / np.float32(1000), shift, dynamic)
        spaced = table[[-1 - int(i * 1000 / n) for i in range(n)]]
    elif schedule == "karras":
        ramp, low, high = np.linspace(0, 1, n), low ** (1 / 7.0), high ** (1 / 7.0)
        spaced = (high + ramp * (low - high)) ** 7.0
    elif schedule == "exponential":
        spaced = np.exp(np.linspace(math.log(high), math.log(low), n))
    elif schedule == "beta":
        spaced = low + _beta_quantile(1 - np.linspace(0, 1, n)) * (high - low)
    return torch.from_numpy(np.append(spaced, 0.0).astype(np.float32))


def _shift(sigmas: np.ndarray, shift: float, dynamic: bool) -> np.ndarray:
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
