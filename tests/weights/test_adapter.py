"""Adapter files that are broken, hostile or of another model: one clear line each. And where alpha comes from.

What good files do to a model is in tests/runtime/test_lora.py and tests/parity/test_lora.py.
"""

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from s3dit.errors import CheckpointError
from s3dit.weights.adapter import read_adapter
from s3dit.weights.adapter_info import CONFIG, METADATA, describe
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.delta import LowRank

LAYER = "transformer.layers.0.attention.to_q"


def pair(layer=LAYER, rank=2, out=8, in_=6, dtype=torch.float32):
    return {
        f"{layer}.lora_A.weight": torch.ones(rank, in_, dtype=dtype),
        f"{layer}.lora_B.weight": torch.ones(out, rank, dtype=dtype),
    }


def write(tmp_path, tensors, metadata=None, name="adapter.safetensors"):
    save_file(tensors, tmp_path / name, metadata)
    return tmp_path / name


def with_value(value):
    tensors = pair()
    tensors[f"{LAYER}.lora_A.weight"][1, 3] = value
    return tensors


BROKEN = {
    "NaN": (with_value(float("nan")), r"to_q\.lora_A\.weight holds NaN or infinity"),
    "infinity": (with_value(float("inf")), "holds NaN or infinity"),
    "an alpha of NaN": (pair() | {f"{LAYER}.alpha": torch.tensor(float("nan"))}, r"\.alpha holds NaN"),
    "rank 0": (pair(rank=0), "of rank 0"),
    "integers": (pair(dtype=torch.int32), r"is torch\.int32; needed float32"),
    "half a pair": ({f"{LAYER}.lora_A.weight": torch.ones(2, 6)}, "has down but no up"),
    "half of a LoKr": (
        {f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2_a": torch.ones(2, 2)},
        "lokr_w2 or lokr_w2_b",
    ),
    "two kinds": (pair() | {f"{LAYER}.diff": torch.ones(8, 6)}, "is lora and diff at once"),
    "two adapters": (pair() | {f"{LAYER}.lora_A.other.weight": torch.ones(2, 6)}, "for one place"),
    "one layer twice": (pair() | pair("lora_unet_layers_0_attention_to_q"), "changes already"),
    "fused twice": (
        pair("diffusion_model.layers.0.attention.qkv", out=24) | pair("lora_unet_layers_0_attention_qkv", out=24),
        "changes already",
    ),
    "fused, and one of it": (pair() | pair("layers.0.attention.qkv", out=24), "changes already"),
    "no tensors": ({}, "holds no tensors"),
    "a model": ({"layers.0.attention.to_q.weight": torch.ones(2, 2)}, "is no adapter: .* a model goes to --model"),
    "FLUX": (pair("transformer.single_transformer_blocks.0.attn.to_q"), "is an adapter of FLUX"),
    "SDXL": (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "is an adapter of SDXL"),
    "Qwen-Image": (pair("transformer.transformer_blocks.0.img_mod.1"), "is an adapter of Qwen-Image"),
    "nobody's": (pair("a.b"), "changes no layer of Z-Image"),
    "thousands of unknown keys": (
        {f"unknown.{i}.lora_A.weight": torch.ones(1, 1) for i in range(5000)},
        "changes no layer of Z-Image .5000 tensors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_in_one_line(tmp_path, case):
    tensors, words = BROKEN[case]
    path = write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_adapter(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 600


def test_cut_short_empty_and_pickled(tmp_path):
    path = write(tmp_path, pair())
    data = path.read_bytes()
    for content, words in (
        (data[:-10], "not a whole safetensors file"),
        (data[:40], "not a whole"),
        (b"", "is empty"),
        (b"\x80\x04pickled", "never opened"),
        (b"PK\x03\x04" + data, "never opened"),
        (b"<html>", "web page"),
        (b"\xff" * 64, "neither safetensors nor GGUF"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            read_adapter(path)
    with pytest.raises(CheckpointError, match="not found"):
        read_adapter(tmp_path / "nothing.safetensors")


def test_thousands_of_unknown_keys_are_counted_quickly(tmp_path):
    unknown = {f"x.{i}.lora_A.weight": torch.ones(1, 1) for i in range(5000)} | {
        f"lora_unet_{'unet_' * 5000}{i}.alpha": torch.ones(()) for i in range(100)
    }
    path = write(tmp_path, pair() | unknown | {"nonsense": torch.ones(1)})
    start = time.process_time()
    adapter = read_adapter(path)
    assert time.process_time() - start < 5
    assert len(adapter.unmatched) == 5101 and "nonsense" in adapter.unmatched
    assert list(adapter.deltas) == ["transformer"] and list(adapter.deltas["transformer"]) == [
        "layers.0.attention.to_q"
    ]


MISSHAPEN = {
    "ranks differ": (
        {f"{LAYER}.lora_A.weight": torch.ones(2, 6), f"{LAYER}.lora_B.weight": torch.ones(8, 3)},
        r"\[8, 3\] and \[2, 6\]",
    ),
    "no matrices": (
        {f"{LAYER}.lora_A.weight": torch.ones(2), f"{LAYER}.lora_B.weight": torch.ones(2)},
        r"needed \[N, r\]",
    ),
    "norms of neither": (pair() | {f"{LAYER}.dora_scale": torch.ones(5)}, r"norms of \[5, 1\] beside"),
    "norms alone": ({f"{LAYER}.dora_scale": torch.ones(5, 1)}, "without a change"),
    "a bias too long": (pair() | {f"{LAYER}.diff_b": torch.ones(9)}, r"a bias of \[9\]"),
    "rows that three cannot share": (pair("layers.1.attention.qkv"), "a multiple of 3"),
    "columns' norms that three share": (
        pair("layers.1.attention.qkv", out=24) | {"layers.1.attention.qkv.dora_scale": torch.ones(1, 6)},
        "cannot be cut",
    ),
    "a tucker core": (pair() | {f"{LAYER}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "of a convolution"),
    "a weight of another shape first": (
        pair() | {f"{LAYER}.reshape_weight": torch.tensor([9, 6])},
        r"made \[9, 6\] first",
    ),
    "LoHa of two shapes": (
        {
            f"{LAYER}.hada_w1_a": torch.ones(8, 2),
            f"{LAYER}.hada_w1_b": torch.ones(2, 6),
            f"{LAYER}.hada_w2_a": torch.ones(8, 2),
            f"{LAYER}.hada_w2_b": torch.ones(2, 5),
        },
        "needed equal ones",
    ),
    "LoKr of vectors": ({f"{LAYER}.lokr_w1": torch.ones(2), f"{LAYER}.lokr_w2": torch.ones(2, 2)}, "two matrices"),
}


@pytest.mark.parametrize("case", MISSHAPEN)
def test_tensors_that_disagree_are_kept_by_name(tmp_path, case):
    """Not an error by itself: with partial use allowed, the rest of the file still serves."""
    tensors, words = MISSHAPEN[case]
    adapter = read_adapter(write(tmp_path, tensors | pair("layers.5.attention.to_v")))
    assert list(adapter.deltas["transformer"]) == ["layers.5.attention.to_v"]
    (said,) = adapter.misshapen
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(said)


def strength(tmp_path, tensors, metadata=None, layer="layers.0.attention.to_q", part="transformer", **options):
    """What a file of ones does, in units of its plain product."""
    delta = read_adapter(write(tmp_path, tensors, metadata, **options)).deltas[part][layer]
    ones = delta.term.shape
    return (delta.term.dense() / (2 if isinstance(delta.term, LowRank) else 1) / torch.ones(ones)).mean().item()


def header(**settings):
    return {"format": "pt", METADATA: json.dumps(settings)}


def test_where_alpha_comes_from(tmp_path):
    assert strength(tmp_path, pair()) == 1
    assert strength(tmp_path, pair() | {f"{LAYER}.alpha": torch.tensor(8.0)}) == 4
    said = {"transformer.r": 2, "transformer.lora_alpha": 6}
    assert strength(tmp_path, pair(), header(**said)) == 3
    # The tensor is nearer to the layer than the header.
    assert strength(tmp_path, pair() | {f"{LAYER}.alpha": torch.tensor(8.0)}, header(**said)) == 4
    assert strength(tmp_path, pair(), header(**said, **{"transformer.use_rslora": True})) == pytest.approx(6 / 2**0.5)
    named = said | {"transformer.alpha_pattern": {"attention.to_q": 10}}
    assert strength(tmp_path, pair(), header(**named)) == 5
    assert (
        strength(tmp_path, pair("transformer.layers.0.attention.to_k"), header(**named), "layers.0.attention.to_k") == 3
    )
    # What is said of one part says nothing of another.
    te = pair("text_encoder.layers.0.mlp.up_proj") | pair()
    assert strength(tmp_path, te, header(**said), "model.layers.0.mlp.up_proj", "text_encoder") == 1


def test_settings_beside_the_file_are_those_of_peft(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    assert strength(tmp_path, pair(f"base_model.model.{LAYER}"), name="adapter_model.safetensors") == 3
    # Another file in that folder is not what the settings are of.
    assert strength(tmp_path, pair(), name="other.safetensors") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not usable"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "not usable"),
        ('{"transformer.lora_alpha": "much"}', "alpha is 'much', needed a number"),
        ('{"transformer.lora_alpha": NaN}', "NaN is not a number of JSON"),
        ('{"transformer.lora_alpha": 1, "transformer.r": 0}', "needed one above 0"),
        ('{"transformer.lora_alpha": 1, "transformer.alpha_pattern": 3}', "alpha_pattern is 3"),
        ('{"transformer.lora_alpha": 1, "transformer.rank_pattern": {"(a+)+$": 3}}', "regular expression"),
    ],
)
def test_settings_that_are_not_usable(tmp_path, text, words):
    with pytest.raises(CheckpointError, match=words):
        read_adapter(write(tmp_path, pair(), {METADATA: text}))


def test_8_bit_floats_and_halves_are_read(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64):
        assert strength(tmp_path, {name: tensor.to(dtype) for name, tensor in pair().items()}) == 1


def test_shards_are_refused(tmp_path):
    for i in (1, 2):
        write(tmp_path, pair(f"layers.{i}.attention.to_q"), name=f"model-{i:05}-of-00002.safetensors")
    names = {n: f"model-{i:05}-of-00002.safetensors" for i in (1, 2) for n in pair(f"layers.{i}.attention.to_q")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="in shards"):
        read_adapter(tmp_path)


def test_a_weight_reshaped_to_its_own_shape_is_no_change(tmp_path):
    adapter = read_adapter(write(tmp_path, pair() | {f"{LAYER}.reshape_weight": torch.tensor([8, 6])}))
    assert not adapter.misshapen and adapter.deltas["transformer"]


def strength_said(tmp_path, metadata=None, tensors=None):
    path = write(tmp_path, tensors or pair(), metadata and {METADATA: json.dumps(metadata)})
    return float(read_adapter(path).deltas["transformer"]["layers.0.attention.to_q"].term.dense()[0, 0]) / 2


@pytest.mark.parametrize(
    ("said", "factor"),
    [
        ({"r": 2, "lora_alpha": 8}, 4.0),
        ({"r": 2}, 4.0),  # PEFT's own alpha is 8.
        ({"transformer.r": 2, "transformer.lora_alpha": 1}, 0.5),
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"r": 8, "lora_alpha": 8, "rank_pattern": {"^layers.0.attention.to_q": 2}}, 4.0),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"^layers.0.attention.to_q": 2}}, 1.0),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"^attention.to_q": 2}}, 4.0),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_q": 2}}, 1.0),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"o_q": 2}}, 4.0),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {r"layers\.\d+\.attention\.to_[qk]": 2}}, 1.0),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {".*attention.*": 2, "to_q": 4}}, 1.0),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {r"layers.(?:1|2).*": 2, "to_k|to_q": 6}}, 3.0),
    ],
)
def test_the_strength_is_what_peft_makes_of_the_header(tmp_path, said, factor):
    from peft.utils.other import get_pattern_key

    assert strength_said(tmp_path, said) == pytest.approx(factor, rel=1e-6)
    if alphas := said.get("alpha_pattern"):
        key = get_pattern_key(alphas, "layers.0.attention.to_q")
        assert factor == alphas.get(key, 8) / 2


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*x", "(?=a)b", r"(a)\1", ".*.*.*.*x", "a" * 300, "(l|l)(a|a)" * 19, "(", "a{1000}"]
)
def test_patterns_that_could_take_for_ever_are_refused_at_once(tmp_path, pattern):
    start = time.process_time()
    with pytest.raises(CheckpointError, match="alpha_pattern has"):
        strength_said(tmp_path, {"r": 2, "lora_alpha": 8, "alpha_pattern": {pattern: 2}})
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"peft_type": "OFT"}, "PEFT's OFT"),
        *(
            ({"init_lora_weights": start}, f"init_lora_weights is '{start}', which changes the model's own weights")
            for start in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "of tomorrow")
        ),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"modules_to_save": ["x"] * 1000}, "modules_to_save has 1000 names"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    ],
)
def test_settings_that_give_another_picture_are_refused(tmp_path, said, words):
    with pytest.raises(CheckpointError, match=words):
        strength_said(tmp_path, {"r": 2, "lora_alpha": 8} | said)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"layers_to_transform": [1, 2]}, "layers_to_transform is [1, 2], but every layer in the file is used"),
        ({"layers_to_transform": 0}, "layers_to_transform is 0, but"),
        ({"exclude_modules": ["to_q"]}, "exclude_modules is ['to_q'], but every layer in the file is used"),
        ({"modules_to_save": ["cap_embedder"]}, "modules_to_save names cap_embedder, of which the file holds nothing"),
        ({"invented": 1, "strength": 2}, "settings that PEFT does not know, without effect: invented, strength"),
        ({"lora_alpha": 0}, "1 of 1 layers change nothing (an alpha of 0"),
    ],
)
def test_settings_without_effect_are_noted(tmp_path, said, words):
    path = write(tmp_path, pair(), {METADATA: json.dumps({"r": 2, "lora_alpha": 8} | said)})
    (note,) = read_adapter(path).notes
    assert words in note
    if "lora_alpha" not in said:
        assert describe(open_checkpoint(path)).notes == (note,)


