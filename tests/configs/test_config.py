"""What the JSON files of a model say is read, refused by name, noted, or known to be without effect."""

import json
import os
import shutil
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.cli.convert_model import convert
from s3dit.configs import config_keys, tokenizer_config
from s3dit.configs.model_files import KINDS, read_index, read_json, read_own
from s3dit.errors import CheckpointError, RequestError
from s3dit.model.config import SchedulerConfig, VisionConfig, VisionInputConfig, variant_of
from s3dit.model.controlnet import ControlNet, open_controlnet
from s3dit.model.controlnet_config import ControlNetConfig
from s3dit.request import Request
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import compose, read_model
from s3dit.runtime.sources import open_sources

VISION = {
    "model_type": "siglip2_vision_model", "hidden_act": "gelu_pytorch_tanh", "hidden_size": 48, "num_channels": 3,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 16, "num_patches": 64,
    "layer_norm_eps": 1e-6,
}  # fmt: skip
VISION_INPUT = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2, "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": 16, "max_num_patches": 256,
}  # fmt: skip
# The reader of each file, and a file of its kind.
FILES = {
    **{part: (kind, json.loads((EMBEDDED / part / "config.json").read_text())) for part, kind in KINDS.items()},
    "scheduler": (SchedulerConfig, json.loads((EMBEDDED / "scheduler" / "scheduler_config.json").read_text())),
    "siglip": (VisionConfig, VISION),
    "siglip_processor": (VisionInputConfig, VISION_INPUT),
}
PATHS = {
    "scheduler": "scheduler/scheduler_config.json",
    **{part: f"{part}/config.json" for part in KINDS},
}


def each(table):
    return [(name, key) for name, (kind, _) in FILES.items() for key in table(kind)]


def refused(name, change, words):
    kind, data = FILES[name]
    with pytest.raises(CheckpointError, match=words) as error:
        kind.from_json(data | change, "FILE")
    text = str(error.value)
    assert text.startswith("FILE: ") and "needed" in text or "runs" in text
    assert len(text) < 600 and "\n" not in text


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    return tmp_path / "model"


def write(folder, name, change, without=()):
    path = folder / PATHS.get(name, name)
    data = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(data | change))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_nothing_in_these_files_is_unknown(name):
    kind, data = FILES[name]
    assert kind.from_json(data, "FILE") and kind.note_unknown(data, "FILE") == []


@pytest.mark.parametrize("name, key", each(lambda kind: kind.keys.runs))
def test_what_is_not_run_is_refused_by_name(name, key):
    kind, data = FILES[name]
    values = kind.keys.runs[key]
    for other in ("another", 7, [7], {"a": 1}, *[not value for value in values if isinstance(value, bool)]):
        refused(name, {key: other}, f"{key} is ")
    for value in values:
        if key != "time_shift_type" and key != "resample":
            assert kind.from_json(data | {key: value}, "FILE") == kind.from_json(data, "FILE")


@pytest.mark.parametrize(
    "name, key", each(lambda kind: [key for reason, keys in kind.keys.inert.items() if "is checked" not in reason
                                    and "read as" not in reason for key in keys])
)  # fmt: skip
def test_what_cannot_matter_changes_nothing(name, key):
    kind, data = FILES[name]
    for value in (None, True, "x", [1, 2], 10**9):
        changed = data | {key: value}
        assert kind.from_json(changed, "FILE") == kind.from_json(data, "FILE") and not kind.note_unknown(
            changed, "FILE"
        )


@pytest.mark.parametrize("name", FILES)
def test_no_key_stands_in_two_tables(name):
    keys = FILES[name][0].keys
    inert = [key for names in keys.inert.values() for key in names]
    assert len(inert) == len(set(inert)) and not set(inert) & set(keys.runs)


def test_an_unknown_key_is_noted(copy):
    for name in PATHS:
        write(copy, name, {"use_magic": 3})
    notes = open_sources(copy, {}, None).notes
    assert len(notes) == len(PATHS) and all("use_magic" in note for note in notes)


NUMBERS = [(name, field.name) for name, (kind, _) in FILES.items() for field in fields(kind)
           if field.type in (int, float)]  # fmt: skip


