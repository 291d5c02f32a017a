"""Both spellings of a Qwen3 text encoder end under the official names; nothing else is renamed."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from s3dit.weights.assign import assign
from s3dit.weights.checkpoint import CheckpointError, open_checkpoint
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
