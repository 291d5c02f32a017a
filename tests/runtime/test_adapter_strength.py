"""The strength of an adapter by block, against files scaled by hand, and by step, against steps taken one by one."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from s3dit import Pipeline
from s3dit.cli.lora_option import LoraOption
from s3dit.cli.main import main
from s3dit.errors import RequestError
from s3dit.inputs.image_metadata import read_metadata
from s3dit.sampling.guidance import flow_time

PROMPT = "a red star above a blue ring on a white background"
REQUEST = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "height": 64, "width": 64, "output_type": "latent"}
# Of the embedded model: main blocks, both refiners, the embedding of captions, a modulation.
SHAPES = {
    "layers.0.attention.to_q": (192, 192), "layers.2.feed_forward.w2": (192, 512),
    "layers.5.attention.to_v": (192, 192), "noise_refiner.0.attention.to_k": (192, 192),
    "context_refiner.0.feed_forward.w1": (512, 192),
    "cap_embedder.1": (192, 128), "layers.3.adaLN_modulation.0": (768, 192),
}  # fmt: skip
BLOCKS = {"layers.0-2": 0.5, "*_refiner": 0.25, "layers.2.feed_forward": 2.0, "layers.5": 0, "layers.2.ffn_norm1": 1}


NORM = "layers.2.ffn_norm1"


def by_hand_factor(layer):
    """The factor of BLOCKS for a layer, written down."""
    known = {"layers.0.attention.to_q": 0.5, "layers.2.feed_forward.w2": 2.0, "layers.5.attention.to_v": 0.0, NORM: 1.0}
    return known.get(layer, 0.25 if "refiner" in layer else 1.0)


def tensors(factor=lambda layer: 1.0):
    generator, made = torch.Generator().manual_seed(1), {f"{NORM}.w_norm": torch.full((192,), 0.2 * factor(NORM))}
    for layer, (out, in_) in SHAPES.items():
        down, up = (0.15 * torch.randn(shape, generator=generator) for shape in ((4, in_), (out, 4)))
        if factor(layer):
            made[f"transformer.{layer}.lora_A.weight"] = down
            made[f"transformer.{layer}.lora_B.weight"] = up * factor(layer)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The adapter, the same with BLOCKS in its numbers, and one that changes the text encoder too."""
    folder = tmp_path_factory.mktemp("adapters")
    save_file(tensors(), folder / "style.safetensors")
    save_file(tensors(by_hand_factor), folder / "scaled.safetensors")
    text = {"text_encoder.model.layers.0.mlp.up_proj": (384, 128)}
    save_file(
        {f"{name}.lora_{leaf}.weight": torch.full(shape, 0.1) for name, (out, in_) in text.items()
         for leaf, shape in (("A", (4, in_)), ("B", (out, 4)))} | tensors(),
        folder / "both.safetensors",
    )  # fmt: skip
    return folder


def latents(pipe, **changes):
    return pipe(**REQUEST | changes).latents[0]


def load(**options):
    return Pipeline.load(device="cpu", dtype="fp32", **options)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "options", [{"residency": "resident"}, {"residency": "streamed"}, {"quantize": "int8"}], ids=str
)
@pytest.mark.slow
def test_blocks_are_what_a_file_scaled_by_hand_is(files, options):
    """To the bit: the factors are powers of two."""
    ours, theirs = load(**options), load(**options)
    report = ours.lora.attach(files / "style.safetensors", 0.8, blocks=BLOCKS)
    theirs.lora.attach(files / "scaled.safetensors", 0.8)
    assert len(report.matched) == 8
    drawn = latents(ours)
    assert torch.equal(drawn, latents(theirs))
    ours.lora.scale("style", -0.5)
    theirs.lora.scale("scaled", -0.5)
    assert torch.equal(latents(ours), latents(theirs)) and relative(latents(ours), drawn) > 1e-3