def test_every_setting_of_peft_is_read_inert_or_refused(tmp_path):
    """What PEFT writes by itself is nothing to speak of; a key that a newer PEFT has is met here first."""
    import peft

    for config in (peft.LoraConfig, peft.LoHaConfig, peft.LoKrConfig):
        said = {name: value for name, value in config(target_modules=["to_q"]).to_dict().items() if value != set()}
        said["target_modules"] = ["to_q"]
        for start in (True, False, "gaussian", "eva", "orthogonal", "mica"):
            said |= {"init_lora_weights": start, "fan_in_fan_out": True, "bias": "all"}
            path = write(tmp_path, pair(), {METADATA: json.dumps(said | {"peft_type": said["peft_type"].value})})
            assert read_adapter(path).notes == []


def test_modules_that_are_stored_whole_are_counted(tmp_path):
    from peft import LoraConfig

    adapter = read_adapter(peft_file(tmp_path, LoraConfig(target_modules=["to_q"], modules_to_save=["to_k"])))
    assert any("to_k.weight" in key for key in adapter.unmatched) and adapter.deltas
    assert not any("modules_to_save" in note for note in adapter.notes)
    adapter = read_adapter(peft_file(tmp_path, LoraConfig(target_modules=["to_q"], bias="all")))
    assert any("to_k.bias" in key for key in adapter.unmatched) and adapter.deltas


