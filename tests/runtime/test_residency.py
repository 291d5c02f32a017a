"""Parts that come and go are the same modules: hooks, traces, edits and gradients, in every residency; no rings."""

import gc
import warnings
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from s3dit import Pipeline
from s3dit.errors import BackendError, RequestError
from s3dit.kernels.attention import attention
from s3dit.model.layout import text_to_image
from s3dit.research.trace import trace, trace_op
from s3dit.runtime.block_streaming import stream
from s3dit.runtime.graphs import compile_blocks
from s3dit.runtime.residency import Component, Residency

# 10 MiB: of the embedded transformer only some blocks may stay.
KINDS = {
    "resident": {"residency": "resident"},
    "staged": {},
    "streamed": {"residency": "streamed"},
    "vram": {"vram": "10MiB"},
}
REQUEST = {"prompt": "a red star", "seed": 3, "num_inference_steps": 2, "height": 64, "width": 64}


def load(kind, **more):
    return Pipeline.load(device="cpu", dtype="fp32", **KINDS[kind], **more)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def drawn():
    """Latents and picture of REQUEST, and of it again after the first block's attention gives zeros."""
    pipe = load("resident")
    plain = draw(pipe)
    hook = pipe.parts["transformer"].layers[0].attention.register_forward_hook(lambda m, x, y: torch.zeros_like(y))
    ablated = draw(pipe)
    hook.remove()
    return plain, ablated


def draw(pipe, **more):
    result = pipe(**REQUEST | more, output_type="tensor")
    return torch.cat([result.latents[0].flatten(), torch.as_tensor(result.images[0]).flatten()])


class Odd(Residency):
    """Linear layers that count how often, and under what policy, they are filled."""

    def __init__(self, mode):
        super().__init__(mode)
        self.made = []

    def make(self, name):
        with torch.device("meta"):
            return nn.Linear(2, 2)

    def load(self, name, component):
        self.made.append(dict(self.kept))
        component.set_parameters(nn.Linear(2, 2).requires_grad_(False))
        component.mark()


def test_a_part_is_loaded_anew_when_less_of_it_may_stay():
    parts = Odd("staged")
    first = parts["a"]
    for kept in ({"a": 3}, {"a": 5}, {}, {"a": 0}):
        parts.kept = kept
        assert parts["a"] is parts["a"] is first
    assert parts.made == [{}, {"a": 3}, {"a": 0}]


def test_parts_take_turns_and_stand_beside():
    parts = Odd("staged")
    a, b = parts["a"], parts["b"]
    assert parts.held == ("b",) and a.weight.is_meta and not b.weight.is_meta
    with parts.beside():
        assert parts["a"] is a
    assert parts.held == ("b", "a")
    parts.free()
    assert a.weight.is_meta and b.weight.is_meta


def test_a_part_that_fails_to_load_holds_nothing():
    parts = Odd("staged")
    whole = Component.mark

    def stop(component):
        whole(component)
        raise KeyboardInterrupt

    parts.component("a").mark = lambda: stop(parts.component("a"))
    with pytest.raises(KeyboardInterrupt):
        parts["a"]
    assert parts.held == () and parts.component("a").module.weight.is_meta


def test_a_part_that_is_away_says_so():
    """Also where it would go on without weights, on the meta device."""
    pipe = load("staged")
    features = pipe.encode(["a red star"])[0]
    vae, transformer = pipe.parts["vae"], pipe.parts["transformer"]
    with pytest.raises(BackendError, match="the vae is not in memory: .*take it anew .pipe.parts.'vae'.."):
        vae.decode(torch.zeros(1, 16, 8, 8))
    pipe.parts.free()
    with pytest.raises(BackendError, match="the transformer is not in memory"):
        transformer.context(text_to_image([(4, 4)], [len(features)]), features)
    assert not pipe.parts.watched("vae", "transformer")
    pipe.parts["transformer"].context(text_to_image([(4, 4)], [len(features)]), features)


