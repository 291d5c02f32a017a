"""Measures how far two pictures are apart in pixels: largest and mean difference, PSNR and SSIM, and draws it.

Everything is computed in float64 on levels 0 to 255. Sources: Wang et al. 2004 (SSIM: a Gaussian window of 11 × 11 with
a deviation of 1.5, K1 0.01, K2 0.03, windows that lie wholly inside, on luminance); PSNR over all channels.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# (H, W, 3) of 8 bits, and a plane (H, W) of it.
Pixels = NDArray[np.uint8]
Plane = NDArray[np.float64]
# Weights of Rec. 601.
LUMINANCE = np.array([0.299, 0.587, 0.114])
# SSIM's window, its deviation in pixels, and its two constants times the range of levels.
WINDOW, DEVIATION = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Rows of windows that are taken at once.
STRIP = 256


@dataclass(frozen=True, slots=True)
class PictureDifference:
    """Two pictures of one size apart: largest, mean: of the absolute differences in levels · share of unequal pixels.

    psnr in dB, infinite where they are equal · ssim, at most 1; None where a side has less than WINDOW pixels.
    """

    largest: int
    mean: float
    unequal: float
    psnr: float
    ssim: float | None

    @classmethod
    def of(cls, one: Image.Image, other: Image.Image) -> "PictureDifference":
        """Measure two RGB pictures of one size."""
        a, b = np.asarray(one), np.asarray(other)
        away = np.abs(a.astype(np.int16) - b)
        square = float(np.square(away, dtype=np.int32).mean(dtype=np.float64))
        psnr = math.inf if square == 0 else 10 * math.log10(255**2 / square)
        unequal = float(away.any(axis=2).mean())
        return cls(int(away.max()), float(away.mean(dtype=np.float64)), unequal, psnr, ssim(a, b))


def ssim(one: Pixels, other: Pixels) -> float | None:
    """Mean structural similarity of two pictures (H, W, 3); None where a side is below WINDOW."""
    height, width = one.shape[:2]
    if min(height, width) < WINDOW:
        return None
    sums = []
    # Strip by strip: in float64 a large picture takes a gigabyte for each plane.
    for top in range(0, height - WINDOW + 1, STRIP):
        rows = slice(top, top + STRIP + WINDOW - 1)
        a, b = (each[rows] @ LUMINANCE for each in (one, other))
        mean_a, mean_b = _smoothed(a), _smoothed(b)
        variances = _smoothed(a * a + b * b) - mean_a**2 - mean_b**2
        covariance = _smoothed(a * b) - mean_a * mean_b
        alike = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
        sums.append((alike / ((mean_a**2 + mean_b**2 + C1) * (variances + C2))).sum())
    return float(sum(sums)) / ((height - WINDOW + 1) * (width - WINDOW + 1))


def _smoothed(plane: Plane) -> Plane:
    """Weighted means of a plane's windows, (H - WINDOW + 1, W - WINDOW + 1)."""
    weights = np.exp(-0.5 * np.square((np.arange(WINDOW) - WINDOW // 2) / DEVIATION))
    weights /= weights.sum()
    for axis in (0, 1):
        length = plane.shape[axis] - WINDOW + 1
        rows = plane.swapaxes(0, axis)
        plane = sum(weight * rows[i : i + length] for i, weight in enumerate(weights)).swapaxes(0, axis)
    return plane


def drawn(one: Image.Image, other: Image.Image) -> tuple[Image.Image, float]:
    """Lay two RGB pictures side by side, behind them their absolute difference where they are of one size.

    -> the picture, and by how much the difference is amplified: so that its largest is white.
    """
    panels, factor = [np.asarray(one), np.asarray(other)], 1.0
    if one.size == other.size:
        away = np.abs(panels[0].astype(np.float64) - panels[1])
        factor = 255 / away.max() if away.any() else 1.0
        panels.append((away * factor).round().astype(np.uint8))
    height = max(panel.shape[0] for panel in panels)
    padded = [np.pad(panel, ((0, height - panel.shape[0]), (0, 0), (0, 0))) for panel in panels]
    return Image.fromarray(np.concatenate(padded, axis=1)), factor