def test_norms_are_there_where_and_only_where_the_settings_say_so(tmp_path):
    norms = {f"{LAYER}.lora_magnitude_vector": torch.ones(8)}
    for there, said, words in (
        ({}, True, "no norms where use_dora is True"),
        (norms, False, "norms where use_dora is"),
    ):
        path = write(tmp_path, pair() | there, {METADATA: json.dumps({"r": 2, "lora_alpha": 2, "use_dora": said})})
        adapter = read_adapter(path)
        assert not adapter.deltas and words in adapter.misshapen[0]
    assert read_adapter(write(tmp_path, pair() | norms, {METADATA: '{"r": 2}'})).deltas


def test_an_alpha_in_the_header_of_kohya_is_for_people(tmp_path):
    def notes(tensors, **header):
        return read_adapter(write(tmp_path, tensors, header)).notes

    alpha = {f"{LAYER}.alpha": torch.tensor(1.0)}
    assert "ss_network_alpha is 1.0 in the header" in notes(pair(), ss_network_alpha="1.0", ss_network_dim="2")[0]
    assert strength(tmp_path, pair(), {"ss_network_alpha": "1.0", "ss_network_dim": "2"}) == 1
    assert notes(pair(), ss_network_alpha="Dynamic")
    assert not notes(pair(), ss_network_alpha="2.0") and not notes(pair() | alpha, ss_network_alpha="1.0")


