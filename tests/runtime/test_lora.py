"""Adapters on a tiny transformer: every dialect and kind against weights that were changed in float64.

The reference of each case is a copy of the model whose weights are W + Δ, computed here from the published formula in
float64 and rounded once. The bound on the velocity is 1e-5: both sides then compute in fp32, in products of other
shapes. Seen: below 2e-6. Files are written key by key in the form that the tool documents, by nothing of ours.
"""

import copy
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from s3dit.errors import BackendError, CheckpointError
from s3dit.kernels.scheme import QuantizedRows, quantize_rows
from s3dit.kernels.schemes import SCHEMES
from s3dit.model.config import TransformerConfig
from s3dit.model.layout import text_to_image
from s3dit.model.linear import Linear, QuantLinear
from s3dit.model.transformer import Transformer
from s3dit.runtime import lora
from s3dit.runtime.adapter_match import match_layers
from s3dit.runtime.block_streaming import stream
from s3dit.runtime.graphs import compile_blocks
from s3dit.weights.adapter import read_adapter
from s3dit.weights.delta import Delta, Full, Kronecker, LowRank

CONFIG = TransformerConfig.from_json(
    {
        "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 96, "n_layers": 2,
        "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 32,
        "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 12, 12],
    },
    "test",
)  # fmt: skip
ATTENTION = [f"layers.1.attention.to_{one}" for one in ("q", "k", "v", "out.0")]
LAYERS = [
    *ATTENTION, "layers.0.feed_forward.w1", "layers.0.feed_forward.w2", "layers.1.feed_forward.w3",
    "layers.0.adaLN_modulation.0", "noise_refiner.0.attention.to_k", "context_refiner.0.attention.to_out.0",
    "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "all_x_embedder.2-1", "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
]  # fmt: skip
CLOSE = 1e-5


def blank():
    return Transformer(CONFIG).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(p.shape, generator=generator) * (0.1 if p.dim() == 1 else p.shape[-1] ** -0.5)
        + (1.0 if "norm" in name or name == "cap_embedder.0.weight" else 0.0)
        for name, p in blank().named_parameters()
    }


@pytest.fixture
def model(weights):
    model = blank()
    model.load_state_dict(weights)
    return model


@torch.inference_mode()
def velocity(model):
    """Of two pictures of different sizes and captions."""
    generator = torch.Generator().manual_seed(5)
    layout = text_to_image(((3, 4), (2, 2)), [5, 40], torch.device("cpu"))
    text, x = torch.randn(45, 32, generator=generator), torch.randn(16, 64, generator=generator)
    return model(x, torch.tensor([0.3, 0.8]), model.context(layout, text))


def changed(weights, changes):
    """The velocity with weights that are changed in float64: name of a parameter -> function of it."""
    model = blank()
    model.load_state_dict(
        {name: changes[name](w.double()).float() if name in changes else w for name, w in weights.items()}
    )
    assert set(changes) <= set(weights)
    return velocity(model)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def write(tensors, tmp_path, metadata=None):
    path = tmp_path / "adapter.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


ATTACHED = weakref.WeakKeyDictionary()


def attached(model, streamer=None):
    """The attachments of a model, the same ones every time."""
    return ATTACHED.setdefault(model, lora.Attachments(model, streamer))


def attach(model, path, scale=1.0, name="one", **options):
    deltas, report = match_layers(read_adapter(path), {"transformer": lora.layer_shapes(model)}, name, **options)
    attached(model).attach(name, deltas["transformer"], scale, "cpu", torch.float32)
    return report


def check(model, weights, path, changes, scale=1.0):
    """Attached, the model gives the changed velocity, which is far from the plain one; detached, its own bits."""
    plain = velocity(model)
    report = attach(model, path, scale)
    assert not report.unmatched and not report.misshapen
    wanted = changed(weights, changes)
    assert relative(wanted, plain) > 1e-2
    assert relative(velocity(model), wanted) < CLOSE
    assert list(model.state_dict()) == list(weights)
    attached(model).detach("one")
    assert torch.equal(velocity(model), plain)
    return report


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(11)

    def draw(*shape, size=0.3):
        return size * torch.randn(shape, generator=generator)

    return draw


