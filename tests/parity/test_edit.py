"""The transformer of an Omni model against diffusers', fp32: no, one, two and three references, ragged batches.

Tolerance 1e-5 relative: packed against padded, so matrix products of other shapes, some 1e-7 a block.
"""

import json

import diffusers
import pytest
import torch
from torch import nn

from s3dit.model.config import TransformerConfig
from s3dit.model.edit_layout import edit, released_order
from s3dit.model.layout import patchify, text_to_image, unpatchify
from s3dit.model.transformer import Transformer

TEXT, VISION = 40, 48
# Rows and columns of 2 × 2 cells of the picture, lengths of caption segments, and of each reference its grid and that
# of its vision features. Segments with and without padding; a reference of one column of features.
ITEMS = [
    ((5, 7), (5, 33, 3), [((4, 6), (3, 5))]),
    ((4, 8), (32, 2, 64, 2), [((4, 8), (8, 4)), ((9, 5), (7, 1))]),
    ((8, 4), (5, 2, 2, 20, 2), [((4, 4), (4, 4)), ((5, 5), (6, 6)), ((3, 11), (1, 9))]),
]
PLAIN = ((5, 7), (21,), [])


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def both():
    """(theirs, ours) with the same random weights."""
    theirs = diffusers.ZImageTransformer2DModel(
        dim=96, n_heads=3, n_kv_heads=3, n_layers=2, n_refiner_layers=2, cap_feat_dim=TEXT, siglip_feat_dim=VISION,
        axes_dims=[8, 12, 12], axes_lens=[1536, 512, 512],
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for name, parameter in theirs.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan = 1 if "pad_token" in name else parameter[0].numel()
        norm = name.endswith("weight") and ("norm" in name or name.split(".")[1] == "0" and "embedder" in name)
        one_row = parameter.dim() == 1
        parameter.data.copy_((0.1 if one_row else fan**-0.5) * noise + (1.0 if one_row and norm else 0.0))
    ours = Transformer(TransformerConfig.from_json(json.loads(theirs.to_json_string()), "test"))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours.eval()


class Inputs:
    """Random latents, captions and vision features of an item, and t."""

    def __init__(self, item, seed):
        g = torch.Generator().manual_seed(seed)
        self.grid, self.lengths, self.references = item
        self.x = torch.randn(16, 2 * self.grid[0], 2 * self.grid[1], generator=g)
        self.text = [torch.randn(n, TEXT, generator=g) for n in self.lengths]
        self.clean = [torch.randn(16, 2 * r, 2 * c, generator=g) for (r, c), _ in self.references]
        self.vision = [torch.randn(*seen, VISION, generator=g) for _, seen in self.references]
        self.t = torch.rand(1, generator=g)


@torch.inference_mode()
def theirs_of(model, items):
    """Velocities (patches) of diffusers, in one padded batch."""
    velocities = model(
        x=[[*(c[:, None] for c in one.clean), one.x[:, None]] for one in items],
        t=torch.cat([one.t for one in items]),
        cap_feats=[one.text for one in items],
        siglip_feats=[[*one.vision, None] if one.vision else None for one in items],
        image_noise_mask=[[0] * len(one.clean) + [1] for one in items],
        return_dict=False,
    )[0]
    return [patchify(velocity[:, 0].contiguous()) for velocity in velocities]


@torch.inference_mode()
def ours_of(model, items, slide=True):
    """Velocities of this engine, in one pack."""
    layout = edit(
        [one.grid for one in items], [one.lengths for one in items], [one.references for one in items], slide=slide
    )
    clean = [patchify(c) for one in items for c in one.clean]
    vision = [released_order(v.flatten(0, 1)) for one in items for v in one.vision]
    text = torch.cat([part for one in items for part in one.text])
    context = model.context(layout, text, torch.cat(clean) if clean else None, torch.cat(vision) if vision else None)
    x = torch.cat([patchify(one.x) for one in items])
    return list(
        model(x, torch.cat([one.t for one in items]), context).split([one.grid[0] * one.grid[1] for one in items])
    )


@pytest.mark.parametrize("item", [PLAIN, *ITEMS], ids=["none", "one", "two", "three"])
def test_velocity(both, item):
    theirs, ours = both
    items = [Inputs(item, 7)]
    assert relative(ours_of(ours, items)[0], theirs_of(theirs, items)[0]) < 1e-5


def test_ragged_batch(both):
    """Items with other sizes, texts, times and numbers of references."""
    theirs, ours = both
    items = [Inputs(item, i) for i, item in enumerate([*ITEMS, ITEMS[0]])]
    for a, b in zip(ours_of(ours, items), theirs_of(theirs, items), strict=True):
        assert relative(a, b) < 1e-5


def test_batch_is_one_by_one(both):
    """With items that have no reference at all, which diffusers cannot put beside others."""
    ours = both[1]
    items = [Inputs(item, i) for i, item in enumerate([PLAIN, ITEMS[1], PLAIN, ITEMS[2]])]
    for one, packed in zip(items, ours_of(ours, items), strict=True):
        assert relative(packed, ours_of(ours, [one])[0]) < 1e-5


def test_one_time_for_all_items(both):
    ours = both[1]
    items = [Inputs(item, i) for i, item in enumerate(ITEMS)]
    for one in items:
        one.t = torch.tensor([0.25])
    separate = ours_of(ours, items)
    for one in items[1:]:
        one.t = torch.empty(0)
    for a, b in zip(separate, ours_of(ours, items), strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("item", ITEMS, ids=["one", "two", "three"])
def test_the_intended_positions(both, item, monkeypatch):
    """diffusers without its surplus positions gives what `slide=False` gives, and something else than before."""
    theirs, ours = both
    items = [Inputs(item, 7)]
    released = theirs_of(theirs, items)[0]
    pad = type(theirs)._pad_with_ids

    def intended(self, feat, *args):
        out, places, *rest = pad(self, feat, *args)
        return out, places[: len(out)], *rest

    monkeypatch.setattr(type(theirs), "_pad_with_ids", intended)
    expected = theirs_of(theirs, items)[0]
    assert relative(ours_of(ours, items, slide=False)[0], expected) < 1e-5
    assert relative(released, expected) > 1e-3


def test_text_to_image_is_its_own_layout(both):
    """Without references the released Omni code still counts caption positions otherwise, and orders other streams."""
    ours = both[1]
    one = Inputs(PLAIN, 7)
    with torch.inference_mode():
        context = ours.context(text_to_image([one.grid], [21]), one.text[0])
        plain = ours(patchify(one.x), one.t, context)
    assert relative(plain, ours_of(ours, [one])[0]) > 1e-4


def test_every_kind_of_token_counts(both):
    """Each input moves the velocity: none is dropped on its way."""
    ours = both[1]
    before = ours_of(ours, [Inputs(ITEMS[1], 7)])[0]
    for name in ("text", "clean", "vision"):
        for i in range(len(getattr(Inputs(ITEMS[1], 7), name))):
            one = Inputs(ITEMS[1], 7)
            getattr(one, name)[i] += 1.0
            assert relative(ours_of(ours, [one])[0], before) > 1e-4, (name, i)


def test_names_are_theirs(both):
    theirs, ours = both
    assert list(ours.state_dict()) and set(ours.state_dict()) == set(theirs.state_dict())
    assert isinstance(ours.siglip_refiner, nn.ModuleList) and len(ours.siglip_refiner) == 2


def test_patches_there_and_back():
    latents = torch.randn(16, 6, 10)
    assert torch.equal(unpatchify(patchify(latents), (3, 5)), latents)