@pytest.mark.parametrize("name, key", NUMBERS)
def test_numbers_are_numbers(name, key):
    for value in (True, "3", None, [3], {}, float("nan"), float("inf"), -float("inf"), 10**400, 2**70):
        refused(name, {key: value}, f"{key} is ")
    if key not in ("shift_factor", "base_shift", "max_shift"):
        for value in (0, -1, -1e-3):
            refused(name, {key: value}, f"{key} is ")


@pytest.mark.parametrize("name, key", [("siglip_processor", "image_std"), ("siglip_processor", "image_mean"),
                                       ("transformer", "axes_dims"), ("vae", "block_out_channels")])  # fmt: skip
def test_lists_are_lists_of_numbers(name, key):
    for value in (3, "abc", [], [True, True, True], ["8", "12", "12"], [8, None, 12], [[8], [12], [12]], {"0": 8}):
        refused(name, {key: value}, f"{key} is ")
    if key != "image_mean":
        refused(name, {key: [0, 0, 0]}, f"{key} is 0")


@pytest.mark.parametrize("name, key", [("transformer", "n_layers"), ("transformer", "n_refiner_layers"),
                                       ("text_encoder", "num_hidden_layers"), ("siglip", "num_hidden_layers"),
                                       ("vae", "layers_per_block")])  # fmt: skip
def test_layers_are_bounded_before_they_are_built(name, key):
    """2^20 modules take minutes and gigabytes; no published model has over 100 layers."""
    for count in (129, 1 << 20, 10**9):
        refused(name, {key: count}, f"{key} is {count}")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("transformer", {"axes_dims": [16, 16]}, "needed three even axes_dims"),
        ("transformer", {"axes_dims": [7, 13, 12]}, "needed three even axes_dims"),
        ("transformer", {"axes_dims": [8, 12, 6, 6]}, "needed three even axes_dims"),
        ("transformer", {"n_kv_heads": 3}, "n_heads 6, n_kv_heads 3"),
        ("text_encoder", {"num_key_value_heads": 3}, "4 heads of 32 share 3"),
        ("text_encoder", {"head_dim": 31}, "an even head_dim"),
        ("text_encoder", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn"),
        ("text_encoder", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling is .*linear"),
        ("text_encoder", {"rope_scaling": [4]}, "rope_scaling is"),
        ("text_encoder", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters is .*dynamic"),
        ("text_encoder", {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, "rope_parameters is"),
        ("text_encoder", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "full_attention"),
        ("text_encoder", {"layer_types": ["sliding_attention"] * 3}, "full_attention"),
        ("text_encoder", {"layer_types": ["full_attention"] * 2}, "full_attention"),
        ("text_encoder", {"layer_types": "full_attention"}, "full_attention"),
        ("text_encoder", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": "2"}, "max_window"),
        ("vae", {"norm_num_groups": 7}, "groups that divide every width"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types is"),
        ("vae", {"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types is"),
        ("siglip", {"num_attention_heads": 5}, "a width that the heads divide"),
        ("siglip", {"num_patches": 63}, "a square of positions"),
        ("siglip_processor", {"image_mean": [0.5]}, "three numbers each"),
        ("siglip_processor", {"max_num_patches": 1 << 15}, "max_num_patches is"),
        ("scheduler", {"base_image_seq_len": 256, "max_image_seq_len": 256}, "two sizes"),
        ("scheduler", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "at most one"),
    ],
)
def test_values_that_do_not_go_together(name, change, words):
    refused(name, change, words)


@pytest.mark.parametrize(
    "change, theta",
    [
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_scaling": {"rope_theta": 4e5, "type": "default"}, "rope_parameters": {"rope_theta": 5e5}}, 4e5),
        ({"rope_scaling": {"rope_type": "default"}}, 1e6),
        ({"rope_parameters": {}}, 1e6),
    ],
)
def test_the_base_of_the_rotation(change, theta):
    """As transformers 5 takes it: out of the dict where it stands there, whatever stands beside it."""
    kind, data = FILES["text_encoder"]
    assert kind.from_json(data | change, "FILE").rope_theta == theta


@pytest.mark.parametrize(
    "change",
    [
        # A window above the features, or none, changes nothing.
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0},
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ],
)
def test_windows_that_no_feature_sees(change):
    kind, data = FILES["text_encoder"]
    assert kind.from_json(data | change, "FILE") == kind.from_json(data, "FILE")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        "[1]",
        "",
        '{"a": 1e',
        "nul",
        '{"a": ' + "9" * 5000 + "}",
        '{"a": NaN}',
        '{"a": [{"b": -Infinity}]}',
        '{"a": 1e999}',
    ],
)
def test_json_that_is_none(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match="x.json"):
        read_json(tmp_path / "x.json")


# --- what belongs to a whole directory ---


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "FluxPipeline"}, {"_class_name": ["pipeline", "Mine"]}, {"_class_name": 3},
        {"transformer": ["diffusers", "FluxTransformer2DModel"]}, {"text_encoder": ["transformers", "Qwen2Model"]},
        {"vae": ["diffusers", "AutoencoderTiny"]}, {"tokenizer": ["transformers", "T5Tokenizer"]},
        {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}, {"vae": 5}, {"vae": {}},
    ],
)  # fmt: skip
def test_classes_that_are_not_built_here(copy, change):
    write(copy, "model_index.json", change)
    with pytest.raises(CheckpointError, match=f"{next(iter(change))} is .*this engine runs"):
        open_sources(copy, {}, None)


