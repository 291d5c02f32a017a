"""Layers in a number format: what swap replaces, and what that does to the velocity of the embedded model."""

import pytest
import torch

from s3dit import Pipeline
from s3dit.errors import BackendError
from s3dit.kernels.float_linear import ROWS
from s3dit.kernels.scheme import quantize_rows
from s3dit.kernels.schemes import SCHEMES
from s3dit.kernels.swiglu import swiglu
from s3dit.kernels.swiglu_linear import swiglu_linear
from s3dit.model.layout import text_to_image
from s3dit.model.linear import Linear, QuantLinear, swap, swiglu_layers

# Mean relative error against fp32, in bf16 arithmetic; the bounds of 5e-2, 4e-2 and 1e-1 are of more prompts than two.
BOUNDS = {"fp8": 6e-2, "fp8-weights": 5e-2, "int8": 4e-2, "int8-weights": 4e-2, "int4": 1.1e-1}


def blank(inner=128):
    with torch.device("meta"):
        return torch.nn.ModuleDict({"a": Linear(inner, 32), "b": Linear(inner, 32, bias=False)})


def test_swap_takes_what_fits_the_predicate():
    model = blank()
    swap(model, SCHEMES["int8"], lambda name: name == "b")
    assert type(model["a"]) is Linear and type(model["b"]) is QuantLinear
    assert list(model.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.scale"]
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert (model["a"].input_dtype, model["b"].input_dtype) == (None, torch.int8)
    swap(model, SCHEMES["int4"], lambda name: name == "a")
    assert repr(model["a"]) == "QuantLinear(128, 32, int4, bias=True)"
    assert set(model["a"].state_dict()) == {"bias", "weight", "scale", "zero"} and model["a"].input_dtype is None


@pytest.mark.parametrize(
    ("name", "model", "where", "words"),
    [
        ("int4", blank(100), "a", "a: int4 needs an input width that is a multiple of 64, found 100"),
        ("int8", blank(), "c", "no linear layer of ModuleDict"),
        ("int8", torch.nn.ModuleDict({"a": Linear(64, 2)}), "a", "a is filled already"),
    ],
)
def test_swap_refuses(name, model, where, words):
    with pytest.raises(BackendError, match=words):
        swap(model, SCHEMES[name], lambda found: found == where)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_multiplies_by_its_parts(name):
    scheme, weight, bias = SCHEMES[name], torch.randn(32, 128), torch.randn(32)
    layer = QuantLinear(scheme, 128, 32, bias=True).requires_grad_(False)
    layer.load_state_dict(scheme.encode(weight) | {"bias": bias}, assign=True)
    x = torch.randn(3, 5, 128)
    met = x if layer.input_dtype is None else quantize_rows(x, layer.input_dtype).dequantize()
    expected = met.double() @ scheme.decode(scheme.encode(weight)).double().T + bias
    # fp32 sums over 128 products; what the formats themselves round is on both sides.
    assert ((layer(x) - expected).norm() / expected.norm()) < 2e-6
    if layer.input_dtype is not None:
        assert torch.equal(layer(quantize_rows(x, layer.input_dtype)), layer(x))


def test_two_layers_run_as_one_op_unless_somebody_looks():
    """The bits are those of two layers; hooks, other formats and biases get what they always do."""
    calls, x = [], torch.randn(5, 128)

    def fused(*args):
        calls.append(args)
        return swiglu_linear.reference(*args)

    def layers(*schemes, bias=False):
        made = [QuantLinear(SCHEMES[name], 128, 64, bias) if name else Linear(128, 64, bias=bias) for name in schemes]
        for layer, name in zip(made, schemes, strict=True):
            layer.load_state_dict(SCHEMES[name].encode(torch.randn(64, 128)) if name else {}, strict=False)
        return made

    gate, up = layers("int8", "int8")
    expected = swiglu(gate(x), up(x))
    assert torch.equal(swiglu_layers(gate, up, x, None), expected)
    assert torch.equal(swiglu_layers(gate, up, x, torch.int8).values, quantize_rows(expected, torch.int8).values)
    with torch.no_grad(), swiglu_linear.using(fused):
        swiglu_layers(gate, up, x, None)
        assert len(calls) == 1
        for pair in (
            layers("int8", "fp8"),
            layers("int4", "int4"),
            layers(None, None),
            layers("int8", "int8", bias=True),
        ):
            swiglu_layers(*pair, x, None)
        seen = []
        handle = up.register_forward_hook(lambda *args: seen.append(args))
        swiglu_layers(gate, up, x, None)
        handle.remove()
        assert len(calls) == 1 and len(seen) == 1


def test_a_replaced_operation_is_not_computed_inside_of_another():
    """Else somebody who replaces swiglu, or looks at it, would see nothing of it on a GPU."""
    fusible = next(each.when for each in swiglu_linear.implementations if each.backend == "triton")
    parts = SCHEMES["int8"].encode(torch.randn(32, 64))
    args = quantize_rows(torch.randn(4, 64), torch.int8), SCHEMES["int8"], parts, parts
    assert fusible(*args) is True
    with swiglu.using(swiglu.reference):
        assert "is replaced" in str(fusible(*args))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 33])
def test_a_wide_layer_of_bf16_is_upcast_piece_by_piece(bias, rows):
    """What bf16 models do on CPUs that are slow in bf16, in layers of more than ROWS outputs; also a last piece cut."""
    layer = Linear(96, 2 * ROWS + 40, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(2, rows, 96)
    whole = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    found = layer(x)
    assert found.dtype == torch.float32 and found.shape == (2, rows, 2 * ROWS + 40)
    # fp32 sums over 96 products.
    assert ((found - whole).norm() / whole.norm()) < 1e-6


@pytest.fixture(scope="module")
def states():
    """Inputs of the transformer along a trajectory in fp32, and the velocities there."""
    pipe = Pipeline.load(device="cpu", dtype="fp32", residency="resident")
    found = []
    for prompt in ("a red star above a blue ring on a white background", "black background, large pink heart"):
        steps = list(pipe.stream(prompt=prompt, seed=1))
        text = pipe.encode([prompt])[0]
        found += [(text, step.start, step.sigma, step.velocity) for step in steps]
    return found


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.sampled(1)
def test_velocity_error(states, name):
    pipe = Pipeline.load(device="cpu", dtype="bf16", quantize=name)
    transformer, errors = pipe.parts["transformer"], []
    for text, x, sigma, expected in states:
        with torch.inference_mode():
            context = transformer.context(text_to_image([(8, 8)], [len(text)]), text.to(pipe.placement.compute))
            found = transformer(x, 1 - torch.tensor([sigma]), context).float()
        errors.append(float((found - expected).norm() / expected.norm()))
    assert 1e-3 < sum(errors) / len(errors) < BOUNDS[name], errors
