"""Start images on the embedded model: what must be equal is equal, what is kept is kept, what is wrong is one line."""

import io
import json
import zlib
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit import Pipeline
from s3dit.errors import RequestError
from s3dit.inputs.images import Pictures
from s3dit.inputs.start_image import InpaintBlend, StartImage, begin, enlarged, noised, read, remaining_sigmas
from s3dit.model.layout import patchify
from s3dit.request import Request, Solver
from s3dit.sampling.schedules import sigmas
from s3dit.sampling.solvers import solve

PROMPTS = ["a red star on a white background", "a blue circle on a black background", "a green ring, pink background"]
SOLVERS = get_args(Solver)
FEW = {"num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load("embedded", device="cpu", dtype="fp32", residency="resident")


@pytest.fixture(scope="module")
def start(pipe):
    """A picture of the model's world, 128 × 128."""
    return pipe(prompt=PROMPTS[0], seed=1).images[0]


def scene(height, width, seed=0):
    """Smooth noise with all colors."""
    levels = np.random.default_rng(seed).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def box(height, width, top, left, bottom, right, level=255):
    """A mask that is white in a box."""
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = level
    return Image.fromarray(mask)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.sampled(2)
def test_strength_one_is_text_to_image_of_the_same_noise(pipe, start, solver):
    options = {"prompt": PROMPTS[1], "seed": 5, "solver": solver, **FEW}
    assert torch.equal(pipe(image=start, strength=1.0, **options).latents[0], pipe(**options).latents[0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mask_mode", ["inpaint", "differential"])
@pytest.mark.sampled(4)
def test_a_white_mask_is_img2img(pipe, start, solver, mask_mode):
    options = {"prompt": PROMPTS[1], "seed": 5, "solver": solver, "image": start, "strength": 0.6}
    options |= {"num_inference_steps": 5, "output_type": "tensor"}
    white = Image.new("L", start.size, 255)
    masked, plain = pipe(mask_image=white, mask_mode=mask_mode, **options), pipe(**options)
    assert torch.equal(masked.latents[0], plain.latents[0]) and torch.equal(masked.images[0], plain.images[0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_kept_stays_on_its_course_in_every_solver(solver):
    """A black mask returns the image to the bit; half of one returns half, after each step at the step's own level."""
    start_image = StartImage(torch.zeros(3, 64, 64), torch.zeros(1, 64, 64))
    latents, noise = torch.randn(16, 8, 8), torch.randn(16, 64)
    paint = torch.zeros(1, 64, 64)
    paint[:, :, 32:] = 1
    for mask in (start_image.mask, paint):
        x, keep = begin([StartImage(start_image.pixels, mask)], [latents], noise, sigmas(6)[2:], False)
        kept = patchify((1 - mask[:, ::8, ::8]).expand(16, 8, 8).contiguous()).bool()
        image = patchify(latents)
        steps = list(solve(solver, lambda x, s: torch.tanh(x) - s, x, sigmas(6)[2:], lambda: torch.randn(16, 64), keep))
        assert torch.equal(x, noised(image, noise, sigmas(6)[2]))
        for step in steps:
            assert torch.equal(step.x[kept], noised(image, noise, torch.tensor(step.sigma_next))[kept])
        assert torch.equal(steps[-1].x[kept], image[kept])
        assert kept.all() or (steps[-1].x[~kept] - image[~kept]).norm() > 1


def test_a_map_of_change_holds_each_place_for_its_share_of_the_steps():
    """Of 4 steps: black for the first 3 (the last is the model's), a quarter of change for 3, a half for 2, white 0."""
    paint = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])[:, None].expand(5, 64)
    keep = InpaintBlend(torch.zeros(5, 64), torch.zeros(5, 64), paint, 4, True)
    painted = [keep(torch.ones(5, 64), i, torch.tensor(0.5))[:, 0].tolist() for i in range(1, 5)]
    assert painted == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("solver, posterior", [*((solver, "mode") for solver in SOLVERS), ("euler", "sample")])
@pytest.mark.sampled(2)
def test_a_ragged_batch_equals_one_by_one(pipe, solver, posterior):
    sizes, seeds = [(128, 96), (64, 128), (112, 80)], [4, 9, 2]
    images = [scene(*size, seed) for size, seed in zip(sizes, seeds, strict=True)]
    masks = [box(128, 96, 16, 16, 90, 70), None, box(112, 80, 0, 0, 112, 33)]
    options = {"guidance_scale": 1.5, "solver": solver, "posterior": posterior, "strength": 0.7, **FEW}
    together = pipe(prompt=PROMPTS, image=images, mask_image=masks, seed=seeds, **options)
    for prompt, image, mask, seed, batched in zip(PROMPTS, images, masks, seeds, together.latents, strict=True):
        alone = pipe(prompt=prompt, image=image, mask_image=mask, seed=seed, **options).latents[0]
        assert batched.shape == (16, image.height // 8, image.width // 8)
        # 1e-5: matrix products of other heights sum in another order
        assert relative(batched, alone) < 1e-5


def test_a_sample_is_not_the_mode(pipe, start):
    options = {"prompt": PROMPTS[1], "seed": 5, "image": start, "strength": 0.5, **FEW}
    assert relative(pipe(posterior="sample", **options).latents[0], pipe(**options).latents[0]) > 1e-3


@pytest.mark.parametrize("options", [{}, {"strength": 0.5}, {"solver": "heun"}, {"mask_mode": "differential"}])
@pytest.mark.sampled(1)
def test_outside_of_the_mask_no_pixel_changes(pipe, options):
    image, mask = scene(112, 144), box(112, 144, 21, 30, 77, 101)
    options = {"prompt": PROMPTS[1], "image": image, "mask_image": mask, "seed": 3, "num_inference_steps": 3} | options
    drawn = np.asarray(pipe(**options).images[0])
    outside = np.asarray(mask) == 0
    assert np.array_equal(drawn[outside], np.asarray(image)[outside])
    assert np.abs(drawn[~outside].astype(int) - np.asarray(image)[~outside]).mean() > 5
    bare = np.asarray(pipe(composite=False, **options).images[0])
    assert not np.array_equal(bare[outside], np.asarray(image)[outside])


def test_a_soft_edge_goes_from_the_drawn_to_the_kept(pipe, start):
    mask = box(128, 128, 32, 32, 96, 96)
    _, (start_image,) = read(Request(prompt="a", image=start, mask_image=mask, mask_blur=4), Pictures(), [])
    row = start_image.mask[0, 64]
    assert row[0] == 0 and row[64] == 1 and 0.3 < row[32] < 0.7 and (row[:64].diff() >= 0).all()
    assert ((row > 0) & (row < 1)).sum() > 16
    options = {"prompt": PROMPTS[1], "seed": 2, "image": start, "mask_image": mask, "mask_blur": 4}
    drawn = np.asarray(pipe(**options).images[0])
    untouched = start_image.mask[0].numpy() == 0
    assert untouched[0].all() and np.array_equal(drawn[untouched], np.asarray(start)[untouched])


def test_margins_are_painted_around_the_picture(pipe, start):
    options = {"prompt": PROMPTS[0], "seed": 2, "image": start, "num_inference_steps": 3}
    plan = pipe.plan(extend=(10, 0, 32, 48), **options)
    assert (plan.request.width, plan.request.height) == ((16 + 128 + 32,), (128 + 48,))
    assert plan.notes[0] == "margins are made multiples of 16: 16,0,32,48"
    drawn = np.asarray(pipe(plan.request).images[0])
    assert np.array_equal(drawn[:128, 16:144], np.asarray(start)) and drawn.shape == (176, 176, 3)
    # A mask is of the picture, and the margins are added to it.
    mask = box(128, 128, 0, 0, 64, 128)
    drawn = np.asarray(pipe(extend=(16, 16, 0, 0), mask_image=mask, **options).images[0])
    assert np.array_equal(drawn[80:, 16:], np.asarray(start)[64:])
    assert not np.array_equal(drawn[16:80, 16:], np.asarray(start)[:64])


def test_sizes_are_the_picture_s_cut_to_patches_or_as_asked(pipe):
    def notes(image, **size):
        plan = pipe.plan(prompt=PROMPTS[0], image=image, **size)
        return (plan.request.height[0], plan.request.width[0]), plan.notes

    assert notes(scene(128, 128)) == ((128, 128), ())
    size, said = notes(scene(100, 200))
    assert size == (96, 192) and said[0] == "image is 200×100 pixels; it is scaled to 192×96"
    size, said = notes(scene(64, 128), height=128, width=128)
    assert size == (128, 128) and said[0].endswith("it is scaled to 128×128, which changes its proportions")


def test_every_kind_of_input_is_the_same_picture(pipe, start, tmp_path):
    start.save(tmp_path / "a.png")
    array = np.asarray(start)
    kinds = [start, tmp_path / "a.png", str(tmp_path / "a.png"), array, torch.from_numpy(array.copy()).movedim(2, 0)]
    kinds += [array[None], start.convert("RGBA")]
    options = {"prompt": PROMPTS[1], "seed": 5, **FEW}
    drawn = [pipe(image=kind, **options).latents[0] for kind in kinds]
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    exact = torch.from_numpy(array.copy()).movedim(2, 0) / 255
    assert relative(pipe(image=exact, **options).latents[0], drawn[0]) < 1e-5


def test_one_image_for_all_is_encoded_once(pipe, start, monkeypatch):
    seen = []
    encode = type(pipe.parts["vae"]).encode
    monkeypatch.setattr(type(pipe.parts["vae"]), "encode", lambda *args: seen.append(1) or encode(*args))
    pipe(prompt=PROMPTS[:2], image=start, num_images_per_prompt=2, seed=1, **FEW)
    assert len(seen) == 1


@pytest.mark.slow
def test_a_second_pass_is_img2img_of_the_first_s_picture(pipe):
    options = {"prompt": PROMPTS[0], "seed": 4, "num_inference_steps": 4, "output_type": "tensor"}
    found = pipe(upscale=1.5, upscale_strength=0.5, **options)
    first = (pipe(**options).images[0] / 2 + 0.5).clamp(0, 1)
    by_hand = pipe(image=first, height=192, width=192, strength=0.5, **options)
    assert found.images[0].shape == (3, 192, 192)
    # 1e-5: there the picture is resized in [0, 1], here in [-1, 1]
    assert relative(found.latents[0], by_hand.latents[0]) < 1e-5
    steps = list(pipe.stream(upscale=1.5, upscale_strength=0.5, **options))
    assert [(s.i, s.n, s.calls, s.latents[0].shape[-1]) for s in steps] == [
        *((i, 6, i, 16) for i in range(1, 5)), (5, 6, 5, 24), (6, 6, 6, 24),
    ]  # fmt: skip
    assert pipe.plan(upscale=1.5, upscale_strength=0.5, **options).calls == 6
    assert "128×128 enlarged 1.2 times is made whole patches: 160×160" in pipe.plan(upscale=1.2, **options).notes


def test_a_second_pass_keeps_to_the_mask(pipe):
    image, mask = scene(128, 96), box(128, 96, 32, 16, 96, 80)
    plan = pipe.plan(prompt=PROMPTS[0], image=image, mask_image=mask, upscale=2, seed=1)
    (large,) = enlarged(plan.start_images, [plan.start_images[0].pixels], plan.then.request)
    assert large.pixels.shape == (3, 256, 192) and set(large.mask.unique().tolist()) == {0, 1}
    drawn = np.asarray(pipe(plan.request).images[0])
    kept = np.asarray(image.resize((192, 256), Image.Resampling.LANCZOS)).astype(int)
    # Far from the mask: near it the enlargement mixes what was drawn in. 1: one is rounded to 8 bits before, one after.
    assert np.abs(drawn[:50].astype(int) - kept[:50]).max() <= 1
    assert np.abs(drawn[80:180, 50:140] - kept[80:180, 50:140]).mean() > 5


def test_metadata_draws_the_picture_again(pipe, start, tmp_path):
    start.save(tmp_path / "a.png")
    box(128, 128, 32, 32, 128, 96).save(tmp_path / "m.png")
    options = {"prompt": PROMPTS[:2], "seed": 3, "num_inference_steps": 3, "mask_image": str(tmp_path / "m.png")}
    result = pipe(image=[str(tmp_path / "a.png"), tmp_path / "a.png"], extend=(16, 0, 0, 0), **options)
    fields = json.loads(json.dumps(result.metadata[1]))
    engine = fields.pop("engine")
    assert engine["replayable"] and set(engine["inputs"]) == {"image", "mask_image"}
    assert fields.pop("model") == "embedded" and fields["image"] == str(tmp_path / "a.png")
    assert relative(pipe(**fields).latents[0], result.latents[1]) < 1e-5
    assert not pipe(prompt="a", image=start, **FEW).metadata[0]["engine"]["replayable"]


@pytest.mark.slow
def test_residencies_budgets_and_previews_draw_the_same_bits(pipe):
    options = {"prompt": PROMPTS[0], "seed": 1, "image": scene(128, 96), "mask_image": box(128, 96, 0, 0, 64, 96)}
    options |= {"num_inference_steps": 2, "upscale": 1.5, "output_type": "tensor"}
    expected, previews = pipe(**options), []
    for other in (
        Pipeline.load(device="cpu", dtype="fp32", residency="streamed"),
        Pipeline.load(device="cpu", dtype="fp32", vram="24MiB"),
    ):

        def preview(step, other=other):
            with other.parts.beside():
                previews.append(other.decode(step.denoised)[0].shape)

        found = other(**options, on_step=preview)
        assert torch.equal(found.images[0], expected.images[0]) and torch.equal(found.latents[0], expected.latents[0])
    assert previews == [(3, 128, 96)] * 2 + [(3, 192, 144)] + [(3, 128, 96)] * 2 + [(3, 192, 144)]


def test_a_plan_knows_the_encoder(pipe, start):
    plan = pipe.plan(prompt=PROMPTS[2], image=start, output_type="latent", upscale=2, strength=0.5)
    said = [(stage.part, stage.work) for stage in plan.stages]
    assert said[-4:] == [
        ("vae", "1 start images"), ("transformer", "4 model calls, 1 items each"),
        ("vae", "1 pictures, enlarged, and start images again"), ("transformer", "3 model calls, 1 items each"),
    ]  # fmt: skip
    tight = Pipeline.load(device="cpu", dtype="fp32", vram="1GiB")
    peaks = [
        tight.plan(prompt=PROMPTS[2], output_type="latent", **more).memory.peak
        for more in ({}, {"image": start}, {"image": start, "upscale": 2})
    ]
    assert peaks[0] < peaks[1] < peaks[2]


def test_levels_are_the_last_ones():
    request = Request(prompt="a", image="a.png", num_inference_steps=8, shift=3.0, strength=0.6)
    assert torch.equal(remaining_sigmas(request), sigmas(8)[3:])
    assert (
        len(remaining_sigmas(Request(prompt="a", image="a.png", sigmas=[1.0, 0.5, 0.25], shift=1.0, strength=0.3))) == 2
    )


def moving():
    file = io.BytesIO()
    scene(64, 64).save(file, "GIF", save_all=True, append_images=[scene(64, 64, 1)])
    return file.getvalue()


def cut():
    file = io.BytesIO()
    scene(64, 64).save(file, "JPEG")
    return file.getvalue()[:-300]


def bomb():
    """The header of a PNG of four gigapixels."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (65536).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


WRONG = {
    "a mask of another size": ({"mask_image": box(64, 128, 0, 0, 9, 9)}, r"mask_image is 128×64 pixels; needed the si"),
    "a black mask": ({"mask_image": Image.new("L", (128, 128))}, "mask_image is black everywhere"),
    "a mask of zeros and ones": ({"mask_image": np.ones((128, 128), np.uint8)}, "white is 255"),
    "a thin mask": ({"mask_image": box(128, 128, 1, 1, 2, 99)}, "too thin"),
    "NaN": ({"image": torch.full((3, 64, 64), float("nan"))}, "image holds NaN"),
    "NaN in a mask": ({"mask_image": torch.full((128, 128), float("nan"))}, "mask_image holds NaN"),
    "four gigapixels": ({"image": np.broadcast_to(np.uint8(0), (65536, 65536, 3))}, "65536x65536 pixels"),
    "a bomb": ({"image": bomb}, "4294967296 pixels; needed at most 67,108,864; scale it"),
    "a cut JPEG": ({"image": cut}, "cannot be read .*runcated"),
    "an animation": ({"image": moving}, "2 frames"),
    "no file": ({"image": "none.png"}, "none.png: not found"),
    "a list with a hole": ({"image": [None], "mask_image": None}, "image is None"),
    "too few images": ({"image": [scene(64, 64)] * 2}, "image has 2 entries"),
    "too small": ({"image": scene(15, 64)}, "leaves 64×0 of it"),
    "too long": ({"image": np.zeros((16, 9000), np.uint8)}, "needed sides of at most 8192"),
    "margins that leave nothing": ({"extend": (64, 0, 64, 0), "width": 128}, "leaves 0×128 of it"),
    "margins without end": ({"extend": (8100, 0, 0, 0)}, "needed sides of at most 8192"),
    "strength": ({"strength": 1.01}, "strength is 1.01"),
    "a second pass without end": ({"upscale": 8, "height": 4096, "width": 128}, "a side of 32768 pixels"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.sampled(4)
def test_what_is_wrong_is_one_line_before_any_weight(tmp_path, name):
    fields, message = WRONG[name]
    fields = {"image": scene(128, 128)} | fields
    if callable(fields["image"]):
        (tmp_path / "bad").write_bytes(fields["image"]())
        fields["image"] = tmp_path / "bad"
    fresh = Pipeline.load(device="cpu", dtype="fp32")
    with pytest.raises(RequestError, match=message) as caught:
        fresh(prompt="a", **fields)
    assert "\n" not in str(caught.value) and fresh.parts.held == ()
