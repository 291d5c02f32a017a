"""Changes do what they say, to the bit where a model loaded so can be made, and leave nothing behind."""

import json
import shutil
from contextlib import ExitStack

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.errors import RequestError
from s3dit.kernels.schemes import SCHEMES
from s3dit.research import edits
from s3dit.research.atlases import SKETCH, layer_atlas, score_atlas, sketch, step_atlas
from s3dit.research.changes import changed, modules
from s3dit.runtime.embedded import EMBEDDED
from s3dit.weights.quantize import quantizable_layers

PROMPT = "a red star above a blue ring"
DRAW = {"seed": 7, "num_inference_steps": 2, "height": 96, "width": 128, "output_type": "latent"}


def latents(pipe, prompt=PROMPT, **more):
    return torch.stack(pipe(prompt, **{**DRAW, **more}).latents)


@pytest.fixture(scope="module")
def plain(pipe):
    return latents(pipe)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def stored_in(folder, scheme, layers):
    """A transformer's folder in which just these layers are stored in a number format."""
    shutil.copytree(EMBEDDED / "transformer", folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for layer in layers:
        encoded = SCHEMES[scheme].encode(tensors.pop(f"{layer}.weight"))
        tensors |= {f"{layer}.{part}": tensor for part, tensor in encoded.items()}
    kept = sorted(name for name in tensors if name.removesuffix(".weight") not in layers)
    save_file(tensors, file, {"format": "pt", "scheme": scheme, "source": "sha256:0", "skipped": json.dumps(kept)})
    return folder


LAYERS = [("layers.2.attention.to_q", scheme) for scheme in SCHEMES]


@pytest.mark.parametrize(
    ("layer", "scheme"),
    [*LAYERS, ("layers.5.feed_forward.w2", "int8"), ("noise_refiner.0.feed_forward.w1", "fp8")],
)
@pytest.mark.sampled(2)
def test_a_quantized_layer_is_one_of_a_model_stored_so(pipe, plain, tmp_path, layer, scheme):
    loaded = Pipeline.load(EMBEDDED, transformer=stored_in(tmp_path / "t", scheme, [layer]), device="cpu", dtype="fp32")
    with changed(pipe, layer, scheme):
        assert torch.equal(latents(pipe), expected := latents(loaded))
    assert 1e-5 < relative(expected, plain) < 0.2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.sampled(1)
def test_all_blocks_quantized_are_a_model_loaded_so(pipe, scheme):
    with ExitStack() as stack:
        for block in modules(pipe, ["layers.*", "noise_refiner.*", "context_refiner.*"]):
            stack.enter_context(changed(pipe, block, scheme))
        changed_latents = latents(pipe)
    assert torch.equal(changed_latents, latents(Pipeline.load(device="cpu", dtype="fp32", quantize=scheme)))


def test_a_quantized_model_in_its_own_format_is_itself():
    """A weight that was decoded encodes to itself; so do activations, which the norms round in the one and not here."""
    pipe = Pipeline.load(device="cpu", dtype="fp32", quantize="int8")
    before = latents(pipe)
    for name in ("layers.2", "layers.4.feed_forward.w2"):
        with changed(pipe, name, "int8"):
            assert torch.equal(latents(pipe), before)
        with changed(pipe, name, "fp8"):
            assert not torch.equal(latents(pipe), before)


def test_adapters_stay_beside_a_changed_layer(tmp_path):
    chance, layers = torch.Generator().manual_seed(1), ["layers.1.attention.to_q", "layers.2.feed_forward.w2"]
    shapes = {layers[0]: (192, 192), layers[1]: (192, 512)}
    low = {f"transformer.{name}.lora_{leaf}.weight": 0.3 * torch.randn(shape, generator=chance)
           for name, (out, in_) in shapes.items() for leaf, shape in (("A", (4, in_)), ("B", (out, 4)))}  # fmt: skip
    save_file(low, tmp_path / "style.safetensors")
    pipe, loaded = (Pipeline.load(device="cpu", dtype="fp32", quantize=quantize) for quantize in (None, "int8"))
    for each in (pipe, loaded):
        each.lora.attach(tmp_path / "style.safetensors")
    with ExitStack() as stack:
        for block in modules(pipe, ["layers.*", "noise_refiner.*", "context_refiner.*"]):
            stack.enter_context(changed(pipe, block, "int8"))
        assert torch.equal(latents(pipe), latents(loaded))
    pipe.lora.detach("style")
    with changed(pipe, layers[0], "drop"):
        without = latents(pipe)
        pipe.lora.attach(tmp_path / "style.safetensors")
        assert not torch.equal(latents(pipe), without)


def test_dropped_and_repeated_blocks(pipe, plain):
    with changed(pipe, "layers.3", "drop"):
        dropped = latents(pipe)
    with edits.skipped(pipe, [3]):
        assert torch.equal(latents(pipe), dropped)
    with changed(pipe, "layers.3.attention", "drop"), changed(pipe, "layers.3.feed_forward", "drop"):
        assert torch.equal(latents(pipe), dropped)
    with edits.rearranged(pipe, [0, 1, 2, 4, 5]):
        assert torch.equal(latents(pipe), dropped)
    with changed(pipe, "layers.3", "repeat"):
        repeated = latents(pipe)
    with edits.rearranged(pipe, [0, 1, 2, 3, 3, 4, 5]):
        assert torch.equal(latents(pipe), repeated)
    with changed(pipe, "context_refiner.0", "drop"):
        assert not torch.equal(latents(pipe), plain)
    assert not torch.equal(dropped, plain) and torch.equal(latents(pipe), plain)


@pytest.mark.parametrize(("part", "other", "call"), [("attention", "ffn", 0), ("feed_forward", "attention", 1)])
def test_a_repeated_part_is_a_repeated_block_without_the_other_once(pipe, part, other, call):
    with changed(pipe, f"layers.3.{part}", "repeat"):
        repeated = latents(pipe)

    def without(rows, where):
        return torch.zeros_like(rows) if where.call == call else None

    with pipe.edit({f"layers.3.{other}.added": without}), edits.rearranged(pipe, [0, 1, 2, 3, 3, 4, 5]):
        assert torch.equal(latents(pipe), repeated)


@pytest.mark.parametrize("load", [{"residency": "streamed", "dtype": "bf16"}, {"quantize": "int8"}], ids=str)
@pytest.mark.slow
def test_every_way_to_hold_a_model(load):
    """With guidance and two sizes: the picture stays, and the errors are those of a whole picture of one step."""
    pipe = Pipeline.load(**{"device": "cpu", "dtype": "fp32", **load})
    batch = {
        "prompt": [PROMPT, "a green ring"],
        "guidance_scale": 1.5,
        "negative_prompt": "a blue star",
        "seed": [7, 8],
    }
    before = latents(pipe, **batch)
    names = ["layers.1", "layers.2.attention", "layers.4.feed_forward.w1"]
    with layer_atlas(pipe, names, ["drop", "repeat", "fp8-weights"]) as atlas:
        assert torch.equal(latents(pipe, **batch), before)
    assert atlas.missing == {("layers.4.feed_forward.w1", "repeat"): "a linear layer is not repeated"}
    errors = atlas.errors()
    assert errors.at("layers.4.feed_forward.w1", "repeat") is None
    numbers = [x for row in errors.values for x in row if x is not None]
    assert len(numbers) == 8 and all(1e-4 < x < 3 for x in numbers)
    assert errors.at("layers.1", "drop") > 5 * errors.at("layers.1", "fp8-weights")


def test_errors_are_those_of_the_velocity(pipe, plain):
    """Against whole pictures drawn with the change: at the first step, both start from one state."""
    names, changes = ["layers.0", "layers.4.attention.to_out.0"], ["drop", "int4", "int8"]
    with layer_atlas(pipe, names, changes) as atlas, pipe.observe("velocity", steps=[1]) as record:
        assert torch.equal(latents(pipe), plain)
    assert atlas.steps == [1, 2]
    for name in names:
        for change in changes:
            with changed(pipe, name, change), pipe.observe("velocity", steps=[1]) as other:
                latents(pipe)
            expected = relative(other.at("velocity"), record.at("velocity"))
            assert atlas.error(name, change, [1]) == pytest.approx(expected, rel=1e-9)
            assert (
                atlas.errors(1).at(name, change) == atlas.by_step(change).at(name, 1) == atlas.error(name, change, [1])
            )
            # Over both steps: between the two.
            both = sorted(atlas.error(name, change, [step]) for step in (1, 2))
            assert both[0] <= atlas.error(name, change) <= both[1]


def test_scores_are_of_pictures_drawn_with_the_change(pipe):
    def redness(pictures, prompts):
        assert len(pictures) == len(prompts) == 2 and all(isinstance(each, Image.Image) for each in pictures)
        return sum(sum(each.resize((1, 1)).getpixel((0, 0))) for each in pictures)

    prompts = [PROMPT, "a green ring"]
    draw = {**DRAW, "output_type": "pil"}
    table = score_atlas(pipe, prompts, redness, ["layers.0", "layers.0.attention.to_v"], ["drop", "repeat"], **draw)
    assert table.rows == ("layers.0", "layers.0.attention.to_v", "unchanged")
    assert (
        table.at("unchanged", "drop") == redness(pipe(prompts, **draw).images, prompts) != table.at("layers.0", "drop")
    )
    with changed(pipe, "layers.0", "drop"):
        assert table.at("layers.0", "drop") == redness(pipe(prompts, **draw).images, prompts)
    assert table.at("layers.0.attention.to_v", "repeat") is None


def test_sketches_keep_lengths_and_products():
    """Also of a tensor that one channel dominates, whose numbers a plain choice would meet too often or never."""
    torch.manual_seed(0)
    a = torch.randn(700, 192)
    b = a + 0.1 * torch.randn(700, 192)
    a[:, 35] += 200
    b[:, 35] += 190
    # 2 sqrt(2 / SKETCH) for lengths squared: two standard deviations.
    for x, y in ((a, b), (a - a[:, :1], b)):
        assert relative(sketch(x).norm(), x.norm()) < 0.011
        assert relative((sketch(x) - sketch(y)).norm(), (x - y).norm()) < 0.011
        cosine = torch.nn.functional.cosine_similarity(*(each.double().flatten() for each in (x, y)), dim=0)
        of_sketches = torch.nn.functional.cosine_similarity(sketch(x).double(), sketch(y).double(), dim=0)
        assert abs(cosine - of_sketches) < 0.022 * max(1 - cosine, 0.02)
    assert len(sketch(a)) == SKETCH and torch.equal(sketch(a[:2]), a[:2].flatten())


def test_a_step_atlas(pipe, plain):
    sites = ["layers.*.output", "layers.*.ffn.added"]
    draw = {"num_inference_steps": 4}
    with step_atlas(pipe, sites) as atlas, pipe.observe(sites) as record:
        before = latents(pipe, **draw)
    changes = atlas.changes()
    assert changes.columns == ("2", "3", "4") and len(changes.rows) == 12
    for site in changes.rows:
        for step in (2, 3, 4):
            exact = relative(record.at(site, step - 1), record.at(site, step))
            assert changes.at(site, step) == pytest.approx(exact, rel=0.03)
    cosines = atlas.cosines("layers.3.output")
    exact = record.select("layers.3.output").cosines()
    assert torch.allclose(torch.tensor(cosines.values, dtype=torch.float64), exact, atol=2e-3)
    assert cosines.at(1, 4) < cosines.at(3, 4) < 1
    assert sum(map(sum, atlas.skippable(0.0).values)) == 0 and sum(map(sum, atlas.skippable(9.0).values)) == 12 * 3
    some = atlas.skippable(0.2)
    assert 0 < sum(map(sum, some.values)) < 12 * 3 and all(row[0] == 0 for row in some.values)
    assert not atlas.reuse(0.0) and torch.equal(latents(pipe, **draw), before)


def test_what_is_reused_is_that_of_the_last_step_computed(pipe):
    with step_atlas(pipe, "layers.*.ffn.added") as atlas:
        before = latents(pipe)
    with pipe.edit(atlas.reuse(9.0)), pipe.observe("layers.*.ffn.added") as inside:
        after = latents(pipe)
    with pipe.observe("layers.*.ffn.added") as record:
        latents(pipe)
    with pipe.edit({"layers.*.ffn.added": edits.patch(record, step=1)}, steps=[2]):
        assert torch.equal(latents(pipe), after)
    assert not torch.equal(before, after) and inside


def test_nothing_is_left_behind(pipe, plain):
    names = modules(pipe, "**")

    def stop(pictures, prompts):
        raise ZeroDivisionError

    for look in (
        lambda: layer_atlas(pipe, "layers.0", ["drop"]),
        lambda: step_atlas(pipe),
        *(lambda change=change: changed(pipe, "layers.1", change) for change in ("drop", "repeat", "int8")),
    ):
        with pytest.raises(ZeroDivisionError), look():
            latents(pipe)
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        score_atlas(pipe, [PROMPT], stop, "layers.0", ["drop"], **DRAW)
    root = pipe.parts.component("transformer").module
    for module in root.modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
    assert torch.equal(latents(pipe), plain) and modules(pipe, "**") == names


def test_an_error_inside_of_a_changed_pass_leaves_nothing(pipe, plain):
    def broken(model, args):
        raise ZeroDivisionError

    handle = pipe.transformer.layers[5].register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError), changed(pipe, "layers.5.feed_forward", "repeat"):
        latents(pipe)
    handle.remove()
    assert torch.equal(latents(pipe), plain)


