"""`s3dit inspect` says what a file is from its header alone, quickly at full size, and gives a command that works."""

import json
import shlex
import struct
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from s3dit.cli.inspect_weights import _command, inspect_path
from s3dit.cli.main import main
from s3dit.configs import infer_config
from s3dit.errors import CheckpointError
from s3dit.model.text_encoder import TextEncoder
from s3dit.model.transformer import Transformer
from s3dit.runtime.embedded import EMBEDDED

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
        return {name: tuple(t.shape) for name, t in Transformer(infer_config.TRANSFORMER).state_dict().items()}


def test_a_whole_directory(capsys):
    assert main(["inspect", str(EMBEDDED)]) == 0
    out = capsys.readouterr().out
    assert "transformer: Z-Image (tiny), 6 layers of width 192" in out and "nothing, it is a whole model" in out
    assert f"--model {EMBEDDED}" in out and "fault" not in out


def test_a_file_of_24_gigabytes(full, tmp_path):
    path = hollow(tmp_path / "x.safetensors", full, "model.diffusion_model.", ("F32", 4))
    report = inspect_path(path)
    (part,) = report.parts
    assert part.nbytes == 24_619_634_944 and part.tensors == 521 and not part.faults
    assert part.kind == "Z-Image (Turbo or Z-Image, which the file does not say), 30 layers of width 3840"
    assert report.missing == ("text_encoder", "vae", "tokenizer")
    assert part.formats["layers"] == {"fp32": 4 * 5_427_310_080}
    took = []
    for _ in range(3):
        start = time.process_time()
        inspect_path(path)
        took.append(time.process_time() - start)
    assert min(took) < 0.5


@pytest.mark.slow
def test_a_gguf_with_a_whole_vocabulary(tmp_path):
    """What llama.cpp writes at full size: 151,936 tokens, 151,387 merges, and tensors in blocks."""
    gguf = pytest.importorskip("gguf", reason="GGUF files are made by gguf-py: pip install 's3dit[test]'")
    with torch.device("meta"):
        names = TextEncoder(infer_config.TEXT_ENCODER).state_dict()
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
    report = inspect_path(tmp_path / "x.gguf")
    assert time.process_time() - start < 1.0
    (part,) = report.parts
    assert (part.container, part.producer) == ("GGUF", "llama.cpp (architecture qwen3)")
    assert "rotation base 5,000,000" in part.kind and "tokenizer" not in report.missing


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_the_command_takes_the_file(part, tmp_path):
    """A path with blanks is quoted; the option is the one of the part."""
    path = tmp_path / "my file.safetensors"
    save_file(load_file(WEIGHTS[part]), path)
    command = shlex.split(inspect_path(path).command)
    assert command[-2:] == [f"--{part.replace('_', '-')}", str(path)]


def test_a_transformer_that_is_not_complete(tmp_path):
    tensors = load_file(WEIGHTS["transformer"])
    del tensors["layers.3.feed_forward.w1.weight"]
    save_file(
        tensors | {"layers.0.extra.weight": torch.ones(1)}, tmp_path / "x.safetensors", {"modelspec.author": "me"}
    )
    (part,) = inspect_path(tmp_path / "x.safetensors").parts
    assert part.faults == ("lacks 1 layers (layers.3.feed_forward.w1)", "has besides 1 layers (layers.0.extra)")
    assert part.producer == "me"


