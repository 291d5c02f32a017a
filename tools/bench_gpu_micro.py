"""The micro stage of the GPU benchmark: every implementation of each Op at the shapes of the model."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bench_gpu_model as engine
import torch
from bench_gpu_row import BF16, E4M3, INT8, Bench, Row
from torch import Tensor


def micro(bench: Bench) -> Iterator[Row]:
    """Measure every implementation of each Op at the shapes of the model.

    Row kernels stand beside a copy of as many bytes (`share` of its rate), products beside cuBLAS's in bf16.
    """
    for side in bench.sides:
        n = (side // 16) ** 2 + 128
        for name, make, op, nbytes in _row_kernels(bench, n):
            yield from bench.attempt(4, partial(_row_kernel, bench, make, op, nbytes), op=name, rows=n)
        for name, make, op, nbytes in _group_norms(bench, side):
            yield from bench.attempt(4, partial(_row_kernel, bench, make, op, nbytes), op=name, side=side)
        for op in (engine.attention, engine.attention_lse):
            yield from bench.attempt(4, partial(_attention, bench, op, n), rows=n)
        yield from bench.attempt(4, partial(_maps, bench, side), rows=n)
        yield from bench.attempt(4, partial(_swiglu_bf16, bench, n), rows=n)
        for number_format in ("int8", "fp8"):
            yield from bench.attempt(4, partial(_swiglu_layers, bench, n, number_format), rows=n)
        for layer, (out, width) in _layers(bench).items():
            yield from bench.attempt(
                4, partial(_products, bench, n, out, width), layer=layer, rows=n, out=out, width=width
            )


def _sizes(bench: Bench) -> tuple[int, int, int, int]:
    """Width, width of the feed-forward, heads and width of a head."""
    return (128, 256, 2, 64) if bench.dry else (3840, 10240, 30, 128)


def _layers(bench: Bench) -> dict[str, tuple[int, int]]:
    """Linear layers of a block: name -> (out, in)."""
    dim, ffn, *_ = _sizes(bench)
    return {"to_q": (dim, dim), "w1": (ffn, dim), "w2": (dim, ffn)}


def draw(bench: Bench, *shape: int) -> Tensor:
    """Return random bf16 on the device."""
    return torch.randn(*shape, device=bench.device, dtype=BF16)


def _arguments(bench: Bench, shapes: tuple[tuple[int, ...], ...], *others: Any) -> tuple[Any, ...]:
    """Arguments of an Op: random bf16 tensors of these shapes, and the others as they are."""
    return (*(draw(bench, *shape) for shape in shapes), *others)


def _row_kernels(bench: Bench, n: int) -> Iterator[tuple[str, Callable[[], tuple[Any, ...]], Any, float]]:
    """Name, function that draws arguments, Op, and bytes read and written, of each kernel that works by rows."""
    dim, ffn, heads, head = _sizes(bench)
    row = torch.zeros(n, dtype=torch.int64, device=bench.device)
    weight, table, head_weight = draw(bench, dim), draw(bench, 1, dim).float(), draw(bench, head)
    rope = torch.randn(n, head // 2, 2, device=bench.device)
    narrow, hidden, by_heads = (n, dim), (n, ffn), (n, heads, head)
    nbytes = 2 * n * dim
    for dtype in (None, E4M3, INT8):
        name, out = ("bf16", 1.0) if dtype is None else (str(dtype).removeprefix("torch."), 0.5)
        last = (row, 1e-5) if dtype is None else (row, 1e-5, dtype)
        make = partial(_arguments, bench, (narrow,), table, *last)
        yield f"rms_norm_modulate {name}", make, engine.rms_norm_modulate, (1 + out) * nbytes
        make = partial(_arguments, bench, (narrow, narrow), table, table, *last)
        yield f"gated_residual_norm {name}", make, engine.gated_residual_norm, (3 + out) * nbytes
        make = partial(_arguments, bench, (hidden, hidden), *last[2:])
        yield f"swiglu {name}", make, engine.swiglu, (2 + out) * 2 * n * ffn
    yield "rms_norm", partial(_arguments, bench, (narrow,), weight, 1e-5), engine.rms_norm, 2 * nbytes
    make = partial(_arguments, bench, (narrow, narrow), table, row, 1e-5)
    yield "gated_residual", make, engine.gated_residual, 3 * nbytes
    make = partial(_arguments, bench, (narrow, narrow), weight, 1e-5)
    yield "residual_norm", make, engine.residual_norm, 4 * nbytes
    make = partial(_arguments, bench, (by_heads, by_heads), head_weight, head_weight, rope, 1e-5)
    yield "qk_norm_rope", make, engine.qk_norm_rope, 4 * nbytes + rope.nbytes


def _row_kernel(bench: Bench, make: Callable[[], tuple[Any, ...]], op: Any, nbytes: float) -> Iterator[Row]:
    """Every implementation of one Op, after a copy of as many bytes."""
    size = int(nbytes) // 2
    pairs = bench.timer.input_sets(
        lambda: tuple(torch.zeros(size, dtype=torch.uint8, device=bench.device) for _ in range(2)), nbytes
    )
    copy_ms = bench.timer.graph_ms([partial(target.copy_, source) for source, target in pairs])
    del pairs
    inputs = bench.timer.input_sets(make, nbytes)
    for name, function in engine.implementations(op, inputs[0], bench.device).items():
        measure = partial(
            _implementation, bench, function, inputs, lambda ms: {"gb_s": nbytes / ms / 1e6, "share": copy_ms / ms}
        )
        yield from bench.attempt(2, measure, implementation=name, copy_us=1e3 * copy_ms)


def _implementation(
    bench: Bench, function: Callable[..., Any], inputs: list[tuple[Any, ...]], rate: Callable[[float], Row]
) -> Iterator[Row]:
    """One implementation over rotating inputs; rate(ms): what its time amounts to."""
    row = bench.timer.measure([partial(function, *args) for args in inputs])
    yield row | rate(row.get("graph_ms", row["eager_ms"]))


def _attention(bench: Bench, op: Any, n: int) -> Iterator[Row]:
    """Attention of one item of n tokens, with its log-sum-exp or without."""
    _, _, heads, head = _sizes(bench)
    spans = engine.Spans.of((n,), bench.device)
    inputs = bench.timer.input_sets(
        lambda: (*(draw(bench, n, heads, head) for _ in range(3)), spans, spans), 6 * n * heads * head
    )
    flops = 4 * n * n * heads * head
    for name, function in engine.implementations(op, inputs[0], bench.device).items():
        chosen = inputs[:1] if name == "reference" else inputs
        measure = partial(_implementation, bench, function, chosen, lambda ms: {"tflops": flops / ms / 1e9})
        yield from bench.attempt(2, measure, op=op.name, implementation=name)


def _maps(bench: Bench, side: int) -> Iterator[Row]:
    """What attention maps of 16 words take in one block, beside its attention."""
    _, _, heads, head = _sizes(bench)
    pipe = engine.Pipeline.load(device="cpu")
    (item,) = engine.tokens(pipe, pipe.plan(engine.WORDS, height=side, width=side, seed=1))
    words, spans = list(dict.fromkeys(item.words))[:16], engine.Spans.of((len(item),), bench.device)
    q, k, v = (draw(bench, len(item), heads, head) for _ in range(3))

    def looked_at() -> None:
        """As `attention_maps` does, to the sums on the host."""
        engine.AttentionMaps(words, ()).add(item, 1, "layers.0", engine.looks(q, k, item, words))

    calls = {"attention": lambda: engine.attention(q, k, v, spans, spans), "maps": looked_at}
    for name, run in calls.items():
        yield {"op": "attention maps", "implementation": name, "tokens": len(item)} | {
            "eager_ms": bench.timer.eager_ms([run, run], 9), "host_us": bench.timer.host_us(run, 5),
        }  # fmt: skip


def _swiglu_bf16(bench: Bench, n: int) -> Iterator[Row]:
    """The same in bf16: cuBLAS over both weights and then SwiGLU, as it runs, and our kernel, which nothing takes."""
    width, out, *_ = _sizes(bench)
    inputs = [(draw(bench, n, width), draw(bench, 2 * out, width)) for _ in range(2)]

    def separately(x: Tensor, weight: Tensor) -> Any:
        """Both products in one, then SwiGLU."""
        gate, up = torch.nn.functional.linear(x, weight).split(out, -1)
        return engine.swiglu(gate, up)

    def fused(x: Tensor, weight: Tensor) -> Any:
        """All in one kernel."""
        return engine.launch_scaled(x, weight[:out], None, None, None, BF16, up=weight[out:])

    ways: dict[str, Callable[..., Any]] = {"separately": separately} | ({"fused": fused} if bench.timer.cuda else {})
    rate = lambda ms: {"tflops": 4 * n * out * width / ms / 1e9}  # noqa: E731
    for name, function in ways.items():
        measure = partial(_implementation, bench, function, inputs, rate)
        yield from bench.attempt(2, measure, op="swiglu_linear bf16", implementation=name)


def _swiglu_layers(bench: Bench, n: int, number_format: str) -> Iterator[Row]:
    """Both products of a feed-forward's first half and what joins them, rounded for the next layer."""
    width, out, *_ = _sizes(bench)
    scheme = engine.SCHEMES[number_format]
    assert scheme.activation is not None
    inputs: list[tuple[Any, ...]] = []
    for _ in range(2):
        gate, up = (engine.random_tensors(scheme.spec(out, width), bench.device) for _ in range(2))
        x = engine.quantize_rows(draw(bench, n, width), scheme.activation)
        inputs.append((x, scheme, gate, up, scheme.activation))
    flops = 4 * n * out * width
    for name, function in engine.implementations(engine.swiglu_linear, inputs[0], bench.device).items():
        chosen = inputs[:1] if name == "reference" else inputs
        measure = partial(_implementation, bench, function, chosen, lambda ms: {"tflops": flops / ms / 1e9})
        yield from bench.attempt(2, measure, op=f"swiglu_linear {number_format}", implementation=name)


