"""DFloat11: files of its own encoder, and of one written after the format, give every bit of the bf16 weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.cli.convert_model import convert
from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.export import graphs
from s3dit.kernels.dfloat11 import decode_exponents, launch_decode
from s3dit.kernels.dispatch import INTERPRETED
from s3dit.runtime.sources import open_model
from s3dit.weights.checkpoint import open_checkpoint, open_stored
from s3dit.weights.formats import producer
from s3dit.weights.hub_files import wanted

sys.path.insert(0, str(Path(__file__).parent))
from dfloat11_files import compress, compress_with_dfloat11  # noqa: E402

BLOCK = {
    "attention.to_q": (32, 32), "attention.to_k": (32, 32), "attention.to_v": (32, 32), "attention.to_out.0": (32, 32),
    "feed_forward.w1": (96, 32), "feed_forward.w2": (32, 96), "feed_forward.w3": (96, 32),
    "adaLN_modulation.0": (128, 16),
}  # fmt: skip
DRAW = {"prompt": "a red star above a blue ring", "seed": 3, "height": 64, "width": 64, "num_inference_steps": 1}


def drawn(out, in_, scale=0.02):
    return (torch.randn(out, in_) * scale).bfloat16()


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def same(a, b):
    return a.dtype == b.dtype == torch.bfloat16 and torch.equal(bits(a), bits(b))


def parts_of(checkpoint, layer):
    return {key.rpartition(".")[2]: checkpoint.load(key) for key in checkpoint if key.rpartition(".")[0] == layer}


def decoded(checkpoint, layer):
    """The weight of a layer, from fp32 to bf16, which rounds nothing away."""
    return checkpoint.schemes[layer].decode(parts_of(checkpoint, layer)).bfloat16()


def block(weights, encoder=compress, group="layers.0", norm="attention.norm_q"):
    """The tensors of a block of a file, of its weights {layer: weight}."""
    tensors = {f"{group}.{leaf}": tensor for leaf, tensor in encoder(list(weights.values())).items()}
    tensors |= {f"{group}.{name}.weight": torch.ones(32).bfloat16() for name in ("attention_norm1", norm)}
    if "adaLN_modulation.0" in weights:
        tensors[f"{group}.adaLN_modulation.0.bias"] = torch.zeros(128).bfloat16()
    return tensors


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_block_of_its_own_encoder(tmp_path):
    """Zeros of both signs, subnormals and the largest that has a code are among the weights."""
    weights = {name: drawn(*shape) for name, shape in BLOCK.items()}
    weights["attention.to_k"].view(-1)[:6] = torch.tensor([0.0, -0.0, 1e-40, -9e-41, 2.0**112, -1e-30])
    tensors = block(weights, compress_with_dfloat11)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert list(checkpoint.schemes) == [f"layers.0.{name}" for name in weights]
    for name, weight in weights.items():
        assert same(decoded(checkpoint, f"layers.0.{name}"), weight), name
    assert producer(open_stored(tmp_path / "model.safetensors")) == "DFloat11"
    stored = sum(tensor.nbytes for leaf, tensor in tensors.items() if leaf.count(".") == 2)
    assert stored < 0.8 * sum(2 * weight.numel() for weight in weights.values()), "tables weigh in a block so small"


def test_many_blocks_of_codes_and_long_codes(tmp_path):
    """A layer begins and ends inside blocks, several pieces are decoded, and codes take up to 32 bits.

    The last column holds 40 codes of a bit and more a run, the other end one code in four runs.
    """
    narrow = (2.0 ** torch.randint(-9, 9, (300, 256)).float() * torch.randn(300, 256).sign()).bfloat16()
    exponents = range(118, 136)
    long = {exponent: "1" * i + "0" for i, exponent in enumerate(exponents)}
    long |= {117 - i: "1" * 18 + f"{i:014b}" for i in range(8)}
    narrow[0, ::3] = 2.0**-14
    for weights, coded in (((drawn(700, 768), drawn(900, 768)), None), ((narrow, drawn(640, 256, 1.0)), long)):
        shapes = [weight.shape for weight in weights]
        mild = [weight.float().abs().clamp(2.0**-17, 2.0**8).bfloat16() if coded else weight for weight in weights]
        save_file(
            {f"time.{leaf}": tensor for leaf, tensor in compress(mild, coded).items()}
            | {f"time.{i}.bias": torch.zeros(shape[0]).bfloat16() for i, shape in enumerate(shapes)},
            tmp_path / "model.safetensors",
        )
        config = {"threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": {"time": ["0", "1"]}}
        (tmp_path / "config.json").write_text(json.dumps({"dfloat11_config": config}))
        checkpoint = open_checkpoint(tmp_path)
        for i, weight in enumerate(mild):
            assert same(decoded(checkpoint, f"time.{i}"), weight)
            ids = torch.tensor([3, 0, 299, 3])
            assert same(checkpoint.rows(f"time.{i}.weight", ids), weight[ids])
        assert checkpoint.rows("time.1.weight", ids[:0]).shape == (0, shapes[1][1])


EMBEDDED = Path(__file__).parents[2] / "weights" / "tiny"
QWEN = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
QWEN += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
PATTERNS = {r"model.layers\.[0-9]+": QWEN, r"model\.embed_tokens": []}


def embedded(part):
    (file,) = (EMBEDDED / part).glob("*.safetensors")
    return load_file(file)


def grouped(tensors, groups):
    """Tensors of a model whose layers in `groups` {group: names} are compressed; "" is the group itself."""
    left, made = dict(tensors), {}
    for group, names in groups.items():
        weights = [left.pop(f"{group}.{name}.weight".replace("..", ".")) for name in names]
        made |= {f"{group}.{leaf}": tensor for leaf, tensor in compress(weights).items()}
    return made | left


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Files of the embedded transformer in both spellings, without a config, and its text encoder as a folder."""
    folder = tmp_path_factory.mktemp("df11")
    plain = embedded("transformer")
    stems = sorted({key.removesuffix(".attention_norm1.weight") for key in plain if "attention_norm1" in key})
    groups = {stem: [name for name in BLOCK if f"{stem}.{name}.weight" in plain] for stem in stems}
    save_file(grouped(plain, groups), folder / "diffusers.safetensors")
    comfy = {}
    for key, tensor in plain.items():
        key = key.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        key = key.replace("attention.to_out.0", "attention.out")
        key = key.replace("attention.norm_q", "attention.q_norm").replace("attention.norm_k", "attention.k_norm")
        comfy[key] = tensor
    for stem in stems:
        rows = [comfy.pop(f"{stem}.attention.to_{letter}.weight") for letter in "qkv"]
        comfy[f"{stem}.attention.qkv.weight"] = torch.cat(rows)
    names = ["attention.qkv", "attention.out", *list(BLOCK)[4:]]
    groups = {stem: [name for name in names if f"{stem}.{name}.weight" in comfy] for stem in stems}
    save_file(grouped(comfy, groups), folder / "comfy.safetensors")
    text = embedded("text_encoder")
    layers = {f"model.layers.{i}": QWEN for i in range(64) if f"model.layers.{i}.input_layernorm.weight" in text}
    made = grouped(text, {"model.embed_tokens": [""], **layers})
    encoder = folder / "text"
    encoder.mkdir()
    for group in layers:
        save_file({k: made.pop(k) for k in list(made) if k.startswith(f"{group}.")}, encoder / f"{group}.safetensors")
    save_file(made, encoder / "model.safetensors")
    config = {"version": "0.5.0", "threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": PATTERNS}
    (encoder / "config.json").write_text(json.dumps({"dfloat11_config": config}))
    return folder


