"""Every container and spelling, made by an independent writer, draws the very velocity of the official directory.

Bit-equal: the tensors are the same numbers, only their names, their files and their places differ. Against diffusers
1e-5 relative in fp32, for the reason given in `test_pipeline`.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from s3dit import Pipeline
from s3dit.errors import CheckpointError
from s3dit.model.tokenizer import Tokenizer
from s3dit.runtime.sources import open_model, open_sources
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.gguf_file import GGUFFile
from s3dit.weights.keymap import official

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install 's3dit[test]'")
transformers = pytest.importorskip("transformers", reason="parity needs transformers: pip install 's3dit[test]'")
sys.path.insert(0, str(Path(__file__).parent))
import spelled  # noqa: E402
from conftest import randomize  # noqa: E402

needs_gguf = pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="needs gguf-py: pip install 's3dit[test]'")
DRAW = {"prompt": "a red star above a blue ring", "seed": 3, "height": 64, "width": 96, "num_inference_steps": 2}


def velocity(pipe, **options):
    return [step.velocity.clone() for step in pipe.stream(**(DRAW | options))][-1]


def load(*args, **options):
    return Pipeline.load(*args, device="cpu", dtype="fp32", **options)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def plain(ours):
    return velocity(ours)


@pytest.fixture(scope="module")
def tensors(official_dir):
    return {part: spelled.part(official_dir, part) for part in ("transformer", "text_encoder", "vae")}


@pytest.fixture(scope="module")
def wide_dir(official_dir, tmp_path_factory):
    """The model with a VAE in groups of 32 norms, the published number, which no shape tells."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    folder.mkdir()
    for part in ("transformer", "text_encoder", "tokenizer", "scheduler"):
        (folder / part).symlink_to(official_dir / part, target_is_directory=True)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=16, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    randomize(vae, 7).save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize("prefix", spelled.PREFIXES)
@pytest.mark.parametrize("naming", ["ComfyUI", "diffusers"])
@pytest.mark.sampled(2)
def test_a_transformer_in_one_file(naming, prefix, tensors, official_dir, plain, tmp_path):
    names = spelled.comfy(tensors["transformer"]) if naming == "ComfyUI" else tensors["transformer"]
    path = spelled.save(tmp_path / "x.safetensors", spelled.prefixed(prefix, names))
    pipe = load(official_dir, transformer=path)
    assert pipe.config.transformer == load(official_dir).config.transformer
    assert torch.equal(velocity(pipe), plain)


def test_fused_projections_are_views(tensors, official_dir, tmp_path):
    """q, k and v lie one after the other in the mapped file: nothing was copied."""
    path = spelled.save(tmp_path / "x.safetensors", spelled.comfy(tensors["transformer"]))
    pipe = load(official_dir, transformer=path)
    attention = pipe.parts["transformer"].layers[0].attention
    q, k, v = (getattr(attention, f"to_{letter}").weight for letter in "qkv")
    assert k.data_ptr() - q.data_ptr() == q.nbytes and v.data_ptr() - k.data_ptr() == k.nbytes
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_diffusers_reads_the_same_file(prefix, tensors, official_dir, tmp_path):
    """from_single_file on the very file; the velocity of one call: 5e-7 seen."""
    names = spelled.comfy(tensors["transformer"])
    path = spelled.save(tmp_path / "x.safetensors", spelled.prefixed(prefix, names))
    theirs = diffusers.ZImageTransformer2DModel.from_single_file(
        str(path), config=str(official_dir), subfolder="transformer", torch_dtype=torch.float32
    )
    mine = load(official_dir, transformer=path)
    step = next(mine.stream(**(DRAW | {"num_inference_steps": 1})))
    (latents,) = [latent.clone() for latent in _start(mine)]
    (text,) = mine.encode([DRAW["prompt"]])
    with torch.no_grad():
        out = theirs([latents[:, None]], torch.zeros(1), [text], return_dict=False)[0][0]
    assert relative(_as_latents(step), out[:, 0]) < 1e-5


