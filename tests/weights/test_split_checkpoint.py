"""Parts told by what they cannot do without, behind any prefix; other models told for what they are."""

import pytest
import torch
from safetensors.torch import save_file

from s3dit.errors import CheckpointError
from s3dit.kernels.int8 import int8
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.split_checkpoint import PREFIXES, split

TRANSFORMER = {"cap_embedder.0.weight": (8,), "cap_pad_token": (1, 8)}
TEXT = {"model.layers.0.input_layernorm.weight": (8,), "model.layers.0.self_attn.q_norm.weight": (4,)}
VAE = {"decoder.conv_in.weight": (8, 16, 3, 3), "decoder.conv_in.bias": (8,)}
KEYS = {"transformer": TRANSFORMER, "text_encoder": TEXT, "vae": VAE}


def held(tmp_path, shapes, dtype=torch.float32, **metadata):
    path = tmp_path / "x.safetensors"
    save_file({key: torch.zeros(shape, dtype=dtype) for key, shape in shapes.items()}, path, metadata=metadata or None)
    return open_checkpoint(path)


@pytest.mark.parametrize("part, prefix", [(part, prefix) for part, all_ in PREFIXES.items() for prefix in all_])
def test_every_prefix(part, prefix, tmp_path):
    found = split(held(tmp_path, {prefix + key: shape for key, shape in KEYS[part].items()}))
    assert list(found.parts) == [part] and found.prefixes == {part: prefix} and not found.rest
    assert sorted(found.parts[part]) == sorted(KEYS[part])
    for key, shape in KEYS[part].items():
        assert found.parts[part].load(key).shape == found.parts[part].entry(key).shape == shape
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        found.parts[part].load("nothing")


def test_all_in_one_with_a_bare_transformer_and_a_foreign_tensor(tmp_path):
    shapes = TRANSFORMER | {f"vae.{key}": shape for key, shape in VAE.items()}
    shapes |= {f"text_encoders.qwen3_4b.transformer.{key}": shape for key, shape in TEXT.items()}
    found = split(held(tmp_path, shapes))
    assert {part: sorted(one) for part, one in found.parts.items()} == {p: sorted(keys) for p, keys in KEYS.items()}
    prefixed = {f"model.diffusion_model.{key}": shape for key, shape in TRANSFORMER.items()} | {"model_ema.decay": ()}
    assert split(held(tmp_path, prefixed)).rest == ["model_ema.decay"]


def test_formats_of_layers_go_with_their_part(tmp_path):
    parts = {f"transformer.layers.0.w.{leaf}": part for leaf, part in int8.encode(torch.ones(4, 8)).items()}
    parts |= {f"transformer.{key}": torch.ones(shape) for key, shape in TRANSFORMER.items()}
    save_file(
        parts | {f"vae.{key}": torch.ones(s) for key, s in VAE.items()}, tmp_path / "x", metadata={"scheme": "int8"}
    )
    found = split(open_checkpoint(tmp_path / "x"))
    assert set(found.parts["transformer"].schemes) == {"layers.0.w"} and not found.parts["vae"].schemes
    assert found.parts["transformer"].format("layers.0.w.weight") == "int8"


@pytest.mark.parametrize(
    "shapes, words",
    [
        ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "is a FLUX model"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (1,)}, "is a FLUX model"),
        ({"model.diffusion_model.label_emb.0.0.weight": (1,)}, "is Stable Diffusion XL"),
        ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (1,)}, "is a CLIP text encoder"),
        ({"model.diffusion_model.label_emb.0.0.weight": (1,), "first_stage_model.decoder.conv_in.bias": (8,),
          "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)}, "is Stable Diffusion XL: its VAE"),
        ({"decoder.conv_in.weight": (8, 4, 3, 3), "decoder.conv_in.bias": (8,)}, "latents of 4 channels"),
        ({"cap_embedder.0.weight": (2304,)}, "it is Lumina 2"),
        ({"cap_embedder.0.weight": (2560,)}, "such as Ming-Image"),
        (TRANSFORMER | {"dec_net.cond_embed.weight": (1,)}, "pixel-space derivative"),
        ({"model.layers.0.input_layernorm.weight": (8,)}, "another language model; needed Qwen3"),
        ({"layers.0.attention.to_q.lora_A.weight": (1,)}, "is an adapter .* add --lora FILE"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (1,)}, "is an adapter of FLUX, not a model"),
        ({"diffusion_model.layers.0.attention.qkv.lora_down.weight": (1,)}, "is an adapter"),
        ({"model.diffusion_model.layers.0.diff": (1,)}, "is an adapter"),
        ({"control_layers.0.after_proj.weight": (1,)}, "is a ControlNet of Z-Image"),
        ({"model.diffusion_model.something": (1,)}, "no part of a Z-Image model among its 1 tensors"),
        ({}, "among its 0 tensors"),
        (TRANSFORMER | VAE, "without prefixes that tell them apart"),
        (TRANSFORMER | {"layers.0.w.scales": (1,), "layers.0.w.biases": (1,)}, "form of Apple's MLX"),
    ],
)  # fmt: skip
def test_what_else_people_hold(shapes, words, tmp_path):
    with pytest.raises(CheckpointError, match=words) as error:
        split(held(tmp_path, shapes))
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_mlx_is_detected_before_its_packed_weights_are_taken_for_broken(tmp_path):
    """4 bits as mflux packs them: eight codes in a uint32, a scale and a bias every 64 inputs."""
    tensors = {key: torch.zeros(shape) for key, shape in TRANSFORMER.items()} | {
        "layers.0.w.weight": torch.zeros(8, 16, dtype=torch.uint32),
        "layers.0.w.scales": torch.zeros(8, 2, dtype=torch.bfloat16),
        "layers.0.w.biases": torch.zeros(8, 2, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "0.safetensors")
    with pytest.raises(CheckpointError, match="form of Apple's MLX"):
        open_checkpoint(tmp_path)


def test_mlx_without_quantization_is_detected_by_its_metadata(tmp_path):
    with pytest.raises(CheckpointError, match="form of Apple's MLX"):
        split(held(tmp_path, TRANSFORMER, mflux_version="0.13.0"))