def test_what_is_no_model_is_one_line(tmp_path, capsys):
    save_file({"x.lora_A.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "b.ckpt")
    for name, words in (("a.safetensors", "--lora FILE"), ("b.ckpt", "never opened"), ("c", "c: not found; needed")):
        assert main(["inspect", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert words in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


def test_json(capsys, tmp_path):
    assert main(["inspect", str(WEIGHTS["transformer"]), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parts"][0]["spelling"] == "official" and "--transformer" in report["command"]


def test_a_path_that_is_not_there_is_not_looked_for_elsewhere():
    with pytest.raises(CheckpointError, match="no such file or folder"):
        inspect_path(EMBEDDED / "no" / "where")


def test_an_adapter_is_named_and_its_command_parses(tmp_path, capsys):
    path = tmp_path / "my style.safetensors"
    tensors = {"lora_A.weight": torch.zeros(4, 96), "lora_B.weight": torch.zeros(96, 4), "alpha": torch.tensor(2.0)}
    save_file({f"diffusion_model.layers.0.attention.to_q.{leaf}": tensor for leaf, tensor in tensors.items()}, path)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    for words in ("an adapter", "lora", "rank                 4", "alpha                2"):
        assert words in said
    assert shlex.split(said.splitlines()[-1])[-2:] == ["--lora", str(path)]


def test_a_picture_says_what_made_it_and_draws_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "1", "--seed", "3", "--dtype", "fp32", "--device", "cpu"]
    assert main(["generate", "a red star", *options, "-o", "a b.png"]) == 0
    capsys.readouterr()
    assert main(["inspect", "a b.png"]) == 0
    said = capsys.readouterr().out
    assert "a red star" in said and "seed                 3" in said
    command = shlex.split(said.splitlines()[-1].removeprefix("use it: "))
    assert main([*command[1:], "--dtype", "fp32", "--device", "cpu"]) == 0
    assert Image.open("again.png").tobytes() == Image.open("a b.png").tobytes()


def test_the_embedded_model_has_a_name(tmp_path, capsys):
    assert main(["inspect", "embedded"]) == 0
    assert "nothing, it is a whole model" in capsys.readouterr().out
    assert main(["convert", "embedded", str(tmp_path / "out")]) == 0


def test_a_file_of_all_parts_takes_only_the_tokenizer_from_elsewhere():
    command = shlex.split(_command(Path("all in one.safetensors"), WEIGHTS, ["tokenizer"]))
    assert "--tokenizer" not in command and command[command.index("--model") + 1] == "Tongyi-MAI/Z-Image-Turbo"
    for part in ("transformer", "text-encoder", "vae"):
        assert command[command.index(f"--{part}") + 1] == "all in one.safetensors"


def test_a_vae_that_the_official_configuration_does_not_fit_gets_no_command(tmp_path):
    save_file(load_file(WEIGHTS["vae"]), tmp_path / "vae.safetensors")
    report = inspect_path(tmp_path / "vae.safetensors")
    assert "do not divide into 32 groups" in report.parts[0].faults[0] and not report.command


def test_no_command_is_given_for_what_cannot_be_used(tmp_path):
    (path,) = (EMBEDDED / "transformer").glob("*.safetensors")
    tensors = {
        name: tensor for name, tensor in load_file(path).items() if not name.startswith("layers.1.attention.to_k")
    }
    save_file(tensors, tmp_path / "x.safetensors")
    report = inspect_path(tmp_path / "x.safetensors")
    assert report.parts[0].faults and not report.command and "use it" not in str(report)


def text_encoder(layers):
    """Names and shapes of the published text encoder, of so many of its layers."""
    with torch.device("meta"):
        state = TextEncoder(infer_config.TEXT_ENCODER).state_dict()
    gone = tuple(f"model.layers.{i}." for i in range(layers, 36))
    return {name: tuple(t.shape) for name, t in state.items() if not name.startswith(gone)}


def test_a_text_encoder_without_the_layer_that_is_never_read_is_usable(tmp_path):
    """The features are the output of the last layer but one: without the last it draws, without two it does not."""
    report = inspect_path(hollow(tmp_path / "x.safetensors", text_encoder(35)))
    (part,) = report.parts
    assert not part.faults and "--text-encoder" in report.command
    assert "read as the first of 36; the last is not needed" in str(report)
    report = inspect_path(hollow(tmp_path / "y.safetensors", text_encoder(34)))
    assert "it has 34 layers" in report.parts[0].faults[0] and not report.command


def test_an_adapter_of_which_some_is_of_another_shape_needs_partial_use(tmp_path):
    def pair(layer, width):
        return {f"{layer}.lora_A.weight": torch.zeros(4, width), f"{layer}.lora_B.weight": torch.zeros(width, 4)}

    tensors = pair("transformer.layers.0.attention.to_q", 3840)
    save_file(tensors, tmp_path / "a.safetensors")
    facts = inspect_path(tmp_path / "a.safetensors")
    assert "--lora-allow-partial" not in facts.command and not facts.notes and "Tongyi-MAI" in facts.command
    save_file(tensors | pair("transformer.layers.1.attention.to_q", 96), tmp_path / "b.safetensors")
    facts = inspect_path(tmp_path / "b.safetensors")
    assert "--lora-allow-partial" in facts.command and "layers.1.attention.to_q [96, 96]" in facts.notes[0]


def carrying(path, **texts):
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text if isinstance(text, str) else json.dumps(text))
    Image.new("RGB", (16, 16)).save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"prompt": "x", "engine": {"replayable": False}}, "given from Python"),
        ({"prompt": "x", "engine": 5}, "its engine is 5"),
        ({"prompt": "x", "adapters": [{"file": "a"}]}, "its adapter has no scale, sha256"),
        ({"prompt": "x", "height": "1; rm -rf ."}, "cannot be replayed"),
    ],
)
def test_a_record_that_cannot_be_replayed_gets_no_command(metadata, words, tmp_path):
    facts = inspect_path(carrying(tmp_path / "x.png", s3dit=metadata))
    assert not facts.command and words in str(facts) and "use it" not in str(facts)


