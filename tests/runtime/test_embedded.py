"""The embedded models: what the base one has of its own and what it shares, by every door."""

import json
from hashlib import sha256

import numpy as np
import pytest
import torch

from s3dit import Pipeline
from s3dit.cli.main import main
from s3dit.inputs.image_metadata import read_metadata
from s3dit.runtime.embedded import EMBEDDED, EMBEDDED_BASE, FOLDERS
from s3dit.runtime.sources import open_sources
from s3dit.weights.checkpoint import open_checkpoint

PROMPT = "a red star above a blue ring on a white background"


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load("embedded-base", device="cpu", dtype="fp32")


def test_it_has_its_own_transformer_and_shares_the_rest():
    sources, other = open_sources("embedded-base", {}, None), open_sources("embedded", {}, None)
    assert {part: found.path.parent for part, found in sources.checkpoints.items()} == {
        "transformer": EMBEDDED_BASE / "transformer",
        "text_encoder": EMBEDDED / "text_encoder",
        "vae": EMBEDDED / "vae",
    }
    assert sources.tokenizer == other.tokenizer and sources.notes == other.notes and not sources.mixed
    assert sources.config.transformer == other.config.transformer
    assert (sources.config.settings.num_inference_steps, sources.config.settings.guidance_scale) == (28, 4.0)
    weights = [open_checkpoint(folder / "transformer") for folder in FOLDERS.values()]
    assert list(weights[0]) == list(weights[1])
    assert not torch.equal(*(each.load("layers.0.attention.to_q.weight") for each in weights))


def test_both_together_are_small():
    assert sum(file.stat().st_size for folder in FOLDERS.values() for file in folder.rglob("*")) < 26e6


def test_parts_of_it_are_replaced_and_lent():
    sources = open_sources("embedded-base", {"transformer": "embedded", "vae": "embedded"}, "embedded")
    assert sources.mixed == ("transformer", "vae")
    assert sources.checkpoints["transformer"].path.parent == EMBEDDED / "transformer"
    lent = open_sources("embedded", {"transformer": "embedded-base"}, None)
    assert lent.checkpoints["transformer"].path.parent == EMBEDDED_BASE / "transformer"
    assert lent.config.settings.num_inference_steps == 8


def test_it_is_drawn_with_guidance_and_replayed_by_its_name(tmp_path, capsys):
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    assert main(["generate", PROMPT, "--model", "embedded-base", "--steps", "4", "--seed", "5", "-o", str(first)]) == 0
    record = read_metadata(first)
    assert record["model"] == "embedded-base" and record["guidance_scale"] == 4 and record["engine"]["model_calls"] == 4
    assert main(["generate", "--replay", str(first), "-o", str(again)]) == 0
    assert read_metadata(again)["model"] == "embedded-base"
    assert first.read_bytes() == again.read_bytes()
    capsys.readouterr()
    assert main(["inspect", str(first)]) == 0
    assert "--model" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_whole_folder_of_it_is_the_same_model(pipe, tmp_path):
    assert main(["convert", "embedded-base", str(tmp_path / "whole")]) == 0
    whole = Pipeline.load(tmp_path / "whole", device="cpu", dtype="fp32")
    drawn = [each(PROMPT, seed=1, num_inference_steps=3).images[0] for each in (pipe, whole)]
    assert np.array_equal(*map(np.asarray, drawn))


def test_it_is_inspected_and_not_quantized_in_part(capsys, tmp_path):
    assert main(["inspect", "embedded-base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == []
    assert main(["quantize", "embedded-base", str(tmp_path / "q"), "--to", "int8"]) == 2
    assert "s3dit convert embedded-base DIR" in capsys.readouterr().err


def test_the_stored_score():
    """What tools/train_base.py measured on 500 prompts; the pictures themselves are drawn by its --score."""
    score = json.loads((EMBEDDED_BASE / "score.json").read_text())
    (weights,) = (EMBEDDED_BASE / "transformer").glob("*.safetensors")
    assert score["transformer"] == sha256(weights.read_bytes()).hexdigest(), "measure these weights anew: --score"
    guided, plain = score["28 steps, guidance 4"], score["28 steps, no guidance"]
    assert guided["n"] == 500 and guided["everything"] >= 0.9
    # A share of 500 is known to 1.3 points (one standard deviation at 0.9).
    assert plain["everything"] < guided["everything"] - 0.05
    assert score["a color appears that is the negative prompt"] <= 0.05


@pytest.mark.slow
def test_guidance_and_negative_prompts_act(pipe):
    """A color that the prompt leaves open is drawn in none of twelve pictures where it is the negative prompt."""
    prompts = [f"a {shape} on a white background" for shape in ("star", "square", "heart")] * 4
    drawn = {
        negative: pipe(prompts, seed=list(range(12)), negative_prompt=negative, num_inference_steps=10).images
        for negative in ("red", "blue")
    }
    red, blue = (255 * np.array(color) for color in ((0.86, 0.15, 0.15), (0.15, 0.31, 0.88)))
    for avoided, color in (("red", red), ("blue", blue)):
        near = [(np.abs(np.asarray(each).astype(float) - color).max(2) < 60).mean() for each in drawn[avoided]]
        assert sum(share > 0.02 for share in near) == 0
