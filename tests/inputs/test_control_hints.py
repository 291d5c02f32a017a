"""Whole pictures with control on the embedded model: who acts when, on what, and what it costs.

The weights of the ControlNets are random, so the pictures mean nothing; what is tested is bits.
"""

import shutil
from itertools import cycle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s3dit import Control, Pipeline
from s3dit.cli.main import main
from s3dit.cli.show import describe
from s3dit.errors import CheckpointError, RequestError
from s3dit.inputs.image_metadata import read_metadata
from s3dit.model.controlnet import ControlNet
from s3dit.model.controlnet_config import ControlNetConfig
from s3dit.model.layout import text_to_image
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model
from s3dit.sampling.caches import FirstBlock
from s3dit.sampling.guidance import Guidance, guide

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
    return Pipeline.load(device="cpu", dtype="fp32", residency="resident")


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
@pytest.mark.sampled(1)
def test_it_acts_in_its_steps_only(pipe, nets, plain, span, acts):
    control = Control(nets["2.1"], picture(1), start=span[0], end=span[1])
    steps = list(pipe.stream(**SHORT, control=control))
    first = acts.index(1)
    assert all(torch.equal(step.x, x) for step, x in zip(steps[:first], plain[:first], strict=True))
    # From any state, the steps without control are those of the model alone.
    with torch.inference_mode():
        text, transformer = pipe.encode(["a red star"])[0], pipe.parts["transformer"]
        context = transformer.context(text_to_image([(4, 6)], [len(text)]), text)
        alone = guide(transformer, lambda guided: context, Guidance(0.0, 0.0, 1.0), [24])
        same = [torch.equal(alone(step.start, torch.tensor(step.sigma)), step.velocity) for step in steps]
    assert same == [not act for act in acts]


@pytest.mark.slow
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


def test_a_cache_beside_control(pipe, nets, monkeypatch):
    """Tokens of one of two pictures get that one's hints; a call in which control begins or ends is computed."""
    options = SHORT | {"prompt": ["a red star", "a blue ring"], "seed": [5, 6]}
    control = Control(nets["2.1"], [picture(1), picture(2)], 0.5)
    whole = pipe(**options, control=control).latents
    turns = cycle([True, False])
    monkeypatch.setattr(FirstBlock, "spares", lambda self, i, change: next(turns))
    drawn = pipe(**options, control=control, cache="first-block:0.1")
    assert [record["engine"]["reused"] for record in drawn.metadata] == [1, 0]
    # Sums in matrix products of other heights.
    assert (drawn.latents[1] - whole[1]).norm() / whole[1].norm() < 2e-5
    assert (drawn.latents[0] - whole[0]).norm() / whole[0].norm() > 1e-3
    steps = pipe.stream(**SHORT | {"num_inference_steps": 8}, control=Control(nets["2.1"], picture(1), start=0.5),
                        cache="taylor:9:first=1:last=0")  # fmt: skip
    assert [step.reused[0] for step in steps] == [0, 1, 2, 3, 3, 4, 5, 6]


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
@pytest.mark.sampled(1)
def test_every_residency_gives_the_same_bits(pipe, nets, load):
    control = [Control(nets["2.1"], picture(1)), Control(nets["1.0"], picture(2), 0.3)]
    other = Pipeline.load(device="cpu", dtype="fp32", **load)
    assert all(torch.equal(a, b) for a, b in zip(states(other, control), states(pipe, control), strict=True))
    streamed = {"19MiB": ["controlnet", "controlnet", "transformer"], "40MiB": ["controlnet", "controlnet"]}
    memory = other.plan(**SHORT, control=control).memory
    kept = [] if memory is None else sorted(part.split()[0] for part in memory.kept)
    assert kept == streamed.get(load.get("vram"), [])


def test_a_quantized_base(pipe, nets):
    control = Control(nets["2.1"], picture(1))
    exact, plain = states(pipe, control)[-1], states(pipe, None)[-1]
    rounded = states(Pipeline.load(device="cpu", dtype="fp32", quantize="int8"), control)[-1]
    # int8 of both sides of a product is some 1e-2 off; without control it would be far away.
    assert (rounded - exact).norm() / exact.norm() < 0.1 < (exact - plain).norm() / exact.norm()


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """A low-rank adapter of the transformer, and a model directory whose weights hold it, summed in float64."""
    folder = tmp_path_factory.mktemp("style")
    shutil.copytree(EMBEDDED, folder / "merged")
    (path,) = (folder / "merged" / "transformer").glob("*.safetensors")
    weights, g = load_file(path), torch.Generator().manual_seed(9)
    low = {}
    for name in ("noise_refiner.0.attention.to_q", "layers.0.attention.to_out.0", "layers.3.feed_forward.w2"):
        weight = weights[f"{name}.weight"].double()
        a, b = (0.3 * torch.randn(shape, generator=g) for shape in ((4, weight.shape[1]), (weight.shape[0], 4)))
        low |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        weights[f"{name}.weight"] = (weight + 0.7 * b.double() @ a.double()).float()
    save_file(weights, path)
    save_file(low, folder / "style.safetensors")
    return folder


