"""s3dit parity finds mistakes: single ones, planted in this engine, each at its stage against the unharmed reference.

Weights, constants, axes, orders, schedules, guidance, masks, hints, posterior, references, adapter scales, decoding.
"""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from s3dit import Control, Pipeline
from s3dit.inputs import start_image
from s3dit.kernels import norm
from s3dit.model import text_encoder as text_room
from s3dit.model import transformer as transformer_room
from s3dit.parity.checks import named_checks
from s3dit.parity.judge import judge
from s3dit.parity.ours import ours as stages_of
from s3dit.parity.records import lengths_of
from s3dit.parity.reference import reference
from s3dit.parity.taps import FINAL, Inside
from s3dit.sampling import guidance, solvers

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install 's3dit[test]'")
gguf = pytest.importorskip("gguf", reason="GGUF files are made by gguf-py: pip install 's3dit[test]'")
sys.path.insert(0, str(Path(__file__).parent))
import spelled  # noqa: E402

INSIDE = Inside(("layers.1", "text.layers.1"))
REQUEST = {"prompt": "a red star above a blue ring", "seed": 3, "num_inference_steps": 2, "guidance_scale": 0.0}
SIZE = {"height": 80, "width": 112}


def photograph(height, width, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def gray(height, width):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray((((x - 50) ** 2 + (y - 40) ** 2 < 700) | (x > width - 21)).astype(np.uint8) * 255)


GUIDED = SIZE | {"guidance_scale": 3.0, "negative_prompt": "white", "cfg_normalization": 0.8, "cfg_truncation": 0.9}
PAINTED = {"image": photograph(80, 112), "mask_image": gray(80, 112), "num_inference_steps": 3, "strength": 0.6}
LAYERS = {"layers.1.attention.to_q": (192, 192), "layers.2.feed_forward.w2": (192, 512)}


@pytest.fixture(scope="module")
def stage(official_dir, omni_dir, randomized, tmp_path_factory):
    """What is drawn, by name: a pipeline, a plan, and what the reference says; each made when it is first used."""
    folder, made = tmp_path_factory.mktemp("planted"), {}
    plain = Pipeline.load(official_dir, device="cpu", dtype="fp32", residency="resident")

    def control():
        net = diffusers.ZImageControlNetModel(
            control_layers_places=[0, 2], control_refiner_layers_places=[0, 1], control_in_dim=33,
            add_control_noise_refiner="control_noise_refiner", dim=192, n_refiner_layers=2, n_heads=6, n_kv_heads=6,
        )  # fmt: skip
        randomized(net, 7).save_pretrained(folder / "net")
        return plain, SIZE | {"control": Control(folder / "net", photograph(90, 150), 0.6)}

    def adapted():
        generator, tensors = torch.Generator().manual_seed(1), {}
        for layer, (out, in_) in LAYERS.items():
            tensors[f"transformer.{layer}.lora_A.weight"] = 0.3 * torch.randn(4, in_, generator=generator)
            tensors[f"transformer.{layer}.lora_B.weight"] = 0.3 * torch.randn(out, 4, generator=generator)
        save_file(tensors, folder / "adapter.safetensors")
        pipe = Pipeline.load(official_dir, device="cpu", dtype="fp32", residency="resident")
        pipe.lora.attach(folder / "adapter.safetensors", 0.8, "one")
        return pipe, SIZE

    def blocks():
        kind, writer = gguf.GGMLQuantizationType.Q4_0, gguf.GGUFWriter(folder / "x.gguf", "lumina2")
        for key, tensor in spelled.comfy(spelled.part(official_dir, "transformer")).items():
            data, whole = tensor.contiguous().numpy(), "feed_forward" in key and key.startswith("layers.1.")
            writer.add_tensor(
                key, gguf.quantize(data, kind) if whole else data, **({"raw_dtype": kind} if whole else {})
            )
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
        pipe = Pipeline.load(
            official_dir, transformer=folder / "x.gguf", device="cpu", dtype="fp32", residency="resident"
        )
        return pipe, SIZE

    makers = {
        "guided": lambda: (plain, GUIDED), "painted": lambda: (plain, PAINTED), "control": control,
        "omni": lambda: (Pipeline.load(omni_dir, device="cpu", dtype="fp32", residency="resident"),
                         {"reference": [photograph(80, 119, 1)], "height": 64, "width": 64}),
        "adapted": adapted, "gguf": blocks,
    }  # fmt: skip

    def make(name):
        if name not in made:
            pipe, request = makers[name]()
            made[name] = pipe, REQUEST | request, reference(pipe, pipe.plan(**REQUEST | request), {}, INSIDE)
        return made[name]

    return make


def harmed(part, name, row=0):
    """One row (of a vector, one value) off by a third of the tensor's largest value."""

    @contextmanager
    def plant(pipe, request):
        module = pipe.parts[next(key for key in pipe.parts.checkpoints if key.startswith(part))]
        parameter = dict(module.named_parameters())[name]
        right = parameter.data
        parameter.data = right.clone()
        parameter.data[row] += right.abs().max() / 3
        try:
            yield request
        finally:
            parameter.data = right

    return plant


def asked(**fields):
    """Another request."""

    @contextmanager
    def plant(pipe, request):
        yield request | fields

    return plant


def steered(**fields):
    """Another control."""

    @contextmanager
    def plant(pipe, request):
        yield request | {"control": replace(request["control"], **fields)}

    return plant


def using(op, changed):
    """An operation that computes something else."""

    @contextmanager
    def plant(pipe, request):
        with op.using(lambda *args: changed(op.reference, *args)):
            yield request

    return plant


def patched(room, name, changed):
    """A function that does something else; changed(the right one) -> the wrong one."""

    @contextmanager
    def plant(pipe, request):
        with patch.object(room, name, changed(getattr(room, name))):
            yield request

    return plant


def attribute(part, path, **values):
    """Attributes of a module, or of its frozen configuration."""

    @contextmanager
    def plant(pipe, request):
        module = pipe.parts[part].get_submodule(path)
        right = {name: getattr(module, name) for name in values}
        for name, value in values.items():
            setattr(module, name, replace(right[name], **value) if isinstance(value, dict) else value)
        try:
            yield request
        finally:
            for name, value in right.items():
                setattr(module, name, value)

    return plant


@contextmanager
def scaled(pipe, request):
    pipe.lora.scale("one", 0.82)
    try:
        yield request
    finally:
        pipe.lora.scale("one", 0.8)


@contextmanager
def nibbles(pipe, request):
    """Codes of one matrix with their halves swapped."""
    module = pipe.parts["transformer"].get_submodule("layers.1.feed_forward.w1")
    right = module.weight.data
    module.weight.data = right.clone()
    codes = module.weight.data[:, 2:18]
    codes.copy_((codes << 4) | (codes >> 4))
    try:
        yield request
    finally:
        module.weight.data = right


def tokens(change):
    """Other token ids of every prompt."""

    @contextmanager
    def plant(pipe, request):
        right = pipe.tokenizer.segments
        with patch.object(type(pipe.tokenizer), "segments", lambda self, *args: [change(right(*args)[0])]):
            yield request

    return plant


def swapped(rows):
    """Rope tables whose rows and columns are exchanged where the grid is a picture's."""

    def change(pack_rope):
        def table(pack, axes, theta):
            positions = pack.positions[:, [0, 2, 1]] if rows(pack) else pack.positions
            return pack_rope(replace(pack, positions=positions), axes, theta)

        return table

    return change


def is_image(pack):
    return bool(pack.positions[:, 1].any()) and len(pack.positions) == 2 * 64


def masked(attend):
    """Attention of the context refiner that does not look at padding."""

    def run(q, k, v, spans, other):
        out = attend(q, k, v, spans, other)
        if tuple(spans.lengths) != (32, 32):
            return out
        out = out.clone()
        for item, length in ((slice(0, 32), 15), (slice(32, 64), 9)):
            heads = [x.transpose(0, 1) for x in (q[item], k[item][:length], v[item][:length])]
            out[item] = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(0, 1)
        return out

    return run


def swapped_halves(guide):
    """Guidance that takes the negative prompt's velocity for the prompt's."""
    return lambda run, *rest: guide(lambda *args: torch.cat(run(*args).chunk(2)[::-1]), *rest)


def a_layer_early(forward):
    """Features of the layer before the last but one."""

    def run(self, x, lengths, rope=None):
        forward(self, x, lengths, rope)
        return self.model.layers[0](x, self.rope_of(lengths, x.device), list(lengths))

    return run


def flipped(joined):
    def run(self, image, modulation, context, hints=()):
        return joined(self, image, modulation, replace(context, gather=context.gather.flip(0)), hints)

    return run


def wide_eps(op, q, k, a, b, rope, eps, pairs="adjacent"):
    return op(q, k, a, b, rope, 1e-2 if pairs == "adjacent" else eps, pairs)


def halves(op, q, k, a, b, rope, eps, pairs="adjacent"):
    return op(q, k, a, b, rope, eps, "halves")


UPSIDE_DOWN = Image.fromarray(255 - np.array(gray(80, 112)))
REFERENCES, PIPELINE = sys.modules["s3dit.inputs.references"], sys.modules["s3dit.pipeline"]
BLOCK = "layers.1.feed_forward.w1"
# What is planted -> scenario, how, and the stage where it must show first.
PLANTED = {
    # weights
    "text mlp": ("guided", harmed("text_encoder", "model.layers.0.mlp.up_proj.weight"), "text.layers.0"),
    "text q norm": ("guided", harmed("text_encoder", "model.layers.1.self_attn.q_norm.weight"),
                    "text.layers.1.self_attn.q"),
    "caption embedder": ("guided", harmed("transformer", "cap_embedder.1.weight"), "cap_embedder"),
    "caption pad": ("guided", harmed("transformer", "cap_pad_token"), "tokens of text"),
    "context norm": ("guided", harmed("transformer", "context_refiner.1.ffn_norm2.weight"), "context_refiner.1"),
    "time embedder": ("guided", harmed("transformer", "t_embedder.mlp.0.bias"), "t_embedder"),
    "patch embedder": ("guided", harmed("transformer", "all_x_embedder.2-1.bias"), "all_x_embedder.2-1"),
    "image pad": ("guided", harmed("transformer", "x_pad_token"), "tokens of image"),
    "k norm": ("guided", harmed("transformer", "noise_refiner.1.attention.norm_k.weight"), "noise_refiner.1"),
    "q norm inside": ("guided", harmed("transformer", "layers.1.attention.norm_q.weight"), "layers.1.attention.q"),
    "k inside": ("guided", harmed("transformer", "layers.1.attention.to_k.weight"), "layers.1.attention.to_k"),
    "out inside": ("guided", harmed("transformer", "layers.1.attention.to_out.0.weight"),
                   "layers.1.attention.to_out.0"),
    "w3 inside": ("guided", harmed("transformer", "layers.1.feed_forward.w3.weight"), "layers.1.feed_forward.w3"),
    "modulation": ("guided", harmed("transformer", "layers.2.adaLN_modulation.0.bias"), "layers.2"),
    "final bias": ("guided", harmed("transformer", "all_final_layer.2-1.linear.bias"), FINAL),
    "decoder": ("guided", harmed("vae", "decoder.up_blocks.2.resnets.0.conv1.weight"), "vae.decoder.up_blocks.2"),
    "its attention": ("guided", harmed("vae", "decoder.mid_block.attentions.0.to_v.weight"), "vae.decoder.mid_block"),
    # constants
    "eps of q and k": ("guided", using(norm.qk_norm_rope, wide_eps), "context_refiner.0.attention.q"),
    "eps of a block": ("guided", attribute("transformer", "layers.1", eps=1e-2), "layers.1.attention.to_q"),
    "eps of text": ("guided", attribute("text_encoder", "model.layers.1.input_layernorm", eps=1e-2),
                    "text.layers.1.input_layernorm"),
    "VAE shift": ("guided", attribute("vae", "", config={"shift_factor": 0.116}), "vae.decoder.conv_in"),
    "theta": ("guided", patched(transformer_room, "pack_rope", lambda f: lambda *a: f(*a[:2], 2 * a[2])),
              "rope of text"),
    "time of noise": ("guided", patched(guidance, "flow_time", lambda f: lambda sigma: f(sigma) + 0.01), "t_embedder"),
    # axes and orders
    "rope pairs": ("guided", using(norm.qk_norm_rope, halves), "context_refiner.0.attention.q"),
    "rows for columns": ("guided", patched(transformer_room, "pack_rope", swapped(is_image)), "rope of image"),
    "joint order": ("guided", patched(transformer_room.Transformer, "joined", flipped), "tokens of whole"),
    "negative for positive": ("guided", patched(PIPELINE, "guide", swapped_halves), "velocity, step 1"),
    # text
    "a token is missing": ("guided", tokens(lambda ids: ids[1:]), "token ids"),
    "a token is doubled": ("guided", tokens(lambda ids: [ids[0], *ids]), "token ids"),
    "a layer early": ("guided", patched(text_room.TextEncoder, "forward", a_layer_early), "text features"),
    "pads are masked": ("guided", patched(transformer_room, "attention", masked), "context_refiner.0.attention.mixed"),
    # schedule, solver, guidance
    "shift": ("guided", asked(shift=3.001), "sigmas"),
    "seed": ("guided", asked(seed=4), "noise"),
    "step": ("guided", patched(solvers, "pairs", lambda f: lambda s: ((i, a, b * 0.999) for i, a, b in f(s))),
             "latents, step 1"),
    "scale of guidance": ("guided", asked(guidance_scale=2.0), "velocity, step 1"),
    "no normalization": ("guided", asked(cfg_normalization=0.0), "velocity, step 1"),
    "truncation": ("guided", asked(cfg_truncation=0.1), f"{FINAL}, step 2"),
    # start images
    "mask upside down": ("painted", asked(mask_image=UPSIDE_DOWN), "latents, step 1"),
    "mask by its last pixel": (
        "painted", patched(start_image, "_cells", lambda f: lambda mask: f(mask.roll((-7, -7), (1, 2)))),
        "latents, step 1",
    ),
    "posterior": ("painted", asked(posterior="sample"), "start"),
    "strength": ("painted", asked(strength=0.3), "sigmas"),
    "noise for image": ("painted", patched(start_image, "noised", lambda f: lambda a, b, *s: f(b, a, *s)), "start"),
    "encoder": ("painted", harmed("vae", "encoder.down_blocks.1.resnets.0.conv1.weight"),
                "vae.encoder.down_blocks.1, picture 1"),
    "VAE scale": ("painted", attribute("vae", "", config={"scaling_factor": 0.36}), "start"),
    # ControlNets
    "strength of a hint": ("control", steered(strength=0.65), "control 1: hint of noise_refiner.0"),
    "rule of a hint": ("control", steered(rule="diffusers"), "noise_refiner.1"),
    "control embedder": ("control", harmed("controlnet", "control_all_x_embedder.2-1.weight"), "control 1: embedded"),
    "control layer": ("control", harmed("controlnet", "control_layers.1.after_proj.weight"),
                      "control 1: hint of layers.2"),
    # references
    "places behind references": ("omni", asked(reference_positions="intended"), "rope of text"),
    "vision tower": ("omni", harmed("siglip", "vision_model.encoder.layers.0.mlp.fc1.weight"),
                     "vision features, picture 1"),
    "order of features": ("omni", patched(REFERENCES, "released_order", lambda f: lambda features: features),
                          "siglip_embedder"),
    # adapters and files
    "scale of an adapter": ("adapted", scaled, "layers.1.attention.to_q"),
    "nibbles of a GGUF": ("gguf", nibbles, BLOCK),
}  # fmt: skip
# Those that have a name of their own.
NAMED = {
    "a token is missing": "template tokens", "a token is doubled": "template tokens", "a layer early": "hidden state",
    "rope pairs": "rope pairing", "caption pad": "pad tokens learned", "pads are masked": "pad tokens attended",
}  # fmt: skip


def looked_at(stage, name, plant=None):
    """First stage that parts, and the checks that found something, with something planted or nothing."""
    pipe, request, truth = stage(name)
    if plant is None:
        mine = stages_of(pipe, pipe.plan(**request), {}, INSIDE)
    else:
        with plant(pipe, request) as changed:
            mine = stages_of(pipe, pipe.plan(**changed), {}, INSIDE)
    first = judge(mine, truth).first
    checks = named_checks(mine, truth, lengths_of(pipe.plan(**request)))
    return None if first is None else first.row.name, [check.name for check in checks if check.found]


@pytest.mark.parametrize("name", ["guided", "painted", "control", "omni", "adapted", "gguf"])
@pytest.mark.sampled(1)
def test_nothing_is_found_where_nothing_is_planted(stage, name):
    assert looked_at(stage, name) == (None, [])


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.sampled(9)
def test_a_mistake_is_found_where_it_is(stage, name):
    scenario, plant, expected = PLANTED[name]
    first, named = looked_at(stage, scenario, plant)
    assert first == expected
    assert named == [NAMED[name]] if name in NAMED else not named


def test_there_are_enough():
    assert len(PLANTED) >= 40


@pytest.mark.slow
def test_afterwards_nothing_is_left(stage):
    for name in ("guided", "painted", "control", "omni", "adapted", "gguf"):
        assert looked_at(stage, name) == (None, [])