def _start(pipe):
    generator = torch.Generator().manual_seed(DRAW["seed"])
    return [torch.randn(16, DRAW["height"] // 8, DRAW["width"] // 8, generator=generator)]


def _as_latents(step):
    """The velocity of one picture, unfolded from its patches (rows, columns, 2, 2, channels)."""
    rows, columns = DRAW["height"] // 16, DRAW["width"] // 16
    patches = step.velocity.view(rows, columns, 2, 2, 16)
    return patches.permute(4, 0, 2, 1, 3).reshape(16, 2 * rows, 2 * columns)


@pytest.mark.parametrize("text", ["text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_4b.", "qwen3_4b."])
@pytest.mark.parametrize("vae", ["vae.", "first_stage_model."])
@pytest.mark.sampled(1)
def test_all_in_one_file(text, vae, tensors, wide_dir, tmp_path):
    whole = {
        **spelled.prefixed("model.diffusion_model.", spelled.comfy(tensors["transformer"])),
        **spelled.prefixed(text, {f"model.{k.removeprefix('model.')}": v for k, v in tensors["text_encoder"].items()}),
        **spelled.prefixed(vae, spelled.ldm(spelled.part(wide_dir, "vae"))),
        "extra.logit_scale": torch.ones(1),
    }
    path = spelled.save(tmp_path / "aio.safetensors", whole)
    pipe, same = load(path, tokenizer=wide_dir / "tokenizer"), load(wide_dir)
    assert torch.equal(velocity(pipe), velocity(same))
    a, b = (one(**(DRAW | {"output_type": "tensor"})).images[0] for one in (pipe, same))
    assert torch.equal(a, b)
    notes = pipe.plan(**DRAW).notes
    assert any("--shift 6" in note for note in notes) and any("0.3611" in note for note in notes)
    assert not any("--shift 6" in note for note in pipe.plan(**DRAW, shift=6.0).notes)
    assert open_model(path).rest == ["extra.logit_scale"]
    with pytest.raises(CheckpointError, match="not tokenizer; add --tokenizer DIR"):
        load(path)


@pytest.mark.parametrize("spelling", [spelled.bare, dict])
def test_a_text_encoder_in_one_file(spelling, tensors, official_dir, plain, tmp_path):
    path = spelled.save(tmp_path / "qwen.safetensors", spelling(tensors["text_encoder"]))
    assert torch.equal(velocity(load(official_dir, text_encoder=path)), plain)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("spelling", [spelled.ldm, dict])
@pytest.mark.sampled(1)
def test_a_vae_in_one_file(spelling, prefix, tensors, official_dir, ours, tmp_path):
    """What shapes do not tell, groups and scale, is the model's own."""
    path = spelled.save(tmp_path / "ae.safetensors", spelled.prefixed(prefix, spelling(tensors["vae"])))
    pipe = load(official_dir, vae=path)
    assert pipe.config == ours.config
    latents = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe.decode([latents])[0], ours.decode([latents])[0])
    pixels = pipe.decode([latents])[0][None]
    with torch.inference_mode():
        assert torch.equal(pipe.parts["vae"].encode(pixels), ours.parts["vae"].encode(pixels))


def test_parts_without_a_model(tensors, wide_dir, tmp_path):
    """Three files and a tokenizer are a model; a folder of one part, with its config, serves as well as its file."""
    files = {
        "transformer": spelled.save(tmp_path / "a.safetensors", spelled.comfy(tensors["transformer"])),
        "text_encoder": wide_dir / "text_encoder",
        "vae": spelled.save(tmp_path / "c.safetensors", spelled.ldm(spelled.part(wide_dir, "vae"))),
    }
    pipe = load(**files, tokenizer=wide_dir / "tokenizer")
    assert torch.equal(velocity(pipe), velocity(load(wide_dir)))
    result = pipe(**DRAW, output_type="latent")
    assert result.metadata[0]["engine"]["mixed"] == {
        "transformer": "a.safetensors", "text_encoder": "model.safetensors", "vae": "c.safetensors"
    }  # fmt: skip
    for part, option in (("transformer", "--transformer"), ("text_encoder", "--text-encoder"), ("vae", "--vae")):
        with pytest.raises(CheckpointError, match=f"{option} FILE"):
            load(**(files | {part: None}), tokenizer=wide_dir / "tokenizer")
    with pytest.raises(CheckpointError, match="holds vae, where transformer was needed; give it with --vae"):
        load(wide_dir, transformer=files["vae"])


def test_a_broken_part_that_is_replaced_is_not_opened(official_dir, tensors, plain, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for part in ("text_encoder", "vae", "tokenizer", "scheduler"):
        (folder / part).symlink_to(official_dir / part, target_is_directory=True)
    path = spelled.save(tmp_path / "x.safetensors", tensors["transformer"])
    with pytest.raises(CheckpointError, match="not transformer; add --transformer FILE"):
        load(folder)
    assert torch.equal(velocity(load(folder, transformer=path)), plain)


@needs_gguf
@pytest.mark.parametrize("arch", ["lumina2", None])
@pytest.mark.parametrize("naming", ["ComfyUI", "prefixed ComfyUI", "diffusers"])
@pytest.mark.sampled(1)
def test_a_gguf_transformer(arch, naming, tensors, official_dir, plain, tmp_path):
    names = tensors["transformer"] if naming == "diffusers" else spelled.comfy(tensors["transformer"])
    names = spelled.prefixed("model.diffusion_model." if naming.startswith("prefixed") else "", names)
    # stable-diffusion.cpp squeezes the pad tokens.
    names = {key: tensor[0] if arch is None and "pad_token" in key else tensor for key, tensor in names.items()}
    pipe = load(official_dir, transformer=spelled.save_gguf(tmp_path / "x.gguf", names, arch))
    assert torch.equal(velocity(pipe), plain)


@needs_gguf
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gguf_of_short_floats(dtype, tensors, official_dir, tmp_path):
    short = {key: tensor.to(dtype) if tensor.dim() > 1 else tensor for key, tensor in tensors["transformer"].items()}
    pipes = (
        load(official_dir, transformer=spelled.save_gguf(tmp_path / "x.gguf", spelled.comfy(short))),
        load(official_dir, transformer=spelled.save(tmp_path / "x.safetensors", short)),
    )
    assert torch.equal(*map(velocity, pipes))


@pytest.fixture(scope="module")
def qwen_gguf(tensors, official_dir, tmp_path_factory):
    """The text encoder as llama.cpp's converter leaves it: vocabulary, merges and a base of its own in the metadata."""
    pytest.importorskip("gguf", reason="needs gguf-py: pip install 's3dit[test]'")
    data = json.loads((official_dir / "tokenizer" / "tokenizer.json").read_text())
    words = {number: token for token, number in data["model"]["vocab"].items()}
    added = {token["id"]: token for token in data["added_tokens"]}
    size = 704
    tokens = [added[i]["content"] if i in added else words.get(i, f"[PAD{i}]") for i in range(size)]
    kinds = [(3 if added[i]["special"] else 4) if i in added else 1 if i in words else 5 for i in range(size)]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in data["model"]["merges"]]
    fields = {
        "qwen3__rope__freq_base": ("add_float32", 5e6),
        "qwen3__attention__layer_norm_rms_epsilon": ("add_float32", 1e-6),
        "tokenizer__ggml__model": ("add_string", "gpt2"), "tokenizer__ggml__pre": ("add_string", "qwen2"),
        "tokenizer__ggml__tokens": ("add_array", tokens), "tokenizer__ggml__token_type": ("add_array", kinds),
        "tokenizer__ggml__merges": ("add_array", merges),
    }  # fmt: skip
    path = tmp_path_factory.mktemp("qwen") / "qwen.gguf"
    return spelled.save_gguf(path, spelled.llama(tensors["text_encoder"]), "qwen3", **fields)


def test_a_gguf_qwen3_has_its_own_base(qwen_gguf, official_dir, tensors, tmp_path):
    """Qwen3-4B-Instruct-2507 rotates by 5,000,000: against transformers with that base, and unlike the other one."""
    mine = load(official_dir, text_encoder=qwen_gguf)
    assert (mine.config.text_encoder.rope_theta, mine.config.text_encoder.rms_norm_eps) == (5e6, 1e-6)
    config = transformers.Qwen3Config.from_pretrained(official_dir / "text_encoder")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e6}
    theirs = transformers.Qwen3Model(config).eval()
    theirs.load_state_dict({k.removeprefix("model."): v for k, v in tensors["text_encoder"].items()})
    prompt = "a red star above a blue ring " * 4
    ids = torch.tensor([mine.tokenizer.encode(prompt)])
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True).hidden_states[-2][0]
    (found,) = mine.encode([prompt])
    (other,) = load(official_dir).encode([prompt])
    # fp32 on both sides, sums of 128 and 384 terms in another order; the base of 1e6 is off by 5e-2.
    assert relative(found, expected) < 2e-6 < relative(other, expected)


