"""Products against float64: in Triton's interpreter with tiny tiles, and on a GPU, where there is one, also in bf16.

Tolerances are relative. fp32 results 1e-6: fp32 sums of at most some hundred products. fp16 and bf16 results half a
unit in the last place, 2⁻¹¹ and 2⁻⁸. e4m3 on a GPU 1e-3: a Hopper tensor core keeps about 14 bits of such a sum.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from s3dit.errors import BackendError
from s3dit.kernels import dispatch, fp8, int8, matmul, scheme, tune
from s3dit.kernels import mixed_matmul as mixed
from s3dit.kernels.dispatch import INTERPRETED, set_backend
from s3dit.kernels.matmul import Tile, best_tile, launch_scaled, scaled_matmul, tile_candidates
from s3dit.kernels.mixed_matmul import dequantize_weight, launch_mixed, mixed_matmul, packed_weight
from s3dit.kernels.rows import launch_quantize_rows
from s3dit.kernels.schemes import SCHEMES, linear
from s3dit.kernels.swiglu_linear import swiglu_linear

CUDA = torch.cuda.is_available()
FP8 = torch.float8_e4m3fn
WIDE = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}

needs_triton = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="Triton needs a GPU or TRITON_INTERPRET=1")
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@pytest.fixture
def device():
    return "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is full of NaN, or of a number that no test expects."""
    fresh = torch.empty

    def poisoned(*args, **kwargs):
        out = fresh(*args, **kwargs)
        if out.dtype == FP8:
            out.view(torch.uint8).fill_(0x7F)
        else:
            out.fill_(float("nan") if out.is_floating_point() else 85)
        return out

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: poisoned(x.shape, dtype=x.dtype, device=x.device))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def numbers(*shape, dtype, device):
    """Gaussian numbers that any dtype can hold."""
    x = torch.randn(shape, device=device) * 30
    return (x.round().clamp(-127, 127) if dtype == torch.int8 else x).to(dtype)


def quantized(x, dtype):
    """Rows rounded by the Triton kernel."""
    return scheme.QuantizedRows(*launch_quantize_rows(x, dtype), x.dtype)


def skip_without_e4m3(dtype):
    if dtype == FP8 and CUDA and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs capability 8.9")


# K of whole blocks and not; rows of 16 bytes, so that all can be described.
SHAPES = [(1, 32, 64), (31, 80, 96), (32, 64, 128), (33, 48, 144), (63, 112, 32), (100, 80, 80)]


@needs_triton
@pytest.mark.parametrize("dtype", [*WIDE, torch.int8, FP8])
@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.sampled(5)
def test_scaled_matmul(dtype, described, m, n, k, device):
    skip_without_e4m3(dtype)
    if described and CUDA and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need capability 9.0")
    x, weight = numbers(m, k, dtype=dtype, device=device), numbers(n, k, dtype=dtype, device=device)
    x_scale, w_scale = torch.rand(m, 1, device=device) + 0.1, torch.rand(n, 1, device=device) + 0.1
    bias = torch.randn(n, device=device)
    expected = x.double() @ weight.double().T * x_scale * w_scale.T + bias
    depth = 32 if k % 64 else 64
    for tile in (Tile(32, 32, depth, 4, 2, group=2), Tile(16, 64, 64, 4, 3, halves=True, promote=True, flatten=False)):
        out = launch_scaled(x, weight, x_scale, w_scale, bias, torch.float32, tile, described)
        assert relative(out, expected) < (1e-3 if dtype == FP8 and CUDA else 1e-6)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.sampled(4)
def test_scaled_swiglu(dtype, described, first, m, n, k, device):
    """Whichever of the two weights lies first, and whatever lies between them."""
    skip_without_e4m3(dtype)
    if described and CUDA and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need capability 9.0")
    x, both = numbers(m, k, dtype=dtype, device=device), numbers(2 * n + 32, k, dtype=dtype, device=device)
    gate, up = (both[start : start + n] for start in ((0, n + 32) if first == 0 else (n + 32, 0)))
    # Products of a few units, where SwiGLU is neither 0 nor linear.
    x_scale, *scales = ((torch.rand(size, 1, device=device) + 0.1) / 30 / k**0.25 for size in (m, n, n))
    a, b = (x.double() * x_scale @ (w.double() * s).T for w, s in zip((gate, up), scales, strict=True))
    depth = 32 if k % 64 else 64
    for tile in (Tile(32, 32, depth, 4, 2, group=2), Tile(16, 64, 64, 4, 3, halves=True, promote=True, flatten=False)):
        out = launch_scaled(
            x, gate, x_scale, scales[0], None, torch.float32, tile, described, up=up, up_scale=scales[1]
        )
        assert relative(out, F.silu(a) * b) < (2e-3 if dtype == FP8 and CUDA else 2e-6)