EDITS = {
    "in place": lambda layer: layer.weight.mul_(2),
    "a piece": lambda layer: layer.weight[0].zero_(),
    "another": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(2, 2))),
    "its data": lambda layer: setattr(layer.weight, "data", torch.ones(2, 2)),
    "a gradient": lambda layer: layer.weight.requires_grad_(True),
    "none": lambda layer: setattr(layer, "bias", None),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_somebody_changed_stays_his_until_it_is_restored(edit):
    parts = Odd("staged")
    layer = parts["a"]
    with torch.no_grad():
        EDITS[edit](layer)
    leaf = "bias" if edit == "none" else "weight"
    other = "weight" if edit == "none" else "bias"
    changed = getattr(layer, leaf)
    for _ in range(2):
        parts["b"]
        assert getattr(layer, leaf) is changed and getattr(layer, other).is_meta
        assert getattr(parts["a"], leaf) is changed and not getattr(layer, other).is_meta
    parts.restore("a")
    assert getattr(parts["a"], leaf) is not changed and not layer.bias.requires_grad


def test_a_parameter_that_is_set_while_the_part_is_away_stays():
    parts = Odd("staged")
    layer, _ = parts["a"], parts["b"]
    layer.weight = own = nn.Parameter(torch.eye(2))
    assert parts["a"].weight is own


@pytest.mark.sampled(1)
def test_a_hook_acts_in_the_next_call_and_is_gone_without_a_trace(kind, drawn):
    plain, ablated = drawn
    pipe = load(kind)
    transformer = pipe.parts["transformer"]
    assert torch.equal(draw(pipe), plain)
    hook = transformer.layers[0].attention.register_forward_hook(lambda m, x, y: torch.zeros_like(y))
    for _ in range(2):
        assert torch.equal(draw(pipe), ablated) and not torch.equal(ablated, plain)
        pipe.parts.free()
    hook.remove()
    assert torch.equal(draw(pipe), plain)
    assert pipe.parts["transformer"] is transformer


@pytest.mark.sampled(1)
def test_hooks_on_every_part_run_as_often_as_they_should(kind):
    """Also where the features of the prompt are kept, which the text encoder then makes anew."""
    pipe, seen = load(kind), []
    pipe(**REQUEST)
    places = {
        "text_encoder": pipe.parts["text_encoder"].model.layers[0].mlp,
        "transformer": pipe.parts["transformer"].layers[-1],
        "vae": pipe.parts["vae"].decoder.up_blocks[0],
    }
    hooks = [module.register_forward_hook(lambda *_, name=name: seen.append(name)) for name, module in places.items()]
    for _ in range(2):
        pipe(**REQUEST)
    assert seen == ["text_encoder", "transformer", "transformer", "vae"] * 2
    for hook in hooks:
        hook.remove()
    pipe(**REQUEST)
    assert len(seen) == 8


@pytest.mark.sampled(1)
def test_what_a_hook_made_of_the_text_is_not_kept(kind, drawn):
    pipe = load(kind)
    hook = pipe.parts["text_encoder"].model.layers[0].register_forward_hook(lambda m, x, y: 2 * y)
    assert not torch.equal(draw(pipe), drawn[0])
    hook.remove()
    assert torch.equal(draw(pipe), drawn[0])


@pytest.mark.sampled(1)
def test_a_trace_records_every_call(kind):
    pipe = load(kind)
    transformer, encoder = pipe.parts["transformer"], pipe.parts["text_encoder"]
    with (
        trace(transformer, "layers.*") as blocks,
        trace(encoder, "model.layers.*") as layers,
        trace_op(attention) as op,
    ):
        pipe(**REQUEST)
    assert len(blocks) == 2 * len(transformer.layers) and blocks["layers.0#1"].shape == (64, 192)
    # The last layer is not needed and never read.
    assert 0 < len(layers) <= len(encoder.model.layers)
    each = len(transformer.layers) + len(transformer.noise_refiner)
    assert sum(name.endswith("result") for name in op) == 2 * each + len(transformer.context_refiner)


