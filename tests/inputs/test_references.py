"""References without any other program: what is refused, what is kept, what a picture says of how it was made.

The Omni model is the embedded one with eyes of random weights: what it draws means nothing, but is drawn.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.cli.main import main
from s3dit.errors import CheckpointError, RequestError
from s3dit.inputs.image_metadata import read_metadata
from s3dit.inputs.save_image import save_png
from s3dit.model.edit_layout import edit
from s3dit.model.transformer import Transformer
from s3dit.model.vision_encoder import VisionEncoder
from s3dit.request import Request
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.graphs import Replay
from s3dit.runtime.model_config import read_model

TOWER = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_channels": 3,
    "patch_size": 16, "num_patches": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
PROCESSOR = {
    "patch_size": 16, "max_num_patches": 64, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "resample": 2, "do_resize": True, "do_rescale": True, "do_normalize": True,
}  # fmt: skip


def write(path, data):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))


def random_weights(model, path, known=()):
    generator = torch.Generator().manual_seed(1)
    random = {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in model.state_dict().items()}
    save_file(random | {name: known[name] for name in known}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory of the Omni kind."""
    folder = tmp_path_factory.mktemp("omni") / "model"
    shutil.copytree(EMBEDDED, folder)
    (folder / "s3dit.json").unlink()
    (weights,) = (folder / "transformer").glob("*.safetensors")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    write(folder / "transformer" / "config.json", config | {"siglip_feat_dim": TOWER["hidden_size"]})
    write(folder / "siglip" / "config.json", TOWER)
    write(folder / "siglip_processor" / "preprocessor_config.json", PROCESSOR)
    model = read_model(folder)
    random_weights(Transformer(model.transformer), weights, load_file(weights))
    random_weights(VisionEncoder(model.vision), folder / "siglip" / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return Pipeline.load(folder, device="cpu", dtype="fp32", residency="resident")


def picture(height=80, width=112, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.png"
    picture().save(path)
    return path


OPTIONS = {"prompt": "a red star", "seed": 1, "num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_variant_is_told_from_the_files(pipe):
    assert pipe.config.variant == "omni" and set(pipe.parts.checkpoints) == {
        "text_encoder",
        "transformer",
        "vae",
        "siglip",
    }


def test_without_references_it_is_text_to_image(pipe):
    plan = pipe.plan(**OPTIONS, height=64, width=96)
    assert [stage.part for stage in plan.stages] == ["text_encoder", "transformer"]
    assert pipe(**OPTIONS, height=64, width=96).latents[0].shape == (16, 8, 12)


@pytest.mark.parametrize("kind", ["path", "str", "array", "tensor", "fine tensor", "one alone", "batch"])
@pytest.mark.sampled(1)
def test_every_kind_of_image(pipe, file, kind):
    levels = np.asarray(Image.open(file))
    planes = torch.from_numpy(levels.copy()).permute(2, 0, 1)
    given = {
        "path": [file], "str": [str(file)], "array": [levels], "tensor": [planes], "fine tensor": [planes / 255.0],
        "one alone": Image.open(file), "batch": levels[None],
    }[kind]  # fmt: skip
    expected = pipe(reference=[Image.open(file)], **OPTIONS).latents[0]
    assert expected.shape == (16, 10, 14)
    assert torch.equal(pipe(reference=given, **OPTIONS).latents[0], expected)


def test_what_is_kept_is_not_looked_at_again(pipe, monkeypatch):
    before = pipe(reference=[picture(seed=7)], **OPTIONS).latents[0]
    load = pipe.parts.load
    monkeypatch.setattr(pipe.parts, "load", lambda part, *rest: part in ("transformer", "vae") and load(part, *rest))
    assert torch.equal(pipe(reference=[picture(seed=7)], **OPTIONS).latents[0], before)


def test_the_plan_says_it(pipe):
    plan = pipe.plan(prompt="a blue ring", reference=[picture(90, 112, 3)] * 2 + [picture(64, 65, 4)])
    assert [(stage.part, stage.work) for stage in plan.stages][1:3] == [
        ("siglip", "2 references"),
        ("vae", "2 references"),
    ]
    assert (plan.request.height, plan.request.width) == ([64], [64])
    assert any("65×64" in note and "64×64" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([picture(63, 100)], "reference 1 is 100×63 pixels; a reference needs at least 64"),
        ([picture(), picture(64, 600)], "reference 2 is 600×64 pixels; a reference may be 8 times"),
        (["missing.png"], "missing.png: not found"),
        ([b"bytes"], "reference is a bytes"),
        ([torch.full((3, 80, 80), float("nan"))], "NaN"),
        ([[picture()], picture()], "mixes images and lists"),
        ([[picture()], [picture()], []], "reference has 3 entries; needed 1"),
    ],
)
def test_what_is_refused(pipe, monkeypatch, given, words):
    monkeypatch.setattr(type(pipe.parts), "__getitem__", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(RequestError, match=words):
        pipe(reference=given, **OPTIONS)


def test_a_truncated_file(pipe, file):
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(RequestError, match=r"a\.png: cannot be read"):
        pipe.plan(reference=[file], **OPTIONS)


@pytest.mark.parametrize("options", [{"reference_area": 65536}, {"reference_positions": "intended"}])
def test_options_without_references(pipe, options):
    with pytest.raises(RequestError, match="about references"):
        pipe.plan(**OPTIONS, **options)
    assert pipe.plan(**OPTIONS, **options, reference=picture())
    with pytest.raises(RequestError, match="reference_positions is 'other'"):
        pipe.plan(**OPTIONS, reference=picture(), reference_positions="other")


def test_an_area_that_leaves_nothing(pipe):
    long = picture(400, 3200)
    with pytest.raises(RequestError, match="3200×400 pixels, scaled to 512 in all 64×8; needed 16 a side"):
        pipe.plan(**OPTIONS, reference=long, height=16, width=32)
    with pytest.raises(RequestError, match="reference_area is 16; needed an integer from 4096"):
        pipe.plan(**OPTIONS, reference=long, reference_area=16)
    # as small as it may be, eight times as long as wide
    assert pipe.plan(**OPTIONS, reference=long, reference_area=4096).references[0][0].grid == (1, 11)


def test_a_model_without_eyes():
    with pytest.raises(RequestError, match="given to a tiny model; needed an Omni or Edit model"):
        Pipeline.load(device="cpu").plan(**OPTIONS, reference=picture())


def test_a_directory_without_siglip(folder, tmp_path):
    blind = shutil.copytree(folder, tmp_path / "blind", ignore=shutil.ignore_patterns("siglip*"))
    pipe = Pipeline.load(blind, device="cpu", dtype="fp32")
    with pytest.raises(CheckpointError, match="blind: no siglip/ in it"):
        pipe.plan(**OPTIONS, reference=picture())
    assert pipe(**OPTIONS, height=64, width=64).latents[0].shape == (16, 8, 8)


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("siglip/config.json", "hidden_size", 48, "parts are of different models"),
        ("siglip/config.json", "hidden_act", "relu", "hidden_act is 'relu'"),
        ("siglip/config.json", "num_patches", 15, "a square of positions"),
        ("siglip/config.json", "num_attention_heads", 5, "a width that the heads divide"),
        ("siglip_processor/preprocessor_config.json", "resample", 3, "resample is 3"),
        ("siglip_processor/preprocessor_config.json", "image_std", [0.5, 0.5, 0.0], "image_std is 0"),
        ("siglip_processor/preprocessor_config.json", "patch_size", 14, "parts are of different models"),
        ("siglip_processor/preprocessor_config.json", None, None, "not found"),
    ],
)
def test_a_damaged_directory(folder, tmp_path, file, key, value, words):
    copy = shutil.copytree(folder, tmp_path / "model")
    if key is None:
        (copy / file).unlink()
    else:
        write(copy / file, json.loads((copy / file).read_text()) | {key: value})
    with pytest.raises(CheckpointError, match=words):
        Pipeline.load(copy, device="cpu")


def test_weights_of_another_tower(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(copy / "siglip" / "model.safetensors")
    tensors.pop("vision_model.post_layernorm.bias")
    save_file(tensors, copy / "siglip" / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        Pipeline.load(copy, device="cpu")


def test_a_request_is_the_same_for_one_list_and_for_lists():
    a, b = picture(), picture(seed=1)
    assert Request(prompt=["x", "y"], reference=[a, b]).references() == [[a, b], [a, b]]
    assert Request(prompt=["x", "y"], reference=[[a], None]).references() == [[a], []]
    assert Request(prompt=["x", "y"], reference=[[a], [b]], num_images_per_prompt=2).references() == [
        [a],
        [a],
        [b],
        [b],
    ]
    assert Request(prompt="x", reference=a).references() == [[a]] and Request(prompt="x").references() == [[]]
    assert Request(prompt="x", reference=[]).references() == [[]]


def test_replay_is_the_same_picture(pipe, tmp_path):
    """Sizes and areas that were chosen for a large reference are written down; each picture has its own."""
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for i, path in enumerate(paths):
        picture(1040 if i else 80, 1024 if i else 112, i).save(path)
    drawn = pipe(
        **OPTIONS | {"prompt": ["a red star", "a blue ring", "a cross"]},
        reference=[paths, paths[:1], []],
        height=[64, None, 64], width=[80, None, 96], reference_positions="intended",
    )  # fmt: skip
    for latents, data in zip(drawn.latents, drawn.metadata, strict=True):
        assert data["engine"]["replayable"]
        data = json.loads(json.dumps({k: v for k, v in data.items() if k not in ("model", "engine")}))
        again = pipe(Request.from_json(data)).latents[0]
        assert relative(again, latents) < 1e-5
    first, second, third = (data["engine"].get("inputs", {}) for data in drawn.metadata)
    assert len(first["reference"]) == 2 and second["reference"] == first["reference"][:1] and third == {}
    assert not pipe(**OPTIONS, reference=picture()).metadata[0]["engine"]["replayable"]


def test_a_start_image_beside_references(pipe):
    """The start image says where the flow begins, and the size; the reference is looked at."""
    options = OPTIONS | {"num_inference_steps": 2, "strength": 0.5}
    drawn = pipe(**options, image=picture(64, 96, 8), reference=picture()).latents[0]
    assert drawn.shape == (16, 8, 12)
    for other in ({"image": picture(64, 96, 9), "reference": picture()}, {"image": picture(64, 96, 8)}):
        assert relative(pipe(**options, **other).latents[0], drawn) > 1e-3


@pytest.mark.slow
def test_an_adapter_beside_references(pipe, folder, tmp_path):
    """A low-rank change beside weights, and the sum of both; on layers that read what the tower saw, too."""
    merged = shutil.copytree(folder, tmp_path / "merged")
    (path,) = (merged / "transformer").glob("*.safetensors")
    weights, low, generator = load_file(path), {}, torch.Generator().manual_seed(4)
    for name in ("layers.1.attention.to_v", "siglip_refiner.0.feed_forward.w1", "siglip_embedder.1"):
        weight = weights[f"{name}.weight"].double()
        a, b = (0.2 * torch.randn(shape, generator=generator) for shape in ((4, weight.shape[1]), (len(weight), 4)))
        low |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        weights[f"{name}.weight"] = (weight + 0.7 * b.double() @ a.double()).float()
    save_file(weights, path)
    save_file(low, tmp_path / "style.safetensors")
    options = OPTIONS | {"num_inference_steps": 2, "guidance_scale": 1.5, "reference": [picture(), picture(96, 64, 1)]}
    needed = Pipeline.load(merged, device="cpu", dtype="fp32")(**options).latents[0]
    staged, *others = (
        Pipeline.load(folder, device="cpu", dtype="fp32", **load)
        for load in ({}, {"residency": "streamed"}, {"vram": "24MiB"})
    )
    staged.lora.attach(tmp_path / "style.safetensors", 0.7)
    found = staged(**options).latents[0]
    # One rounding of a sum against two products in fp32.
    assert relative(found, needed) < 1e-5 and relative(pipe(**options).latents[0], needed) > 1e-2
    for other in others:
        other.lora.attach(tmp_path / "style.safetensors", 0.7)
        assert torch.equal(other(**options).latents[0], found)
    staged.lora.detach()
    assert torch.equal(staged(**options).latents[0], pipe(**options).latents[0])


def test_two_passes(pipe):
    """The second, larger pass sees the same references."""
    options = OPTIONS | {"num_inference_steps": 2, "upscale": 2.0}
    drawn = pipe(**options, reference=picture()).latents[0]
    assert drawn.shape == (16, 20, 28)
    assert relative(pipe(**options, reference=picture(seed=1)).latents[0], drawn) > 1e-3


def test_recorded_passes(pipe):
    """A pass with references is a recording of its own; where the recorder only runs again, the bits are the same."""
    transformer, recorded = pipe.parts["transformer"], []

    def record(run):
        output = run()
        recorded.append(output)
        return lambda: output.copy_(run()), output

    replay = Replay(transformer, record)
    g = torch.Generator().manual_seed(1)
    for shapes, lengths in (([((4, 6), (3, 3))], (5, 9, 2)), ([((4, 6), (3, 3))], (5, 9, 2)), ([], (9,))):
        layout = edit([(4, 4)], [lengths], [shapes])
        text, x = torch.randn(sum(lengths), transformer.config.cap_feat_dim, generator=g), torch.randn(16, 64)
        looks = [torch.randn(24, 64, generator=g), torch.randn(9, 24, generator=g)] if shapes else []
        with torch.inference_mode():
            context = transformer.context(layout, text, *looks)
            assert torch.equal(replay(x, torch.tensor([0.3]), context), transformer(x, torch.tensor([0.3]), context))
    assert len(recorded) == 2


@pytest.fixture
def command(folder, tmp_path, capsys):
    """Run a command on the model -> exit code, what it said, and where pictures go."""

    def run(name, *options):
        code = main([name, *map(str, options), "--model", str(folder), "--device", "cpu", "--dtype", "fp32"])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.mark.slow
def test_the_command_line(command, file, tmp_path):
    other = tmp_path / "b.png"
    picture(64, 80, 5).save(other)
    drawn, again = tmp_path / "out.png", tmp_path / "again.png"
    options = ["--reference", file, "--reference", other, "--steps", 1, "--guidance", 1, "--seed", 3]
    code, said = command("generate", "a red star", *options, "--preview", "-o", drawn)
    assert code == 0 and Image.open(drawn).size == (80, 64), said
    data = read_metadata(drawn)
    assert data["reference"] == [str(file), str(other)] and len(data["engine"]["inputs"]["reference"]) == 2
    code, said = command("generate", "--replay", drawn, "-o", again)
    assert code == 0 and np.array_equal(np.asarray(Image.open(drawn)), np.asarray(Image.open(again))), said
    # another picture of the same name is another picture
    picture(64, 80, 6).save(other)
    code, said = command("generate", "--replay", drawn, "-o", again)
    assert code == 2 and f"'{other}' is not what it was" in said and said.count("\n") == 1
    code, said = command("generate", "--replay", drawn, "--reference", other, "-o", again)
    assert code == 0 and read_metadata(again)["reference"] == [str(other)], said
    # a hash less than pictures would leave one unchecked
    data["engine"]["inputs"]["reference"].pop()
    save_png(Image.open(drawn), drawn, data)
    code, said = command("generate", "--replay", drawn, "-o", again)
    assert code == 2 and "for reference, 2 in all, and has 1 hashes" in said and said.count("\n") == 1


def test_the_plan_on_the_command_line(command, file):
    code, said = command("plan", "a red star", "--reference", file, "--reference-positions", "intended", "--kernels")
    assert code == 0 and "siglip" in said and "1 references" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--reference", "none.png"], "none.png: not found"), (["--reference-area", "9000"], "are about references")],
)
def test_one_line_for_what_is_wrong(command, options, words):
    code, said = command("generate", "a red star", *options)
    assert code == 2 and words in said and said.count("\n") == 1
