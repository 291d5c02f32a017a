"""The engine: pictures in company are those drawn alone; who comes when; what fails fails alone; how it ends."""

import gc
import random
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from s3dit import Pipeline, Region, Request
from s3dit.errors import BackendError, RequestError
from s3dit.model.transformer import Transformer
from s3dit.serve import engine as rooms
from s3dit.serve.engine import Engine
from s3dit.serve.job import (
    Cancelled,
    Done,
    Failed,
    Partial,
    Queued,
    QueueFull,
    Started,
    StepDone,
    Stopping,
    TimedOut,
)

SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "tensor"}
# Noise that leads beyond what fp32 holds.
HUGE = {"latents": torch.full((1, 16, 8, 8), 1e38)}
# In fp32 a product of more rows may add up in another order; the embedded model's steps let that grow tenfold.
BOUND = 1e-5


def request(seed=0, **changes):
    return Request(**{"prompt": "a red star", "seed": seed, "guidance_scale": 0.0, **SMALL, **changes})


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load("embedded-base", device="cpu", dtype="fp32", residency="resident")


@pytest.fixture
def engine(pipe):
    running = Engine(pipe)
    yield running
    running.stop()


SOLVERS = ["euler", "heun", "dpmpp_2m", "res_2s", "unipc", "euler_ancestral", "dpmpp_2m_sde"]


def anything(draw):
    """The fields of a request, as `draw` (random.Random) has them."""
    solver = draw.choice(SOLVERS)
    cache = {} if solver in ("heun", "res_2s") else {"cache": "first-block"}
    extra = draw.choice([
        {}, {"num_images_per_prompt": 2}, {"upscale": 1.5}, {"skip_layers": "2:0.5"}, {"variation": 0.2}, cache,
        {"negative_prompt": "gray"}, {"shift": 2.0, "schedule": "beta"}, {"image": torch.zeros(3, 64, 64)},
        {"region": Region((0, 0, 24, 48), "a blue ring"), "base_weight": 0.3},
    ])  # fmt: skip
    sizes = {"height": draw.choice([64, 96]), "width": draw.choice([48, 64, 80])}
    return {
        "prompt": draw.choice(["a red star", "a blue ring above a green circle on white", "x" * 120]),
        "num_inference_steps": draw.choice([2, 3]), "solver": solver,
        "guidance_scale": draw.choice([0.0, 1.5, [2.0, 0.5]]),
        **({} if "image" in extra else sizes), **extra,
    }  # fmt: skip


