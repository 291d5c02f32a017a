"""What a calibration measures, against whole tensors, and its fit against the normal equations."""

import numpy as np
import pytest

from s3dit import Pipeline, Request
from s3dit.cache import Cache
from s3dit.errors import RequestError
from s3dit.research import cache_calibration
from s3dit.research.cache_calibration import ENTRY, INPUT, VELOCITY, calibrate, fitted
from s3dit.research.observe import observe

STEPS = 6


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", dtype="fp32")


def test_numbers_are_those_of_whole_tensors(pipe, monkeypatch):
    """Sketches of 16,381 numbers are right to about 1 %; the polynomial is fitted to changes of input and velocity."""
    points = []
    monkeypatch.setattr(cache_calibration, "fitted", lambda *xy: points.append(xy) or fitted(*xy))
    request = Request(prompt="a red star", seed=3, num_inference_steps=STEPS, guidance_scale=2.0)
    found = calibrate(pipe, request)
    last = f"layers.{pipe.config.transformer.n_layers - 1}.output"
    with observe(pipe, [INPUT, ENTRY, last, VELOCITY]) as record:
        levels = [step.sigma for step in pipe.stream(request)]

    def at(site, step):
        tensors = record.select(site, step=step).items()
        return np.concatenate([tensor.double().numpy().ravel() for _, tensor in tensors])

    sizes = [np.linalg.norm(at(last, step) - at(ENTRY, step)) for step in range(1, STEPS + 1)]
    assert [t for t, _ in found["magnitudes"]] == [1.0 - sigma for sigma in levels]
    assert [size for _, size in found["magnitudes"]] == pytest.approx(np.array(sizes) / sizes[0], rel=0.02)
    x, y = (
        [np.linalg.norm(at(site, step) - at(site, step - 1)) / np.linalg.norm(at(site, step - 1))
         for step in range(2, STEPS + 1)]
        for site in (INPUT, VELOCITY)
    )  # fmt: skip
    (measured,) = points
    assert measured[0] == pytest.approx(x, rel=0.03) and measured[1] == pytest.approx(y, rel=0.03)
    assert (found["points"], found["steps"]) == (5, STEPS) and found["r2"] == pytest.approx(1.0, abs=1e-6)
    for method in ("magnitude", "modulation"):
        assert Cache(method).calibrated(found).missing is None


def test_the_fit_is_that_of_the_normal_equations():
    source = np.random.default_rng(0)
    x, y = source.uniform(0, 0.3, 60), source.uniform(0, 1, 60)
    coefficients, r2 = fitted(x, y, 3)
    powers = np.stack([x**3, x**2, x, np.ones_like(x)], axis=1)
    expected = np.linalg.solve(powers.T @ powers, powers.T @ y)
    # The condition number of the normal equations, 1e8, times an ulp.
    assert coefficients == pytest.approx(expected, rel=1e-6)
    left = ((y - powers @ expected) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert r2 == pytest.approx(1 - left, abs=1e-9) and 0 < r2 < 0.5


def test_what_is_refused(pipe):
    with pytest.raises(RequestError, match="4 points for a polynomial of order 4"):
        fitted([0.0] * 4, [0.0] * 4)
    with pytest.raises(RequestError, match="without cache"):
        calibrate(pipe, Request(prompt="a red star", cache="taylor:1"))