@pytest.mark.sampled(1)
def test_an_operation_is_replaced_also_for_a_prompt_that_is_known(kind, drawn):
    pipe = load(kind)
    draw(pipe)
    with attention.using(lambda q, k, v, *spans: torch.zeros_like(v)):
        assert not torch.equal(draw(pipe), drawn[0])
        assert [stage.part for stage in pipe.plan(**REQUEST).stages][0] == "text_encoder"
    assert torch.equal(draw(pipe), drawn[0])


def test_modules_that_are_never_called_refuse_hooks():
    pipe = load("staged")
    transformer, encoder, vae = (pipe.parts[name] for name in ("transformer", "text_encoder", "vae"))
    never = [
        vae, transformer.layers, encoder.model, encoder.model.embed_tokens, transformer.layers[0].attention_norm1,
        transformer.layers[0].attention.norm_q,
    ]  # fmt: skip
    for module in never:
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            with pytest.raises(RequestError, match="would never run: .*; put it on a module around or inside it"):
                register(lambda *_: None)
    with pytest.raises(RequestError, match=r"'' matches only modules that are never called \(the model: it has no"):
        trace(vae, "").__enter__()
    with pytest.raises(RequestError, match="fused operation"):
        trace(transformer, "layers.*.attention_norm1").__enter__()
    # Among others they are passed by.
    with trace(transformer, "layers.0.**") as record:
        pipe(**REQUEST)
    assert "layers.0.attention#0" in record and not any("norm" in name for name in record)


def test_a_trace_of_nothing_says_so():
    pipe = load("staged")
    with (
        pytest.warns(UserWarning, match=r"trace recorded nothing of layers\.1: none of it was called"),
        trace(pipe.parts["transformer"], ["layers.1"]),
    ):
        pipe.plan(**REQUEST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError), trace(pipe.parts["transformer"], "layers.1"):
            raise ZeroDivisionError


def test_all_modules_are_called_or_refuse(monkeypatch):
    """The rule that hooks rest on: whatever takes a hook is called when a picture is drawn from another."""
    pipe = load("resident")
    called = set()
    for part in ("text_encoder", "transformer", "vae"):
        for name, module in pipe.parts[part].named_modules():
            if "register_forward_hook" not in vars(module):
                module.register_forward_hook(lambda *_, at=(part, name): called.add(at))
    expected = {
        (part, name)
        for part in ("text_encoder", "transformer", "vae")
        for name, module in pipe.parts[part].named_modules()
        if module._forward_hooks
    }
    pipe(**REQUEST, image=torch.zeros(3, 64, 64), strength=0.5)
    assert len(expected) > 250 and called == expected


def test_large_pictures_in_bf16_run_the_hooks_of_the_autoencoder():
    """Where norms and convolutions are computed in another way than torch's own."""
    for dtype in ("bf16", "fp32"):
        pipe = Pipeline.load(device="cpu", dtype=dtype, residency="resident")
        decoder, seen = pipe.parts["vae"].decoder, []
        decoder.conv_norm_out.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        decoder.up_blocks[2].upsamplers[0].conv.register_forward_hook(lambda *_, seen=seen: seen.append(2))
        pipe.decode([torch.zeros(16, 40, 40)])
        assert seen == [2, 1]


@pytest.mark.parametrize("kind", ["resident", "staged", "streamed"])
@pytest.mark.slow
def test_compiled_blocks_run_hooks_that_came_later(kind, drawn, monkeypatch):
    monkeypatch.setattr("s3dit.runtime.components.compile_blocks", lambda model: compile_blocks(model, "eager"))
    pipe = load(kind, compile=True)
    # 1e-5: sums in another order.
    assert (draw(pipe) - drawn[0]).norm() < 1e-5 * drawn[0].norm()
    hook = pipe.parts["transformer"].layers[0].attention.register_forward_hook(lambda m, x, y: torch.zeros_like(y))
    assert (draw(pipe) - drawn[1]).norm() < 1e-5 * drawn[1].norm()
    hook.remove()
    attend = pipe.parts["transformer"].layers[0].attention
    attend.forward = lambda x, *rest: torch.zeros(64, 192)
    assert (draw(pipe) - drawn[1]).norm() < 1e-5 * drawn[1].norm()
    del attend.forward
    assert (draw(pipe) - drawn[0]).norm() < 1e-5 * drawn[0].norm()