def test_a_gguf_brings_its_tokenizer(qwen_gguf, wide_dir, tensors, tmp_path):
    prompts = ["", "a red star above a blue ring", "Ünïcode 🦊 2024 <|im_end|> <think>", "一只猫  \n\n x"]
    own, folder = Tokenizer(GGUFFile(qwen_gguf)), Tokenizer(wide_dir / "tokenizer")
    assert [own.encode(p) for p in prompts] == [folder.encode(p) for p in prompts]
    files = {
        "transformer": spelled.save(tmp_path / "a.safetensors", tensors["transformer"]),
        "vae": spelled.save(tmp_path / "c.safetensors", spelled.part(wide_dir, "vae")),
    }
    pipe = load(text_encoder=qwen_gguf, **files)
    assert torch.equal(velocity(pipe), velocity(load(wide_dir, text_encoder=qwen_gguf)))


def test_every_name_of_the_vae_as_diffusers_converts_it():
    """All 244 names at full size: to LDM's by the restated rule, back by diffusers' converter and by ours."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    from s3dit.configs.infer_config import VAE
    from s3dit.model.vae import Autoencoder
    from s3dit.weights.keymap import detect

    with torch.device("meta"):
        names = list(Autoencoder(VAE).state_dict())
    config = {"block_out_channels": VAE.block_out_channels, "down_block_types": [""] * 4, "up_block_types": [""] * 4}
    stored = {spelled.ldm_name(name): torch.full((1, 1, 1, 1), i) for i, name in enumerate(names)}
    theirs = {name: int(tensor) for name, tensor in convert_ldm_vae_checkpoint(dict(stored), config).items()}
    spelling = detect(stored)
    mine = {spelling.to_official(key, stored)[0]: int(tensor) for key, tensor in stored.items()}
    assert len(names) == 244 and mine == theirs == {name: i for i, name in enumerate(names)}


def test_every_name_of_the_transformer(tmp_path):
    """All 453 names of Comfy-Org's file at full size become the official 521."""
    from s3dit.configs.infer_config import TRANSFORMER
    from s3dit.model.transformer import Transformer

    with torch.device("meta"):
        names = list(Transformer(TRANSFORMER).state_dict())
    stored = spelled.comfy({key: torch.zeros(2, 1) for key in names})
    assert len(stored) == 454 and len(names) == 521
    del stored["norm_final.weight"]

    found = official(open_checkpoint(spelled.save(tmp_path / "x.safetensors", stored)), names)
    assert set(found) == set(names) and found.entry("layers.0.attention.to_v.weight").shape == (2, 1)


def test_gather_says_where_parts_come_from(official_dir):
    sources = open_sources(official_dir, {}, None)
    assert sources.mixed == () and sources.notes == () and not sources.guessed
