"""Attention maps beside diffusers' own attention and beside attention-map-diffusers 1.0, and of reference pictures.

What each sees is compared with a softmax in float64 of the queries and keys of diffusers' attention. 1e-5: both sides
compute them in fp32, with sums in another order, and weights are below 1.

attention-map-diffusers has the same weights, and reads them otherwise: the tests say where, and that ours are right
there. It is no requirement, because it asks for torchvision: `pip install --no-deps attention-map-diffusers==1.0.0`.
"""

import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_z_image
from PIL import Image

from s3dit.errors import RequestError
from s3dit.research.attention import attention_maps
from s3dit.research.observe import observe
from s3dit.research.record import Record
from s3dit.research.tokens import KINDS
from s3dit.research.tokens import tokens as map_of_tokens

PROMPTS = ["a red star above a blue ring", "a green ring"]
EVERYTHING = ("step", "layer", "head")
# 5 × 7 image tokens, filled up to 64.
DRAW = {"height": 80, "width": 112, "num_inference_steps": 2}
GUIDED = {"negative_prompt": ["a blue star", "a star"], "guidance_scale": 1.5}
PADDED = 64


def softmax(q, k):
    """Weights (heads, queries, keys) in float64 of q, k (n, heads, D)."""
    return (torch.einsum("nhd,mhd->hnm", q.double(), k.double()) * q.shape[-1] ** -0.5).softmax(-1)


def drawn(reference, **options):
    """A picture by diffusers, which writes into the lists that it is given."""
    options = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    return reference(generator=generators, output_type="latent", **options)


@pytest.fixture(scope="module")
def theirs(reference):
    """Weights in float64 of diffusers' own run with guidance: by (step, layer), of its four items."""
    calls, original = [], transformer_z_image.dispatch_attention_fn

    def look(query, key, value, attn_mask=None, **rest):
        calls.append((query, key, attn_mask))
        return original(query, key, value, attn_mask=attn_mask, **rest)

    transformer_z_image.dispatch_attention_fn = look
    try:
        drawn(reference, prompt=PROMPTS, **GUIDED, **DRAW)
    finally:
        transformer_z_image.dispatch_attention_fn = original
    weights = {}
    # Two refiners of each kind, then three main blocks.
    for i, (query, key, mask) in enumerate(calls):
        step, block = i // 7 + 1, i % 7
        if block >= 4:
            seen = [slice(None) if mask is None else mask[item].flatten().bool() for item in range(4)]
            items = zip(query, key, seen, strict=True)
            weights[step, f"layers.{block - 4}"] = [softmax(q, k[on]) for q, k, on in items]
    return weights


@pytest.fixture(scope="module")
def maps(ours):
    with attention_maps(ours, ["star", "ring", "blue ring"], keep=EVERYTHING) as maps:
        ours(PROMPTS, seed=[7, 8], output_type="latent", **GUIDED, **DRAW)
    return maps


def place(item, branch):
    """Where diffusers has an item of ours: pictures with their prompts first, then with their negative prompts."""
    return item + 2 * (branch == "negative")


def test_weights_are_those_of_diffusers_own_attention(theirs, maps):
    assert len(theirs) == 6 and len(maps.items) == 4
    for (step, layer), items in theirs.items():
        for (item, branch), tokens in maps.items.items():
            weights = items[place(item, branch)][:, tokens.find("image")]
            for what in (*KINDS, "text", "star", "ring", "blue ring"):
                if not tokens.has(what) or not (columns := tokens.find(what)):
                    continue
                for head in range(6):
                    got = maps.weights(what, item=item, branch=branch, step=step, layer=layer, head=head)
                    assert torch.allclose(got, weights[head][:, columns].sum(-1), atol=1e-5), (what, item, branch)


def references():
    """Three pictures of several shapes, which are no multiples of 16: they are cut."""
    noise = np.random.default_rng(1).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    sizes = (119, 80), (64, 97), (150, 70)
    return [Image.fromarray(levels).resize(size) for levels, size in zip(noise, sizes, strict=True)]


