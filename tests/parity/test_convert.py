"""Whatever is converted is a directory that diffusers and transformers load, and it draws the very same picture."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from s3dit import Pipeline
from s3dit.cli.convert_model import convert
from s3dit.cli.main import main
from s3dit.errors import CheckpointError
from s3dit.kernels.int8 import int8

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install 's3dit[test]'")
sys.path.insert(0, str(Path(__file__).parent))
import spelled  # noqa: E402

DRAW = {"prompt": "a red star above a blue ring", "seed": 3, "height": 64, "width": 64, "num_inference_steps": 2}


def latents(pipe):
    return pipe(**DRAW, output_type="latent").latents[0]


def load(*args, **options):
    return Pipeline.load(*args, device="cpu", dtype="fp32", **options)


@pytest.fixture
def tensors(official_dir):
    return {part: spelled.part(official_dir, part) for part in ("transformer", "text_encoder", "vae")}


def metadata(folder):
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_a_comfyui_file(tensors, official_dir, ours, reference, tmp_path):
    source = spelled.save(
        tmp_path / "x.safetensors", spelled.prefixed("diffusion_model.", spelled.comfy(tensors["transformer"]))
    )
    assert convert(source, tmp_path / "out", version="0") == ()
    assert torch.equal(latents(load(official_dir, transformer=tmp_path / "out")), latents(ours))
    theirs = diffusers.ZImageTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    expected = reference.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    assert set(spelled.part(tmp_path / "out", "transformer")) == set(expected)
    said = metadata(tmp_path / "out" / "transformer")
    assert said["source"] == f"sha256:{hashlib.sha256(source.read_bytes()).hexdigest()}"
    assert (said["spelling"], said["decoded"], said["s3dit"]) == ("ComfyUI", "{}", "0")


def test_a_whole_model_in_one_file(tensors, official_dir, ours, tmp_path, capsys):
    """With a VAE that the shapes describe; diffusers' own pipeline loads what comes out."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=16, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    whole = {
        **spelled.prefixed("model.diffusion_model.", spelled.comfy(tensors["transformer"])),
        **spelled.prefixed("text_encoders.qwen3_4b.transformer.", tensors["text_encoder"]),
        **spelled.prefixed("vae.", spelled.ldm(vae.state_dict())),
    }
    source = spelled.save(tmp_path / "aio.safetensors", whole)
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "out")
    assert "Turbo's, was written" in captured.err and "no tokenizer folder" in captured.err
    (tmp_path / "out" / "tokenizer").symlink_to(official_dir / "tokenizer")
    assert torch.equal(latents(load(tmp_path / "out")), latents(ours))
    theirs = diffusers.ZImagePipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert theirs.scheduler.config.shift == 3.0 and theirs.vae.config.scaling_factor == 0.3611
    assert torch.equal(theirs.vae.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    assert theirs.text_encoder.config.rope_parameters["rope_theta"] == 1e6


def test_a_directory_keeps_what_it_says(official_dir, ours, tmp_path):
    convert(official_dir, tmp_path / "out", version="0")
    assert load(tmp_path / "out").config == ours.config
    assert torch.equal(latents(load(tmp_path / "out")), latents(ours))
    config = json.loads((tmp_path / "out" / "vae" / "config.json").read_text())
    assert config["norm_num_groups"] == 4


def test_the_vision_tower_of_a_directory_comes_along(official_dir, tmp_path):
    source = tmp_path / "omni"
    shutil.copytree(official_dir, source)
    for name in ("siglip", "siglip_processor"):
        (source / name).mkdir()
        (source / name / "x.json").write_text("{}")
    convert(source, tmp_path / "out", version="0")
    assert (tmp_path / "out" / "siglip" / "x.json").is_file() and (tmp_path / "out" / "siglip_processor").is_dir()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "ZImageOmniPipeline" and "siglip" in index


def test_number_formats_are_decoded(tensors, official_dir, tmp_path):
    """To bf16, or to fp32 exactly what they stand for; floats stay what they are, or are cast alike."""
    layer = "layers.1.feed_forward.w2"
    stored = dict(tensors["transformer"])
    parts = int8.encode(stored.pop(f"{layer}.weight"))
    stored |= {f"{layer}.{leaf}": part for leaf, part in parts.items()}
    source = spelled.save(tmp_path / "x.safetensors", stored, scheme="int8")
    for dtype, kind in (("fp32", torch.float32), (None, torch.bfloat16)):
        convert(source, tmp_path / "out", version="0", dtype=dtype, force=True)
        found = spelled.part(tmp_path / "out", "transformer")
        assert torch.equal(found[f"{layer}.weight"], int8.decode(parts).to(kind))
        assert found["x_pad_token"].dtype == torch.float32 and set(found) == set(tensors["transformer"])
    assert metadata(tmp_path / "out" / "transformer")["decoded"] == '{"int8": 1}'
    convert(source, tmp_path / "small", version="0", dtype="bf16")
    assert {tensor.dtype for tensor in spelled.part(tmp_path / "small", "transformer").values()} == {torch.bfloat16}


def test_a_gguf(tensors, official_dir, ours, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf-py: pip install 's3dit[test]'")
    convert(
        spelled.save_gguf(tmp_path / "x.gguf", spelled.llama(tensors["text_encoder"]), "qwen3"),
        tmp_path / "out",
        version="0",
    )
    assert torch.equal(latents(load(official_dir, text_encoder=tmp_path / "out")), latents(ours))


def test_what_cannot_be_converted_leaves_nothing(tensors, official_dir, tmp_path, monkeypatch):
    source = spelled.save(tmp_path / "x.safetensors", tensors["vae"])
    with pytest.raises(CheckpointError, match="do not divide into 32 groups"):
        convert(source, tmp_path / "out", version="0")
    with pytest.raises(CheckpointError, match="dtype is 'fp16'"):
        convert(official_dir, tmp_path / "out", version="0", dtype="fp16")
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        convert(official_dir, tmp_path, version="0")
    odd = spelled.save(tmp_path / "odd.safetensors", tensors["transformer"] | {"x": torch.ones(2, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="x is int32, which is not decoded"):
        convert(odd, tmp_path / "out", version="0")

    def full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr("s3dit.weights.quantize.write_safetensors", full)
    with pytest.raises(CheckpointError, match="could not be written"):
        convert(official_dir, tmp_path / "out", version="0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.safetensors", "x.safetensors"]
