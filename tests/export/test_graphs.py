"""Exported graphs give what the engine gives, at any size, caption length and batch, from one tracing.

Numbers are compared first, then the pictures of `runner.py`. The bound is that of the parity tests, 1e-5 of the norm: a
graph adds up in another order where it attends with a mask, and upsamples large pictures in one piece (up to 3e-6).
All tests of the written folder are here, since a worker that runs another file would trace it again.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from s3dit import Control, Pipeline
from s3dit.export import graphs, runner
from s3dit.export.layout import batched_attention, rectangle
from s3dit.export.modules import Velocity
from s3dit.export.runner import Start
from s3dit.kernels.attention import attention
from s3dit.model.controlnet import ActiveControlNet, Controls
from s3dit.model.layout import patchify, text_to_image

BOUND = 1e-5
PARTS = ("text_encoder", "transformer", "vae", "vae_encoder")
# Rows and columns of patches, and caption tokens of each picture: paddings of none, one and many, ragged or not.
CASES = [
    ((1, 1), (1,)), ((8, 8), (20,)), ((4, 8), (32,)), ((3, 11), (33,)), ((16, 2), (31, 64)), ((5, 7), (65, 3, 32)),
    ((12, 12), (100, 40)), ((1, 9), (7, 7, 7, 7)), ((2, 31), (128,)), ((17, 13), (1, 97)),
]  # fmt: skip


def inputs(grid, lengths):
    """Token ids of prompts, noise (B, rows, columns, 64), times."""
    generator = torch.Generator().manual_seed(sum(lengths) + grid[0])
    ids = [torch.randint(0, 600, (length,), generator=generator) for length in lengths]
    noise = torch.randn(len(lengths), 16, 2 * grid[0], 2 * grid[1], generator=generator)
    return ids, noise, torch.rand(len(lengths), generator=generator)


def filled(rows, value=0):
    """Rows (n, …) of several lengths as one tensor; what is behind the end of each is `value`."""
    longest = max(map(len, rows))
    return torch.stack([F.pad(row, (0, 0) * (row.dim() - 1) + (0, longest - len(row)), value=value) for row in rows])


def on_grid(latents, grid):
    return torch.stack([patchify(each.contiguous()) for each in latents]).unflatten(1, grid)


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def controlled(pipe, net, grid, lengths, strength, rule="authors"):
    """The engine's velocity of `inputs`, item by item, with the ControlNet `net`; and the control patches of each."""
    ids, noise, t = inputs(grid, lengths)
    features = pipe.encoders.encode_texts([tuple(each.tolist()) for each in ids])
    shape = len(lengths), grid[0] * grid[1], 4 * net.config.channels
    control = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    velocity = []
    with torch.no_grad():
        for i, length in enumerate(lengths):
            steering = Controls((ActiveControlNet(net, control[i], strength, rule),))
            context = pipe.transformer.context(text_to_image([grid], [length]), features[i])
            velocity.append(pipe.transformer(patchify(noise[i]), t[i : i + 1], context, steering))
    return torch.stack(velocity).unflatten(1, grid), control.unflatten(1, grid)


def distances(pipe, net, run, grid, lengths):
    """Of text features, velocities, pixels and latents by `run(part, *inputs)` from the engine's, item by item."""
    ids, noise, t = inputs(grid, lengths)
    wanted = pipe.encoders.encode_texts([tuple(each.tolist()) for each in ids])
    features = run("text_encoder", filled(ids))
    yield max(distance(row[: len(each)], each) for row, each in zip(features, wanted, strict=True))
    # NaN where nothing may look.
    given = on_grid(noise, grid), t, filled(wanted, torch.nan), torch.tensor(lengths)
    hinted, control = controlled(pipe, net, grid, lengths, 0.8)
    yield distance(run("transformer", *given, control, torch.tensor(0.8)), hinted)
    alone = [pipe.velocity(noise[i : i + 1], t[i : i + 1], [wanted[i]])[0] for i in range(len(lengths))]
    yield distance(run("transformer", *given, control, torch.tensor(0.0)), on_grid(alone, grid))
    pixels = torch.stack(pipe.decode(list(noise)))
    yield distance(run("vae", on_grid(noise, grid)), pixels)
    pixels = pixels.clamp(-1, 1)
    cut = pixels.unflatten(3, (grid[1], 16)).unflatten(2, (grid[0], 16))
    yield distance(run("vae_encoder", cut), on_grid(pipe.encode_images(list(pixels)), grid))


@pytest.mark.parametrize(("grid", "lengths"), CASES, ids=str)
@pytest.mark.slow
def test_a_graph_is_the_model_at_every_size(pipe, net_module, model, grid, lengths):
    def run(part, *given):
        return torch.from_numpy(model.run(part, *(each.numpy() for each in given)))

    assert max(distances(pipe, net_module, run, grid, lengths)) < BOUND