def picture(**parts):
    pipe = Pipeline.load("embedded", device="cpu", **parts)
    said = [note.split()[1] for note in pipe.sources.notes if "DFloat11" in note]
    assert set(said) == set(parts)
    return pipe(**DRAW, output_type="latent").latents[0]


@pytest.mark.slow
def test_a_picture_has_the_bits_of_the_plain_model(compressed):
    """In both dtypes of computing; fp32 with weights that are kept in bf16 is what a CPU without bf16 does."""
    files = ({"transformer": compressed / "comfy.safetensors"}, {"transformer": compressed / "diffusers.safetensors"})
    files[1]["text_encoder"] = compressed / "text"
    expected = picture()
    for parts in files:
        assert torch.equal(picture(**parts), expected)


@pytest.mark.slow
def test_what_it_cannot_do_is_said(compressed):
    """A graph takes sizes of weights for constants, so that every layer of this format is a graph of its own."""
    with pytest.raises(BackendError, match="without compile, or `s3dit convert` it"):
        Pipeline.load("embedded", device="cpu", transformer=compressed / "comfy.safetensors", compile=True)
    pipe = Pipeline.load("embedded", device="cpu", dtype="fp32", transformer=compressed / "comfy.safetensors")
    with pytest.raises(RequestError, match="found transformer in dfloat11; torch alone does not decode it"):
        graphs.check(pipe, "export")
    layer = pipe.transformer.layers[0].attention.to_k
    with graphs.traceable(torch.device("cpu")):
        graph = torch.export.export(layer, (torch.zeros(5, 192),), strict=False)
    with pytest.raises(RequestError, match=r"s3dit.decode_exponents.default.*of DFloat11.*s3dit convert"):
        graphs.check_operations(graph)