def relative(result, other):
    pairs = zip((*result.latents, *result.images), (*other.latents, *other.images), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def test_random_arrivals(pipe, engine):
    """Anything beside anything, arriving at any time: pictures, latents and metadata are those of one alone."""
    draw = random.Random(5)
    wanted = [request(i, **anything(draw)) for i in range(7)]
    jobs = []
    for each in wanted:
        jobs.append(engine.submit(each, partial_images=draw.randrange(3)))
        time.sleep(draw.choice([0, 0, 0.05, 0.2]))
    got = [job.result(100) for job in jobs]
    sizes = engine.stats().batch_sizes
    assert max(sizes) > 2, sizes
    engine.stop()
    for each, result in zip(wanted, got, strict=True):
        alone = pipe(each)
        assert relative(result, alone) <= BOUND, each
        assert result.metadata == alone.metadata


def test_exact_numerics_take_passes_of_their_own():
    exact = Pipeline.load("embedded", device="cpu", dtype="fp32", residency="resident", numerics="exact")
    wanted = [request(i, height=64 + 32 * (i % 2)) for i in range(4)]
    engine = Engine(exact)
    got = [job.result(60) for job in [engine.submit(each) for each in wanted]]
    engine.stop()
    assert set(engine.stats().batch_sizes) == {1} and engine.stats().passes == 8
    assert all(relative(result, exact(each)) == 0 for each, result in zip(wanted, got, strict=True))


@pytest.mark.parametrize("kind", [{}, {"vram": "12MiB"}, {"vram": "2GiB"}, {"dtype": "bf16"}])
@pytest.mark.sampled(1)
def test_other_residencies(kind):
    """Parts that take turns draw one request after another; a budget that holds all is as good as resident.

    In bf16 a sum in another order is rounded to 8 bits, as it is between any two ways to compute it.
    """
    other = Pipeline.load("embedded", **{"device": "cpu", "dtype": "fp32", **kind})
    wanted = [request(i, prompt=f"a star {i}", guidance_scale=float(i)) for i in range(3)]
    engine = Engine(other)
    got = [job.result(60) for job in [engine.submit(each, partial_images=1) for each in wanted]]
    engine.stop()
    assert engine.resident == (kind.get("vram") == "2GiB")
    bound = 3e-2 if "dtype" in kind else BOUND
    assert all(relative(result, other(each)) <= bound for each, result in zip(wanted, got, strict=True))


def adapter(folder, name, seed, vectors):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (4, 192), "B": (192, 4)}
    held = {
        f"transformer.layers.{layer}.attention.to_q.lora_{leaf}.weight": torch.randn(shape, generator=generator) / 5
        for layer in (0, 3)
        for leaf, shape in shapes.items()
    }
    if vectors:
        held["layers.2.ffn_norm1.w_norm"] = torch.full((192,), 0.2)
    save_file(held, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.sampled(1)
def test_adapters_at_other_strengths(tmp_path, vectors):
    """Each request has its own strengths; afterwards all are what they were.

    Adapters that change norms are computed in passes of equal strengths, others of any.
    """
    own = Pipeline.load("embedded", device="cpu", dtype="fp32", residency="resident")
    own.lora.attach(adapter(tmp_path, "style", 1, vectors), 0.5)
    own.lora.attach(adapter(tmp_path, "late", 2, vectors), -1.0, steps=(0.5, 1.0))
    wanted = [None, {"style": 1.0}, {}, {"style": -0.3, "late": 0.7}, {"late": 1.0}, {"style": 1.0}]
    before = own(request())
    engine = Engine(own)
    jobs = [engine.submit(request(i, height=64 + 16 * i), adapters=each) for i, each in enumerate(wanted)]
    got = [job.result(60) for job in jobs]
    sizes = engine.stats().batch_sizes
    assert max(sizes) <= 2 if vectors else max(sizes) > 2, sizes
    for wrong, words in [({"other": 1}, "no adapter 'other'"), ({"style": float("nan")}, "scale of an adapter")]:
        with pytest.raises(RequestError, match=words):
            engine.submit(request(), adapters=wrong)
    engine.stop()
    assert relative(own(request()), before) == 0
    for i, (each, result) in enumerate(zip(wanted, got, strict=True)):
        for name, scale in {"style": 0.5, "late": -1.0}.items():
            own.lora.scale(name, scale if each is None else each.get(name, 0.0))
        assert relative(result, own(request(i, height=64 + 16 * i))) <= BOUND
        strengths = [found["scale"] for found in result.metadata[0].get("adapters", [])]
        assert strengths == (
            [0.5, -1.0] if each is None else [each[name] for name in ("style", "late") if name in each]
        )


def test_events_come_in_order(engine):
    job = engine.submit(request(num_inference_steps=4), partial_images=2)
    events = list(job.events())
    kinds = [type(event) for event in events]
    assert kinds[:2] == [Queued, Started] and kinds[-1] is Done and kinds.count(Partial) == 2
    assert [event.i for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4]
    assert [event.index for event in events if isinstance(event, Partial)] == [0, 1]
    (shown,) = next(event for event in events if isinstance(event, Partial)).images
    assert shown.shape == (3, 64, 64)
    assert events[-1].seconds["queue"] >= 0 and {"transformer", "vae decode"} <= {*events[-1].seconds}


def test_events_by_a_callback_and_one_that_fails(engine):
    seen = []

    def fails(event):
        seen.append(type(event))
        if isinstance(event, StepDone):
            raise ConnectionError("gone")

    job = engine.submit(request(num_inference_steps=9), on_event=fails)
    beside = engine.submit(request(1))
    with pytest.raises(Cancelled):
        job.result(60)
    assert seen == [Queued, Started, StepDone, Failed]
    assert beside.result(60).images


def test_wrong_requests_are_refused_at_once(engine):
    for wrong, words in [({"height": 72}, "height"), ({"reference": torch.zeros(3, 64, 64)}, "reference")]:
        with pytest.raises(RequestError, match=words):
            engine.submit(request(**wrong))
    for options in (
        {"adapters": [("style", 1)]},
        {"on_event": 5},
        {"partial_images": -1},
        {"timeout": 0},
        {"timeout": "x"},
        {"partial_images": 1.5},
    ):
        with pytest.raises(RequestError):
            engine.submit(request(), **options)
    assert engine.stats().queued == engine.stats().running == 0


@pytest.fixture
def gate(monkeypatch):
    """Holds every pass of the model until it is set; the number of the pass is counted."""
    gate, forward = threading.Event(), Transformer.forward
    gate.rows, gate.error = [], None

    def held(self, x, t, context, *rest):
        if type(self) is Transformer:
            gate.wait(60)
            gate.rows.append(len(context.joint.spans.lengths))
            if gate.error and (error := gate.error(x, context)):
                raise error
        return forward(self, x, t, context, *rest)

    monkeypatch.setattr(Transformer, "forward", held)
    yield gate
    gate.set()


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_cancels_and_timeouts(engine, gate):
    """Before it began, between two steps, and by the clock; who is beside is not concerned."""
    beside = engine.submit(request(), timeout=60)
    going = engine.submit(request(1, num_inference_steps=90))
    late = engine.submit(request(2, num_inference_steps=90), timeout=1.5)
    until(lambda: engine.stats().running == 3)
    time.sleep(1.6)
    gate.set()
    until(lambda: engine.stats().steps > 5)
    going.cancel()
    for job, error in ((going, Cancelled), (late, TimedOut)):
        with pytest.raises(error):
            job.result(60)
    assert beside.result(60).images
    stats = engine.stats()
    assert (stats.cancelled, stats.timed_out, stats.done, stats.running) == (1, 1, 1, 0)
    going.cancel()


def test_the_queue_has_an_end(pipe, gate, monkeypatch):
    monkeypatch.setattr(rooms, "MOST_RUNNING", 1)
    engine = Engine(pipe, queue_limit=2)
    running = engine.submit(request())
    until(lambda: engine.stats().running == 1)
    first, second = engine.submit(request(1)), engine.submit(request(2))
    with pytest.raises(QueueFull) as full:
        engine.submit(request(3))
    assert full.value.retry_after >= 1
    first.cancel()
    with pytest.raises(Cancelled):
        first.result(10)
    third = engine.submit(request(3))
    gate.set()
    assert all(job.result(60).images for job in (running, second, third))
    assert engine.stats().refused == 1
    engine.stop()


def test_a_large_request_is_overtaken_so_often_only(pipe, gate, monkeypatch):
    monkeypatch.setattr(rooms, "OVERTAKES", 2)
    engine, ended = Engine(pipe, max_batch_tokens=3 * 64), []

    def submit(name, **changes):
        return engine.submit(request(**changes), on_event=lambda e: isinstance(e, Done) and ended.append(name))

    gate.set()
    jobs = [submit("first", num_inference_steps=80), submit("large", height=256, width=256)]
    # Both are prepared: only what waits for its turn can be overtaken.
    until(lambda: len(engine._sampling) == len(engine._ready) == 1)
    # The first waits for them, however long a busy machine takes to submit.
    gate.clear()
    jobs += [submit(i, seed=i) for i in range(5)]
    gate.set()
    for job in jobs:
        job.result(60)
    engine.stop()
    # The large one waits for the first, and for two of the small ones that fit beside it.
    assert ended.index("large") == 3 and ended[2] == "first", ended


def test_an_error_ends_its_own_job_only(engine, gate):
    """A pass that fails is computed in halves, until it is known whose call it is; so is one without memory."""
    jobs = [engine.submit(request(i, num_inference_steps=3, width=64 + 16 * (i == 2))) for i in range(5)]
    until(lambda: engine.stats().running == 5)

    def error(x, context):
        if len(context.joint.spans.lengths) > 2:
            return torch.OutOfMemoryError("CUDA out of memory")
        return ValueError("a bad call") if len(x) % 16 else None

    gate.error = error
    gate.set()
    with pytest.raises(ValueError, match="a bad call"):
        jobs[2].result(60)
    assert all(jobs[i].result(60).images for i in (0, 1, 3, 4))
    assert engine.alive and engine.stats().failed == 1 and max(engine.stats().batch_sizes) == 2


def test_one_alone_without_memory_says_so(engine, gate):
    gate.error = lambda x, context: torch.OutOfMemoryError("CUDA out of memory")
    gate.set()
    with pytest.raises(BackendError, match="out of memory.*draw fewer or smaller"):
        engine.submit(request()).result(60)


def test_numbers_that_are_not_finite_are_of_one_job(engine):
    """What is named is the job's own; its neighbors' pictures are what they are alone."""
    job = engine.submit(request(1, **HUGE))
    beside = [engine.submit(request(i)) for i in (2, 3)]
    with pytest.raises(BackendError, match="velocity of step 1 is not finite"):
        job.result(60)
    got = [each.result(60) for each in beside]
    assert all(relative(result, engine.pipe(request(i))) <= BOUND for i, result in zip((2, 3), got, strict=True))


def test_a_stop_finishes_what_runs_and_hands_back_what_waits(pipe, gate, monkeypatch):
    monkeypatch.setattr(rooms, "MOST_RUNNING", 2)
    engine = Engine(pipe)
    running = [engine.submit(request(i)) for i in range(2)]
    until(lambda: engine.stats().running == 2)
    waiting = engine.submit(request(3))
    stopping = threading.Thread(target=engine.stop, args=(60,))
    stopping.start()
    with pytest.raises(Stopping):
        waiting.result(60)
    with pytest.raises(Stopping):
        engine.submit(request())
    gate.set()
    stopping.join(60)
    assert all(job.result(1).images for job in running) and not engine.alive
    engine.stop()


def test_a_stop_between_two_rounds(pipe):
    """Its thread, which has just seen that it goes on, does not wait for what nobody tells it any more."""
    engine = Engine(pipe)
    engine.stop()
    late = threading.Thread(target=engine._admit, daemon=True)
    late.start()
    late.join(5)
    waits = late.is_alive()
    with engine._changed:
        engine._changed.notify_all()
    assert not waits


def test_a_stop_without_grace(pipe):
    before = {*threading.enumerate()}
    engine = Engine(pipe)
    job = engine.submit(request(num_inference_steps=500))
    until(lambda: engine.stats().steps)
    engine.stop()
    with pytest.raises(Stopping):
        job.result(1)
    assert {*threading.enumerate()} <= before


LEAVES = """
from s3dit import Pipeline, Request
from s3dit.serve.engine import Engine
engine = Engine(Pipeline.load("embedded", device="cpu", dtype="fp32", residency="resident"))
job = engine.submit(Request(prompt="a", height=64, width=64, num_inference_steps=900))
next(event for event in job.events() if type(event).__name__ == "StepDone")
"""


@pytest.mark.slow
def test_a_program_may_end_without_a_stop():
    """Threads that are in the middle of a pass when the interpreter goes would abort the process."""
    ended = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_dead_engine_says_so(pipe, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine = Engine(pipe)
    monkeypatch.setattr(engine._passes, "compute", lambda tasks: 1 / 0)
    with pytest.raises(BackendError, match="thread died"):
        engine.submit(request()).result(60)
    assert not engine.alive
    with pytest.raises(Stopping):
        engine.submit(request())


@pytest.mark.slow
def test_nothing_stays_of_what_is_over(engine):
    """No tensor of a request outlives its result: neither of those that are drawn nor of those that fail."""

    def some():
        jobs = [engine.submit(request(i, guidance_scale=1.0), partial_images=1) for i in range(4)]
        jobs[0].cancel()
        jobs += [engine.submit(request(**HUGE))]
        for job in jobs:
            for _ in job.events():
                pass

    def held():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    some()
    until(lambda: not any("s3dit-job" in thread.name for thread in threading.enumerate()))
    before = held()
    some()
    some()
    assert held() <= before + 8