def test_an_index(copy):
    """Other pipelines of Z-Image, and text encoders with a head, are the same parts; more parts are noted."""
    write(copy, "model_index.json", {"_class_name": "ZImageImg2ImgPipeline", "text_encoder": ["transformers",
                                     "Qwen3ForCausalLM"], "controlnet": ["diffusers", "ZImageControlNetModel"],
                                     "vae": [None, None], "image_encoder": [None, None]})  # fmt: skip
    (note,) = read_index(copy)
    assert "components without effect here: 'controlnet'" in note
    # What is put in the place of a part is not the directory's.
    write(copy, "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]})
    assert open_sources(copy, {"vae": EMBEDDED / "vae"}, None).notes == (note,)
    (copy / "model_index.json").unlink()
    assert read_index(copy) == []


def test_a_part_out_of_another_model(copy):
    """Of a directory that gives one part nothing else is read: FLUX.1's VAE is Z-Image's."""
    write(copy, "model_index.json", {"_class_name": "FluxPipeline"})
    write(copy, "scheduler", {"_class_name": "HeunDiscreteScheduler"})
    (copy / "transformer" / "config.json").write_text("{}")
    sources = open_sources("embedded", {"vae": copy}, None)
    assert sources.mixed == ("vae",) and sources.notes == ()
    shutil.rmtree(copy / "vae")
    with pytest.raises(CheckpointError, match="holds transformer, where vae was needed"):
        open_sources("embedded", {"vae": copy}, None)


@pytest.mark.parametrize(
    "own",
    [
        {"words": 5}, {"words": ["a", 3]}, {"words": "abc"}, {"variant": [1]}, {"variant": "huge"}, {"variant": None},
        {"num_inference_steps": "x"}, {"num_inference_steps": 0}, {"num_inference_steps": True},
        {"num_inference_steps": 2.0}, {"num_inference_steps": 10**9}, {"guidance_scale": "4"},
        {"guidance_scale": -1}, {"guidance_scale": float("nan")}, {"guidance_scale": 1e400}, {"height": 100},
        {"width": 0}, {"width": 16384}, {"height": 128.0}, {"note": 3}, {"note": "x" * 10_000}, {"prompt": []},
        {"prompt": {}}, {"steps": 3}, {"": 1},
    ],
)  # fmt: skip
def test_what_a_directory_says_of_itself(copy, own):
    write(copy, "s3dit.json", own)
    with pytest.raises(CheckpointError, match="s3dit.json: .* needed"):
        Pipeline.load(copy, device="cpu")


def test_every_field_of_s3dit_json_is_read(copy):
    own = {"variant": "base", "height": 64, "width": 96, "num_inference_steps": 3, "guidance_scale": 2,
           "prompt": "a", "note": "b", "words": ["c"]}  # fmt: skip
    assert set(own) == set(config_keys.OWN)
    (copy / "s3dit.json").write_text(json.dumps(own))
    config = Pipeline.load(copy, device="cpu").config
    settings = config.settings
    assert (config.variant, config.prompt, config.note, config.words) == ("base", "a", "b", {"c"})
    assert (settings.height, settings.width, settings.num_inference_steps, settings.guidance_scale) == (64, 96, 3, 2)
    assert read_own(copy.parent) == {}


@pytest.mark.parametrize("shift, variant", [(3.0, "turbo"), (3, "turbo"), (6.0, "base"), (3.05, None), (1.0, None)])
def test_the_variant_is_told_from_an_exact_shift(copy, shift, variant):
    """Of a shift that somebody chose nothing follows: 28 guided steps would burn a distilled model's picture."""
    (copy / "s3dit.json").unlink()
    sources = open_sources(write(copy, "scheduler", {"shift": shift}), {}, None)
    assert variant_of(sources.config.transformer, sources.config.scheduler) == variant
    assert sources.config.variant == (variant or "turbo") and sources.config.scheduler.shift == shift
    assert bool(sources.notes) == (variant is None)
    if variant is None:
        assert "--steps 28 --guidance 4" in sources.notes[0] and '{"variant": "base"}' in sources.notes[0]
        (copy / "s3dit.json").write_text('{"variant": "base"}')
        again = open_sources(copy, {}, None)
        assert again.config.variant == "base" and again.notes == ()


@pytest.mark.parametrize("channels", [(16, 32, 64), (16, 32, 32, 64, 64)])
def test_a_vae_of_other_cells(channels):
    """A cell of 4 or 16 pixels would be taken for one of 8."""
    model = read_model(EMBEDDED)
    vae = replace(model.vae, block_out_channels=channels)
    configs = {"transformer": model.transformer, "text_encoder": model.text_encoder, "vae": vae}
    with pytest.raises(CheckpointError, match="needed .*4 levels"):
        compose(configs, model.scheduler, {}, EMBEDDED)


# --- layers ---


def cut(folder, stem, source=EMBEDDED / "text_encoder"):
    """The text encoder without the tensors of a stem, in one file."""
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(stem)}, folder)
    return folder


