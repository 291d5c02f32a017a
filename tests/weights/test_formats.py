"""Layers in every format that others write: decoded as their own library decodes them, multiplied, and in a model.

The writers are in `producers`: comfy-kitchen, bitsandbytes, torchao and SDNQ themselves, or a documented packing.
"""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from s3dit.errors import CheckpointError
from s3dit.kernels.scheme import Scheme
from s3dit.kernels.schemes import linear
from s3dit.model.config import TransformerConfig
from s3dit.model.layout import text_to_image
from s3dit.model.linear import Linear, swap
from s3dit.model.transformer import Transformer
from s3dit.weights.assign import assign, fitted
from s3dit.weights.checkpoint import open_checkpoint, open_stored
from s3dit.weights.formats import producer

# SDNQ would compile its few operations, for a minute.
os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
sys.path.insert(0, str(Path(__file__).parent))
from producers import FORMATS  # noqa: E402

# fp32 sums and products in another order than the library's: some ulp. SDNQ and comfy-kitchen rotate in fp32 matrices.
EXACT = 1e-6
LAYER = "layers.0.feed_forward.w1"


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def write(folder, name, layers, plain=None):
    """A file with these layers {name: weight} in a format, and plain tensors -> path, {layer: what it stands for}."""
    writer, library, config, _ = FORMATS[name]
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install 's3dit[test]'")
    tensors, metadata, expected = dict(plain or {}), {}, {}
    for layer, weight in layers.items():
        made, expected[layer], *said = writer(weight)
        tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in made.items()}
        for one in said:
            metadata |= {f"{layer}.{leaf}": text for leaf, text in one.items()}
    if name.startswith("old scaled"):
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder, expected


def parts_of(checkpoint, layer):
    return {key.rpartition(".")[2]: checkpoint.load(key) for key in checkpoint if key.startswith(f"{layer}.")}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.sampled(7)
def test_decoded_and_multiplied(name, tmp_path, monkeypatch):
    w = torch.randn(256, 384) * 0.05
    path, expected = write(tmp_path, name, {LAYER: w}, {"norm.weight": torch.ones(3).bfloat16()})
    checkpoint = open_checkpoint(path)
    scheme = checkpoint.schemes[LAYER]
    assert scheme.name == FORMATS[name][3] and list(checkpoint.schemes) == [LAYER]
    spec, parts = scheme.spec(256, 384), parts_of(checkpoint, LAYER)
    assert {part: (tuple(t.shape), t.dtype) for part, t in parts.items()} == spec
    assert {key: checkpoint.entry(key).nbytes for key in checkpoint if key.startswith(LAYER)} == {
        f"{LAYER}.{part}": tensor.nbytes for part, tensor in parts.items()
    }
    assert sorted(checkpoint) == sorted(["norm.weight", *(f"{LAYER}.{part}" for part in spec)])
    assert relative(scheme.decode(parts), expected[LAYER]) < EXACT
    # cut by rows, as fused layers are
    cut = {part: tensor[64:128] if len(tensor) != 1 else tensor for part, tensor in parts.items()}
    assert torch.equal(scheme.decode(cut), scheme.decode(parts)[64:128]) or "up" in parts
    assert relative(scheme.decode(cut), expected[LAYER][64:128]) < EXACT
    monkeypatch.setattr("s3dit.kernels.scheme.WEIGHT_CHUNK", 384 * 100)
    for wide, bound in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        x, bias = torch.randn(2, 9, 384).to(wide), torch.randn(256)
        exact = F.linear(x.double(), expected[LAYER], bias.double())
        # bf16: weight, rotated x and result are rounded once each, half a unit in the last of 8 bits
        for out in (linear(x, scheme, parts, bias), scheme.linear.reference(x, parts, bias)):
            assert out.dtype == wide and relative(out, exact) < bound
    # compressed: the parts take what their bits say, and not a float more
    assert sum(t.nbytes for key, t in parts.items() if key != "rotation") < 256 * 384 * 1.3


CONFIG = TransformerConfig.from_json(
    {
        "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 384, "n_layers": 2,
        "n_refiner_layers": 1, "n_heads": 12, "n_kv_heads": 12, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 32,
        "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 12, 12],
    },
    "test",
)  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    """Weights of a small transformer, by official names, and which layers of it are quantized."""
    torch.manual_seed(1)
    model = Transformer(CONFIG)
    tensors = {}
    for name, tensor in model.state_dict().items():
        scale = 1.0 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
        tensors[name] = scale * torch.randn_like(tensor) + (
            1.0 if name.endswith(("norm1.weight", "norm2.weight")) else 0
        )
    linears = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    return tensors, [name for name in linears if name.startswith("layers.") and "adaLN" not in name]


