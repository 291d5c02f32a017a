"""Configurations read from shapes are those of the JSON; what shapes cannot say is the model's own."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3dit.configs import infer_config as infer
from s3dit.errors import CheckpointError
from s3dit.model.part_specs import SPECS
from s3dit.model.text_encoder import TextEncoder
from s3dit.model.transformer import Transformer
from s3dit.model.vae import Autoencoder
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model
from s3dit.weights.checkpoint import Checkpoint, open_checkpoint
from s3dit.weights.container import Entry

MODULES = {"transformer": Transformer, "text_encoder": TextEncoder, "vae": Autoencoder}
PUBLISHED = {
    "transformer": infer.TRANSFORMER,
    "text_encoder": infer.TEXT_ENCODER,
    "vae": infer.VAE,
}


class Blank(Checkpoint):
    """The tensors of a module on the meta device."""

    def __init__(self, module):
        self.path, self.metadata, self._tensors = "meta", {}, module.state_dict()

    def keys(self):
        return list(self._tensors)

    def entry(self, name):
        return Entry(tuple(self._tensors[name].shape), "float32", self._tensors[name].nbytes)

    def load(self, name):
        raise AssertionError("a tensor was read")


def blank(part, config):
    with torch.device("meta"):
        return Blank(MODULES[part](config))


@pytest.mark.parametrize("part", MODULES)
def test_the_published_form(part):
    assert SPECS[part].infer(blank(part, PUBLISHED[part])) == PUBLISHED[part]


@pytest.mark.parametrize("part", MODULES)
def test_the_embedded_model(part):
    config = getattr(read_model(EMBEDDED), part)
    assert SPECS[part].infer(open_checkpoint(EMBEDDED / part), config) == config


def test_other_sizes():
    omni = replace(
        infer.TRANSFORMER,
        siglip_feat_dim=1152,
        n_layers=5,
        n_refiner_layers=1,
        dim=1920,
        n_heads=15,
        n_kv_heads=15,
    )
    assert infer.transformer(blank("transformer", omni)) == omni
    text = replace(
        infer.TEXT_ENCODER, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=96
    )
    assert infer.text_encoder(blank("text_encoder", text)) == text


@pytest.mark.parametrize("layers", [36, 35, 34, 37, 12])
def test_a_text_encoder_of_the_official_width(layers):
    """36 layers, or the 35 that are read; a file of fewer is one of several, of more another model's."""
    stored, notes = blank("text_encoder", replace(infer.TEXT_ENCODER, num_hidden_layers=layers)), []
    if layers in (35, 36):
        assert infer.text_encoder(stored, None, notes) == infer.TEXT_ENCODER and len(notes) == 36 - layers
        return
    with pytest.raises(CheckpointError, match=f"has {layers} layers, the model of its widths has 36"):
        infer.text_encoder(stored)


def test_what_is_counted_on_trust_is_noted():
    text = replace(infer.TEXT_ENCODER, num_hidden_layers=4, hidden_size=96)
    deep = replace(infer.TRANSFORMER, n_layers=28)
    assert infer.text_encoder(blank("text_encoder", text), None, notes := []) == text and "of 4 layers" in notes[0]
    assert infer.transformer(blank("transformer", deep), None, notes := []) == deep and "has 28 layers" in notes[0]
    infer.transformer(blank("transformer", infer.TRANSFORMER), None, notes := [])
    assert not notes


def test_layers_without_end():
    stored = blank("text_encoder", replace(infer.TEXT_ENCODER, num_hidden_layers=1))
    norm = stored._tensors["model.layers.0.input_layernorm.weight"]
    stored._tensors |= {f"model.layers.{i}.input_layernorm.weight": norm for i in range(300)}
    with pytest.raises(CheckpointError, match="are 300, of which no model has over 128"):
        infer.text_encoder(stored)


def test_metadata_of_gguf():
    stored = blank("text_encoder", infer.TEXT_ENCODER)
    stored.metadata = {
        "qwen3.rope.freq_base": "5000000.0",
        "qwen3.attention.layer_norm_rms_epsilon": "9.999999974752427e-07",
    }
    config = infer.text_encoder(stored)
    assert (config.rope_theta, config.rms_norm_eps) == (5e6, 1e-6)
    for wrong in ("nan", "-1", "1e300", "many"):
        stored.metadata = {"qwen3.rope.freq_base": wrong}
        with pytest.raises(CheckpointError, match="its metadata says qwen3.rope.freq_base"):
            infer.text_encoder(stored)


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("transformer", {"layers.0.attention_norm1.weight": None}, "attention_norm1.weight is missing"),
        ("transformer", {"layers.0.attention_norm1.weight": (100,)}, "do not go together"),
        ("transformer", {"layers.0.attention_norm1.weight": ()}, "is \\[\\]"),
        ("transformer", {"layers.9.extra": (1,)}, "layers has the numbers 0, 1, 2, 3, 4, 5, 9"),
        ("vae", {"encoder.down_blocks.0.resnets.0.conv1.bias": (15,)}, "do not divide"),
        ("text_encoder", {"model.layers.0.self_attn.q_norm.weight": (31,)}, "heads of 31 do not share"),
        ("text_encoder", {"model.layers.0.self_attn.k_proj.weight": (8, 128)}, "do not share 0"),
    ],
)
def test_shapes_that_are_no_models(part, change, words, tmp_path):
    tensors = {}
    for file in (EMBEDDED / part).glob("*.safetensors"):
        tensors |= load_file(file)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=words):
        SPECS[part].infer(open_checkpoint(tmp_path / "x.safetensors"))