@pytest.mark.parametrize(("version", "rule"), [(None, "authors"), ("1.0", "authors"), ("2.0", "diffusers")])
def test_a_batch_is_the_items_by_every_version_of_a_controlnet(pipe, controlnet, version, rule):
    """As in the graphs, but called as it is: what is traced of 2.1 by its authors' rule holds for the others."""
    grid, lengths = (3, 5), (7, 40)
    net = version and controlnet(version)
    ids, noise, t = inputs(grid, lengths)
    features = filled(pipe.encoders.encode_texts([tuple(each.tolist()) for each in ids]), torch.nan)
    module = Velocity(pipe.transformer, torch.float32, net, rule)
    given = on_grid(noise, grid), t, features, torch.tensor(lengths)
    if net is None:
        wanted = on_grid(pipe.velocity(noise, t, [row[:n] for row, n in zip(features, lengths, strict=True)]), grid)
    else:
        wanted, control = controlled(pipe, net, grid, lengths, 0.7, rule)
        given += control, torch.tensor(0.7)
    with torch.no_grad(), attention.using(batched_attention):
        assert distance(module(*given), wanted) < BOUND


@pytest.mark.slow
def test_one_graph_serves_all_of_them(model):
    """Nothing was loaded, let alone traced, once more: the parts are those of the first case."""
    before = dict(model._parts)
    model.draw(["a red star"], [1], (32, 176), steps=1)
    assert model._parts == before and set(before) == set(PARTS)


@pytest.mark.parametrize(("grid", "lengths"), [((3, 11), (33,)), ((4, 8), (20,))], ids=str)
def test_one_item_stands_where_the_engine_puts_it(grid, lengths):
    made, wanted = rectangle((1, *grid), torch.tensor(lengths), *lengths), text_to_image([grid], lengths)
    for name in ("image", "text", "joint"):
        for tensor in ("positions", "modulation_row"):
            assert torch.equal(getattr(getattr(made, name), tensor), getattr(getattr(wanted, name), tensor)), name
    assert torch.equal(made.gather, wanted.gather)
    assert torch.equal(made.joint.token_index, wanted.joint.token_index)


def test_a_short_caption_is_hidden_beyond_its_own_padding():
    mask = rectangle((2, 1, 1), torch.tensor([5, 40]), 40).joint.spans.mask
    assert mask.shape == (2, 1, 1, 32 + 64) and mask[0, 0, 0].sum() == 32 + 32 and mask[1].all()


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "fp8", "int4", "fp8-weights", "int8-weights"])
def test_models_in_number_formats_are_exported(quantize, load_small):
    pipe = load_small(quantize=quantize)
    program = graphs.program(dict(graphs.modules(pipe))["transformer"], pipe.placement.device).module()
    for grid, lengths in (((2, 3), (5,)), ((24, 20), (40, 90))):
        _, noise, t = inputs(grid, lengths)
        features = [torch.randn(length, 128) for length in lengths]
        with torch.no_grad():
            found = program(on_grid(noise, grid), t, filled(features), torch.tensor(lengths))
        # Where a number's last bit differs, a code of a later rounding may be the next one.
        assert distance(found, on_grid(pipe.velocity(noise, t, features), grid)) < 5e-3


@pytest.mark.slow
def test_adapters_are_exported(load_small, tmp_path):
    pipe, (_, noise, t) = load_small(), inputs((3, 5), (7,))
    factors = {"lora_A": torch.randn(2, 192), "lora_B": torch.randn(192, 2)}
    layer = "transformer.layers.0.attention.to_q"
    save_file({f"{layer}.{name}.weight": factor for name, factor in factors.items()}, tmp_path / "a.safetensors")
    features = [torch.randn(7, 128)]
    before = pipe.velocity(noise, t, features)
    pipe.lora.attach(tmp_path / "a.safetensors")
    program = graphs.program(dict(graphs.modules(pipe))["transformer"], pipe.placement.device).module()
    with torch.no_grad():
        found = program(on_grid(noise, (3, 5)), t, filled(features), torch.tensor([7]))
    wanted = pipe.velocity(noise, t, features)
    assert distance(found, on_grid(wanted, (3, 5))) < BOUND < distance(before, wanted)


PAGE = Path(__file__).resolve().parents[2] / "s3dit" / "EXPORT.md"
PROMPTS = ["a red star above a blue ring", "a green square"]
SIZE = (48, 80)