@needs_triton
@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.slow
def test_swiglu_of_two_layers(name, device, force):
    """The Op rounds x, multiplies, and rounds for the next layer, also in one graph for any number of rows."""
    chosen = SCHEMES[name]
    skip_without_e4m3(chosen.activation)
    parts = [{p: t.to(device) for p, t in chosen.encode(torch.randn(80, 128) / 8).items()} for _ in range(2)]
    force("triton")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: swiglu_linear(x, chosen, *parts), fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 33):
        x = torch.randn(2, rows, 128, device=device).half()
        out, expected = swiglu_linear(x, chosen, *parts), swiglu_linear.reference(x, chosen, *parts)
        # fp16 rounds the result, and in the reference both products.
        assert out.dtype == expected.dtype and relative(out, expected) < 2**-9
        assert torch.equal(compiled(x), out)
        assert torch.equal(
            swiglu_linear(x, chosen, *parts, torch.int8).values, launch_quantize_rows(out, torch.int8)[0]
        )
    assert counter.frame_count == 1
    with pytest.raises(BackendError, match="multiplies int8 and e4m3 rows, found int4"):
        swiglu_linear(x, SCHEMES["int4"], *parts)


@needs_triton
@pytest.mark.parametrize("out_dtype", WIDE)
def test_without_scales_and_bias(out_dtype, device):
    x, weight = numbers(33, 64, dtype=torch.float16, device=device), torch.randn(48, 64, device=device).half()
    out = scaled_matmul(x, weight, None, None, None, out_dtype)
    assert out.dtype == out_dtype
    assert relative(out, x.double() @ weight.double().T) < ROUNDING[out_dtype]


@needs_triton
def test_rows_that_lie_apart(device):
    """Leading axes, a row stride that descriptors take and one that they do not, columns that lie apart, no rows."""
    base, weight = torch.randn(3, 7, 200, device=device), torch.randn(40, 64, device=device)
    wide = base.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (base[..., 8:72], base[..., 1:65], wide[..., :64], base[..., ::3][..., :64], base[:, :0, :64]):
        out = scaled_matmul(x, weight, None, None, None, torch.float32)
        assert out.shape == (*x.shape[:-1], 40)
        assert not x.numel() or relative(out, x.double() @ weight.double().T) < 1e-6
        out = mixed_matmul(x, weight.to(torch.int8), torch.ones(40, 1, device=device), None, None)
        assert not x.numel() or relative(out, x.double() @ weight.to(torch.int8).double().T) < 1e-6


def test_choice_of_tiles():
    """Large tiles where they fill all SMs, smaller ones where they would leave half of them idle, none too large."""
    assert best_tile(4224, 20480, 2, 2, 132, True)[:2] == (128, 256)
    assert best_tile(1088, 3840, 2, 2, 132, True)[:2] != (128, 256)
    assert best_tile(64, 2560, 1, 2, 132, True)[:2] == (64, 64)
    for described, limit in ((True, 227), (False, 99)):
        for itemsize in (1, 2):
            for out_itemsize in (2, 4):
                for m in (32, 1088, 4224, 16512):
                    tile = best_tile(m, 3840, itemsize, out_itemsize, 132, described)
                    copies = tile.stages * (tile.m + tile.n) * tile.k * itemsize
                    out = tile.m * tile.n * out_itemsize // (1 + tile.halves) if described else 0
                    assert copies + out < limit * 1024
                    given = tile_candidates(itemsize, out_itemsize, described)
                    assert tile in (Tile(**fields) for fields in given)