def comfyui(name):
    """The name of a layer in ComfyUI's checkpoints."""
    name = name.replace("to_out.0", "out").replace("all_x_embedder.2-1", "x_embedder")
    return name.replace("all_final_layer.2-1", "final_layer")


def under(name):
    return name.replace(".", "_")


def dotted(name):
    return name.replace("to_", "to.").replace("to.out.0", "to.out.0")


KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
PEFT = ("lora_A.weight", "lora_B.weight", None)
# Dialect -> the key of a layer, what stands behind it for down, up and alpha (None: no alpha).
DIALECTS = {
    "diffusers": (lambda n: f"transformer.{n}.", PEFT),
    "DiffSynth, with an adapter's name": (lambda n: f"{n}.", ("lora_A.default.weight", "lora_B.default.weight", None)),
    "ai-toolkit": (lambda n: f"diffusion_model.{n}.", PEFT),
    "PEFT with alpha": (lambda n: f"diffusion_model.{n}.", (*PEFT[:2], "alpha")),
    "ComfyUI": (lambda n: f"diffusion_model.{comfyui(n)}.", KOHYA),
    "single file": (lambda n: f"model.diffusion_model.{comfyui(n)}.", PEFT),
    "musubi": (lambda n: f"lora_unet_{under(n)}.", KOHYA),
    "musubi, ComfyUI's names": (lambda n: f"lora_unet_{under(comfyui(n))}.", KOHYA),
    "OneTrainer": (lambda n: f"transformer.{n}.", KOHYA),
    "OneTrainer, legacy": (lambda n: f"lora_transformer_{under(n)}.", KOHYA),
    "LyCORIS": (lambda n: f"lycoris_{under(n)}.", KOHYA),
    "dotted": (lambda n: f"{dotted(n)}.", ("lora.down.weight", "lora.up.weight", "alpha")),
    "old diffusers": (lambda n: f"transformer.{n}.", ("lora.down.weight", "lora.up.weight", None)),
    "older diffusers": (lambda n: f"{n}_", ("lora.down.weight", "lora.up.weight", None)),
    "oldest diffusers": (lambda n: f"{n}.", ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight", None)),
    "PEFT's own": (lambda n: f"base_model.model.{n}.", PEFT),
    "PEFT around a part": (lambda n: f"base_model.model.transformer.{n}.", PEFT),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.sampled(3)
def test_lora_of_every_dialect(model, weights, random, tmp_path, dialect):
    key, (down, up, alpha) = DIALECTS[dialect]
    tensors, changes, scale = {}, {}, -0.7
    for i, layer in enumerate(LAYERS):
        (out, in_), rank = weights[f"{layer}.weight"].shape, 2 + i % 3
        b, a = random(out, rank), random(rank, in_)
        tensors |= {key(layer) + down: a, key(layer) + up: b}
        strength = scale
        if alpha is not None:
            # A scalar, or one number in a list; whole alphas are stored as integers, too.
            value = torch.tensor([1.5], dtype=torch.bfloat16) if i % 2 else torch.tensor(3)
            tensors[key(layer) + alpha] = value
            strength = scale * value.item() / rank
        changes[f"{layer}.weight"] = lambda w, b=b, a=a, s=strength: w + s * (b.double() @ a.double())
    report = check(model, weights, write(tensors, tmp_path), changes, scale)
    assert sorted(report.matched) == sorted(LAYERS)


def test_fused_layers_are_cut_by_rows(model, weights, random, tmp_path):
    """qkv: rows q, k, v. net.0.proj: rows w3, w1, as diffusers' SwiGLU multiplies its first half by the second."""
    tensors, changes = {}, {}
    fused = {
        "diffusion_model.layers.1.attention.qkv.": [f"layers.1.attention.to_{one}" for one in "qkv"],
        "diffusion_model.noise_refiner.0.attention.to_qkv.": [f"noise_refiner.0.attention.to_{one}" for one in "qkv"],
        "diffusion_model.layers.0.feed_forward.net.0.proj.": [f"layers.0.feed_forward.{one}" for one in ("w3", "w1")],
    }
    for key, layers in fused.items():
        heights = [len(weights[f"{layer}.weight"]) for layer in layers]
        b, a = random(sum(heights), 3), random(3, 96)
        tensors |= {f"{key}lora_up.weight": b, f"{key}lora_down.weight": a, f"{key}alpha": torch.tensor(1.0)}
        for layer, piece in zip(layers, (b.double() @ a.double() / 3).split(heights), strict=True):
            changes[f"{layer}.weight"] = lambda w, piece=piece: w + piece
    check(model, weights, write(tensors, tmp_path), changes)


def kron(a, b):
    return torch.einsum("ij,kl->ikjl", a, b).reshape(a.shape[0] * b.shape[0], -1)


def loha(random, out, in_):
    a, b, c, d = random(out, 3), random(3, in_), random(out, 3), random(3, in_)
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(6.0)}
    a, b, c, d = (one.double() for one in (a, b, c, d))
    return tensors, lambda w: w + 2 * (a @ b) * (c @ d)


def lokr(random, out, in_, *, first=None, second=None, alpha=None, height=4):
    """first, second: the rank of a factor that is a product."""
    shapes = [(height, 4), (out // height, in_ // 4)]
    tensors, factors = {}, []
    for i, ((rows, columns), rank) in enumerate(zip(shapes, (first, second), strict=True), 1):
        if rank is None:
            tensors[f"lokr_w{i}"] = whole = random(rows, columns)
            factors.append(whole.double())
        else:
            a, b = random(rows, rank), random(rank, columns)
            tensors |= {f"lokr_w{i}_a": a, f"lokr_w{i}_b": b}
            factors.append(a.double() @ b.double())
    dim = second or first
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    # Without a rank alpha means nothing.
    factor = alpha / dim if alpha is not None and dim is not None else 1.0
    return tensors, lambda w: w + factor * kron(*factors)


def dora(random, out, in_, *, rows):
    b, a = random(out, 3), random(3, in_)
    shape, dim = ((out, 1), 1) if rows else ((1, in_), 0)
    norms = 0.5 + random(*shape).abs()
    tensors = {"lora_up.weight": b, "lora_down.weight": a, "alpha": torch.tensor(1.5), "dora_scale": norms}

    def change(w):
        whole = w + 0.5 * (b.double() @ a.double())
        return whole * norms.double() / whole.pow(2).sum(dim, keepdim=True).sqrt()

    return tensors, change


def difference(random, out, in_):
    diff = random(out, in_)
    return {"diff": diff}, lambda w: w + diff.double()


def new(random, out, in_):
    weight = random(out, in_)
    return {"set_weight": weight}, lambda w: weight.double()


def convolution(random, out, in_):
    b, a = random(out, 3, 1, 1), random(3, in_, 1, 1)
    return {"lora_up.weight": b, "lora_down.weight": a}, lambda w: w + b.flatten(1).double() @ a.flatten(1).double()


KINDS = {
    "LoHa": loha,
    "LoKr": lokr,
    "LoKr, alpha without a rank": lambda *args: lokr(*args, alpha=5.0),
    "LoKr, second of rank 2": lambda *args: lokr(*args, second=2, alpha=3.0),
    "LoKr, first of rank 3": lambda *args: lokr(*args, first=3, alpha=1.0),
    "LoKr, both": lambda *args: lokr(*args, first=2, second=4, alpha=2.0),
    "DoRA by rows": lambda *args: dora(*args, rows=True),
    "DoRA by columns": lambda *args: dora(*args, rows=False),
    "difference": difference,
    "new weight": new,
    "1 × 1 convolution": convolution,
}


def at(change, scale):
    """A change at another strength."""
    return lambda w: w + scale * (change(w) - w)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(4)
def test_every_kind(model, weights, random, tmp_path, kind):
    tensors, changes, scale = {}, {}, 0.6
    for layer in LAYERS:
        leaves, change = KINDS[kind](random, *weights[f"{layer}.weight"].shape)
        tensors |= {f"lycoris_{under(layer)}.{leaf}": tensor for leaf, tensor in leaves.items()}
        changes[f"{layer}.weight"] = at(change, scale)
    check(model, weights, write(tensors, tmp_path), changes, scale)


FUSED_KINDS = {
    "LoHa": loha,
    "DoRA by rows": KINDS["DoRA by rows"],
    "LoKr that can be cut": lambda *args: lokr(*args, second=2, height=6),
    "LoKr that cannot": lambda *args: lokr(*args, second=2, height=4),
    "difference": difference,
    "new weight": new,
}


@pytest.mark.parametrize("kind", FUSED_KINDS)
def test_every_kind_fused(model, weights, random, tmp_path, kind):
    leaves, change = FUSED_KINDS[kind](random, 3 * 96, 96)
    layers = [f"layers.0.attention.to_{one}" for one in "qkv"]
    tensors = {f"diffusion_model.layers.0.attention.qkv.{leaf}": tensor for leaf, tensor in leaves.items()}
    whole = change(torch.cat([weights[f"{layer}.weight"] for layer in layers]).double())
    changes = {f"{one}.weight": lambda w, piece=p: piece for one, p in zip(layers, whole.chunk(3), strict=True)}
    check(model, weights, write(tensors, tmp_path), changes)


def test_biases_norms_and_tokens(model, weights, random, tmp_path):
    """What is no matrix is changed too; a bias may come to a layer that has none."""
    names = {
        "layers.0.attention_norm1.weight": "lycoris_layers_0_attention_norm1.w_norm",
        "layers.1.attention.norm_q.weight": "diffusion_model.layers.1.attention.q_norm.diff",
        "cap_embedder.0.weight": "diffusion_model.cap_embedder.0.set_weight",
        "x_pad_token": "diffusion_model.x_pad_token.diff",
        "cap_embedder.1.bias": "diffusion_model.cap_embedder.1.diff_b",
        "layers.0.adaLN_modulation.0.bias": "diffusion_model.layers.0.adaLN_modulation.0.diff_b",
    }
    tensors = {key: random(*weights[name].shape) for name, key in names.items()}
    changes = {}
    for name, key in names.items():
        change = (lambda w, t=tensors[key]: t.double()) if "set" in key else (lambda w, t=tensors[key]: w + t.double())
        changes[name] = at(change, 0.8)
    path = write(tensors, tmp_path)
    check(model, weights, path, changes, 0.8)
    tensors = {"diffusion_model.layers.0.attention.to_q.diff_b": random(96)}
    plain = model.layers[0].attention.to_q(torch.ones(1, 96))
    attach(model, write(tensors, tmp_path), 2.0)
    (bias,) = tensors.values()
    assert relative(model.layers[0].attention.to_q(torch.ones(1, 96)), plain + 2 * bias) < 1e-6


def lora_file(weights, random, tmp_path, layers=LAYERS, name="adapter"):
    tensors, deltas = {}, {}
    for layer in layers:
        out, in_ = weights[f"{layer}.weight"].shape
        b, a = random(out, 2), random(2, in_)
        tensors |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
        deltas[f"{layer}.weight"] = b.double() @ a.double()
    path = tmp_path / f"{name}.safetensors"
    save_file(tensors, path)
    return path, deltas


def norm_file(random, tmp_path):
    path = tmp_path / "norms.safetensors"
    save_file({"diffusion_model.layers.1.ffn_norm1.diff": random(96), "x_pad_token.diff": random(1, 96)}, path)
    return path


def alone(layer):
    """A model of one layer, layers.0.attention.to_q."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"attention": nn.ModuleDict({"to_q": layer})})])
    return model


def test_several_at_once_rescaled_and_taken_off_in_any_order(model, weights, random, tmp_path):
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    plain = velocity(model)
    one, first = lora_file(weights, random, tmp_path, name="one")
    two, second = lora_file(weights, random, tmp_path, LAYERS[3:9], name="two")
    attach(model, one, 0.5, "one")
    attach(model, two, 1.0, "two")
    attach(model, norm_file(random, tmp_path), 1.0, "norms")

    def wanted(a, b):
        return changed(weights, {n: lambda w, n=n: w + a * first[n] + b * second.get(n, 0.0) for n in first})

    attached(model).rescale("norms", 0.0)
    assert relative(velocity(model), wanted(0.5, 1.0)) < CLOSE
    attached(model).rescale("one", -0.25)
    attached(model).rescale("two", 2.0)
    assert relative(velocity(model), wanted(-0.25, 2.0)) < CLOSE
    attached(model).detach("one")
    assert relative(velocity(model), wanted(0.0, 2.0)) < CLOSE
    attached(model).detach("norms")
    attached(model).detach("two")
    # The very same objects, so the very same bits.
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert torch.equal(velocity(model), plain)


def test_two_of_norms_add_up(model, random, tmp_path):
    weight = model.layers[1].ffn_norm1.weight
    before = weight.clone()
    path = norm_file(random, tmp_path)
    attach(model, path, 0.5, "one")
    attach(model, path, 0.25, "two")
    diff = read_adapter(path).deltas["transformer"]["layers.1.ffn_norm1"].term.dense()
    assert relative(model.layers[1].ffn_norm1.weight, before + 0.75 * diff) < 1e-6
    attached(model).detach("one")
    assert relative(model.layers[1].ffn_norm1.weight, before + 0.25 * diff) < 1e-6
    attached(model).detach("two")
    assert model.layers[1].ffn_norm1.weight is weight and torch.equal(weight, before)


@pytest.mark.parametrize("kind", ["LoHa", "DoRA by rows", "DoRA by columns", "new weight"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_beside_a_quantized_layer(scheme, kind, random, tmp_path):
    """The change is added to the quantized product unrounded, and what is kept in 8 bits keeps its bits."""
    out, in_ = 160, 128
    plain = random(out, in_, size=in_**-0.5)
    layer = QuantLinear(SCHEMES[scheme], in_, out)
    for name, part in SCHEMES[scheme].encode(plain).items():
        layer._buffers[name] = part
    parts = dict(layer._buffers)
    decoded = SCHEMES[scheme].decode(parts)
    model = alone(layer)
    leaves, change = KINDS[kind](random, out, in_)
    path = write({f"layers.0.attention.to_q.{leaf}": tensor for leaf, tensor in leaves.items()}, tmp_path)
    assert lora.layer_shapes(model) == {"layers.0.attention.to_q": (out, in_)}
    attach(model, path)
    wrapped = model.get_submodule("layers.0.attention.to_q")
    assert wrapped.input_dtype is None and isinstance(wrapped, lora.Adapted)
    x = random(7, in_, size=1.0)
    added = (x.double() @ (change(decoded.double()) - decoded.double()).T).float()
    # What is computed from a product with an 8-bit x has the rounding of that: 2^-4 in e4m3, 2^-8 in int8.
    exact = SCHEMES[scheme].activation is None or kind == "LoHa"
    assert relative(wrapped(x), layer(x) + added) < (1e-5 if exact else 5e-2)
    if SCHEMES[scheme].activation is not None:
        rows = quantize_rows(x, SCHEMES[scheme].activation)
        assert isinstance(rows, QuantizedRows) and relative(wrapped(rows), wrapped(rows.dequantize())) < 1e-5
    attached(model).detach("one")
    assert model.get_submodule("layers.0.attention.to_q") is layer
    assert all(layer._buffers[name] is part for name, part in parts.items())


def test_in_bf16_the_change_is_of_bf16_precision(weights, random, tmp_path):
    layer = Linear(96, 96, bias=False).requires_grad_(False).bfloat16()
    model = alone(layer)
    path, deltas = lora_file(weights, random, tmp_path, ["layers.0.attention.to_q"])
    attached(model).attach("one", read_adapter(path).deltas["transformer"], 1.0, "cpu", torch.bfloat16)
    x = random(9, 96, size=1.0).bfloat16()
    (delta,) = deltas.values()
    found = model.get_submodule("layers.0.attention.to_q")(x)
    assert found.dtype == torch.bfloat16
    # 1e-2: bf16 keeps 8 bits, and five roundings lie between.
    assert relative(found.double(), x.double() @ (layer.weight.double() + delta).T) < 1e-2


@pytest.mark.parametrize("kept", [0, 1])
def test_streamed_blocks_take_adapters(model, weights, random, tmp_path, kept):
    path, _ = lora_file(weights, random, tmp_path)
    tensors, _ = dora(random, 96, 96, rows=True)
    dora_path = write({f"lycoris_layers_0_attention_to_q.{leaf}": t for leaf, t in tensors.items()}, tmp_path)
    streamed = copy.deepcopy(model)
    plain = velocity(model)
    attached(streamed, stream(streamed, "cpu", kept))
    norms = norm_file(random, tmp_path)
    for one in (model, streamed):
        attach(one, path, 0.7)
        attach(one, norms, 0.3, "norms")
        attach(one, dora_path, 0.5, "dora")
    for _ in range(2):
        assert torch.equal(velocity(streamed), velocity(model))
    for one in (model, streamed):
        attached(one).rescale("norms", -0.5)
    assert torch.equal(velocity(streamed), velocity(model)) and not torch.equal(velocity(model), plain)
    for name in ("norms", "one", "dora"):
        attached(streamed).detach(name)
    assert torch.equal(velocity(streamed), plain) and list(streamed.state_dict()) == list(weights)


@pytest.mark.slow
def test_compiled_blocks_take_adapters_and_a_new_strength_for_nothing(model, weights, random, tmp_path):
    """One more graph serves all blocks that an adapter stands beside, and a strength is no constant of it."""
    blocks = ["noise_refiner.0", "layers.0", "layers.1"]
    path, deltas = lora_file(weights, random, tmp_path, [f"{block}.attention.to_q" for block in blocks])
    counter = CompileCounter()
    compile_blocks(model, counter)
    attach(model, path, 0.5)
    attach(model, norm_file(random, tmp_path), 0.0, "norms")
    half = {name: lambda w, d=d: w + 0.5 * d for name, d in deltas.items()}
    assert relative(velocity(model), changed(weights, half)) < CLOSE
    # Of modulated blocks and of plain ones.
    assert counter.frame_count == 2
    attached(model).rescale("one", 2.0)
    double = {name: lambda w, d=d: w + 2 * d for name, d in deltas.items()}
    assert relative(velocity(model), changed(weights, double)) < CLOSE
    assert counter.frame_count == 2


@pytest.mark.slow
def test_every_kind_compiles_beside_plain_and_quantized_layers(model, weights, random, tmp_path):
    """Without a break in the graph (blocks are compiled whole), and to the answer of the blocks as they are."""
    kinds = dict(
        zip(("to_q", "to_k", "to_v", "to_out.0"), ("DoRA by rows", "DoRA by columns", "LoHa", "LoKr"), strict=True)
    )
    tensors = {}
    for block in ("noise_refiner.0", "layers.0", "layers.1"):
        attention = model.get_submodule(block).attention
        for name in ("to_q", "to_k"):
            quantized = QuantLinear(SCHEMES["int8"], 96, 96)
            quantized._buffers |= SCHEMES["int8"].encode(getattr(attention, name).weight)
            setattr(attention, name, quantized)
        for name, kind in kinds.items():
            leaves, _ = KINDS[kind](random, 96, 96)
            tensors |= {f"{block}.attention.{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
        tensors[f"{block}.feed_forward.w1.set_weight"] = random(256, 96)
        tensors[f"{block}.feed_forward.w3.diff"] = random(256, 96)
        tensors[f"{block}.feed_forward.w2.diff_b"] = random(96)
    attach(model, write(tensors, tmp_path))
    wanted = velocity(model)
    counter = CompileCounter()
    compile_blocks(model, counter)
    assert relative(velocity(model), wanted) < CLOSE and counter.frame_count == 2


@pytest.mark.parametrize("kind", ["LoHa", "DoRA by columns", "new weight"])
def test_merged_is_changed_for_good(model, weights, random, tmp_path, kind):
    tensors, changes = {}, {}
    for layer in LAYERS[:6]:
        leaves, change = KINDS[kind](random, *weights[f"{layer}.weight"].shape)
        tensors |= {f"lycoris_{under(layer)}.{leaf}": tensor for leaf, tensor in leaves.items()}
        changes[f"{layer}.weight"] = at(change, 0.6)
    bias, norm = random(4 * 96), random(96)
    tensors |= {"layers.0.adaLN_modulation.0.diff_b": bias, "layers.0.ffn_norm2.diff": norm}
    changes["layers.0.adaLN_modulation.0.bias"] = lambda b: b + 0.6 * bias.double()
    changes["layers.0.ffn_norm2.weight"] = lambda w: w + 0.6 * norm.double()
    lora.merge(model, read_adapter(write(tensors, tmp_path)).deltas["transformer"], 0.6)
    assert relative(velocity(model), changed(weights, changes)) < CLOSE
    assert not any(isinstance(module, lora.Adapted) for module in model.modules())


def test_merging_is_refused_before_anything_changes(model, weights, random, tmp_path):
    path, _ = lora_file(weights, random, tmp_path, LAYERS[:5])
    deltas = read_adapter(path).deltas["transformer"]
    model.layers[1].attention.to_v = QuantLinear(SCHEMES["int8"], 96, 96)
    with pytest.raises(BackendError, match=r"layers\.1\.attention\.to_v is int8: .*attach"):
        lora.merge(model, deltas, 1.0)
    assert torch.equal(model.layers[1].attention.to_q.weight, weights["layers.1.attention.to_q.weight"])
    biased = read_adapter(write({"layers.0.attention.to_q.diff_b": random(96)}, tmp_path)).deltas["transformer"]
    with pytest.raises(BackendError, match="has no bias"):
        lora.merge(model, biased, 1.0)
    attach(model, path)
    with pytest.raises(BackendError, match="merge first"):
        lora.merge(model, {}, 1.0)
    with pytest.raises(BackendError, match="has an adapter 'one' already"):
        attach(model, path)
    attached(model).detach("one")
    lora.merge(model, {}, 1.0)


def test_layers_without_weights_are_passed_by(model, weights, random, tmp_path):
    path, _ = lora_file(weights, random, tmp_path, LAYERS[:5])
    layer = model.layers[1].attention.to_q.to_empty(device="meta")
    attach(model, path)
    assert model.layers[1].attention.to_q is layer
    assert isinstance(model.layers[1].attention.to_k, lora.Adapted)


def test_what_does_not_fit_is_counted_and_named(model, weights, random, tmp_path):
    good, wrong = LAYERS[0], LAYERS[4]
    tensors = {
        f"transformer.{good}.lora_A.weight": random(2, 96), f"transformer.{good}.lora_B.weight": random(96, 2),
        f"transformer.{wrong}.lora_A.weight": random(2, 80), f"transformer.{wrong}.lora_B.weight": random(96, 2),
        "transformer.layers.9.attention.to_q.lora_A.weight": random(2, 96),
        "transformer.layers.9.attention.to_q.lora_B.weight": random(96, 2),
        "transformer.unheard_of.lora_A.weight": random(2, 96), "transformer.unheard_of.lora_B.weight": random(96, 2),
        "layers.0.ffn_norm1.w_norm": random(96), "layers.0.ffn_norm1.b_norm": random(96),
    }  # fmt: skip
    path = write(tensors, tmp_path)
    words = (
        r"one: 1 matched, 2 unmatched, 2 of a wrong shape \(transformer\.unheard_of, transformer\.layers\.9\.attention"
        r"\.to_q, layers\.0\.ffn_norm1 with a bias .*, layers\.0\.feed_forward\.w1 \[96, 80\], needed \[256, 96\]\);"
        r" .*--lora-allow-partial"
    )
    with pytest.raises(CheckpointError, match=words):
        attach(model, path)
    assert "adapters" not in vars(model)
    report = attach(model, path, allow_partial=True)
    assert report.matched == (good,) and len(report.unmatched) == len(report.misshapen) == 2
    del tensors[f"transformer.{good}.lora_A.weight"], tensors[f"transformer.{good}.lora_B.weight"]
    with pytest.raises(CheckpointError, match="nothing in it fits this model"):
        attach(model, write(tensors, tmp_path), name="two", allow_partial=True)


@pytest.mark.parametrize("rows", [True, False])
def test_dora_in_bf16_far_larger_than_its_weight(rows):
    """The norms bring a change of 137 times the weight back to its size: rounding must act once, not on both terms."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 48, generator=random).bfloat16() / 7
    change = torch.randn(64, 48, generator=random) * 137 / 7
    magnitude = torch.linalg.vector_norm(weight.float(), dim=1 if rows else 0, keepdim=True)
    delta = Delta(Full(change.bfloat16()), magnitude=magnitude)
    layer = Linear(48, 64, bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    x = torch.randn(32, 48, generator=random).bfloat16()
    plain = layer(x)
    got = lora.Branch(delta, layer, torch.tensor(1.0), {}, torch.bfloat16)(plain, x, plain)
    changed = weight.double() + delta.term.weight.double()
    changed *= magnitude.double() / torch.linalg.vector_norm(changed, dim=1 if rows else 0, keepdim=True)
    wanted = x.double() @ changed.T
    # Three roundings to bf16 (2^-9 each, of the large product, x grown, and the sum).
    assert (got.double() - wanted).norm() / wanted.norm() < 3 * 2**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "bias", "lokr", "dora"])
def test_tokens_of_other_strengths(kind, dtype):
    """Each token gets what it gets where all have its strength: in fp32 every bit.

    In bf16 torch rounds a scalar in front of a product to 8 bits, and no vector: two roundings more.
    """
    random = torch.Generator().manual_seed(3)

    def some(*shape):
        return torch.randn(shape, generator=random) / 5

    low = LowRank(some(64, 4), some(4, 48))
    delta = {
        "lora": Delta(low), "bias": Delta(low, bias=some(64)), "lokr": Delta(Kronecker(some(8, 6), some(8, 8))),
        "dora": Delta(low, magnitude=some(64, 1).abs()),
    }[kind]  # fmt: skip
    layer, x = Linear(48, 64, bias=False), some(7, 48).to(dtype)
    layer.weight = nn.Parameter(some(64, 48).to(dtype), requires_grad=False)
    plain, strengths, tokens = layer(x), (0.7, -0.3), {}
    alone = [lora.Branch(delta, layer, torch.tensor(each), {}, dtype)(plain, x, plain) for each in strengths]
    tokens[7] = torch.tensor(strengths).repeat_interleave(torch.tensor([3, 4]))[:, None]
    got = lora.Branch(delta, layer, torch.tensor(5.0), tokens, dtype)(plain, x, plain)
    bound = 2**-7 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(got, torch.cat((alone[0][:3], alone[1][3:])), rtol=bound, atol=bound)
    with pytest.raises(KeyError):
        lora.Branch(delta, layer, torch.tensor(5.0), {6: tokens[7]}, dtype)(plain, x, plain)