def test_references_in_a_ragged_batch_with_guidance(omni, tmp_path):
    """Items with two, no and one reference, of different sizes, against float64 of what was multiplied."""
    words = ["star", "ring", "reference 1", "reference 2"]
    one, two, three = references()
    with (
        observe(omni, ["layers.*.attention.q_rope", "layers.*.attention.k_rope"]) as record,
        attention_maps(omni, words, keep=EVERYTHING) as maps,
    ):
        omni(
            [*PROMPTS, "a ring"], reference=[[one, two], [], [three]], seed=[1, 2, 3], height=[80, 96, 64],
            width=[64, 80, 112], negative_prompt="a blue star", guidance_scale=1.5, num_inference_steps=2,
            output_type="latent",
        )  # fmt: skip
    assert len(maps.items) == 6 and maps.items[0, "positive"].references == ((5, 7), (6, 4))
    for (item, branch), tokens in maps.items.items():
        present = [what for what in (*KINDS, "text", *words) if tokens.has(what) and tokens.find(what)]
        assert ("reference" in present) == ("reference 1" in present) == ("vision" in present) == (item != 1)
        for step, layer in ((1, "layers.0"), (2, "layers.1")):
            q, k = (record.at(f"{layer}.attention.{name}", step, item, branch) for name in ("q_rope", "k_rope"))
            weights = softmax(q, k)[:, tokens.find("image")]
            entropy = -torch.special.xlogy(weights, weights).sum(-1)
            for head in range(3):
                at = {"item": item, "branch": branch, "step": step, "layer": layer, "head": head}
                for what in present:
                    got = maps.weights(what, **at)
                    assert torch.allclose(got, weights[head][:, tokens.find(what)].sum(-1), atol=1e-5), what
                assert torch.allclose(entropy[head], maps.weights("entropy", **at), atol=1e-5)
    record.save(tmp_path / "run.safetensors")
    assert Record.load(tmp_path / "run.safetensors").items_seen == record.items_seen
    shares = [maps.share(f"reference {i}", item=0) for i in (1, 2)]
    assert sum(shares) == pytest.approx(maps.share("reference", item=0), abs=1e-9)
    assert maps.map("reference 2").shape == maps.items[0, "positive"].grid == (5, 4)


def test_each_reference_stands_where_the_layout_has_it(omni):
    """Tokens of one reference share a place along the first axis of positions and run over its grid row by row."""
    plan = omni.plan(PROMPTS[0], reference=references(), height=64, width=64, seed=1)
    (item,) = map_of_tokens(omni, plan, guided=False)
    positions, begin = plan.layout(omni.config.transformer, False, "cpu").joint.positions, set()
    for i, (rows, columns) in enumerate(item.references):
        found = positions[item.find(f"reference {i + 1}")]
        cells = [[row, column] for row in range(rows) for column in range(columns)]
        assert len(found[:, 0].unique()) == 1 and found[:, 1:].tolist() == cells
        begin.add(found[0, 0].item())
    assert len(begin) == 3 and len(item.find("reference")) == sum(rows * columns for rows, columns in item.references)
    with pytest.raises(RequestError, match="'reference 4'.*nearest.*reference"):
        item.find("reference 4")


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip(
        "attention_map_diffusers", reason="needs pip install --no-deps attention-map-diffusers==1.0.0"
    )


@pytest.fixture(scope="module")
def captured(package, reference):
    """What the package has of that run, by (step, layer): records of image->text and image->image."""
    chosen = {"relations": ["image->text", "image->image"], "heads": "all", "timesteps": "all", "mode": "exact"}
    with package.AttentionCapture(reference, **chosen) as capture:
        drawn(reference, prompt=PROMPTS, **GUIDED, **DRAW)
    records = {}
    for record in capture.compute():
        if ".layers." in record.layer_id:
            layer = record.layer_id.removeprefix("transformer.").removesuffix(".attention")
            records[record.step_index + 1, layer, record.relation] = record
    assert len(records) == 12
    return records


