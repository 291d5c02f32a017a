"""Adapters of a pipeline: parts come and go, adapters stay; metadata and replay; what the command line says."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from s3dit import Pipeline
from s3dit.cli.main import main
from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.runtime import lora
from s3dit.runtime.embedded import EMBEDDED

PROMPT = "a red star above a blue ring on a white background"
REQUEST = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
# Of the embedded model.
SHAPES = {
    "layers.0.attention.to_q": (192, 192), "layers.3.attention.to_out.0": (192, 192),
    "layers.5.feed_forward.w2": (192, 512), "all_x_embedder.2-1": (192, 64),
}  # fmt: skip
TEXT = {"model.layers.0.mlp.up_proj": (384, 128), "model.layers.1.self_attn.v_proj": (64, 128)}


def low_rank(shapes, front, seed, size=0.15):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{front}{layer}.lora_{leaf}.weight": size * torch.randn(shape, generator=generator)
        for layer, (out, in_) in shapes.items()
        for leaf, shape in (("A", (4, in_)), ("B", (out, 4)))
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters of the transformer, of norms, of the text encoder, and one that fits in part."""
    folder = tmp_path_factory.mktemp("adapters")
    style = low_rank(SHAPES, "transformer.", 1)
    save_file(style, folder / "style.safetensors")
    save_file({"layers.2.ffn_norm1.w_norm": torch.full((192,), 0.2)}, folder / "norms.safetensors")
    save_file(low_rank(TEXT, "text_encoder.", 2, 0.3), folder / "text.safetensors")
    save_file(style | {"transformer.nothing.lora_A.weight": torch.ones(1, 1)}, folder / "part.safetensors")
    return folder


@pytest.fixture(scope="module")
def drawn(files):
    """What a resident fp32 pipeline draws: without adapters, and with all three."""
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency="resident")
    plain = latents(pipe)
    for name, scale in SCALES.items():
        pipe.lora.attach(files / f"{name}.safetensors", scale)
    return plain, latents(pipe)


SCALES = {"style": 0.8, "norms": -1.0, "text": 1.0}


def latents(pipe, **changes):
    return pipe(**REQUEST | changes).latents[0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("residency", ["staged", "resident", "streamed"])
@pytest.mark.sampled(1)
def test_parts_that_come_and_go_keep_their_adapters(files, drawn, residency):
    plain, adapted = drawn
    assert relative(adapted, plain) > 1e-2
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency=residency)
    # Before anything is loaded, while a part is in memory, and while another is.
    pipe.lora.attach(files / "text.safetensors", SCALES["text"])
    latents(pipe)
    for name in ("style", "norms"):
        pipe.lora.attach(files / f"{name}.safetensors", SCALES[name])
    for _ in range(2):
        # The same arithmetic wherever the weights are: bit for bit.
        assert torch.equal(latents(pipe), adapted)
        pipe.decode([adapted])
    pipe.lora.detach("style")
    assert not torch.equal(latents(pipe), adapted)
    pipe.lora.detach()
    assert pipe.lora.names == () and torch.equal(latents(pipe), plain)


