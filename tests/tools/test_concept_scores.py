"""Scores of concept maps: the measures against plain loops, the table, and on a few pictures that maps find things."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from concept_scores import RESULTS, choose, table, word_of  # noqa: E402
from concept_truth import FINER, Truth, score, truths  # noqa: E402
from tiny_world import fixed_prompts, render  # noqa: E402

from s3dit import Pipeline  # noqa: E402
from s3dit.research.concepts import concept_maps  # noqa: E402

TWO = [(i, scene, prompt) for i, (scene, prompt) in enumerate(fixed_prompts()) if scene.kind == "two"]


def test_the_measures_are_what_they_say():
    _, scene, _ = TWO[0]
    truth, _ = truths(render(scene), scene)
    maps = np.random.default_rng(0).random((3, 64))
    for given, (before, iou, auroc, point) in zip(maps, score(maps, truth), strict=True):
        fine, own = given @ FINER, truth.own
        assert before == (np.average(fine, weights=own) > np.average(fine, weights=truth.other))
        top = np.zeros(len(own))
        top[np.argsort(-fine)[: round(own.sum())]] = 1
        # Bilinear maps are flat in their corners, and cells of one height come in any order.
        assert iou == pytest.approx(np.minimum(top, own).sum() / np.maximum(top, own).sum(), abs=2e-2)
        pairs = sum(
            inside * (((1 - own) * (fine < height)).sum() + 0.5 * (1 - inside))
            for inside, height in zip(own, fine, strict=True)
        )
        assert auroc == pytest.approx(pairs / (own.sum() * (1 - own).sum()), abs=2e-3)
        assert point == (own[fine.argmax()] >= 0.5)


def test_the_truth_and_its_opposite():
    _, scene, _ = TWO[1]
    for truth in truths(render(scene), scene):
        exact = truth.own.reshape(8, 4, 8, 4).mean((1, 3)).ravel()
        best, worst = score(np.stack((exact, -exact)), truth)
        # A ring's hole is lost on the grid.
        assert best[0] == 1 and best[1] > 0.45 and best[2] > 0.95 and worst[0] == 0 and worst[2] < 0.05
        (alone,) = score(exact[None], Truth(truth.colour, truth.shape, truth.own, None))
        assert np.isnan(alone[0]) and np.array_equal(alone[1:], best[1:])


def test_a_picture_that_lacks_a_thing_has_no_truth():
    _, scene, _ = TWO[0]
    _, other, _ = TWO[1]
    assert len(truths(render(scene), scene)) == 2 and truths(render(scene), other) == []


def test_heads_are_chosen_that_help_each_other():
    """Of two halves of a thing, and noise, both halves."""
    _, scene, _ = TWO[0]
    truth = truths(render(scene), scene)[0]
    exact = truth.own.reshape(8, 4, 8, 4).mean((1, 3)).ravel()
    noise = np.random.default_rng(0).random(64)
    half = exact * (np.arange(64) % 2)
    assert set(choose([(truth, np.stack((noise, half, exact - half)))])) == {1, 2}


def test_the_table_is_that_of_the_results():
    page = (ROOT / "s3dit" / "research" / "README.md").read_text(encoding="utf-8")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert table(found) in page, "run tools/concept_scores.py --table and paste what it prints into the README"
    for kind, heads in found["combined"].items():
        assert heads and kind in found["baselines"]


@pytest.mark.slow
def test_maps_find_things():
    """The best head of the table, on 12 pictures of two things that it was not chosen by."""
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    chosen = [each for each in TWO if each[0] % 2 == 0][:12]
    concepts = sorted({f"{thing.colour} {thing.shape}" for _, scene, _ in chosen for thing in scene.things})
    with concept_maps(pipe, concepts, layers="layers.3", keep=["head"]) as maps:
        pictures = pipe([prompt for _, _, prompt in chosen], seed=[i for i, _, _ in chosen]).images
    scores = [
        score(maps.values(word_of(truth, "phrase"), item=i, head=1).numpy()[None], truth)[0]
        for i, (picture, (_, scene, _)) in enumerate(zip(pictures, chosen, strict=True))
        for truth in truths(np.asarray(picture), scene)
    ]
    assert len(scores) >= 16
    before, iou, auroc, _ = np.mean(scores, 0)
    assert before >= 0.8 and iou >= 0.55 and auroc >= 0.93, (before, iou, auroc)
