"""The scorer of edits: what it measures moves with what is done, on pipelines that are made up."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import tiny_edit  # noqa: E402
from tiny_world import render  # noqa: E402

from s3dit.inputs.images import Pictures, to_pil  # noqa: E402
from s3dit.inputs.start_image import read  # noqa: E402
from s3dit.request import Request  # noqa: E402
from s3dit.result import Result  # noqa: E402


def made_up(paint, composite=True):
    """A pipeline that paints one color, and lays the kept pixels over it or not."""

    def draw(prompt, seed, **inputs):
        _, start_images = read(Request(prompt=prompt, seed=seed, composite=composite, **inputs), Pictures(), [])
        pictures = [Image.new("RGB", (128, 128), paint) for _ in prompt]
        if composite and start_images:
            drawn = [2 * np.asarray(p, np.float32) / 255 - 1 for p in pictures]
            torch = start_images[0].pixels.new_tensor
            pictures = [
                to_pil(c.over(torch(p).movedim(2, 0))[None])[0] for c, p in zip(start_images, drawn, strict=True)
            ]
        return Result(pictures, [], [])

    return draw


@pytest.mark.parametrize("composite", [True, False])
def test_pixels_that_change_are_seen(composite):
    rng = np.random.default_rng(1)
    rows = tiny_edit.inpaint(made_up("white", composite), rng, 3) | tiny_edit.outpaint(
        made_up("white", composite), rng, 3
    )
    assert [row["kept to the bit"] for row in rows.values()] == [float(composite)] * 2
    assert rows["inpaint"]["everything"] == 0.0


def test_margins_that_go_on_are_seen():
    scenes = tiny_edit._scenes(np.random.default_rng(2), 5, ("single",))
    row = tiny_edit.outpaint(made_up(tiny_edit.COLOURS[scenes[0].background]), np.random.default_rng(2), 5)["outpaint"]
    assert 0 < row["margins of the background"] < 1
    same = [scene.background == scenes[0].background for scene in scenes]
    assert row["everything"] <= sum(same) / 5


def test_a_mask_covers_one_of_two_things_and_not_the_other():
    for scene in tiny_edit._scenes(np.random.default_rng(3), 5, ("two",)):
        mask = tiny_edit._around(scene, 1) > 0
        things = np.linalg.norm(render(scene) - np.array(tiny_edit.COLOURS[scene.background], float), axis=2) > 60
        first, second = scene.things
        assert mask[int(second.y), int(second.x)] and not mask[int(first.y), int(first.x)]
        # Of what the things cover, about half.
        assert 0.2 < things[mask].sum() / things.sum() < 0.8


def test_the_table_has_a_column_a_measure():
    text = tiny_edit.as_table({"one": {"a": 0.5}, "two": {"a": 1.0, "b": 0.25}})
    assert [line.split()[-1] for line in text.splitlines()] == ["b", "0.500", "0.250"]