def test_a_strength_changes_without_loading(files, drawn, monkeypatch):
    plain, adapted = drawn
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency="resident")
    for name in SCALES:
        pipe.lora.attach(files / f"{name}.safetensors", 0.0)
    assert torch.equal(latents(pipe), plain)
    held = {name: weakref.ref(pipe.parts[name]) for name in pipe.parts.held}
    monkeypatch.setattr(pipe.parts, "load", None)
    monkeypatch.setattr("s3dit.runtime.adapters.read_adapter", None)
    for name, scale in SCALES.items():
        pipe.lora.scale(name, scale)
    assert torch.equal(latents(pipe), adapted)
    assert all(pipe.parts[name] is held[name]() for name in held)
    # A text encoder that changed makes features anew, and only that.
    assert [stage.part for stage in pipe.plan(**REQUEST).stages] == ["transformer"]
    pipe.lora.scale("style", 0.1)
    assert [stage.part for stage in pipe.plan(**REQUEST).stages] == ["transformer"]
    pipe.lora.scale("text", 0.1)
    assert [stage.part for stage in pipe.plan(**REQUEST).stages] == ["text_encoder", "transformer"]


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8-weights"])
@pytest.mark.sampled(1)
def test_beside_quantized_weights(files, scheme):
    pipe = Pipeline.load(device="cpu", dtype="fp32", quantize=scheme)
    plain = latents(pipe)
    pipe.lora.attach(files / "style.safetensors")
    model = pipe.parts["transformer"]
    codes = {name: tensor.clone() for name, tensor in model.named_buffers()}
    adapted = latents(pipe)
    assert relative(adapted, plain) > 1e-2
    with pytest.raises(BackendError, match=r"layers\.\d\.[a-z_0.]+ is .*int|fp8.*leave the adapter beside"):
        pipe.lora.merge()
    assert torch.equal(latents(pipe), adapted)
    pipe.lora.detach("style")
    model = pipe.parts["transformer"]
    assert all(torch.equal(codes[name], tensor) for name, tensor in model.named_buffers()) and len(codes) > 20
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("residency", ["staged", "streamed"])
@pytest.mark.slow
def test_merged_draws_what_attached_draws(files, drawn, residency):
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency=residency)
    for name, scale in SCALES.items():
        pipe.lora.attach(files / f"{name}.safetensors", scale)
    pipe.lora.merge("style")
    # 1e-4: two steps and a text encoder, whose weights were rounded to fp32 once more.
    assert relative(latents(pipe), drawn[1]) < 1e-4
    pipe.lora.merge()
    assert relative(latents(pipe), drawn[1]) < 1e-4
    with pytest.raises(RequestError, match="style is merged into the weights and cannot be detached"):
        pipe.lora.detach()
    with pytest.raises(RequestError, match=r"style is merged into the weights at scale 0\.8"):
        pipe.lora.scale("style", 1.0)
    assert pipe.lora.names == tuple(SCALES)
    assert [record["merged"] for record in pipe.lora.records()] == [True] * 3


def test_the_plan_counts_what_adapters_hold(files):
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    before = {stage.part: stage.holds for stage in pipe.plan(**REQUEST).stages}
    pipe.lora.attach(files / "style.safetensors")
    after = {stage.part: stage.holds for stage in pipe.plan(**REQUEST).stages}
    size = 4 * sum(4 * (out + in_) for out, in_ in SHAPES.values())
    assert after["transformer"] - before["transformer"] == size
    assert after["text_encoder"] == before["text_encoder"]


def test_names_scales_and_reports(files):
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    report = pipe.lora.attach(files / "style.safetensors")
    assert str(report) == "style: 4 matched, 0 unmatched, 0 of a wrong shape"
    assert pipe.lora.attach(files / "style.safetensors").name == "style-2"
    assert pipe.lora.attach(str(files / "style.safetensors"), name="mine").name == "mine"
    assert pipe.lora.names == ("style", "style-2", "mine")
    with pytest.raises(RequestError, match="there is an adapter 'mine' already"):
        pipe.lora.attach(files / "norms.safetensors", name="mine")
    for scale in (float("nan"), float("inf"), 1e9, "strong", None, True):
        with pytest.raises(RequestError, match="the scale of an adapter is"):
            pipe.lora.attach(files / "norms.safetensors", scale)
        with pytest.raises(RequestError, match="the scale of an adapter is"):
            pipe.lora.scale("mine", scale)
    with pytest.raises(RequestError, match="no adapter 'yours'; there is style, style-2, mine"):
        pipe.lora.detach("yours")
    with pytest.raises(CheckpointError, match="4 matched, 1 unmatched.*--lora-allow-partial"):
        pipe.lora.attach(files / "part.safetensors")
    report = pipe.lora.attach(files / "part.safetensors", allow_partial=True)
    assert report.unmatched == ("transformer.nothing",) and len(report.matched) == 4


def test_a_stop_in_the_middle_leaves_nothing_half_attached(files, drawn, monkeypatch):
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency="resident")
    latents(pipe)
    whole, built = lora.Branch, []

    def third_stops(*args):
        built.append(args)
        if len(built) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(lora, "Branch", third_stops)
    with pytest.raises(KeyboardInterrupt):
        pipe.lora.attach(files / "style.safetensors")
    monkeypatch.undo()
    assert pipe.lora.names == () and torch.equal(latents(pipe), drawn[0])


def test_a_file_that_is_written_anew_is_not_read_again(files, drawn, tmp_path):
    shutil.copy(files / "style.safetensors", tmp_path)
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    pipe.lora.attach(tmp_path / "style.safetensors")
    before = latents(pipe)
    with (tmp_path / "style.safetensors").open("r+b") as file:
        file.truncate(100)
    pipe.parts.free()
    assert torch.equal(latents(pipe), before)


