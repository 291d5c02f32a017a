"""What the caller has set up in torch changes nothing: not a bit, not a type, at load, at plan or at the call."""

import json
import shutil
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s3dit import Control, Pipeline
from s3dit.model.controlnet import ControlNet
from s3dit.model.controlnet_config import ControlNetConfig
from s3dit.model.transformer import Transformer
from s3dit.model.vision_encoder import VisionEncoder
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model

SIZE = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "tensor", "prompt": "a red star", "seed": 1}
# As an Omni model has it; random weights, of which nothing but bits is asked.
TOWER = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_channels": 3,
    "patch_size": 16, "num_patches": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
PROCESSOR = {
    "patch_size": 16, "max_num_patches": 64, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "resample": 2, "do_resize": True, "do_rescale": True, "do_normalize": True,
}  # fmt: skip


def picture(seed, width=64, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_weights(model, path, known=()):
    g = torch.Generator().manual_seed(1)
    tensors = {name: 0.1 * torch.randn(one.shape, generator=g) for name, one in model.state_dict().items()}
    save_file(tensors | {name: known[name] for name in known}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A ControlNet, an adapter with norms (DoRA), and an Omni model."""
    folder = tmp_path_factory.mktemp("settings")
    random_weights(ControlNet(ControlNetConfig("2.1", 33, (0, 3)), read_model(EMBEDDED).transformer), folder / "net")
    g = torch.Generator().manual_seed(2)
    layer = "layers.0.attention.to_q"
    tensors = {
        f"{layer}.lora_{leaf}.weight": torch.randn(s, generator=g) for leaf, s in (("A", (2, 192)), ("B", (192, 2)))
    }
    tensors |= {f"{layer}.lora_magnitude_vector.weight": torch.ones(192), "layers.2.ffn_norm1.w_norm": torch.ones(192)}
    save_file(tensors, folder / "style.safetensors")
    omni = shutil.copytree(EMBEDDED, folder / "omni")
    (omni / "s3dit.json").unlink()
    config = json.loads((omni / "transformer" / "config.json").read_text()) | {"siglip_feat_dim": 24}
    for part, name, data in (
        ("transformer", "config", config),
        ("siglip", "config", TOWER),
        ("siglip_processor", "preprocessor_config", PROCESSOR),
    ):
        (omni / part).mkdir(exist_ok=True)
        (omni / part / f"{name}.json").write_text(json.dumps(data))
    model, (weights,) = read_model(omni), (omni / "transformer").glob("*.safetensors")
    random_weights(Transformer(model.transformer), weights, load_file(weights))
    random_weights(VisionEncoder(model.vision), omni / "siglip" / "model.safetensors")
    return folder


# name -> (what the pipeline is loaded with, what is asked of it)
CASES = {
    "text": lambda files: ({}, {"guidance_scale": 2.0, "negative_prompt": "a ring", "solver": "heun"}),
    "bf16": lambda files: ({"dtype": "bf16"}, {"schedule": "karras", "solver": "dpmpp_2m"}),
    "int8": lambda files: ({"quantize": "int8"}, {"schedule": "beta", "solver": "euler_ancestral"}),
    "streamed": lambda files: ({"quantize": "int8-weights", "residency": "streamed"}, {"upscale": 1.5}),
    "fp8": lambda files: ({"quantize": "fp8", "quantize_text": "fp8-weights"}, {"sigmas": [1.0, 0.5]}),
    "image": lambda files: (
        {},
        {"image": picture(1), "mask_image": picture(2).convert("L"), "strength": 0.6, "mask_blur": 2.0,
         "extend": [16, 0, 0, 0], "height": None, "width": None, "mask_mode": "differential", "posterior": "sample"},
    ),
    "control": lambda files: ({}, {"control": Control(files / "net", picture(3), inpaint=picture(4), mask=picture(5))}),
    "references": lambda files: ({"model": files / "omni"}, {"reference": [picture(6), picture(7, 96)]}),
    "adapter": lambda files: ({"residency": "resident"}, {}),
    "tiles": lambda files: ({"vram": "13MiB"}, {"height": 272, "num_inference_steps": 1}),
}  # fmt: skip


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "cpu": lambda: default_device("cpu"),
    "with meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
}
# Of which every case sees these together, and one case each alone.
TOGETHER = ("bfloat16", "meta", "autocast", "inference")


def drawn(files, case, pipe=None):
    """Everything that a case gives: the plan's levels, latents, pictures, what they say of themselves."""
    options, request = CASES[case](files)
    if pipe is None:
        pipe = Pipeline.load(options.pop("model", None), **{"device": "cpu", "dtype": "fp32"} | options)
        if case == "adapter":
            pipe.lora.attach(files / "style.safetensors", 0.5)
    result = pipe(**SIZE | request)
    kept = [*result.latents, *result.images, *pipe.encode(["a red star"])]
    return pipe, (pipe.plan(**SIZE | request).sigmas, kept, result.metadata)


@pytest.fixture(scope="module")
def expected(files):
    return {case: drawn(files, case) for case in CASES}


def check(files, expected, case, settings, pipe=None):
    _, (sigmas, kept, metadata) = expected[case]
    with ExitStack() as stack:
        for name in settings:
            stack.enter_context(SETTINGS[name]())
        _, found = drawn(files, case, pipe)
    assert found[0] == sigmas and found[2] == metadata
    for one, other in zip(found[1], kept, strict=True):
        assert (one.dtype, one.device, one.requires_grad) == (other.dtype, other.device, False)
        assert torch.equal(one, other) and not one.is_inference()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_nothing_changes_from_the_load_on(files, expected, case):
    check(files, expected, case, TOGETHER)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.slow
def test_nothing_changes_in_a_call(files, expected, setting):
    pipe = expected["text"][0]
    pipe.parts.free()
    pipe.encoders._prompts.clear()
    check(files, expected, "text", [setting], pipe)


def test_the_callers_settings_are_his_again(files):
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        for step in pipe.stream(**SIZE):
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            assert torch.empty(1).is_meta and step.x.device.type == "cpu"
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