@pytest.fixture
def style(tmp_path):
    g = torch.Generator().manual_seed(0)
    layers = {"layers.0.attention.to_out.0": (192, 192), "layers.3.feed_forward.w2": (192, 512)}
    tensors = {
        f"{layer}.lora_{leaf}.weight": 0.2 * torch.randn(shape, generator=g)
        for layer, (out, in_) in layers.items()
        for leaf, shape in (("A", (4, in_)), ("B", (out, 4)))
    }
    save_file(tensors | {"layers.2.ffn_norm1.w_norm": torch.full((192,), 0.2)}, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.mark.sampled(1)
def test_hooks_stay_when_adapters_come_and_go(kind, style, drawn):
    pipe, seen = load(kind), []
    layer = pipe.parts["transformer"].layers[0].attention.to_out[0]
    layer.register_forward_hook(lambda *_: seen.append("before"))
    pipe.lora.attach(style)
    adapted = draw(pipe)
    assert seen == ["before"] * 2 and not torch.equal(adapted, drawn[0])
    # The wrapper has the layer's hooks: what is put on it outlives it.
    pipe.parts["transformer"].layers[0].attention.to_out[0].register_forward_hook(lambda *_: seen.append("after"))
    seen.clear()
    assert torch.equal(draw(pipe), adapted)
    assert seen == ["before", "after"] * 2
    pipe.lora.detach()
    seen.clear()
    assert torch.equal(draw(pipe), drawn[0])
    assert seen == ["before", "after"] * 2
    assert pipe.parts["transformer"].layers[0].attention.to_out[0] is layer


def zeroed(pipe):
    """Zero what the first block's attention gives, by its weight: the ablation of `drawn`, by hand."""
    with torch.no_grad():
        pipe.parts["transformer"].layers[0].attention.to_out[0].weight.zero_()


@pytest.mark.sampled(1)
def test_a_weight_that_was_written_to_acts_and_stays(kind, drawn):
    pipe = load(kind)
    draw(pipe)
    zeroed(pipe)
    for _ in range(2):
        assert torch.equal(draw(pipe), drawn[1])
    pipe.parts.restore("transformer")
    assert torch.equal(draw(pipe), drawn[0])


@pytest.mark.sampled(1)
def test_a_module_in_anothers_place_stays(kind, drawn):
    class Nothing(nn.Module):
        def forward(self, x, *rest):
            return torch.zeros_like(x)

    pipe = load(kind)
    block = pipe.parts["transformer"].layers[0]
    attend, block.attention = block.attention, Nothing()
    block.attention.input_dtype = None
    for _ in range(2):
        assert torch.equal(draw(pipe), drawn[1])
    block.attention = attend
    assert torch.equal(draw(pipe), drawn[0])


@pytest.mark.sampled(1)
def test_a_text_encoder_that_was_changed_makes_features_anew(kind, drawn):
    pipe = load(kind)
    draw(pipe)
    with torch.no_grad():
        pipe.parts["text_encoder"].model.layers[0].mlp.down_proj.weight.mul_(2)
    changed = draw(pipe)
    assert not torch.equal(changed, drawn[0]) and torch.equal(draw(pipe), changed)
    pipe.parts.restore("text_encoder")
    assert torch.equal(draw(pipe), drawn[0])


@pytest.mark.sampled(1)
def test_adapters_and_changes_by_hand(kind, style, drawn):
    """Both act, the adapter's copies are no changes by hand, and what cannot be told apart is refused."""
    pipe = load(kind)
    pipe.lora.attach(style)
    adapted = draw(pipe)
    assert not pipe.parts.changed_by_hand("transformer")
    zeroed(pipe)
    both = draw(pipe)
    assert not torch.equal(both, adapted)
    assert pipe.parts.changed_by_hand("transformer")
    with pytest.raises(RequestError, match="weights of the transformer were changed by hand, into which style cannot"):
        pipe.lora.merge()
    assert torch.equal(draw(pipe), both)
    pipe.lora.detach()
    assert torch.equal(draw(pipe), drawn[1])


def test_features_that_were_given_out_are_the_callers_own(drawn):
    pipe = load("staged")
    for one in pipe.encode([REQUEST["prompt"]]):
        one.zero_()
    assert torch.equal(draw(pipe), drawn[0])


def gradients(part, module, features):
    """Run a part, back to its input and to one weight; the two gradients."""
    if part == "vae":
        given = torch.randn(1, 16, 8, 8, requires_grad=True)
    else:
        given = torch.randn(*((16, 64) if part == "transformer" else (5, 128)), requires_grad=True)
    ends = ("decoder.conv_out.weight", "w2.weight", "down_proj.weight")
    weight = next(w for name, w in module.named_parameters() if name.endswith(ends))
    weight.requires_grad_(True)
    if part == "transformer":
        context = module.context(text_to_image([(4, 4)], [len(features)]), features)
        module(given, torch.tensor([0.5]), context).sum().backward()
    else:
        (module.decode(given) if part == "vae" else module(given, [5])).sum().backward()
    return given.grad, weight.grad


@pytest.mark.parametrize("part", ["vae", "transformer", "text_encoder"])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.sampled(3)
def test_gradients_pass_through_any_part_after_a_draw(kind, part, inference):
    pipe = load(kind)
    with torch.inference_mode(inference):
        result = pipe(**REQUEST, output_type="tensor")
        features = pipe.encode([REQUEST["prompt"]])
        module = pipe.parts[part]
    assert not any(one.is_inference() for one in (*result.latents, *result.images, *features, *module.parameters()))
    assert all(one.abs().sum() > 0 for one in gradients(part, module, features[0]))


@pytest.mark.sampled(1)
def test_nothing_that_was_loaded_is_an_inference_tensor(kind, style):
    with torch.inference_mode():
        pipe = load(kind)
        pipe.lora.attach(style)
        pipe(**REQUEST)
        transformer = pipe.parts["transformer"]
    branches = transformer.layers[0].attention.to_out[0].branches["style"]
    found = [*transformer.parameters(), branches.strength, branches.term.up, *pipe.encoders._prompts.values()]
    assert not any(one.is_inference() for one in found)


@pytest.mark.slow
def test_everything_goes_at_once(kind, style, monkeypatch):
    """No ring of references, which only the collector would find, whatever was done with the pipeline."""
    compiled = kind == "staged"
    monkeypatch.setattr("s3dit.runtime.components.compile_blocks", lambda model: compile_blocks(model, "eager"))
    gc.collect()
    gc.disable()
    try:
        pipe = load(kind, compile=compiled)
        pipe.lora.attach(style)
        pipe(**REQUEST, on_step=lambda step: None)
        steps = pipe.stream(**REQUEST)
        next(steps)
        hook = pipe.parts["transformer"].layers[0].register_forward_hook(lambda *_: None)
        hook.remove()
        held = {name: weakref.ref(pipe.parts[name]) for name in ("vae", "transformer")}
        weight = weakref.ref(pipe.parts["transformer"].layers[1].attention.to_q.weight)
        pipe.parts["vae"]
        if kind in ("staged", "streamed"):
            assert weight() is None, "another part's turn"
        whole = weakref.ref(pipe)
        del pipe, hook, steps
        assert whole() is None and weight() is None
        assert [name for name, ref in held.items() if ref() is not None] == []
    finally:
        gc.enable()


def test_a_part_outlives_its_pipeline():
    transformer = load("staged").parts["transformer"]
    assert not any(one.is_meta for name, one in transformer.named_parameters() if not name.startswith("norm_final"))


def test_a_streamed_block_is_not_given_another_shape():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.requires_grad_(False)
    stream(model, "cpu")
    model.layers[0].weight = nn.Parameter(torch.ones(3, 2), requires_grad=False)
    with pytest.raises(BackendError, match=r"weight of a streamed block was \[2, 2\] and is \[3, 2\]"):
        model.layers[0](torch.ones(2))