def velocity(path, schemes=True, config=CONFIG):
    """What the transformer in a folder gives, in fp32, for one small picture."""
    torch.manual_seed(2)
    stored = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(config)
        checkpoint = fitted(stored, model.state_dict())
        for name, scheme in checkpoint.schemes.items():
            swap(model, scheme, name.__eq__)
    assert bool(checkpoint.schemes) == schemes
    assign(model, checkpoint, dtype=torch.float32)
    layout = text_to_image([(5, 7)], [9])
    context = model.context(layout, torch.randn(9, config.cap_feat_dim))
    with torch.no_grad():
        return model(torch.randn(35, 64), torch.tensor([0.3]), context)


def check_velocity(tmp_path, tensors, path, expected, rename=lambda name: [name]):
    """Against the model with plain weights of the same value."""
    wide = tmp_path / "plain"
    wide.mkdir()
    for layer, weight in expected.items():
        names = rename(layer)
        tensors |= {f"{name}.weight": run.float() for name, run in zip(names, weight.chunk(len(names)), strict=True)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, wide / "model.safetensors")
    # fp32 through two blocks: sums in another order
    assert relative(velocity(path), velocity(wide, schemes=False)) < 1e-5


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("sdnq") or "4" in name])
@pytest.mark.sampled(5)
def test_velocity_is_that_of_the_plain_weights(name, plain, tmp_path):
    tensors, layers = plain
    rest = {key: tensor for key, tensor in tensors.items() if key.removesuffix(".weight") not in layers}
    path, expected = write(tmp_path, name, {layer: tensors[f"{layer}.weight"] for layer in layers}, rest)
    check_velocity(tmp_path, dict(tensors), path, expected)


@pytest.mark.parametrize("kind", ["int4", "fp4"])
@pytest.mark.slow
def test_velocity_of_nunchaku_with_its_own_names(kind, plain, tmp_path):
    """to_qkv is q, k, v; net.0.proj is w3, w1; net.2 is w2."""
    tensors, layers = plain
    fused = {"attention.to_qkv": ["attention.to_q", "attention.to_k", "attention.to_v"],
             "attention.to_out.0": ["attention.to_out.0"], "feed_forward.net.2": ["feed_forward.w2"],
             "feed_forward.net.0.proj": ["feed_forward.w3", "feed_forward.w1"]}  # fmt: skip
    rest = {key: tensor for key, tensor in tensors.items() if key.removesuffix(".weight") not in layers}
    weights, names = {}, {}
    for block in ("layers.0", "layers.1"):
        for name, own in fused.items():
            names[f"{block}.{name}"] = [f"{block}.{one}" for one in own]
            weights[f"{block}.{name}"] = torch.cat([tensors[f"{block}.{one}.weight"] for one in own])
    path, expected = write(tmp_path, f"nunchaku_lite {kind}", weights, rest)
    check_velocity(tmp_path, dict(tensors), path, expected, names.__getitem__)


def test_comfy_formats_in_metadata_and_mixed(tmp_path):
    """As in qwen_3_4b_fp4_mixed: nvfp4 and fp8 layers, a plain one, an fp8 embedding and norm, said by the header."""
    pytest.importorskip("comfy_kitchen")
    w = torch.randn(48, 128)
    four, exact4 = FORMATS["comfy nvfp4"][0](w)
    eight, exact8 = FORMATS["comfy float8_e4m3fn"][0](w)
    tensors = {f"model.a.{leaf}": t for leaf, t in four.items()} | {f"model.b.{leaf}": t for leaf, t in eight.items()}
    said = {layer: json.loads(bytes(tensors.pop(f"model.{layer}.comfy_quant").tolist())) for layer in "ab"}
    tensors |= {
        "model.a.input_scale": torch.ones(()), "model.a.bias": torch.ones(48).bfloat16(),
        "model.a.pre_quant_scale": torch.rand(128).add(0.5).bfloat16(), "model.c.weight": w.bfloat16(),
        "model.embed_tokens.weight": w.to(torch.float8_e4m3fn), "model.norm.weight": w[0].to(torch.float8_e5m2),
        "x_pad_token": w[:1].to(torch.float8_e4m3fn),
    }  # fmt: skip
    # Two numbers of a nvfp4 layer may be stored as plain bytes.
    tensors["model.a.weight_scale"] = tensors["model.a.weight_scale"].view(torch.uint8)
    metadata = {"_quantization_metadata": json.dumps({"layers": {f"model.{key}": one for key, one in said.items()}})}
    path = tmp_path / "some.safetensors"
    save_file(tensors, path, metadata)
    checkpoint = open_checkpoint(path)
    assert {name: scheme.name for name, scheme in checkpoint.schemes.items()} == {
        "model.a": "nvfp4", "model.b": "fp8-weights", "model.embed_tokens": "fp8-weights",
    }  # fmt: skip
    parts = parts_of(checkpoint, "model.a")
    assert relative(parts.pop("bias"), torch.ones(48)) == 0
    decoded = checkpoint.schemes["model.a"].decode(parts)
    assert relative(decoded, exact4 * tensors["model.a.pre_quant_scale"].double()) < EXACT
    assert relative(checkpoint.schemes["model.b"].decode(parts_of(checkpoint, "model.b")), exact8) < EXACT
    for name in ("model.norm.weight", "x_pad_token"):
        assert checkpoint.entry(name).dtype == "bfloat16" and checkpoint.entry(name).shape == tensors[name].shape
        assert torch.equal(checkpoint.load(name).float(), tensors[name].float())
    ids = torch.tensor([3, 3, 47])
    assert torch.equal(
        checkpoint.rows("model.embed_tokens.weight", ids), tensors["model.embed_tokens.weight"].float()[ids]
    )
    assert torch.equal(checkpoint.load("model.c.weight"), tensors["model.c.weight"])


