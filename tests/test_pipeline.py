"""The whole engine on the embedded model: batches, replay, residency, what is read, what goes wrong."""

import json
import shutil
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3dit import Pipeline
from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.request import Solver
from s3dit.runtime.embedded import EMBEDDED

PROMPTS = ["a red star above a blue ring on a white background", "a green circle", "black background, large pink heart"]


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load("embedded", device="cpu", dtype="fp32")


@pytest.fixture
def copy(tmp_path):
    """The embedded model as a folder that a test may damage."""
    return shutil.copytree(EMBEDDED, tmp_path / "model")


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("solver", get_args(Solver))
@pytest.mark.sampled(2)
def test_a_ragged_batch_equals_one_by_one(pipe, solver):
    sizes, seeds = [(128, 96), (64, 128), (112, 80)], [4, 9, 2]
    options = {"num_inference_steps": 3, "guidance_scale": 1.5, "solver": solver, "output_type": "latent"}
    together = pipe(prompt=PROMPTS, height=[h for h, _ in sizes], width=[w for _, w in sizes], seed=seeds, **options)
    for prompt, (h, w), seed, batched in zip(PROMPTS, sizes, seeds, together.latents, strict=True):
        alone = pipe(prompt=prompt, height=h, width=w, seed=seed, **options).latents[0]
        assert batched.shape == (16, h // 8, w // 8)
        # 1e-5: matrix products of other heights sum in another order
        assert relative(batched, alone) < 1e-5


def test_num_images_per_prompt_counts_seeds_up(pipe):
    many = pipe(prompt=PROMPTS[0], seed=5, num_images_per_prompt=2, num_inference_steps=2, output_type="latent").latents
    second = pipe(prompt=PROMPTS[0], seed=6, num_inference_steps=2, output_type="latent").latents[0]
    assert relative(many[1], second) < 1e-5
    assert relative(many[0], many[1]) > 0.1


def test_the_same_request_draws_the_same_bits(pipe):
    a, b = (pipe(prompt=PROMPTS[0], seed=1).latents[0] for _ in range(2))
    assert torch.equal(a, b)


def test_staged_and_resident_are_the_same_bits_and_hold_what_they_say():
    staged, resident = (Pipeline.load(dtype="fp32", device="cpu", residency=r) for r in ("staged", "resident"))
    a, b = (p(prompt=PROMPTS[0], seed=1, num_inference_steps=2).latents[0] for p in (staged, resident))
    assert torch.equal(a, b)
    assert staged.parts.held == ("vae",)
    assert resident.parts.held == ("text_encoder", "transformer", "vae")


def test_a_known_prompt_never_loads_the_encoder_again(pipe, monkeypatch):
    pipe(prompt=PROMPTS[1], seed=1, num_inference_steps=1)
    assert [s.part for s in pipe.plan(prompt=PROMPTS[1]).stages] == ["transformer", "vae"]
    load = pipe.parts.load
    monkeypatch.setattr(pipe.parts, "load", lambda part, *rest: part != "text_encoder" and load(part, *rest))
    pipe(prompt=PROMPTS[1], seed=2, num_inference_steps=1)


def test_narrow_weights_with_wide_arithmetic():
    """bf16 weights computed in fp32 are the fp32 model with rounded weights: the embedded file is bf16 already."""
    placements = [Pipeline.load(dtype=d, device="cpu") for d in ("bf16", "fp32")]
    a, b = (p(prompt=PROMPTS[0], seed=1, output_type="latent", num_inference_steps=2).latents[0] for p in placements)
    # native bf16 rounds activations to 8 bits; where it is emulated only the order of sums differs
    assert relative(a, b) < (5e-2 if placements[0].placement.compute == torch.bfloat16 else 1e-5)


def test_stream_previews_and_stops_early(pipe):
    for step in pipe.stream(prompt=PROMPTS[0], seed=1, num_inference_steps=8):
        if step.i == 3:
            break
    assert step.calls == 3 and step.n == 8
    assert step.denoised[0].shape == (16, 16, 16) == step.latents[0].shape


def test_metadata_draws_the_picture_again(pipe):
    result = pipe(prompt=PROMPTS[:2], seed=3, num_inference_steps=2, guidance_scale=1.0, negative_prompt="white")
    fields = json.loads(json.dumps(result.metadata[1]))
    assert fields.pop("model") == "embedded" and fields.pop("engine")["model_calls"] == 2
    again = pipe(**fields)
    assert relative(again.latents[0], result.latents[1]) < 1e-5


def test_output_types(pipe):
    options = {"prompt": PROMPTS[0], "seed": 1, "num_inference_steps": 1, "height": 64, "width": 96}
    tensor = pipe(**options, output_type="tensor").images[0]
    assert tensor.shape == (3, 64, 96) and tensor.dtype == torch.float32
    assert pipe(**options).images[0].size == (96, 64)
    assert pipe(**options, output_type="latent").images == []


def test_outside_its_world_it_says_so(pipe):
    assert not pipe.plan(prompt=PROMPTS[0]).notes
    assert "unknown words: dragon" in pipe.plan(prompt="a red dragon").notes[0]
    assert "trained on" in pipe.plan(prompt=PROMPTS[0], height=256, width=256).notes[0]
    assert pipe(prompt="龙 🐉 dragon", seed=1, num_inference_steps=1, height=96, width=160).images[0].size == (160, 96)


def test_generators(pipe):
    def generators(n):
        return [torch.Generator().manual_seed(i) for i in range(n)]

    options = {"prompt": PROMPTS[:2], "num_inference_steps": 1, "output_type": "latent"}
    assert torch.equal(pipe(**options, generator=generators(2)).latents[1], pipe(**options, seed=[0, 1]).latents[1])
    with pytest.raises(RequestError, match="3 generators for 2 pictures"):
        pipe(**options, generator=generators(3))


@pytest.mark.parametrize(
    "part, name", [("transformer", "layers.3.attention.to_q.weight"), ("vae", "decoder.conv_in.bias")]
)
def test_nan_weights_are_named(copy, part, name):
    file = copy / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"not finite because {name}") as caught:
        Pipeline.load(copy, dtype="fp32")(prompt="a red circle", seed=1, num_inference_steps=2)
    assert ("step 1" in str(caught.value)) == (part == "transformer")


