"""Layers that read one input, their weights end to end: the same numbers by fewer products, and layers of their own.

They are joined on GPUs only; here a CPU is taken for one.
"""

import pytest
import torch

from s3dit import Pipeline
from s3dit.kernels.schemes import SCHEMES
from s3dit.model import linear
from s3dit.model.linear import Linear, QuantLinear, joint
from s3dit.runtime import components
from s3dit.runtime.joining import join

DRAW = {"prompt": "a red star above a blue ring", "seed": 7, "num_inference_steps": 2, "output_type": "latent"}


class Layers(torch.nn.Module):
    joinable = (("q", "k", "v"),)

    def __init__(self, *layers):
        super().__init__()
        self.q, self.k, self.v = layers


def plain(out, in_=64):
    layer = Linear(in_, out, bias=False)
    return layer.requires_grad_(False)


def quantized(scheme, out, in_=64):
    layer = QuantLinear(SCHEMES[scheme], in_, out)
    layer._buffers.update(SCHEMES[scheme].encode(torch.randn(out, in_)))
    return layer


@pytest.fixture
def on_cpu(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "JOINED_ON", ("cpu",))
    monkeypatch.setattr(components, "JOINED_ON", ("cpu",))


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_one_product_gives_what_three_give(scheme, on_cpu):
    make = plain if scheme is None else lambda out: quantized(scheme, out)
    model = Layers(make(32), make(16), make(16))
    x, before = torch.randn(40, 64), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apart = [layer(x) for layer in (model.q, model.k, model.v)]
    join(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert linear._joined(x, (model.q, model.k, model.v)) is not None
    for got, expected in zip(joint(x, (model.q, model.k, model.v)), apart, strict=True):
        assert got.shape == expected.shape
        assert ((got - expected).norm() / expected.norm()) < 1e-6


def test_two_formats_are_joined_each(on_cpu):
    """int4's recipe: v is of another format, so q and k are one product and v another."""
    model = Layers(quantized("int4", 32), quantized("int4", 16), quantized("int8-weights", 16))
    x = torch.randn(40, 64)
    apart = [layer(x) for layer in (model.q, model.k, model.v)]
    join(model)
    assert linear._joined(x, (model.q, model.k)) and not linear._joined(x, (model.q, model.k, model.v))
    for got, expected in zip(joint(x, (model.q, model.k, model.v)), apart, strict=True):
        assert ((got - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("change", ["hook", "replaced", "moved", "gradient"])
def test_a_layer_that_is_looked_at_or_changed_goes_by_itself(change, on_cpu):
    model = Layers(plain(32), plain(16), plain(16))
    join(model)
    x, seen = torch.randn(40, 64), []
    if change == "hook":
        model.k.register_forward_hook(lambda *args: seen.append(1))
    elif change == "replaced":
        model.k.weight = torch.nn.Parameter(2 * model.k.weight, requires_grad=False)
    elif change == "moved":
        model.k.forward = lambda x: 3 * torch.nn.functional.linear(x, model.k.weight)
    else:
        model.k.weight.requires_grad_(True)
    expected = [layer(x) for layer in (model.q, model.k, model.v)]
    seen.clear()
    got = joint(x, (model.q, model.k, model.v))
    assert linear._joined(x, (model.q, model.k, model.v)) is None
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected, strict=True))
    assert change != "hook" or seen == [1]


def test_a_change_in_place_is_multiplied_by(on_cpu):
    model = Layers(plain(32), plain(16), plain(16))
    join(model)
    x = torch.randn(40, 64)
    with torch.no_grad():
        model.k.weight.mul_(2)
    assert linear._joined(x, (model.q, model.k, model.v)) is not None
    assert torch.allclose(joint(x, (model.q, model.k, model.v))[1], model.k(x), atol=1e-6)


@pytest.mark.parametrize("load", [{}, {"quantize": "int4"}, {"quantize": "int8"}], ids=str)
@pytest.mark.slow
def test_pictures_of_joined_parts(load, on_cpu, monkeypatch):
    """A whole picture, adapters merged and taken off, and a parameter of a user's: as without joining."""

    def drawn(joined):
        monkeypatch.setattr(linear, "JOINED_ON", ("cpu",) if joined else ())
        monkeypatch.setattr(components, "JOINED_ON", ("cpu",) if joined else ())
        pipe = Pipeline.load(device="cpu", dtype="fp32", residency="resident", **load)
        first = pipe(**DRAW).latents[0]
        layer = pipe.transformer.layers[0].attention
        if joined:
            together = linear._joined(torch.zeros(4, 192), (layer.to_q, layer.to_k))
            assert together is not None
        with torch.no_grad():
            pipe.transformer.layers[1].attention_norm1.weight.mul_(1.01)
        changed = pipe(**DRAW).latents[0]
        pipe.parts.restore("transformer")
        return first, changed, pipe(**DRAW).latents[0]

    apart, joined = drawn(False), drawn(True)
    for a, b in zip(apart, joined, strict=True):
        # Seen: equal. A wider product may add up in another order.
        assert ((a - b).norm() / a.norm()).item() < 1e-5
    assert torch.equal(joined[0], joined[2]) and not torch.equal(joined[0], joined[1])
