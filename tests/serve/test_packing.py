"""Calls of several requests in one pass: what each is answered is what it is answered alone."""

import torch

from s3dit.model.config import TransformerConfig
from s3dit.model.edit_layout import edit
from s3dit.model.layout import text_to_image
from s3dit.model.transformer import Transformer
from s3dit.serve.packing import Call, join

SMALL = {
    "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 96, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 32,
    "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 12, 12],
}  # fmt: skip
# Sums in fp32 over at most 256 products, in another order.
BOUND = 1e-6
# Grids of patches and lengths of captions of the items of every call.
CALLS = [([(4, 4)], [5]), ([(2, 7), (6, 4)], [40, 1]), ([(4, 4)], [33]), ([(8, 8)] * 4, [3, 3, 64, 2])]


def transformer(**more):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.from_json(SMALL | more, "test")).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model


def call(model, layout, seed, times=(0.3,), count=0):
    """A call of a layout with random states and features; count: of patches and features of references."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=next(model.parameters()).dtype)

    seen = ()
    if layout.vision is not None:
        seen = random(len(layout.clean), 64), random(len(layout.vision.token_index), 24)
    context = model.context(layout, random(len(layout.text.token_index), 32), *seen)
    t = torch.tensor([times if len(times) > 1 else times[0]])
    return Call(
        random(len(layout.image.token_index), 64), t, context, model.modulation(context.times(t), random(1).dtype)
    )


def answers(model, calls):
    joined = join(calls)
    out = model(joined.x, joined.t, joined.context, None, joined.modulation)
    # What the model computes by itself of the joined times must be what was handed over.
    own = model(joined.x, joined.t, joined.context)
    assert torch.allclose(own, out, rtol=0, atol=1e-5)
    return out.split([len(each.x) for each in calls])


def largest(model, calls):
    """The largest relative difference between an answer in company and the one alone."""
    alone = [model(each.x, each.t, each.context) for each in calls]
    pairs = zip(answers(model, calls), alone, strict=True)
    return max(((got - expected).double().norm() / expected.double().norm()).item() for got, expected in pairs)


def test_other_sizes_captions_and_times():
    model = transformer()
    calls = [call(model, text_to_image(*given), i, (0.1 * i,)) for i, given in enumerate(CALLS)]
    assert largest(model, calls) <= BOUND
    assert largest(model, calls[::-1]) <= BOUND
    assert join(calls[:1]) is calls[0]
    assert join(calls).tokens == sum(each.tokens for each in calls) and join(calls).items == 8


def test_two_times_of_a_twinflow_model():
    model = transformer(target_timestep=True)
    calls = [call(model, text_to_image(*given), i, (0.1 * i, 0.1 * i + 0.2)) for i, given in enumerate(CALLS)]
    assert largest(model, calls) <= BOUND


def test_references_beside_none():
    """Clean tokens of any item read the one row of their time, and each finds its own vision tokens."""
    model = transformer(siglip_feat_dim=24)
    one = [((2, 4), (3, 3))]
    layouts = [
        edit([(4, 4)], [[7]], [()]),
        edit([(4, 4), (2, 3)], [[7, 4, 9], [35]], [one, ()]),
        edit([(6, 4)], [[5, 3, 1, 2]], [[*one, ((4, 4), (2, 5))]]),
    ]
    calls = [call(model, layout, i, (0.2 + 0.1 * i,)) for i, layout in enumerate(layouts)]
    for order in (calls, calls[::-1], calls[1:]):
        assert largest(model, order) <= BOUND


def test_kinds():
    model = transformer()
    layout = text_to_image(*CALLS[0])
    other = call(model.to(torch.float64), layout, 0)
    assert call(model.float(), layout, 0).kind == call(model, text_to_image(*CALLS[1]), 1).kind != other.kind
