"""Positions, padding and order, against the rules of the official code written out by hand."""

import torch

from s3dit.layout import Segment, patchify, text_to_image, unpatchify


def test_one_item_by_hand():
    layout = text_to_image([(2, 3)], [5])
    text = [(i, 0, 0) for i in range(1, 33)]  # pads count on
    image = [(33, r, c) for r in range(2) for c in range(3)] + [(0, 0, 0)] * 26  # pads stand at the origin
    assert layout.text.positions.tolist() == [list(p) for p in text]
    assert layout.image.positions.tolist() == [list(p) for p in image]
    assert layout.whole.positions.tolist() == [list(p) for p in image + text]
    assert layout.image.real.tolist() == list(range(6))
    assert layout.text.real.tolist() == list(range(5))
    assert layout.whole.real.tolist() == list(range(6))


def test_items_stand_end_to_end():
    one, two = text_to_image([(2, 3)], [5]), text_to_image([(4, 8)], [33])
    both = text_to_image([(2, 3), (4, 8)], [5, 33])
    assert both.whole.spans.lengths == (64, 96)
    assert torch.equal(both.whole.positions, torch.cat((one.whole.positions, two.whole.positions)))
    assert torch.equal(both.whole.real, torch.cat((one.whole.real, two.whole.real + 64)))
    assert both.whole.row.tolist() == [0] * 64 + [1] * 96


def test_fill():
    pack = text_to_image([(2, 3)], [5]).image
    tokens, pad = torch.randn(6, 4), torch.full((1, 4), 7.0)
    filled = pack.fill(tokens, pad)
    assert torch.equal(filled[:6], tokens)
    assert (filled[6:] == 7).all() and len(filled) == 32


def test_no_padding_where_none_is_needed():
    assert Segment(64, (1, 8, 8), (1, 0, 0)).padded == 64


def test_patches_are_row_column_channel():
    latents = torch.arange(16 * 4 * 6).float().view(16, 4, 6)
    patches = patchify(latents)
    assert patches.shape == (6, 64)
    # patch (1, 2), inside it row 1, column 0, channel 5
    assert patches[1 * 3 + 2, (1 * 2 + 0) * 16 + 5] == latents[5, 3, 4]
    assert torch.equal(unpatchify(patches, (2, 3)), latents)
