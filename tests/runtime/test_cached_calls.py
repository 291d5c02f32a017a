"""Calls that a cache spares: the whole run where none is, each picture by itself, what goes with what."""

from itertools import cycle

import pytest
import torch

from s3dit import Pipeline, Region
from s3dit.cache import Cache
from s3dit.errors import RequestError
from s3dit.kernels.attention import attention
from s3dit.research.edits import skipped
from s3dit.runtime.graphs import compile_blocks
from s3dit.sampling.caches import FirstBlock

NUMBERS = {"polynomial": [1.0, 0.0], "magnitudes": [[0.0, 1.0], [0.5, 0.9], [1.0, 0.6]]}
METHODS = ("first-block", "modulation", "magnitude", "taylor")
# So that about half of the calls are spared.
SPARING = [Cache("first-block", 0.1), Cache("modulation", 0.25), Cache("magnitude", 0.05), Cache("taylor", 1)]
PROMPTS = ["a red star above a blue ring", "a green square"]
FIELDS = {"num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", dtype="fp32", residency="resident")


@pytest.fixture(scope="module")
def whole(pipe):
    return pipe(PROMPTS, seed=[3, 9], **FIELDS)


def reused(result):
    return [record["engine"]["reused"] for record in result.metadata]


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled(1)
def test_a_rule_that_never_spares_draws_the_whole_run(pipe, whole, method):
    """To the bit: so the way through the blocks in two pieces is the way in one."""
    cache = Cache(method, 0, first=1, last=0).calibrated(NUMBERS)
    with pytest.warns(UserWarning, match=f"cache {method}:0.* has no effect"):
        drawn = pipe(PROMPTS, seed=[3, 9], cache=cache, **FIELDS)
    assert reused(drawn) == [0, 0] and all(map(torch.equal, drawn.latents, whole.latents))


@pytest.mark.parametrize("cache", SPARING, ids=str)
@pytest.mark.sampled(1)
def test_batch_equals_single(pipe, whole, cache):
    cache = cache.calibrated(NUMBERS)
    both = pipe(PROMPTS, seed=[3, 9], cache=cache, **FIELDS)
    for i, seed in enumerate((3, 9)):
        alone = pipe(PROMPTS[i], seed=seed, cache=cache, **FIELDS)
        assert reused(alone) == [reused(both)[i]] and 1 <= reused(both)[i] <= 7
        # Products of other numbers of rows; a spared call is 1000 times as far from the whole run.
        assert relative(both.latents[i], alone.latents[0]) < 2e-5
        assert relative(both.latents[i], whole.latents[i]) > 1e-3


def test_pictures_decide_by_themselves(pipe, whole, monkeypatch):
    """Where one of two is spared in every pass that may be, the other is that of the whole run."""
    turns, seen = cycle([True, False]), []
    monkeypatch.setattr(FirstBlock, "spares", lambda self, i, change: next(turns))
    cache = Cache("first-block", 0.1, first=2)
    drawn = pipe(PROMPTS, seed=[3, 9], cache=cache, **FIELDS)
    assert reused(drawn) == [7, 0]
    assert relative(drawn.latents[1], whole.latents[1]) < 2e-5 < relative(drawn.latents[0], whole.latents[0])

    def looking(q, k, v, q_span, k_span):
        seen.append(len(q_span.lengths))
        return attention.reference(q, k, v, q_span, k_span)

    with attention.using(looking), pytest.raises(RequestError, match="spares some pictures of a pass whose insides"):
        pipe(PROMPTS, seed=[3, 9], cache=cache, **FIELDS)
    seen.clear()
    turns = cycle([True])
    with attention.using(looking):
        pipe(PROMPTS[0], seed=3, cache=cache, **FIELDS)
    # Of both branches: once the caption, in every pass the image and the first block, in three of ten the others.
    assert seen == [2] * (1 + 10 * 2 + 3 * (pipe.config.transformer.n_layers - 1))


def test_steps_that_are_known_before_run_nothing_of_the_model(pipe):
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        drawn = pipe(PROMPTS[0], seed=3, cache="taylor:2:first=3", **FIELDS)
    finally:
        handle.remove()
    # Of ten: three at first, then each third, and the last.
    assert reused(drawn) == [4] and len(calls) == 6
    (note,) = (note for note in pipe.plan(PROMPTS[0], cache="taylor:2:first=3", **FIELDS).notes if "cache" in note)
    assert "6 of 10 model calls are computed" in note