@pytest.fixture
def local(files, tmp_path, monkeypatch):
    """A working folder with the adapters in it, as a user has them."""
    for path in files.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args):
    return main([str(arg) for arg in args])


def pixels(path):
    return np.asarray(Image.open(path))


SMALL = ("generate", PROMPT, "--steps", 2, "--seed", 3, "--height", 64, "--width", 64)


def test_command_line_and_replay(local, capsys):
    assert run(*SMALL, "-o", "plain.png") == 0
    assert run(*SMALL, "--lora", "style.safetensors:0.5", "--lora", "norms.safetensors", "-o", "a.png") == 0
    said = capsys.readouterr().err
    assert "s3dit: adapter style: 4 matched, 0 unmatched, 0 of a wrong shape\n" in said and "adapter norms: 1" in said
    records = json.loads(Image.open("a.png").text["s3dit"])["adapters"]
    assert [(one["file"], one["scale"]) for one in records] == [("style.safetensors", 0.5), ("norms.safetensors", 1.0)]
    assert not np.array_equal(pixels("plain.png"), pixels("a.png"))
    assert "adapters" not in json.loads(Image.open("plain.png").text["s3dit"])
    # None is loaded because a picture names it.
    capsys.readouterr()
    assert run("generate", "--replay", "a.png", "-o", "b.png") == 2
    wanted = "'style.safetensors:0.5', 'norms.safetensors:1'; give them with --lora"
    assert f"s3dit: a.png: it was drawn with adapters {wanted}\n" == capsys.readouterr().err
    assert run("generate", "--replay", "a.png", "--lora", "style.safetensors:0.1", "-o", "b.png") == 2
    wanted = "'norms.safetensors:1'; give them with --lora (scale 0 leaves one out)"
    assert f"s3dit: a.png: it was drawn with the adapter {wanted}\n" == capsys.readouterr().err
    assert not Path("b.png").exists()


@pytest.mark.slow
def test_a_replay_takes_strength_and_order_of_its_adapters(local, capsys):
    assert run(*SMALL, "--lora", "style.safetensors:0.5", "--lora", "norms.safetensors", "-o", "a.png") == 0
    Path("style.safetensors").rename("renamed.safetensors")
    again = ("generate", "--replay", "a.png", "-o", "again.png", "--lora")
    capsys.readouterr()
    assert run(*again, "norms.safetensors", "--lora", "renamed.safetensors") == 0
    assert np.array_equal(pixels("a.png"), pixels("again.png"))
    said = capsys.readouterr().err
    assert (
        "adapter renamed: 4 matched, 0 unmatched, 0 of a wrong shape; strength 0.5 as the picture was drawn\n" in said
    )
    assert said.index("adapter renamed") < said.index("adapter norms")
    # What the user says is stronger; an adapter more is told, and so is another file of a name.
    assert run(*again, "norms.safetensors", "--lora", "renamed.safetensors:0.1", "--lora", "renamed.safetensors") == 0
    assert not np.array_equal(pixels("a.png"), pixels("again.png"))
    records = json.loads(Image.open("again.png").text["s3dit"])["adapters"]
    assert [one["scale"] for one in records] == [0.1, 1.0, 1.0]
    assert "adapter renamed-2: 4 matched, 0 unmatched, 0 of a wrong shape; the picture was drawn without it\n" in (
        capsys.readouterr().err
    )
    save_file({"layers.2.ffn_norm1.w_norm": torch.full((192,), 0.3)}, "norms.safetensors")
    assert run(*again, "norms.safetensors", "--lora", "renamed.safetensors") == 0
    assert "strength 1 as the picture was drawn; another file than the picture was drawn with\n" in (
        capsys.readouterr().err
    )


def test_the_plan_lists_adapters(local, capsys):
    assert run("plan", PROMPT, "--lora", "style.safetensors:-0.5", "--lora", "norms.safetensors") == 0
    out = capsys.readouterr().out
    assert "\nadapter style.safetensors of strength -0.5\nadapter norms.safetensors of strength 1\n" in out