def test_blocks_of_norms(files):
    """0.8 of a half is 0.4 to the bit."""
    (folder := files / "norm").mkdir()
    save_file({f"{NORM}.w_norm": torch.full((192,), 0.2)}, folder / "norm.safetensors")
    pipe, drawn = load(), []
    for options in ({"scale": 0.8, "blocks": {"layers.2": 0.5}}, {"scale": 0.4}, {"scale": 0.8}):
        pipe.lora.attach(folder / "norm.safetensors", **options)
        drawn.append(latents(pipe))
        pipe.lora.detach()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.slow
def test_blocks_are_merged_too(files):
    ours, theirs = load(), load()
    ours.lora.attach(files / "style.safetensors", 0.8, blocks=BLOCKS)
    theirs.lora.attach(files / "scaled.safetensors", 0.8)
    for pipe in (ours, theirs):
        pipe.lora.merge()
    # Strength times factor, in one product or in two, before one rounding of each weight.
    assert relative(latents(ours), latents(theirs)) < 1e-6


def by_hand(pipe, first, file, n=4):
    """Euler's steps one by one: the adapter is attached before step `first` and detached after it, of n."""
    plan = pipe.plan(**REQUEST)
    sigmas = torch.tensor(plan.sigmas, dtype=torch.float32)
    x = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(3))
    for i in range(n):
        if i == first:
            pipe.lora.attach(file, 0.8, name="now")
        v = pipe.velocity([x], flow_time(sigmas[i]), pipe.encode([PROMPT]))[0]
        x = x + (sigmas[i] - sigmas[i + 1]) * v
        if i == first:
            pipe.lora.detach("now")
    return x


@pytest.mark.parametrize("residency", ["resident", "staged", "streamed"])
@pytest.mark.sampled(1)
def test_steps_are_as_if_it_were_attached_for_them_alone(files, residency):
    """To the bit, in a step in the middle; also what the model reads of the caption, and norms."""
    pipe = load(residency=residency)
    want = by_hand(pipe, 1, files / "style.safetensors")
    pipe.lora.attach(files / "style.safetensors", 0.8, steps=(0.25, 0.5))
    assert torch.equal(latents(pipe), want)
    pipe.lora.scale("style", 0.4)
    assert relative(latents(pipe), want) > 1e-3
    # It rests while steps are computed, and nowhere else.
    velocity = pipe.velocity([want], 0.5, pipe.encode([PROMPT]))[0]
    pipe.lora.detach()
    assert relative(velocity, pipe.velocity([want], 0.5, pipe.encode([PROMPT]))[0]) > 1e-3


def test_attached_between_two_steps_it_acts_from_the_next_on(files):
    """Also on the caption: by a stream whose adapter is taken off after half of the steps."""
    pipe = load(residency="resident")
    pipe.lora.attach(files / "style.safetensors", 0.8)
    for step in pipe.stream(**REQUEST):
        if step.i == 2:
            pipe.lora.detach()
    pipe.lora.attach(files / "style.safetensors", 0.8, steps=(0, 0.5))
    assert torch.equal(latents(pipe), step.latents[0])


def test_modulations_ahead_are_those_of_each_step(files, monkeypatch):
    """On a GPU they are computed for many steps together; 1e-5: products of more rows sum in another order."""
    pipe = load(residency="resident")
    want = by_hand(pipe, 1, files / "style.safetensors")
    monkeypatch.setattr("s3dit.runtime.modulations.EACH_PASS", ())
    pipe.lora.attach(files / "style.safetensors", 0.8, steps=(0.25, 0.5))
    assert relative(latents(pipe), want) < 1e-5


