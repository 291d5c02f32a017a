"""Adapters written anew say what they said: the same change of every layer, in official names or ComfyUI's."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from s3dit.cli.main import main
from s3dit.errors import CheckpointError
from s3dit.weights.adapter import read_adapter
from s3dit.weights.adapter_info import METADATA
from s3dit.weights.convert_adapter import convert_adapter

OUT, IN = 24, 8


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(1)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype)


def lora(random, stem, out=OUT, rank=3, dtype=torch.float32):
    return {
        f"{stem}.lora_down.weight": random(rank, IN, dtype=dtype),
        f"{stem}.lora_up.weight": random(out, rank, dtype=dtype),
    }


@pytest.fixture
def source(random, tmp_path):
    """Something of every kind, in two dialects."""
    block = "lora_unet_layers_0"
    tensors = {
        **lora(random, f"{block}_attention_qkv", 3 * OUT), f"{block}_attention_qkv.alpha": torch.tensor(2.0),
        **lora(random, f"{block}_attention_out", dtype=torch.bfloat16),
        f"{block}_attention_out.alpha": torch.tensor(1.0),
        **lora(random, f"{block}_feed_forward_w1"), f"{block}_feed_forward_w1.dora_scale": random(OUT, 1).abs(),
        **lora(random, f"{block}_feed_forward_w2"), f"{block}_feed_forward_w2.dora_scale": random(1, IN).abs(),
        **{f"{block}_feed_forward_w3.hada_w{i}_{ab}": random(*((OUT, 2) if ab == "a" else (2, IN)))
           for i in (1, 2) for ab in "ab"},
        f"{block}_feed_forward_w3.alpha": torch.tensor(1.0),
        "diffusion_model.layers.1.attention.to_q.lokr_w1": random(6, 2),
        "diffusion_model.layers.1.attention.to_q.lokr_w2_a": random(4, 2),
        "diffusion_model.layers.1.attention.to_q.lokr_w2_b": random(2, 4),
        "diffusion_model.layers.1.attention.to_q.alpha": torch.tensor(1.0),
        "diffusion_model.layers.1.attention.to_k.diff": random(OUT, IN),
        "diffusion_model.layers.1.attention.to_v.set_weight": random(OUT, IN),
        "diffusion_model.x_embedder.diff_b": random(OUT),
        "diffusion_model.layers.1.attention.q_norm.diff": random(IN),
        **lora(random, "lora_te_layers_0_self_attn_q_proj"),
    }  # fmt: skip
    path = tmp_path / "source.safetensors"
    save_file(tensors, path, {"ss_network_dim": "3"})
    return path


def same(one, other):
    """Two Deltas of one layer: the change, bit for bit, and everything beside it."""
    assert (one.term is None) == (other.term is None) and one.replaces == other.replaces
    # The same numbers in the same order, but for a cut before or after the product: 1e-6.
    assert one.term is None or torch.allclose(one.term.dense(), other.term.dense(), rtol=1e-6, atol=1e-6)
    for a, b in ((one.bias, other.bias), (one.magnitude, other.magnitude)):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("spelling", ["official", "comfyui"])
def test_converted_says_the_same(source, tmp_path, spelling):
    target = tmp_path / "target.safetensors"
    convert_adapter(source, target, version="9.9", spelling=spelling)
    before, after = read_adapter(source), read_adapter(target)
    assert not after.unmatched and not after.misshapen and not after.redundant
    assert {part: set(deltas) for part, deltas in before.deltas.items()} == {
        part: set(deltas) for part, deltas in after.deltas.items()
    }
    for part, deltas in before.deltas.items():
        for layer, delta in deltas.items():
            same(after.deltas[part][layer], delta)
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "s3dit": "9.9",
        "ss_network_dim": "3",
        "source": "sha256:" + hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.safetensors", "target.safetensors"]


def test_names_of_the_official_form(source, tmp_path):
    convert_adapter(source, tmp_path / "target.safetensors", version="1")
    stored = load_file(tmp_path / "target.safetensors")
    for one in ("to_q", "to_k", "to_v", "to_out.0"):
        assert stored[f"transformer.layers.0.attention.{one}.lora_A.weight"].shape == (3, IN)
        assert stored[f"transformer.layers.0.attention.{one}.lora_B.weight"].shape == (OUT, 3)
    assert stored["transformer.layers.0.feed_forward.w1.lora_magnitude_vector"].shape == (OUT,)
    assert stored["transformer.layers.0.feed_forward.w2.dora_scale"].shape == (1, IN)
    assert "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight" in stored
    assert not [name for name in stored if name.endswith("alpha") or "qkv" in name or not name.startswith("t")]
    # 1/3 of bf16 numbers are none; 1/4 would be.
    assert stored["transformer.layers.0.attention.to_out.0.lora_B.weight"].dtype == torch.float32
    assert stored["transformer.layers.0.attention.to_out.0.lora_A.weight"].dtype == torch.bfloat16


def test_names_of_comfyui_with_q_k_v_as_one(source, random, tmp_path):
    convert_adapter(source, tmp_path / "target.safetensors", version="1", spelling="comfyui")
    stored = load_file(tmp_path / "target.safetensors")
    # Three of rank 3 along a diagonal.
    assert stored["diffusion_model.layers.0.attention.qkv.lora_A.weight"].shape == (9, IN)
    assert stored["diffusion_model.layers.0.attention.qkv.lora_B.weight"].shape == (3 * OUT, 9)
    assert "diffusion_model.layers.0.attention.out.lora_A.weight" in stored
    # A new weight of v alone is nothing that one matrix could say.
    assert "diffusion_model.layers.1.attention.to_v.set_weight" in stored
    assert "diffusion_model.x_embedder.diff_b" in stored and "diffusion_model.layers.1.attention.q_norm.diff" in stored
    assert "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj.lora_B.weight" in stored


def test_a_strength_of_the_header_is_not_said_twice(random, tmp_path):
    tensors = {
        "transformer.layers.0.attention.to_q.lora_A.weight": random(2, IN),
        "transformer.layers.0.attention.to_q.lora_B.weight": random(OUT, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors", {METADATA: json.dumps({"transformer.lora_alpha": 6})})
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", version="1")
    one, other = (read_adapter(tmp_path / f"{name}.safetensors").deltas["transformer"] for name in "ab")
    for layer, delta in one.items():
        same(other[layer], delta)


def test_what_is_refused_writes_nothing(source, random, tmp_path):
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_adapter(source, target, version="1")
    for odd in (tmp_path / "x.bin", tmp_path / "no" / "x.safetensors"):
        with pytest.raises(CheckpointError, match="in a folder that exists"):
            convert_adapter(source, odd, version="1")
    save_file(load_file(source) | lora(random, "unknown.layer"), source)
    with pytest.raises(CheckpointError, match=r"1 of its layers cannot be converted \(unknown\.layer\)"):
        convert_adapter(source, target, version="1", force=True)
    assert target.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2


def test_command_line(source, tmp_path, capsys):
    target = tmp_path / "target.safetensors"
    assert main(["convert", str(source), str(target), "--dtype", "bf16"]) == 2 and not target.exists()
    assert "dtype is 'bf16'; an adapter keeps its numbers as stored" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "folder")]) == 2
    assert "is an adapter" in (err := capsys.readouterr().err) and "convert it to a *.safetensors" in err
    assert main(["convert", str(source), str(target)]) == 0 and capsys.readouterr().out == f"{target}\n"


def test_a_full_disk_leaves_nothing_half_written(source, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s3dit.weights.convert_adapter.write_safetensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        convert_adapter(source, tmp_path / "target.safetensors", version="1")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]
