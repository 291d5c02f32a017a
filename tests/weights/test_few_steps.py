"""Distill LoRAs in both of their spellings, and what their header or name says of them."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s3dit.weights.adapter import read_adapter
from s3dit.weights.adapter_info import describe
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.few_steps import FewSteps, few_steps

sys.path.insert(0, str(Path(__file__).resolve().parent))
import few_step_files  # noqa: E402

STACKS = {"noise_refiner": 2, "context_refiner": 2, "layers": 3}
WEIGHTS = {
    f"{stack}.{i}.{layer}.weight": torch.zeros(8, 6)
    for stack, count in STACKS.items()
    for i in range(count)
    for layer in (*few_step_files.LAYERS, "attention.to_out.0", "adaLN_modulation.0")
}
NAMES = {
    "Z-Image-Fun-Lora-Distill-8-Steps": 8,
    "Z-Image-Fun-Lora-Distill-8-Steps-2602": 8,
    "Z-Image-Fun-Lora-Distill-4-Steps-2603-ComfyUI": 4,
    "Z-Image-Fun-Lora-Distill-2-Steps-2603": 2,
    "zimage_distill_4step": 4,
    "z_image_distilled-lora-12 steps": 12,
    # None of these is a distill LoRA, or says of how many steps.
    "style_8_steps": 0,
    "z_image_turbo_dedistill_8steps": 0,
    "z_image_turbo_de-distill_8steps": 0,
    "z_image_turbo_distill_patch_lora_bf16": 0,
    "Distill-100-Steps": 0,
    "Distill-0-Steps": 0,
    "distill_2603": 0,
    "distill_8stepsister": 0,
}


@pytest.mark.parametrize("comfyui", [False, True])
def test_both_spellings_are_read_as_what_they_add(tmp_path, comfyui):
    path = tmp_path / "Z-Image-Fun-Lora-Distill-8-Steps-2603.safetensors"
    added = few_step_files.distill_lora(path, WEIGHTS, comfyui, metadata={"format": "pt"})
    adapter = read_adapter(path)
    assert not adapter.unmatched and not adapter.misshapen and not adapter.notes
    deltas = adapter.deltas["transformer"]
    assert deltas.keys() == added.keys() and len(added) == 6 * sum(STACKS.values())
    for layer, delta in deltas.items():
        found = delta.term.up.double() @ delta.term.down.double()
        # An alpha of half the rank is a power of two, so that nothing rounds but the product.
        torch.testing.assert_close(found, added[layer], rtol=0, atol=1e-12)
    assert adapter.few_steps == FewSteps(8, shift=3.0, strength=0.8, by_name=True)
    assert describe(open_checkpoint(path)).few_steps == adapter.few_steps


@pytest.mark.parametrize(("name", "steps"), NAMES.items())
def test_names(name, steps):
    found = few_steps({}, name)
    assert found is None if not steps else (found.num_inference_steps, found.guidance_scale, found.by_name) == (
        steps, 0.0, True)  # fmt: skip


def test_two_steps_want_more_strength():
    assert few_steps({}, "Distill-2-Steps").strength == 0.9 > few_steps({}, "Distill-4-Steps").strength == 0.8


def test_the_header_goes_before_the_name():
    header = {"few_steps": '{"num_inference_steps": 4, "shift": 2.5, "guidance_scale": 0.5}'}
    assert few_steps(header, "Distill-8-Steps") == FewSteps(4, 0.5, 2.5)
    assert str(few_steps(header, "x")) == "4 steps, guidance_scale 0.5, shift 2.5, strength 1 (by its header)"


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("[4]", "needed an object"), ("4", "needed an object"), ("{}", "needed an object"),
        ('{"num_inference_steps": 4, "model": "org/name"}', "needed an object"),
        ('{"num_inference_steps": 0}', "num_inference_steps is 0"),
        ('{"num_inference_steps": 1e9}', "num_inference_steps is 1000000000.0"),
        ('{"num_inference_steps": true}', "num_inference_steps is True"),
        ('{"num_inference_steps": "4"}', "num_inference_steps is 4"),
        ('{"num_inference_steps": 4, "shift": 0}', "shift is 0"),
        ('{"num_inference_steps": 4, "shift": NaN}', "NaN"),
        ('{"num_inference_steps": 4, "guidance_scale": -1}', "guidance_scale is -1"),
        ('{"num_inference_steps": 4, "strength": 1e9}', "strength is 1000000000.0"),
        ("{", ""), ("[" * 100_000, ""),
    ],
)  # fmt: skip
def test_a_header_of_no_use_is_said_and_not_followed(tmp_path, header, words):
    path = tmp_path / "Distill-8-Steps.safetensors"
    layer = "transformer.layers.0.attention.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(1, 4), f"{layer}.lora_B.weight": torch.ones(4, 1)}
    save_file(tensors, path, {"few_steps": header})
    adapter = read_adapter(path)
    (note,) = adapter.notes
    assert note.startswith("few_steps in the header is not usable: ") and words in note and len(note) < 300
    assert adapter.few_steps is None
