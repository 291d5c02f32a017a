"""Recipes that take something out of the model, at reduced size: they find what they say, and measure what they say."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "recipes"))

import attention_sinks  # noqa: E402
import block_removal  # noqa: E402
import head_ablation  # noqa: E402
import massive_activations  # noqa: E402
from embedded_model import difference, draw, load, prompts  # noqa: E402

from s3dit.research.edits import scale, zero  # noqa: E402


@pytest.fixture(scope="module")
def pipe():
    return load()


def test_attention_without_tokens_is_that_of_the_others():
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(7, 2, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    gone, kept = torch.tensor([1, 5]), [0, 2, 3, 4, 6]

    def plain(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)

    found = attention_sinks.attend(q, k, v, gone, "score")
    torch.testing.assert_close(found, plain(q, k[kept], v[kept]), rtol=1e-12, atol=1e-12)
    found = attention_sinks.attend(q, k, v, gone, "value")
    torch.testing.assert_close(found, plain(q, k, v.index_fill(0, gone, 0.0)), rtol=1e-12, atol=1e-12)
    # One at a time, what a token receives is how much of a value of its own reaches the answers.
    ones = [plain(q, k, torch.eye(7, dtype=torch.float64)[:, i, None, None].expand(7, 2, 4)).mean() for i in range(7)]
    torch.testing.assert_close(attention_sinks.received(q, k), torch.stack(ones), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_suppression_of_nothing_changes_nothing(pipe):
    asked = prompts(1)
    nothing = attention_sinks.Suppression(0, attention_sinks.sinks)
    plain = draw(pipe, asked)
    with pipe.edit(nothing.edits):
        same = draw(pipe, asked)
    # Attention computed here in place of the engine's own rounds elsewhere: at most one level of 255 in a few pixels.
    assert difference(same, plain) < 1e-3
    assert nothing.seen.total() == 8 * 6


@pytest.mark.slow
def test_sinks_move_a_picture_further_than_random_tokens():
    effects = attention_sinks.study(3, (1,))["effects"]
    assert effects[1, "sinks"][0] >= 0.75
    assert effects[1, "sinks"][1] > 3 * effects[1, "random tokens"][1]
    assert effects[1, "sinks"][1] > 1.4 * effects[1, "random shift"][1]


def test_two_means_find_two_heaps_and_overlap_counts_area():
    rng = torch.Generator().manual_seed(2)
    truth = torch.rand(64, generator=rng) < 0.3
    rows = torch.randn(64, 5, generator=rng) + 8.0 * truth[:, None]
    found = massive_activations.two_means(rows)
    assert massive_activations.overlap(found, truth.double().numpy()) == 1.0
    half = truth.double().numpy() / 2
    # A mask of cells that are half covered: half of its area is the thing's.
    assert massive_activations.overlap(truth.numpy(), half) == pytest.approx(0.5)


@pytest.mark.slow
def test_few_channels_draw_the_picture():
    found = massive_activations.study(2)
    assert min(found["times"]) > 30
    zeroed, masks, transport = found["zeroed"], found["masks"], found["transport"]
    assert zeroed["massive"][0] == 0 and zeroed["smallest"][0] == 1
    assert zeroed["massive"][1] > 2 * zeroed["random"][1] > 4 * zeroed["smallest"][1]
    assert masks["ceiling"] > masks["massive"] > masks["random"] + 0.05 > masks["smallest"]
    assert transport["massive"] > 1.3 * transport["random"] > 2 * transport["smallest"]


@pytest.mark.slow
def test_velocity_errors_are_measured_on_the_states_of_the_plain_run(pipe):
    errors = block_removal.VelocityErrors(pipe, [text for _, text in prompts(1)])
    assert errors.mean({"layers.0.output": scale(1.0)}, None) == 0
    # Were the velocity not put back, the states after the first step would be others, and with them the errors.
    assert errors.mean({"velocity": scale(3.0)}, None) == pytest.approx(2.0, rel=1e-6)


def test_ranks_are_correlated():
    a = torch.tensor([1.0, 2.0, 30.0, 40.0])
    assert block_removal.rank_correlation(a, a.exp2()) == pytest.approx(1.0)
    assert block_removal.rank_correlation(a, -a) == pytest.approx(-1.0)
    assert block_removal.rank_correlation(a, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)


@pytest.mark.slow
def test_the_text_is_read_in_an_early_layer_and_not_in_a_late_one():
    removals = [("layers.1", "text"), ("layers.4", "text"), ("layers.4", "block")]
    effects = block_removal.study(2, 1, removals)["effects"]
    assert effects["layers.1", "text"][0] > 5 * effects["layers.4", "text"][0]
    assert effects["layers.1", "text"][1] == 0 and effects["layers.4", "text"][1] == 1
    assert effects["layers.4", "block"][0] > 5 * effects["layers.4", "text"][0]


def test_a_layer_without_all_of_its_heads_is_one_without_attention(pipe):
    asked = prompts(1)
    without = head_ablation.without(pipe, asked, [(2, head) for head in range(6)])
    with pipe.edit({"layers.2.attention.added": zero()}):
        removed = draw(pipe, asked)
    assert without[0].tobytes() == removed[0].tobytes()


@pytest.mark.slow
def test_heads_that_look_at_the_text_are_needed_first():
    found = head_ablation.study(2, (8,), draws=1)
    assert len(found["scores"]) == 36 and all(0 <= score <= 1 for score in found["scores"].values())
    first, last = (found["difference"][f"{end} on text first"][0] for end in ("most", "least"))
    assert first > 2 * last and found["accuracy"]["most on text first"][0] < found["accuracy"]["least on text first"][0]
