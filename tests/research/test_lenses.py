"""Lenses read what the model itself reads, terms add up to the stream, and both leave the picture as it is."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from s3dit import Control, Pipeline
from s3dit.errors import RequestError
from s3dit.model.layout import patchify
from s3dit.research.atlases import layer_atlas
from s3dit.research.lenses import END, lens, x0_images
from s3dit.research.residual import residual
from s3dit.research.table import Table

PROMPT = "a red star above a blue ring"
DRAW = {"seed": 7, "num_inference_steps": 2, "height": 96, "width": 128, "output_type": "latent"}


def latents(pipe, prompt=PROMPT, **more):
    return pipe(prompt, **{**DRAW, **more}).latents


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def final_layer(pipe, sigma):
    """Scale (dim,), weight (64, dim) and bias of the final layer at a noise level, in float64, from the weights."""
    weights = {name: tensor.double() for name, tensor in pipe.transformer.state_dict().items()}
    angles = (1 - sigma) * 1000 * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    time = torch.cat((angles.cos(), angles.sin()))
    for i in (0, 2):
        time = weights[f"t_embedder.mlp.{i}.weight"] @ time + weights[f"t_embedder.mlp.{i}.bias"]
        time = torch.nn.functional.silu(time) if i == 0 else time
    head = {name.removeprefix("all_final_layer.2-1."): w for name, w in weights.items() if "final_layer" in name}
    scale = head["adaLN_modulation.1.weight"] @ torch.nn.functional.silu(time) + head["adaLN_modulation.1.bias"]
    return 1 + scale, head["linear.weight"], head["linear.bias"]


def test_a_lens_is_the_final_layer_in_float64(pipe):
    with lens(pipe) as seen, pipe.observe("layers.*.output", tokens="image") as record:
        latents(pipe)
    for step in (1, 2):
        sigma = seen.states[step, 0, "positive"][1].item()
        scale, weight, bias = final_layer(pipe, sigma)
        for i in range(6):
            h = record.at(f"layers.{i}.output", step).double()
            centered = h - h.mean(-1, keepdim=True)
            normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            # fp32 sums over 192 channels; the angles of the time reach 1000, whose last bit is 6e-5.
            assert relative(seen.velocity(f"layers.{i}", step), (normed * scale) @ weight.T + bias) < 5e-5


def test_the_lens_after_the_last_block_is_the_velocity(pipe):
    steps = []
    with lens(pipe) as seen, pipe.observe(["velocity", "x0"]) as record:
        (drawn,) = pipe(PROMPT, on_step=steps.append, **DRAW).latents
    assert seen.layers == [*(f"layers.{i}" for i in range(6)), END] and seen.steps == [1, 2]
    for step in (1, 2):
        assert torch.equal(seen.velocity("layers.5", step), record.at("velocity", step))
        assert torch.equal(patchify(seen.x0(END, step)), record.at("x0", step))
        assert relative(seen.velocity("layers.4", step), seen.velocity(END, step)) > 0.1
    # Of the last step to sigma 0, x + (sigma - 0) · velocity, with the same roundings.
    assert torch.equal(seen.x0(step=2), drawn) and torch.equal(steps[-1].denoised[0], drawn)
    errors = seen.errors()
    assert errors.column(2)["layers.5"] == 0 and errors.at("layers.0", 1) > errors.at("layers.4", 1) > 0.1


def test_lenses_of_a_guided_batch_are_those_of_each_alone():
    """Two sizes with guidance, streamed in bf16: the bits of the picture stay, and parts are whose they are said."""
    batch = {
        "prompt": [PROMPT, "a green ring"],
        "guidance_scale": 1.5,
        "negative_prompt": "a blue star",
        "seed": [7, 8],
    }
    streamed = Pipeline.load(device="cpu", dtype="bf16", residency="streamed")
    before = latents(streamed, **batch)
    with lens(streamed, ["layers.*", "noise_refiner.*"]) as seen, residual(streamed) as terms:
        after = latents(streamed, **batch)
    assert all(map(torch.equal, after, before))
    assert len(seen.velocities) == 2 * 2 * 2 * (1 + 6 + 1) and len(terms.items_seen) == 4
    for branch in ("positive", "negative"):
        for item in (0, 1):
            assert torch.equal(seen.velocity("layers.5", 1, item, branch), seen.velocity(END, 1, item, branch))
    # The negative branches of both pictures have one prompt and other noise, the positive ones other prompts.
    assert torch.equal(*(seen.states[1, 0, branch][0] for branch in ("positive", "negative")))
    assert not torch.equal(seen.velocity(END, 1, 0, "positive"), seen.velocity(END, 1, 0, "negative"))
    for item, branch in ((0, "positive"), (1, "positive"), (0, "negative"), (1, "negative")):
        # Every term is rounded to bf16 three times on its way.
        assert sum(terms.table("share", item, branch).column(2).values()) == pytest.approx(1, abs=3e-3)
    # Where it computes in bf16, with 8 bits of mantissa, each of 12 additions rounds by 2^-9 of the stream.
    least = 1e-4 if streamed.placement.compute == torch.bfloat16 else 0.0
    assert least < max(values.max() for values in terms.select(statistic="unexplained").values()) < 24 * 2**-9


def built(file):
    """A module of other tests, for what it builds."""
    spec = importlib.util.spec_from_file_location(file, Path(__file__).parents[1] / "inputs" / f"{file}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture(scope="module", params=["control", "references"])
def steered(request, pipe, tmp_path_factory):
    """A pipeline and a request with what else there is in the streams: a ControlNet's hints, or clean tokens."""
    if request.param == "control":
        made = built("test_control_hints")
        net = made.write(tmp_path_factory.mktemp("net") / "net.safetensors", "1.0")
        return pipe, {"control": Control(image=made.picture(1, 128, 96), model=net)}
    made = built("test_references")
    omni = Pipeline.load(made.folder.__wrapped__(tmp_path_factory), device="cpu", dtype="fp32")
    return omni, {"reference": [made.picture()], "guidance_scale": 1.5}


