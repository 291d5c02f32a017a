"""The training's own forward passes give what the engine gives for the same parameters."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import tiny_fast  # noqa: E402
from tiny_text import read  # noqa: E402
from train_tiny import GRID, Model, noisy  # noqa: E402

from s3dit.model.layout import text_to_image  # noqa: E402

IDS = [[5, 9, 200, 31], list(range(40, 62)), [7] * 32]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(tiny_fast, "_compiled", tiny_fast._block)
    model = Model(seed=3)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False)


def test_reading_equals_the_text_encoder(model):
    embeddings = model.text.model.embed_tokens.weight[torch.tensor(sum(IDS, []))]
    expected = model.text(embeddings, [len(one) for one in IDS])
    assert torch.allclose(read(model.text, IDS), expected, rtol=1e-4, atol=1e-5)


def test_fast_forward_equals_the_transformer(model):
    lengths = [len(one) for one in IDS]
    features = read(model.text, IDS)
    x, t, _ = noisy(torch.randn(3, 64, 64))
    context = model.dit.context(text_to_image([GRID] * 3, lengths), features)
    expected = model.dit(x.flatten(0, 1), t, context).view_as(x)
    found = tiny_fast.fast_forward(model.dit, x, t, features, lengths)
    assert (found - expected).norm() / expected.norm() < 1e-5
    # As it is trained: products of bf16 (8 bits) where the CPU has them.
    found = model(x, t, list(features.split(lengths)))
    assert (found - expected).norm() / expected.norm() < 2e-2


def test_captions_over_32_tokens_are_refused(model):
    with pytest.raises(ValueError, match="33 tokens"):
        tiny_fast.fast_forward(model.dit, torch.zeros(1, 64, 64), torch.ones(1), torch.zeros(33, 128), [33])