def picture(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def mask(size=SIZE):
    """White on the right, from a place inside of a patch on."""
    white = np.zeros(size, np.uint8)
    white[:, 24:] = 255
    return white


def near(found, wanted):
    """Whether pixels are equal, but where a number lies between two integers, and the last bit decides."""
    off = np.abs(found.astype(int) - np.asarray(wanted).astype(int))
    return off.max() <= 1 and (off > 0).mean() < 2e-2


# Of the engine's request, and of the runner; in all of them two steps or three.
WAYS = {
    "words": ({}, {}),
    "image": ({"image": picture(1), "strength": 0.7, "guidance_scale": 2.0},
              {"start": Start(picture(1), None, 0.7), "guidance_scale": 2.0}),
    "mask": ({"image": picture(1), "mask_image": mask()}, {"start": Start(picture(1), mask() > 0)}),
}  # fmt: skip
# With the ControlNet of the fixture, and the image of both.
CONTROLS = [
    ({"strength": 0.8, "end": 0.5}, {"guidance_scale": 2.0}), ({"inpaint": picture(3), "mask": mask()}, {}),
]  # fmt: skip


def check(model: runner.Model, pipe: Pipeline, wanted: dict, found: dict) -> None:
    """Compare two pictures of a written model with the pipeline's."""
    found = model.draw(PROMPTS, [3, 4], SIZE, steps=3, **found)
    for i, prompt in enumerate(PROMPTS):
        options = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 3, **wanted}
        assert near(found[i], pipe(prompt, seed=3 + i, **options).images[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_it_draws_the_pictures_of_the_engine(pipe, model, way):
    check(model, pipe, *WAYS[way])


@pytest.mark.parametrize(("values", "options"), CONTROLS, ids=["image", "inpaint"])
@pytest.mark.slow
def test_it_draws_by_a_controlnet(pipe, net, model, values, options):
    control = {"control": Control(net, picture(2), **values)} | options
    check(model, pipe, control, {"control": runner.Control(picture(2), **values)} | options)


@pytest.mark.slow
def test_a_folder_is_whole(model):
    assert sorted(path.name for path in model.folder.iterdir()) == [
        "runner.py", "settings.json", "text_encoder.pt2", "tokenizer.json", "transformer.pt2", "vae.pt2",
        "vae_encoder.pt2",
    ]  # fmt: skip


@pytest.mark.slow
def test_its_command_takes_words_or_ids(pipe, model, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Model", lambda folder: model)
    monkeypatch.chdir(tmp_path)
    ids = ",".join(map(str, pipe.tokenizer.encode(PROMPTS[0])))
    for words, name in ((PROMPTS[:1], "words.png"), (["--ids", ids], "ids.png")):
        runner.main([*words, "--size", "64x48", "--steps", "1", "-o", name])
    assert Path("words.png").read_bytes() == Path("ids.png").read_bytes()
    assert Image.open("ids.png").size == (64, 48)
    with pytest.raises(SystemExit):
        runner.main([])


@pytest.mark.slow
def test_its_command_takes_pictures(pipe, net, model, tmp_path, monkeypatch):
    """A start image that has to be scaled, with a mask, and a control picture of another size."""
    monkeypatch.setattr(runner, "Model", lambda folder: model)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(1, (50, 83))).save("a.png")
    Image.fromarray(mask((50, 83))).save("m.png")
    Image.fromarray(picture(2, (64, 64))).save("c.png")
    words = "--image a.png --mask m.png --strength 0.9 --control-image c.png --control-end 0.5 --steps 2 --seed 5"
    runner.main([PROMPTS[0], *words.split(), "-o", "drawn.png"])
    options = {"image": "a.png", "mask_image": "m.png", "strength": 0.9, "control": Control(net, "c.png", end=0.5)}
    wanted = pipe(PROMPTS[0], seed=5, num_inference_steps=2, **options).images[0]
    assert near(np.asarray(Image.open("drawn.png")), wanted)


@pytest.mark.slow
def test_the_examples_of_the_page_run(model, monkeypatch, capsys):
    """Writing and loading are those of the fixture."""
    written = []
    monkeypatch.setattr(graphs, "write", lambda pipe, folder: written.append((type(pipe), folder)))
    monkeypatch.setattr(runner, "Model", lambda folder: model)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    exec(compile("\n".join(examples), PAGE.name, "exec"), {})
    assert written == [(Pipeline, "stars")] and capsys.readouterr().out == "(2, 64, 96, 3) uint8\n"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["compiled", "onnx"])
def test_other_forms_draw_the_same(form, pipe, net, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
        pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    graphs.write(pipe, tmp_path / "model", form, control=Control(net))
    assert json.loads((tmp_path / "model" / "settings.json").read_text())["form"] == form
    model = runner.Model(tmp_path / "model")
    for way in WAYS.values():
        check(model, pipe, *way)
    for values, options in CONTROLS:
        control = {"control": Control(net, picture(2), **values)} | options
        check(model, pipe, control, {"control": runner.Control(picture(2), **values)} | options)