@pytest.mark.slow
def test_with_control_and_with_references(steered):
    pipe, more = steered
    before = latents(pipe, **more)
    with lens(pipe) as seen, residual(pipe) as terms:
        assert all(map(torch.equal, latents(pipe, **more), before))
    with layer_atlas(pipe, "layers.5", ["drop"]) as atlas:
        assert all(map(torch.equal, latents(pipe, **more), before))
    for branch in {branch for _, _, branch in seen.states}:
        assert torch.equal(seen.velocity("layers.5", 2, 0, branch), seen.velocity(END, 2, 0, branch))
        assert sum(terms.table("share", branch=branch).column(2).values()) == pytest.approx(1, abs=1e-5)
    assert max(values.max() for values in terms.select(statistic="unexplained").values()) < 1e-6
    # Hints come after blocks 0, 2 and 4.
    hints = [term for term in terms.terms if term.endswith(".input")]
    assert hints == ["layers.0.input", *(f"layers.{i}.input" for i in (1, 3, 5) if "control" in more)]
    # Without the last block, the velocity is what the lens reads before it; but for the hint that comes between.
    pairs = [[seen.velocity(layer, *at).double() for layer in ("layers.4", END)] for at in seen.states if at[0] == 2]
    error = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    assert (atlas.error("layers.5", "drop", [2]) == pytest.approx(error.sqrt().item(), rel=1e-6)) == (
        "control" not in more
    )


def test_pictures_of_a_lens(pipe):
    draw = {**DRAW, "output_type": "pil"}
    with lens(pipe, "layers.5", steps=[2]) as seen:
        (drawn,) = pipe(PROMPT, **draw).images
    images = seen.images()
    assert list(images) == [("layers.5", 2), (END, 2)] and all(image.size == (128, 96) for image in images.values())
    assert images[END, 2].tobytes() == drawn.tobytes()
    first, last = x0_images(pipe, pipe.stream(PROMPT, **draw))
    assert last.tobytes() == drawn.tobytes() != first.tobytes()
    assert seen.picture(side=64).width > 128