def harmed(tensors, metadata, harm):
    """The tensors of a layer, one of them changed by (leaf, function), and the metadata."""
    leaf, change = harm
    if leaf is None:
        return change(tensors, metadata)
    tensors[leaf] = change(tensors[leaf])
    return tensors, metadata


def json_of(**said):
    return lambda tensor: torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def without(leaf):
    return None, lambda tensors, metadata: ({key: t for key, t in tensors.items() if key != leaf}, metadata)


def nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1:] = float("nan")
    return tensor


BROKEN = [
    ("comfy nvfp4", ("weight_scale", lambda t: t[:-1]), r"weight_scale is \[255, 24\]; needed \[256, 24\]"),
    ("comfy nvfp4", without("weight_scale_2"), "no weight_scale_2; needed one beside its weight"),
    ("comfy nvfp4", ("weight", lambda t: t.view(torch.int8)), "weight is int8; needed uint8"),
    ("comfy nvfp4", ("weight_scale", lambda t: nan(t.float()).to(t.dtype)), "scale holds NaN"),
    ("comfy nvfp4", ("comfy_quant", json_of(format="nvfp5")), "its format is 'nvfp5'; needed one of float8_e4m3fn"),
    ("comfy nvfp4", ("comfy_quant", lambda t: t[:-1]), "comfy_quant is not JSON"),
    ("comfy nvfp4", ("comfy_quant", json_of(format="int8_tensorwise")), "weight is uint8; needed int8"),
    ("comfy mxfp8", ("weight", lambda t: t[:, :-16]), "has 368 columns; needed a multiple of 32"),
    ("comfy mxfp8", ("weight_scale", lambda t: t[:, :-1]), "weight_scale is"),
    ("comfy int8 convrot", ("comfy_quant", json_of(format="int8_tensorwise", convrot=True, convrot_groupsize=48)),
     "48 inputs at a time; needed a power of two"),
    ("comfy int8 convrot", ("comfy_quant", json_of(format="int8_tensorwise", convrot=True)),
     "multiple of 256, found 384"),
    ("comfy asym_w4a8_int8", ("weight_s_rel", lambda t: t[:, :-1].contiguous()), "needed 4 bits"),
    ("comfy awq_w4a16", ("weight_zeros", lambda t: t.T.contiguous()), r"needed \[6, 256\]"),
    ("old scaled e4m3", ("scale_weight", nan), "scale holds NaN or infinity"),
    ("e4m3 cast", ("weight", lambda t: nan(t.float()).to(t.dtype)), "weight holds NaN or infinity"),
    ("e5m2 cast", ("weight", lambda t: (t.float() * 1e9).to(t.dtype)), "weight holds NaN or infinity"),
    ("fp8 blocks", ("weight_scale_inv", lambda t: t[:1]), r"weight_scale_inv is \[1, 3\]; needed \[2, 3\]"),
    ("int8 rows", ("weight_scale", lambda t: t[1:]), r"weight_scale is \[255\]; needed"),
    ("int8 rows", without("weight_scale"), "1 weights are in no number format that is known, the first is layers.0"),
    ("bnb nf4", ("weight.absmax", lambda t: t[1:]), r"absmax is \[1535\]; needed \[1536\]"),
    ("bnb nf4", ("weight.quant_state.bitsandbytes__nf4", lambda t: t[1:]), "is not what bitsandbytes writes"),
    ("bnb nf4 nested", without("weight.nested_absmax"), "no weight.nested_absmax"),
    ("bnb nf4", ("weight.quant_state.bitsandbytes__nf4", json_of(shape=[384, 256], blocksize=48)), "do not end with"),
    ("torchao int8", (None, lambda tensors, metadata: (tensors, {})), "the metadata does not describe"),
    ("torchao int8", (None, lambda tensors, metadata: (tensors, {"weight": '{"_type": "Int4Tensor", "_data": {}}'})),
     "torchao's Int4Tensor; needed Float8Tensor or Int8Tensor"),
    ("torchao int8", ("_weight_scale", lambda t: t[1:]), "_weight_scale is"),
    ("sdnq uint4", ("weight", lambda t: t[:-1]), "which are not 256 rows"),
    ("sdnq uint4", ("zero_point", lambda t: t[:, :1].contiguous()), "zero_point is"),
    ("sdnq uint4 use_svd", ("svd_down", lambda t: t[:, 1:].contiguous()), "svd_down is"),
    ("sdnq uint4", (None, lambda tensors, metadata: (tensors, None)), "no number format that is known"),
    ("nunchaku_lite int4", ("qweight", lambda t: t[:100]), "stands for 100 x 384; needed multiples of 128"),
    ("nunchaku_lite int4", ("wscales", lambda t: t[1:]), r"wscales is \[5, 256\]; needed \[6, 256\]"),
    ("nunchaku_lite int4", without("smooth_factor"), "no smooth_factor"),
    ("nunchaku_lite int4", ("smooth_factor", lambda t: 0 * t), "column holds NaN or infinity"),
    ("nunchaku_lite fp4", ("proj_up", lambda t: t[:, :16].contiguous()), "proj_up is"),
    ("nunchaku_lite fp4", (None, lambda tensors, metadata: (tensors | {"wzeros": torch.ones(1)}, metadata)),
     "AWQ layers"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "harm", "words"), BROKEN, ids=[f"{name}: {words[:30]}" for name, _, words in BROKEN])
