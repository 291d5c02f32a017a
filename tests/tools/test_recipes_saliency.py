"""Saliency: the gradients are those of finite differences, and checkpointing changes memory and nothing else."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "recipes"))

import saliency  # noqa: E402
from embedded_model import load  # noqa: E402

TEXT, SEED = "a red star on a blue background", 5


@pytest.fixture(scope="module")
def pipe():
    return load()


@pytest.fixture(scope="module")
def start(pipe):
    """Noise, embeddings and noise levels of one picture."""
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(SEED))
    return noise, saliency.embeddings(pipe, TEXT), pipe.plan(TEXT, seed=SEED).sigmas


MASK = torch.zeros(128, 128, dtype=torch.bool).index_fill(0, torch.arange(48, 80), True)


def value(pipe, noise, embedded, sigmas, checkpointed=True):
    features = pipe.text_encoder(embedded, (len(embedded),))
    return saliency.score(pipe, saliency.flow(pipe, noise, features, sigmas, checkpointed), MASK, "red", "blue")


def test_the_flow_is_the_pipelines_own(pipe, start):
    noise, embedded, sigmas = start
    with torch.no_grad():
        features = pipe.text_encoder(embedded, (len(embedded),))
        assert (features - pipe.encode(TEXT)[0]).abs().max() < 1e-5
        latents = saliency.flow(pipe, noise, features, sigmas)[0]
    own = pipe(TEXT, seed=SEED, output_type="latent").latents[0]
    # fp32 rounding, over 8 steps of states of a few units.
    assert (latents - own).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.slow
def test_gradients_are_those_of_finite_differences(pipe, start, steps):
    noise, embedded, sigmas = start
    sigmas = sigmas if steps > 1 else (sigmas[0], 0.0)
    leaves = [noise.clone().requires_grad_(), embedded.clone().requires_grad_()]
    gradients = torch.autograd.grad(value(pipe, *leaves, sigmas), leaves)
    for i, gradient in enumerate(gradients):
        length = torch.linalg.vector_norm(gradient)
        # Along the gradient the slope is its length; 1e-2 leaves 1e-4 of rounding, and curvature cancels.
        ends = []
        for sign in (1, -1):
            moved = [leaf.detach() for leaf in leaves]
            moved[i] = moved[i] + sign * 1e-2 * gradient / length
            with torch.no_grad():
                ends.append(float(value(pipe, *moved, sigmas)))
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(length), rel=0.02)


def test_checkpointing_keeps_less_and_gives_the_same(pipe, start):
    noise, embedded, sigmas = start
    kept, gradients = {}, {}
    for checkpointed in (False, True):
        leaves = [noise.clone().requires_grad_(), embedded.clone().requires_grad_()]
        sizes = []

        def keep(x, sizes=sizes):
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            score = value(pipe, *leaves, sigmas[:4], checkpointed)
        kept[checkpointed] = sum(sizes)
        gradients[checkpointed] = torch.autograd.grad(score, leaves)
    for plain, again in zip(gradients[False], gradients[True], strict=True):
        # The same operations a second time; sums of gradients may be in another order.
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6 * float(plain.abs().max()))
    assert kept[True] < kept[False] / 1.5


def test_a_margin_is_cut_off():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3:17, 4:15] = True
    expected = torch.zeros_like(mask)
    expected[5:15, 6:13] = True
    assert saliency.inside(mask, 2).equal(expected)


@pytest.mark.slow
def test_the_color_of_a_thing_hangs_on_its_word_and_on_its_place():
    found = saliency.study(2, steps=1)
    assert found["first, thing"] == 1.0 and len(found["pictures"]) == 2
    # 8 of 18 to 20 text tokens are the template's.
    assert found["template"] > 0.6
    assert found["place"] > 1.1