@pytest.mark.parametrize("stem", ["model.layers.2.", "model.layers.1.", "model.layers.0.", "model.layers."])
def test_a_text_encoder_with_fewer_layers_than_its_config(copy, stem):
    """The last layer is never read, and yet counts: the features are the output of the last but one."""
    cut(copy / "text_encoder" / "model.safetensors", stem)
    with pytest.raises(CheckpointError, match="text_encoder"):
        Pipeline.load(copy, device="cpu")


@pytest.mark.parametrize("count", [2, 4, 5, 128])
def test_a_config_of_another_number_of_layers(copy, count):
    write(copy, "text_encoder", {"num_hidden_layers": count})
    with pytest.raises(CheckpointError, match=f"has 3 layers, its config.json says {count}"):
        Pipeline.load(copy, device="cpu")


def test_a_file_without_its_last_layer(tmp_path):
    """Put into a model of the same widths it is read as what that has, and draws the same; of fewer it is refused."""
    whole = Pipeline.load(device="cpu", dtype="fp32")
    file = cut(tmp_path / "a.safetensors", "model.layers.2.")
    part = Pipeline.load("embedded", text_encoder=file, device="cpu", dtype="fp32")
    assert part.config.text_encoder == whole.config.text_encoder
    assert any("has 2 layers, read as the first of 3" in note for note in part.plan(prompt="a star").notes)
    options = {"prompt": "a red star", "seed": 1, "num_inference_steps": 1, "output_type": "latent"}
    assert torch.equal(part(**options).latents[0], whole(**options).latents[0])
    with pytest.raises(CheckpointError, match="has 1 layers, the model of its widths has 3; perhaps"):
        cut(tmp_path / "b.safetensors", ("model.layers.1.", "model.layers.2."))
        open_sources("embedded", {"text_encoder": tmp_path / "b.safetensors"}, None)


