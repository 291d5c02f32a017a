"""s3dit parity: every way a picture is made, stage by stage against diffusers, in fp32.

The bound is 1e-5, the tool's own: both sides do the same fp32 operations, in matrix products of other shapes. Seen on
these weights: below 4e-6 at every stage.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s3dit import Control, Pipeline
from s3dit.parity.session import Choice, run
from s3dit.parity.taps import FINAL, Inside

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install 's3dit[test]'")
sys.path.insert(0, str(Path(__file__).parent))
import spelled  # noqa: E402

PROMPT = "a red star above a blue ring"
# 35 image tokens and few caption tokens: both streams have padding.
SIZE = {"height": 80, "width": 112}
BLOCKS = [f"{kind}.{i}" for kind, n in (("context_refiner", 2), ("noise_refiner", 2), ("layers", 3)) for i in range(n)]
SAMPLE = [f"context_refiner.0.attention.{part}" for part in ("to_v", "q", "k", "mixed")]
STREAMS = [f"{what} of {stream}" for what in ("rope", "tokens") for stream in ("text", "image", "whole")]
DECODER = [
    f"vae.decoder.{name}" for name in ("conv_in", "mid_block", *(f"up_blocks.{i}" for i in range(4)), "conv_out")
]
STAGES = {
    "token ids", "text.layers.0", "text.layers.1", "text features", "sigmas", "noise", "cap_embedder", "t_embedder",
    "all_x_embedder.2-1", FINAL, "t_embedder, step 2", f"{FINAL}, step 2", "velocity, step 1", "velocity, step 2",
    "latents, step 1", "latents, step 2", "VAE decode", "pixels", *BLOCKS, *SAMPLE, *STREAMS, *DECODER,
}  # fmt: skip


def compared(pipe, choice=None, **request):
    """The outcome, after holding every stage to the bound, and the checks by name to silence."""
    options = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "guidance_scale": 0.0} | request
    sized = {} if {"image", "reference"} & set(options) else SIZE
    outcome = run(pipe, pipe.plan(**(sized | options)), choice or Choice())
    first = outcome.verdict.first
    assert first is None, f"{first} {[str(stage) for stage in outcome.verdict.stages if stage.parts][:5]}"
    assert not [check for check in outcome.checks if check.found]
    return outcome


def photograph(height, width, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def blot(height, width):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray((((x - 50) ** 2 + (y - 40) ** 2 < 700) | (x > width - 21)).astype(np.uint8) * 255)


IMAGE, MASK = photograph(80, 112), blot(80, 112)
RAMP = Image.fromarray(np.tile(np.linspace(0, 255, 112).astype(np.uint8), (80, 1)))
TEXT_TO_IMAGE = {
    "guidance, of other lengths": {"guidance_scale": 2.5, "negative_prompt": "a blue ring " * 12},
    "a batch, normalized and truncated": {
        "prompt": [PROMPT, "a green circle " * 8], "num_images_per_prompt": 2,
        "guidance_scale": 3.0, "cfg_normalization": 0.8, "cfg_truncation": 0.1,
    },
    "sigmas": {"sigmas": [1.0, 0.7, 0.35], "num_inference_steps": 3},
    "shift": {"shift": 5.0},
    "karras": {"schedule": "karras", "num_inference_steps": 4},
    "a schedule of our own": {"schedule": "kl_optimal", "num_inference_steps": 4},
    "latents": {"latents": torch.randn(1, 16, 10, 14, generator=torch.Generator().manual_seed(1))},
    "one generator": {"num_images_per_prompt": 2, "convention": "diffusers"},
    "a short prompt": {"max_sequence_length": 11},
}  # fmt: skip
START = {
    "img2img": {"image": photograph(93, 121)},
    "img2img, sampled, a batch": {"image": [IMAGE, photograph(80, 112, 1)], "prompt": [PROMPT, "a circle"],
                                  "posterior": "sample", "seed": [3, 8]},
    "one generator of a batch": {"image": IMAGE, "num_images_per_prompt": 2, "preset": "diffusers"},
    "another size": {"image": photograph(93, 121), "height": 96, "width": 64},
    "inpaint": {"image": IMAGE, "mask_image": MASK, "num_inference_steps": 3, "strength": 0.8},
    "inpaint, sampled, guided": {"image": IMAGE, "mask_image": MASK, "guidance_scale": 2.0, "posterior": "sample"},
    "unipc": {"image": IMAGE, "mask_image": MASK, "solver": "unipc", "num_inference_steps": 5, "strength": 0.7},
    "differential": {"image": IMAGE, "mask_image": RAMP, "mask_mode": "differential", "num_inference_steps": 4},
    "outpaint": {"image": photograph(64, 64), "extend": (0, 0, 32, 16)},
}  # fmt: skip


def test_every_stage_of_a_picture(ours):
    outcome = compared(ours)
    assert {stage.row.name for stage in outcome.verdict.stages} == STAGES
    assert outcome.verdict.left_out == ["text.beyond"]
    exact = {stage.row.name for stage in outcome.verdict.stages if stage.row.error == 0}
    assert {"token ids", "sigmas", "noise"} <= exact
    assert [check.found for check in outcome.checks] == [False] * 5


@pytest.mark.parametrize("case", TEXT_TO_IMAGE)
@pytest.mark.sampled(3)
def test_text_to_image(ours, case):
    compared(ours, **TEXT_TO_IMAGE[case])


@pytest.mark.parametrize("solver", ["heun", "unipc", "dpmpp_2m", "dpmpp_2m_sde", "lcm"])
@pytest.mark.sampled(2)
def test_solvers_that_diffusers_has(ours, solver):
    # At pure noise, an infinite log-SNR, diffusers' UniPC takes another level.
    levels = {"sigmas": [0.99, 0.8, 0.5, 0.2]} if solver == "unipc" else {}
    compared(ours, solver=solver, num_inference_steps=4, **levels)


@pytest.mark.parametrize("case", START)
@pytest.mark.sampled(3)
def test_start_images(ours, case):
    outcome = compared(ours, **START[case])
    names = {stage.row.name for stage in outcome.verdict.stages}
    assert {"vae.encoder.mid_block, picture 1", "start"} <= names and "noise" not in names


@pytest.mark.slow
def test_inside_every_part(ours):
    names = ("layers.1", "text.layers.1", "vae.decoder.mid_block", "vae.encoder.down_blocks.0", "cap_embedder")
    outcome = compared(ours, Choice(inside=Inside(names)), image=IMAGE)
    seen = {stage.row.name for stage in outcome.verdict.stages}
    assert {
        "layers.1.attention.q", "layers.1.attention.mixed", "layers.1.feed_forward.w2", "text.layers.1.self_attn.k",
        "text.layers.1.mlp.down_proj", "vae.decoder.mid_block.attentions.0", "cap_embedder.0",
        "vae.encoder.down_blocks.0.resnets.0, picture 1",
    } <= seen  # fmt: skip


def controlnet(folder, randomized, version):
    channels = {"1.0": 16, "2.0": 33, "2.1": 33}[version]
    own = {"1.0": None, "2.0": "control_layers", "2.1": "control_noise_refiner"}[version]
    model = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 2], control_refiner_layers_places=[0, 1], control_in_dim=channels,
        add_control_noise_refiner=own, dim=192, n_refiner_layers=2, n_heads=6, n_kv_heads=6,
    )  # fmt: skip
    randomized(model, 7).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("version", "rule"),
    [("1.0", "authors"), ("2.0", "diffusers"), ("2.0", "authors"), ("2.1", "diffusers"), ("2.1", "authors")],
)
@pytest.mark.sampled(1)
def test_controlnets_by_both_rules(ours, randomized, tmp_path, version, rule):
    folder = controlnet(tmp_path / "net", randomized, version)
    guided = {"guidance_scale": 2.5} if rule == "authors" else {}
    outcome = compared(ours, control=Control(folder, photograph(90, 150), 0.6, rule=rule), **guided)
    names = {stage.row.name for stage in outcome.verdict.stages}
    assert {"control 1: embedded", "control 1: hint of layers.0", "control 1: hint of layers.2"} <= names


def test_a_controlnet_that_inpaints(ours, randomized, tmp_path):
    folder = controlnet(tmp_path / "net", randomized, "2.1")
    control = Control(folder, photograph(90, 150), 0.6, inpaint=photograph(100, 140), mask=blot(100, 140))
    compared(ours, control=control, num_images_per_prompt=2)


def test_an_official_file_of_a_controlnet(ours, randomized, tmp_path):
    folder = controlnet(tmp_path / "net", randomized, "1.0")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    # Published files have a control layer for every place of an even spread.
    tensors |= {
        k.replace("control_layers.1.", "control_layers.2."): v.clone() for k, v in tensors.items() if "layers.1." in k
    }
    save_file(tensors, tmp_path / "Union.safetensors")
    outcome = compared(ours, control=Control(tmp_path / "Union.safetensors", IMAGE, 0.6))
    assert any("Union" in note for note in outcome.notes)


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.sampled(1)
def test_omni(omni, references):
    images = [photograph(80, 119, 1), photograph(97, 64, 2)][:references]
    more = {"reference": images} if images else {}
    guided = {"guidance_scale": 2.5} if references == 2 else {}
    outcome = compared(omni, prompt=[PROMPT, "a blue ring"], **more, **guided)
    names = {stage.row.name for stage in outcome.verdict.stages}
    seen = {"vision features, picture 1", "siglip_refiner.0", "all_x_embedder.2-1 of references", "rope of vision"}
    assert seen <= names or not references


def adapter(path, seed, layers, prefix="transformer."):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (out, in_) in layers.items():
        tensors[f"{prefix}{layer}.lora_A.weight"] = 0.3 * torch.randn(4, in_, generator=generator)
        tensors[f"{prefix}{layer}.lora_B.weight"] = 0.3 * torch.randn(out, 4, generator=generator)
    save_file(tensors, path)
    return path


def test_adapters_by_diffusers_loader(official_dir, tmp_path):
    pipe = Pipeline.load(official_dir, device="cpu", dtype="fp32")
    square, wide = {"layers.1.attention.to_q": (192, 192)}, {"layers.0.feed_forward.w2": (192, 512)}
    pipe.lora.attach(adapter(tmp_path / "a.safetensors", 1, square), 0.8)
    pipe.lora.attach(adapter(tmp_path / "b.safetensors", 2, square | wide), -0.5)
    compared(pipe)


@pytest.fixture(scope="module")
def tensors(official_dir):
    return {part: spelled.part(official_dir, part) for part in ("transformer", "text_encoder", "vae")}


def test_single_files(official_dir, tensors, tmp_path):
    """By from_single_file where there is one; names of the text encoder are read here on both sides."""
    files = {
        "transformer": spelled.prefixed("model.diffusion_model.", spelled.comfy(tensors["transformer"])),
        "text_encoder": tensors["text_encoder"], "vae": spelled.ldm(tensors["vae"]),
    }  # fmt: skip
    given = {part: spelled.save(tmp_path / f"{part}.safetensors", named) for part, named in files.items()}
    pipe = Pipeline.load(official_dir, device="cpu", dtype="fp32", **given)
    outcome = compared(pipe)
    assert [note for note in outcome.notes if "text_encoder.safetensors" in note]
    assert not [note for note in outcome.notes if note.startswith("transformer.safetensors")]


def test_a_gguf_by_diffusers_reader(official_dir, tensors, tmp_path):
    gguf = pytest.importorskip("gguf")
    named = spelled.comfy(tensors["transformer"])
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "lumina2")
    for key, tensor in named.items():
        data = tensor.contiguous().numpy()
        whole = tensor.ndim == 2 and key.startswith(("layers.", "noise_refiner.")) and tensor.shape[1] % 32 == 0
        if whole and "adaLN" not in key:
            writer.add_tensor(key, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, data)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    pipe = Pipeline.load(official_dir, transformer=tmp_path / "x.gguf", device="cpu", dtype="fp32")
    assert "Q8_0" in pipe.parts.formats["transformer"].upper()
    compared(pipe)


@pytest.mark.parametrize("name", ["int4", "fp8-weights"])
@pytest.mark.sampled(1)
def test_a_directory_in_our_own_format_is_dequantized(official_dir, tmp_path, name):
    """diffusers would read its codes as weights, in silence."""
    from s3dit import __version__
    from s3dit.weights.quantize import quantize, scheme_named

    quantize(official_dir, tmp_path / "small", {"transformer": scheme_named(name)}, version=__version__)
    pipe = Pipeline.load(tmp_path / "small", device="cpu", dtype="fp32")
    outcome = compared(pipe, Choice(tolerance=1e-5))
    assert any("decoding" in note for note in outcome.notes)


def test_a_format_beside_its_own_weights(official_dir):
    """Far from fp32's bound, within that of the format: the reference reads what was not quantized."""
    pipe = Pipeline.load(official_dir, device="cpu", dtype="fp32", quantize="int8")
    outcome = compared(pipe)
    assert max(stage.row.error for stage in outcome.verdict.stages) > 1e-3
    assert any("unquantized" in note for note in outcome.notes)


