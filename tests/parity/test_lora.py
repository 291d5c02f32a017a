"""Adapters that PEFT and diffusers wrote, and what their models make of them.

The bound is 1e-5: both sides do the same fp32 operations, in products of other shapes; the branch's own products are
in the same order. Seen: below 3e-6.
"""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.model.layout import text_to_image
from s3dit.weights.convert_adapter import convert_adapter

peft = pytest.importorskip("peft", reason="parity of adapters needs peft: pip install 's3dit[test]'")
diffusers = pytest.importorskip("diffusers")

# The final layer's adaLN_modulation.0 is its SiLU.
TARGETS = r".*\.(to_[qkv]|to_out\.0|w[123])|(layers|noise_refiner)\.\d\.adaLN_modulation\.0"
CLOSE = 1e-5


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def pipe(official_dir):
    return Pipeline.load(official_dir, device="cpu", dtype="fp32", residency="resident")


@pytest.fixture
def ours(pipe):
    yield pipe
    pipe.lora.detach()


@pytest.fixture
def theirs(official_dir):
    """diffusers' transformer in a pipeline of its own, whose adapters nobody else sees."""
    transformer = diffusers.ZImageTransformer2DModel.from_pretrained(official_dir, subfolder="transformer")
    return diffusers.ZImagePipeline(None, None, None, None, transformer.requires_grad_(False))


@torch.inference_mode()
def velocities(pipe, transformer):
    """(ours, diffusers') of one picture."""
    generator = torch.Generator().manual_seed(4)
    latents, text = torch.randn(16, 1, 10, 6, generator=generator), torch.randn(9, 128, generator=generator)
    t = torch.tensor([0.4])
    (wanted,) = transformer([latents], t, [text], return_dict=False)[0]
    model = pipe.parts["transformer"]
    x = latents[:, 0].unflatten(1, (5, 2)).unflatten(3, (3, 2)).permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
    layout = text_to_image(((5, 3),), [9], torch.device("cpu"))
    found = model(x, t, model.context(layout, text))
    return found.view(5, 3, 2, 2, 16).permute(4, 0, 2, 1, 3).reshape(16, 1, 10, 6), wanted


def shaken(model, size=0.3):
    """Every parameter of an adapter drawn anew, so that none is zero."""
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if re.search(r"lora_|hada_|lokr_", name):
            noise = size * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    return model


LORAS = {
    "plain": {"lora_alpha": 4},
    "alpha": {"lora_alpha": 7},
    "rank-stabilized": {"lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "lora_alpha": 4,
        "rank_pattern": {"layers.0.attention.to_q": 2, "w3": 5},
        "alpha_pattern": {"layers.1.attention.to_out.0": 9, "w1": 2},
    },
    "regular expressions": {
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {r"layers\.[01]\.attention\.to_[qk]": 2, "^noise_refiner.1.feed_forward.w2": 7, ".*w3": 6},
        "alpha_pattern": {r"(layers|noise_refiner)\.\d\.adaLN_modulation\.0": 9, "to_v|w1": -2},
    },
    "DoRA": {"lora_alpha": 6, "use_dora": True},
    "DoRA by patterns": {"lora_alpha": 6, "use_dora": True, "rank_pattern": {"w2": 2}, "alpha_pattern": {"to_q": 3}},
    "bias": {"lora_alpha": 6, "lora_bias": True},
}


@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.sampled(2)
def test_what_diffusers_saves_and_loads(ours, theirs, tmp_path, kind):
    """save_lora_weights with its metadata, load_lora_weights on the other side: two readers of one file."""
    trained = copy.deepcopy(theirs.transformer)
    trained.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, **LORAS[kind]))
    shaken(trained)
    layers = peft.get_peft_model_state_dict(trained)
    metadata = diffusers.training_utils._collate_lora_metadata({"transformer": trained})
    diffusers.ZImagePipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, **metadata)
    plain, _ = velocities(ours, theirs.transformer)
    theirs.load_lora_weights(tmp_path)
    report = ours.lora.attach(tmp_path / "pytorch_lora_weights.safetensors")
    found, wanted = velocities(ours, theirs.transformer)
    # 3 main blocks and 2 noise refiners of 8 layers, 2 context refiners of 7 without modulation.
    assert len(report.matched) == 54 and relative(wanted, plain) > 1e-2
    assert relative(found, wanted) < CLOSE


