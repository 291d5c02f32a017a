"""One pipeline used by several threads, and by its own callbacks; nothing that is kept grows."""

import itertools
import queue
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from s3dit import Pipeline
from s3dit.errors import BackendError, RequestError
from s3dit.kernels import dispatch
from s3dit.kernels.attention import attention
from s3dit.kernels.dispatch import backend, op, use_backend
from s3dit.runtime.encoders import PROMPTS_KEPT, REFERENCES_KEPT

KINDS = {
    "resident": {"residency": "resident"},
    "staged": {},
    "streamed": {"residency": "streamed"},
    "vram": {"vram": "10MiB"},
}
PROMPTS = ["a red star", "a blue ring", "a green circle", "a pink heart"]
# Sizes that take different plans of memory, guided and not.
REQUESTS = [
    {"prompt": prompt, "seed": seed, "height": height, "width": 64, "guidance_scale": float(seed % 2)}
    for seed, (prompt, height) in enumerate(itertools.product(PROMPTS, (64, 96)))
]
ONE = {"num_inference_steps": 2, "output_type": "tensor"}
SHORT = ONE | {"num_inference_steps": 1}


@pytest.fixture(params=KINDS)
def pipe(request):
    return Pipeline.load(device="cpu", dtype="fp32", **KINDS[request.param])


@pytest.fixture(scope="module")
def drawn():
    """What one thread draws, with each number of steps."""
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency="resident")
    return [[pipe(**request, **options) for request in REQUESTS] for options in (ONE, SHORT)]


@pytest.fixture(scope="module")
def alone(drawn):
    return drawn[0]


@pytest.fixture(scope="module")
def short(drawn):
    return drawn[1]


