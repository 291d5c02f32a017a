"""`look` says what a file is from its header alone, quickly at full size, and proposes a command that works."""

import json
import shlex
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s3dit import shapes
from s3dit.cli import main
from s3dit.look import _command, look
from s3dit.pipeline import EMBEDDED
from s3dit.text_encoder import TextEncoder
from s3dit.transformer import Transformer
from s3dit.weights.checkpoint import CheckpointError

WEIGHTS = {part: next((EMBEDDED / part).glob("*.safetensors")) for part in ("transformer", "text_encoder", "vae")}


def hollow(path, names, prefix="", dtype=("BF16", 2)):
    """A safetensors file at full size whose tensors are a hole in the disk."""
    header, at = {}, 0
    for name, shape in names.items():
        end = at + torch.Size(shape).numel() * dtype[1]
        header[prefix + name] = {"dtype": dtype[0], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + at)
    return path


@pytest.fixture(scope="module")
def full():
    """Names and shapes of the published transformer."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Transformer(shapes.TRANSFORMER).state_dict().items()}


def test_a_whole_directory(capsys):
    assert main(["look", str(EMBEDDED)]) == 0
    out = capsys.readouterr().out
    assert "transformer: Z-Image (tiny), 6 layers of width 192" in out and "nothing, it is a whole model" in out
    assert f"--model {EMBEDDED}" in out and "fault" not in out


def test_a_file_of_24_gigabytes(full, tmp_path):
    path = hollow(tmp_path / "x.safetensors", full, "model.diffusion_model.", ("F32", 4))
    report = look(path)
    (part,) = report.parts
    assert part.nbytes == 24_619_634_944 and part.tensors == 521 and not part.faults
    assert part.kind == "Z-Image (Turbo or Z-Image, which the file does not say), 30 layers of width 3840"
    assert report.missing == ("text_encoder", "vae", "tokenizer")
    assert part.formats["layers"] == {"fp32": 4 * 5_427_310_080}
    took = []
    for _ in range(3):
        start = time.process_time()
        look(path)
        took.append(time.process_time() - start)
    assert min(took) < 0.5


def test_a_gguf_with_a_whole_vocabulary(tmp_path):
    """What llama.cpp writes at full size: 151,936 tokens, 151,387 merges, and tensors in blocks."""
    gguf = pytest.importorskip("gguf", reason="GGUF files are made by gguf-py: pip install 's3dit[test]'")
    with torch.device("meta"):
        names = TextEncoder(shapes.TEXT_ENCODER).state_dict()
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3")
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(151936)])
    writer.add_array("tokenizer.ggml.merges", [f"a{i} b{i}" for i in range(151387)])
    writer.add_array("tokenizer.ggml.token_type", [1] * 151936)
    writer.add_float32("qwen3.rope.freq_base", 5e6)
    size = 0
    for name, tensor in names.items():
        kind = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 else gguf.GGMLQuantizationType.Q6_K
        nbytes = tensor.numel() * 4 if tensor.dim() == 1 else tensor.numel() // 256 * 210
        writer.add_tensor_info(name, tensor.shape, torch.zeros(1).numpy().dtype, nbytes, kind)
        size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.seek(0, 2)
        file.truncate(-(-file.tell() // 32) * 32 + size)
    start = time.process_time()
    report = look(tmp_path / "x.gguf")
    assert time.process_time() - start < 1.0
    (part,) = report.parts
    assert (part.container, part.producer) == ("GGUF", "llama.cpp (architecture qwen3)")
    assert "rotation base 5,000,000" in part.kind and "tokenizer" not in report.missing


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_the_command_takes_the_file(part, tmp_path):
    """A path with blanks is quoted; the option is the one of the part."""
    path = tmp_path / "my file.safetensors"
    save_file(load_file(WEIGHTS[part]), path)
    command = shlex.split(look(path).command)
    assert command[-2:] == [f"--{part.replace('_', '-')}", str(path)]


def test_a_transformer_that_is_not_complete(tmp_path):
    tensors = load_file(WEIGHTS["transformer"])
    del tensors["layers.3.feed_forward.w1.weight"]
    save_file(
        tensors | {"layers.0.extra.weight": torch.ones(1)}, tmp_path / "x.safetensors", {"modelspec.author": "me"}
    )
    (part,) = look(tmp_path / "x.safetensors").parts
    assert part.faults == ("lacks 1 layers (layers.3.feed_forward.w1)", "has besides 1 layers (layers.0.extra)")
    assert part.producer == "me"


def test_what_is_no_model_is_one_line(tmp_path, capsys):
    save_file({"x.lora_A.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "b.ckpt")
    for name, words in (("a.safetensors", "--lora FILE"), ("b.ckpt", "never opened"), ("c", "no such file")):
        assert main(["look", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert words in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


def test_json(capsys, tmp_path):
    assert main(["look", str(WEIGHTS["transformer"]), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parts"][0]["spelling"] == "official" and "--transformer" in report["command"]


def test_looking_does_not_import_the_compiler():
    """torch itself is most of what a look takes; its compiler would double that."""
    code = "import sys, s3dit.look; sys.exit(any(name in sys.modules for name in ('torch._dynamo', 'torch._inductor')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_path_that_is_not_there_is_not_looked_for_elsewhere():
    with pytest.raises(CheckpointError, match="no such file or folder"):
        look(EMBEDDED / "no" / "where")


def test_an_adapter_is_named_and_its_command_parses(tmp_path, capsys):
    path = tmp_path / "my style.safetensors"
    tensors = {"lora_A.weight": torch.zeros(4, 96), "lora_B.weight": torch.zeros(96, 4), "alpha": torch.tensor(2.0)}
    save_file({f"diffusion_model.layers.0.attention.to_q.{leaf}": tensor for leaf, tensor in tensors.items()}, path)
    assert main(["look", str(path)]) == 0
    said = capsys.readouterr().out
    for words in ("an adapter", "lora", "rank                 4", "alpha                2"):
        assert words in said
    assert shlex.split(said.splitlines()[-1])[-2:] == ["--lora", str(path)]


def test_a_picture_says_what_made_it_and_draws_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "1", "--seed", "3", "--dtype", "fp32", "--device", "cpu"]
    assert main(["generate", "a red star", *options, "-o", "a b.png"]) == 0
    capsys.readouterr()
    assert main(["look", "a b.png"]) == 0
    said = capsys.readouterr().out
    assert "a red star" in said and "seed                 3" in said
    command = shlex.split(said.splitlines()[-1].removeprefix("use it: "))
    assert main([*command[1:], "--dtype", "fp32", "--device", "cpu"]) == 0
    assert Image.open("again.png").tobytes() == Image.open("a b.png").tobytes()


def test_the_embedded_model_has_a_name(tmp_path, capsys):
    assert main(["look", "embedded"]) == 0
    assert "nothing, it is a whole model" in capsys.readouterr().out
    assert main(["convert", "embedded", str(tmp_path / "out")]) == 0


def test_a_file_of_all_parts_takes_only_the_tokenizer_from_elsewhere():
    command = shlex.split(_command(Path("all in one.safetensors"), WEIGHTS, ["tokenizer"]))
    assert "--tokenizer" not in command and command[command.index("--model") + 1] == "Tongyi-MAI/Z-Image-Turbo"
    for part in ("transformer", "text-encoder", "vae"):
        assert command[command.index(f"--{part}") + 1] == "all in one.safetensors"


def test_a_vae_that_the_official_configuration_does_not_fit_gets_no_command(tmp_path):
    save_file(load_file(WEIGHTS["vae"]), tmp_path / "vae.safetensors")
    report = look(tmp_path / "vae.safetensors")
    assert "do not divide into 32 groups" in report.parts[0].faults[0] and not report.command


def test_no_command_is_given_for_what_cannot_be_used(tmp_path):
    (path,) = (EMBEDDED / "transformer").glob("*.safetensors")
    tensors = {
        name: tensor for name, tensor in load_file(path).items() if not name.startswith("layers.1.attention.to_k")
    }
    save_file(tensors, tmp_path / "x.safetensors")
    report = look(tmp_path / "x.safetensors")
    assert report.parts[0].faults and not report.command and "use it" not in str(report)