def attached(style, **load):
    pipe = Pipeline.load(device="cpu", dtype="fp32", **load)
    pipe.lora.attach(style / "style.safetensors", 0.7)
    return pipe


@pytest.mark.parametrize("rule", ["authors", "diffusers"])
@pytest.mark.slow
def test_an_adapter_beside_control_is_its_sum_with_the_weights(pipe, nets, style, rule):
    control = [Control(nets["2.1"], picture(1), rule=rule), Control(nets["1.0"], picture(2), 0.3)]
    guided = {"guidance_scale": 1.5}
    found = states(attached(style), control, **guided)[-1]
    needed = states(Pipeline.load(style / "merged", device="cpu", dtype="fp32"), control, **guided)[-1]
    # One rounding of a sum against two products in fp32, some 1e-7 a layer, through 4 guided steps.
    assert (found - needed).norm() / needed.norm() < 2e-5
    # Either of the two alone is far away.
    for other in (states(pipe, control, **guided)[-1], states(attached(style), None, **guided)[-1]):
        assert (other - needed).norm() / needed.norm() > 1e-2


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.slow
def test_an_adapter_beside_control_is_the_same_bits_in_every_residency(pipe, nets, style, quantize):
    control = Control(nets["2.1"], picture(1))
    staged = attached(style, quantize=quantize)
    needed = states(staged, control)
    for load in ({"residency": "resident"}, {"residency": "streamed"}, {"vram": "40MiB"}, {"vram": "12MiB"}):
        other = attached(style, quantize=quantize, **load)
        assert all(torch.equal(a, b) for a, b in zip(states(other, control), needed, strict=True)), load
    # The last one is so tight that both pass by block by block.
    assert len(other.plan(**SHORT, control=control).memory.kept) == 2
    staged.lora.detach()
    bare = states(Pipeline.load(device="cpu", dtype="fp32", quantize=quantize), control)
    assert all(torch.equal(a, b) for a, b in zip(states(staged, control), bare, strict=True))
    exact = states(attached(style), control)[-1]
    # int8 of both sides of a product is some 1e-2 off; without the adapter it would be far away.
    assert (needed[-1] - exact).norm() / exact.norm() < 0.1 < (bare[-1] - exact).norm() / exact.norm()


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


@pytest.mark.slow
def test_a_second_pass_is_steered_like_img2img_of_the_first_s_picture(nets, style):
    pipe = attached(style)
    options = SHORT | {"output_type": "tensor", "control": Control(nets["2.1"], picture(1))}
    start = {"image": picture(4), "strength": 0.75}
    found = pipe(**options, **start, upscale=2.0, upscale_strength=0.5)
    first = (pipe(**options, **start).images[0] / 2 + 0.5).clamp(0, 1)
    by_hand = options | {"image": first, "height": 128, "width": 192, "strength": 0.5}
    needed = pipe(**by_hand).latents[0]
    # 1e-5: there the picture is resized in [0, 1], here in [-1, 1].
    assert (found.latents[0] - needed).norm() / needed.norm() < 1e-5
    without = pipe(**by_hand | {"control": None}).latents[0]
    assert (without - needed).norm() / needed.norm() > 1e-2


def test_control_stays_inside_the_mask(pipe, nets):
    """What is kept is the input's to the bit, whatever steers the rest."""
    levels = np.zeros((64, 96), dtype=np.uint8)
    levels[:32, :48] = 255
    image, options = picture(4), SHORT | {"output_type": "pil", "mask_image": Image.fromarray(levels)}
    drawn = [
        np.asarray(pipe(**options, image=image, control=control).images[0])
        for control in (Control(nets["2.1"], picture(1)), None)
    ]
    assert all(np.array_equal(one[levels == 0], np.asarray(image)[levels == 0]) for one in drawn)
    assert not np.array_equal(*drawn)


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
        (Control(nets["2.1"], inpaint=mask, mask=Image.new("L", mask.size)), RequestError, "black everywhere"),
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


@pytest.mark.slow
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
    assert main([*again, "-o", str(tmp_path / "b.png")]) == 2
    err = capsys.readouterr().err
    assert f"with --control '{nets['2.1'].name}:pose.png:0.5:0.0-0.7'" in err and err.count("\n") == 1
    assert main([*again, "--control", word, "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "was drawn with" not in capsys.readouterr().err
    picture(9).save(tmp_path / "pose.png")
    assert main([*again, "--control", f"{word}:rule=diffusers", "-o", str(tmp_path / "b.png")]) == 0
    assert "was drawn with another control 1 image than" in capsys.readouterr().err
    # A picture that was given from Python has no name to find it by.
    result = pipe(**SHORT, control=Control(nets["2.1"], picture(1)))
    assert not result.metadata[0]["engine"]["replayable"]
    assert result.metadata[0]["engine"]["inputs"] == data["engine"]["inputs"]


def test_a_wrong_word_is_one_line(nets, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "a red star", "--control", "a:b:c"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and "needed FILE:IMAGE" in err and err.count("\n") == 1
    assert main(["generate", "a red star", "--control", f"{nets['2.1']}:none.png"]) == 2
    err = capsys.readouterr().err
    assert "none.png: not found" in err and err.count("\n") == 1
