"""Whole pictures with control on the embedded model: who acts when, on what, and what it costs.

The weights of the ControlNets are random, so the pictures mean nothing; what is tested is bits.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s3dit import Control, Pipeline
from s3dit.cli import describe, main
from s3dit.config import read_model
from s3dit.controlnet import ControlNet, ControlNetConfig
from s3dit.images import read_metadata
from s3dit.pipeline import EMBEDDED
from s3dit.request import RequestError
from s3dit.weights.checkpoint import CheckpointError

SIZE = {"height": 64, "width": 96}
SHORT = SIZE | {"prompt": "a red star", "seed": 5, "num_inference_steps": 4, "output_type": "latent"}


def picture(seed, width=96, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(path, version, seed=3):
    net = ControlNet(
        ControlNetConfig(version, 16 if version == "1.0" else 33, (0, 2, 4)), read_model(EMBEDDED).transformer
    )
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=g)
        is_norm = "norm" in name and "adaLN" not in name
        tensors[name] = 0.1 * noise + 1.0 if is_norm else 0.5 * noise * parameter.shape[-1] ** -0.5
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Files of two versions."""
    folder = tmp_path_factory.mktemp("nets")
    return {version: write(folder / f"{version}.safetensors", version) for version in ("1.0", "2.1")}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def plain(pipe):
    """The states after every step without control."""
    return [step.x for step in pipe.stream(**SHORT)]


def states(pipe, control, **options):
    return [step.x for step in pipe.stream(**SHORT | options, control=control)]


def test_strength_zero_is_no_control(pipe, nets, plain):
    found = states(pipe, Control(nets["2.1"], picture(1), 0.0))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert [stage.part for stage in pipe.plan(**SHORT, control=Control(nets["2.1"], picture(1), 0.0)).stages] == [
        stage.part for stage in pipe.plan(**SHORT).stages
    ]


@pytest.mark.parametrize(
    ("span", "acts"),
    [((0, 1), [1, 1, 1, 1]), ((0, 0.5), [1, 1, 0, 0]), ((0.5, 1), [0, 0, 1, 1]), ((0.25, 0.6), [0, 1, 1, 0])],
)
def test_it_acts_in_its_steps_only(pipe, nets, plain, span, acts):
    control = Control(nets["2.1"], picture(1), start=span[0], end=span[1])
    velocities, seen = [], None
    for step in pipe.stream(**SHORT, control=control):
        velocities.append(step)
    transformer = pipe.parts["transformer"]
    seen = [step.x for step in velocities]
    first = acts.index(1)
    assert all(torch.equal(a, b) for a, b in zip(seen[:first], plain[:first], strict=True))
    assert not torch.equal(seen[first], plain[first])
    # From any state, the steps without control are those of the model alone.
    from s3dit.guidance import Guidance, guide
    from s3dit.layout import text_to_image

    with torch.inference_mode():
        text = pipe.encode(["a red star"])[0]
        context = pipe.parts["transformer"].context(text_to_image([(4, 6)], [len(text)]), text)
        alone = guide(transformer, lambda guided: context, Guidance(0.0, 0.0, 1.0), [24])
        same = [torch.equal(alone(step.start, torch.tensor(step.sigma)), step.velocity) for step in velocities]
    assert same == [not act for act in acts]


def test_a_batch_is_one_by_one(pipe, nets):
    """Each picture with its own control image, with guidance, in one pass."""
    shown = [picture(1), picture(2, 50, 70)]
    options = SHORT | {"guidance_scale": 2.0, "negative_prompt": "white"}
    both = pipe(**options | {"prompt": ["a red star", "a blue ring"], "seed": [5, 6]},
                control=Control(nets["2.1"], shown)).latents  # fmt: skip
    for i, prompt in enumerate(("a red star", "a blue ring")):
        one = options | {"prompt": prompt, "seed": 5 + i}
        alone = pipe(**one, control=Control(nets["2.1"], shown[i])).latents[0]
        other = pipe(**one, control=Control(nets["2.1"], shown[1 - i])).latents[0]
        # Sums in matrix products of other heights, some 1e-7 a block, through 4 guided steps.
        assert (both[i] - alone).norm() / alone.norm() < 2e-5
        assert (both[i] - other).norm() / alone.norm() > 1e-3


