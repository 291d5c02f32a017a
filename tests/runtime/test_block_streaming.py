"""Streamed blocks: the same bits as resident ones, in any order, after any accident, whatever a block is made of."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from s3dit import Pipeline
from s3dit.errors import BackendError
from s3dit.model.layout import text_to_image
from s3dit.runtime.block_streaming import repeated, stream


class Odd(nn.Module):
    """A block of parameters and buffers of several dtypes and strides."""

    def __init__(self, size, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(size, 7, generator=g).t(), requires_grad=False)
        self.register_buffer("parts", torch.randint(-127, 127, (7, size), dtype=torch.int8, generator=g))
        self.register_buffer("scale", torch.rand(7, 1, generator=g).to(torch.float8_e4m3fn), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x):
        if x.isnan().any():
            raise ValueError("a stop in the middle")
        assert self.weight.stride() == (1, 7) and isinstance(self.weight, nn.Parameter)
        return x + (self.weight + self.parts * self.scale.float()) @ torch.ones(self.weight.shape[1])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(7, 7)
        self.layers = nn.ModuleList(Odd(3 + i % 3, i) for i in range(5))
        self.others = nn.ModuleList(Odd(5, 9 + i) for i in range(2))

    def forward(self, x, backwards=False):
        for block in (*self.others, *(reversed(self.layers) if backwards else self.layers)):
            x = block(x)
        return self.head(x)


def same(model):
    torch.manual_seed(0)
    one, two = model(), model()
    two.load_state_dict(one.state_dict())
    return one, two


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_streamed_is_resident_bit_for_bit(kept):
    resident, streamed = same(Model)
    streamer = stream(streamed, "cpu", kept)
    x = torch.randn(7)
    for backwards in (False, True, True, False, False):
        assert torch.equal(streamed(x, backwards), resident(x, backwards))
    before = streamer.copies
    streamed(x)
    assert streamer.copies - before == (7 - kept if kept < 6 else 0), "one copy a streamed block, one more ahead"


def test_the_model_keeps_its_own_tensors_and_state():
    resident, streamed = same(Model)
    homes = {name: tensor.data_ptr() for name, tensor in streamed.state_dict().items()}
    stream(streamed, "cpu")
    streamed(torch.randn(7))
    after = streamed.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == homes
    assert all(torch.equal(after[name], tensor) for name, tensor in resident.state_dict().items())


def test_a_stop_in_the_middle_leaves_it_usable():
    resident, streamed = same(Model)
    stream(streamed, "cpu", 2)
    x = torch.randn(7)
    for at in range(5):
        hook = streamed.layers[at].register_forward_pre_hook(lambda *_: (torch.full((7,), torch.nan),))
        with pytest.raises(ValueError, match="middle"):
            streamed(x)
        hook.remove()
        assert torch.equal(streamed(x), resident(x))


def test_a_parameter_that_is_changed_passes_through_the_slots_too():
    resident, streamed = same(Model)
    streamer = stream(streamed, "cpu", 2, torch.float32)
    x = torch.randn(7)
    streamed(x)
    for name in ("layers.0", "layers.2", "layers.4", "head"):
        for model in (resident, streamed):
            shelf = model.get_submodule(name)._parameters
            assert streamer.compute_dtype(shelf, "weight") == torch.float32
            changed = nn.Parameter(shelf["weight"] + 1, requires_grad=False)
            shelf["weight"] = changed
        # Also right after a pass, when a slot holds it as it was.
        assert torch.equal(streamed(x), resident(x))
    streamer = stream(low := Model().bfloat16(), "cpu", 0, torch.float32)
    shelf = low.layers[0]._parameters
    assert shelf["weight"].dtype == torch.bfloat16 and streamer.compute_dtype(shelf, "weight") == torch.float32


def test_parameters_are_cast_on_the_way_and_parts_are_not():
    resident, streamed = same(Model)
    stream(streamed, "cpu", 1, torch.bfloat16)
    seen = []
    for block in streamed.layers:
        block.register_forward_pre_hook(lambda b, _: seen.append((b.weight.dtype, b.scale.dtype, b.parts.dtype)))
    x = torch.randn(7)
    for module in resident.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(streamed(x), resident(x))
    assert set(seen) == {(torch.bfloat16, torch.float8_e4m3fn, torch.int8)}


def test_what_cannot_be_streamed_is_refused_by_name():
    with pytest.raises(BackendError, match="Linear has no repeated blocks"):
        stream(nn.Linear(2, 2), "cpu")
    model = Model()
    assert stream(model, "cpu", 7) is None
    stream(model, "cpu")
    with pytest.raises(BackendError, match="Model is streamed already"):
        stream(model, "cpu")


def test_blocks_that_are_never_read_are_left_alone():
    model = Model()
    model.layers[4] = Odd(4, 0).to("meta")
    streamer = stream(model, "cpu")
    x = torch.randn(7)
    for block in (*model.layers[:4], *model.others):
        x = block(x)
    assert streamer.copies == 7 and model.layers[4].weight.is_meta


def test_nested_lists_belong_to_their_block():
    model = Pipeline.load(device="cpu", dtype="fp32").parts.blank("transformer")[0]
    assert [len(found) for found in repeated(model)] == [1, 1, 6]


@pytest.fixture(scope="module")
def transformers():
    return [Pipeline.load(device="cpu", dtype="fp32").parts["transformer"] for _ in range(2)]


def test_the_transformer_streamed_over_sizes_batches_and_contexts(transformers):
    resident, streamed = transformers
    stream(streamed, "cpu", 3)
    for grids, lengths in [([(4, 4)], [5]), ([(4, 6)] * 2, [5, 40]), ([(2, 2)], [33])]:
        g = torch.Generator().manual_seed(0)
        text = torch.randn(sum(lengths), resident.config.cap_feat_dim, generator=g)
        x = torch.randn(sum(r * c for r, c in grids), 64, generator=g)
        layout = text_to_image(grids, lengths)
        a, b = (m(x, torch.tensor([0.3]), m.context(layout, text)) for m in (resident, streamed))
        assert torch.equal(a, b)


@pytest.mark.parametrize("scheme", ["int8", "fp8-weights", "int4"])
@pytest.mark.sampled(1)
def test_quantized_blocks_stream_too(scheme):
    options = {"prompt": "a red star", "seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    resident, streamed, tight = (
        Pipeline.load(device="cpu", dtype="fp32", quantize=scheme, **more)
        for more in ({}, {"residency": "streamed"}, {"vram": "9MiB"})
    )
    assert tight.plan(**options).memory.kept["transformer"] > 0
    expected = resident(**options).latents[0]
    assert torch.equal(streamed(**options).latents[0], expected)
    assert torch.equal(tight(**options).latents[0], expected)


class Stream:
    """A stream of CUDA as the test needs it: what is put on it runs as late as an event allows."""

    def __init__(self):
        self.queue, self.waited = [], []

    def wait_stream(self, other):
        self.waited.append(other)

    def wait_event(self, event):
        self.waited.append(event)
        while len(event.stream.queue) and event.stream.queue[0][0] <= event.time:
            event.stream.queue.pop(0)[1]()

    def record_event(self):
        Event.time += 1
        return Event(self, Event.time)


class Event:
    time = 0

    def __init__(self, stream, time):
        self.stream, self.time = stream, time


def test_events_keep_copies_and_computation_apart(monkeypatch):
    """The CUDA path on streams that are as late as they may be; a copy must have waited for the slot's last reader."""
    main, side, pinned = Stream(), Stream(), {}
    current = [main]
    copy = torch.Tensor.copy_

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def copy_(self, source, non_blocking=False):
        if current[-1] is main:
            return copy(self, source)
        assert non_blocking
        slot = next(i for i, s in enumerate(slots) if s.untyped_storage()._cdata == self.untyped_storage()._cdata)
        assert streamer._done[slot] is None or streamer._done[slot] in side.waited, "the slot may still be read"
        side.queue.append((Event.time + 1, lambda: copy(self, source)))
        return None

    def register(address, size, flags):
        pinned[address] = size
        return 0

    slots = []
    monkeypatch.setattr("s3dit.runtime.block_streaming.side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: slots.append(self))
    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    resident, streamed = same(Model)
    streamer = stream(streamed, "cpu", 2)
    assert len(pinned) == 5 and main in side.waited and len(slots) == 2
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    x = torch.randn(7)
    for backwards in (False, False, True, False):
        assert torch.equal(streamed(x, backwards), resident(x, backwards))
    block = next(b for b in streamed.layers if b._forward_pre_hooks)
    assert any(0 <= block.parts.data_ptr() - address < size for address, size in pinned.items())
    streamed = streamer = block = None
    gc.collect()
    assert not pinned, "host memory is given back unpinned"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_streamed_on_a_gpu_is_resident_bit_for_bit(quantize):
    options = {"prompt": "a red star", "num_inference_steps": 3, "seed": 1, "guidance_scale": 1.0}
    resident, streamed = (
        Pipeline.load(device="cuda", dtype="bf16", quantize=quantize, residency=r) for r in ("resident", "streamed")
    )
    for side in (128, 64, 128):
        a, b = (pipe(**options, height=side, output_type="latent").latents[0] for pipe in (resident, streamed))
        assert torch.equal(a, b)
    assert streamed.parts.component("transformer").streamer.copies