@pytest.mark.parametrize(
    "texts",
    [
        {"prompt": "{"},
        {"prompt": "[" * 100000},
        {"prompt": {"1": {"inputs": []}, "2": 5}},
        {"prompt": {"1": {"class_type": "K", "inputs": {"latent_image": 1, "positive": ["1", 0], "seed": 1e999}}}},
        {"prompt": {str(i): {"inputs": {"latent_image": 0, "guider": [str(i + 1), 0]}} for i in range(5000)}},
        {"workflow": {"nodes": []}},
        {"parameters": "Steps: 99999999999999999999, Seed: -1e9, Size: 9x, CFG scale: nan, Sampler: \x1b[31m"},
        {"parameters": "a\nSteps: 1, " + "a b-/" * 100000},
        {"parameters": "<lora:" * 50000 + "\nSteps: 1"},
    ],
    ids=range(9),
)
@pytest.mark.sampled(2)
def test_metadata_of_others_are_data_of_strangers(texts, tmp_path):
    """Whatever they say, it ends in facts, soon; what is printed is printable, and what is out of bounds left out."""
    start = time.process_time()
    facts = inspect_path(carrying(tmp_path / "x.png", **texts))
    assert time.process_time() - start < 2
    json.dumps(facts.to_json())
    assert all(row.isprintable() for row in str(facts).splitlines())
    if facts.command:
        words = shlex.split(facts.command)
        assert words[:2] == ["s3dit", "generate"] and not {"--steps", "--seed"} & {*words} or "99" not in facts.command


def test_a_prompt_stays_one_word_of_the_command(tmp_path):
    prompt = "a 'fox'; rm -rf $HOME `x` \"y\"\n--model evil"
    facts = inspect_path(carrying(tmp_path / "x.png", parameters=f"{prompt}\nSteps: 3, Seed: 1"))
    assert " ".join(prompt.split()) in shlex.split(facts.command) and facts.command.count("\n") == 0
    long = inspect_path(carrying(tmp_path / "y.png", parameters=f"{'fox ' * 900}\nSteps: 3, Seed: 1"))
    assert shlex.split(str(long).splitlines()[-1])[4] == " ".join(["fox"] * 900)


def test_an_index_without_its_shards_says_which(tmp_path):
    path = tmp_path / "x.safetensors.index.json"
    shard = "x-00001-of-00001.safetensors"
    path.write_text(json.dumps({"weight_map": {"cap_embedder.0.weight": shard}, "metadata": {"total_size": 12e9}}))
    facts = inspect_path(path)
    assert facts.facts["part"] == "transformer" and facts.facts["not here"] == [shard] and not facts.command
    assert "not used alone" in facts.notes[0] and "12.00 GB" in str(facts)


def test_a_folder_of_graphs_is_drawn_with_by_its_own_program(tmp_path):
    """Whichever of its files is asked about; settings of others are not taken for its."""
    (tmp_path / "runner.py").touch()
    (tmp_path / "vae.pt2").write_bytes(b"PK\3\4")
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"form": "export", "placement": "cpu, fp32", "s3dit": "1", "torch": "2"}))
    for path in (tmp_path, tmp_path / "vae.pt2", settings):
        facts = inspect_path(path)
        assert shlex.split(facts.command)[:2] == ["python", str(tmp_path / "runner.py")]
        assert facts.facts["graphs"] == ["vae.pt2"] and "run their code" in str(facts)
    settings.write_text('{"form": [1]}')
    with pytest.raises(CheckpointError, match="JSON of a kind that is not read"):
        inspect_path(settings)


def test_json_of_no_kind_is_one_line(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"a": [1], "b": 2}')
    assert main(["inspect", str(tmp_path / "x.json")]) == 2
    assert "needed settings, an index or a tokenizer" in capsys.readouterr().err


def test_settings_that_would_be_refused_say_so(tmp_path):
    said = json.loads((EMBEDDED / "scheduler/scheduler_config.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(said | {"invert_sigmas": True}))
    facts = inspect_path(tmp_path / "x.json")
    assert facts.notes[0].startswith("not usable: ") and "invert_sigmas" in facts.notes[0] and not facts.command


def test_the_model_in_a_command_is_one_that_fits(tmp_path):
    """The published model where widths and numbers are its own, else one that only the user knows."""
    report = inspect_path(hollow(tmp_path / "x.safetensors", text_encoder(36)))
    assert "--model Tongyi-MAI/Z-Image-Turbo" in report.command
    for path in (EMBEDDED / "transformer", EMBEDDED / "text_encoder", EMBEDDED / "tokenizer"):
        assert "--model path/to/MODEL" in inspect_path(path).command
    assert "--model Tongyi-MAI/Z-Image-Turbo" in inspect_path(EMBEDDED / "vae").command