def test_a_prediction_stands_where_a_call_was_spared(pipe):
    """The velocity of a spared step is the line through the two computed ones before it, by branch."""
    steps = list(pipe.stream(PROMPTS[0], seed=3, cache="taylor:1:first=3", num_inference_steps=8))
    assert [step.reused for step in steps] == [(0,), (0,), (0,), (1,), (1,), (2,), (2,), (2,)]
    a, b, spared = steps[1], steps[2], steps[3]
    slope = (b.velocity.double() - a.velocity.double()) / (a.sigma - b.sigma)
    expected = b.velocity.double() + slope * (b.sigma - spared.sigma)
    # Two roundings to fp32, and times that were rounded once.
    assert relative(spared.velocity, expected) < 1e-5


def test_guidance_that_ends_begins_anew(pipe):
    """What was remembered of two branches is not taken for one."""
    drawn = pipe(PROMPTS[0], seed=3, cache="taylor:4:first=2", cfg_truncation=0.3, **FIELDS)
    assert 2 < reused(drawn)[0] < 8


@pytest.mark.parametrize("cache", SPARING, ids=str)
@pytest.mark.slow
def test_streamed_blocks(pipe, cache):
    """The same bits, though blocks follow one another in another order."""
    streamed = Pipeline.load(device="cpu", dtype="fp32", residency="streamed")
    both = [each(PROMPTS, seed=[3, 9], cache=cache.calibrated(NUMBERS), **FIELDS) for each in (pipe, streamed)]
    assert reused(both[0]) == reused(both[1]) and all(map(torch.equal, both[0].latents, both[1].latents))


@pytest.mark.slow
def test_regions(pipe):
    """Copies of a picture for its regions decide with it, and pictures beside it do not count."""
    halves = [Region((0, 0, 64, 128), "a red star at the left"), Region((64, 0, 64, 128), "a blue ring at the right")]
    fields, cache = FIELDS | {"base_weight": 0.2}, "first-block:0.1"
    both = pipe(PROMPTS, seed=[3, 9], region=[halves, None], cache=cache, **fields)
    alone = pipe(PROMPTS[0], seed=3, region=halves, cache=cache, **fields)
    assert reused(alone) == reused(both)[:1] and reused(alone)[0] > 0
    assert relative(both.latents[0], alone.latents[0]) < 2e-5


@pytest.mark.parametrize("cache", SPARING[:2], ids=str)
@pytest.mark.slow
def test_compiled_blocks(pipe, cache, monkeypatch):
    monkeypatch.setattr("s3dit.runtime.components.compile_blocks", lambda model: compile_blocks(model, "eager"))
    compiled, cache = Pipeline.load(device="cpu", dtype="fp32", compile=True), cache.calibrated(NUMBERS)
    both = [each(PROMPTS[0], seed=3, cache=cache, **FIELDS) for each in (pipe, compiled)]
    assert reused(both[0]) == reused(both[1]) and relative(both[1].latents[0], both[0].latents[0]) < 2e-5


@pytest.mark.slow
def test_a_second_pass_and_edits(pipe):
    drawn = pipe(PROMPTS[0], seed=3, upscale=1.5, upscale_strength=0.8, cache="taylor:1:first=2", **FIELDS)
    once = pipe(PROMPTS[0], seed=3, cache="taylor:1:first=2", **FIELDS)
    assert reused(drawn)[0] > reused(once)[0] > 0
    with skipped(pipe, [2]):
        edited = pipe(PROMPTS[0], seed=3, cache="first-block:0.1", **FIELDS)
    assert reused(edited)[0] > 0 and relative(edited.latents[0], once.latents[0]) > 0.01


def test_a_model_brings_its_calibration():
    plan = Pipeline.load("embedded-base", device="cpu").plan(PROMPTS[0], cache="magnitude")
    assert plan.request.cache.missing is None and any("of 28 model calls are computed" in note for note in plan.notes)


def test_what_does_not_go_together(pipe):
    for fields, message in (
        ({"cache": "taylor:1", "solver": "heun"}, "solver heun calls the model twice"),
        ({"cache": "magnitude"}, "needs numbers that were calibrated for this model"),
    ):
        with pytest.raises(RequestError, match=message):
            pipe.plan(PROMPTS[0], **fields)
    with pytest.raises(RequestError, match="both cache and numerics exact"):
        Pipeline.load(device="cpu", numerics="exact").plan(PROMPTS[0], cache="taylor:1")
