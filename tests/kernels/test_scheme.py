"""What every number format promises: its parts, its error, encoding twice, NaN, awkward shapes on a CPU."""

import pytest
import torch

from s3dit.kernels.scheme import INPUT_CHUNK, MAX_CODES, QuantizedRows, cast_codes, quantize_rows
from s3dit.kernels.schemes import SCHEMES, linear

# Largest relative error of a Gaussian weight: half a step of int8 at 4 sigma, 3 bits of mantissa, 15 steps of a group.
ERROR = {"fp8": 0.03, "fp8-weights": 0.03, "int8": 0.01, "int8-weights": 0.01, "int4": 0.09}


@pytest.fixture(params=SCHEMES)
def scheme(request):
    torch.manual_seed(0)
    return SCHEMES[request.param]


def weights(scheme):
    """A weight with an outlier, a row and a group of zeros, and a group on one side of zero."""
    w = torch.randn(100, 192) * 0.02
    w[1, 5], w[2], w[3, :64] = 3.0, 0.0, 0.0
    w[4, 64:128] = w[4, 64:128].abs() + 0.1
    return w


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_parts_are_what_spec_says(scheme):
    parts = scheme.encode(weights(scheme).bfloat16())
    assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == scheme.spec(100, 192)
    decoded = scheme.decode(parts)
    assert decoded.dtype == torch.float32 and not decoded[2].any()


def test_error_of_a_gaussian_weight(scheme):
    w = torch.randn(256, 768)
    assert relative(scheme.decode(scheme.encode(w)), w) < ERROR[scheme.name]


def test_encoding_again_changes_nothing(scheme):
    parts = scheme.encode(weights(scheme))
    again = scheme.encode(scheme.decode(parts))
    assert all(torch.equal(parts[name].float(), again[name].float()) for name in parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_unfit_weights_are_refused(scheme, value):
    w = weights(scheme)
    w[7, 9] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        scheme.encode(w)


@pytest.mark.parametrize("shape", [(1, 192), (31, 192), (2, 33, 192), (0, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_against_float64(scheme, shape, dtype):
    x, bias = torch.randn(shape).to(dtype), torch.randn(100)
    parts = scheme.encode(weights(scheme))
    exact = x.double()
    if scheme.activation is not None:
        # An independent statement: a row's largest magnitude becomes the largest number of the type.
        step = exact.abs().amax(-1, keepdim=True) / MAX_CODES[scheme.activation]
        rounded = x.float() * (1.0 / step).float()
        exact = (rounded.round() if scheme.activation == torch.int8 else rounded).to(scheme.activation).double() * step
    expected = exact @ scheme.decode(parts).double().T + bias.double()
    for found in (linear(x, scheme, parts, bias), scheme.linear.reference(x, parts, bias)):
        assert found.shape == (*shape[:-1], 100) and found.dtype == dtype
        # bf16: the product is rounded once or twice, the int4 weight once more, half a unit in the last of 8 bits each
        assert not found.numel() or relative(found, expected) < (2e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize(
    "scheme", [one for one in SCHEMES.values() if one.activation is not None], ids=lambda s: s.name
)
def test_rows_may_be_handed_over(scheme):
    x, parts = torch.randn(33, 192).bfloat16(), scheme.encode(weights(scheme))
    assert torch.equal(linear(quantize_rows(x, scheme.activation), scheme, parts), linear(x, scheme, parts))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_stay_so_and_alone(scheme, value):
    x, parts = torch.randn(5, 192), scheme.encode(weights(scheme))
    clean = linear(x, scheme, parts)
    x[3, 7] = value
    found = linear(x, scheme, parts)
    assert not found[3].isfinite().any()
    assert torch.equal(found[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_in_runs_are_the_same_rows(dtype):
    x = torch.randn(3, INPUT_CHUNK // 128, 192).bfloat16().transpose(0, 1)
    x[5] = 0
    whole = quantize_rows(x, dtype)
    assert isinstance(whole, QuantizedRows) and whole.dtype == torch.bfloat16 and whole.shape == x.shape
    for i in (0, 5, len(x) - 1):
        one = quantize_rows(x[i], dtype)
        assert torch.equal(one.values.float(), whole.values[i].float()) and torch.equal(one.scale, whole.scale[i])
    assert relative(whole.dequantize(), x) < 0.03


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_are_within_half_a_code(dtype):
    x = torch.randn(300, 257) * torch.logspace(-6, 6, 300)[:, None]
    rows = quantize_rows(x, dtype)
    codes = x.double() / rows.scale.double()
    # Half a step of int8; of e4m3 2^-4 of the number, or half of its smallest, 2^-10. One part in 10⁶: fp32 on the way.
    half = 0.5 if dtype == torch.int8 else (codes.abs() * 2**-4).clamp(min=2**-10)
    assert ((codes - rows.values.double()).abs() <= half + 1e-6 * codes.abs()).all()
    assert (rows.values.float().abs().amax(1) == MAX_CODES[dtype]).all()
    # The largest is 127, so the scale is 1 and ties are exact: to even.
    ties = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5, -126.5]]), torch.int8)
    assert ties.scale.item() == 1.0 and ties.values.tolist() == [[127, 0, 2, -2, 126, -126]]


def test_widths_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of 64, found 100"):
        SCHEMES["int4"].spec(10, 100)


def test_every_e4m3_is_cast_exactly():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()]
    assert torch.equal(cast_codes(codes, torch.bfloat16), codes.bfloat16())
    assert torch.equal(cast_codes(codes, torch.float32), codes.float())


def test_int4_packs_the_even_code_low():
    w = torch.zeros(1, 64)
    w[0, :4] = torch.tensor([0.0, 15.0, 1.0, 2.0])
    parts = SCHEMES["int4"].encode(w)
    assert parts["weight"][0, :2].tolist() == [0xF0, 0x21] and float(parts["zero"]) == 0 and float(parts["scale"]) == 1


def test_int8_without_integer_products(monkeypatch):
    """CPUs without 8-bit dot products give the same numbers in floating point, to the rounding of sums."""
    from s3dit.kernels import int8

    x, parts = torch.randn(33, 192), SCHEMES["int8"].encode(torch.randn(100, 192))
    expected = linear(x, SCHEMES["int8"], parts)
    assert int8.int8_linear.choose(x, parts, None) is (int8._integers if int8.INTEGER_DOT else int8._dequantized)
    monkeypatch.setattr(int8, "INTEGER_DOT", False)
    assert int8.int8_linear.choose(x, parts, None) is int8._dequantized
    assert relative(linear(x, SCHEMES["int8"], parts), expected) < 1e-6
