"""Mixing parts from the command line: the right picture, and one line for what does not go together."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.cli.main import main
from s3dit.errors import CheckpointError
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.sources import open_model, open_sources

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {part: next((EMBEDDED / part).glob("*.safetensors")) for part in ("transformer", "text_encoder", "vae")}
PROMPT = "a red star above a blue ring on a white background"


def run(*args):
    return main([str(arg) for arg in args])


def test_parts_named_on_the_command_line_draw_the_same(tmp_path):
    options = ("generate", PROMPT, "--steps", 1, "--seed", 3, "--device", "cpu", "--dtype", "fp32")
    parts = [word for part, path in WEIGHTS.items() for word in (f"--{part.replace('_', '-')}", path)]
    assert run(*options, "-o", tmp_path / "a.png") == 0
    assert (
        run(*options, "--model", EMBEDDED, *parts, "--tokenizer", EMBEDDED / "tokenizer", "-o", tmp_path / "b.png") == 0
    )
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))


def test_what_is_missing_is_named_with_its_option(capsys):
    assert run("plan", "x", "--transformer", WEIGHTS["transformer"], "--text-encoder", EMBEDDED / "text_encoder") == 2
    error = capsys.readouterr().err
    assert "--vae FILE --tokenizer DIR" in error and "--text-encoder FILE" not in error and error.count("\n") == 1
    assert run("plan", "x", "--model", WEIGHTS["transformer"]) == 2
    assert "holds transformer, not text_encoder, vae, tokenizer" in capsys.readouterr().err
    assert run("plan", "x", "--vae", "no/such.safetensors") == 2
    assert "no/such.safetensors" in capsys.readouterr().err


def test_widths_that_do_not_meet(tmp_path):
    """A transformer for another text encoder is refused before anything is read."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"cap_feat_dim": 128', '"cap_feat_dim": 96'))
    with pytest.raises(CheckpointError, match="takes text of width 96, the text encoder gives 128"):
        Pipeline.load(folder, device="cpu")


def test_a_folder_of_one_part_with_its_config():
    found = open_model(EMBEDDED / "vae")
    assert list(found.parts) == ["vae"] and found.configs["vae"].norm_num_groups == 2 and found.tokenizer is None


def test_the_embedded_model_is_no_home_for_strangers():
    """Where parts are given and no model, nothing of the embedded one is mixed in."""
    with pytest.raises(CheckpointError, match="not transformer, text_encoder, tokenizer"):
        open_sources(None, {"vae": EMBEDDED / "vae"}, None)
    sources = open_sources("embedded", {"vae": WEIGHTS["vae"]}, None)
    assert sources.mixed == ("vae",) and sources.config.variant == "tiny"


def test_convert_takes_adapters(tmp_path, capsys):
    """ComfyUI's fused name in, three official ones out; the directory that a model would be is refused."""
    down, up = torch.randn(4, 192), torch.randn(3 * 192, 4)
    stem = "diffusion_model.layers.0.attention.qkv"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, tmp_path / "a.safetensors")
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    products = [
        found[f"transformer.layers.0.attention.to_{letter}.lora_B.weight"]
        @ found[f"transformer.layers.0.attention.to_{letter}.lora_A.weight"]
        for letter in "qkv"
    ]
    assert torch.allclose(torch.cat(products), up @ down, rtol=1e-5, atol=1e-5)
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "folder") == 2
    assert "is an adapter" in capsys.readouterr().err and not (tmp_path / "folder").exists()
