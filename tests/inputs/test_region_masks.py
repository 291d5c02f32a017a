"""How masks become shares: by a plain count of pixels, boxes to a part of a pixel, and what is refused or noted."""

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit.errors import RequestError
from s3dit.inputs.images import Pictures
from s3dit.inputs.region_masks import copies, hashes, items, read
from s3dit.model.layout import unpatchify
from s3dit.region import Region
from s3dit.request import Request


def shares_of(regions, notes=None, **fields):
    fields = {"prompt": "a", "height": 32, "width": 64} | fields
    return read(Request(region=regions, **fields), Pictures(), [] if notes is None else notes)


def mask(levels):
    return Image.fromarray(np.asarray(levels, np.uint8))


def test_shares_are_weights_over_their_sum():
    gray = np.zeros((32, 64), np.uint8)
    gray[:, :40], gray[:8, 40:] = 255, 51
    (found,) = shares_of([Region(mask(gray), "b", 3.0), Region((32, 0, 32, 32), "c")], base_weight=0.5)
    assert [share.prompt for share in found] == [None, "b", "c"]
    for y in range(0, 32, 5):
        for x in range(64):
            b, c = gray[y, x] / 255, float(x >= 32)
            weights = np.array([0.5 + max(0.0, 1 - b - c), 3 * b, c])
            seen = [share.share[y, x].item() for share in found]
            assert np.abs(seen - weights / weights.sum()).max() < 1e-6


@pytest.mark.parametrize(("box", "edges"), [((0.125, 0.25, 0.5, 0.5), (8, 8, 32, 16)), ((2.5, 4, 10, 7.25),) * 2])
def test_a_box_covers_pixels_in_part(box, edges):
    (found,) = shares_of([Region(box, "b")])
    left, top, width, height = edges
    want = torch.zeros(32, 64, dtype=torch.float64)
    for y in range(32):
        for x in range(64):
            across = max(0.0, min(x + 1, left + width) - max(x, left))
            want[y, x] = across * max(0.0, min(y + 1, top + height) - max(y, top))
    assert torch.allclose(found[1].share.double(), want, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 2])
def test_shares_of_cells_are_means_of_pixels_and_sum_to_one(scale):
    """Also of a second pass, whose cells are smaller: they are read off the same pixels."""
    levels = np.random.default_rng(0).integers(0, 256, (32, 64))
    shares = shares_of([Region(mask(levels), "b"), Region((0, 0, 40, 20), "c", 2.0)])
    grid = (2 * scale, 4 * scale)
    made = [unpatchify(copy.shares, grid) for copy in copies(shares, [grid])]
    assert torch.allclose(sum(made), torch.ones(16, 4 * scale, 8 * scale), atol=1e-6)
    side = 8 // scale
    for k, share in enumerate(shares[0]):
        want = share.share.double().view(4 * scale, side, 8 * scale, side).mean((1, 3))
        assert torch.allclose(made[k].double(), want.expand(16, -1, -1), atol=1e-6)


def test_a_prompt_without_a_share_is_not_drawn():
    """And the items of a batch stand layer by layer, so that the first is of every picture."""
    notes = []
    halves = [Region((0, 0, 32, 32), "l"), Region((32, 0, 32, 32), "r")]
    shares = shares_of([halves, None, halves[:1]], notes, prompt=["x", "y", "z"])
    order = [(i, share.prompt) for i, share in items(shares, 3)]
    assert order == [(0, "l"), (1, None), (2, None), (0, "r"), (2, "l")]
    assert any("prompt has no effect" in note for note in notes)
    assert [*items((), 2)] == [(0, None), (1, None)]
    notes.clear()
    shares_of(halves, notes, prompt=None)
    assert not any("prompt has no effect" in note for note in notes)


@pytest.mark.parametrize(
    ("box", "roll"), [((0, 0, 0.5, 1), (0, 1)), ((0.5, 0, 0.5, 0.5), (1, -1)), ((0, 0, 1, 1), (0, 0))]
)
def test_a_centered_region_is_rolled_to_the_middle(box, roll):
    shares = shares_of([Region(box, "b", centered=True)], height=64, width=64)
    assert [copy.roll for copy in copies(shares, [(4, 4)])][-1] == roll


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Region(mask(np.zeros((32, 64))), "b"), "region 1 mask is black everywhere"),
        (Region((0, 0, 65, 32), "b"), "reaches beyond the picture of 64×32"),
        (Region((0.6, 0, 0.5, 1), "b"), "reaches beyond"),
        (Region("none.png", "b"), "none.png: not found"),
    ],
)
def test_masks_that_are_refused(region, message):
    with pytest.raises(RequestError, match=message):
        shares_of([region])


def test_masks_that_are_noted(tmp_path):
    notes, path = [], tmp_path / "m.png"
    mask(np.full((32, 32), 255)).save(path)
    shares = shares_of([Region(str(path), "b")], notes)
    assert any("is 32×32 pixels; it is scaled to 64×32, which changes its proportions" in note for note in notes)
    assert any("its mask is white everywhere" in note for note in notes)
    assert any("stands in each model call up to 1 times" in note for note in notes)
    assert len(hashes(shares, 0)["region 1 mask"]) == 64 and hashes((), 0) == {}
