"""One GGUF file, written by gguf-py, through diffusers' GGUF quantizer and through ours: the same velocity.

The layers of the blocks take turns among all types of blocks; the names are ComfyUI's, as published files have them.
diffusers decodes in fp16. Here scales are powers of two and no number needs more than 11 bits, so that fp16 is exact;
what is left are fp32 sums in another order: 1e-5. That ours decodes any file exactly is held to gguf-py elsewhere.
"""

import json
import math

import numpy as np
import pytest
import torch

from s3dit.errors import CheckpointError
from s3dit.kernels.gguf import BLOCKS, GGUF
from s3dit.model.config import TransformerConfig
from s3dit.model.layout import patchify, text_to_image
from s3dit.model.linear import QuantLinear, swap
from s3dit.model.transformer import Transformer
from s3dit.weights.assign import assign
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.keymap import official

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install 's3dit[test]'")
gguf = pytest.importorskip("gguf", reason="GGUF files are made by gguf-py: pip install 's3dit[test]'")

# 768 = 3 · 256, which K-quants need, in heads of 32.
SIZES = {
    "dim": 768, "n_heads": 24, "n_kv_heads": 24, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 64,
    "axes_dims": [8, 12, 12], "axes_lens": [1536, 512, 512],
}  # fmt: skip
TO_COMFY = ((".to_out.0.", ".out."), (".norm_q.", ".q_norm."), (".norm_k.", ".k_norm."), ("all_x_embedder.2-1.",
            "x_embedder."), ("all_final_layer.2-1.", "final_layer."))  # fmt: skip


def blocks(kind, out, in_):
    """Random blocks whose numbers have a spread of about in_^-0.5, each of at most 11 bits times a power of two."""
    block = BLOCKS[kind]
    rows = torch.randint(0, 256, (out * in_ // block.elements, block.bytes), dtype=torch.uint8)
    if kind == "Q6_K":
        rows[:, 192:208] = torch.randint(-63, 64, (len(rows), 16), dtype=torch.int8).view(torch.uint8)
    if kind == "IQ4_XS":
        # two bits of every scale are 1 or 2: scales from -16 to 15
        rows[:, 2:4] = sum(torch.randint(1, 3, (len(rows), 2), dtype=torch.uint8) << 2 * i for i in range(4))
    unit = 1.0
    for _ in range(2):
        least = {"Q4_1": -8, "Q5_1": -16}.get(kind, 1)
        for at, factor in zip(block.scales, (1, least), strict=False):
            rows[:, at : at + 2] = torch.tensor([unit * factor]).half().view(torch.uint8)
        spread = float(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind]).std())
        unit *= 2.0 ** round(math.log2(in_**-0.5 / spread))
    return rows.view(out, -1).numpy()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A transformer in every type, with its config beside it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gguf")
    with torch.device("meta"):
        model = diffusers.ZImageTransformer2DModel(**SIZES)
    (folder / "config.json").write_text(json.dumps(dict(model.config)))
    writer = gguf.GGUFWriter(folder / "model.gguf", "lumina2")
    kinds = [*BLOCKS, "F16", "BF16"]
    count = 0
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for block in sorted({name.partition(".attention.to_q.")[0] for name in state if ".attention.to_q." in name}):
        state[f"{block}.attention.qkv.weight"] = (3 * 768, 768)
        for leaf in "qkv":
            del state[f"{block}.attention.to_{leaf}.weight"]
    for name, shape in state.items():
        for old, new in TO_COMFY:
            name = name.replace(old, new)
        if len(shape) == 2 and name.startswith(("layers.", "noise_refiner.")) and name.endswith(".weight"):
            kind, count = kinds[count % len(kinds)], count + 1
            if kind in BLOCKS:
                writer.add_tensor(name, blocks(kind, *shape), raw_dtype=gguf.GGMLQuantizationType[kind])
                continue
            wide = torch.randn(shape) * shape[1] ** -0.5
            kept = wide.half() if kind == "F16" else wide.bfloat16()
            raw = kept.numpy() if kind == "F16" else kept.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            wide = torch.randn(shape) * (0.1 if len(shape) == 1 else shape[1] ** -0.5)
            writer.add_tensor(name, (wide + ("norm" in name and len(shape) == 1)).numpy().astype(np.float32))
    assert count > len(kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 10, 14, generator=generator), torch.randn(9, 64, generator=generator)


def ours(path, inputs):
    latents, text = inputs
    config = TransformerConfig.from_json(json.loads((path.parent / "config.json").read_text()), "config.json")
    stored = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(config)
        for name, scheme in official(stored, model.state_dict()).schemes.items():
            swap(model, scheme, name.__eq__)
    assign(model, stored, dtype=torch.float32, unused=("norm_final.weight",))
    with torch.no_grad():
        context = model.context(text_to_image([(5, 7)], [9]), text)
        return model, model(patchify(latents[:, 0]), torch.tensor([0.3]), context)


@pytest.mark.slow
def test_velocity_is_that_of_diffusers(path, inputs):
    theirs = diffusers.ZImageTransformer2DModel.from_single_file(
        str(path), config=str(path.parent), torch_dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    latents, text = inputs
    with torch.no_grad():
        expected = theirs([latents], torch.tensor([0.3]), [text], return_dict=False)[0][0]
    model, found = ours(path, inputs)
    used = {module.scheme.name for module in model.modules() if isinstance(module, QuantLinear)}
    assert used == set(GGUF)
    expected = patchify(expected[:, 0].double())
    assert ((found.double() - expected).norm() / expected.norm()) < 1e-5


def test_it_stays_compressed(path):
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.schemes) < {name.removesuffix(".weight") for name in checkpoint}
    for layer, scheme in checkpoint.schemes.items():
        assert checkpoint.entry(f"{layer}.weight").dtype == "uint8" and scheme.name in BLOCKS
    assert checkpoint.nbytes < path.stat().st_size
    # a view of the mapped file
    first = checkpoint.load(f"{layer}.weight")
    assert first.data_ptr() == checkpoint.load(f"{layer}.weight").data_ptr()


def one(path, name, data, kind):
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


def test_rows_of_an_embedding(tmp_path):
    data = blocks("Q6_K", 40, 512)
    checkpoint = one(tmp_path / "x.gguf", "token_embd.weight", data, "Q6_K")
    ids = torch.tensor([7, 0, 39, 7])
    expected = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q6_K))[ids]
    assert torch.equal(checkpoint.rows("token_embd.weight", ids), expected)


def test_a_tensor_that_is_no_layer_is_made_plain(tmp_path):
    data = blocks("Q8_0", 6, 32).reshape(2, 3, 34)
    checkpoint = one(tmp_path / "x.gguf", "conv", data, "Q8_0")
    assert checkpoint.entry("conv").shape == (2, 3, 32) and not checkpoint.schemes
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(checkpoint.load("conv"), torch.from_numpy(expected))


def test_what_is_refused(tmp_path):
    data = blocks("Q5_1", 6, 32)
    data[3, 2:4] = np.array([np.nan], dtype=np.float16).view(np.uint8)
    checkpoint = one(tmp_path / "x.gguf", "a.weight", data, "Q5_1")
    with pytest.raises(CheckpointError, match="a: weight holds NaN or infinity"):
        checkpoint.load("a.weight")
    with pytest.raises(CheckpointError, match="a.weight is in GGUF's IQ2_XS; needed one of Q4_0"):
        one(tmp_path / "y.gguf", "a.weight", np.zeros((2, 74), dtype=np.uint8), "IQ2_XS")