def test_the_package_has_the_same_weights(captured, theirs, maps):
    for (step, layer, relation), record in captured.items():
        for item in range(4):
            weights = theirs[step, layer][item]
            columns = slice(PADDED, None) if relation == "image->text" else slice(0, PADDED)
            expected = weights[:, :PADDED, columns]
            got = record.data[item][..., : expected.shape[-1]]
            assert torch.allclose(got.double(), expected, atol=1e-5)
        for (item, branch), tokens in maps.items.items():
            if relation == "image->text" and tokens.has("star"):
                columns = [token - PADDED for token in tokens.find("star")]
                data = record.data[place(item, branch)][:, :35, columns].sum(-1)
                for head in range(6):
                    got = maps.weights("star", item=item, branch=branch, step=step, layer=layer, head=head)
                    assert torch.allclose(got, data[head].double(), atol=1e-5)


def test_the_package_leaves_the_template_out_of_its_labels(captured, reference, maps):
    """Its label of a column is the token of the bare prompt there; the template's tokens come before that."""
    from attention_map_diffusers import text_tokenizers

    ids = text_tokenizers(reference)(PROMPTS[0])["input_ids"]
    labels = reference.tokenizer.convert_ids_to_tokens(ids)
    tokens = maps.items[0, "positive"]
    columns = [token - PADDED for token in tokens.find("star")]
    theirs = [labels.index(label) for label in labels if "star" in label]
    before = [token for token in tokens.find("template") if token < tokens.find("star")[0]]
    assert theirs and columns[0] - theirs[0] == len(before) > 0


def test_the_package_draws_padding_as_rows_of_the_image(captured, maps):
    """64 queries for 5 × 7 tokens, as a square of 8 × 8, where the first row would hold parts of two."""
    record = captured[1, "layers.0", "image->text"]
    assert record.data.shape[2] == PADDED and (record.q_shape.height, record.q_shape.width) == (8, 8)
    assert maps.map("star").shape == (5, 7)


def test_the_package_takes_the_negative_prompts_half_for_the_prompts(captured, theirs, maps):
    """Z-Image's pipeline has the prompts first; the package draws the second half of a doubled batch."""
    from attention_map_diffusers.visualization import _prepare_data

    record = captured[2, "layers.1", "image->text"]
    chosen = _prepare_data(record.data, None, 2)
    negative, positive = (
        [theirs[2, "layers.1"][place(item, branch)].mean(0)[:PADDED, PADDED:] for item in (0, 1)]
        for branch in ("negative", "positive")
    )
    for item in (0, 1):
        assert torch.allclose(chosen[item][:, : negative[item].shape[1]].double(), negative[item], atol=1e-5)
    star = maps.items[0, "positive"].find("star")
    got = maps.weights("star", item=0, branch="positive", step=2, layer="layers.1")
    assert torch.allclose(got, positive[0][:35, [token - PADDED for token in star]].sum(-1), atol=1e-5)


def test_the_package_cuts_a_second_size_as_the_first(package, reference, ours):
    """Of two sizes in one call it cuts the second picture's tokens where the first's image ends: 64 in place of 96."""
    with (
        attention_maps(ours, "ring", keep=EVERYTHING) as maps,
        observe(ours, "layers.1.attention.*_rope", steps=[1]) as record,
    ):
        ours(
            PROMPTS, height=[80, 144], width=[112, 128], seed=[7, 8], num_inference_steps=1, guidance_scale=0.0,
            output_type="latent",
        )  # fmt: skip
    tokens = maps.items[1, "positive"]
    weights = softmax(*(record.at(f"layers.1.attention.{name}", 1, 1) for name in ("q_rope", "k_rope")))
    weights = weights[:, tokens.find("image")][..., tokens.find("ring")].sum(-1)
    for head in range(6):
        got = maps.weights("ring", item=1, step=1, layer="layers.1", head=head)
        assert torch.allclose(got, weights[head], atol=1e-5)
    assert maps.map("ring", item=1).shape == (9, 8) and tokens.find("text")[0] == 96

    latents, text = [torch.randn(16, 1, 10, 14), torch.randn(16, 1, 18, 16)], [torch.randn(20, 128)] * 2
    capture = package.AttentionCapture(reference, heads="all", mode="exact", layers="layers.1")
    with torch.inference_mode(), capture:
        reference.transformer(latents, torch.tensor([0.5, 0.5]), text)
    (seen,) = [each for each in capture.compute() if ".layers.1." in each.layer_id]
    assert seen.q_range == (0, PADDED) and seen.k_range[0] == PADDED and len(seen.data) == 2