def test_command_line_and_what_fits_in_part(local, capsys):
    assert run(*SMALL, "--lora", "part.safetensors", "-o", "a.png") == 2
    said = capsys.readouterr().err
    assert "4 matched, 1 unmatched, 0 of a wrong shape (transformer.nothing)" in said and said.count("\n") == 1
    assert run(*SMALL, "--lora", "part.safetensors", "--lora-allow-partial", "-o", "a.png") == 0
    assert run("generate", "--replay", "a.png", "--lora", "part.safetensors", "-o", "b.png") == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert run("plan", PROMPT, "--lora", "style.safetensors") == 0


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("none.safetensors", "--lora none.safetensors: not found; needed a file or folder that is here"),
        ("style.safetensors:nan", "the scale of an adapter is nan"),
        ("style.safetensors:strong", "--lora style.safetensors:strong: not found"),
        (str(EMBEDDED / "transformer"), "is no adapter"),
    ],
)
def test_command_line_mistakes_are_one_line(local, capsys, flag, words):
    assert run(*SMALL, "--lora", flag, "-o", "a.png") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not Path("a.png").exists()


def test_what_a_file_says_without_effect_is_said(local, capsys):
    save_file(low_rank(SHAPES, "transformer.", 1), "style.safetensors", {"ss_network_alpha": "2"})
    note = "ss_network_alpha is 2 in the header, but layers without an alpha of their own have strength 1"
    assert run(*SMALL, "--lora", "style.safetensors", "-o", "a.png") == 0 and note in capsys.readouterr().err
    assert run("convert", "style.safetensors", "b.safetensors") == 0 and note in capsys.readouterr().err
    assert run("look", "style.safetensors") == 0 and note in capsys.readouterr().out


RENAMES = {
    "no layer of the name": ("layers.0.attention.to_q", "layers.0.attention.to_z"),
    "no block of the number": ("layers.0.", "layers.99."),
    "no stack of the name": ("layers.", "blocks."),
    "a part without adapters": ("transformer.", "vae."),
    "the other part": ("transformer.layers.0.attention", "text_encoder.layers.0.attention"),
    "a layer of the other part": ("layers.0.attention.to_q", "layers.0.self_attn.q_proj"),
    "a layer that this model lacks": ("all_x_embedder.2-1", "siglip_embedder.1"),
    "a layer of another shape": ("layers.0.attention.to_q", "layers.0.feed_forward.w1"),
    "q, k and v as one": ("layers.0.attention.to_q", "layers.0.attention.qkv"),
    "a norm": ("layers.0.attention.to_q", "layers.0.attention.norm_q"),
    "a token": ("all_x_embedder.2-1", "x_pad_token"),
    "a tensor instead of a layer": ("layers.0.attention.to_q.", "layers.0.attention.to_q.weight."),
    "half a pair": ("layers.0.attention.to_q.lora_A", "layers.0.attention.to_q.lora_C"),
    "no word for the factor": (".lora_A.weight", ".A"),
    "nothing": ("transformer.layers.0.attention.to_q", ""),
}


@pytest.mark.parametrize("residency", ["staged", "resident"])
@pytest.mark.parametrize("case", RENAMES)
@pytest.mark.sampled(3)
def test_renamed_layers_are_an_error_that_says_so(files, tmp_path, case, residency):
    """Whatever the name has become, the answer is ours: what of the file fits nothing, or what is wrong with it."""
    old, new = RENAMES[case]
    style = low_rank(SHAPES, "transformer.", 1)
    renamed = {key.replace(old, new, 1): tensor for key, tensor in style.items()}
    assert renamed.keys() != style.keys()
    save_file(renamed, tmp_path / "renamed.safetensors")
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency=residency)
    with pytest.raises(CheckpointError) as caught:
        pipe.lora.attach(tmp_path / "renamed.safetensors")
    assert not pipe.lora.names and "\n" not in str(caught.value)
    if "matched" in str(caught.value):
        pipe.lora.attach(tmp_path / "renamed.safetensors", allow_partial=True)
        assert latents(pipe).isfinite().all()


def test_a_colon_in_the_name_of_a_file_that_exists(local):
    Path("style.safetensors").rename("a:1")
    assert run(*SMALL, "--lora", "a:1", "-o", "a.png") == 0


def test_recorded_passes_are_forgotten_with_what_they_recorded(files):
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency="resident")
    component = pipe.parts.component("transformer")
    assert pipe.parts["transformer"] is component.module
    component.recorded = "recorded"
    pipe.lora.attach(files / "style.safetensors")
    assert component.recorded is None
    component.recorded = "recorded"
    pipe.lora.scale("style", 3.0)
    assert component.recorded == "recorded"
    pipe.lora.detach()
    assert component.recorded is None