def gguf_of(path, tensors, **fields):
    """A llama.cpp file of a text encoder, by gguf-py; the widths are the embedded model's."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "qwen3")
    for key, value in fields.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        writer.add_tensor(llama_name(name), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_name(name):
    for official, short in (
        ("model.layers.", "blk."), ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("input_layernorm", "attn_norm"), ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"), ("_proj", ""), ("mlp.", "ffn_"),
    ):  # fmt: skip
        name = name.replace(official, short)
    return name


def test_a_gguf_whose_header_says_more_layers(tmp_path):
    """The first file of two holds a prefix of the layers: llama.cpp names it so, or its block_count does."""
    tensors = load_file(EMBEDDED / "text_encoder" / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if not name.startswith(("model.layers.2.", "model.norm"))}
    whole = gguf_of(tmp_path / "whole.gguf", tensors, qwen3__block_count=3)
    sources = open_sources("embedded", {"text_encoder": whole}, None)
    assert sources.config.text_encoder.num_hidden_layers == 3 and sources.notes == ()
    for count in (2, 4):
        file = gguf_of(tmp_path / f"{count}.gguf", tensors, qwen3__block_count=count)
        with pytest.raises(CheckpointError, match=f"has 3 layers, its metadata says {count}"):
            open_sources("embedded", {"text_encoder": file}, None)
    # Even without the last layer alone: a file that says so is not whole.
    file = gguf_of(tmp_path / "first.gguf", first, qwen3__block_count=3)
    with pytest.raises(CheckpointError, match="has 2 layers, its metadata says 3"):
        open_sources("embedded", {"text_encoder": file}, None)
    file = gguf_of(tmp_path / "x-00001-of-00002.gguf", first, split__count=2, split__no=0)
    with pytest.raises(CheckpointError, match="one file of 2 .*llama-gguf-split --merge"):
        open_sources("embedded", {"text_encoder": file}, None)


# --- a ControlNet's config.json ---


@pytest.mark.parametrize(
    "said",
    [
        {"dim": 96}, {"n_heads": 3}, {"n_kv_heads": 3}, {"norm_eps": 1e-3}, {"n_refiner_layers": 2}, {"qk_norm": False},
        {"all_patch_size": [4]}, {"control_in_dim": 33}, {"_class_name": "FluxControlNetModel"}, {"dim": "192"},
        {"add_control_noise_refiner": [1]}, {"add_control_noise_refiner": 5}, {"control_layers_places": [0, "2"]},
        {"control_layers_places": [0, 1 << 40]}, {"control_layers_places": {}}, {"control_refiner_layers_places": [3]},
    ],
)  # fmt: skip
def test_a_controlnet_that_says_other_things_than_its_base(said, tmp_path):
    base = read_model(EMBEDDED).transformer
    tensors = ControlNet(ControlNetConfig("1.0", 16, (0, 3)), base).state_dict()
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    right = {"dim": 192, "n_heads": 6, "norm_eps": 1e-5, "control_layers_places": [0, 3], "control_in_dim": 16,
             "add_control_noise_refiner": None, "_class_name": "ZImageControlNetModel"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(right))
    assert open_controlnet(tmp_path, base)[1].places == (0, 3)
    (tmp_path / "config.json").write_text(json.dumps(right | said))
    with pytest.raises(CheckpointError, match="config.json"):
        open_controlnet(tmp_path, base)


# --- dynamic shifting ---


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic") / "model"
    shutil.copytree(EMBEDDED, folder)
    write(folder, "scheduler", {"use_dynamic_shifting": True, "base_shift": 0.2, "max_image_seq_len": 512})
    return Pipeline.load(folder, device="cpu", dtype="fp32", residency="resident")


def test_the_shift_follows_from_the_size(dynamic):
    config = dynamic.config.scheduler
    small, large = (dynamic.plan(prompt="a star", height=side, width=side) for side in (128, 256))
    assert small.request.shift is None and small.sigmas != large.sigmas
    assert abs(small.sigmas[1] - (s := config.shift_at(64)) * 0.875 / (1 + (s - 1) * 0.875)) < 1e-6
    # Of one area, one schedule; a user's shift is one for all.
    assert dynamic.plan(prompt="a star", height=256, width=64).sigmas == dynamic.plan(
        prompt="a star", height=64, width=256).sigmas  # fmt: skip
    given = dynamic.plan(prompt="a star", shift=3.0)
    assert given.sigmas == Pipeline.load(device="cpu").plan(prompt="a star").sigmas


def test_several_sizes_need_one_shift(dynamic):
    options = {"prompt": ["a star", "a ring"], "height": [64, 128], "width": [64, 128]}
    with pytest.raises(RequestError, match="several sizes.*use_dynamic_shifting"):
        dynamic.plan(**options)
    assert dynamic.plan(**options, shift=3.0)
    assert dynamic.plan(prompt=["a star", "a ring"], height=[64, 128], width=[128, 64])


def test_a_second_pass_and_a_replay_find_their_own_shift(dynamic):
    plan = dynamic.plan(prompt="a star", upscale=2.0, upscale_strength=0.5, height=64, width=64)
    assert plan.then.sigmas == dynamic.plan(prompt="a star", height=128, width=128).sigmas[4:]
    result = dynamic(prompt="a star", seed=1, num_inference_steps=2, height=64, width=64, output_type="latent")
    record = {key: value for key, value in result.metadata[0].items() if key not in ("engine", "model")}
    again = dynamic(replace(Request.from_json(json.loads(json.dumps(record))), output_type="latent"))
    assert "shift" not in record and torch.equal(again.latents[0], result.latents[0])


def test_a_converted_model_keeps_its_schedule(dynamic, tmp_path):
    convert(dynamic.folder, tmp_path / "out", version="0")
    assert open_sources(tmp_path / "out", {}, None).config.scheduler == dynamic.config.scheduler


@pytest.mark.parametrize("kind, numbers", [("linear", {"base_shift": -1.0}), ("exponential", {"base_shift": 900.0}),
                                           ("exponential", {"max_shift": -400.0})])  # fmt: skip
def test_a_shift_that_is_none(dynamic, kind, numbers):
    config = replace(dynamic.config.scheduler, time_shift_type=kind, **numbers)
    with pytest.raises(ValueError, match="gives the shift .*; needed"):
        config.shift_at(256 if "max_shift" not in numbers else 512)


# --- the tokenizer's own file ---


@pytest.mark.parametrize("key", config_keys.TOKENIZER.runs)
def test_a_switch_of_the_tokenizer(copy, key):
    write(copy, f"tokenizer/{tokenizer_config.FILE}", {key: "another"})
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json: {key} is 'another'"):
        Pipeline.load(copy, device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens_decoder": {"600": {"content": "foo"}}}, {"added_tokens_decoder": {"486": {"content": "foo"}}},
        {"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": 5}, {"added_tokens_decoder": {"486": None}},
        {"added_tokens_decoder": {"486": {"content": "<|endoftext|>", "lstrip": True}}},
        {"eos_token": "foo"}, {"pad_token": {"content": "foo"}}, {"unk_token": "red"}, {"pad_token": 5},
        {"additional_special_tokens": ["<|im_start|>", "foo"]}, {"extra_special_tokens": {"image": "foo"}},
    ],
)  # fmt: skip
@pytest.mark.sampled(2)
def test_tokens_that_tokenizer_json_has_not(copy, change):
    """transformers would cut text at them."""
    write(copy, f"tokenizer/{tokenizer_config.FILE}", change)
    with pytest.raises(CheckpointError, match=f"{tokenizer_config.FILE}: .*tokenizer.json"):
        Pipeline.load(copy, device="cpu")


def test_another_chat_template_is_noted(copy):
    assert tokenizer_config.check(copy / "tokenizer") == []
    write(copy, f"tokenizer/{tokenizer_config.FILE}", {"chat_template": "{{ messages }}", "odd": 1})
    notes = tokenizer_config.check(copy / "tokenizer")
    assert "not executed" in notes[0] and "odd" in notes[1]
    (copy / "tokenizer" / "chat_template.jinja").write_text("{{ system }}")
    assert "chat_template.jinja" in tokenizer_config.check(copy / "tokenizer")[0]
    assert any("not executed" in note for note in Pipeline.load(copy, device="cpu").plan(prompt="a star").notes)


def test_a_pipe_or_a_device_is_not_read(tmp_path):
    """Else a reader would wait for a writer that never comes, or read without an end."""
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("config.json", "zero.json"):
        with pytest.raises(CheckpointError, match="not a plain file"):
            read_json(tmp_path / name)
