"""Layers in every format that others write: decoded as their own library decodes them, multiplied, and in a model.

The writers are in `producers`: comfy-kitchen, bitsandbytes, torchao and SDNQ themselves, or a documented packing.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from s3dit.kernels.linear import linear
from s3dit.weights.checkpoint import CheckpointError, open_checkpoint

# SDNQ would compile its few operations, for a minute.
os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
sys.path.insert(0, str(Path(__file__).parent))
from producers import FORMATS  # noqa: E402

# fp32 sums and products in another order than the library's: some ulp. SDNQ and comfy-kitchen rotate in fp32 matrices.
EXACT = 1e-6
LAYER = "layers.0.feed_forward.w1"


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def write(folder, name, layers, plain=None):
    """A file with these layers {name: weight} in a format, and plain tensors -> path, {layer: what it stands for}."""
    writer, library, config, _ = FORMATS[name]
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install 's3dit[test]'")
    tensors, metadata, expected = dict(plain or {}), {}, {}
    for layer, weight in layers.items():
        made, expected[layer], *said = writer(weight)
        tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in made.items()}
        for one in said:
            metadata |= {f"{layer}.{leaf}": text for leaf, text in one.items()}
    if name.startswith("old scaled"):
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder, expected


def parts_of(checkpoint, layer):
    return {key.rpartition(".")[2]: checkpoint.load(key) for key in checkpoint if key.startswith(f"{layer}.")}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_and_multiplied(name, tmp_path, monkeypatch):
    w = torch.randn(256, 384) * 0.05
    path, expected = write(tmp_path, name, {LAYER: w}, {"norm.weight": torch.ones(3).bfloat16()})
    checkpoint = open_checkpoint(path)
    scheme = checkpoint.schemes[LAYER]
    assert scheme.name == FORMATS[name][3] and list(checkpoint.schemes) == [LAYER]
    spec, parts = scheme.spec(256, 384), parts_of(checkpoint, LAYER)
    assert {part: (tuple(t.shape), t.dtype) for part, t in parts.items()} == spec
    assert {key: checkpoint.entry(key).nbytes for key in checkpoint if key.startswith(LAYER)} == {
        f"{LAYER}.{part}": tensor.nbytes for part, tensor in parts.items()
    }
    assert sorted(checkpoint) == sorted(["norm.weight", *(f"{LAYER}.{part}" for part in spec)])
    assert relative(scheme.decode(parts), expected[LAYER]) < EXACT
    # cut by rows, as fused layers are
    cut = {part: tensor[64:128] if len(tensor) != 1 else tensor for part, tensor in parts.items()}
    assert torch.equal(scheme.decode(cut), scheme.decode(parts)[64:128]) or "up" in parts
    assert relative(scheme.decode(cut), expected[LAYER][64:128]) < EXACT
    monkeypatch.setattr("s3dit.kernels.scheme.PIECE", 384 * 100)
    for wide, bound in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        x, bias = torch.randn(2, 9, 384).to(wide), torch.randn(256)
        exact = F.linear(x.double(), expected[LAYER], bias.double())
        # bf16: weight, rotated x and result are rounded once each, half a unit in the last of 8 bits
        for out in (linear(x, scheme, parts, bias), scheme.linear.reference(x, parts, bias)):
            assert out.dtype == wide and relative(out, exact) < bound
    # compressed: the parts take what their bits say, and not a float more
    assert sum(t.nbytes for key, t in parts.items() if key != "rotation") < 256 * 384 * 1.3
