"""Recorded passes, with a recorder that calls the function again where CUDA would replay: buffers, keys, eviction."""

import gc
import weakref

import pytest
import torch
from torch import nn

from s3dit import Pipeline
from s3dit.errors import BackendError
from s3dit.kernels.attention import Spans
from s3dit.model.layout import text_to_image
from s3dit.runtime.block_streaming import stream
from s3dit.runtime.graphs import Replay, flatten, rebuild


class Recorder:
    """What CUDA does, slowly: the same reads and writes of the same buffers, nothing else."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        output = run()
        # A recording runs nothing by itself: what it left in its output must not be trusted before a replay.
        output.fill_(torch.nan)
        return lambda: output.copy_(run()), output


@pytest.fixture(scope="module")
def transformer():
    return Pipeline.load(device="cpu", dtype="fp32").parts["transformer"]


@pytest.fixture
def replay(transformer):
    return Replay(transformer, Recorder(), keep=3)


def arguments(transformer, grids, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(sum(lengths), transformer.config.cap_feat_dim, generator=g)
    x, t = torch.randn(sum(r * c for r, c in grids), 64, generator=g), torch.rand(1, generator=g)
    with torch.inference_mode():
        return x, t, transformer.context(text_to_image(grids, lengths), text)


def check(replay, transformer, args):
    with torch.inference_mode():
        assert torch.equal(replay(*args), transformer(*args))


SIZES = [([(4, 4)], [5]), ([(4, 6)], [5]), ([(4, 4)] * 2, [5, 5]), ([(4, 4), (2, 4)], [5, 40])]


def test_every_size_and_batch_then_the_first_again(replay, transformer):
    cases = [arguments(transformer, *case, seed=i) for i, case in enumerate(SIZES[:3])]
    for args in (*cases, *cases[::-1]):
        check(replay, transformer, args)
    assert replay._record.recorded == 3


def test_prompts_and_shapes_of_one_length_share_a_recording(replay, transformer):
    cases = [([(4, 6)], [5]), ([(6, 4)], [31]), ([(2, 12)], [17]), ([(4, 6)], [5])]
    for seed, case in enumerate(cases):
        check(replay, transformer, arguments(transformer, *case, seed=seed))
    assert replay._record.recorded == 1
    check(replay, transformer, arguments(transformer, [(4, 6)], [33]))
    assert replay._record.recorded == 2


def test_the_oldest_recording_goes_first(replay, transformer):
    cases = [arguments(transformer, *case) for case in SIZES]
    for i in (0, 1, 2, 0, 3):
        check(replay, transformer, cases[i])
    assert len(replay) == 3 and replay._record.recorded == 4
    check(replay, transformer, cases[0])
    assert replay._record.recorded == 4
    check(replay, transformer, cases[1])
    assert replay._record.recorded == 5


def test_x_and_t_may_be_written_in_place(replay, transformer):
    x, t, context = arguments(transformer, *SIZES[0])
    for _ in range(3):
        check(replay, transformer, (x, t, context))
        x.mul_(0.9).add_(0.1)
        t.mul_(0.5)
    assert replay._record.recorded == 1


def test_results_are_the_callers_own(replay, transformer):
    one, two = (arguments(transformer, *SIZES[0], seed=seed) for seed in (1, 2))
    first = replay(*one)
    kept = first.clone()
    replay(*two)
    assert torch.equal(first, kept)


def test_contexts_in_turn(replay, transformer):
    """Guided and unguided passes of one size, or two requests in turn: each finds its own text."""
    one, two = (arguments(transformer, *SIZES[0], seed=seed) for seed in (1, 2))
    for args in (one, two, one, one, two):
        check(replay, transformer, args)
    assert replay._record.recorded == 1


def test_hooks_are_run_not_replayed(replay, transformer):
    args = arguments(transformer, *SIZES[0])
    replay(*args)
    seen = []
    hook = transformer.layers[1].register_forward_hook(lambda *_: seen.append(1))
    check(replay, transformer, args)
    hook.remove()
    assert len(seen) == 2
    replay(*args)
    assert len(seen) == 2


def test_attention_that_somebody_looks_at_is_run(replay, transformer):
    from s3dit.kernels.attention import attention

    args, seen = arguments(transformer, *SIZES[0]), []
    replay(*args)

    def tap(*inner):
        seen.append(1)
        return attention.reference(*inner)

    with attention.using(tap):
        replay(*args)
    count = len(transformer.layers) + len(transformer.noise_refiner)
    assert len(seen) == count


def test_a_failed_recording_leaves_nothing(replay, transformer):
    x, t, context = arguments(transformer, *SIZES[0])
    with pytest.raises(RuntimeError):
        replay(x[:, :3], t, context)
    assert len(replay) == 0
    check(replay, transformer, (x, t, context))


def test_what_cannot_be_recorded_is_refused(transformer):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2)])
    stream(model, "cpu")
    with pytest.raises(BackendError, match="has hooks"):
        Replay(model, Recorder())
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="graphs need a CUDA device"):
            Replay(transformer)


def test_flatten_and_rebuild():
    spans = Spans.of((32, 64))
    fixed, tensors = flatten((spans, 3, None, (torch.ones(2), "a")))
    assert hash(fixed) and [t.shape for t in tensors] == [(3,), (3,), (2,)]
    again = rebuild((spans, 3, None, (torch.ones(2), "a")), iter([t + 1 for t in tensors]))
    assert again[0].lengths == (32, 64) and torch.equal(again[0].cu_seqlens, spans.cu_seqlens + 1)
    assert again[1:3] == (3, None) and torch.equal(again[3][0], torch.full((2,), 2.0)) and again[3][1] == "a"
    assert flatten(Spans.of((64, 32)))[0] != flatten(spans)[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_real_graphs_are_the_same_bits(dtype):
    options = {"num_inference_steps": 3, "seed": 1, "output_type": "latent", "solver": "heun"}
    eager, recorded = (Pipeline.load(device="cuda", dtype=dtype, residency="resident", graphs=g) for g in (False, True))
    for side, prompts, guidance in (
        (128, ["a red star"], 0.0),
        (64, ["a blue ring"] * 2, 1.0),
        (128, ["a heart"], 0.0),
    ):
        more = {"prompt": prompts, "height": side, "guidance_scale": guidance}
        for a, b in zip(recorded(**options, **more).latents, eager(**options, **more).latents, strict=True):
            assert torch.equal(a, b)
    assert len(recorded.parts["transformer"].replay) == 2


def test_a_recording_is_of_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    changes = {
        lambda: model[0].weight.mul_(2): False,
        lambda: setattr(model[0], "weight", nn.Parameter(torch.ones(2, 2), requires_grad=False)): True,
        lambda: setattr(model[1], "bias", None): True,
        lambda: setattr(model[1], "forward", lambda x: x): True,
        lambda: model.append(nn.Identity()): True,
    }
    for change, stale in changes.items():
        replay = Replay(model, Recorder())
        assert not replay.stale
        change()
        assert replay.stale == stale


def test_a_model_goes_with_its_recordings():
    model = nn.Linear(2, 2)
    model.kept = Replay(model, lambda run: (lambda: None, run()))
    model.kept(torch.ones(2))
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
