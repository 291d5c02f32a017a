"""Pictures show the numbers that they are given: colors at known places, images as they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit.errors import RequestError
from s3dit.research.pictures import CURVES, MAGNITUDE, MISSING, SIGNED, colors, heatmap, lines, overlay, strip


def found(picture):
    """The colors of a picture."""
    return {tuple(color) for color in np.asarray(picture).reshape(-1, 3).tolist()}


def test_colors_go_through_the_table():
    for table, signed in ((MAGNITUDE, False), (SIGNED, True)):
        assert colors(torch.linspace(-1, 3, 5), -1, 3, signed=signed).tolist() == [list(color) for color in table]
    assert colors([-9.0, 9.0, np.nan], 0, 1).tolist() == [list(MAGNITUDE[0]), list(MAGNITUDE[-1]), list(MISSING)]
    assert colors([2.0], 2, 2).tolist() == [list(MAGNITUDE[0])]


@pytest.mark.parametrize("log", [False, True])
def test_cells_of_a_heat_map_stand_in_order(log):
    values = torch.tensor([[1.0, 10.0, 100.0], [float("nan"), 1000.0, 10.0]])
    picture = np.asarray(heatmap(values, "ab", ["x", "y", "z"], "title", log=log, numbers=False))
    expected = colors(values.log10() if log else values, 0 if log else 1, 3 if log else 1000)
    # In the picture, rows of pixels through cells, without the bar behind them.
    seen = [[tuple(c) for c in run] for run in picture[:, : picture.shape[1] // 2].tolist()]
    for row in expected.tolist():
        assert any(_in_order([tuple(color) for color in row], run) for run in seen)


def _in_order(wanted, run):
    rest = iter(run)
    return all(color in rest for color in wanted)


def test_signed_values_have_white_at_zero():
    def white(values):
        return (np.asarray(heatmap([values], "a", "xyz", numbers=False)) == SIGNED[2]).all(-1).sum()

    assert white([-1.0, 0.0, 3.0]) > 200 and white([1.0, 2.0, 3.0]) < 20


@pytest.mark.parametrize("columns", [None, 2])
def test_a_strip_holds_its_images(columns):
    images = [Image.new("RGB", (30, 20), color) for color in ("red", "green", "blue")]
    picture = strip(images, ["a", "b", "a long caption"], "title", columns=columns)
    counts = [int((np.asarray(picture) == np.asarray(image)[0, 0]).all(-1).sum()) for image in images]
    assert counts == [600, 600, 600]
    assert strip(images, side=60).height > 40 + strip(images).height - 21


def test_an_overlay_is_the_map_or_the_image():
    image, values = Image.new("RGB", (40, 40), (1, 2, 3)), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    full = np.asarray(overlay(image, values, opacity=1.0))
    assert np.array_equal(full[5::20, 5::20], colors(values, 0, 1)) and found(overlay(image, values, opacity=0.0)) == {
        (1, 2, 3)
    }


def test_curves_are_drawn_where_they_are():
    picture = np.asarray(lines({" ": [0, 1, 2], "  ": [2, float("nan"), 0]}))
    rising, gap = (np.argwhere((picture == color).all(-1)) for color in CURVES[:2])
    assert rising[rising[:, 1].argmin(), 0] > rising[rising[:, 1].argmax(), 0] + 100
    # Two points and no line between them.
    across = gap[:, 1]
    assert abs(across - (across.min() + across.max()) / 2).min() > 100
    (small, large) = (
        np.argwhere((np.asarray(lines({" ": [1, 10, 100]}, log=log)) == CURVES[0]).all(-1))[:, 0] for log in (0, 1)
    )
    assert abs(large.mean() - (large.min() + large.max()) / 2) < 3 < small.mean() - (small.min() + small.max()) / 2


def test_bad_input():
    image = Image.new("RGB", (4, 4))
    for wrong in (
        lambda: heatmap(torch.zeros(2, 3), "ab", "xy"),
        lambda: strip([]),
        lambda: strip([image], ["a", "b"]),
        lambda: overlay(image, torch.zeros(3)),
        lambda: lines({"a": [1, 2], "b": [1]}),
    ):
        with pytest.raises(RequestError, match="needed"):
            wrong()