def test_several_with_steps_of_their_own_and_a_second_pass(files):
    """Where no step is theirs in common, each draws its own; a second pass counts its own steps."""
    pipe = load(residency="resident")
    plain = latents(pipe, upscale=1.5, num_inference_steps=8)
    pipe.lora.attach(files / "style.safetensors", 0.8, name="a", steps=(0, 0.5))
    pipe.lora.attach(files / "style.safetensors", 0.8, name="b", steps=(0.5, 1))
    together = latents(pipe, upscale=1.5, num_inference_steps=8)
    pipe.lora.detach()
    pipe.lora.attach(files / "style.safetensors", 0.8)
    assert torch.equal(together, latents(pipe, upscale=1.5, num_inference_steps=8))
    assert relative(together, plain) > 1e-2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"blocks": {"layers.9": 0}},
            "'layers.9', where the adapter changes nothing; it changes cap_embedder.1, context",
        ),
        ({"blocks": {"layers.0-2": "a"}}, "blocks have 'layers.0-2' with 'a'"),
        ({"blocks": {"layers": float("nan")}}, "with nan"),
        ({"blocks": 3}, "blocks are 3"),
        ({"blocks": {"*": 0, "*.*": 0}}, "blocks leave nothing"),
        ({"steps": (0.5, 0.5)}, r"steps of an adapter are \[0.5, 0.5\]"),
        ({"steps": (0, 2)}, "fractions of the steps from 0 to 1"),
        ({"steps": "0-1"}, "steps of an adapter are '0-1'"),
    ],
)
def test_what_is_refused(files, wrong, message):
    pipe = load()
    with pytest.raises(RequestError, match=message):
        pipe.lora.attach(files / "style.safetensors", **wrong)
    assert pipe.lora.names == ()


def test_steps_where_they_cannot_act(files):
    """The text encoder runs once, and merged weights act always; blocks leave the text encoder out."""
    pipe = load()
    with pytest.raises(RequestError, match="changes the text encoder, which runs once before the steps"):
        pipe.lora.attach(files / "both.safetensors", steps=(0, 0.5))
    pipe.lora.attach(files / "both.safetensors", steps=(0, 0.5), blocks={"text_encoder": 0})
    with pytest.raises(RequestError, match="acts in some steps only"):
        pipe.lora.merge()


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("a.safetensors", LoraOption("a.safetensors")),
        ("a.safetensors:0.8", LoraOption("a.safetensors", 0.8)),
        ("a:-1@layers.0-9=0,steps=0-0.5", LoraOption("a", -1.0, {"blocks": {"layers.0-9": 0.0}, "steps": (0.0, 0.5)})),
        ("a@noise_refiner=.5", LoraOption("a", None, {"blocks": {"noise_refiner": 0.5}})),
        ("me@home/a:2", LoraOption("me@home/a", 2.0)),
        ("me@home/a@layers=0", LoraOption("me@home/a", None, {"blocks": {"layers": 0.0}})),
    ],
)
def test_the_form_of_the_command_line(text, option):
    assert LoraOption.parse(text) == option


@pytest.mark.parametrize(
    "text", ["a@layers=b", "a@steps=1", "a@steps=0-1,steps=0-0.5", "a@steps=0..2-1", "a@layers=0,x"]
)
def test_what_cannot_be_read(text):
    with pytest.raises(ValueError, match=re.escape("behind its @")):
        LoraOption.parse(text)


@pytest.mark.slow
def test_from_the_command_line_and_again(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = files / "style.safetensors"
    words = ["generate", PROMPT, "--size", "64x64", "--steps", "3", "--seed", "1", "--dtype", "fp32"]
    assert main([*words, "--lora", f"{file}:0.8@layers.0-2=0.5,steps=0-0.5", "-o", "a.png"]) == 0
    (record,) = read_metadata("a.png")["adapters"]
    assert record["blocks"] == {"layers.0-2": 0.5} and record["steps"] == [0.0, 0.5]
    assert main(["generate", "--replay", "a.png", "--lora", str(file), "--dtype", "fp32", "-o", "b.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    again = f"{file}@steps=0.5-1"
    assert main(["generate", "--replay", "a.png", "--lora", again, "--dtype", "fp32", "-o", "c.png"]) == 0
    (record,) = read_metadata("c.png")["adapters"]
    assert record["blocks"] == {"layers.0-2": 0.5} and record["steps"] == [0.5, 1.0] and record["scale"] == 0.8
    capsys.readouterr()
    assert main(["plan", "--lora", f"{file}:0.8@layers.0-2=0.5,steps=0-0.5"]) == 0
    assert "of strength 0.8, layers.0-2 × 0.5, from 0 to 0.5 of the steps" in capsys.readouterr().out
