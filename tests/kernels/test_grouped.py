"""Groups of codes against the formula in float64, part by part; 8-bit rows through the kernel of `matmul` too."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from s3dit.kernels.dispatch import set_backend
from s3dit.kernels.gguf import GGUF
from s3dit.kernels.grouped import Form, grouped, hadamard, rotate
from s3dit.kernels.schemes import linear
from s3dit.model.linear import QuantLinear

E4M3 = torch.float8_e4m3fn


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def fill(scheme, out, in_):
    """Parts at random, of moderate numbers."""
    parts = {}
    for name, (shape, dtype) in scheme.spec(out, in_).items():
        if dtype == torch.uint8:
            parts[name] = torch.randint(0, 256, shape, dtype=dtype)
        elif dtype == torch.int8:
            parts[name] = torch.randint(-127, 128, shape, dtype=dtype)
        elif name == "rotation":
            parts[name] = hadamard(shape[1])
        else:
            parts[name] = torch.randn(shape).to(dtype)
    return parts


def by_formula(form, parts, out, in_):
    """The definition, element by element where groups are concerned."""
    exact = {name: part.double() for name, part in parts.items() if part.dtype != torch.uint8}
    if form.codes == "uint8":
        values = torch.empty(out, in_, dtype=torch.float64)
        values[:, 0::2] = exact["table"][0][(parts["weight"] % 16).long()]
        values[:, 1::2] = exact["table"][0][(parts["weight"] // 16).long()]
    else:
        values = exact["weight"]
    column = torch.arange(in_) // (form.group or in_)
    weight = values * exact["scale"][:, column]
    weight = weight.round().clamp(-127, 127) if form.rounded else weight
    weight = weight * exact.get("channel", 1.0)
    if form.offset:
        weight = weight + exact["offset"][:, column]
    if form.rotation:
        weight = weight @ torch.block_diag(*exact["rotation"].expand(in_ // form.rotation, -1, -1))
    weight = weight * exact.get("column", 1.0)
    return weight + exact["up"] @ exact["down"][0] if form.rank else weight


FORMS = {
    "rows": Form("int8"),
    "cut last group": Form("float8_e4m3fn", 48),
    "e5m2": Form("float8_e5m2"),
    "two levels": Form("uint8", 16, "float8_e4m3fn", channel=True),
    "rounded": Form("uint8", 16, channel=True, offset="float32", rounded=True, rotation=64),
    "powers of two": Form("float8_e4m3fn", 32, "float8_e8m0fnu"),
    "offset": Form("uint8", 64, "bfloat16", offset="bfloat16"),
    "turned": Form("int8", rotation=16),
    "turned, not by a power of four": Form("float8_e4m3fn", rotation=32),
    "everything": Form("uint8", 64, channel=True, offset="float32", rotation=32, column=True, rank=16),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [(1, 128), (33, 128), (2, 7, 128), (0, 128)])
def test_against_the_formula(name, shape, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("s3dit.kernels.scheme.WEIGHT_CHUNK", 128 * 9)
    form = FORMS[name]
    scheme = grouped(name, form)
    parts = fill(scheme, 40, 128)
    if form.scale == "float8_e8m0fnu":
        parts["scale"] = torch.randint(120, 130, (40, 4), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    exact = by_formula(form, parts, 40, 128)
    # fp32 with sums of a rotation's inputs
    assert relative(scheme.decode(parts), exact) < 1e-6
    for wide, bias in itertools.product((torch.float32, torch.bfloat16), (None, torch.randn(40))):
        x = torch.randn(shape).to(wide)
        expected = F.linear(x.double(), exact, None if bias is None else bias.double())
        # bf16: turned x, weight, branch and result are rounded once each
        for out in (linear(x, scheme, parts, bias), scheme.linear.reference(x, parts, bias)):
            assert out.dtype == wide and out.shape == (*shape[:-1], 40)
            assert not out.numel() or relative(out, expected) < (2e-6 if wide == torch.float32 else 2**-6)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("width", [128, 320])
@pytest.mark.sampled(6)
def test_kernel(name, width, device, dtype, poison):
    """In the interpreter, or on a GPU."""
    form = FORMS[name]
    scheme = grouped(name, form)
    parts = fill(scheme, 37, width)
    if form.scale == "float8_e8m0fnu":
        parts["scale"] = torch.randint(120, 130, (37, width // 32), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    exact = by_formula(form, parts, 37, width)
    parts = {key: part.to(device) for key, part in parts.items()}
    x, bias = torch.randn(3, 11, width, device=device).to(dtype), torch.randn(37, device=device)
    try:
        set_backend("triton")
        assert scheme.linear.choose(x, parts, bias).__name__ == "in_kernel"
        out = linear(x, scheme, parts, bias)
    finally:
        set_backend("auto")
    # as on the CPU: turned x, weight, branch and result are rounded once each, half a unit of 11 or 8 bits
    bound = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    assert out.dtype == dtype and relative(out, F.linear(x.double(), exact.to(device), bias.double())) < bound


@pytest.mark.parametrize("size", [2, 4, 8, 16, 64, 256])
def test_a_rotation_undoes_itself(size):
    matrix = hadamard(size)[0]
    assert torch.equal(matrix, matrix.T) and matrix.unique().numel() == 2
    # entries of 1 / sqrt(size), which fp32 rounds where that is no power of two
    assert torch.allclose(matrix.double() @ matrix.double(), torch.eye(size).double(), atol=1e-6)
    x = torch.randn(3, 256)
    assert relative(rotate(rotate(x, {"rotation": matrix[None]}), {"rotation": matrix[None]}), x) < 1e-6


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of 64, found 96"):
        grouped("a", Form("int8", rotation=64)).spec(4, 96)
    with pytest.raises(ValueError, match="multiple of 2, found 33"):
        grouped("a", Form("uint8")).spec(4, 33)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(48)


@pytest.mark.parametrize("name", ["rows", "cut last group", "everything", "Q4_K"])
@pytest.mark.sampled(1)
def test_in_a_compiled_graph(name):
    """One graph, of whatever operations, gives the same numbers."""
    scheme = GGUF[name] if name in GGUF else grouped(name, FORMS[name])
    layer = QuantLinear(scheme, 256, 40)
    layer.load_state_dict(fill(scheme, 40, 256) if name not in GGUF else {"weight": torch.zeros(40, 144).byte()})
    layer.requires_grad_(False)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(5, 256)
    assert torch.allclose(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
