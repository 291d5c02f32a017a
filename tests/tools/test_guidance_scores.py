"""Scores of guidance: pixels as the pipeline rounds them, and tables that are those of the recorded figures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from guidance_scores import METHODS, method_row, numbers, pixels, score, variation_row, vary  # noqa: E402
from tiny_world import fixed_prompts  # noqa: E402

from s3dit import Pipeline  # noqa: E402
from s3dit.inputs.images import to_pil  # noqa: E402

PAGE = (ROOT / "s3dit" / "RECIPES.md").read_text(encoding="utf-8")


def test_the_page_has_the_recorded_figures():
    methods = json.loads((ROOT / "tools" / "results" / "guidance.json").read_text())["methods"]
    variation = json.loads((ROOT / "tools" / "results" / "variation.json").read_text())["variation"]
    rows = [method_row(*row) for row in methods.items()] + [variation_row(*row) for row in variation.items()]
    assert set(methods) == set(METHODS) and all(row in PAGE for row in rows)


def test_what_is_judged_is_the_picture():
    picture = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2
    assert np.array_equal(pixels(picture), np.asarray(to_pil(picture[None])[0]))
    assert numbers("") == [] and numbers("4,16") == [4.0, 16.0]


@pytest.mark.slow
def test_scores_of_a_few_pictures():
    """The embedded model draws these right; without variation, pictures of one noise are the same."""
    pipe, (scenes, prompts) = Pipeline.load(device="cpu"), map(list, zip(*fixed_prompts()[:2], strict=True))
    found = score(pipe, scenes, prompts)
    assert found["right"] == 1.0 and 0 <= found["clipped"] < 0.05
    apart = [vary(pipe, scenes, prompts, 2, strength, own=False)["apart"] for strength in (0.0, 0.3)]
    assert apart[0] < 0.1 and apart[1] > 1