def test_alphas_of_0_and_below(tmp_path):
    for value in (-4.0, -1.0):
        assert strength_said(tmp_path, None, pair() | {f"{LAYER}.alpha": torch.tensor(value)}) == value / 2
        assert strength_said(tmp_path, {"r": 2, "lora_alpha": value}) == value / 2
    zero = pair() | {f"{LAYER}.alpha": torch.tensor(0.0)}
    other = pair("layers.5.attention.to_v")
    assert strength_said(tmp_path, None, zero) == 0
    assert read_adapter(write(tmp_path, zero | other)).notes == [
        "1 of 2 layers change nothing (an alpha of 0, or factors of zeros)"
    ]
    for value in (float("inf"), -float("inf"), float("nan")):
        with pytest.raises(CheckpointError, match="alpha holds NaN or infinity"):
            read_adapter(write(tmp_path, pair() | {f"{LAYER}.alpha": torch.tensor(value)}))


def test_alpha_of_whole_factors_has_no_meaning(tmp_path):
    for alpha in (float("inf"), float("nan"), 1e30):
        tensors = {f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2": torch.ones(4, 3)}
        assert strength_said(tmp_path, None, tensors | {f"{LAYER}.alpha": torch.tensor(alpha)}) == 0.5


@pytest.mark.parametrize(("alpha", "words"), [(torch.tensor(1e30), "alpha 1e"), (torch.ones(2), r"alpha of \[2\]")])
def test_alphas_that_are_no_strength_said(tmp_path, alpha, words):
    adapter = read_adapter(write(tmp_path, pair() | {f"{LAYER}.alpha": alpha}))
    assert not adapter.deltas and words.replace("\\", "") in adapter.misshapen[0]
    assert strength_said(tmp_path, None, pair() | {f"{LAYER}.alpha": torch.tensor([1.0])}) == 0.5


def test_a_down_factor_without_dimensions(tmp_path):
    tensors = {f"{LAYER}.lora_A.weight": torch.tensor(1.0), f"{LAYER}.lora_B.weight": torch.ones(8, 2)}
    assert "down factor of []" in read_adapter(write(tmp_path, tensors)).misshapen[0]


def test_two_underscores_behind_a_prefix(tmp_path):
    assert strength_said(tmp_path, None, pair("lora_unet__layers_0_attention_to_q")) == 1


def test_describe(tmp_path):
    path = write(tmp_path, pair(), {METADATA: '{"r": 2, "lora_alpha": 8}'})
    info = describe(open_checkpoint(path))
    assert (info.kinds, info.ranks, info.alphas, info.producer, info.layers) == (("lora",), (2,), (8,), "diffusers", 1)
    assert describe(open_checkpoint(write(tmp_path, {"layers.0.attention.to_q.weight": torch.ones(2, 2)}))) is None


def peft_file(tmp_path, config):
    """What PEFT itself saves of an adapter of one layer."""
    from peft import get_peft_model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"attention": torch.nn.Module()})])
            self.layers[0]["attention"].to_q = torch.nn.Linear(8, 8)
            self.layers[0]["attention"].to_k = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.layers[0]["attention"].to_q(x)

    get_peft_model(Model(), config).save_pretrained(tmp_path)
    return tmp_path / "adapter_model.safetensors"