@pytest.mark.slow
def test_convert_gives_the_weights_back(compressed, tmp_path):
    for name in ("comfy.safetensors", "diffusers.safetensors"):
        convert(compressed / name, tmp_path / name, version="0")
        (part,) = open_model(tmp_path / name).parts.values()
        for key, tensor in embedded("transformer").items():
            assert part.entry(key).dtype == "bfloat16" and same(part.load(key), tensor), key
    convert(compressed / "text", tmp_path / "text", version="0")
    plain = open_model(tmp_path / "text").parts["text_encoder"]
    assert all(same(plain.load(key), tensor) for key, tensor in embedded("text_encoder").items())


@pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="Triton needs a GPU or its interpreter")
@pytest.mark.slow
def test_the_kernel_decodes_the_same(compressed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = open_checkpoint(compressed / "comfy.safetensors")
    layer = "layers.1.attention.to_k"
    parts = [parts_of(checkpoint, layer)[name] for name in ("weight", "codes", "gaps", "positions", "luts")]
    given = [part.to(device) for part in parts]
    assert parts[3][0] < 0, "the layer begins inside a block"
    assert same(launch_decode(*given).cpu(), decode_exponents(*parts))
    assert same(decode_exponents(*parts), embedded("transformer")[f"{layer}.weight"])


def test_all_files_of_its_folder_are_downloaded():
    files = ["config.json", "model.safetensors", *(f"model_layers_{i}.safetensors" for i in range(3)), "README.md"]
    assert wanted(files, ["text_encoder"], "org/name") == files[:-1]


HARM = {
    "no gaps": (lambda t: t.pop("gaps"), "no gaps"),
    "a byte of gaps less": (lambda t: t.update(gaps=t["gaps"][:-1]), "bytes of gaps"),
    "codes cut": (lambda t: t.update(encoded_exponent=t["encoded_exponent"][:-40]), "another number of codes"),
    "codes changed": (lambda t: t["encoded_exponent"].fill_(255), "another number of codes"),
    "a table that is none": (lambda t: t["luts"][0].fill_(240), "luts name a table 16"),
    "a code too long": (lambda t: t["luts"][-1].fill_(200), "a code of 200 bits"),
    "flat luts": (lambda t: t.update(luts=t["luts"].flatten()), "rows of 256"),
    "positions": (lambda t: t["output_positions"].fill_(7), "output_positions are not in order"),
    "positions short": (lambda t: t.update(output_positions=t["output_positions"][:4]), "output_positions"),
    "positions odd": (lambda t: t.update(output_positions=t["output_positions"][:7]), "bytes of gaps"),
    "splits": (lambda t: t["split_positions"].fill_(9), "not in order"),
    "a split less": (lambda t: t.update(split_positions=t["split_positions"][1:]), "needed 8"),
    "splits at odd places": (lambda t: t["split_positions"].add_(1), "needed a multiple of 32"),
    "int8": (lambda t: t.update(sign_mantissa=t["sign_mantissa"].view(torch.int8)), "sign_mantissa is int8"),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_damaged_is_said(harm, tmp_path):
    weights = {name: drawn(*shape) for name, shape in BLOCK.items()}
    tensors = block(weights)
    six = {leaf: tensors.pop(f"layers.0.{leaf}") for leaf in compress(list(weights.values()))}
    HARM[harm][0](six)
    save_file(tensors | {f"layers.0.{leaf}": t.contiguous() for leaf, t in six.items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=HARM[harm][1]):
        checkpoint = open_checkpoint(tmp_path / "a.safetensors")
        assert "another number" in HARM[harm][1], "only codes may be looked at so late"
        for layer in checkpoint.schemes:
            decoded(checkpoint, layer)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"threads_per_block": [256]}, r"needed \[512\] and 8"),
        ({"pattern_dict": [1]}, "no object of lists"),
        ({"pattern_dict": {"(a+)+": []}}, r"no pattern of dfloat11_config names layers\.#"),
    ],
)
def test_a_config_that_does_not_fit(config, words, tmp_path):
    save_file(block({name: drawn(*shape) for name, shape in BLOCK.items()}), tmp_path / "a.safetensors")
    config = {"threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": {}} | config
    (tmp_path / "config.json").write_text(json.dumps({"dfloat11_config": config}))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "a.safetensors")
