"""Schedules: the noise levels (sigmas) that a solver steps through, from 1 (noise) to 0 (image).

Sources: official `src/zimage/pipeline.py`, diffusers' `FlowMatchEulerDiscreteScheduler` (sigmas, bit for bit);
ComfyUI's simple and sgm_uniform. Other spacings are in `spacings.py`, what ComfyUI does otherwise in `comfyui.py`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s3dit.request import Schedule
from s3dit.sampling.spacings import BETWEEN, UNSHIFTED


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
    spaced = shifted(np.asarray(given, dtype=np.float32), shift, dynamic)
    # parity: the ends of the spacings are Python's floats, of 64 bits.
    high, low = float(spaced[0]), float(spaced[-1])
    table = training_sigmas(shift, dynamic)
    if schedule == "simple":
        spaced = table[[-1 - int(i * 1000 / n) for i in range(n)]]
    elif schedule == "sgm_uniform":
        spaced = shifted(np.linspace(1.0, table[0], n + 1)[:-1], shift, dynamic)
    elif schedule in BETWEEN:
        spaced = BETWEEN[schedule](np.linspace(0, 1, n), high, low)
    elif schedule in UNSHIFTED:
        spaced = UNSHIFTED[schedule](n) if n > 1 or schedule == "twinflow" else np.ones(1)
    return torch.from_numpy(np.append(spaced, 0.0).astype(np.float32))


def training_sigmas(shift: float, dynamic: bool = False) -> Any:
    """Return the 1,000 sigmas of the training, shifted: fp32, from near 0 up to 1."""
    return shifted(np.arange(1, 1001, dtype=np.float32) / np.float32(1000), shift, dynamic)


def shifted(sigmas: Any, shift: float, dynamic: bool = False) -> Any:
    """Shift sigmas toward noise: s·u / (1 + (s - 1)·u); the dynamic form s / (s + (1/u - 1)) rounds differently."""
    if dynamic:
        return shift / (shift + (1 / sigmas - 1))
    return shift * sigmas / (1 + (shift - 1) * sigmas)
