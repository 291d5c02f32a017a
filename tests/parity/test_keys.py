"""The tables of keys against the libraries that read the same files: every key is in one, defaults are right values."""

import inspect
import json
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from s3dit import Pipeline
from s3dit.configs import config_keys
from s3dit.configs.model_files import KINDS
from s3dit.errors import CheckpointError
from s3dit.model.config import SchedulerConfig, VisionConfig, VisionInputConfig
from s3dit.model.tokenizer import Tokenizer
from s3dit.runtime.sources import open_sources

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "configs"))
from test_config_mutants import FILES, MUTANTS, copied, mutate_all  # noqa: E402

# Written by the savers of both libraries and read by nobody.
SAVED = {"_class_name": "", "_diffusers_version": "", "_name_or_path": ""}
CLASSES = {
    KINDS["transformer"]: diffusers.ZImageTransformer2DModel,
    KINDS["vae"]: diffusers.AutoencoderKL,
    SchedulerConfig: diffusers.FlowMatchEulerDiscreteScheduler,
}
# Where the library's default is another form than the published one; the tensors tell it.
OTHERWISE = {"use_quant_conv", "use_post_quant_conv"}


def defaults(kind):
    """What a class of the libraries takes out of its file, and what it takes where that says nothing."""
    if kind in CLASSES:
        signature = inspect.signature(CLASSES[kind].__init__).parameters
        return {name: one.default for name, one in signature.items() if name != "self"} | SAVED
    if kind is VisionInputConfig:
        from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

        return json.loads(Siglip2ImageProcessorPil().to_json_string())
    older = {"quantization_config": None, "torch_dtype": None}
    if kind is VisionConfig:
        return transformers.Siglip2VisionConfig().to_dict() | older
    return transformers.Qwen3Config().to_dict() | older | {"rope_scaling": None}


@pytest.mark.parametrize("kind", [*KINDS.values(), SchedulerConfig, VisionConfig, VisionInputConfig])
def test_every_key_of_a_class_is_in_a_table(kind):
    said = defaults(kind)
    assert kind.note_unknown(said, "FILE") == []
    for key in set(kind.keys.runs) & set(said) - OTHERWISE - {"_class_name"}:
        default = list(said[key]) if isinstance(said[key], tuple) else said[key]
        assert default in kind.keys.runs[key], key


def test_every_key_of_a_controlnet():
    said = inspect.signature(diffusers.ZImageControlNetModel.__init__).parameters
    read = ("self", "control_layers_places", "control_refiner_layers_places", "control_in_dim", "dim", "n_heads",
            "n_kv_heads", "norm_eps", "n_refiner_layers", "add_control_noise_refiner")  # fmt: skip
    assert config_keys.CONTROLNET.unknown(said, read) == []


def test_what_the_savers_write_is_known(official_dir, omni_dir):
    for folder in (official_dir, omni_dir):
        assert open_sources(folder, {}, None).notes == ()


def test_every_key_of_the_pipelines():
    components = {"transformer", "text_encoder", "vae", "scheduler", "tokenizer"}
    for name in config_keys.PIPELINES:
        found = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "controlnet"}
        assert components <= found <= set(config_keys.COMPONENTS)


@pytest.mark.slow
def test_mutants_of_an_official_directory(omni_dir, tmp_path):
    """As `test_config_mutants`, over every file of an Omni model as diffusers saves it."""
    folder = copied(omni_dir, tmp_path / "model")
    files = [*FILES, "siglip/config.json", "siglip_processor/preprocessor_config.json"]
    seen, _ = mutate_all(folder, files, MUTANTS // 4, 3)
    print(dict(seen))
    assert len(seen) == 2


@pytest.fixture
def copy(official_dir, tmp_path):
    shutil.copytree(official_dir, tmp_path / "model")
    return tmp_path / "model"


def change(folder, file, **values):
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(data | values))


