"""Modulation computed before a pass, and norms at the borders of blocks: the same numbers by fewer operations."""

from collections import Counter

import pytest
import torch

from s3dit import Pipeline
from s3dit.errors import BackendError
from s3dit.kernels.norm import gated_residual, gated_residual_norm, rms_norm_modulate
from s3dit.model.config import TransformerConfig
from s3dit.model.edit_layout import edit
from s3dit.model.layout import text_to_image
from s3dit.model.transformer import Transformer
from s3dit.runtime import modulations
from s3dit.runtime.finite import FiniteChecks
from s3dit.runtime.modulations import together

CONFIG = TransformerConfig.from_json(
    {
        "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 96, "n_layers": 3,
        "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 32,
        "siglip_feat_dim": 48, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 12, 12],
    },
    "test",
)  # fmt: skip
TIMES = [torch.tensor([t]) for t in (0.0, 0.25, 0.6)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Transformer(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model


def inputs(model, clean=False):
    """x and context of two items of different size, the second with a reference where there are clean tokens."""
    grids, segments = [(4, 4), (2, 6)], [(5,), (6, 7, 8)] if clean else [(5,), (40,)]
    text = torch.randn(sum(map(sum, segments)), CONFIG.cap_feat_dim)
    x = torch.randn(28, 64)
    if not clean:
        return x, model.context(text_to_image(grids, [n for (n,) in segments]), text)
    layout = edit(grids, segments, [[], [((2, 4), (3, 3))]])
    return x, model.context(layout, text, torch.randn(8, 64), torch.randn(9, 48))


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("clean", [False, True])
def test_of_all_steps_together_as_of_each(model, clean):
    x, context = inputs(model, clean)
    for time, given in zip(TIMES, together(model, TIMES, context), strict=True):
        assert given.tables.shape == (5, 4, 3 if clean else 1, 96)
        # Products of more rows, so sums in another order: some ulp of fp32.
        expected = model(x, time, context)
        assert relative(model(x, time, context, None, given), expected) < 2e-6
        # And it is read: another time beside it changes nothing.
        assert torch.equal(model(x, torch.ones(1), context, None, given), model(x, time, context, None, given))


@pytest.mark.parametrize("clean", [False, True])
def test_of_one_step_the_bits_of_a_pass(model, clean):
    x, context = inputs(model, clean)
    (given,) = together(model, TIMES[1:2], context)
    assert torch.equal(model(x, TIMES[1], context, None, given), model(x, TIMES[1], context))


def test_tables_are_factors_and_gates(model):
    """Against the formulas of the official block, in fp64."""
    got = model.modulation(torch.tensor([0.3, 0.9]), torch.float32)
    for i, block in enumerate((*model.noise_refiner, *model.layers)):
        layer = block.adaLN_modulation[0]
        answer = got.time.double() @ layer.weight.double().T + layer.bias.double()
        scale_msa, gate_msa, scale_mlp, gate_mlp = answer.chunk(4, -1)
        expected = (
            block.attention_norm1.weight * (1 + scale_msa), block.attention_norm2.weight * gate_msa.tanh(),
            block.ffn_norm1.weight * (1 + scale_mlp), block.ffn_norm2.weight * gate_mlp.tanh(),
        )  # fmt: skip
        assert relative(got.tables[i], torch.stack(expected)) < 1e-6


def counted(run):
    """How often the Ops at the borders of blocks were called."""
    seen = Counter()

    def counting(op):
        def call(*args):
            seen[op.name] += 1
            return op.reference(*args)

        return call

    ops = (rms_norm_modulate, gated_residual, gated_residual_norm)
    with ops[0].using(counting(ops[0])), ops[1].using(counting(ops[1])), ops[2].using(counting(ops[2])):
        run()
    return [seen[op.name] for op in ops]


def test_borders_between_blocks_are_one_operation(model):
    x, context = inputs(model)
    # Five blocks in two lists: a norm before the first of each, a sum after the last, else both in one.
    assert counted(lambda: model(x, TIMES[1], context)) == [2, 2, 8]
    hook = model.layers[1].register_forward_hook(lambda *_: None)
    # The block that somebody looks at has its own ends, and so have its neighbors on that side.
    assert counted(lambda: model(x, TIMES[1], context)) == [4, 4, 6]
    hook.remove()
    assert counted(lambda: model(x, TIMES[1], context)) == [2, 2, 8]


def test_hints_come_between_blocks(model):
    """A hint is seen by the norm of the next block: as a hook that adds it."""
    x, context = inputs(model)
    hint = torch.randn(len(context.gather), 96)

    def steering(model, image, modulation, context):
        return model.joined(image, modulation, context), iter((None, hint, None))

    steered = model(x, TIMES[1], context, steering)
    hook = model.layers[1].register_forward_hook(lambda block, args, out: out + hint)
    assert torch.equal(steered, model(x, TIMES[1], context))
    hook.remove()
    assert not torch.equal(steered, model(x, TIMES[1], context))


def test_hooks_see_and_replace_the_tokens(model):
    x, context = inputs(model)
    expected = model(x, TIMES[1], context)
    seen = []
    pre = model.layers[2].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    post = model.layers[1].register_forward_hook(lambda block, args, out: seen.append(out))
    assert torch.equal(model(x, TIMES[1], context), expected)
    assert torch.equal(*seen) and seen[0].shape == (len(context.gather), 96)
    changed = model.layers[2].register_forward_pre_hook(lambda block, args: (2 * args[0], *args[1:]))
    doubled = model(x, TIMES[1], context)
    changed.remove()
    other = model.layers[1].register_forward_hook(lambda block, args, out: 2 * out)
    assert torch.equal(model(x, TIMES[1], context), doubled) and not torch.equal(doubled, expected)
    for hook in (pre, post, other):
        hook.remove()


@pytest.mark.parametrize(
    "place", ["t_embedder.mlp.0", "layers.1.adaLN_modulation", "noise_refiner.0.adaLN_modulation.0",
              "all_final_layer.2-1.adaLN_modulation.1"],
)  # fmt: skip
def test_hooks_on_modulation_run_in_every_pass(model, place):
    x, context = inputs(model)
    given = together(model, TIMES, context)[1]
    expected = model(x, TIMES[1], context)
    hook = model.get_submodule(place).register_forward_hook(lambda module, args, out: 0 * out)
    zeroed = model(x, TIMES[1], context)
    # Also where the modulation was computed before the hook came.
    assert torch.equal(model(x, TIMES[1], context, None, given), zeroed) and not torch.equal(zeroed, expected)
    given = together(model, TIMES, context)[1]
    hook.remove()
    # And what was computed while it was there is not read without it, where it stands inside of a block.
    if "final" not in place and "t_embedder" not in place:
        assert torch.equal(model(x, TIMES[1], context, None, given), expected)


def test_gradients_reach_modulation_through_the_tables(model):
    x, context = torch.randn(24, 64), model.context(text_to_image([(4, 6)], [5]), torch.randn(5, CONFIG.cap_feat_dim))
    layer = model.layers[1].adaLN_modulation[0].requires_grad_()
    model(x, TIMES[1], context).square().sum().backward()
    step = 1e-2 * layer.bias.grad / layer.bias.grad.norm()
    with torch.no_grad():
        up, down = [], []
        for sign, into in ((1, up), (-1, down)):
            layer.bias += sign * step
            into.append(model(x, TIMES[1], context).double().square().sum())
            layer.bias -= sign * step
    # A central difference: its own error is of the order of the step squared.
    assert relative((up[0] - down[0]) / 2, (layer.bias.grad * step).sum()) < 1e-2
    assert layer.weight.grad.abs().sum() > 0


@pytest.fixture
def computed_ahead(monkeypatch):
    """Steps as on a GPU; what was computed together, by times."""
    monkeypatch.setattr(modulations, "EACH_PASS", ())
    made = []

    def counting(transformer, times, context):
        made.append(len(times))
        return together(transformer, times, context)

    monkeypatch.setattr(modulations, "together", counting)
    return made


REQUEST = {"prompt": "a red star", "height": 64, "width": 64, "seed": 1, "num_inference_steps": 4}


@pytest.mark.parametrize(
    "more", [{}, {"solver": "heun"}, {"guidance_scale": 2.0, "cfg_truncation": 0.4}, {"solver": "euler_ancestral"}]
)
@pytest.mark.sampled(1)
def test_a_picture_with_modulation_computed_ahead(computed_ahead, more):
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    with pytest.MonkeyPatch.context() as as_before:
        as_before.setattr(modulations, "EACH_PASS", ("cpu",))
        expected = pipe(**REQUEST, **more, output_type="latent").latents[0]
    assert computed_ahead == []
    got = pipe(**REQUEST, **more, output_type="latent").latents[0]
    assert 1e-9 < relative(got, expected) < 2e-5
    # All steps at once; without guidance later, once more from there on.
    assert computed_ahead[0] == 4 and len(computed_ahead) == (2 if "cfg_truncation" in more else 1)


def test_long_runs_compute_some_steps_at_a_time(computed_ahead, monkeypatch):
    monkeypatch.setattr(modulations, "STEPS_AHEAD", 3)
    Pipeline.load(device="cpu", dtype="fp32")(**REQUEST | {"num_inference_steps": 7}, output_type="latent")
    assert computed_ahead == [3, 3, 1]


def test_what_changes_between_steps_is_seen(computed_ahead):
    """A weight of the modulation that a user writes to between two steps acts from the next one on."""
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    transformer = pipe.transformer
    plain = [step.x for step in pipe.stream(**REQUEST)]
    steps = pipe.stream(**REQUEST)
    first = next(steps)
    with torch.no_grad():
        transformer.layers[0].adaLN_modulation[0].bias.add_(0.5)
    rest = list(steps)
    assert torch.equal(first.x, plain[0]) and not torch.allclose(rest[0].x, plain[1], atol=1e-4)
    assert computed_ahead == [4, 4, 3]


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")


def test_checks_of_a_loop_name_the_step():
    model, seen = (torch.nn.Linear(2, 2), None), []
    good, bad = torch.ones(2), torch.tensor([1.0, torch.nan])
    with pytest.raises(BackendError, match="velocity of step 1 is not finite"):
        FiniteChecks().add(bad, "velocity of step 1", lambda: seen.append(1), model)
    checks = FiniteChecks()
    for step, x in enumerate((good, bad, good, bad), 1):
        checks.add(x.as_subclass(Elsewhere), f"velocity of step {step}", lambda step=step: seen.append(step), model)
    assert seen == [1]
    with pytest.raises(BackendError, match="velocity of step 2 is not finite"):
        checks.finish()
    assert seen == [1, 2]
    checks.finish()
    for _ in range(FiniteChecks.WAITING - 1):
        checks.add(good.as_subclass(Elsewhere), "x", seen.clear, model)
    with pytest.raises(BackendError, match="the last"):
        checks.add(bad.as_subclass(Elsewhere), "the last", seen.clear, model)
