"""Recipes at a reduced size: what they find, where it could be otherwise, and their arithmetic by other ways."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parents[2] / "tools" / folder) for folder in ("recipes", ".")]

import activation_patching  # noqa: E402
import distill_lora  # noqa: E402
import linear_probe  # noqa: E402
import sparse_autoencoder  # noqa: E402
import train_lora  # noqa: E402
from activation_patching import Cell  # noqa: E402
from embedded_model import load  # noqa: E402

from s3dit.research.tokens import tokens  # noqa: E402


@pytest.mark.slow
def test_patching_finds_a_color_where_it_must_be_and_where_it_is():
    cells = {
        "all text": Cell("text", "layers.0.input"),
        "all that the velocity is made of": Cell("image", "layers.5.output"),
        "template": Cell("template", "layers.0.input"),
        "word": Cell("color word", "layers.0.input"),
        "image before": Cell("image", "layers.2.output"),
        "image after": Cell("image", "layers.3.output"),
        "text after": Cell("text", "layers.3.output"),
        "last two steps": Cell("text", "layers.0.input", (7, 8)),
    }
    found, (_, other, *pictures) = activation_patching.study([*cells.values()])
    way, drawn = dict(zip(cells, found, strict=True)), dict(zip(cells, pictures, strict=True))
    # The model sees no more of the prompt than the text's tokens, the solver no more of the model than the image's.
    for name in ("all text", "all that the velocity is made of"):
        assert np.abs(np.asarray(drawn[name], int) - np.asarray(other, int)).max() <= 1, name
    assert way["template"] > 0.9 and way["image after"] > 0.9 and way["last two steps"] > 0.8
    assert all(abs(way[name]) < 0.1 for name in ("word", "image before", "text after"))


@pytest.mark.slow
def test_patching_from_a_run_of_the_same_prompt_changes_nothing():
    cells = [Cell("image", "layers.3.output"), Cell("text", "layers.0.input"), Cell("image", "layers.*.ffn.added")]
    found, (own, _, *pictures) = activation_patching.study(cells, source=activation_patching.OWN)
    assert np.abs(found).max() < 0.01
    assert all(np.abs(np.asarray(picture, int) - np.asarray(own, int)).max() <= 1 for picture in pictures)


def test_kinds_of_tokens_are_apart_and_complete():
    pipe = load()
    (item,) = tokens(pipe, pipe.plan(activation_patching.PROMPT.format("blue")))
    apart = [activation_patching.of_kind(item, kind) for kind in activation_patching.KINDS if kind != "text"]
    assert sorted(sum(apart, [])) == list(range(len(item)))
    assert sorted(sum(apart[:-1], [])) == sorted(activation_patching.of_kind(item, "text"))


def test_ridge_is_least_squares_with_rows_of_the_penalty():
    """The penalty is that of D further rows √p · 1 with targets 0, which lstsq (by QR) solves in another way."""
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, n, generator=rng, dtype=torch.float64) for n in (12, 3))
    more = torch.cat((x, 5.0**0.5 * torch.eye(12, dtype=torch.float64))), torch.cat((y, y.new_zeros(12, 3)))
    torch.testing.assert_close(linear_probe.ridge(x, y, 5.0), torch.linalg.lstsq(*more).solution, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_probe_reads_color_after_a_layer_and_chance_before_or_shuffled():
    found = linear_probe.study(count=240, trained=200, steps=(1,))
    # 40 pictures: 0.4 of right answers by chance of 0.1 is beyond five deviations.
    assert found["color", 1][2] > 0.6 and found["place", 1][2] > 0.5
    assert found["color", 1][0] < 0.4 and found["place", 1][0] < 0.45
    assert max(found["color, shuffled", 1]) < 0.4


def test_f1_is_that_of_counts():
    rng = torch.Generator().manual_seed(1)
    fires, labels = torch.rand(50, 4, generator=rng) > 0.6, torch.rand(50, 3, generator=rng) > 0.7
    for f in range(4):
        for c in range(3):
            hits, false, missed = (int(each.sum()) for each in (
                fires[:, f] & labels[:, c], fires[:, f] & ~labels[:, c], ~fires[:, f] & labels[:, c]))  # fmt: skip
            assert float(sparse_autoencoder.f1(fires, labels)[f, c]) == pytest.approx(
                2 * hits / (2 * hits + false + missed)
            )
    assert float(sparse_autoencoder.f1(torch.zeros(5, 1, dtype=torch.bool), labels[:5]).max()) == 0


def test_an_autoencoder_finds_the_directions_that_vectors_are_sums_of():
    """Vectors of two out of 20 known directions in 16 dimensions: nearly all of them are found again."""
    rng = torch.Generator().manual_seed(2)
    true = torch.nn.functional.normalize(torch.randn(20, 16, generator=rng), dim=1)
    chosen = torch.rand(4000, 20, generator=rng).topk(2, dim=1)
    x = (torch.zeros(4000, 20).scatter(1, chosen.indices, 1 + torch.rand(4000, 2, generator=rng))) @ true
    model = sparse_autoencoder.fit(x, features=40, k=2, steps=1500, batch=256)
    assert (model.encode(x) > 0).sum(1).max() <= 2
    nearest = (true @ model.directions.T).max(1).values
    assert (nearest > 0.95).double().mean() > 0.8, nearest
    assert sparse_autoencoder.explained(model, x) > 0.85


@pytest.mark.slow
def test_found_features_name_words_of_new_prompts_and_turn_things():
    found = sparse_autoencoder.study(["red"], count=440, trained=400)
    # A feature that fires for every prompt has 2 / 11 for one color of ten.
    assert all(np.mean(scores) > 0.7 for scores in found["f1"].values())
    features, random, _ = zip(*(row.values() for row in found["steered"].values()), strict=True)
    assert np.mean(features) >= np.mean(random) + 0.4


@pytest.mark.slow
def test_the_file_of_a_lora_has_diffusers_names_and_acts_as_it_was_trained(tmp_path):
    """In few steps: the trained model and one with the file attached have the same velocity; peft takes its names."""
    losses = train_lora.train(tmp_path / "few.safetensors", steps=12, count=8)
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    stored = load_file(tmp_path / "few.safetensors")
    pipe, plain = load(), load()
    assert len(stored) == 2 * len(pipe.lora.attach(tmp_path / "few.safetensors").matched) == 84
    x, features = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0)), plain.encode("a red star")
    before = plain.velocity(x, 0.5, features)
    for name, factor in train_lora.add_factors(plain.transformer, 8).items():
        factor.data.copy_(stored[f"transformer.{name}.weight"])
    trained = plain.velocity(x, 0.5, features).detach()
    # Two orders of the same fp32 sums, through six layers.
    torch.testing.assert_close(pipe.velocity(x, 0.5, features), trained, rtol=0, atol=1e-3 * float(trained.abs().max()))
    assert (trained - before).abs().max() > 0.05 * trained.abs().max()


TEXTS = ["a red star above a blue ring", "a huge pink heart", "a green cross at the left"]


@pytest.mark.slow
def test_a_few_step_lora_learns_the_way_between_states_of_its_teacher(tmp_path):
    """States are those of the teacher's pictures, at the noise levels of the student; the file says its settings."""
    pipe = load()
    states, levels = distill_lora.trajectories(pipe, TEXTS, 2, batch=2)
    assert levels == pytest.approx(pipe.plan("", num_inference_steps=2).sigmas)
    steps = list(pipe.stream(TEXTS, seed=10_000))
    for found, latents in zip(states[1:], (steps[3].latents, steps[7].latents), strict=True):
        torch.testing.assert_close(found, torch.stack(latents), rtol=0, atol=1e-4)
    assert torch.equal(states[0], torch.stack(distill_lora.split_latents(steps[0].start, steps[0].grids)))
    losses = distill_lora.train(tmp_path / "few.safetensors", None, TEXTS, steps=2, updates=12, batch=3)
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    before = pipe.plan(TEXTS[0]).request.num_inference_steps
    pipe.lora.attach(tmp_path / "few.safetensors")
    after = pipe.plan(TEXTS[0]).request
    assert before == 8 and (after.num_inference_steps, after.guidance_scale, after.shift) == (2, 0.0, 3.0)


@pytest.mark.parametrize("recipe", ["train_lora", "distill_lora"])
@pytest.mark.sampled(1)
def test_diffusers_loads_the_file_of_a_lora_without_a_key_left(tmp_path, recipe):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    if recipe == "train_lora":
        train_lora.train(tmp_path / "few.safetensors", steps=1, count=4)
    else:
        distill_lora.train(tmp_path / "few.safetensors", None, TEXTS[:1], steps=1, updates=1, batch=1)
    state = diffusers.ZImagePipeline.lora_state_dict(tmp_path / "few.safetensors")
    model = diffusers.ZImageTransformer2DModel.from_pretrained(load().folder / "transformer")
    model.load_lora_adapter(state, prefix="transformer")
    layers = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert layers == {key.removeprefix("transformer.").partition(".lora_A")[0] for key in state if ".lora_A." in key}
    assert len(layers) == 42


def test_blueprints_are_right_as_the_scorer_sees_them():
    (scene, _), *_ = train_lora.prompts(1)
    picture = train_lora.render(train_lora.blueprint(scene))
    assert train_lora.accuracy([picture], [(train_lora.blueprint(scene), "")]) == 1.0
