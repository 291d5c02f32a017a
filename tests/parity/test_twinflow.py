"""TwinFlow: the second timestep against plain float64, the sampler against a loop in float64, and what files say.

Re-derived from `sampling_loop` (style few: stochastic ratio 1, no extrapolation, first order) and from `forward` of
inclusionAI/TwinFlow. Blocks are diffusers'; what they read of the time is computed here. Tolerance 1e-5 relative, as
for all of the transformer: fp32 sums in other orders.
"""

import json
import math
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s3dit import Pipeline, Request
from s3dit.cli.main import main
from s3dit.errors import RequestError
from s3dit.runtime import modulations

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "weights")]
import few_step_files  # noqa: E402
import spelled  # noqa: E402

PROMPT = "a red star above a blue ring"
SIZE = {"prompt": PROMPT, "height": 48, "width": 64, "output_type": "latent"}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def folder(official_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("twinflow") / "TwinFlow-Z-Image-Turbo-exp"
    few_step_files.twinflow(official_dir, path)
    return path


@pytest.fixture(scope="module")
def twin(folder):
    return Pipeline.load(folder, device="cpu", dtype="fp32", residency="resident")


def embedded(weights, name, value):
    """A timestep embedder in float64: cosines and sines of 128 frequencies, two linears with SiLU between."""
    angles = [value * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    x = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    for i in (0, 2):
        x = weights[f"{name}.mlp.{i}.weight"].double() @ x + weights[f"{name}.mlp.{i}.bias"].double()
        x = x * torch.sigmoid(x) if i == 0 else x
    return x


class Told(torch.nn.Module):
    """In the place of diffusers' t_embedder: what is told before a call."""

    def forward(self, t):
        return self.time.float()[None].expand(len(t), -1)


@pytest.fixture(scope="module")
def theirs(official_dir, folder):
    """A function (latents, t, target, features) -> diffusers' velocity of a model that reads both times."""
    model = diffusers.ZImageTransformer2DModel.from_pretrained(official_dir / "transformer").eval()
    weights, model.t_embedder = few_step_files.transformer_of(folder), Told()

    @torch.no_grad()
    def velocity(latents, t, target, features):
        time = embedded(weights, "t_embedder", 1000 * abs(t))
        time = time + abs(t - target) * embedded(weights, "t_embedder_2", 1000 * target - 1000 * t)
        model.t_embedder.time = time
        x, t = latents.float()[None, :, None], torch.tensor([t])
        return model([*x], t, [features], patch_size=2, f_patch_size=1, return_dict=False)[0][0][:, 0]

    return velocity


@pytest.mark.parametrize(("t", "target"), [(0.001, 0.0), (0.4, 0.0), (0.25, 0.75), (0.9, 0.3), (0.5, 0.5)])
@pytest.mark.sampled(1)
def test_the_velocity_of_two_times(twin, theirs, t, target):
    latents = torch.randn(16, 8, 6, generator=torch.Generator().manual_seed(1))
    (features,) = twin.encode([PROMPT])
    (found,) = twin.velocity([latents], t, features, target=target)
    assert relative(found, theirs(latents, t, target, features)) < 1e-5
    plain = twin.velocity([latents], t, features)[0]
    assert (relative(found, plain) > 1e-4) == (t != target)


def few_steps(velocity, noises, n, gap):
    """The official loop in float64: levels, an estimate of the image aimed at 0, and fresh noise."""
    levels = [1 - (0.001 + (1 - gap - 0.001) * i / max(n - 1, 1)) for i in range(n)] + [0.0]
    x = next(noises).double()
    for level, after in zip(levels, levels[1:], strict=False):
        flow = -velocity(x, 1 - level, 0.0).double()
        image = x - level * flow
        x = image if after == 0 else (1 - after) * image + after * next(noises).double()
    return x


@pytest.mark.parametrize(("n", "gap"), [(4, 0.5), (2, 0.6), (1, 0.5)])
def test_the_sampler_is_the_official_loop(twin, theirs, n, gap):
    (features,) = twin.encode([PROMPT])
    generator = torch.Generator().manual_seed(9)
    noises = (torch.randn(16, 6, 8, generator=generator) for _ in range(n))
    expected = few_steps(lambda x, t, target: theirs(x, t, target, features), noises, n, gap)
    (found,) = twin(**SIZE, seed=9, num_inference_steps=n).latents
    assert relative(found, expected) < 1e-5


def test_its_own_settings_are_defaults_and_explicit_ones_win(twin):
    plan = twin.plan(**SIZE)
    found = plan.request
    assert (found.num_inference_steps, found.guidance_scale, found.solver) == (4, 0.0, "lcm")
    assert (found.target_timestep, found.schedule) == ("end", "twinflow")
    assert plan.sigmas == pytest.approx([0.999, 0.833, 0.666, 0.5, 0], abs=4e-4) and not plan.notes[1:]
    given = twin.plan(**SIZE, solver="euler", num_inference_steps=3, schedule="simple").request
    assert (given.solver, given.num_inference_steps, given.schedule) == ("euler", 3, "simple")
    assert twin.plan(**SIZE, schedule="official").sigmas == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert twin.plan(**SIZE, preset="comfyui-turbo").request.solver == "res_multistep"
    assert twin.plan(**SIZE, sigmas=[1.0, 0.6], shift=1).sigmas == pytest.approx([1, 0.6, 0])
    assert twin.plan(**SIZE, target_timestep="next").request.solver == "euler"


def test_without_a_target_it_is_the_model_that_it_was_made_of(twin, ours):
    plain = twin(**SIZE, seed=4, target_timestep="none", num_inference_steps=3)
    assert torch.equal(plain.latents[0], ours(**SIZE, seed=4, num_inference_steps=3).latents[0])
    found = twin.plan(**SIZE, target_timestep="none").request
    assert (found.num_inference_steps, found.solver, found.schedule) == (8, "euler", "official")


@pytest.mark.parametrize("solver", ["euler", "heun", "res_2s"])
def test_the_next_level_is_aimed_at(twin, theirs, solver):
    """Called at levels of the schedule and, by res_2s, between them: the target is the next one below, 0 for 0."""
    levels, seen = [0.999, 0.8, 0.5, 0.0], []
    transformer, run = twin.transformer, twin.transformer.forward
    transformer.forward = lambda x, t, *rest: seen.append(t[0].tolist()) or run(x, t, *rest)
    try:
        twin(**SIZE, seed=2, target_timestep="next", sigmas=levels[:3], shift=1, solver=solver)
    finally:
        del transformer.forward
    for t, target in seen:
        below = max(level for level in levels if level < 1 - t - 1e-6)
        assert target == pytest.approx(1 - below if below else 0.0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:guidance_scale 2")
@pytest.mark.parametrize("options", [{}, {"target_timestep": "next"}, {"guidance_scale": 2.0}, {"solver": "heun"}])
@pytest.mark.sampled(1)
def test_a_batch_is_its_pictures(twin, options):
    both = twin(**SIZE | {"prompt": [PROMPT, "a blue ring"], "width": [64, 80]}, seed=[5, 8], **options).latents
    for prompt, width, seed, found in zip([PROMPT, "a blue ring"], [64, 80], [5, 8], both, strict=True):
        (alone,) = twin(**SIZE | {"prompt": prompt, "width": width}, seed=seed, **options).latents
        assert relative(found, alone) < 1e-5


def test_masks_second_passes_and_replay(twin):
    picture = twin(prompt=PROMPT, height=48, width=64, seed=3)
    fields = {key: value for key, value in picture.metadata[0].items() if key in Request.__dataclass_fields__}
    assert fields["solver"] == "lcm" and fields["target_timestep"] == "end"
    assert torch.equal(twin(Request.from_json(fields)).latents[0], picture.latents[0])
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 255
    (masked,) = twin(**SIZE, image=picture.images[0], mask_image=Image.fromarray(mask), seed=4).latents
    pixels = torch.from_numpy(np.asarray(picture.images[0]).copy()).permute(2, 0, 1) / 127.5 - 1
    (start,) = twin.encode_images([pixels])
    assert torch.equal(masked[..., :4], start[..., :4]) and relative(masked[..., 4:], start[..., 4:]) > 0.1
    larger = twin.plan(**SIZE, upscale=2, upscale_strength=0.5)
    assert larger.then.sigmas == larger.sigmas[2:] and twin(larger).latents[0].shape == (16, 12, 16)


@pytest.mark.filterwarnings("ignore:cache .* has no effect")
@pytest.mark.parametrize("cache", ["first-block", "taylor"])
def test_a_cache_goes_by_the_first_of_both_times(twin, cache):
    """With threshold 0 every call is computed: the whole run's bits; above it some are spared and the way goes on."""
    options = {"num_inference_steps": 8, "solver": "euler", "seed": 1, "height": 64, "width": 64}
    whole, same = (twin("a star", **options, **more) for more in ({}, {"cache": f"{cache}:0"}))
    assert torch.equal(whole.latents[0], same.latents[0])
    spared = twin("a star", **options, cache="taylor:1")
    assert spared.metadata[0]["engine"]["reused"] > 0 and torch.isfinite(spared.latents[0]).all()


def test_a_pass_without_layers_aims_at_the_same_time(twin):
    seen, transformer = [], twin.transformer
    run = transformer.forward
    transformer.forward = lambda x, t, *rest: seen.append(tuple(t.shape)) or run(x, t, *rest)
    try:
        twin(**SIZE, seed=2, num_inference_steps=2, skip_layers="1:0.5")
    finally:
        del transformer.forward
    assert seen == [(1, 2)] * 4


@pytest.mark.parametrize("target", ["end", "next", "none"])
def test_modulation_computed_ahead_is_that_of_each_pass(twin, monkeypatch, target):
    """As on a GPU, where the steps' modulations are computed together, with the times that they aim at."""
    options = SIZE | {"seed": 1, "target_timestep": target, "num_inference_steps": 3}
    expected = twin(**options).latents[0]
    monkeypatch.setattr(modulations, "EACH_PASS", ())
    made, together = [], modulations.together
    monkeypatch.setattr(modulations, "together", lambda *args: made.append(len(args[1])) or together(*args))
    found = twin(**options).latents[0]
    assert made == [3] and relative(found, expected) < 1e-5


def test_other_models_refuse_a_target(ours):
    with pytest.raises(RequestError, match="has no t_embedder_2.; needed a TwinFlow checkpoint"):
        ours.plan(**SIZE, target_timestep="end")
    with pytest.raises(RequestError, match="this model has no t_embedder_2"):
        ours.velocity(torch.zeros(1, 16, 4, 4), 0.5, ours.encode("a"), target=0.0)
    assert "target_timestep" not in ours.plan(**SIZE).request.to_json()


def test_one_file_and_conversion_keep_it(folder, twin, tmp_path, capsys):
    """In ComfyUI's names, where some converters put the second embedder under `extended_weights`, and back."""
    stored = spelled.comfy(few_step_files.transformer_of(folder))
    stored = {k.replace("t_embedder_2", "extended_weights.t_embedder_2"): v for k, v in stored.items()}
    file = tmp_path / "twinflow.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, file)
    mixed = Pipeline.load(folder, transformer=file, device="cpu", dtype="fp32")
    (expected,) = twin(**SIZE, seed=6).latents
    assert torch.equal(mixed(**SIZE, seed=6).latents[0], expected)
    assert main(["inspect", str(file)]) == 0 and "with the second timestep of TwinFlow" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "made")]) == 0
    said = json.loads((tmp_path / "made" / "transformer" / "config.json").read_text())
    names = {name for part in (tmp_path / "made" / "transformer").glob("*.safetensors") for name in load_file(part)}
    assert "target_timestep" not in said and "t_embedder_2.mlp.2.bias" in names
    converted = Pipeline.load(tmp_path / "made", device="cpu", dtype="fp32")
    assert torch.equal(converted(**SIZE, seed=6).latents[0], expected)