def test_overflow_is_named(copy):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    tensors["layers.2.feed_forward.w1.weight"] *= 1e30
    tensors["layers.2.feed_forward.w3.weight"] *= 1e30
    save_file(tensors, file)
    where = r"velocity of step 1 is not finite although .* first seen in layers.2.feed_forward.w2 \(Linear\)"
    with pytest.raises(BackendError, match=where):
        Pipeline.load(copy, dtype="fp32")(prompt="a red circle", seed=1, num_inference_steps=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 10**9}, "dim is 1000000000"),
        ({"dim": 200}, "needed three even axes_dims"),
        ({"n_layers": "6"}, "n_layers is '6'"),
        ({"n_layers": 7}, "tensors missing"),
        ({"n_layers": 5}, "tensors unexpected"),
        ({"cap_feat_dim": 64}, "different models"),
        ({"axes_dims": None}, "axes_dims is None"),
    ],
)
def test_absurd_configs(copy, change, message):
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        Pipeline.load(copy)


def test_a_missing_key_in_a_config_is_an_error(copy):
    path = copy / "vae" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "shift_factor"}))
    with pytest.raises(CheckpointError, match="'shift_factor' is missing"):
        Pipeline.load(copy)


def test_not_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="lacks transformer/"):
        Pipeline.load(tmp_path)
    with pytest.raises(RequestError, match="residency"):
        Pipeline.load(residency="some")


@pytest.mark.parametrize(
    "options, message",
    [({"dtype": "fp16"}, "overflows"), ({"dtype": "int3"}, "needed bf16 or fp32"), ({"device": "tpu"}, "device")],
)
def test_wrong_placement(options, message):
    with pytest.raises(BackendError, match=message):
        Pipeline.load(**options)


def test_what_is_kept_does_not_depend_on_what_was_drawn_before():
    """Prompts are encoded each by itself: a batch, then one of its prompts, against that prompt in a new pipeline."""
    prompts = ["a red star", "two blue circles on a yellow ground, one above the other, to the left", "a pink square"]
    options = {"seed": 3, "height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency="resident")
    seen = []
    hook = pipe.parts["text_encoder"].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    together = pipe.encode(prompts)
    hook.remove()
    assert [len(lengths) for lengths in seen] == [1, 1, 1]
    pipe(prompt=prompts, **options)
    for prompt, features in zip(prompts, together, strict=True):
        fresh = Pipeline.load(device="cpu", dtype="fp32", residency="resident")
        assert torch.equal(features, fresh.encode([prompt])[0])
        assert torch.equal(pipe(prompt=prompt, **options).latents[0], fresh(prompt=prompt, **options).latents[0])


def test_numerics_are_kept_remembered_and_checked():
    options = {"prompt": PROMPTS[0], "seed": 1, "num_inference_steps": 2, "height": 64, "width": 64}
    drawn = {}
    for name in ("exact", "lossless", "approximate"):
        own = Pipeline.load(device="cpu", dtype="fp32", numerics=name)
        result = own(**options)
        assert result.metadata[0]["engine"]["numerics"] == name
        assert any("numerics approximate has no effect" in note for note in own.plan(**options).notes) == (
            name == "approximate"
        )
        drawn[name] = result.latents[0]
    reference = Pipeline.load(device="cpu", dtype="fp32", backend="reference")(**options).latents[0]
    assert torch.equal(drawn["exact"], reference) and torch.equal(drawn["lossless"], drawn["approximate"])
    assert 0 < relative(drawn["lossless"], reference) < 1e-5
    with pytest.raises(BackendError, match="numerics is 'fast'; needed one of exact, lossless, approximate"):
        Pipeline.load(numerics="fast")
    with pytest.raises(RequestError, match="both compile and numerics exact"):
        Pipeline.load(device="cpu", compile=True, numerics="exact")
