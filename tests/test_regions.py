"""Regions in whole pictures of the embedded model: where things appear, and in every kind of request the same."""

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit import Pipeline, Region
from s3dit.cli.main import main
from s3dit.inputs.image_metadata import read_metadata
from s3dit.inputs.images import Picture

LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 0.5, 1)
STAR, RING = "a red star at the left on a white background", "a blue ring at the right on a white background"
HALVES = [Region(LEFT, STAR), Region(RIGHT, RING)]
LATENT = {"output_type": "latent", "num_inference_steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", dtype="fp32", residency="resident")


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def centers(image):
    """The middles (x, y) of what is red and of what is blue."""
    rgb = np.asarray(image).astype(int)
    masks = [(rgb[..., c] > 150) & (np.delete(rgb, c, 2).max(2) < 110) for c in (0, 2)]
    return [(np.nonzero(mask)[1].mean(), np.nonzero(mask)[0].mean(), mask.sum()) for mask in masks]


def test_things_appear_where_their_regions_are(pipe):
    """Prompts that say where in words; and centered ones, which do not."""
    plain = [
        Region(LEFT, "a small red star on a white background", centered=True),
        Region(RIGHT, "a small blue ring on a white background", centered=True),
    ]
    for image in pipe(["a white background"] * 2, region=[HALVES, plain], base_weight=0.2, seed=[1, 2]).images:
        (red, _, stars), (blue, _, rings) = centers(image)
        assert 16 < red < 48 and 80 < blue < 112 and min(stars, rings) > 100


def test_a_region_of_everything_is_its_prompt_to_the_bit(pipe):
    alone = pipe(STAR, **LATENT).latents[0]
    assert torch.equal(pipe("a ring", region=Region((0, 0, 1, 1), STAR), **LATENT).latents[0], alone)


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m_sde"])
def test_one_prompt_in_all_regions_is_the_prompt(pipe, solver):
    """With guidance; 1e-5: other heights of products sum in another order, shares within 2^-24."""
    fields = LATENT | {"guidance_scale": 2.0, "negative_prompt": "blue", "cfg_normalization": 1.0, "solver": solver}
    alone = pipe(STAR, **fields).latents[0]
    same = pipe(STAR, region=[Region(LEFT, STAR, 3.0), Region((0.3, 0, 0.4, 0.7), STAR)], **fields).latents[0]
    assert relative(same, alone) < 1e-5


def test_against_a_loop_over_velocities(pipe):
    """Euler's method by `pipe.velocity`, a call a prompt, blended in latents: the base has the rest, and a share."""
    regions = [Region(LEFT, STAR), Region((0.75, 0, 0.25, 1), RING, 2.0)]
    drawn = pipe(
        "a green circle", region=regions, base_weight=0.5, guidance_scale=1.5, negative_prompt="black", **LATENT
    )
    plan = pipe.plan("a green circle", **{name: LATENT[name] for name in ("num_inference_steps", "seed")})
    embeds = pipe.encode(["a green circle", STAR, RING, "black"])
    weights = torch.zeros(3, 16, 16, dtype=torch.float64)
    weights[0], weights[0][:, 8:12] = 0.5, 1.5
    weights[1][:, :8], weights[2][:, 12:] = 1, 2
    shares = weights / weights.sum(0)
    x = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(5)).double()
    for sigma, after in zip(plan.sigmas, plan.sigmas[1:], strict=False):
        parts = [pipe.velocity([x.float()], 1 - sigma, [each])[0].double() for each in embeds]
        blended = sum(share * part for share, part in zip(shares, parts, strict=False))
        x = x + (sigma - after) * (blended + 1.5 * (blended - parts[3]))
    # fp32 products in another grouping, three steps of guidance.
    assert relative(drawn.latents[0].double(), x) < 2e-5