def test_terms_add_up_to_the_stream(pipe):
    """Against a plain sum in float64, and within what the engine's own additions may round."""
    added = [f"layers.{i}.{part}.added" for i in range(6) for part in ("attention", "ffn")]
    streams = [f"layers.{i}.{site}" for i in range(6) for site in ("between", "output")]
    with residual(pipe) as terms, pipe.observe(["layers.0.input", *added, *streams]) as record:
        latents(pipe)
    assert terms.terms == ["layers.0.input", *added]
    for step in (1, 2):
        total = record.at("layers.0.input", step).double()
        bound = torch.zeros_like(total)
        for site, stream in zip(added, streams, strict=True):
            term, after = record.at(site, step).double(), record.at(stream, step).double()
            assert torch.allclose(terms.at(site, step, statistic="norm").double(), term.norm(dim=1), rtol=1e-6)
            before = total / total.norm(dim=1, keepdim=True)
            cosine = (before * term).sum(1) / term.norm(dim=1)
            assert torch.allclose(terms.at(site, step, statistic="cosine").double(), cosine, atol=1e-5)
            total = total + term
            # A sum is rounded once, by half a unit of 2^-23; the term by 2^-22 in what is shown and what is added.
            bound += 2**-24 * after.abs() + 2**-22 * term.abs()
            assert ((total - after).abs() <= bound).all()
            unexplained = (total - after).norm(dim=1) / after.norm(dim=1)
            assert torch.allclose(terms.at(stream, step, statistic="unexplained").double(), unexplained, atol=1e-12)
            assert unexplained.max() < 1e-6