@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.sampled(2)
def test_what_a_model_saves_by_itself_and_saves_again(ours, theirs, tmp_path, kind):
    """save_lora_adapter, whose header has no part in front; once trained, once loaded, which names the ranks anew."""
    trained = theirs.transformer
    trained.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, **LORAS[kind]))
    shaken(trained)
    trained.save_lora_adapter(tmp_path / "first")
    trained.delete_adapters("default")
    trained.load_lora_adapter(tmp_path / "first", prefix=None, adapter_name="default", use_safetensors=True)
    trained.save_lora_adapter(tmp_path / "second")
    for folder in ("first", "second"):
        ours.lora.attach(tmp_path / folder)
        found, wanted = velocities(ours, trained)
        ours.lora.detach()
        assert relative(found, wanted) < CLOSE
    plain, _ = velocities(ours, trained)
    assert relative(wanted, plain) > 1e-2


@pytest.mark.parametrize("scale", [0.5, -1.5])
def test_several_with_strengths(ours, theirs, tmp_path, scale):
    for i, target in enumerate((["to_q", "w1"], ["to_q", "to_v", "w2"])):
        trained = copy.deepcopy(theirs.transformer)
        trained.add_adapter(peft.LoraConfig(r=3, target_modules=target))
        layers = peft.get_peft_model_state_dict(shaken(trained, 0.2 + 0.1 * i))
        diffusers.ZImagePipeline.save_lora_weights(tmp_path / str(i), transformer_lora_layers=layers)
        theirs.load_lora_weights(tmp_path / str(i), adapter_name=f"a{i}")
        ours.lora.attach(tmp_path / str(i), name=f"a{i}")
    theirs.set_adapters(["a0", "a1"], [1.0, scale])
    ours.lora.scale("a1", scale)
    found, wanted = velocities(ours, theirs.transformer)
    assert relative(found, wanted) < CLOSE
    theirs.set_adapters(["a1"], [scale])
    ours.lora.detach("a0")
    found, wanted = velocities(ours, theirs.transformer)
    assert relative(found, wanted) < CLOSE


OWN = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=TARGETS),
    "LoKr, both factors products": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS, decompose_both=True),
    "LoKr, both factors whole": lambda: peft.LoKrConfig(r=500, alpha=300, target_modules=TARGETS),
    "LoKr, ranks by layer": lambda: peft.LoKrConfig(r=500, alpha=300, target_modules=TARGETS, rank_pattern={"w1": 90}),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.sampled(2)
def test_what_peft_saves_itself(ours, theirs, tmp_path, kind):
    """save_pretrained: adapter_model.safetensors, and the strength in adapter_config.json beside it."""
    trained = shaken(peft.get_peft_model(theirs.transformer, OWN[kind]()))
    trained.save_pretrained(tmp_path)
    ours.lora.attach(tmp_path)
    found, wanted = velocities(ours, trained)
    ours.lora.detach()
    plain, _ = velocities(ours, trained)
    assert relative(wanted, plain) > 1e-2
    assert relative(found, wanted) < CLOSE