def same(a, b):
    pairs = zip((*a.latents, *a.images), (*b.latents, *b.images), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def run(*functions):
    """Each in a thread of its own, all started at once; what they raise is raised here."""
    failed, barrier = queue.SimpleQueue(), threading.Barrier(len(functions))

    def body(function):
        barrier.wait()
        try:
            function()
        except BaseException as error:
            failed.put(error)

    threads = [threading.Thread(target=body, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    if not failed.empty():
        raise failed.get()


@pytest.fixture
def often():
    """Threads change places at every chance."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.slow
def test_fifty_pictures_of_four_threads(pipe, short, often):
    jobs, done = queue.SimpleQueue(), []
    for i in range(50):
        jobs.put(i % len(REQUESTS))

    def draw():
        while True:
            try:
                i = jobs.get_nowait()
            except queue.Empty:
                return
            done.append(same(pipe(**REQUESTS[i], **SHORT), short[i]))

    run(*[draw] * 4)
    assert done == [True] * 50


@pytest.mark.sampled(1)
def test_streams_decodes_and_plans_between_one_another(pipe, alone, often):
    wrong = []

    def stream(i):
        for step in pipe.stream(**REQUESTS[i], **ONE):
            latents = step.latents
        wrong.extend(not torch.equal(a, b) for a, b in zip(latents, alone[i].latents, strict=True))

    def decode():
        for one in alone:
            wrong.append(not torch.equal(pipe.decode(one.latents)[0], one.images[0]))

    def others():
        for request in REQUESTS:
            pipe.plan(**request)
            pipe.encode([request["prompt"]])
            pipe.encode_images([torch.zeros(3, 64, 64)])

    run(lambda: stream(0), lambda: stream(1), decode, others)
    assert not any(wrong)


@pytest.mark.sampled(1)
def test_the_pipeline_is_free_between_two_steps(pipe, alone):
    """Of its own stream, for the same thread and for others; whatever it is used for, the stream's picture is right."""
    found = []
    for step in pipe.stream(**REQUESTS[0], **ONE):
        assert same(pipe(**REQUESTS[3], **ONE), alone[3])
        with pipe.parts.beside():
            pipe.decode(step.denoised)
        run(lambda: found.append(same(pipe(**REQUESTS[2], **ONE), alone[2])))
    assert found == [True, True] and torch.equal(step.latents[0], alone[0].latents[0])


@pytest.mark.sampled(1)
def test_a_callback_may_draw(pipe, alone):
    inside = []
    result = pipe(**REQUESTS[1], **ONE, on_step=lambda step: inside.append(pipe(**REQUESTS[2], **ONE)))
    assert same(result, alone[1]) and [same(one, alone[2]) for one in inside] == [True, True]


@pytest.mark.sampled(1)
def test_a_hook_may_not(pipe, alone):
    hook = pipe.parts["transformer"].layers[0].register_forward_hook(lambda *_: pipe(**REQUESTS[2]))
    with pytest.raises(RequestError, match="called out of its own computation"):
        pipe(**REQUESTS[1], **ONE)
    hook.remove()
    with attention.using(lambda *_: pipe.plan(**REQUESTS[0])), pytest.raises(RequestError, match="a second pipeline"):
        pipe(**REQUESTS[1], **ONE)
    assert same(pipe(**REQUESTS[1], **ONE), alone[1])


@pytest.mark.sampled(1)
def test_a_stream_may_be_taken_up_and_closed_by_any_thread(pipe, alone):
    steps, found = pipe.stream(**REQUESTS[0], **ONE), []
    for _ in range(2):
        run(lambda: found.append(next(steps)))
    assert torch.equal(found[-1].latents[0], alone[0].latents[0])
    assert next(steps, None) is None
    abandoned, closed = pipe.stream(**REQUESTS[0], **ONE), pipe.stream(**REQUESTS[1], **ONE)
    run(lambda: next(abandoned), lambda: next(closed))
    run(closed.close)
    # One that is only left alone stops nobody.
    run(lambda: found.append(same(pipe(**REQUESTS[2], **ONE), alone[2])))
    assert found[-1] is True
    abandoned.close()


@pytest.mark.slow
def test_adapters_wait_for_a_picture(pipe, alone, tmp_path, often):
    save_file({"layers.2.ffn_norm1.w_norm": torch.full((192,), 0.5)}, tmp_path / "norms.safetensors")
    pipe.lora.attach(tmp_path / "norms.safetensors")
    adapted, found = pipe(**REQUESTS[0], **ONE), []
    pipe.lora.detach()

    def change():
        for _ in range(3):
            pipe.lora.attach(tmp_path / "norms.safetensors", name="a")
            pipe.lora.scale("a", 0.5)
            pipe.lora.scale("a", 1.0)
            pipe.lora.detach("a")

    halves = pipe.lora.attach(tmp_path / "norms.safetensors", 0.5) and pipe(**REQUESTS[0], **ONE)
    pipe.lora.detach()

    def draw():
        for _ in range(3):
            found.append(pipe(**REQUESTS[0], **ONE))

    run(change, draw, draw)
    assert all(any(same(one, other) for other in (alone[0], adapted, halves)) for one in found)
    assert same(pipe(**REQUESTS[0], **ONE), alone[0])


@pytest.mark.sampled(1)
def test_an_error_leaves_the_pipeline_to_others(pipe, alone):
    def stop(step):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipe(**REQUESTS[0], **ONE, on_step=stop)
    with pytest.raises(RequestError):
        pipe(prompt="a", num_inference_steps=0)
    found = []
    run(lambda: found.append(same(pipe(**REQUESTS[0], **ONE), alone[0])))
    assert found == [True]


@pytest.mark.slow
def test_a_backend_belongs_to_its_pipeline():
    """Two of them in two threads, and Ops called by hand beside them."""
    seen = {"reference": set(), None: set()}

    @op
    def probe(x):
        return x

    def draw(name):
        pipe = Pipeline.load(device="cpu", dtype="fp32", backend=name)
        pipe.parts["transformer"].layers[0].register_forward_hook(lambda *_: seen[name].add(backend()))
        for request in REQUESTS[:3]:
            pipe(**request, **SHORT)

    run(lambda: draw("reference"), lambda: draw(None))
    assert seen == {"reference": {"reference"}, None: {"auto"}} and backend() == "auto"
    with use_backend("torch"):
        run(lambda: seen[None].add(backend()))
        assert backend() == "torch"
    assert seen[None] == {"auto"}
    with pytest.raises(BackendError, match="backend is 'fast'"):
        Pipeline.load(backend="fast")


def test_replacements_of_two_threads_do_not_stay():
    @op
    def probe(x):
        return "reference"

    x, entered, left = torch.ones(1), threading.Event(), threading.Event()

    def first():
        with probe.using(lambda x: "first"):
            entered.set()
            assert left.wait(10)

    def second():
        assert entered.wait(10)
        with probe.using(lambda x: "second"):
            left.set()
            thread.join()
            assert probe(x) == "second"

    before = dispatch._overrides
    thread = threading.Thread(target=first)
    thread.start()
    second()
    assert probe(x) == "reference" and dispatch._overrides == before


@pytest.fixture
def endless(monkeypatch):
    """Many prompts, sizes and residencies' worth of pictures, quickly: one step, and small limits on what is kept."""
    for name, most in (("PROMPTS_KEPT", 4), ("REFERENCES_KEPT", 4)):
        monkeypatch.setattr(f"s3dit.runtime.encoders.{name}", most)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(1)
def test_what_is_kept_is_bounded(kind, endless):
    pipe = Pipeline.load(device="cpu", dtype="fp32", **KINDS[kind])

    def sizes():
        parts = pipe.parts
        modules = [parts.component(name).module for name in parts.checkpoints]
        hooks = [
            len(one._forward_hooks) + len(one._forward_pre_hooks) for module in modules for one in module.modules()
        ]
        return (
            len(pipe.encoders._prompts), len(pipe.encoders._references), len(parts.controlnets), len(parts.adapters),
            len(parts._components), sum(hooks), [len(vars(module)) for module in modules],
        )  # fmt: skip

    for i in range(12):
        pipe(prompt=f"a red star {i}", seed=i, height=64 + 16 * (i % 2), num_inference_steps=1, output_type="latent")
        if i == 9:
            before = sizes()
    assert sizes() == before and before[0] == 4
    assert (PROMPTS_KEPT, REFERENCES_KEPT) == (256, 64)


def test_a_batch_that_is_larger_than_what_is_kept(endless):
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency="resident")
    prompts = [f"a red star {i}" for i in range(10)]
    options = {"seed": 0, "height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    together = pipe(prompt=prompts, **options).latents
    last = pipe(prompt=prompts[-1], **options | {"seed": 9}).latents[0]
    # 1e-5: products of other heights sum in another order.
    assert (together[-1] - last).norm() < 1e-5 * last.norm()
    assert len(pipe.encoders._prompts) == 4


def test_the_record_of_a_picture_is_made_before_others_have_the_pipeline(pipe, monkeypatch):
    """Metadata name the adapters that drew, so they are written while nobody else may attach one."""
    records, alone = Pipeline.records, []

    def watched(self, plan):
        taken = []
        other = threading.Thread(target=lambda: taken.append(self.parts.lock.acquire(timeout=0.05)))
        other.start()
        other.join()
        alone.append(not taken[0])
        return records(self, plan)

    monkeypatch.setattr(Pipeline, "records", watched)
    pipe(**REQUESTS[0], **ONE)
    assert alone == [True]