def _group_norms(bench: Bench, side: int) -> Iterator[tuple[str, Callable[[], tuple[Any, ...]], Any, float]]:
    """The two kernels of a GroupNorm at the decoder's last and largest size, as `_row_kernels` gives others."""
    channels, groups = (16, 4) if bench.dry else (128, 32)
    nbytes = 2 * channels * side * side
    ones, zeros = (make(channels, device=bench.device) for make in (torch.ones, torch.zeros))

    def picture() -> Tensor:
        """A picture in channels last."""
        return draw(bench, 1, channels, side, side).contiguous(memory_format=torch.channels_last)

    yield "group_moments", lambda: (picture(), groups, ones), engine.group_moments, nbytes
    yield "add_pictures", lambda: (picture(), picture(), ones), engine.add_pictures, 3 * nbytes
    yield "repeat_pixels", lambda: (picture(),), engine.repeat_pixels, 5 * nbytes
    make = lambda: (picture(), zeros, ones, ones.to(BF16), zeros.to(BF16), 1e-6, True)  # noqa: E731
    yield "normalize_rows", make, engine.normalize_rows, 2 * nbytes


def _products(bench: Bench, n: int, out: int, width: int) -> Iterator[Row]:
    """One linear layer: in bf16 by cuBLAS and by our own kernel, then in every number format."""
    flops, rate = 2 * n * out * width, lambda ms: {"tflops": 2 * n * out * width / ms / 1e9}
    plain = bench.timer.input_sets(lambda: (draw(bench, n, width), draw(bench, out, width)), 2 * width * (n + out))
    products: dict[str, Callable[..., Tensor]] = {"cublas": torch.nn.functional.linear}
    if bench.timer.cuda:  # Ours, which nothing takes by default.
        products["triton"] = lambda x, weight: engine.scaled_matmul(x, weight, None, None, None, BF16)
    for name, function in products.items():
        measure = partial(_implementation, bench, function, plain, rate)
        yield from bench.attempt(2, measure, op="linear bf16", implementation=name, gflop=flops / 1e9)
    for number_format, scheme in engine.SCHEMES.items():
        inputs: list[tuple[Any, ...]] = []
        for x, _ in plain:
            given = x if scheme.activation is None else engine.quantize_rows(x, scheme.activation)
            inputs.append((given, engine.random_tensors(scheme.spec(out, width), bench.device), None))
        for name, function in engine.implementations(scheme.linear, inputs[0], bench.device).items():
            chosen = inputs[:1] if name == "reference" else inputs
            measure = partial(_implementation, bench, function, chosen, rate)
            yield from bench.attempt(2, measure, op=f"linear {number_format}", implementation=name)