# Dialects that diffusers reads: key of a layer -> stored stem; the ends of down and up; alpha.
DIALECTS = {
    "ai-toolkit": (lambda n: f"diffusion_model.{n}", ".lora_A.weight", ".lora_B.weight", False),
    "ai-toolkit with alpha": (lambda n: f"diffusion_model.{n}", ".lora_A.weight", ".lora_B.weight", True),
    "an adapter's name": (lambda n: n, ".lora_A.default.weight", ".lora_B.default.weight", False),
    "ComfyUI": (
        lambda n: "diffusion_model." + n.replace("to_out.0", "out"), ".lora_down.weight", ".lora_up.weight", True
    ),
    "musubi": (lambda n: "lora_unet_" + n.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", True),
    "dotted": (
        lambda n: "diffusion_model." + n.replace("to_", "to.").replace("to.out", "to_out"),
        ".lora.down.weight", ".lora.up.weight", False,
    ),
}  # fmt: skip
LAYERS = {
    **{f"layers.1.attention.to_{one}": (192, 192) for one in ("q", "k", "v", "out.0")},
    "layers.0.feed_forward.w2": (192, 512),
    "layers.2.feed_forward.w3": (512, 192),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_that_diffusers_reads(ours, theirs, tmp_path, dialect):
    stem, down, up, alpha = DIALECTS[dialect]
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer, (out, in_) in LAYERS.items():
        tensors[stem(layer) + down] = 0.3 * torch.randn(4, in_, generator=generator)
        tensors[stem(layer) + up] = 0.3 * torch.randn(out, 4, generator=generator)
        if alpha:
            tensors[stem(layer) + ".alpha"] = torch.tensor(3.0)
    if dialect == "dotted":
        # Said once more in ComfyUI's words, as Anime-Z does; diffusers drops these.
        for layer, out in (("qkv", 576), ("out", 192)):
            tensors[f"diffusion_model.layers.1.attention.{layer}.lora.down.weight"] = torch.ones(4, 192)
            tensors[f"diffusion_model.layers.1.attention.{layer}.lora.up.weight"] = torch.ones(out, 4)
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path)
    theirs.load_lora_weights(path)
    report = ours.lora.attach(path)
    assert len(report.matched) == len(LAYERS) and len(report.redundant) == (2 if dialect == "dotted" else 0)
    found, wanted = velocities(ours, theirs.transformer)
    assert relative(found, wanted) < CLOSE


@pytest.mark.parametrize("ranks", [(None, 2), (2, 2), (None, None)])
def test_lokr_of_ai_toolkit(ours, theirs, tmp_path, ranks):
    """Which alpha counts, by whether a factor is a product: diffusers folds it in by the same rule."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer, (out, in_) in LAYERS.items():
        tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(5.0)
        for i, ((rows, columns), rank) in enumerate(zip(((8, 8), (out // 8, in_ // 8)), ranks, strict=True), 1):
            ends = {f"lokr_w{i}_a": (rows, rank), f"lokr_w{i}_b": (rank, columns)}
            for end, shape in (ends if rank else {f"lokr_w{i}": (rows, columns)}).items():
                tensors[f"diffusion_model.{layer}.{end}"] = 0.3 * torch.randn(shape, generator=generator)
    save_file(tensors, tmp_path / "lokr.safetensors")
    theirs.load_lora_weights(tmp_path / "lokr.safetensors")
    ours.lora.attach(tmp_path / "lokr.safetensors")
    found, wanted = velocities(ours, theirs.transformer)
    assert relative(found, wanted) < CLOSE


def test_converted_is_read_by_diffusers(ours, theirs, tmp_path):
    """A fused file with an alpha, which diffusers does not read, is read by it once it is converted."""
    generator = torch.Generator().manual_seed(6)
    stems = {"layers.0.attention.qkv": (576, 192), "layers.0.attention.out": (192, 192)}
    tensors = {}
    for stem, (out, in_) in stems.items():
        tensors[f"diffusion_model.{stem}.lora_down.weight"] = 0.3 * torch.randn(3, in_, generator=generator)
        tensors[f"diffusion_model.{stem}.lora_up.weight"] = 0.3 * torch.randn(out, 3, generator=generator)
        tensors[f"diffusion_model.{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "fused.safetensors")
    convert_adapter(tmp_path / "fused.safetensors", tmp_path / "split.safetensors", version="test")
    assert "transformer.layers.0.attention.to_k.lora_A.weight" in load_file(tmp_path / "split.safetensors")
    theirs.load_lora_weights(tmp_path / "split.safetensors")
    ours.lora.attach(tmp_path / "fused.safetensors")
    found, wanted = velocities(ours, theirs.transformer)
    assert relative(found, wanted) < CLOSE


def test_text_encoder_adapter(ours, reference, tmp_path):
    """PEFT on transformers' Qwen3; the features move with it, and come back bit for bit."""
    plain = ours.encode(["a red circle"])[0]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    trained = shaken(peft.get_peft_model(copy.deepcopy(reference.text_encoder), config), 0.2)
    trained.save_pretrained(tmp_path)
    # The layer that is never computed has one, too.
    assert len(ours.lora.attach(tmp_path).matched) == 15
    ids = torch.tensor([ours.tokenizer.encode("a red circle")])
    with torch.inference_mode():
        wanted = trained(input_ids=ids, output_hidden_states=True).hidden_states[-2][0]
    found = ours.encode(["a red circle"])[0]
    assert relative(wanted, plain) > 1e-2 and relative(found, wanted) < CLOSE
    ours.lora.detach()
    assert torch.equal(ours.encode(["a red circle"])[0], plain)