def test_shares_are_parts_of_the_velocity(pipe):
    ends = ["layers.0.input", "layers.5.output"]
    look = pipe.observe(["layers.**.added", *ends], tokens="image")
    with residual(pipe, steps=[2]) as terms, look as record, lens(pipe) as seen:
        latents(pipe)
    scale, weight, bias = final_layer(pipe, seen.states[2, 0, "positive"][1].item())
    last = record.at("layers.5.output", 2).double()
    std = (last.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    target = seen.velocity(END, 2).double() - bias
    for term in terms.terms:
        rows = record.at(term, 2).double()
        part = ((rows - rows.mean(-1, keepdim=True)) * scale / std) @ weight.T
        share = (part * target).sum(-1) / target.square().sum(-1).mean()
        assert torch.allclose(terms.at(term, 2, statistic="share").double(), share, atol=1e-4)
    assert sum(terms.table("share").column(2).values()) == pytest.approx(1, abs=1e-5)
    assert terms.map("layers.5.ffn.added", 2, "share").shape == (6, 8)
    assert (
        terms.map("layers.5.ffn.added", 2).flatten().tolist()
        == terms.at("layers.5.ffn.added", 2, statistic="norm")[: 6 * 8].tolist()
    )


def test_what_comes_between_blocks_is_a_term_and_what_is_changed_in_one_is_not_explained(pipe):
    hint = torch.linspace(-1, 1, 192)
    handle = pipe.transformer.layers[3].register_forward_pre_hook(lambda block, args: (args[0] + hint, *args[1:]))
    try:
        with residual(pipe) as terms:
            latents(pipe)
    finally:
        handle.remove()
    assert "layers.3.input" in terms.terms
    found = terms.at("layers.3.input", statistic="norm")
    assert torch.allclose(found, hint.norm().expand_as(found), rtol=1e-5)
    assert max(values.max() for values in terms.select(statistic="unexplained").values()) < 1e-6
    assert sum(terms.table("share").column(1).values()) == pytest.approx(1, abs=1e-5)
    with pipe.edit({"layers.3.between": lambda rows, where: rows * 1.01}), residual(pipe) as terms:
        latents(pipe)
    assert terms.at("layers.2.output", statistic="unexplained").max() < 1e-6
    assert terms.at("layers.3.output", statistic="unexplained").min() > 1e-3


def test_massive_channels(pipe):
    with residual(pipe, steps=[1]) as terms, pipe.observe("layers.*.output", steps=[1]) as record:
        latents(pipe)
    table = terms.massive(1, top=3)
    streams = torch.stack([record.at(f"layers.{i}.output").abs().double() for i in range(6)])
    ratios = streams.amax(1) / streams.flatten(1).median(1, keepdim=True).values
    channels = ratios.amax(0).topk(3).indices.tolist()
    assert table.rows == tuple(f"channel {i}" for i in channels)
    assert torch.allclose(torch.tensor(table.values, dtype=torch.float64), ratios[:, channels].T, rtol=1e-6)
    assert max(max(row) for row in table.values) > 20


def test_what_is_kept_of_a_full_size_picture_fits(pipe):
    """Counted here, and by the same formulas of 30 blocks, 4,096 image and 64 caption tokens of 3,840, and 8 steps."""
    with lens(pipe) as seen, residual(pipe) as terms:
        latents(pipe)

    def kept(blocks, joint, image, dim, steps):
        count = 2 * blocks + 1
        by_step = count * (2 * joint + image) + 2 * blocks * joint + blocks * (dim + 1)
        return 4 * steps * by_step, 4 * steps * (blocks + 1) * image * 64

    (item,) = terms.items_seen
    counted = [sum(tensor.nbytes for tensor in each.values()) for each in (terms, seen.velocities)]
    assert counted == list(kept(6, len(item), len(item.find("image")), 192, 2))
    of_terms, of_lens = kept(30, 4096 + 64, 4096, 3840, 8)
    assert of_terms < 40e6 and of_lens < 261e6


def test_nothing_is_left_behind(pipe):
    before = latents(pipe)
    for look in (lens, residual):
        with pytest.raises(ZeroDivisionError), look(pipe):
            latents(pipe)
            raise ZeroDivisionError
    module = pipe.parts.component("transformer").module
    hooks = [each for part in module.modules() for each in (part._forward_hooks, part._forward_pre_hooks) if each]
    assert not hooks and all(map(torch.equal, latents(pipe), before))


def test_bad_input(pipe):
    with pytest.raises(RequestError, match=r"nearest are .*layers"), lens(pipe, "layer.1"):
        pass
    with pytest.raises(RequestError, match="has no image tokens"), lens(pipe, "context_refiner.0"):
        pass
    for look in (lens(pipe, steps=[3]), residual(pipe, steps=[1, 3])):
        with pytest.raises(RequestError, match=r"steps \[3\] were chosen of a run that has 2"), look:
            latents(pipe)
    for look in (lens(pipe), residual(pipe), layer_atlas(pipe, "layers.0", ["drop"])):
        with pytest.raises(RequestError, match="are of pictures"), look:
            pipe.velocity(torch.zeros(1, 16, 8, 8), 0.5, pipe.encode("a red star"))
    with lens(pipe, "layers.0", steps=[1]) as seen, residual(pipe, steps=[1]) as terms:
        latents(pipe)
    for wrong in (
        lambda: seen.velocity("layers.0", 2),
        lambda: seen.x0("layers.9", 1),
        lambda: terms.table("norms"),
        lambda: terms.massive(2),
        lambda: seen.errors().at("layers.0", 3),
        lambda: Table.load("nowhere.json"),
    ):
        with pytest.raises(RequestError, match="need|nearest"):
            wrong()


def test_tables_are_kept_as_json(tmp_path):
    table = Table.of("t", ["a", "b"], [1, 2], [[1.5, math.nan], [None, 0.1]], log=True)
    table.save(tmp_path / "t.json")
    assert Table.load(tmp_path / "t.json") == table and table.at("a", 2) is None and table.at("b", 2) == 0.1
    assert table.picture().mode == table.lines().mode == "RGB"
    with pytest.raises(RequestError, match="needed"):
        table.save(tmp_path / "no" / "t.json")