def test_a_batch_draws_what_each_picture_would_be_alone(pipe):
    regions = [None, HALVES, [Region((0, 0, 1, 0.4), STAR, centered=True)]]
    fields = LATENT | {"guidance_scale": 1.5, "base_weight": 0.25}
    sizes = {"height": [128, 96, 128], "width": [128, 128, 64]}
    prompts, seeds = ["a green circle", "a white background", "a ring"], [1, 2, 3]
    batch = pipe(prompts, region=regions, **fields | sizes | {"seed": seeds}).latents
    for i, latents in enumerate(batch):
        own = {name: values[i] for name, values in sizes.items()} | {"seed": seeds[i]}
        own = fields | own | ({} if regions[i] is None else {"region": regions[i]})
        own = own if regions[i] else {name: value for name, value in own.items() if name != "base_weight"}
        assert relative(latents, pipe(prompts[i], **own).latents[0]) < 1e-5


@pytest.mark.slow
def test_start_images_masks_and_a_second_pass(pipe):
    """What a mask keeps stays the input's; the second pass draws the same regions, larger."""
    start = pipe("a white background", seed=3).images[0]
    keep = Image.new("L", (128, 128))
    keep.paste(255, (0, 32, 128, 96))
    result = pipe(
        "a white background", region=HALVES, image=start, mask_image=keep, upscale=1.5, upscale_strength=0.4, seed=4
    )
    assert result.images[0].size == (192, 192)
    (red, _, stars), (blue, _, rings) = centers(result.images[0])
    assert red < 96 < blue and min(stars, rings) > 150
    first = pipe("a white background", region=HALVES, image=start, mask_image=keep, seed=4).images[0]
    assert np.array_equal(np.asarray(first)[:32], np.asarray(start)[:32])


def test_streamed_draws_the_same_bits(pipe):
    streamed = Pipeline.load(device="cpu", dtype="fp32", residency="streamed")
    fields = LATENT | {"region": HALVES, "guidance_scale": 1.0}
    assert torch.equal(pipe("a ring", **fields).latents[0], streamed("a ring", **fields).latents[0])


def test_the_plan_says_the_cost(pipe):
    plan = pipe.plan("a white background", region=HALVES, base_weight=0.1, guidance_scale=2)
    assert plan.owners == (0, 0, 0) and len(plan.captions) == 4
    assert any("8 model calls, 4 items each" in stage.work for stage in plan.stages)
    assert not any("has no effect" in note for note in plan.notes)


def test_the_map_of_tokens_names_every_prompt(pipe):
    from s3dit.research.tokens import tokens

    plan = pipe.plan(["a white background", "a ring"], region=[HALVES, None], guidance_scale=1, negative_prompt="black")
    found = [(item.item, item.branch, item.prompt) for item in tokens(pipe, plan)]
    assert found == [
        (0, "positive", STAR), (1, "positive", "a ring"), (0, "positive 2", RING), (0, "negative", "black"),
        (1, "negative", "black"),
    ]  # fmt: skip


def test_from_the_command_line_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gray = Image.new("L", (128, 128))
    gray.paste(255, (0, 0, 64, 128))
    gray.save("left.png")
    words = ["generate", "--region", f"left.png:{STAR}", "--region", f"64,0,64,128@0.5:{RING}", "--steps", "2"]
    assert main([*words, "--seed", "3", "-o", "a.png"]) == 0
    data = read_metadata("a.png")
    assert data["engine"]["inputs"] == {"region 1 mask": Picture.open("left.png").sha256}
    assert data["engine"]["replayable"] is True
    assert main(["generate", "--replay", "a.png", "-o", "b.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    gray.rotate(180).save("left.png")
    capsys.readouterr()
    assert main(["generate", "--replay", "a.png", "-o", "c.png"]) == 2
    assert "is not what it was then" in capsys.readouterr().err
    assert main(["inspect", "a.png"]) == 0
    assert f"--region 'path/to/left.png:{STAR}' --region '64,0,64,128@0.5:{RING}'" in capsys.readouterr().out
    again = ["generate", "--replay", "a.png", "--region", f"left.png:{STAR}", "--steps", "1", "-o", "d.png"]
    assert main(again) == 0 and "with another region 1 mask than 'left.png'" in capsys.readouterr().err
