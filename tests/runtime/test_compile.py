"""Compiled blocks: one graph a kind of block for every size, and the eager answer."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from s3dit import Pipeline
from s3dit.errors import BackendError
from s3dit.kernels.attention import attention
from s3dit.model.edit_layout import edit
from s3dit.model.layout import text_to_image
from s3dit.model.transformer import Transformer
from s3dit.runtime.block_streaming import stream
from s3dit.runtime.file_streaming import stream_files
from s3dit.runtime.graphs import check_compiler, compile_blocks

# Picture sizes, prompt lengths, items, and guidance (twice the items): also as many tokens as a head or row is wide.
CASES = [
    ([(8, 8)], [12]),
    ([(8, 8)] * 2, [12, 40]),
    ([(6, 4), (8, 10)], [33, 5]),
    ([(4, 8)], [160]),
    ([(16, 12)] * 3, [3, 70, 9]),
    ([(2, 2)], [1]),
]


def load(dtype="fp32", **options):
    return Pipeline.load(device="cpu", dtype=dtype, **options).parts["transformer"]


def velocity(model, grids, lengths, t=0.3, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    text = torch.randn(sum(lengths), model.config.cap_feat_dim, generator=g).to(dtype)
    x = torch.randn(sum(r * c for r, c in grids), 64, generator=g)
    with torch.inference_mode():
        context = model.context(text_to_image(grids, lengths), text)
        return model(x, torch.tensor([t]), context)


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


@pytest.mark.slow
def test_two_graphs_serve_every_size_batch_and_time(counter):
    eager, compiled = load(), load()
    compile_blocks(compiled, counter)
    for i, case in enumerate(CASES):
        # the very same operations, run from a graph: not a bit may differ
        assert torch.equal(velocity(compiled, *case, t=0.1 * i), velocity(eager, *case, t=0.1 * i))
        assert counter.frame_count == 2, f"modulated and plain blocks, and no more for {case}"


def omni(layers):
    """A model that takes references, of random weights."""
    config = replace(load().config, siglip_feat_dim=24, n_layers=layers)
    torch.manual_seed(0)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def edited(model, grids, lengths, references):
    """The velocity where there are references."""
    g = torch.Generator().manual_seed(1)
    layout = edit(grids, lengths, references)
    text, x = torch.randn(sum(map(sum, lengths)), model.config.cap_feat_dim, generator=g), layout.image.token_index
    looks = (
        [] if layout.clean is None else [(layout.clean, 64), (layout.vision.token_index, model.config.siglip_feat_dim)]
    )
    with torch.inference_mode():
        given = (torch.randn(len(places), width, generator=g) for places, width in looks)
        return model(torch.randn(len(x), 64, generator=g), torch.tensor([0.3]), model.context(layout, text, *given))


ONE, TWO = [((4, 6), (3, 5))], [((4, 4), (2, 2)), ((8, 4), (1, 9))]


@pytest.mark.slow
def test_references_are_served_by_one_graph_more(counter):
    """Clean tokens read a row of their own; a table of one row, which all tokens share, is the other graph."""
    eager = omni(2)
    compiled = omni(2)
    compile_blocks(compiled, counter)
    cases = [
        ([(8, 8)], [(5, 33, 3)], [ONE]),
        ([(8, 8), (4, 6)], [(5, 2, 33, 3), (2, 4, 6)], [TWO, ONE]),
        ([(6, 4), (4, 4)], [(7,), (2, 4, 6)], [[], ONE]),
    ]
    for case in cases:
        assert torch.equal(edited(compiled, *case), edited(eager, *case))
        assert counter.frame_count == 2
    edited(compiled, [(8, 8)], [(5,)], [[]])
    assert counter.frame_count == 3


@pytest.mark.slow
def test_a_whole_request_with_guidance_and_truncation_compiles_nothing_anew(counter, monkeypatch):
    monkeypatch.setattr("s3dit.runtime.components.compile_blocks", lambda model: compile_blocks(model, counter))
    eager, compiled = (Pipeline.load(device="cpu", dtype="fp32", compile=c) for c in (False, True))
    for side, guidance, prompts in ((128, 0.0, ["a red star"]), (96, 2.0, ["a blue ring", "a green circle, large"])):
        options = {"height": side, "width": 128, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}
        options |= {"prompt": prompts, "guidance_scale": guidance, "cfg_truncation": 0.2}
        for a, b in zip(compiled(**options).latents, eager(**options).latents, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 2


@pytest.mark.parametrize("kept", [0, 4, "from files", "cast from files"])
@pytest.mark.slow
def test_streamed_blocks_compile_too(counter, kept):
    eager, compiled = load(), load()
    if isinstance(kept, str):
        # Cast bf16 gives the numbers of fp32 where those were bf16.
        eager, compiled = (load("bf16"), load("bf16")) if "cast" in kept else (eager, compiled)
        eager = eager.float()
        streamer = stream_files(compiled, 4, torch.float32)
    else:
        streamer = stream(compiled, "cpu", kept)
    compile_blocks(compiled, counter)
    for case in CASES[:3]:
        assert torch.equal(velocity(compiled, *case), velocity(eager, *case))
    # What is cast inside inference mode, which a pipeline never does, is a tensor of another kind.
    assert counter.frame_count == 2 + (kept == "cast from files") and streamer.copies > 0


@pytest.mark.slow
def test_narrow_weights_under_wide_arithmetic(counter):
    eager, compiled = load("bf16"), load("bf16")
    compile_blocks(compiled, counter)
    for case in CASES[:3]:
        assert torch.equal(velocity(compiled, *case), velocity(eager, *case))
    assert counter.frame_count == 2


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.slow
def test_quantized_layers_compile_too(counter, scheme):
    eager, compiled = load(quantize=scheme), load(quantize=scheme)
    compile_blocks(compiled, counter)
    for case in CASES[:3]:
        assert torch.equal(velocity(compiled, *case), velocity(eager, *case))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_attention_inside_of_a_graph_can_still_be_looked_at(counter):
    model, seen = load(), []
    compile_blocks(model, counter)
    plain = velocity(model, *CASES[1])

    def tap(q, k, v, q_span, k_span):
        seen.append(q_span.lengths)
        return attention.reference(q, k, v, q_span, k_span)

    with attention.using(tap):
        tapped = velocity(model, *CASES[1])
    assert seen[-1] == (96, 128) and len(seen) == 8
    # the reference sums in another order than torch's own attention
    assert (tapped - plain).norm() < 1e-5 * plain.norm()
    assert counter.frame_count == 2


@pytest.mark.slow
def test_the_real_compiler():
    """Inductor on the smallest kind of block: fused and reordered sums, so 1e-5 and not the same bits."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    eager, compiled = load(), load()
    only = nn.ModuleDict({"context_refiner": compiled.context_refiner})
    compile_blocks(only)
    for grids, lengths in CASES[:4]:
        text = torch.randn(sum(lengths), eager.config.cap_feat_dim, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            a, b = (m.context(text_to_image(grids, lengths), text).text for m in (compiled, eager))
        assert (a - b).norm() < 1e-5 * b.norm()
    torch._dynamo.reset()


def test_what_cannot_be_compiled_is_refused_by_name(monkeypatch):
    with pytest.raises(BackendError, match="Linear has no repeated blocks"):
        compile_blocks(nn.Linear(2, 2))
    model = load()
    compile_blocks(model, "eager")
    with pytest.raises(BackendError, match="Transformer are compiled already"):
        compile_blocks(model, "eager")
    with pytest.raises(BackendError, match="compile serves cpu and cuda, found mps"):
        check_compiler(torch.device("mps"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler \(no-such-compiler"):
        Pipeline.load(device="cpu", compile=True)
