"""Our modules at full size carry the names and shapes of the official files, on the meta device: nothing is allocated.

The hash is that of DiffSynth-Studio, md5 of the comma-joined sorted list that has, for every tensor, "name:shape" and
"name"; its table was made from the published files, so agreement is agreement with them.
"""

import hashlib

import pytest
import torch

from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig
from s3dit.model.text_encoder import TextEncoder
from s3dit.model.transformer import Transformer
from s3dit.model.vae import Autoencoder

# The published config.json files, those keys that are read.
TEXT = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
}  # fmt: skip
TRANSFORMER = {
    "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 3840, "n_layers": 30,
    "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 2560,
    "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48],
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2, "norm_num_groups": 32, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip

# part: module, config, tensors, parameters, hash.
PARTS = {
    "text_encoder": (TextEncoder, TextEncoderConfig, TEXT, 398, 4_022_468_096, "0f050f62a88876fea6eae0a18dac5a2e"),
    "transformer": (
        Transformer, TransformerConfig, TRANSFORMER, 521, 6_154_908_736, "fc3a8a1247fe185ce116ccbe0e426c28"
    ),
    "omni": (
        Transformer, TransformerConfig, TRANSFORMER | {"siglip_feat_dim": 1152}, 551, 6_513_266_880,
        "aa3563718e5c3ecde3dfbb020ca61180",
    ),
    "vae": (Autoencoder, VAEConfig, VAE, 244, 83_819_683, "1aafa3cc91716fb6b300cc1cd51b85a3"),
}  # fmt: skip


def structure(shapes):
    """The structural hash of name -> shape."""
    words = []
    for name, shape in shapes.items():
        words += [f"{name}:{'_'.join(map(str, shape))}", name]
    return hashlib.md5(",".join(sorted(words)).encode()).hexdigest()


@pytest.fixture(scope="module", params=PARTS)
def part(request):
    module, config, data, *needed = PARTS[request.param]
    with torch.device("meta"):
        built = module(config.from_json(data, f"{request.param}/config.json"))
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}, needed


def test_structure_is_the_official_one(part):
    shapes, (tensors, parameters, digest) = part
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    assert structure(shapes) == digest


def test_hash_sees_a_name_and_a_shape(part):
    shapes, (*_, digest) = part
    name, shape = next(iter(shapes.items()))
    assert structure(shapes | {name: (*shape, 1)}) != digest
    assert structure({f"x{name}" if n == name else n: s for n, s in shapes.items()}) != digest
