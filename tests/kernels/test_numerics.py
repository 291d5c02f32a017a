"""The numerical contract: an implementation is exact, lossless within a bound, or approximate within another.

A number format is no approximation here: its reference is its own decoding and rounding, so x is rounded beforehand
where a format rounds it. Triton's kernels run in the interpreter, in fp32.
"""

import pytest
import torch

from s3dit.errors import BackendError
from s3dit.kernels import attention, dispatch, group_norm, norm, pictures, rows, swiglu, swiglu_linear
from s3dit.kernels.attention import Spans
from s3dit.kernels.dispatch import INTERPRETED, NUMERICS, use_backend, use_numerics
from s3dit.kernels.gguf import GGUF
from s3dit.kernels.scheme import QuantizedRows, quantize_rows
from s3dit.kernels.schemes import SCHEMES

DIM, HEADS, HEAD = 96, 3, 32


def arguments(dtype, N=70):
    """Op -> arguments that every implementation takes; the model's shapes, small, for N tokens."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    row = (torch.arange(N, dtype=torch.int32) >= 40).int()
    spans = Spans.of((40, N - 40))
    q, k, v = draw(N, HEADS, HEAD), draw(N, HEADS, HEAD), draw(N, HEADS, HEAD)
    x, y, weight, gate, factor = draw(N, DIM), draw(N, DIM), draw(DIM), draw(2, DIM).float(), draw(2, DIM).float()
    found = {
        attention.attention: (q, k, v, spans, spans), attention.attention_lse: (q, k, v, spans, spans),
        norm.rms_norm: (x, weight, 1e-6), norm.rms_norm_modulate: (x, factor, row, 1e-6),
        norm.residual_norm: (x, y, weight, 1e-6), norm.gated_residual: (x, y, gate, row, 1e-6),
        norm.gated_residual_norm: (x, y, gate, factor, row, 1e-6),
        norm.qk_norm_rope: (q, k, draw(HEAD), draw(HEAD), draw(N, HEAD // 2, 2).float(), 1e-6),
        group_norm.group_moments: (draw(1, 8, N, 40).contiguous(memory_format=torch.channels_last), 4),
        group_norm.normalize_rows: (
            draw(1, 8, N, 40).contiguous(memory_format=torch.channels_last), draw(8).float(), draw(8).float().abs(),
            draw(8), draw(8), 1e-6, True,
        ),
        pictures.add_pictures: (*last(draw(1, 8, N, 40), draw(1, 8, N, 40)), draw(8)),
        pictures.repeat_pixels: (*last(draw(1, 8, N, 40)),),
        swiglu.swiglu: (draw(N, DIM), draw(N, DIM)), rows.quantize_activations: (x, torch.int8),
    }  # fmt: skip
    for scheme in SCHEMES.values():
        given = draw(N, 128) if scheme.activation is None else quantize_rows(draw(N, 128), scheme.activation)
        found[scheme.linear] = (given, scheme.encode(torch.randn(80, 128, generator=g)), draw(80).float())
    int8 = SCHEMES["int8"]
    gate, up = (int8.encode(torch.randn(80, 128, generator=g) / 8) for _ in range(2))
    found[swiglu_linear.swiglu_linear] = (quantize_rows(draw(N, 128), torch.int8), int8, gate, up)
    return found


def last(*pictures):
    return (picture.contiguous(memory_format=torch.channels_last) for picture in pictures)


OPS = list(arguments(torch.float32))


def tensors(out):
    """The floats of a result, whatever it is made of; rounded rows as what they stand for."""
    if isinstance(out, QuantizedRows):
        return [out.dequantize()]
    return [out] if isinstance(out, torch.Tensor) else [each for part in out for each in tensors(part)]


def compare(op, candidate, args, dtype):
    """Hold one implementation to what it promises; arguments are copied, since some implementations overwrite them."""
    own = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    for got, expected in zip(tensors(candidate.function(*own)), tensors(op.reference(*args)), strict=True):
        if candidate.numerics == "exact":
            assert torch.equal(got, expected), f"{op.name}, {candidate.function.__name__}"
            continue
        unit = torch.finfo(got.dtype if got.dtype == dtype else dtype).eps if candidate.numerics == "lossless" else 1.0
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        assert error <= candidate.bound * unit, f"{op.name}, {candidate.function.__name__}: {error / unit:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_what_runs_on_a_cpu_keeps_its_promise(op, dtype):
    args = arguments(dtype)[op]
    for candidate in (each for each in op.implementations if each.device == "cpu"):
        if not candidate.why_not("cpu", args):
            compare(op, candidate, args, dtype)


@pytest.mark.parametrize(
    "op", [op for op in OPS if any(each.numerics == "exact" and each.device == "cpu" for each in op.implementations)]
)
def test_exact_over_many_chunks(op):
    args = arguments(torch.float32, 9001)[op]
    for candidate in (each for each in op.implementations if each.numerics == "exact"):
        if candidate.device == "cpu":
            compare(op, candidate, args, torch.float32)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.sampled(4)
def test_kernels_keep_their_promise(op):
    args = arguments(torch.float32)[op]
    with use_backend("triton"):
        for candidate in (each for each in op.implementations if each.backend == "triton"):
            if not candidate.why_not("cuda", args):
                compare(op, candidate, args, torch.float32)


def test_the_table_holds_every_op():
    made = {
        name
        for room in (attention, norm, swiglu, swiglu_linear, rows)
        for name, op in vars(room).items()
        if isinstance(op, dispatch.Op)
    }
    assert made <= {op.name for op in OPS} and {scheme.linear for scheme in SCHEMES.values()} <= set(OPS)
    assert all(scheme.linear.implementations for scheme in GGUF.values())


def test_numerics_choose_what_may_run():
    @dispatch.op
    def probe(x):
        return "reference"

    probe.on("cpu", "torch", numerics="approximate", bound=1.0)(lambda x: "approximate")
    probe.on("cpu", "torch")(lambda x: "lossless")
    probe.on("cpu", "torch", numerics="exact")(lambda x: "exact")
    x = torch.zeros(1)
    assert probe(x) == "lossless"
    for name in NUMERICS:
        with use_numerics(name):
            assert probe(x) == name
    with use_numerics("exact"):
        reasons = [why for *_, why in probe.explain(x)]
    assert "is approximate, where numerics 'exact' is asked for" in reasons and "chosen" in reasons
    assert [each.bound for each in probe.implementations] == [1.0, dispatch.ROUNDINGS, 0.0]
    with pytest.raises(BackendError, match="numerics is 'fast'; needed one of exact"), use_numerics("fast"):
        pass