def test_int4_of_a_block_is_what_quantize_makes_of_it(pipe):
    names = [name for name in modules(pipe, "layers.0.**") if "adaLN" not in name]
    formats = {scheme.name for scheme in quantizable_layers("transformer", names, SCHEMES["int4"]).values()}
    assert formats == {"int4", "int8-weights"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda pipe: changed(pipe, "layers.9", "drop"), r"matches none.*nearest are layers\.\d"),
        (lambda pipe: changed(pipe, "layers.*", "drop"), "is 6 modules; needed one"),
        (lambda pipe: changed(pipe, "layers.0", "int44"), "nearest is int4"),
        (lambda pipe: changed(pipe, "layers.0.attention.to_q", "repeat"), "linear layer is not repeated"),
        (lambda pipe: layer_atlas(pipe, "context_refiner.0"), "runs once a request"),
        (lambda pipe: layer_atlas(pipe, "layers.0", ["dropped"]), "nearest is drop"),
    ],
)
def test_bad_input(pipe, wrong, words):
    with pytest.raises(RequestError, match=words), wrong(pipe):
        pass


def test_steps_that_are_not_drawn_are_told(pipe):
    with (
        pytest.raises(RequestError, match=r"steps \[99\] were chosen"),
        layer_atlas(pipe, "layers.0", ["drop"], steps=[99]),
    ):
        latents(pipe)
    with layer_atlas(pipe, "layers.0", ["drop"], steps=[1]) as atlas, step_atlas(pipe, steps=[1]) as steps:
        latents(pipe)
    for wrong in (lambda: atlas.by_step("repeat"), lambda: steps.change("layers.0.output", 2, 1)):
        with pytest.raises(RequestError, match="needed"):
            wrong()
