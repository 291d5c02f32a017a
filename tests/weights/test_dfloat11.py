"""DFloat11: files of its own encoder, and of one written after the format, give every bit of the bf16 weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.cli.convert_model import convert
from s3dit.errors import CheckpointError
from s3dit.kernels.dispatch import INTERPRETED
from s3dit.kernels.dfloat11 import decode_exponents, launch_decode
from s3dit.runtime.sources import open_model
from s3dit.weights.checkpoint import open_checkpoint, open_stored
from s3dit.weights.formats import producer
from s3dit.weights.keymap import official

sys.path.insert(0, str(Path(__file__).parent))
from dfloat11_files import compress, compress_with_dfloat11  # noqa: E402

BLOCK = {
    "attention.to_q": (32, 32), "attention.to_k": (32, 32), "attention.to_v": (32, 32), "attention.to_out.0": (32, 32),
    "feed_forward.w1": (96, 32), "feed_forward.w2": (32, 96), "feed_forward.w3": (96, 32),
    "adaLN_modulation.0": (128, 16),
}  # fmt: skip
DRAW = {"prompt": "a red star above a blue ring", "seed": 3, "height": 64, "width": 64, "num_inference_steps": 2}


def drawn(out, in_, scale=0.02):
    return (torch.randn(out, in_) * scale).bfloat16()


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def same(a, b):
    return a.dtype == b.dtype == torch.bfloat16 and torch.equal(bits(a), bits(b))


def parts_of(checkpoint, layer):
    return {key.rpartition(".")[2]: checkpoint.load(key) for key in checkpoint if key.rpartition(".")[0] == layer}


def decoded(checkpoint, layer):
    """The weight of a layer, from fp32 to bf16, which rounds nothing away."""
    return checkpoint.schemes[layer].decode(parts_of(checkpoint, layer)).bfloat16()


def block(weights, encoder=compress, group="layers.0", norm="attention.norm_q"):
    """The tensors of a block of a file, of its weights {layer: weight}."""
    tensors = {f"{group}.{leaf}": tensor for leaf, tensor in encoder(list(weights.values())).items()}
    tensors[f"{group}.attention_norm1.weight"] = tensors[f"{group}.{norm}.weight"] = torch.ones(32).bfloat16()
    if "adaLN_modulation.0" in weights:
        tensors[f"{group}.adaLN_modulation.0.bias"] = torch.zeros(128).bfloat16()
    return tensors


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_a_block_of_its_own_encoder(tmp_path):
    """Zeros of both signs, subnormals and the largest that has a code are among the weights."""
    pytest.importorskip("dfloat11", reason="needs DFloat11's encoder: pip install 's3dit[test]'")
    weights = {name: drawn(*shape) for name, shape in BLOCK.items()}
    weights["attention.to_k"].view(-1)[:6] = torch.tensor([0.0, -0.0, 1e-40, -9e-41, 2.0**112, -1e-30])
    tensors = block(weights, compress_with_dfloat11)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert list(checkpoint.schemes) == [f"layers.0.{name}" for name in weights]
    for name, weight in weights.items():
        assert same(decoded(checkpoint, f"layers.0.{name}"), weight), name
    assert producer(open_stored(tmp_path / "model.safetensors")) == "DFloat11"
    stored = sum(tensor.nbytes for leaf, tensor in tensors.items() if leaf.count(".") == 2)
    assert stored < 0.8 * sum(2 * weight.numel() for weight in weights.values()), "tables weigh in a block so small"


def test_many_blocks_of_codes_and_long_codes(tmp_path):
    """A layer begins and ends inside blocks, several pieces are decoded, and codes take up to 32 bits.

    The last column holds 40 codes of a bit and more a run, the other end one code in four runs.
    """
    narrow = (2.0 ** torch.randint(-9, 9, (300, 256)).float() * torch.randn(300, 256).sign()).bfloat16()
    exponents = range(118, 136)
    long = {exponent: "1" * i + "0" for i, exponent in enumerate(exponents)}
    long |= {117 - i: "1" * 18 + f"{i:014b}" for i in range(8)}
    narrow[0, ::3] = 2.0**-14
    for weights, coded in (((drawn(700, 768), drawn(900, 768)), None), ((narrow, drawn(640, 256, 1.0)), long)):
        shapes = [weight.shape for weight in weights]
        mild = [weight.float().abs().clamp(2.0**-17, 2.0**8).bfloat16() if coded else weight for weight in weights]
        save_file(
            {f"time.{leaf}": tensor for leaf, tensor in compress(mild, coded).items()}
            | {f"time.{i}.bias": torch.zeros(shape[0]).bfloat16() for i, shape in enumerate(shapes)},
            tmp_path / "model.safetensors",
        )
        config = {"threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": {"time": ["0", "1"]}}
        (tmp_path / "config.json").write_text(json.dumps({"dfloat11_config": config}))
        checkpoint = open_checkpoint(tmp_path)
        for i, weight in enumerate(mild):
            assert same(decoded(checkpoint, f"time.{i}"), weight)
            ids = torch.tensor([3, 0, 299, 3])
            assert same(checkpoint.rows(f"time.{i}.weight", ids), weight[ids])
        assert checkpoint.rows("time.1.weight", ids[:0]).shape == (0, shapes[1][1])
