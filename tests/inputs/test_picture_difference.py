"""Differences of pictures against plain loops in float64, and a case whose figures can be said."""

import math

import numpy as np
import pytest
from PIL import Image

from s3dit.inputs.picture_difference import PictureDifference, drawn


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def measured(a, b):
    return PictureDifference.of(Image.fromarray(a), Image.fromarray(b))


def plain_ssim(a, b):
    """Window by window, as Wang et al. 2004 have it."""
    gray = [each.astype(np.float64) @ [0.299, 0.587, 0.114] for each in (a, b)]
    weights = np.array(
        [[math.exp(-((y - 5) ** 2 + (x - 5) ** 2) / (2 * 1.5**2)) for x in range(11)] for y in range(11)]
    )
    weights /= weights.sum()
    found = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = (each[top : top + 11, left : left + 11] for each in gray)
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return sum(found) / len(found)


# The second is of more than one strip of rows.
@pytest.mark.parametrize(("height", "width", "amount"), [(23, 31, 20), (280, 13, 3), (11, 11, 255)])
def test_against_plain_loops(height, width, amount):
    """1e-10: sums of some hundred products in float64 in another order, where variances nearly cancel."""
    a = noise(height, width)
    b = (a + np.random.default_rng(1).integers(-amount, amount + 1, a.shape)).clip(0, 255).astype(np.uint8)
    found = measured(a, b)
    away = [abs(int(x) - int(y)) for x, y in zip(a.ravel(), b.ravel(), strict=True)]
    assert found.largest == max(away) and found.mean == pytest.approx(sum(away) / len(away), rel=1e-12)
    square = sum(each * each for each in away) / len(away)
    assert found.psnr == pytest.approx(10 * math.log10(255 * 255 / square), rel=1e-12)
    assert found.unequal == pytest.approx(np.mean([any(row) for row in np.reshape(away, (-1, 3))]))
    assert found.ssim == pytest.approx(plain_ssim(a, b), abs=1e-10)


def test_equal_opposite_and_small():
    a = noise(16, 16)
    assert measured(a, a) == PictureDifference(0, 0.0, 0.0, math.inf, pytest.approx(1.0, abs=1e-12))
    black, white = np.zeros((12, 12, 3), np.uint8), np.full((12, 12, 3), 255, np.uint8)
    found = measured(black, white)
    assert (found.largest, found.mean, found.unequal, found.psnr) == (255, 255.0, 1.0, 0.0)
    assert found.ssim == pytest.approx(6.5025 / (255**2 + 6.5025))
    assert measured(black[:10], white[:10]).ssim is None


def test_the_picture_of_a_difference():
    a = noise(4, 5)
    b = a.copy()
    b[1, 2, 0] ^= 4
    image, factor = drawn(Image.fromarray(a), Image.fromarray(b))
    panels = np.split(np.asarray(image), 3, axis=1)
    assert np.array_equal(panels[0], a) and np.array_equal(panels[1], b) and factor == 255 / 4
    assert panels[2].sum() == panels[2][1, 2, 0] == 255
    other, _ = drawn(Image.fromarray(a), Image.fromarray(noise(7, 3)))
    assert other.size == (8, 7)
