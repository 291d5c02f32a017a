"""Every command that `s3dit inspect` prints works as printed, for a tiny file of every kind that it knows.

Run in this process, with the embedded model in the place of the published one, and the files of the test in the place
of those that only the user knows.
"""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from s3dit.cli.main import main
from s3dit.kernels.number_format import FORMATS
from s3dit.runtime.embedded import EMBEDDED

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from test_controlnet import network, write  # noqa: E402
from test_tokenizer import train_sentencepiece  # noqa: E402

HOME = "Tongyi-MAI/Z-Image-Turbo"
WEIGHTS = {part: next((EMBEDDED / part).glob("*.safetensors")) for part in ("transformer", "text_encoder", "vae")}
SMALL = ["--height", "64", "--width", "64", "--steps", "1"]
QUICK = ["--device", "cpu", "--dtype", "fp32"]
PARAMETERS = (
    "a red star above\na blue ring <lora:style:0.7>\nNegative prompt: text, blur\nSteps: 2, Sampler: Euler a, "
    'Schedule type: Beta, CFG scale: 2.5, Seed: 7, Size: 72x64, Model: z_image, Lora hashes: "style: 1a2b, x: 3", '
    "Version: f2.0.1"
)
GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 11, "steps": 2, "cfg": 1, "sampler_name": "ddpm", "scheduler": "simple", "denoise": 1,
        "model": ["11", 0], "positive": ["6", 0], "negative": ["33", 0], "latent_image": ["13", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["7", 0], "clip": ["30", 0]}},
    "7": {"class_type": "PrimitiveString", "inputs": {"value": "-a red star-"}},
    "11": {"class_type": "ModelSamplingAuraFlow", "inputs": {"shift": 3, "model": ["28", 0]}},
    "13": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "28": {"class_type": "LoraLoaderModelOnly", "inputs": {"lora_name": "style.safetensors", "strength_model": 0.5,
                                                           "model": ["29", 0]}},
    "29": {"class_type": "UNETLoader", "inputs": {"unet_name": "z_image_turbo_bf16.safetensors"}},
    "30": {"class_type": "CLIPLoader", "inputs": {"clip_name": "qwen_3_4b.safetensors"}},
    "33": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}},
}  # fmt: skip
ADVANCED = {
    "1": {"class_type": "SamplerCustomAdvanced", "inputs": {
        "noise": ["2", 0], "guider": ["3", 0], "sampler": ["4", 0], "sigmas": ["5", 0], "latent_image": ["6", 0]}},
    "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
    "3": {"class_type": "BasicGuider", "inputs": {"model": ["8", 0], "conditioning": ["7", 0]}},
    "4": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "5": {"class_type": "BasicScheduler", "inputs": {"scheduler": "beta", "steps": 1, "model": ["8", 0]}},
    "6": {"class_type": "EmptyLatentImage", "inputs": {"width": 80, "height": 64}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "a blue ring"}},
    "8": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sdxl.safetensors"}},
}  # fmt: skip


def draw(*argv):
    assert main(["generate", *map(str, argv), *QUICK]) == 0


def texts(path, **found):
    chunks = PngInfo()
    for name, text in found.items():
        chunks.add_text(name, text if isinstance(text, str) else json.dumps(text))
    Image.new("RGB", (16, 16)).save(path, pnginfo=chunks)


def lora(extra=()):
    names = {f"diffusion_model.layers.0.attention.{name}": 192 for name in ("to_q", "to_k")} | dict(extra)
    return {
        f"{layer}.{leaf}.weight": torch.full((4, width) if leaf == "lora_A" else (width, 4), 0.01)
        for layer, width in names.items()
        for leaf in ("lora_A", "lora_B")
    }


