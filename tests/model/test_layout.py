"""Positions, padding and order, against the rules of the official code written out by hand."""

import pytest
import torch

from s3dit.model.edit_layout import edit, released_order
from s3dit.model.layout import Segment, patchify, text_to_image, unpatchify


def test_one_item_by_hand():
    layout = text_to_image([(2, 3)], [5])
    text = [(i, 0, 0) for i in range(1, 33)]  # pads count on
    image = [(33, r, c) for r in range(2) for c in range(3)] + [(0, 0, 0)] * 26  # pads stand at the origin
    assert layout.text.positions.tolist() == [list(p) for p in text]
    assert layout.image.positions.tolist() == [list(p) for p in image]
    assert layout.joint.positions.tolist() == [list(p) for p in image + text]
    assert layout.image.token_index.tolist() == list(range(6))
    assert layout.text.token_index.tolist() == list(range(5))
    assert layout.joint.token_index.tolist() == list(range(6))


def test_items_stand_end_to_end():
    one, two = text_to_image([(2, 3)], [5]), text_to_image([(4, 8)], [33])
    both = text_to_image([(2, 3), (4, 8)], [5, 33])
    assert both.joint.spans.lengths == (64, 96)
    assert torch.equal(both.joint.positions, torch.cat((one.joint.positions, two.joint.positions)))
    assert torch.equal(both.joint.token_index, torch.cat((one.joint.token_index, two.joint.token_index + 64)))
    assert both.joint.modulation_row.tolist() == [0] * 64 + [1] * 96


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


def test_an_edit_by_hand():
    """One reference of 2 × 3 tokens and 2 × 2 features, a picture of 1 × 2; segments of 5, 3 and 1 tokens."""
    layout = edit([(1, 2)], [(5, 3, 1)], [[((2, 3), (2, 2))]], slide=False)
    # segments begin at 1, then 5 tokens and the two places of a picture further on, then 3 and 2; pads run on
    text = [(start + i, 0, 0) for start in (1, 8, 13) for i in range(32)]
    pads = [(0, 0, 0)]
    image = [(6, r, c) for r in range(2) for c in range(3)] + pads * 26 + [(11, 0, 0), (11, 0, 1)] + pads * 30
    # features stand behind their picture, spread over its 4 × 6 latent cells; for the picture to be drawn, 32 pads
    vision = [(7, r, c) for r in (0, 3) for c in (0, 5)] + pads * 28 + pads * 32
    assert layout.text.positions.tolist() == [list(p) for p in text]
    assert layout.image.positions.tolist() == [list(p) for p in image]
    assert layout.vision.positions.tolist() == [list(p) for p in vision]
    assert layout.joint.positions.tolist() == [list(p) for p in text + image + vision]
    # row 0 is the item's time, row 1 that of clean tokens
    assert layout.joint.modulation_row.tolist() == [1] * 32 + [0] * 64 + [1] * 32 + [0] * 32 + [1] * 32 + [0] * 32
    assert layout.clean.tolist() == list(range(6)) and layout.image.token_index.tolist() == [32, 33]
    assert layout.vision.token_index.tolist() == [0, 1, 2, 3]
    assert layout.joint.token_index.tolist() == [96 + 32, 96 + 33]


def test_captions_slide_in_the_released_code():
    own = edit([(1, 2)], [(5, 3, 1)], [[((2, 3), (2, 2))]], slide=False).text.positions
    slid = edit([(1, 2)], [(5, 3, 1)], [[((2, 3), (2, 2))]]).text.positions
    assert torch.equal(slid[:32], own[:32])
    # 27 places too many behind the first segment, and 29 behind the second
    assert not slid[32 : 32 + 27].any() and torch.equal(slid[59:91], own[32:64]) and not slid[91:].any()
    full = [edit([(1, 2)], [(32, 64, 1)], [[((2, 3), (2, 2))]], slide=slide).text.positions for slide in (True, False)]
    assert torch.equal(*full)


def test_an_edit_without_references():
    layout = edit([(2, 3)], [(5,)], [[]])
    assert (layout.vision, layout.clean) == (None, None)
    # the picture stands behind the caption's real tokens, and after it in order
    assert layout.image.positions[:6].tolist() == [[6, r, c] for r in range(2) for c in range(3)]
    assert layout.joint.token_index.tolist() == list(range(32, 38)) and layout.joint.modulation_row.tolist() == [0] * 64


def test_edits_stand_end_to_end():
    items = [
        ((2, 3), (5,), []),
        ((4, 8), (5, 3, 1), [((2, 3), (2, 2))]),
        ((1, 1), (3, 2, 4, 9), [((2, 2), (3, 1))] * 2),
    ]
    one = [edit(*([part] for part in item)) for item in items]
    both = edit(*map(list, zip(*items, strict=True)))
    assert both.joint.spans.lengths == tuple(n for layout in one for n in layout.joint.spans.lengths)
    assert torch.equal(both.joint.positions, torch.cat([layout.joint.positions for layout in one]))
    # an item without references has no part in the vision stream
    assert both.vision.spans.lengths == (64, 96)
    assert set(both.joint.modulation_row.tolist()) == {0, 1, 2, 3}


def test_segments_and_references_agree():
    with pytest.raises(ValueError, match="2 caption segments for 1 references; needed n"):
        edit([(2, 3)], [(5, 3)], [[((2, 3), (2, 2))]])


def test_the_released_order_of_features():
    features = torch.arange(12).view(2, 2, 3)
    assert torch.equal(released_order(features.flatten(0, 1)), features.permute(2, 0, 1).reshape(4, 3))


def test_fill_into_what_is_there():
    pack = text_to_image([(2, 3)], [5]).image
    tokens, rest = torch.randn(6, 4), torch.randn(32, 4)
    filled = pack.fill(tokens, rest)
    assert torch.equal(filled[:6], tokens) and torch.equal(filled[6:], rest[6:])
