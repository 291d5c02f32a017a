"""Concepts that go along with a picture: their rows are those of a plain computation in float64, its bits stay."""

import importlib.util
from pathlib import Path

import pytest
import torch

from s3dit import Pipeline
from s3dit.errors import RequestError
from s3dit.research.attention import attention_maps
from s3dit.research.concepts import METHODS, concept_maps
from s3dit.research.observe import observe

PROMPTS = ["a red star above a blue ring", "a green ring on a white background"]
DRAW = {"seed": [7, 8], "num_inference_steps": 2, "height": 96, "width": 128, "output_type": "latent"}
ONE = {**DRAW, "seed": 7}
GUIDED = {"negative_prompt": "a blue star", "guidance_scale": 1.5}
LOOK = [f"layers.*.{site}" for site in ("modulation", "attention.q_rope", "attention.k_rope", "attention.v",
                                        "attention.heads")]  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", dtype="fp32", residency="resident")


def rms(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, places, config):
    """Rotate (H, D) by a position (t, row, column): pairs of channels as complex numbers, axis after axis."""
    angles = [
        place * config.rope_theta ** (-2 * i / width)
        for place, width in zip(places, config.axes_dims, strict=True)
        for i in range(width // 2)
    ]
    turn = torch.polar(torch.ones(len(angles), dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def plain(weights, name, x, places, modulation, image_k, image_v, config):
    """One block for concepts x (c, dim), head by head, in float64 -> x behind it, answers of attention (c, H, D)."""

    def weight(leaf):
        return weights[f"{name}.{leaf}"].double()

    s1, g1, s2, g2 = modulation.double().chunk(4)
    normed = rms(x, weight("attention_norm1.weight")) * (1 + s1)
    heads = {to: (normed @ weight(f"attention.to_{to}.weight").T).unflatten(-1, (config.n_heads, -1)) for to in "qkv"}
    for to in "qk":
        unit = rms(heads[to], weight(f"attention.norm_{to}.weight"))
        heads[to] = torch.stack([rotate(row, place, config) for row, place in zip(unit, places, strict=True)])
    out = torch.zeros_like(heads["q"])
    for h in range(config.n_heads):
        k, v = torch.cat((heads["k"][:, h], image_k[:, h])), torch.cat((heads["v"][:, h], image_v[:, h]))
        out[:, h] = (heads["q"][:, h] @ k.T / config.head_dim**0.5).softmax(-1) @ v
    mixed = out.flatten(1) @ weight("attention.to_out.0.weight").T
    x = x + g1.tanh() * rms(mixed, weight("attention_norm2.weight"))
    normed = rms(x, weight("ffn_norm1.weight")) * (1 + s2)
    gate, up = (normed @ weight(f"feed_forward.{layer}.weight").T for layer in ("w1", "w3"))
    mixed = (gate * gate.sigmoid() * up) @ weight("feed_forward.w2.weight").T
    return x + g2.tanh() * rms(mixed, weight("ffn_norm2.weight")), out


@pytest.mark.parametrize(("source", "mutual"), [("prompt", False), ("template", True)])
@pytest.mark.sampled(1)
def test_against_float64(pipe, source, mutual):
    concepts, config = ["star", "blue ring"], pipe.config.transformer
    before = pipe(PROMPTS, **GUIDED, **DRAW).latents
    with (
        concept_maps(
            pipe, concepts, source=source, mutual=mutual, methods="output", keep=("step", "layer", "head")
        ) as maps,
        observe(pipe, ["layers.0.input", *LOOK]) as record,
    ):
        after = pipe(PROMPTS, **GUIDED, **DRAW).latents
    assert all(map(torch.equal, before, after))
    weights, looked = pipe.transformer.state_dict(), 0
    for (item, branch), tokens in maps.items.items():
        for step in (1, 2):
            at = {"step": step, "item": item, "branch": branch}
            groups = []
            for concept in concepts:
                if source == "prompt":
                    if not tokens.has(concept):
                        continue
                    found, first = tokens.find(concept), tokens.find("text")[0]
                    rows = record.at("layers.0.input", **at)[found]
                else:
                    # As if it were a prompt: refined tokens are the same in any picture of it.
                    with observe(pipe, "layers.0.input") as alone:
                        (own,) = _items(pipe, f" {concept}")
                    found, first = own.find(concept), own.find("text")[0]
                    rows = alone.at("layers.0.input", step=1)[found]
                groups.append((rows.double(), [(1 + token - first, 0, 0) for token in found], [concept] * len(found)))
            if mutual:
                rows, places, owner = zip(*groups, strict=True)
                groups = [(torch.cat(rows), sum(places, []), sum(owner, []))]
            image = tokens.find("image")
            for x, places, owner in groups:
                for i in range(config.n_layers):
                    seen = {site: record.at(f"layers.{i}.{site.removeprefix('layers.*.')}", **at) for site in LOOK[1:]}
                    _, k, v, heads = (each.double() for each in seen.values())
                    v = v.unflatten(-1, (config.n_heads, -1))
                    # All items are at one time, so there is one row for all.
                    modulation = record.at(f"layers.{i}.modulation", step=step).flatten()
                    x, out = plain(weights, f"layers.{i}", x, places, modulation, k[image], v[image], config)
                    for concept in set(owner):
                        mine = out[[each == concept for each in owner]].mean(0)
                        for h in (0, 3):
                            expected = heads[image, h] @ mine[h]
                            found = maps.values(concept, layer=f"layers.{i}", head=h, **at)
                            # fp32 rounds at 6e-8 of a residual that six blocks have added to.
                            assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
                            looked += 1
    assert looked > 90


def _items(pipe, prompt):
    """Draw a prompt, for what it leaves in records -> its map of tokens."""
    with attention_maps(pipe) as maps:
        pipe(prompt, seed=1, num_inference_steps=1, height=32, width=32, output_type="latent")
    return maps.items.values()


def test_every_method_is_what_it_says(pipe):
    """On the prompt's own tokens, whose rows can be observed."""
    with (
        concept_maps(pipe, "ring", source="tokens", methods=list(METHODS), keep=["step", "layer", "head"]) as maps,
        observe(pipe, [site.replace("*", "2") for site in LOOK]) as record,
    ):
        pipe(PROMPTS[0], **ONE)
    tokens = maps.items[0, "positive"]
    image, (word,) = tokens.find("image"), tokens.find("ring")
    q, k, v, out = (record.at(site.replace("*", "2"), step=2).double() for site in LOOK[1:])
    v = v.unflatten(-1, out.shape[1:])
    for head in (0, 5):
        qh, kh, vh, oh = (x[:, head] for x in (q, k, v, out))
        scores = kh[image] @ qh[word] / q.shape[-1] ** 0.5
        expected = {
            "output": oh[image] @ oh[word],
            "cosine": torch.cosine_similarity(oh[image], oh[word][None]),
            "value": oh[image] @ vh[word],
            "value cosine": torch.cosine_similarity(oh[image], vh[word][None]),
            "image to concept": qh[image] @ kh[word] / q.shape[-1] ** 0.5,
            "concept to image": scores,
            "attention": scores.softmax(0),
        }
        assert set(expected) == set(METHODS)
        for method, values in expected.items():
            found = maps.values("ring", method=method, step=2, layer="layers.2", head=head)
            assert torch.allclose(found, values, rtol=1e-5, atol=1e-5 * values.abs().max().item()), method


def test_means_are_means_and_contrasts_say_against_what(pipe):
    words = ["star", "ring", "red"]
    with concept_maps(pipe, words, keep=("step", "layer", "head")) as each, concept_maps(pipe, words) as mean:
        pipe(PROMPTS[0], **ONE)
    assert torch.allclose(each.map("star"), mean.map("star"), rtol=1e-5) and mean.map("star").shape == (6, 8)
    star, ring, red = (mean.map(word) for word in words)
    assert torch.allclose(mean.map("star", contrast="others"), star - (ring + red) / 2)
    shares = [mean.map(word, contrast="softmax") for word in words]
    assert torch.allclose(sum(shares), torch.ones(6, 8, dtype=torch.float64))
    assert torch.allclose((shares[0] / shares[1]).log(), star - ring)
    heads = [("value", "layers.3", 1), ("value", "layers.1", 4)]
    array = each.array("star").mean(0)[[3, 1], [1, 4]]
    deviation, mean = torch.std_mean(array, 1, correction=0, keepdim=True)
    assert torch.allclose(each.combined("star", heads), ((array - mean) / deviation).mean(0).view(6, 8))


@pytest.mark.parametrize("residency", ["staged", "streamed"])
@pytest.mark.parametrize("source", ["prompt", "bare"])
@pytest.mark.sampled(1)
def test_every_residency_gives_the_same_maps(pipe, residency, source):
    other = Pipeline.load(device="cpu", dtype="fp32", residency=residency)
    with concept_maps(pipe, "star", source=source) as a:
        before = pipe(PROMPTS[0], **ONE).latents
    with concept_maps(other, "star", source=source) as b:
        after = other(PROMPTS[0], **ONE).latents
    assert torch.equal(a.map("star"), b.map("star")) and torch.equal(before[0], after[0])


def test_in_eight_bits(pipe):
    """Of rows of concepts and of the model's own, the same layers; errors are those of bf16 and int8."""
    other, look = Pipeline.load(device="cpu", dtype="bf16", quantize="int8"), {"layers": "layers.3", "keep": ["head"]}
    before = other(PROMPTS[0], **ONE).latents
    with concept_maps(other, "red star", **look) as narrow:
        after = other(PROMPTS[0], **ONE).latents
    with concept_maps(pipe, "red star", **look) as wide:
        pipe(PROMPTS[0], **ONE)
    a, b = (maps.map("red star", head=1) for maps in (narrow, wide))
    assert torch.equal(before[0], after[0]) and (a - b).norm() < 3e-2 * b.norm()


@pytest.mark.slow
def test_with_reference_pictures(tmp_path_factory):
    """In the first block the words that go along have the modulation, positions and values of the prompt's own."""
    file = Path(__file__).parents[1] / "inputs" / "test_references.py"
    spec = importlib.util.spec_from_file_location("test_references", file)
    spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
    omni = Pipeline.load(made.folder.__wrapped__(tmp_path_factory), device="cpu", dtype="fp32")
    request = {**ONE, "prompt": PROMPTS[0], "reference": [made.picture()], **GUIDED}
    look = {"methods": ["value", "image to concept"], "layers": "layers.0", "keep": ["step", "head"]}
    before = omni(**request).latents
    with (
        concept_maps(omni, "ring", source="prompt", **look) as along,
        concept_maps(omni, "ring", source="tokens", **look) as own,
        concept_maps(omni, "a moon") as new,
    ):
        after = omni(**request).latents
    assert torch.equal(before[0], after[0]) and new.map("a moon", branch="negative").shape == (6, 8)
    for method in look["methods"]:
        for step in (1, 2):
            a, b = (maps.array("ring", method=method)[step - 1] for maps in (along, own))
            assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item())


def test_others_see_nothing_of_the_concepts(pipe):
    with observe(pipe, ["layers.*.attention.q", "layers.*.ffn.*"]) as alone:
        pipe(PROMPTS[0], **ONE)
    with concept_maps(pipe, "star"), observe(pipe, ["layers.*.attention.q", "layers.*.ffn.*"]) as beside:
        pipe(PROMPTS[0], **ONE)
    assert list(alone) == list(beside) and all(torch.equal(alone[key], beside[key]) for key in alone)


def test_bad_input_is_named(pipe):
    with concept_maps(pipe, ["star", "ring"], layers="layers.1", steps=[2]) as maps:
        pipe(PROMPTS[0], **ONE)
    for words, wrong in (
        ("'rign'.*ring", {"concept": "rign"}),
        ("method", {"concept": "star", "method": "cosine"}),
        ("keep", {"concept": "star", "head": 1}),
        ("contrast is 'max'", {"concept": "star", "contrast": "max"}),
    ):
        with pytest.raises(RequestError, match=words):
            maps.map(**wrong)
    for words, wrong in (
        ("needed words", {"concepts": []}),
        ("'outputs' is none of .*nearest is output", {"methods": "outputs"}),
        ("methods", {"methods": []}),
        ("template, bare, prompt, tokens", {"source": "words"}),
        ("step, layer, head", {"keep": ["layers"]}),
        ("blocks layers", {"layers": "noise_refiner.*"}),
        ("nearest are layers", {"layers": "layer.1"}),
    ):
        with pytest.raises(RequestError, match=words), concept_maps(pipe, **{"concepts": "star", **wrong}):
            pass
    with pytest.raises(RequestError, match=r"nearest are.*star"), concept_maps(pipe, "stir", source="prompt"):
        pipe(PROMPTS[0], **ONE)
    with concept_maps(pipe, "star") as maps:
        pipe(PROMPTS[0], **ONE)
    with pytest.raises(RequestError, match="a contrast needs two"):
        maps.map("star", contrast="others")
    with pytest.raises(RequestError, match="needed some, as"):
        maps.combined("star", [])
    with pytest.raises(RequestError, match="a run that has 2"), concept_maps(pipe, "star", steps=[3]):
        pipe(PROMPTS[0], **ONE)
    with pytest.warns(UserWarning, match="nothing was drawn at the steps"), concept_maps(pipe, "star", items=[1]):
        pipe(PROMPTS[0], **ONE)