def test_several_controls(pipe, nets, plain):
    """The hints of two add up, each in its own steps, and the same file is held once."""
    a = Control(nets["2.1"], picture(1), 0.4, end=0.5)
    b = Control(nets["1.0"], picture(2), 0.4, start=0.5)
    c = Control(nets["2.1"], picture(3), 0.4)
    plan = pipe.plan(**SHORT, control=[a, b, c])
    assert len([stage for stage in plan.stages if stage.part.startswith("controlnet")]) == 2
    both, one = states(pipe, [a, b]), states(pipe, a)
    assert torch.equal(both[1], one[1]) and not torch.equal(both[2], one[2])
    assert not torch.equal(states(pipe, [a, b, c])[0], both[0])


@pytest.mark.parametrize("load", [
    {"residency": "resident"}, {"residency": "streamed"}, {"vram": "1GiB"}, {"vram": "40MiB"}, {"vram": "19MiB"}
])  # fmt: skip
def test_every_residency_gives_the_same_bits(pipe, nets, load):
    control = [Control(nets["2.1"], picture(1)), Control(nets["1.0"], picture(2), 0.3)]
    other = Pipeline.load(device="cpu", dtype="fp32", **load)
    assert all(torch.equal(a, b) for a, b in zip(states(other, control), states(pipe, control), strict=True))
    streamed = {"19MiB": ["controlnet", "controlnet", "transformer"], "40MiB": ["controlnet", "controlnet"]}
    fit = other.plan(**SHORT, control=control).fit
    kept = [] if fit is None else sorted(part.split()[0] for part in fit.kept)
    assert kept == streamed.get(load.get("vram"), [])


def test_a_quantized_base_and_a_compiled_one(pipe, nets):
    control = Control(nets["2.1"], picture(1))
    exact, plain = states(pipe, control)[-1], states(pipe, None)[-1]
    rounded = states(Pipeline.load(device="cpu", dtype="fp32", quantize="int8"), control)[-1]
    # int8 of both sides of a product is some 1e-2 off; without control it would be far away.
    assert (rounded - exact).norm() / exact.norm() < 0.1 < (exact - plain).norm() / exact.norm()


def test_inpaint_channels_count(pipe, nets):
    mask = Image.fromarray(np.pad(np.full((32, 32), 255, dtype=np.uint8), ((16, 16), (32, 32))))
    one = Control(nets["2.1"], picture(1))
    two = Control(nets["2.1"], picture(1), inpaint=picture(2), mask=mask)
    three = Control(nets["2.1"], inpaint=picture(2), mask=mask)
    found = [states(pipe, control)[-1] for control in (one, two, three)]
    assert len({one.sum().item() for one in found}) == 3


def test_with_a_start_image_and_a_second_pass(pipe, nets):
    """Control is shown at the size of each pass, and acts in the steps that are left."""
    options = SHORT | {"image": picture(4), "strength": 0.5, "upscale": 2.0}
    control = Control(nets["2.1"], picture(1))
    with_it, without = (list(pipe.stream(**options, control=c)) for c in (control, None))
    assert [step.x.shape for step in with_it] == [step.x.shape for step in without]
    assert len(with_it[-1].x) == 4 * len(with_it[0].x)
    assert not any(torch.equal(a.velocity, b.velocity) for a, b in zip(with_it, without, strict=True))


def test_the_plan_says_it_all_before_any_weight(nets):
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    plan = pipe.plan(**SHORT, control=Control(nets["2.1"], picture(1, 50, 50), end=0.7))
    assert pipe.parts.held == ()
    assert plan.request.controls[0].strength == 0.9
    said = describe(pipe, plan)
    assert "ControlNet 2.1, 33 channels, hints after layers 0, 2, 4 (3), strength 0.9, from 0 to 0.7" in said
    assert "50×50 pixels; it is scaled to 96×64, which changes its proportions" in said
    (guest,) = [stage for stage in plan.stages if stage.part.startswith("controlnet")]
    size = nets["2.1"].stat().st_size
    assert 0.99 * size < guest.reads <= size and guest.holds == guest.reads
    (host,) = [stage for stage in plan.stages if stage.part == "transformer"]
    assert host.beside == guest.holds
    assert [stage.part for stage in plan.stages][:3] == ["text_encoder", "vae", "transformer"]