# Kind, PEFT's word for it, and what it must be told.
PEFT_KINDS = {
    "OFT": ("OFT", {"r": 2, "oft_block_size": 0}),
    "BOFT": ("BOFT", {"boft_block_size": 4}),
    "IA3": ("IA3", {"feedforward_modules": []}),
    "VeRA": ("Vera", {"r": 2}),
    "FourierFT": ("FourierFT", {"n_frequency": 4}),
    "HRA": ("HRA", {"r": 2}),
    "VB-LoRA": ("VBLoRA", {"num_vectors": 4, "vector_length": 4, "r": 1, "topk": 2}),
    "RandLoRA": ("RandLora", {"r": 2}),
    "AdaLoRA": ("AdaLora", {"total_step": 9}),
    "C3A": ("C3A", {"block_size": 4}),
    "DeLoRA": ("Delora", {"r": 2}),
    "GraLoRA": ("Gralora", {"r": 4}),
    "HiRA": ("Hira", {"r": 2}),
    "LN_tuning": ("LNTuning", {}),
    "MiSS": ("Miss", {"r": 4}),
    "PSOFT": ("Psoft", {"r": 4}),
    "PVeRA": ("Pvera", {"r": 2}),
    "RoAd": ("Road", {"group_size": 4}),
    "SHiRA": ("Shira", {"r": 2}),
    "TinyLoRA": ("TinyLora", {"r": 2}),
    "Uni-LoRA": ("UniLora", {"r": 2}),
    "WaveFT": ("WaveFT", {"n_frequency": 4}),
}


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_peft_kinds_that_are_not_supported_are_named(tmp_path, kind):
    import peft

    word, options = PEFT_KINDS[kind]
    if not hasattr(peft, f"{word}Config"):
        pytest.skip(f"this PEFT has no {kind}")
    path = peft_file(tmp_path, getattr(peft, f"{word}Config")(target_modules=["to_q"], **options))
    # By its keys; the file is often moved away from PEFT's settings.
    path = path.rename(tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointError, match=f": {kind}, which is not supported") as caught:
        read_adapter(path)
    assert "merge it into the model" in str(caught.value) and "--model" not in str(caught.value)


LYCORIS_KINDS = {
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"),
    "OFT": ("oft_blocks", "rescale", "alpha"),
    "IA3": ("weight", "on_input"),
    "T-LoRA": ("q_layer.weight", "p_layer.weight", "lambda_layer", "alpha"),
}


@pytest.mark.parametrize("kind", LYCORIS_KINDS)
def test_lycoris_kinds_that_are_not_supported_are_named(tmp_path, kind):
    layer = "lycoris_layers_0_attention_to_q"
    path = write(tmp_path, {f"{layer}.{leaf}": torch.ones(2, 2) for leaf in LYCORIS_KINDS[kind]})
    with pytest.raises(CheckpointError, match=f": {kind}, which is not supported"):
        read_adapter(path)