@pytest.mark.parametrize(
    "said",
    [
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.8, "max_shift": 4.0,
         "base_image_seq_len": 16, "max_image_seq_len": 256},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "shift": 2.0},
    ],
)  # fmt: skip
@pytest.mark.sampled(1)
def test_a_scheduler_draws_as_in_diffusers(copy, reference, said):
    """1e-5 as in test_pipeline: sums in another order."""
    change(copy, "scheduler/scheduler_config.json", **said)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(copy / "scheduler")
    theirs = diffusers.ZImagePipeline(**reference.components | {"scheduler": scheduler})
    theirs.set_progress_bar_config(disable=True)
    options = {"height": 96, "width": 128, "num_inference_steps": 4, "guidance_scale": 0.0}
    expected = theirs(prompt=["a red star"], generator=torch.Generator().manual_seed(3), output_type="latent",
                      **options).images  # fmt: skip
    pipe = Pipeline.load(copy, device="cpu", dtype="fp32", residency="resident")
    found = pipe(prompt="a red star", seed=3, output_type="latent", **options).latents[0]
    assert torch.equal(torch.tensor(pipe.plan(prompt="a", **options).sigmas), scheduler.sigmas)
    assert ((found - expected[0]).norm() / expected[0].norm()).item() < 1e-5


@pytest.mark.parametrize(
    "said",
    [
        {"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_theta": 4e5, "type": "default"}},
        {"rope_theta": 1e6, "rope_scaling": {}, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 3e5, "rope_type": "yarn", "factor": 2.0}},
        {"rope_theta": 1e6, "use_sliding_window": True}, {"rope_theta": 1e6, "use_sliding_window": True,
        "max_window_layers": 2, "sliding_window": 8}, {"rope_theta": 1e6, "use_sliding_window": True,
        "max_window_layers": 1, "sliding_window": 8}, {"rope_theta": 1e6, "sliding_window": 8, "max_window_layers": 0},
    ],
)  # fmt: skip
def test_rotation_and_windows_as_transformers_takes_them(copy, said):
    """What it computes is read so, or refused where it is not plain; the last layer is above the features."""
    data = json.loads((copy / "text_encoder" / "config.json").read_text())
    data = {key: value for key, value in data.items() if "rope" not in key and "window" not in key}
    data = {key: value for key, value in data.items() if key != "layer_types"} | said
    theirs = transformers.Qwen3Config(**json.loads(json.dumps(data)))
    kind = KINDS["text_encoder"]
    plain = theirs.rope_parameters["rope_type"] == "default" and set(theirs.layer_types[:-1]) == {"full_attention"}
    if plain:
        assert kind.from_json(data, "FILE").rope_theta == theirs.rope_parameters["rope_theta"]
    else:
        with pytest.raises(CheckpointError, match="this engine runs"):
            kind.from_json(data, "FILE")


TEXT = "<|im_start|>user\na red  star <|im_end|> foo<think> Ünï\n<|im_end|>\n"


def ids(folder):
    return transformers.Qwen2Tokenizer.from_pretrained(folder)(TEXT).input_ids


@pytest.mark.parametrize(
    "said",
    [
        {"add_prefix_space": True}, {"split_special_tokens": True}, {"extra_special_tokens": {"x": "star"}},
        {"eos_token": "foo"}, {"pad_token": "red"}, {"unk_token": "foo"},
        {"added_tokens_decoder": {"600": {"content": "foo"}}},
    ],
)  # fmt: skip
def test_what_changes_ids_is_refused(copy, said):
    before = ids(copy / "tokenizer")
    change(copy, "tokenizer/tokenizer_config.json", **said)
    assert ids(copy / "tokenizer") != before
    with pytest.raises(CheckpointError, match="tokenizer_config.json"):
        Pipeline.load(copy, device="cpu")


@pytest.mark.parametrize(
    "key",
    [key for reason, keys in config_keys.TOKENIZER.inert.items() if "names a token" not in reason for key in keys],
)
def test_what_cannot_matter_changes_no_ids(copy, key):
    before = ids(copy / "tokenizer")
    value = {"padding_side": "left", "pad_token": "<|im_end|>", "unk_token": "<|im_end|>", "errors": "strict",
             "model_max_length": 16, "model_input_names": ["input_ids", "attention_mask"]}.get(key, 3)  # fmt: skip
    change(copy, "tokenizer/tokenizer_config.json", **{key: value})
    assert ids(copy / "tokenizer") == before
    assert open_sources(copy, {}, None).notes == ()


def test_what_a_file_adds_around_every_text_is_added(copy):
    said = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>",
            "ids": [486], "tokens": ["<|endoftext|>"]}}}  # fmt: skip
    number = Tokenizer(copy / "tokenizer")._tokenize("<|endoftext|>").ids
    said["special_tokens"]["<|endoftext|>"]["ids"] = number
    change(copy, "tokenizer/tokenizer.json", post_processor=said)
    assert Tokenizer(copy / "tokenizer")._tokenize(TEXT).ids == ids(copy / "tokenizer")
    assert Tokenizer(copy / "tokenizer")._tokenize(TEXT).ids[:1] == number