def test_what_is_refused_before_any_weight(nets, tmp_path):
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    mask = picture(1, 20, 20)
    wide = {"control_all_x_embedder.2-1.weight": torch.zeros(3840, 132)}
    save_file(wide, tmp_path / "wide.safetensors")
    lacking = load_file(nets["2.1"])
    lacking.pop("control_layers.1.attention.norm_q.weight")
    save_file(lacking, tmp_path / "lacking.safetensors")
    cut = tmp_path / "cut.png"
    picture(1).save(cut)
    cut.write_bytes(cut.read_bytes()[:5000])
    cases = [
        (Control(EMBEDDED / "transformer", picture(1)), CheckpointError, "the model itself, not a ControlNet"),
        (Control(EMBEDDED / "vae", picture(1)), CheckpointError, "no ControlNet for Z-Image"),
        (Control(tmp_path / "wide.safetensors", picture(1)), CheckpointError, "width 3840, this one is 192 wide"),
        (Control(tmp_path / "lacking.safetensors", picture(1)), CheckpointError, "control_layers.1.attention.norm_q"),
        (Control(tmp_path / "none.safetensors", picture(1)), CheckpointError, "no such file"),
        (Control(nets["1.0"], picture(1), version="2.1"), CheckpointError, "version 1.0, asked for is 2.1"),
        (Control(nets["1.0"], picture(1), inpaint=picture(1), mask=picture(1)), RequestError, "cannot inpaint"),
        (Control(nets["2.1"], inpaint=picture(1), mask=mask), RequestError, "20×20 pixels; needed the size"),
        (Control(nets["2.1"], cut), RequestError, "cut.png"),
        (Control(nets["2.1"], torch.full((3, 8, 8), float("nan"))), RequestError, "NaN"),
        (Control(nets["2.1"], picture(1), strength=3.0), RequestError, "strength is 3.0"),
    ]
    for control, kind, words in cases:
        with pytest.raises(kind, match=words) as found:
            pipe.plan(**SHORT, control=control)
        assert "\n" not in str(found.value), found.value
    assert pipe.parts.held == ()
    pipe.graphs = True
    with pytest.raises(RequestError, match="without control"):
        pipe.plan(**SHORT, control=Control(nets["2.1"], picture(1)))


def test_a_weight_that_is_not_finite_is_named(pipe, nets, tmp_path):
    tensors = load_file(nets["2.1"])
    tensors["control_layers.1.after_proj.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"control_layers.1.after_proj.bias in .*nan.safetensors"):
        pipe(**SHORT, control=Control(tmp_path / "nan.safetensors", picture(1)))


def test_a_picture_is_drawn_again_from_its_metadata(pipe, nets, tmp_path, capsys):
    picture(1).save(tmp_path / "pose.png")
    word = f"{nets['2.1']}:{tmp_path / 'pose.png'}:0.5:0-0.7"
    more = ["--height", "64", "--width", "96", "--steps", "2", "--seed", "3", "--dtype", "fp32", "--device", "cpu"]
    assert main(["generate", "a red star", *more, "--control", word, "-o", str(tmp_path / "a.png")]) == 0
    assert "ControlNet 2.1" in capsys.readouterr().err
    data = read_metadata(tmp_path / "a.png")
    assert data["control"] == [
        {"model": str(nets["2.1"]), "image": str(tmp_path / "pose.png"), "strength": 0.5, "end": 0.7}
    ]
    assert data["engine"]["replayable"] and len(data["engine"]["inputs"]["control 1 image"]) == 64
    again = ["generate", "--replay", str(tmp_path / "a.png"), "--dtype", "fp32", "--device", "cpu", "--preview"]
    assert main([*again, "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture(9).save(tmp_path / "pose.png")
    assert main([*again, "-o", str(tmp_path / "b.png")]) == 2
    assert "pose.png is not what it was" in capsys.readouterr().err
    assert main([*again, "--control", f"{word}:rule=diffusers", "-o", str(tmp_path / "b.png")]) == 0
    # A picture that was given from Python has no name to find it by.
    result = pipe(**SHORT, control=Control(nets["2.1"], picture(1)))
    assert not result.metadata[0]["engine"]["replayable"]
    assert result.metadata[0]["engine"]["inputs"] == data["engine"]["inputs"]


def test_a_wrong_word_is_one_line(nets, capsys):
    for word, said in (("a:b:c", "needed FILE:IMAGE"), (f"{nets['2.1']}:none.png", "none.png: not found")):
        assert main(["generate", "a red star", "--control", word]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