def test_a_quantizer_of_diffusers(official_dir, tmp_path):
    """torchao's int8, written and read by diffusers itself; a product with decoded weights on both sides."""
    quantization = pytest.importorskip("torchao.quantization")
    how = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    model = diffusers.ZImageTransformer2DModel.from_pretrained(
        official_dir / "transformer", quantization_config=how, torch_dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "int8")
    pipe = Pipeline.load(official_dir, transformer=tmp_path / "int8", device="cpu", dtype="fp32")
    compared(pipe, Choice(tolerance=2e-5))


@pytest.mark.slow
def test_other_settings_in_the_same_run(official_dir, ours):
    settings = {
        "residency=streamed": {"residency": "streamed"}, "vram=24MiB": {"vram": "24MiB"},
        "numerics=exact, backend=reference": {"numerics": "exact", "backend": "reference"},
        "quantize=fp8-weights": {"quantize": "fp8-weights"},
    }  # fmt: skip
    request = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 1, **SIZE}

    def loader(options):
        pipe = Pipeline.load(official_dir, device="cpu", dtype="fp32", **options)
        return pipe, pipe.plan(**request)

    also = [(name, lambda options=options: loader(options)) for name, options in settings.items()]
    outcome = run(ours, ours.plan(**request), also=also)
    assert not outcome.parts and list(outcome.also) == list(settings)
    errors = {
        name: max(stage.row.error for stage in verdict.stages if stage.row.name != "pixels")
        for name, verdict in outcome.also.items()
    }
    assert errors.pop("quantize=fp8-weights") > 1e-3 and max(errors.values()) < 1e-5


