"""Each rule of a cache against a loop that spells it out in double precision, and predictions against polynomials."""

import random

import numpy as np
import pytest
import torch

from s3dit.cache import Cache
from s3dit.sampling.caches import MOST_SPARED, extrapolated, interpolated, polynomial, rule

N = 40
TIMES = [i / N for i in range(N)]
MAGNITUDES = [[t, 1.0 - 0.4 * t * t] for t in (0.0, 0.3, 0.7, 1.0)]
POLYNOMIAL = [3.0, -0.5, 0.8, 0.01]


def decided(cache, changes):
    """Which calls are computed, the first being so."""
    own, computed = rule(cache, TIMES), [True]
    own.computed(0)
    for i in range(1, N):
        computed.append(not own.spares(i, changes[i]))
        if computed[-1]:
            own.computed(i)
    return computed


def changes():
    source = random.Random(3)
    return [source.uniform(0, 0.2) for _ in range(N)]


def test_first_block():
    given = changes()
    wanted = [True] + [not change < 0.12 for change in given[1:]]
    assert decided(Cache("first-block", 0.12), given) == wanted and 5 < sum(wanted) < 35


def test_modulation():
    """TeaCache: rescaled changes add up, from zero again after a computed call."""
    given, total, wanted = changes(), np.float64(0), [True]
    for change in given[1:]:
        total += np.float64(3) * change**3 - np.float64(0.5) * change**2 + np.float64(0.8) * change + 0.01
        wanted.append(bool(total >= 0.3))
        total = np.float64(0) if wanted[-1] else total
    assert decided(Cache("modulation", 0.3, polynomial=POLYNOMIAL), given) == wanted and 5 < sum(wanted) < 35


@pytest.mark.parametrize("threshold", [0.02, 0.1, 10])
def test_magnitude(threshold):
    """MagCache: the product of the ratios since the last computed call, the sum of its distances from 1, a longest run.

    At the largest threshold the run decides.
    """
    sizes = np.interp(TIMES, *zip(*MAGNITUDES, strict=True)).astype(np.float64)
    product, error, spared, wanted = np.float64(1), np.float64(0), 0, [True]
    for i in range(1, N):
        product *= sizes[i] / sizes[i - 1]
        error, spared = error + abs(1 - product), spared + 1
        wanted.append(not (error < threshold and spared <= MOST_SPARED))
        if wanted[-1]:
            product, error, spared = np.float64(1), np.float64(0), 0
    assert decided(Cache("magnitude", threshold, magnitudes=MAGNITUDES), [0.0] * N) == wanted
    assert sum(wanted) == 10 if threshold == 10 else 10 < sum(wanted) < 38


@pytest.mark.parametrize("spared", [0, 1, 3])
def test_interval(spared):
    assert decided(Cache("taylor", spared), [0.0] * N) == [i % (spared + 1) == 0 for i in range(N)]


@pytest.mark.parametrize("method", ["first-block", "modulation", "magnitude", "taylor"])
def test_a_threshold_of_zero_spares_nothing(method):
    """Not even where nothing changes."""
    flat = {"polynomial": [1.0, 0.0], "magnitudes": [[0.0, 1.0], [1.0, 1.0]]}
    assert all(decided(Cache(method, 0).calibrated(flat), [0.0] * N))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_polynomial_of_the_order_is_met_and_the_next_is_not(order):
    torch.manual_seed(0)
    times, t = [0.1, 0.25, 0.3, 0.55][: order + 1], 0.7
    terms = torch.randn(order + 2, 5, 3, dtype=torch.float64)

    def value(at, terms):
        return sum(term * at**power for power, term in enumerate(terms))

    for count, met in ((order + 1, True), (order + 2, False)):
        past = [(at, value(at, terms[:count]).float()) for at in times]
        error = (extrapolated(past, t).double() - value(t, terms[:count])).norm() / terms.norm()
        # Weights of up to 20 times an ulp of fp32.
        assert (error < 5e-6) == met


def test_numbers_between_those_of_a_calibration():
    xs, ys = zip(*MAGNITUDES, strict=True)
    for t in (0.0, 0.05, 0.3, 0.69, 0.7, 0.99, 1.0):
        assert interpolated(MAGNITUDES, t) == pytest.approx(np.interp(t, xs, ys), abs=1e-15)
    assert interpolated(MAGNITUDES[1:], 0.1) == MAGNITUDES[1][1]
    assert polynomial(POLYNOMIAL, 0.7) == pytest.approx(np.polyval(POLYNOMIAL, 0.7), abs=1e-15)
