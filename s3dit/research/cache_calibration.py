"""Numbers that caches need of a model, from the step atlas of a few pictures (`s3dit calibrate-cache`).

    calibration = calibrate(pipe, Request(prompt=["a red fox in the snow", "a blue ring"], seed=7))
    pipe("a blue ring", cache=Cache("magnitude", 0.1).calibrated(calibration))

For `modulation` a polynomial that tells, from how far the first block's modulated input is from that of the call
before, how far the velocity is: fitted by least squares. For `magnitude` the size of what the main blocks add, by t,
relative to the first call. Both over all pictures and branches, of the steps, guidance and schedule that are given;
they hold for others as far as the model's course is the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from s3dit.errors import RequestError
from s3dit.loaded_model import LoadedModel
from s3dit.request import Request
from s3dit.research.atlases import StepAtlas, step_atlas
from s3dit.sampling.step import Step

# TeaCache's.
DEGREE = 4
BRANCHES = ("positive", "negative")
# Sites: what the first block's attention reads, what comes into it, and the answer.
INPUT, ENTRY, VELOCITY = "layers.0.attention.norm", "layers.0.input", "velocity"


def calibrate(pipe: LoadedModel, request: Request, on_step: Callable[[Step], None] | None = None) -> dict[str, Any]:
    """Draw a request's pictures, one after another, and fit what `cache.Cache` takes in of a calibration.

    on_step: sees every step -> polynomial, magnitudes; r2: of the polynomial, over `points` changes · steps: of a
    picture. Raises RequestError.
    """
    if request.cache is not None or request.upscale is not None:
        raise RequestError("a calibration takes pictures in one pass without cache; leave cache and upscale out")
    assert callable(pipe)
    inputs, velocities, sizes, times = list[float](), list[float](), [], list[float]()

    def seen(step: Step) -> None:
        times.append(1.0 - step.sigma)
        if on_step is not None:
            on_step(step)

    texts = [text for text in request.prompts for _ in range(request.num_images_per_prompt)]
    for prompt, seed in zip(texts, request.seeds() or range(len(texts)), strict=True):
        times.clear()
        with step_atlas(pipe, [INPUT, ENTRY, _exit(pipe), VELOCITY]) as atlas:
            each = replace(request, prompt=prompt, seed=seed, num_images_per_prompt=1, output_type="latent")
            pipe(each, on_step=seen)
        inputs += _changes(atlas, INPUT)
        velocities += _changes(atlas, VELOCITY)
        sizes.append([_norm(_added(atlas, _exit(pipe), step)) for step in atlas.steps])
    polynomial, r2 = fitted(inputs, velocities)
    magnitudes = np.mean([np.array(row) / row[0] for row in sizes], axis=0)
    pairs = [[t, float(size)] for t, size in zip(times, magnitudes, strict=True)]
    return {"polynomial": polynomial, "magnitudes": pairs, "r2": r2, "points": len(inputs), "steps": len(times)}


def fitted(x: Sequence[float], y: Sequence[float], degree: int = DEGREE) -> tuple[list[float], float]:
    """Fit a polynomial to points by least squares -> coefficients, the highest power first, and R²."""
    if len(x) <= degree:
        raise RequestError(f"{len(x)} points for a polynomial of order {degree}; needed more; draw with more steps")
    a, b = np.array(x), np.array(y)
    coefficients = np.polyfit(a, b, degree)
    left = np.square(b - np.polyval(coefficients, a)).sum()
    return [float(each) for each in coefficients], float(1 - left / np.square(b - b.mean()).sum())


def _at(atlas: StepAtlas, site: str, step: int) -> list[Any]:
    """The sketches of a site at a step, of every branch that there is, fp64 arrays."""
    return [tensor.double().numpy() for _, tensor in sorted(atlas.record.select(site, step=step, call=0).items(),
            key=lambda each: BRANCHES.index(each[0].branch))]  # fmt: skip


def _exit(pipe: LoadedModel) -> str:
    """The site where the stream leaves the main blocks."""
    return f"layers.{pipe.config.transformer.n_layers - 1}.output"


def _added(atlas: StepAtlas, leaving: str, step: int) -> list[Any]:
    """What the main blocks add to the stream, by branch."""
    return [after - before for after, before in zip(_at(atlas, leaving, step), _at(atlas, ENTRY, step), strict=True)]


def _changes(atlas: StepAtlas, site: str) -> list[float]:
    """How far a picture's tensors are from those of the step before, all branches together, from the second step on."""
    every = [_at(atlas, site, step) for step in atlas.steps]
    return [_norm([b - a for a, b in zip(before, now, strict=False)]) / _norm(before)
            for before, now in pairwise(every) if len(before) == len(now)]  # fmt: skip


def _norm(branches: Sequence[Any]) -> float:
    """The norm of a picture's tensors, all branches together."""
    return float(np.sqrt(sum(np.square(each).sum() for each in branches)))
