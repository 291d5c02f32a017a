"""Where stored keys belong; what comes of them is tested on a model (test_lora.py)."""

import pytest

from s3dit.weights import dialects


def found(key):
    layer, role = dialects.split_key(key)
    place = dialects.place(layer)
    return None if place is None else (place.part, place.layers, role)


CASES = {
    "transformer.layers.29.attention.to_q.lora_A.weight": ("transformer", "layers.29.attention.to_q", "down"),
    "layers.0.attention.to_k.lora_B.my-style.weight": ("transformer", "layers.0.attention.to_k", "up"),
    "lora_unet_layers_0_attention_to_out_0.alpha": ("transformer", "layers.0.attention.to_out.0", "alpha"),
    "lora_unet_context_refiner_1_feed_forward_w2.lora_up.weight": (
        "transformer",
        "context_refiner.1.feed_forward.w2",
        "up",
    ),
    "lora_unet_noise_refiner_0_adaLN_modulation_0.dora_scale": (
        "transformer",
        "noise_refiner.0.adaLN_modulation.0",
        "magnitude",
    ),
    "lora_unet_all_final_layer_2-1_adaLN_modulation_1.lora_down.weight": (
        "transformer",
        "all_final_layer.2-1.adaLN_modulation.1",
        "down",
    ),
    "context.refiner.0.attention.to.v.lora.alpha": ("transformer", "context_refiner.0.attention.to_v", "alpha"),
    "transformer.layers.0.attention.processor.to_out_lora.up.weight": (
        "transformer",
        "layers.0.attention.to_out.0",
        "up",
    ),
    "diffusion_model.siglip_refiner.1.attention.out.lokr_w2_b": (
        "transformer",
        "siglip_refiner.1.attention.to_out.0",
        "lokr_w2_b",
    ),
    "base_model.model.siglip_embedder.1.lora_magnitude_vector": ("transformer", "siglip_embedder.1", "magnitude"),
    "diffusion_model.cap_pad_token.diff": ("transformer", "cap_pad_token", "diff"),
    "text_encoder.model.layers.3.mlp.up_proj.lora_A.weight": ("text_encoder", "model.layers.3.mlp.up_proj", "down"),
    "lora_te_layers_3_self_attn_q_proj.lora_down.weight": ("text_encoder", "model.layers.3.self_attn.q_proj", "down"),
    "lora_te1_model_layers_3_self_attn_o_proj.hada_w1_a": (
        "text_encoder",
        "model.layers.3.self_attn.o_proj",
        "hada_w1_a",
    ),
    "text_encoders.qwen3_4b.transformer.model.layers.0.input_layernorm.w_norm": (
        "text_encoder",
        "model.layers.0.input_layernorm",
        "diff",
    ),
    "text_encoders.layers.0.mlp.gate_proj.lora_B.weight": ("text_encoder", "model.layers.0.mlp.gate_proj", "up"),
}


@pytest.mark.parametrize("key", CASES)
def test_keys_find_their_layer(key):
    part, layer, role = CASES[key]
    assert found(key) == (part, (layer,), role)


def test_fused_layers_are_several():
    qkv = tuple(f"layers.7.attention.to_{one}" for one in "qkv")
    assert found("lora_unet_layers_7_attention_qkv.lora_down.weight") == ("transformer", qkv, "down")
    assert dialects.place("layers.7.feed_forward.w13").layers == (
        "layers.7.feed_forward.w3",
        "layers.7.feed_forward.w1",
    )


def test_official_spellings_are_marked():
    assert dialects.place("lora_unet_layers_0_attention_to_q").is_official
    assert not dialects.place("layers.0.attention.out").is_official


@pytest.mark.parametrize(
    "key", ["layers.0.attention.to_q.weight", "lora", "", "alpha", "x.lora_A", "a.lora_A.b.c.weight"]
)
def test_what_is_no_adapters_key(key):
    assert dialects.split_key(key) is None


@pytest.mark.parametrize(
    "layer",
    [
        "layers.x.attention.to_q",
        "layers.0.attention.to_z",
        "decoder.conv_in",
        "",
        "transformer.",
        "layers.0.to_q",
        # What the prefix says is not the part that has such a layer.
        "text_encoder.layers.0.attention.to_q",
        "lora_te1_layers_0_attention_to_q",
        "diffusion_model.model.layers.0.self_attn.q_proj",
        "base_model.model.lora_unet_layers_0_mlp_up_proj",
    ],
)
def test_what_no_part_has(layer):
    assert dialects.place(layer) is None


def test_no_two_layers_share_a_spelling():
    """One flat spelling is one layer: else a file would be read as something else than it says."""
    for table in (dialects.BLOCK_LAYERS, dialects.OUTSIDE_BLOCKS):
        spellings = [dialects.flatten_path(one) for name, others in table.items() for one in (name, *others)]
        assert len(spellings) == len(set(spellings))
    assert not {dialects.flatten_path(name) for name in dialects.FUSED_LAYERS} & set(
        dialects._spellings(dialects.BLOCK_LAYERS)
    )


FAMILIES = {
    "FLUX": [
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_mod_lin.alpha",
    ],
    "SDXL": ["lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.alpha", "lora_te2_text_model_x.alpha"],
    "Qwen-Image": ["transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight"],
    "Stable Diffusion 3": ["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight"],
    "Stable Diffusion": ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha"],
    "Wan": ["diffusion_model.blocks.0.cross_attn.q.lora_A.weight"],
    None: ["something.else.lora_A.weight"],
}


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, keys in FAMILIES.items() for key in keys])
def test_adapters_of_other_models_are_known(family, key):
    assert dialects.family([key]) == family
