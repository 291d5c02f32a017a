"""Both spellings of a Qwen3 text encoder end under the official names; nothing else is renamed."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from s3dit.errors import CheckpointError
from s3dit.kernels.int8 import int8
from s3dit.weights.assign import assign
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.keymap import detect, official

NAMES = ("model.embed_tokens.weight", "model.norm.weight")


@pytest.fixture(params=["model.", ""])
def checkpoint(request, tmp_path):
    save_file(
        {f"{request.param}{n.removeprefix('model.')}": torch.ones(2, 1) for n in NAMES}, tmp_path / "x.safetensors"
    )
    return open_checkpoint(tmp_path)


def test_both_spellings_read_alike(checkpoint):
    found = official(checkpoint, NAMES)
    assert sorted(found) == sorted(NAMES) and len(found) == 2 and NAMES[0] in found and "norm.weight" not in found
    assert found.entry(NAMES[0]).shape == (2, 1) and found.load(NAMES[1]).tolist() == [[1.0], [1.0]]
    assert found.rows(NAMES[0], torch.tensor([1])).shape == (1, 1)
    assert (found.path, found.metadata) == (checkpoint.path, checkpoint.metadata)


def test_unknown_name_under_either(checkpoint):
    """A stored key that is not an official name is unknown, too."""
    for ask in (official(checkpoint, NAMES).entry, official(checkpoint, NAMES).load):
        with pytest.raises(CheckpointError, match="no tensor 'model.nothing'"):
            ask("model.nothing")
    if "norm.weight" in checkpoint:
        with pytest.raises(CheckpointError, match="no tensor 'norm.weight'"):
            official(checkpoint, NAMES).entry("norm.weight")


def test_both_spellings_fill_a_model(checkpoint):
    with torch.device("meta"):
        parts = {part: nn.Linear(1, 2, bias=False) for part in ("embed_tokens", "norm")}
        model = nn.ModuleDict({"model": nn.ModuleDict(parts)})
    assign(model, checkpoint, dtype=torch.float32)
    assert model.state_dict()[NAMES[0]].tolist() == [[1.0], [1.0]]


def test_official_on_a_draw():
    assert detect(["a", "b"], ["c"]).name == "official"
    assert detect([], NAMES).name == "official"


def test_other_models_are_left_alone(checkpoint):
    assert official(checkpoint, ["layers.0.weight"]) is checkpoint


def quantized(path, layers, other):
    """A file of int8 layers (out, in) and of other tensors, as `s3dit quantize` writes it; and the weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {layer: torch.randn(size, generator=generator) for layer, size in layers.items()}
    parts = {f"{layer}.{leaf}": part for layer, w in weights.items() for leaf, part in int8.encode(w).items()}
    save_file(parts | other, path, metadata={"scheme": "int8"})
    return open_checkpoint(path), weights


def test_a_fused_quantized_layer_is_cut_by_rows(tmp_path):
    """q, k and v are views of the fused parts and decode to the rows of the fused weight."""
    layer, tell = "noise_refiner.0.attention", "noise_refiner.0.attention.q_norm.weight"
    checkpoint, weights = quantized(tmp_path / "x.safetensors", {f"{layer}.qkv": (12, 8)}, {tell: torch.ones(4)})
    found = official(checkpoint)
    assert set(found.schemes) == {f"{layer}.to_{letter}" for letter in "qkv"}
    for letter, rows in zip("qkv", weights[f"{layer}.qkv"].split(4), strict=True):
        parts = {leaf: found.load(f"{layer}.to_{letter}.{leaf}") for leaf in ("weight", "scale")}
        assert parts["weight"].shape == (4, 8) and parts["scale"].shape == (4, 1)
        assert torch.equal(int8.decode(parts), int8.decode(int8.encode(rows)))
        entry = found.entry(f"{layer}.to_{letter}.weight")
        assert (entry.shape, entry.dtype, entry.nbytes) == ((4, 8), "int8", 32)
        assert found.format(f"{layer}.to_{letter}.weight") == "int8"
    assert found.nbytes == checkpoint.nbytes


def test_a_part_shared_by_all_rows_is_not_cut(tmp_path):
    stem = "noise_refiner.0.attention"
    tensors = {
        f"{stem}.qkv.weight": torch.ones(6, 2),
        f"{stem}.qkv.factor": torch.ones(2),
        f"{stem}.qkv.s": torch.ones(()),
    }
    save_file(tensors | {f"{stem}.q_norm.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    found = official(open_checkpoint(tmp_path / "x.safetensors"))
    assert found.entry(f"{stem}.to_k.factor").shape == (2,) and found.load(f"{stem}.to_k.s").shape == ()
    assert found.load(f"{stem}.to_k.weight").shape == (2, 2)


def test_rows_that_do_not_divide(tmp_path):
    stem = "noise_refiner.0.attention"
    save_file(
        {f"{stem}.qkv.weight": torch.ones(7, 2), f"{stem}.q_norm.weight": torch.ones(2)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(CheckpointError, match="7 rows; needed a multiple of the 3 layers"):
        official(open_checkpoint(tmp_path / "x.safetensors")).load(f"{stem}.to_q.weight")


def test_two_names_of_one_tensor(tmp_path):
    names = ("x_embedder.weight", "all_x_embedder.2-1.weight", "noise_refiner.0.attention.q_norm.weight")
    save_file({name: torch.ones(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="are two names of"):
        official(open_checkpoint(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("spelling", ["official", "llama.cpp"])
def test_a_quantized_embedding_is_read_by_rows(spelling, tmp_path):
    """Only the rows that are asked for are decoded; a model that reads by rows takes the file as it is."""
    layer, norm = {
        "official": ("model.embed_tokens", "model.layers.0.input_layernorm.weight"),
        "llama.cpp": ("token_embd", "blk.0.attn_norm.weight"),
    }[spelling]
    checkpoint, weights = quantized(tmp_path / "x.safetensors", {layer: (32, 8)}, {norm: torch.ones(8)})
    found, ids = official(checkpoint), torch.tensor([31, 0, 31])
    rows = found.rows("model.embed_tokens.weight", ids)
    assert rows.dtype == torch.float32 and torch.equal(rows, int8.decode(int8.encode(weights[layer]))[ids])
    with pytest.raises(CheckpointError, match="it has 32"):
        found.rows("model.embed_tokens.weight", torch.tensor([32]))
    with torch.device("meta"):
        layers = nn.ModuleList([nn.ModuleDict({"input_layernorm": nn.LayerNorm(8, bias=False)})])
        model = nn.ModuleDict({"model": nn.ModuleDict({"embed_tokens": nn.Embedding(32, 8), "layers": layers})})
    assign(model, checkpoint, dtype=torch.float32, unused=("model.embed_tokens.*",))
    assert model.state_dict()["model.layers.0.input_layernorm.weight"].tolist() == [1.0] * 8
