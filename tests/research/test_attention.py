"""Attention maps are a softmax in float64, on ragged batches, with guidance, by word, kind, head, layer and step."""

import pytest
import torch

from s3dit.errors import RequestError
from s3dit.research import attention
from s3dit.research.attention import attention_maps, looks
from s3dit.research.observe import observe
from s3dit.research.tokens import KINDS
from s3dit.research.tokens import tokens as map_of_tokens

PROMPTS = ["a red star above a blue ring", "a green ring"]
DRAW = {"seed": [7, 8], "num_inference_steps": 2, "height": 96, "width": 128, "output_type": "latent"}
GUIDED = {"negative_prompt": "a blue star", "guidance_scale": 1.5}


def exact(record, layer, step, item, branch, tokens):
    """Weights of the image tokens in float64, (heads, queries, keys)."""
    q, k = (record.at(f"{layer}.attention.{name}", step, item, branch).double() for name in ("q_rope", "k_rope"))
    q = q[tokens.find("image")]
    return (torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)


def test_against_float64(pipe):
    before = pipe(PROMPTS, **GUIDED, **DRAW).latents
    with (
        observe(pipe, ["layers.*.attention.q_rope", "layers.*.attention.k_rope"]) as record,
        attention_maps(pipe, ["star", "ring", "blue ring"], keep=("step", "layer", "head")) as maps,
    ):
        after = pipe(PROMPTS, **GUIDED, **DRAW).latents
    assert all(map(torch.equal, before, after))
    for (item, branch), tokens in maps.items.items():
        for layer in ("layers.0", "layers.3"):
            for step in (1, 2):
                weights = exact(record, layer, step, item, branch, tokens)
                at = {"item": item, "branch": branch, "step": step, "layer": layer, "head": 2}
                for what in (*KINDS, "text", "star", "ring"):
                    if columns := what in tokens.prompt.split() or what in tokens.kinds or what == "text":
                        columns = tokens.find(what)
                        assert torch.allclose(weights[2][:, columns].sum(1), maps.weights(what, **at), atol=1e-5), what
                entropy = -torch.special.xlogy(weights[2], weights[2]).sum(1)
                assert torch.allclose(entropy, maps.weights("entropy", **at), atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_item_of_one_block(pipe, threads, dtype, monkeypatch):
    """With large scores too, by the kernel and as one core does it, several pieces a head."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(attention, "SCORE_CHUNK", 500)
    monkeypatch.setattr(attention, "CHUNK", 500)
    (item,) = map_of_tokens(pipe, pipe.plan(PROMPTS[0], **{**DRAW, "seed": 7}))
    q, k = (torch.randn(2, len(item), 3, 32, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    weights = torch.einsum("nhd,mhd->hnm", q.double(), k.double()) * 32**-0.5
    assert weights.abs().max() > 18
    everything = weights.softmax(-1)
    weights = everything[:, item.find("image")]
    got = looks(q, k, item, ["star", "blue ring", "moon", "image"])
    back = {"star->image", "blue ring->image"}
    assert set(got) == {kind for kind in KINDS if item.find(kind)} | {"text", "star", "blue ring", "entropy"} | back
    for what in back:
        rows = everything[:, item.find(what.removesuffix("->image"))][:, :, item.find("image")]
        assert torch.allclose(got[what].double(), rows.mean(1), atol=1e-5)
    for what in set(got) - {"entropy"} - back:
        assert got[what].shape == (3, 48) and got[what].dtype == torch.float32
        assert torch.allclose(got[what].double(), weights[:, :, item.find(what)].sum(-1), atol=1e-5), what
    # A difference of numbers up to 20, in fp32.
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    assert torch.allclose(got["entropy"].double(), entropy, atol=2e-5)


def test_pictures_of_one_size_are_averaged_and_others_refused(pipe):
    one = []
    for seed in (7, 8):
        with attention_maps(pipe, "star") as maps:
            pipe(PROMPTS[0], **{**DRAW, "seed": seed})
        one.append(maps.map("star"))
    with attention_maps(pipe, "star") as both:
        for seed in (7, 8):
            pipe(PROMPTS[0], **{**DRAW, "seed": seed})
    assert torch.allclose(both.map("star"), (one[0] + one[1]) / 2, atol=1e-12)
    with pytest.raises(RequestError, match="item 0 is of another size"), attention_maps(pipe, "star"):
        for height in (96, 64):
            pipe(PROMPTS[0], **{**DRAW, "seed": 7, "height": height})


def test_means_are_means_and_kinds_sum_to_one(pipe):
    with attention_maps(pipe, "star", keep=("step", "layer", "head")) as each:
        pipe(PROMPTS[0], **{**DRAW, "seed": 7})
    with attention_maps(pipe, "star") as mean:
        pipe(PROMPTS[0], **{**DRAW, "seed": 7})
    assert torch.allclose(each.map("star"), mean.map("star"), atol=1e-12) and mean.map("star").shape == (6, 8)
    assert sum(mean.share(kind) for kind in KINDS if kind in mean.items[0, "positive"].kinds) == pytest.approx(
        1, abs=1e-6
    )
    assert mean.map("star->image").shape == (6, 8) and 0 < mean.map("star->image").sum() < 1
    inside = mean.map("star", within_text=True)
    assert torch.allclose(inside, mean.map("star") / mean.map("text"))


def test_what_was_not_looked_at_is_named(pipe):
    with attention_maps(pipe, ["star", "ring"]) as maps:
        pipe(PROMPTS[0], **{**DRAW, "seed": 7})
    with pytest.raises(RequestError, match="'rign'.*ring"):
        maps.map("rign")
    with pytest.raises(RequestError, match="keep"):
        maps.map("star", head=1)
    with attention_maps(pipe, "ring", keep=("layer", "head")) as apart:
        pipe(PROMPTS[0], **{**DRAW, "seed": 7})
    for wrong, said in (
        ({"layer": "layers.9"}, r"at item 0 to 0, branch positive to positive, layer layers\.0 to layers\.5"),
        ({"head": 6}, "head is 6; needed 0 to 5"),
        ({"head": -1}, "head is -1; needed 0 to 5"),
        ({"item": 1}, "item 1, positive"),
        ({"branch": "negative"}, "item 0, negative"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            apart.map("ring", **wrong)
    with pytest.raises(RequestError, match="step, layer, head"), attention_maps(pipe, keep=["layers"]):
        pass
    with pytest.raises(RequestError, match="nearest are.*star"), attention_maps(pipe, "stir"):
        pipe(PROMPTS[0], **{**DRAW, "seed": 7})
    with pytest.raises(RequestError, match=r"blocks layers"), attention_maps(pipe, layers="noise_refiner.*"):
        pipe(PROMPTS[0], **{**DRAW, "seed": 7})
