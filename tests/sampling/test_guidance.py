"""Guidance by step, interval and method, layers that are skipped, and variation: from a call to a replayed picture."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit import Pipeline, Request
from s3dit.cli.main import main
from s3dit.guidance_options import Variation
from s3dit.inputs.variation import variations, varied
from s3dit.model.layout import text_to_image
from s3dit.model.transformer import Transformer
from s3dit.sampling.guidance import Guidance, guide
from s3dit.sampling.guidance_methods import guidance_of, scales
from s3dit.sampling.skip_layers import SkipLayers, SkippedLayers

PROMPTS = ["a red star above a blue ring on a white background", "a green circle"]
SMALL = {"height": 64, "width": 64, "seed": 3, "num_inference_steps": 4, "output_type": "latent"}
# One of each that acts in every picture.
KINDS = [
    {"guidance_scale": [3.0, 1.0]}, {"guidance_scale": 2.0, "guidance_interval": [0.1, 0.3]},
    {"guidance_scale": 2.0, "guidance_method": "apg:norm_threshold=15"},
    {"guidance_scale": 2.0, "guidance_method": "cfg_zero"}, {"skip_layers": "1,3:1.5@0-0.2"},
    {"guidance_scale": 2.0, "skip_layers": "2:0.5", "guidance_method": "apg", "cfg_normalization": 1.0},
    {"variation": "0.3:7"},
]  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", dtype="fp32", residency="resident")


def latents(pipe, prompt=PROMPTS[0], **fields):
    return pipe(prompt, **SMALL | fields).latents


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_scales_lie_on_straight_lines():
    for given, steps in (([6, 2], 8), ([1, 5, 2], 7), ([4, 3, 2, 1], 4), ([5, 0], 2), ([7, 1], 1)):
        places = np.arange(steps) * (len(given) - 1) / max(steps - 1, 1)
        expected = np.interp(places, np.arange(len(given)), given)
        for left in {steps, max(steps - 2, 1)}:
            assert scales(given, steps, left) == pytest.approx(expected[-left:], abs=1e-12)
    assert scales([0.1, 0.2, 0.7], 3, 3) == [0.1, 0.2, 0.7]


def test_a_scale_acts_from_its_step_s_time_to_the_next_and_within_the_interval():
    guidance = Guidance([3.0, 2.0, 1.0], 0.0, 1.0, (0.1, 0.8), times=[0.0, 0.25, 0.5])
    found = [guidance.at(t) for t in (0.0, 0.1, 0.2, 0.25, 0.4, 0.5, 0.8, 0.81)]
    assert found == [0.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 0.0]
    assert replace(guidance, truncation=0.3).at(0.4) == 0.0


@pytest.mark.parametrize("method", ["plain", "apg:norm_threshold=9", "cfg_zero"])
def test_every_picture_is_guided_by_itself(method):
    """Of given velocities, two pictures in a pack have the bits of each alone."""
    sigmas, lengths = torch.tensor([1.0, 0.7, 0.2, 0.0]), [24, 40]
    generator = torch.Generator().manual_seed(1)
    states, positive, negative = torch.randn(3, 3, 64, 64, generator=generator)
    request = Request(prompt="a", num_inference_steps=3, guidance_scale=2.5, guidance_method=method)

    def run(rows, lengths):
        def model(x, t, *rest):
            i = (1 - t - sigmas[:-1]).abs().argmin()
            return torch.cat((positive[i][rows], negative[i][rows]))

        velocity = guide(model, lambda guided: None, guidance_of(request, sigmas, lengths), lengths)
        return [velocity(x[rows], sigma) for x, sigma in zip(states, sigmas[:-1], strict=True)]

    together, first, second = run(slice(0, 64), lengths), run(slice(0, 24), [24]), run(slice(24, 64), [40])
    for packed, *alone in zip(together, first, second, strict=True):
        assert torch.equal(packed, torch.cat(alone))


SIZES = [{"height": 64, "width": 80, "seed": 3}, {"height": 96, "width": 64, "seed": 4}]


@pytest.fixture(scope="module")
def plain(pipe):
    """Each picture without any guidance."""
    return [
        latents(pipe, prompt, num_inference_steps=2, **size)[0] for prompt, size in zip(PROMPTS, SIZES, strict=True)
    ]


@pytest.mark.parametrize("fields", KINDS, ids=str)
@pytest.mark.sampled(2)
def test_a_ragged_batch_equals_one_by_one_and_differs_from_none(pipe, plain, fields):
    sizes = {"height": [64, 96], "width": [80, 64], "num_inference_steps": 2}
    together = latents(pipe, PROMPTS, **sizes, **fields)
    for i, prompt in enumerate(PROMPTS):
        own = sizes | fields | SIZES[i] | ({"variation": f"0.3:{7 + i}"} if "variation" in fields else {})
        # 2e-5: matrix products of other heights sum in another order; apg divides it by sigma.
        assert relative(together[i], latents(pipe, prompt, **own)[0]) < 2e-5
        assert relative(together[i], plain[i]) > 0.02


@pytest.mark.parametrize(
    "fields",
    [{"guidance_scale": [2.0, 2.0]}, {"cfg": [3.0, 3.0]}, {"guidance_interval": [0.0, 1.0]},
     {"guidance_method": "plain"}, {"variation": 0.0}, {"skip_layers": "2:1@0.99-1"}],
)  # fmt: skip
@pytest.mark.sampled(2)
def test_what_changes_nothing_has_the_bits_of_plain_guidance(pipe, fields):
    plan = pipe.plan(PROMPTS[0], **SMALL | ({} if "cfg" in fields else {"guidance_scale": 2.0}) | fields)
    assert torch.equal(pipe(plan).latents[0], latents(pipe, guidance_scale=2.0)[0])


@pytest.mark.parametrize("solver", ["euler", "heun", "res_2s"])
def test_model_calls_are_those_that_the_plan_counts(pipe, solver):
    """Rows that the transformer is given: twice as many where guidance acts, and once more without layers."""
    fields = {
        "guidance_scale": 2.0, "guidance_interval": [0.05, 0.3], "skip_layers": "2:1@0.2-1", "solver": solver,
    }  # fmt: skip
    rows, steps = [], []
    hook = pipe.parts["transformer"].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    plan = pipe.plan(PROMPTS[0], **SMALL | fields)
    pipe(plan, on_step=steps.append)
    hook.remove()
    own, guided = (4 if solver == "euler" else 7), rows.count(32)
    extra = len(rows) - own
    assert len(rows) == plan.calls == steps[-1].calls and 0 < guided < own and extra > 0
    assert f"guidance acts in {guided} of {own} model calls" in plan.notes
    assert f"skip_layers adds {extra} model calls without guidance to {own}" in plan.notes
    assert "at most 2 items each" in plan.stages[-1].work


def test_steps_of_zero_velocity_are_left_out_of_a_picture_from_noise(pipe):
    """The noise as it is at the level behind them; a plain loop in float64, with a velocity of 0 in those steps."""
    fields = {"guidance_scale": 2.0, "guidance_method": "cfg_zero:zero_init_steps=2"}
    steps = list(pipe.stream(PROMPTS[0], **SMALL | fields))
    every = pipe.plan(PROMPTS[0], **SMALL | {"guidance_scale": 2.0}).sigmas
    assert [step.sigma for step in steps] == list(every[2:4]) and steps[-1].calls == 2
    x = steps[0].start.double()
    start = x.clone()
    for i, (sigma, after) in enumerate(zip(every, every[1:], strict=False)):
        x = x + (sigma - after) * (0 if i < 2 else steps[i - 2].velocity.double())
    noise = next(pipe.stream(PROMPTS[0], **SMALL)).start
    assert torch.equal(start, noise.double()) and relative(steps[-1].x, x) < 1e-6
    image = torch.zeros(3, 64, 64)
    assert len(pipe.plan(PROMPTS[0], **SMALL | fields, image=image, strength=0.5).sigmas) == 3


@pytest.fixture(scope="module")
def pass_arguments(pipe):
    """A pass of two items of different sizes, with hints after every layer."""
    transformer, generator = pipe.transformer, torch.Generator().manual_seed(5)
    layout = text_to_image([(4, 6), (6, 6)], [9, 40])
    text = torch.randn(49, transformer.config.cap_feat_dim, generator=generator)
    x = torch.randn(60, 64, generator=generator)
    with torch.no_grad():
        context = transformer.context(layout, text)
    hints = torch.randn(6, len(layout.joint.positions), transformer.config.dim, generator=generator)
    return transformer, (x, torch.tensor([0.3]), context), hints


def test_a_skipped_layer_is_a_model_without_it(pass_arguments):
    transformer, arguments, hints = pass_arguments
    shorter = Transformer(replace(transformer.config, n_layers=4))
    names = {"0": "0", "2": "1", "3": "2", "5": "3"}
    state = {}
    for name, tensor in transformer.state_dict().items():
        first, *rest = name.split(".")
        if first != "layers" or rest[0] in names:
            state[".".join([first, names[rest[0]], *rest[1:]]) if first == "layers" else name] = tensor
    shorter.load_state_dict(state)

    def control(of_layers):
        return lambda model, image, modulation, context: (model.joined(image, modulation, context), of_layers)

    # What a ControlNet adds after a skipped layer is added all the same.
    added = [hints[0] + hints[1], hints[2], hints[3] + hints[4], hints[5]]
    skipped = SkippedLayers(transformer, SkipLayers.of("1,4:1"))
    with torch.no_grad():
        for given, expected in ((None, None), (control(hints), control(added))):
            # Fused or not, a norm of the same sum in fp32.
            assert relative(skipped(*arguments, given), shorter(*arguments, expected)) < 2e-6
        assert relative(skipped(*arguments), transformer(*arguments)) > 0.01
    assert skipped.calls == 3


def test_skipped_layers_come_back_as_they_were(pass_arguments):
    transformer, arguments, _ = pass_arguments
    own = transformer.layers[2].forward
    transformer.layers[2].forward = own
    try:
        skipped = SkippedLayers(transformer, SkipLayers.of("1,2:1"))
        with pytest.raises(AttributeError), torch.no_grad():
            skipped(*arguments[:2], None)
        assert transformer.layers[2].forward is own and "forward" not in vars(transformer.layers[1])
    finally:
        del transformer.layers[2].forward


def test_streamed_layers_are_skipped_with_the_same_bits(pipe):
    fields = {"skip_layers": "0,3:1.5", "guidance_scale": 1.0}
    streamed = Pipeline.load(device="cpu", dtype="fp32", residency="streamed")
    # Streamed blocks norm by themselves: so do those of a model with a hook, which changes the last bits.
    hooks = [block.register_forward_hook(lambda *args: None) for block in pipe.transformer.layers]
    assert relative(latents(streamed, **fields)[0], latents(pipe, **fields)[0]) < 1e-6
    for hook in hooks:
        hook.remove()


def test_variation_is_noise_of_the_norm_that_it_says():
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(n, 128, generator=generator) * torch.rand(n, 1, generator=generator) * 90 for n in (9, 21)]
    wanted = [Variation(0.25, 7), Variation(0.0, 8)]
    first, second = varied(features, [(0,), (0,)], wanted)
    for token, before in zip(first.double(), features[0].double(), strict=True):
        assert ((token - before).norm() / before.norm()).item() == pytest.approx(0.25, rel=1e-5)
    assert second is features[1]
    (alone,) = varied(features[:1], [(0,)], wanted)
    (other,) = varied(features[:1], [(0,)], [Variation(0.25, 8)])
    assert torch.equal(alone, first) and relative(other, first) > 0.3
    # Of a picture with several texts each has its own noise.
    pieces = varied([features[0], features[0]], [(0, 1)], wanted[:1])
    assert torch.equal(pieces[0], first) and not torch.equal(pieces[1], first)


def test_seeds_of_variations_count_up_and_are_the_pictures_own_without_one(pipe):
    many = {"num_images_per_prompt": 2, "num_inference_steps": 1}
    given = pipe(PROMPTS, **SMALL | many, variation=["0.2:7", 0.3])
    assert [record["variation"] for record in given.metadata] == ["0.2:7", "0.2:8", "0.3:5", "0.3:6"]
    # Where a batch's noise is that of one seed, by the place in the batch.
    batch = pipe.plan(PROMPTS[0], **SMALL | many, variation=0.3, convention="diffusers", batch_place=[1, 4]).request
    assert [one.seed for one in variations(batch)] == [4, 5]
    record = json.loads(json.dumps(given.metadata[3]))
    fields = {name: value for name, value in record.items() if name not in ("engine", "model")}
    assert relative(pipe(**fields).latents[0], given.latents[3]) < 1e-5


def test_negative_prompts_do_not_vary(pipe):
    seen = []
    context = Transformer.context

    def looked(self, layout, text, *rest):
        seen.append(text)
        return context(self, layout, text, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "context", looked)
        for variation in (None, 0.3):
            latents(pipe, PROMPTS[1], negative_prompt="red", guidance_scale=1.0, variation=variation)
    plain, changed = seen
    n = len(pipe.encode([PROMPTS[1]])[0])
    assert relative(changed[:n], plain[:n]) == pytest.approx(0.3, rel=1e-5) and torch.equal(changed[n:], plain[n:])


def test_a_second_pass_and_a_start_image_take_all_of_it(pipe):
    fields = {"guidance_scale": [3.0, 2.0, 1.0], "guidance_interval": [0.0, 0.9], "skip_layers": "2:1@0-0.5"}
    fields |= {"guidance_method": "cfg_zero", "variation": "0.2:7", "upscale": 1.5}
    plan, steps = pipe.plan(PROMPTS[0], **SMALL | fields), []
    result = pipe(plan, on_step=steps.append)
    assert steps[-1].calls == plan.calls and result.latents[0].shape[-1] == 12
    fields.pop("upscale")
    image = Image.new("RGB", (64, 64), "red")
    assert latents(pipe, image=image, strength=0.5, **fields)[0].isfinite().all()


@pytest.mark.slow
def test_from_the_command_line_and_back(tmp_path, capsys):
    words = "--guidance 3,1 --guidance-interval 0.05-0.9 --guidance-method apg:eta=0.5 --skip-layers 2:1@0-0.4"
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    small = ["--size", "64x64", "--steps", "3", "--device", "cpu", "--dtype", "fp32"]
    command = ["generate", PROMPTS[0], *words.split(), "--variation", "0.2:7", "--seed", "3", *small, "-o", str(first)]
    assert main(command) == 0
    assert main(["generate", "--replay", str(first), *small[4:], "-o", str(second)]) == 0
    assert ", CFG scale: 4, " in Image.open(first).text["parameters"]
    pictures = [np.asarray(Image.open(path)) for path in (first, second)]
    assert np.array_equal(*pictures)
    assert main(["plan", PROMPTS[0], *words.split(), *small]) == 0
    assert "guidance 3,1 t 0.05 to 0.9 apg:eta=0.5, skip_layers 2:1@0-0.4" in capsys.readouterr().out
