"""Files of other producers in a whole pipeline: encoded prompts and velocities are those of the plain weights."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.errors import CheckpointError
from s3dit.weights.quantize import quantize

# SDNQ would compile its few operations, for a minute.
os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weights"))
from producers import FORMATS  # noqa: E402

DRAW = {"prompt": "a red star above a blue ring", "seed": 3, "height": 64, "width": 96, "num_inference_steps": 2}


def load(*args, **options):
    return Pipeline.load(*args, device="cpu", dtype="fp32", **options)


def velocity(pipe):
    return [step.velocity.clone() for step in pipe.stream(**DRAW)][-1]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def rewrite(source, target, name, chosen):
    """A part with the layers that `chosen` takes in a format, in one file; and with what they stand for, in another."""
    writer, library, _, _ = FORMATS[name]
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install 's3dit[test]'")
    plain = {key: tensor.float() for file in source.glob("*.safetensors") for key, tensor in load_file(file).items()}
    coded, count = dict(plain), 0
    for key in [key for key, tensor in plain.items() if key.endswith(".weight") and tensor.dim() == 2]:
        layer = key.removesuffix(".weight")
        if chosen(layer):
            tensors, expected = writer(coded.pop(key))
            coded |= {f"{layer}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}
            plain[key], count = expected.float().contiguous(), count + 1
    assert count > 5
    files = target / "coded.safetensors", target / "plain.safetensors"
    for tensors, file in zip((coded, plain), files, strict=True):
        save_file(tensors, file, {"format": "pt"})
    return files


@pytest.mark.parametrize("name", ["comfy float8_e4m3fn", "comfy nvfp4", "bnb nf4 nested", "fp8 rows", "e5m2 cast"])
@pytest.mark.sampled(1)
def test_a_text_encoder(name, official_dir, tmp_path):
    """The embedding too where that is a cast, or has a scale a row; the last layer is never computed."""
    embedding = name in ("e5m2 cast", "fp8 rows", "comfy float8_e4m3fn")
    coded, plain = rewrite(
        official_dir / "text_encoder", tmp_path, name, lambda layer: embedding or "embed_tokens" not in layer
    )
    found, expected = (load(official_dir, text_encoder=file) for file in (coded, plain))
    assert found.parts.formats["text_encoder"] == FORMATS[name][3] and not expected.parts.formats["text_encoder"]
    prompts = ["a red star", "a blue ring on a white background"]
    for one, other in zip(found.encode(prompts), expected.encode(prompts), strict=True):
        # fp32 sums in another order, through two layers
        assert relative(one, other) < 1e-5


def blocks(layer):
    """All matrices of the repeated blocks."""
    return layer.startswith(("layers.", "noise_refiner.")) and "adaLN" not in layer


@pytest.mark.parametrize("name", ["comfy mxfp8", "comfy int8 convrot", "e4m3 cast"])
@pytest.mark.sampled(1)
def test_a_transformer_resident_and_streamed(name, official_dir, tmp_path):
    coded, plain = rewrite(official_dir / "transformer", tmp_path, name, blocks)
    expected = velocity(load(official_dir, transformer=plain))
    pipe = load(official_dir, transformer=coded, residency="resident")
    found = velocity(pipe)
    assert relative(found, expected) < 1e-5
    assert pipe.parts.formats["transformer"] == FORMATS[name][3]
    assert torch.equal(velocity(load(official_dir, transformer=coded, residency="streamed")), found)


def test_what_is_quantized_is_not_quantized_again(official_dir, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for part in official_dir.iterdir():
        if part.name != "transformer":
            (model / part.name).symlink_to(part)
    (model / "transformer").mkdir()
    coded, plain = rewrite(official_dir / "transformer", model / "transformer", "e4m3 cast", blocks)
    plain.unlink()
    (model / "transformer" / "config.json").write_bytes((official_dir / "transformer" / "config.json").read_bytes())
    from s3dit.kernels.schemes import SCHEMES

    with pytest.raises(CheckpointError, match="is fp8-weights already; needed the unquantized files"):
        quantize(model, tmp_path / "smaller", {"transformer": SCHEMES["int8"]}, version="0")
    with pytest.raises(CheckpointError, match="is fp8-weights already, int8 was asked for"):
        load(model, quantize="int8")
