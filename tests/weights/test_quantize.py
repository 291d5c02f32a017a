"""A model directory in a number format: written whole or not at all, drawn like one encoded on the way in."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.cli.main import main
from s3dit.errors import BackendError, CheckpointError
from s3dit.kernels.schemes import SCHEMES
from s3dit.runtime.embedded import EMBEDDED
from s3dit.weights import quantize as room
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.quantize import quantizable_layers, quantize

WEIGHTS = "diffusion_pytorch_model-00001-of-00001.safetensors"
LAYER = "layers.3.attention.to_q"


def write(target, name="int8", text=None, source=EMBEDDED, **options):
    named = {"transformer": name} | ({"text_encoder": text} if text else {})
    quantize(source, target, {part: SCHEMES[one] for part, one in named.items()}, version="0", **options)
    return target


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "int8")


@pytest.fixture
def copy(int8, tmp_path):
    return shutil.copytree(int8, tmp_path / "model")


def draw(model, **options):
    pipe = Pipeline.load(model, device="cpu", dtype="bf16", **options)
    return pipe(prompt="a green circle", seed=1, num_inference_steps=1, output_type="latent").latents[0]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.sampled(1)
def test_a_directory_draws_the_bits_of_quantize_on_load(name, tmp_path):
    folder = write(tmp_path / "small", name, "int8-weights")
    assert torch.equal(draw(folder), draw(EMBEDDED, quantize=name, quantize_text="int8-weights"))


def test_the_file_is_mapped_as_it_lies_and_says_what_it_is(int8):
    pipe = Pipeline.load(int8, device="cpu", dtype="bf16")
    stored = open_checkpoint(int8 / "transformer")
    held = pipe.parts["transformer"].state_dict()
    assert set(held) == set(stored) and {t.dtype for t in held.values()} == {torch.int8, torch.float32, torch.bfloat16}
    assert all(torch.equal(held[key], stored.load(key)) for key in stored)
    metadata = stored.metadata
    assert metadata["scheme"] == "int8" and metadata["s3dit"] == "0" and len(metadata["source"]) == 71
    assert "-" not in metadata["source"] and "t_embedder.mlp.0.weight" in json.loads(metadata["skipped"])
    assert stored.nbytes < 0.7 * open_checkpoint(EMBEDDED / "transformer").nbytes


def test_many_shards_and_fresh_maps_change_nothing(int8, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "SHARD_BYTES", 1 << 20)
    monkeypatch.setattr(room, "MAPPED_BYTES", 1 << 18)
    one, many = (open_checkpoint(f / "transformer") for f in (int8, write(tmp_path / "many")))
    assert len(list((tmp_path / "many" / "transformer").glob("*.safetensors"))) > 3
    assert many.metadata == one.metadata and set(many) == set(one)
    assert all(torch.equal(one.load(key), many.load(key)) for key in one)


def test_what_is_chosen():
    names = [f"layers.0.attention.{leaf}" for leaf in ("to_q", "to_out.0", "norm_q")]
    names += [
        "cap_embedder.1",
        "layers.0.adaLN_modulation.0",
        "all_final_layer.2-1.linear",
        "noise_refiner.1.feed_forward.w2",
    ]
    int8, int4 = SCHEMES["int8"], SCHEMES["int4"]
    assert quantizable_layers("transformer", names, int8) == dict.fromkeys((names[0], names[1], names[-1]), int8)
    finer = {names[0]: int4, names[1]: SCHEMES["int8-weights"], names[-1]: int4}
    assert quantizable_layers("transformer", names, int4) == finer
    layers = [f"model.layers.{i}.mlp.up_proj" for i in range(36)]
    # The last of 36 is never computed, eight before it are sensitive.
    assert list(quantizable_layers("text_encoder", [*layers, "lm_head"], int8)) == layers[:27]
    assert quantizable_layers("vae", ["decoder.conv_in"], int8) == {}


FAULTS = {
    "no scale": (lambda t: t.pop(f"{LAYER}.scale"), r"1 tensors missing \(layers.3.attention.to_q.scale\)"),
    "short scale": (
        lambda t: t.update({f"{LAYER}.scale": torch.ones(3, 1)}),
        r"to_q.scale \[3, 1\], needed \[192, 1\]",
    ),
    "bf16 scale": (
        lambda t: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"].bfloat16()}),
        r"of a wrong dtype \(layers.3.attention.to_q.scale bfloat16, needed float32\)",
    ),
    "foreign codes": (
        lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].float().to(torch.float8_e4m3fn)}),
        r"to_q.weight float8_e4m3fn, needed int8",
    ),
    "zeros": (lambda t: t.update({f"{LAYER}.zero": torch.ones(192, 3)}), r"1 tensors unexpected \(layers.3.*zero\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unfit_parts_are_named(copy, fault):
    file = copy / "transformer" / WEIGHTS
    metadata, tensors = open_checkpoint(file).metadata, {k: v.clone() for k, v in load_file(file).items()}
    spoil, words = FAULTS[fault]
    spoil(tensors)
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    file.unlink()
    save_file(tensors, file.with_name("diffusion_pytorch_model.safetensors"), metadata=metadata)
    with pytest.raises(CheckpointError, match=words) as error:
        Pipeline.load(copy)
    assert "s3dit quantize" in str(error.value)


def test_schemes_that_do_not_fit(int8, copy):
    with pytest.raises(CheckpointError, match="is int8 already, fp8 was asked for"):
        Pipeline.load(int8, quantize="fp8")
    assert Pipeline.load(int8, quantize="int8").parts.formats["transformer"] == "int8"
    with pytest.raises(BackendError, match="number format is 'int3'; needed one of fp8"):
        Pipeline.load(quantize="int3")
    file = copy / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes().replace(b'"scheme":"int8"', b'"scheme":"nf47"'))
    with pytest.raises(CheckpointError, match="says scheme 'nf47'; needed fp8"):
        Pipeline.load(copy)


def test_nan_weights_are_named_before_they_are_hidden(tmp_path):
    source = shutil.copytree(EMBEDDED, tmp_path / "source")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    tensors[f"{LAYER}.weight"][3, 3] = float("nan")
    save_file(tensors, file)
    for attempt in (lambda: write(tmp_path / "small", source=source), lambda: draw(source, quantize="int8")):
        with pytest.raises(CheckpointError, match=f"{LAYER}.weight holds NaN or infinity"):
            attempt()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_refused_before_anything_is_written(int8, tmp_path, monkeypatch):
    for target, source, words in (
        (int8, EMBEDDED, "exists; .*--force"),
        (EMBEDDED / "small", EMBEDDED, "overlaps"),
        (tmp_path / "a" / "b", EMBEDDED, "not a writable folder"),
        (tmp_path / "again", int8, "is int8 already"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write(target, source=source)
    (tmp_path / "letters").mkdir()
    with pytest.raises(CheckpointError, match="no model directory"):
        write(tmp_path / "letters", force=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="0.0 GB free; needed 0.1 GB"):
        write(tmp_path / "small")
    assert [p.name for p in tmp_path.iterdir()] == ["letters"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_leaves_nothing(int8, tmp_path, fault):
    kept = shutil.copytree(int8, tmp_path / "kept")
    seen = []

    def stop(count):
        seen.append(count)
        if len(seen) == 30:
            raise fault

    with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else CheckpointError):
        write(kept, "int4", force=True, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert open_checkpoint(kept / "transformer").metadata["scheme"] == "int8"
    write(kept, "int4", force=True)
    assert open_checkpoint(kept / "transformer").metadata["scheme"] == "int4"


def test_command_line(tmp_path, capsys):
    small = str(tmp_path / "small")
    assert main(["quantize", "embedded", small, "--to", "int4", "--text", "int8-weights"]) == 0
    assert capsys.readouterr().out.strip() == small
    assert main(["plan", "--model", small]) == 0
    assert "transformer in int4" in capsys.readouterr().out
    assert main(["plan", "--quantize", "fp8"]) == 0
    assert "transformer in fp8" in capsys.readouterr().out
    for wrong, words in (
        (["quantize", "embedded", small, "--to", "int4"], "exists"),
        (["quantize", "embedded", small + "2", "--to", "q4"], "needed one of"),
        (["plan", "--model", small, "--quantize", "fp8"], "is int4 already"),
    ):
        assert main(wrong) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_a_nan_scale_is_named_and_an_overflow_is_seen(copy):
    file = copy / "transformer" / WEIGHTS
    metadata, tensors = open_checkpoint(file).metadata, {k: v.clone() for k, v in load_file(file).items()}
    tensors[f"{LAYER}.scale"][3] = float("nan")
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"velocity of step 1 is not finite because {LAYER}.scale"):
        draw(copy)
    tensors[f"{LAYER}.scale"][3] = 1.0
    for leaf in ("w1", "w3"):
        tensors[f"layers.2.feed_forward.{leaf}.scale"] *= 1e30
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(BackendError, match=r"velocity of step 1 is not finite .*first seen in layers.2.feed_forward"):
        draw(copy)