def test_the_truth_is_streamed(ours):
    """Blocks that are read when they compute, and dropped, have the bits of a model in memory."""
    from s3dit.parity.reference import reference

    plan = ours.plan(prompt=PROMPT, seed=3, num_inference_steps=1, **SIZE)
    whole, streamed = (reference(ours, plan, {}, streamed=flag) for flag in (False, True))
    assert all(torch.equal(whole[name], streamed[name]) for name in whole) and len(whole) > 35


REFUSED = {
    "euler_ancestral": ({"solver": "euler_ancestral"}, "diffusers has not"),
    "sizes": ({"prompt": ["a", "b"], "height": [64, 80], "width": 64}, "several sizes"),
    "guidance": ({"guidance_scale": 2.0, "guidance_method": "apg"}, "guidance_method given"),
    "scales": ({"guidance_scale": [2.0, 1.0]}, "several values"),
    "convention": ({"convention": "comfyui"}, "which is not diffusers'"),
    "upscale": ({"upscale": 2.0}, "two passes"),
    "latents": ({"image": IMAGE, "latents": torch.zeros(1, 16, 10, 14)}, "leaves the image out"),
    "blur": ({"image": IMAGE, "mask_image": MASK, "mask_blur": 4.0}, "gray mask"),
    "heun": ({"image": IMAGE, "solver": "heun"}, "counts others"),
    "unipc": ({"solver": "unipc"}, "begins at pure noise"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_diffusers_cannot_draw_is_refused_by_name(ours, case):
    from s3dit.errors import RequestError
    from s3dit.parity.reference import reference

    request, words = REFUSED[case]
    plan = ours.plan(**({"prompt": PROMPT, "seed": 3, "num_inference_steps": 2, **SIZE} | request))
    with pytest.raises(RequestError, match=words):
        reference(ours, plan, {})


def test_what_diffusers_does_not_read_is_no_difference(official_dir, tmp_path):
    """An adapter in a dialect that this engine alone reads: an error of its own, not a stage that parts."""
    from s3dit.errors import RequestError

    generator = torch.Generator().manual_seed(1)
    ends = {"lora_down": torch.randn(4, 192, generator=generator), "lora_up": torch.randn(576, 4, generator=generator)}
    tensors = {f"diffusion_model.layers.1.attention.qkv.{end}.weight": x for end, x in ends.items()}
    save_file(tensors | {"diffusion_model.layers.1.attention.qkv.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    pipe = Pipeline.load(official_dir, device="cpu", dtype="fp32")
    pipe.lora.attach(tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="diffusers failed on its side"):
        compared(pipe)


def test_json_of_the_outcome(ours):
    from s3dit.parity.report import as_json

    data = json.loads(json.dumps(as_json(compared(ours))))
    assert data["parts"] is None and data["sides"]["truth"]["side"] == "diffusers"