def test_what_is_broken_is_said(name, harm, words, tmp_path):
    writer, library, config, _ = FORMATS[name]
    if library:
        pytest.importorskip(library)
    made, _, *said = writer(torch.randn(256, 384))
    tensors, metadata = harmed(made, said[0] if said else {}, harm)
    path = tmp_path / "model.safetensors"
    save_file(
        {f"{LAYER}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}, path,
        {f"{LAYER}.{leaf}": text for leaf, text in (metadata or {}).items()},
    )  # fmt: skip
    if config is not None and metadata is not None:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(CheckpointError, match=words):
        checkpoint = open_checkpoint(path)
        assert "NaN" in words, "only numbers may be looked at so late"
        parts_of(checkpoint, LAYER)


def test_a_format_that_is_only_read_encodes_nothing(tmp_path):
    from s3dit.kernels.grouped import Form, grouped
    from s3dit.weights.assign import encode_weight

    save_file({"a.weight": torch.ones(2, 16)}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    scheme = grouped("nvfp4", Form("uint8", 16))
    assert isinstance(scheme, Scheme) and grouped("nvfp4", Form("uint8", 16)) is scheme
    with pytest.raises(CheckpointError, match="a.weight is a plain float; nvfp4 is only read"):
        encode_weight(scheme, checkpoint.load("a.weight"), "a.weight", checkpoint)


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("AWQ", {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}),
        ("GPTQ", {"qweight": torch.int32, "qzeros": torch.int32, "g_idx": torch.int32}),
        ("compressed-tensors", {"weight_packed": torch.int32, "weight_scale": torch.bfloat16}),
        ("NVFP4", {"weight": torch.uint8, "weight_scale": torch.float8_e4m3fn, "weight_scale_2": torch.float32}),
        ("NVFP4", {"weight": torch.uint8, "weight_scale": torch.float8_e4m3fn, "weight_global_scale": torch.float32}),
        ("quanto", {"weight._data": torch.int8, "weight._scale": torch.bfloat16}),
        ("quanto", {"weight._data._data": torch.uint8, "weight._scale": torch.bfloat16, "input_scale": torch.bfloat16}),
        ("EntroPack", {"weight._entropack.header": torch.uint8, "weight._entropack.buffers.gaps": torch.uint8}),
        (
            "EntroPack",
            {"weight._entropack.buffers.sign_mantissa": torch.uint8, "weight._entropack.weight_scale": torch.float32},
        ),
        ("HQQ", {"W_q": torch.uint8, "scale": torch.bfloat16, "zero": torch.bfloat16, "nbits": torch.int32}),
        ("AQLM", {"codes": torch.int8, "codebooks": torch.bfloat16, "scales": torch.bfloat16}),
        ("ModelOpt", {"weight": torch.int8, "weight_quantizer._scale": torch.float32}),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, name, leaves):
    tensors = {f"layers.0.attention.to_q.{leaf}": torch.zeros(4, 4).to(dtype) for leaf, dtype in leaves.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}.* does not read") as caught:
        open_checkpoint(tmp_path / "model.safetensors")
    assert "--quantize int4" in str(caught.value) and "download" not in str(caught.value)


def test_json_in_a_tensor_of_two_dimensions(tmp_path):
    text = b'{"format": "float8_e4m3fn"}'
    said = torch.tensor(list(text + b" " * (-len(text) % 4)), dtype=torch.uint8)
    tensors = {"x.weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "x.weight_scale": torch.tensor(1.0)}
    for shape in ((-1,), (2, -1)):
        save_file(tensors | {"x.comfy_quant": said.reshape(shape)}, tmp_path / "model.safetensors")
        assert list(open_checkpoint(tmp_path / "model.safetensors").schemes) == ["x"]


def test_who_quantized(tmp_path):
    for leaf, name in (("comfy_quant", "ComfyUI (comfy_quant)"), ("SCB", "bitsandbytes"), ("wscales", "nunchaku")):
        save_file({f"x.{leaf}": torch.zeros(2)}, tmp_path / "model.safetensors")
        assert producer(open_stored(tmp_path / "model.safetensors")) == name


@pytest.mark.parametrize("width", [100, 104, 120])
@pytest.mark.parametrize(("layout", "kind"), [("TensorCoreMXFP8Layout", "mxfp8"), ("TensorCoreNVFP4Layout", "nvfp4")])
def test_padding_is_cut_off_where_the_true_shape_is_said(tmp_path, layout, kind, width):
    """Padded rows and columns are zeros that comfy-kitchen added; what is left are its own numbers, exactly."""
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    layout = getattr(tensor, layout)
    weight = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    codes, params = layout.quantize(weight)
    said = json.dumps({"format": kind, "orig_shape": [50, width]}).encode()
    tensors = {f"x.weight{end}": value.contiguous() for end, value in layout.state_dict_tensors(codes, params).items()}
    tensors["x.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.entry("x.weight").shape == (50, width)
    got, wanted = checkpoint.load("x.weight"), layout.dequantize(codes, params)[:50, :width]
    # The scale of nvfp4 is of three factors, whose order of multiplication rounds differently.
    assert relative(got, wanted) <= (0 if kind == "mxfp8" else 2**-22)
    tensors["x.comfy_quant"] = torch.tensor(list(said.replace(b"50,", b"999,")), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="orig_shape is"):
        open_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("layout", "kind"), [("TensorCoreMXFP8Layout", "mxfp8"), ("TensorCoreNVFP4Layout", "nvfp4")])
def test_padding_is_cut_off_where_only_the_model_knows_the_shape(plain, tmp_path, layout, kind):
    """Beside a layer of the same format without padding, which stays compressed."""
    layout = getattr(pytest.importorskip("comfy_kitchen.tensor"), layout)
    config = replace(CONFIG, cap_feat_dim=100)
    tensors = dict(plain[0]) | {"cap_embedder.0.weight": torch.ones(100)}
    tensors["cap_embedder.1.weight"] = torch.randn(384, 100) / 10
    wide = dict(tensors)
    for layer in ("cap_embedder.1", LAYER):
        weight = tensors.pop(f"{layer}.weight")
        codes, params = layout.quantize(weight)
        rows, columns = weight.shape
        wide[f"{layer}.weight"] = layout.dequantize(codes, params)[:rows, :columns].float()
        for end, value in layout.state_dict_tensors(codes, params).items():
            tensors[f"{layer}.weight{end}"] = value
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(f'{{"format": "{kind}"}}'.encode()), dtype=torch.uint8)
    for name, values in (("packed", tensors), ("wide", wide)):
        (tmp_path / name).mkdir()
        save_file({key: value.contiguous() for key, value in values.items()}, tmp_path / name / "model.safetensors")
    found = velocity(tmp_path / "packed", config=config)
    assert relative(found, velocity(tmp_path / "wide", schemes=False, config=config)) < 1e-5
    # Too much for padding is another model.
    for width in (64, 128 - 32):
        with pytest.raises(CheckpointError, match="not the weights of this model"):
            velocity(tmp_path / "packed", config=replace(config, cap_feat_dim=width))
