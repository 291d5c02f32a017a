"""The little world and its scorer: real renders pass, pictures that show something else do not."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from tiny_score import judge, table  # noqa: E402
from tiny_world import (  # noqa: E402
    ARRANGEMENTS,
    COLOURS,
    FIXED_HELD_OUT,
    FIXED_SEEN,
    HELD_OUT,
    KINDS,
    SHAPES,
    Scene,
    Thing,
    caption_of,
    check_captions,
    draw_scene,
    fixed_prompts,
    render,
    words,
)


@pytest.mark.slow
def test_scorer_passes_real_renders():
    rng = np.random.default_rng(5)
    scenes = [draw_scene(rng, held_out=i % 4 == 0) for i in range(240)]
    found = table((scene, judge(render(scene), scene)) for scene in scenes)
    assert {s.kind for s in scenes} == set(KINDS) and {s.arrangement for s in scenes} == set(ARRANGEMENTS)
    assert {t.shape for s in scenes for t in s.things} == set(SHAPES)
    assert found["n"] == 240
    assert min(share for name, share in found.items() if name != "n") >= 0.99


PAIR = Scene("two", "left of", "white", (Thing("star", "red", 33, 64, 22.5), Thing("ring", "blue", 95, 64, 22.5)))
ONE = Scene("single", "centre", "black", (Thing("square", "yellow", 64, 64, 34),))


@pytest.mark.parametrize(
    ("meant", "wrong", "shown"),
    [
        (ONE, "background", replace(ONE, background="purple")),
        (ONE, "colour", replace(ONE, things=(replace(ONE.things[0], colour="orange"),))),
        (ONE, "shape", replace(ONE, things=(replace(ONE.things[0], shape="diamond"),))),
        (ONE, "arrangement", replace(ONE, things=(replace(ONE.things[0], r=20),))),
        (ONE, "arrangement", replace(ONE, things=(replace(ONE.things[0], x=96, r=22),))),
        (ONE, "everything", replace(ONE, things=PAIR.things)),
        (PAIR, "everything", replace(PAIR, things=PAIR.things[:1])),
        (PAIR, "arrangement", replace(PAIR, things=tuple(replace(t, x=128 - t.x) for t in PAIR.things))),
        (PAIR, "arrangement", replace(PAIR, things=tuple(replace(t, x=t.y, y=t.x) for t in PAIR.things))),
        (PAIR, "colour", replace(PAIR, things=(replace(PAIR.things[0], colour="blue"), PAIR.things[1]))),
    ],
)
def test_scorer_names_what_is_wrong(meant: Scene, wrong: str, shown: Scene):
    assert judge(render(meant), meant).everything
    verdict = judge(render(shown), meant)
    assert not getattr(verdict, wrong) and not verdict.everything


def test_swapped_colours_are_wrong():
    star, ring = PAIR.things
    shown = replace(PAIR, things=(replace(star, colour="blue"), replace(ring, colour="red")))
    assert not judge(render(shown), PAIR).everything


def test_a_blob_is_no_shape():
    y, x = np.mgrid[0:128, 0:128]
    wobbly = np.hypot(x - 64, y - 64) < 34 * (1 + 0.35 * np.sin(3 * np.arctan2(y - 64, x - 64)))
    picture = np.where(wobbly[..., None], COLOURS["yellow"], COLOURS["black"]).astype(np.uint8)
    scene = replace(ONE, things=(replace(ONE.things[0], shape="circle"),))
    assert not judge(picture, scene).shape


def test_held_out_pairs_are_never_trained_on():
    rng = np.random.default_rng(11)
    scenes = [draw_scene(rng) for _ in range(3000)]
    assert not any(scene.held_out for scene in scenes)
    check_captions([caption_of(scene, rng) for scene in scenes])
    with pytest.raises(ValueError, match="held-out pair 'red heart'"):
        check_captions(["Draw a red heart on a white background"])
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)


@pytest.mark.slow
def test_fixed_prompts():
    prompts = fixed_prompts()
    assert [scene.held_out for scene, _ in prompts] == [False] * FIXED_SEEN + [True] * FIXED_HELD_OUT
    assert prompts == fixed_prompts()
    known = set(words())
    for _, caption in prompts:
        assert set(caption.lower().replace(".", " ").replace(",", " ").split()) <= known