def make_gguf(path, kind=None):
    """The transformer, its matrices in a type of block."""
    gguf = pytest.importorskip("gguf", reason="GGUF files are made by gguf-py: pip install 's3dit[test]'")
    writer = gguf.GGUFWriter(path, "lumina2")
    for name, tensor in load_file(WEIGHTS["transformer"]).items():
        numbers = tensor.float().numpy()
        if kind is None or tensor.dim() != 2 or tensor.shape[1] % 32:
            writer.add_tensor(name, numbers)
        else:
            block = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(numbers, block), raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_shards(folder):
    """The transformer in two files and an index."""
    shutil.copytree(EMBEDDED / "transformer", folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    names = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": [*tensors][n - 1 :: 2] for n in (1, 2)}
    for shard, keys in names.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
    index = {"metadata": {"total_size": 9}, "weight_map": {key: shard for shard, keys in names.items() for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A file of each kind, in the current folder."""
    home = tmp_path_factory.mktemp("a shelf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        shutil.copytree(EMBEDDED, "model")
        for part, path in WEIGHTS.items():
            shutil.copy(path, f"{part}.safetensors")
        prefixes = {"transformer": "model.diffusion_model.", "text_encoder": "text_encoders.qwen3_4b.transformer."}
        save_file(
            {prefixes[part] + k: t for part in prefixes for k, t in load_file(WEIGHTS[part]).items()}, "two.safetensors"
        )
        tensors = load_file(WEIGHTS["text_encoder"])
        save_file({k: t for k, t in tensors.items() if not k.startswith("model.layers.2.")}, "cut.safetensors")
        make_gguf("t.gguf")
        make_shards(Path("shards"))
        save_file(lora(), "style.safetensors")
        save_file(lora({"diffusion_model.nothing.to_q": 192}), "partial.safetensors")
        Path("peft").mkdir()
        peft = {f"base_model.model.{key.removeprefix('diffusion_model.')}": t for key, t in lora().items()}
        save_file(peft, "peft/adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "peft_version": "0.21.0"}
        Path("peft/adapter_config.json").write_text(json.dumps(settings))
        write("union.safetensors", network("2.1").state_dict())
        Path("net").mkdir()
        write("net/diffusion_pytorch_model.safetensors", network("1.0").state_dict())
        transformer = json.loads((EMBEDDED / "transformer/config.json").read_text())
        said = {key: transformer[key] for key in ("dim", "n_heads", "n_kv_heads", "n_refiner_layers", "norm_eps")}
        said |= {"_class_name": "ZImageControlNetModel", "_diffusers_version": "0.38.0", "control_in_dim": 16}
        Path("net/config.json").write_text(
            json.dumps(said | {"add_control_noise_refiner": None, "control_layers_places": [0, 2, 4]})
        )
        Path("pieces").mkdir()
        train_sentencepiece(Path("pieces"), ["<|im_start|>", "<|im_end|>"])
        Image.effect_noise((64, 64), 90).convert("RGB").save("pose.png")
        draw("a red star", *SMALL, "--seed", "3", "-o", "plain.png")
        draw("a red star", *SMALL, "--quantize", "int8", "-o", "int8.jpg")
        draw("a red star", *SMALL, "--model", "model", "--transformer", "t.gguf", "-o", "mixed.webp")
        draw("a red star", *SMALL, "--lora", "style.safetensors:0.5", "-o", "lora.png")
        draw("a red star", *SMALL, "--control", "union.safetensors:pose.png:0.5:0-0.7", "-o", "control.png")
        draw("a red star", "--steps", "2", "--image", "pose.png", "-o", "start.png")
        shutil.copy("pose.png", "other.png")
        draw("a red star", "--steps", "2", "--image", "other.png", "-o", "moved.png")
        Path("other.png").unlink()
        texts("a1111.png", parameters=PARAMETERS)
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + PARAMETERS.encode("utf-16-be")
        Image.new("RGB", (16, 16)).save("a1111.jpg", exif=exif)
        texts("comfy.png", prompt=GRAPH, workflow={"nodes": []})
        texts("advanced.png", prompt=ADVANCED)
        exif = Image.Exif()
        exif[0x0110] = "prompt:" + json.dumps(GRAPH)
        Image.new("RGB", (16, 16)).save("comfy.webp", exif=exif)
        # Names that a command must not overwrite.
        shutil.copy("pose.png", "again.png")
    return home


KINDS = {
    "embedded": ("nothing, it is a whole model", "--model embedded"),
    "model": ("made by diffusers 0.36.0", "made by transformers 4.51.0", "--model model"),
    "transformer.safetensors": ("--transformer transformer.safetensors",),
    "text_encoder.safetensors": ("--text-encoder",),
    "cut.safetensors": ("as many as are in the file", "--text-encoder"),
    "model/vae": ("--vae model/vae",),
    "model/text_encoder": ("--text-encoder",),
    "two.safetensors": ("--transformer two.safetensors --text-encoder two.safetensors",),
    "t.gguf": ("GGUF", "lumina2"),
    "shards": ("safetensors in shards",),
    "shards/diffusion_pytorch_model.safetensors.index.json": ("in shards", "transformer", "--transformer shards"),
    "style.safetensors": ("an adapter", "other sizes than"),
    "partial.safetensors": ("1 of its layers or tensors fit nothing", "--lora-allow-partial"),
    "peft": ("an adapter", "PEFT 0.21.0", "alpha                8", "--lora peft"),
    "peft/adapter_config.json": ("the settings of an adapter", "PEFT 0.21.0", "--lora peft"),
    "union.safetensors": ("a ControlNet", "2.1", "--control union.safetensors:path/to/pose.png"),
    "net": ("a ControlNet", "1.0", "diffusers 0.38.0", "--control net:path/to/pose.png"),
    "net/config.json": ("the settings of a ControlNet", "diffusers 0.38.0"),
    "model/tokenizer": ("a tokenizer", "--tokenizer model/tokenizer"),
    "pieces": ("a tokenizer", "tokenizer.model"),
    "pieces/tokenizer.model": ("a tokenizer", "--tokenizer pieces"),
    "model/tokenizer/tokenizer.json": ("a tokenizer",),
    "model/tokenizer/vocab.json": ("a tokenizer", "tokenizer.json beside it goes first"),
    "model/tokenizer/merges.txt": ("a tokenizer", "merges.txt is not read"),
    "model/tokenizer/tokenizer_config.json": ("a tokenizer",),
    "model/model_index.json": ("the index of a whole model", "ZImagePipeline", "diffusers 0.36.0", "--model model"),
    "model/transformer/config.json": ("the settings of a transformer", "--transformer model/transformer"),
    "model/text_encoder/config.json": ("the settings of a text_encoder", "transformers 4.51.0"),
    "model/vae/config.json": ("the settings of a vae", "latent_channels"),
    "model/scheduler": ("the settings of a schedule", "--model model"),
    "model/scheduler/scheduler_config.json": ("the settings of a schedule", "shift                3"),
    "model/s3dit.json": ("what a model folder says to s3dit", "--model model"),
    "plain.png": ("  engine\n", "    torch ", "-o again-2.png"),
    "int8.jpg": ("quantized", "--quantize int8"),
    "mixed.webp": ("--model path/to/model --transformer path/to/t.gguf",),
    "lora.png": ("adapters             file style.safetensors, ", "--lora path/to/style.safetensors"),
    "control.png": ("--control path/to/union.safetensors:pose.png:0.5:0.0-0.7",),
    "start.png": ("--replay start.png -o",),
    "moved.png": ("--replay moved.png --image path/to/other.png -o",),
    "a1111.png": ("AUTOMATIC1111", "f2.0.1", "--steps 2 --cfg 2.5 --height 64 --width 64 --solver euler_ancestral "
                  "--schedule beta --negative-prompt 'text, blur' --lora path/to/style:0.7", "'a red star above a"),
    "a1111.jpg": ("AUTOMATIC1111", "--seed 7"),
    "comfy.png": ("ComfyUI", "--seed 11 --steps 2", "--lora path/to/style.safetensors:0.5", "-- '-a red star-'",
                  "ddpm is none of this engine's"),
    "comfy.webp": ("ComfyUI", "z_image_turbo_bf16", "--convention comfyui"),
    "advanced.png": ("--seed 5 --steps 1 --height 64 --width 80 --solver euler --schedule beta", "not sound like"),
}  # fmt: skip


TORCHLESS = """
import json, sys
from s3dit.cli.main import main
from s3dit.kernels.number_format import FORMATS
for kind in json.loads(sys.argv[1]):
    assert main(["inspect", kind]) == 0, kind
    assert "torch" not in sys.modules, f"torch was imported for {kind}"
"""


def test_no_kind_of_file_needs_torch(shelf, monkeypatch):
    """Headers say everything, of quantized files too; importing torch would take a second."""
    monkeypatch.chdir(shelf)
    tensors = load_file(WEIGHTS["transformer"])
    layer = "layers.0.feed_forward.w1"
    own = FORMATS["int4"].layout(*tensors[f"{layer}.weight"].shape)
    packed = {f"{layer}.{part}": torch.zeros(shape, dtype=getattr(torch, name)) for part, (shape, name) in own.items()}
    codes = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
    said = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    marked = {f"{layer}.weight": codes, f"{layer}.weight_scale": torch.ones(()), f"{layer}.comfy_quant": said}
    save_file(tensors | packed, "int4.safetensors", {"scheme": "int4"})
    save_file(tensors | marked, "fp8.safetensors")
    save_file(lora() | {"diffusion_model.layers.0.attention.to_q.alpha": torch.ones(())}, "alpha.safetensors")
    make_gguf(Path("q8.gguf"), "Q8_0")
    kinds = [*KINDS, "int4.safetensors", "fp8.safetensors", "q8.gguf", "alpha.safetensors"]
    run = subprocess.run([sys.executable, "-c", TORCHLESS, json.dumps(kinds)], capture_output=True, text=True)
    for made in kinds[len(KINDS) :]:
        Path(made).unlink()
    assert run.returncode == 0, run.stderr
    for words in ("int4 ", "fp8-weights ", "Q8_0 ", "alpha                1\n"):
        assert words in run.stdout


def command(said, **places):
    """The words of the command that was printed, the embedded model for the published one, and files for places."""
    last = said.splitlines()[-1]
    assert last.startswith("use it: s3dit generate "), said
    words = [word.replace(HOME, "embedded") for word in shlex.split(last.removeprefix("use it: s3dit "))]
    for name, real in ({"MODEL": "embedded"} | places).items():
        words = [word.replace(f"path/to/{name}", real) for word in words]
    assert "path/to/" not in " ".join(words)
    small = [word for i in (0, 2, 4) if SMALL[i] not in words for word in SMALL[i : i + 2]]
    return [*words[:1], *QUICK, *([] if "--replay" in words else small), *words[1:]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(5)
def test_every_command_works(kind, shelf, monkeypatch, capsys):
    monkeypatch.chdir(shelf)
    capsys.readouterr()
    assert main(["inspect", kind]) == 0
    said = capsys.readouterr().out
    for words in KINDS[kind]:
        assert words in said
    files = {name: name for name in ("model", "t.gguf", "style.safetensors", "union.safetensors", "pose.png")}
    before = {path: path.stat().st_mtime_ns for path in shelf.rglob("*")}
    assert main(command(said, **files, **{"style": "style.safetensors", "other.png": "pose.png"})) == 0, (
        capsys.readouterr().err
    )
    assert not [path for path, changed in before.items() if path.is_file() and path.stat().st_mtime_ns != changed]
    for path in {*shelf.rglob("*")} - {*before}:
        path.unlink()