def weights(kind, n, k, device):
    """Parts of a random weight and, in float64, what they stand for."""
    if kind.startswith("int4"):
        packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        # bf16, as the format stores it; the interpreter moves bf16 rightly as long as it computes nothing in it.
        scale = torch.randn(n, k // 64, device=device).bfloat16()
        zero = torch.rand(n, k // 64, device=device).mul(15).half() if kind == "int4 zero" else None
        codes = torch.stack((packed & 15, packed >> 4), -1).view(n, -1, 64).double()
        origin = 8.0 if zero is None else zero.double()[..., None]
        return (packed, scale, zero), ((codes - origin) * scale.double()[..., None]).flatten(1)
    weight = numbers(n, k, dtype=torch.int8 if kind == "int8" else FP8, device=device)
    scale = torch.rand(n, 1, device=device) + 0.1
    return (weight, scale, None), weight.double() * scale


KINDS = ["int8", "fp8", "int4", "int4 zero"]


@needs_triton
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m, n, k, splits", [(1, 48, 128, 1), (33, 80, 192, 2), (63, 33, 192, 3), (100, 64, 64, 1)])
@pytest.mark.sampled(3)
def test_few_rows(dtype, kind, m, n, k, splits, device):
    """fp16 and bf16 round 4-bit weights once more; the others are exact in them."""
    skip_without_e4m3(FP8 if kind == "fp8" else None)
    parts, weight = weights(kind, n, k, device)
    x, bias = torch.randn(m, k, device=device).to(dtype), torch.randn(n, device=device)
    for b in (None, bias):
        out = launch_mixed(x, packed_weight(*parts), b, block_m=32, block_n=32, splits=splits)
        expected = F.linear(x.double(), weight, None if b is None else b.double())
        assert out.dtype == dtype
        assert relative(out, expected) < 2 * ROUNDING[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_and_many_rows(dtype, kind, device, monkeypatch):
    skip_without_e4m3(FP8 if kind == "fp8" else None)
    parts, weight = weights(kind, 33, 320, device)
    assert relative(dequantize_weight(*parts, dtype), weight) < ROUNDING[dtype]
    monkeypatch.setattr(mixed, "FUSED_ROWS", 16)
    x, bias = torch.randn(2, 9, 320, device=device).to(dtype), torch.randn(33, device=device)
    out = mixed_matmul(x, *parts, bias)
    assert relative(out, F.linear(x.double(), weight, bias.double())) < 2 * ROUNDING[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("k", [1, 33, 100, 256])
def test_quantize_rows(dtype, k, device):
    """As scheme.quantize_rows does, bit for bit."""
    skip_without_e4m3(dtype)
    x = torch.randn(3, 4, k + 5, device=device)[..., 5:] * torch.logspace(-6, 6, 12, device=device).view(3, 4, 1)
    x[0, 0] = 0
    x = x[:, 1:] if k == 100 else x
    got, expected = quantized(x, dtype), scheme.quantize_rows(x, dtype)
    assert got.original_dtype == x.dtype and got.scale.shape == (*x.shape[:-1], 1)
    assert torch.equal(got.scale, expected.scale)
    assert torch.equal(got.values.float(), expected.values.float())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_a_nan_spoils_its_row_and_no_other(dtype, device):
    """int8 has no NaN: without care the row would come back as plausible numbers."""
    skip_without_e4m3(dtype)
    x, weight = torch.randn(3, 32, device=device), numbers(32, 32, dtype=dtype, device=device)
    x[1, 5] = float("nan")
    rows = quantized(x, dtype)
    out = scaled_matmul(rows.values, weight, rows.scale, None, None, torch.float32)
    assert not out[1].isfinite().any()
    assert out[::2].isfinite().all()


@needs_triton
def test_one_graph_for_all_lengths(device):
    """torch.compile sees opaque nodes, without a break, and compiles nothing anew for another number of rows."""
    weight, scale = numbers(48, 64, dtype=torch.int8, device=device), torch.rand(48, 1, device=device)

    def layer(x):
        rows = quantized(x, torch.int8)
        return scaled_matmul(rows.values, weight, rows.scale, scale, None, x.dtype) + mixed_matmul(
            x, weight, scale, None, None
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 9, 33):
        x = torch.randn(2, rows, 64, device=device)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.fixture
def force():
    """set_backend, undone after the test."""
    yield set_backend
    set_backend("auto")


@needs_triton
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows", [(2, 3), (2, 33)])
def test_schemes_by_triton(name, rows, device, force):
    """Forced, the kernels give for each format what its reference gives."""
    chosen = SCHEMES[name]
    skip_without_e4m3(FP8 if "fp8" in name else None)
    parts = {part: t.to(device) for part, t in chosen.encode(torch.randn(80, 128)).items()}
    x, bias = torch.randn(*rows, 128, device=device).half(), torch.randn(80, device=device)
    expected = chosen.linear.reference(x, parts, bias)
    force("triton")
    out = linear(x, chosen, parts, bias)
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert relative(out, expected) < 2**-10


@pytest.mark.parametrize("name", SCHEMES)
def test_formats_without_triton(name):
    """Of the implementations for GPUs those of torch alone, which run on CPUs as well."""
    chosen = SCHEMES[name]
    parts = chosen.encode(torch.randn(80, 128))
    x, bias = torch.randn(2, 33, 128, dtype=torch.bfloat16), torch.randn(80)
    expected = chosen.linear.reference(x, parts, bias)
    implementations = [s for s in chosen.linear.implementations if (s.device, s.backend) == ("cuda", "torch")]
    assert implementations
    for implementation in implementations:
        if implementation.function is int8._int_mm and not int8.INTEGER_DOT:
            continue  # This CPU's integer product saturates, so it cannot play the GPU's.
        if implementation.function is fp8._scaled_mm and fp8.why_refused(66, parts["weight"], True):
            continue  # torch before 2.12 has no row-wise product on a CPU.
        # Wide x: bf16 rounds the weight and the result.
        assert relative(implementation.function(x, parts, bias), expected) < 2**-7


def test_what_a_gpu_lacks_is_explained(monkeypatch):
    parts = SCHEMES["fp8"].encode(torch.randn(32, 64))
    x = torch.randn(4, 64).half()
    monkeypatch.setattr(dispatch, "capability", lambda device: (8, 0))
    monkeypatch.setattr(dispatch, "_device", lambda args: "cuda")
    lines = SCHEMES["fp8"].linear.explain(x, parts, None)
    assert any(backend == "triton" and "capability 8.9, found 8.0" in why for _, backend, why in lines)
    monkeypatch.setattr(dispatch, "_backend", "triton")
    with pytest.raises(BackendError, match="capability 8.9, found 8.0"):
        SCHEMES["fp8"].linear(x, parts, None)


@needs_triton
def test_sizes_that_torchs_row_wise_product_refuses(device, monkeypatch):
    """They are found by one try, and our own product runs; nothing is tried while a graph is recorded."""
    skip_without_e4m3(FP8)
    parts = {part: t.to(device) for part, t in SCHEMES["fp8"].encode(torch.randn(80, 128)).items()}
    linear_op, x, calls = SCHEMES["fp8"].linear, torch.randn(33, 128, device=device).bfloat16(), []

    def refuse(x, *args, **kwargs):
        calls.append(len(x))
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nwhen calling")

    monkeypatch.setattr(fp8, "_refusals", {})
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    monkeypatch.setattr(fp8, "why_unsupported", lambda *args: "")
    monkeypatch.setattr(dispatch, "_device", lambda args: "cuda")
    for rows in (33, 33, 7, 7, 300, 400):
        reasons = {name: why for name, _, why in linear_op.explain(x[:1].expand(rows, -1), parts, None)}
        assert reasons["scaled_mm"] == "torch's row-wise product refuses: CUBLAS_STATUS_NOT_SUPPORTED"
    assert calls == [33, 7, 256]
    values, scale, _ = scheme.quantize_rows(x, FP8)
    out = fp8.row_wise_matmul(values, parts["weight"], scale, parts["scale"], None, torch.float32)
    expected = values.double() * scale @ (parts["weight"].double() * parts["scale"]).T
    assert calls == [33, 7, 256] and relative(out, expected) < (1e-3 if CUDA else 1e-6)
    if CUDA:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "before recording" in fp8.why_refused(34, parts["weight"], False) and calls == [33, 7, 256]


@needs_triton
def test_tile_of_the_table(device, monkeypatch):
    """A row of the tuning table, or a tile being tried, comes before our own estimate."""
    weight, out = torch.empty(48, 64, device=device).half(), torch.empty(33, 48, device=device)
    assert matmul._tuned_tile(33, weight, out, 4, False) == best_tile(33, 48, 2, 4, 4, False)
    with tune.trying("matmul float16", {"m": 16, "n": 32, "k": 32, "warps": 4}):
        assert matmul._tuned_tile(33, weight, out, 4, False) == Tile(16, 32, 32, 4)


@needs_triton
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.sampled(1)
def test_schemes_in_one_graph(name, device, force):
    """Choosing an implementation, rounding and multiplying are traced without a break, for any number of rows."""
    chosen = SCHEMES[name]
    skip_without_e4m3(FP8 if "fp8" in name else None)
    parts = {part: t.to(device) for part, t in chosen.encode(torch.randn(80, 128)).items()}
    force("triton")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: linear(x, chosen, parts), fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 33):
        x = torch.randn(2, rows, 128, device=device).half()
        assert torch.equal(compiled(x), linear(x, chosen, parts))
    assert counter.frame_count == 1


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, FP8])
@pytest.mark.parametrize("m, n, k", [(1088, 3840, 3840), (4160, 3840, 10240), (67, 20480, 3840)])
def test_at_the_size_of_the_model(dtype, m, n, k):
    skip_without_e4m3(dtype)
    x, weight = numbers(m, k, dtype=dtype, device="cuda"), numbers(n, k, dtype=dtype, device="cuda")
    scale = torch.rand(m, 1, device="cuda") + 0.1
    out = scaled_matmul(x, weight, scale, None, None, torch.bfloat16)
    assert relative(out, x.double() @ weight.double().T * scale) < 2**-8


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [64, 1088])
def test_products_in_a_cuda_graph(kind, m):
    skip_without_e4m3(FP8 if kind == "fp8" else None)
    parts, weight = weights(kind, 3840, 2560, "cuda")
    x = torch.randn(m, 2560, device="cuda", dtype=torch.bfloat16)
    mixed_matmul(x, *parts, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mixed_matmul(x, *parts, None)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert relative(out, x.double() @ weight.T) < 2**-7
