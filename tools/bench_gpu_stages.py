"""The stages of the GPU benchmark: each is a function from a `Bench` to rows, which are dictionaries of JSON values.

A stage measures one thing after another through `Bench.attempt`: an error in a measurement is its row and the next one
goes on; a measurement for which too little time is left is skipped and says so.

It is one file, though long: a stage is read with what it measures, and no two of them share more than the `Bench`.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_gpu_model as engine
import torch
from bench_gpu_process import package_version, program_output
from bench_gpu_timing import Timer
from bench_machine import ROOT
from torch import Tensor

Row = dict[str, Any]
BF16, E4M3, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
# Largest relative distance that counts as within bounds, by number format.
BOUNDS = {"fp32": 1e-4, "bf16": 1e-2, "int4": 1e-2, "fp8-weights": 1e-2, "fp8": 2e-2, "int8": 2e-2}
# Kernels of a forward that profile.txt lists.
KERNELS_LISTED = 40
PACKAGES = ("torch", "triton", "numpy", "safetensors", "pytest", "pytest-xdist", "gguf", "diffusers")


@dataclass
class Bench:
    """Where and how long a stage measures: device, seconds from now, folder of the files, dry run or not."""

    device: torch.device
    seconds: float
    out: Path
    dry: bool
    timer: Timer = field(init=False)
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.timer = Timer(self.device)

    def left(self) -> float:
        """Seconds that the stage may go on."""
        return self.seconds - (time.monotonic() - self.start)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of pictures in pixels, the larger first."""
        return (64,) if self.dry else (1024, 512)

    def attempt(self, needed: float, measure: Callable[[], Iterator[Row]], **fields: Any) -> Iterator[Row]:
        """Yield the rows of `measure`, each with `fields`; or a row with "error", or with "skipped".

        needed: seconds without which it is not begun.
        """
        if self.left() < needed:
            yield fields | {"skipped": f"{self.left():.0f} s left, needed {needed:.0f}"}
            return
        self.timer.release()
        try:
            for row in measure():
                yield fields | row
        except Exception as error:  # Whatever went wrong is a result, and must not lose the other measurements.
            where = traceback.format_exc().splitlines()[-6:]
            yield fields | {"error": f"{type(error).__name__}: {error}"[:500], "trace": where}


def clocks() -> str:
    """Return SM clock, memory clock, power and temperature of the GPU now; empty without nvidia-smi."""
    return program_output(
        "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"
    )


# ---------------------------------------------------------------------------------------------------------- env
def env(bench: Bench) -> Iterator[Row]:
    """Measure what the device can do at best: copies, matrix products, the bus, the cost of a launch."""
    yield {
        "name": "versions",
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        "gcc": shutil.which("gcc"),
        "clocks": clocks(),
    } | {package: package_version(package) for package in PACKAGES}
    for name, measure in {"copy": _copy, "matmul": _matmul, "bus": _bus, "launch": _launch}.items():
        yield from bench.attempt(3, partial(measure, bench), name=name)


def _copy(bench: Bench) -> Iterator[Row]:
    """Copies inside the device's memory."""
    size = 1 << (12 if bench.dry else 29)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    yield {"gb_s": 2 * size / bench.timer.graph_ms([lambda: target.copy_(source)]) / 1e6}


def _matmul(bench: Bench) -> Iterator[Row]:
    """Square products by the vendor's libraries: bf16, e4m3 with a scale a tensor, int8."""
    n = 64 if bench.dry else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=BF16) for _ in range(2))
    a8, b8 = a.to(E4M3), b.to(E4M3)
    ai, bi = (torch.randint(-127, 128, (n, n), dtype=INT8, device=bench.device) for _ in range(2))
    unit = torch.ones((), device=bench.device)
    products: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: a @ b.T,
        # Not every CPU, and no oneDNN that is kept to AVX2, has an e4m3 product.
        "fp8": (lambda: torch._scaled_mm(a8, b8.T, unit, unit, out_dtype=BF16, use_fast_accum=True))
        if bench.timer.cuda
        else (lambda: a8.to(BF16) @ b8.to(BF16).T),
        "int8": lambda: torch._int_mm(ai, bi.T),
    }
    for dtype, run in products.items():
        yield from bench.attempt(2, partial(_square, bench, run, 2 * n**3), dtype=dtype)


def _square(bench: Bench, run: Callable[[], Tensor], flops: float) -> Iterator[Row]:
    """The rate of one product, and the clocks right after it."""
    yield {"tflops": flops / bench.timer.graph_ms([run]) / 1e9, "clocks": clocks()}


def _bus(bench: Bench) -> Iterator[Row]:
    """Copies between the host's memory and the device's."""
    size = 1 << (12 if bench.dry else 28)
    there = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    for pinned in (True, False):
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned and bench.timer.cuda)
        for direction, target, source in (("to device", there, host), ("to host", host, there)):
            copy = partial(target.copy_, source, non_blocking=pinned)
            gb_s = size / bench.timer.eager_ms([copy, copy], 3) / 1e6
            yield {"direction": direction, "pinned": pinned, "gb_s": gb_s}


def _launch(bench: Bench) -> Iterator[Row]:
    """Host time of one launch: a torch operation and an Op."""
    x, weight = torch.randn(64, 3840, device=bench.device, dtype=BF16), torch.ones(3840, device=bench.device)
    calls: dict[str, Callable[[], Any]] = {
        "torch.add": lambda: x + x,
        "rms_norm": lambda: engine.rms_norm(x, weight, 1e-5),
    }
    for operation, run in calls.items():
        run()
        yield {"operation": operation, "host_us": bench.timer.host_us(run, 300)}


# -------------------------------------------------------------------------------------------------------- tests
def kernel_tests(bench: Bench) -> Iterator[Row]:
    """Run the kernel tests on the device, in parallel where pytest-xdist is installed, and list what fails."""
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--tb=short"]
    # What is compiled for GPUs that are not there needs none.
    command += ["tests/kernels/test_swiglu.py"] if bench.dry else ["tests/kernels", "-k", "not gpu_targets"]
    if not bench.dry and importlib.util.find_spec("xdist") is not None:
        command += ["-n", "10"]
    path = bench.out / "tests.txt"
    with path.open("w", encoding="utf-8") as file:
        limit = max(1.0, bench.left() - 3)
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit)
            end: Row = {"ended": True, "exit_code": done.returncode}
        except subprocess.TimeoutExpired:
            end = {"ended": False}
    yield count_outcomes(path.read_text(encoding="utf-8", errors="replace")) | end


def count_outcomes(text: str) -> Row:
    """Count the outcomes in what `pytest -vv` printed, plain or parallel, whole or cut, and list the failures."""
    outcomes = dict(re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.M))
    outcomes |= {name: outcome for outcome, name in re.findall(r"(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+::\S+)", text)}
    counts = list(outcomes.values())
    return {
        "passed": counts.count("PASSED"), "skipped_tests": counts.count("SKIPPED"),
        "failed": counts.count("FAILED") + counts.count("ERROR"),
        "failures": sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")),
        "last_line": text.strip().rpartition("\n")[2][:200],
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- accuracy
# Ways to run the embedded model: number format, and options of Pipeline.load, whose dtype is bf16 where none is given.
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bf16", {}), ("fp32", {}), ("fp8", {}), ("int8", {}), ("int4", {}), ("fp8-weights", {}),
    ("fp8", {"dtype": "fp32"}), ("int8", {"dtype": "fp32"}), ("bf16", {"graphs": True}), ("fp8", {"graphs": True}),
    ("bf16", {"residency": "streamed"}), ("bf16", {"vram": "640MiB"}), ("bf16", {"backend": "triton"}),
    ("bf16", {"backend": "reference"}), ("fp32", {"graphs": True}), ("bf16", {"compile": True}),
    ("fp8", {"compile": True}),
)  # fmt: skip
# Options that need a GPU, or minutes of a compiler.
CUDA_OPTIONS = {"graphs", "compile"}


def accuracy(bench: Bench) -> Iterator[Row]:
    """Draw with the embedded model in every format and way to run, and compare the latents with those of the CPU.

    The reference is fp32 on the CPU with weights in the same number format.
    """
    fields: dict[str, Any] = {"prompt": "a red circle", "seed": 7, "output_type": "tensor", "guidance_scale": 0.0}
    batch = {"prompt": ["a red circle", "a blue square above a green circle"], "height": [128, 64], "width": [128, 64]}
    if bench.dry:
        fields |= {"num_inference_steps": 1, "height": 64, "width": 64}
    expected: dict[str | None, Tensor] = {}
    guided = fields | batch | {"guidance_scale": 2.0}
    measure = partial(_case, bench, "fp32", {}, guided, {})
    yield from bench.attempt(10, measure, format="fp32", options={"guided batch of two sizes": True})
    for number_format, options in CASES:
        if bench.dry:
            options = {name: value for name, value in options.items() if name not in CUDA_OPTIONS and value != "triton"}
        measure = partial(_case, bench, number_format, options, fields, expected)
        yield from bench.attempt(10, measure, format=number_format, options=options)


def _case(
    bench: Bench, number_format: str, options: dict[str, Any], fields: Row, expected: dict[str | None, Tensor]
) -> Iterator[Row]:
    """One picture on the device; `expected` keeps the CPU's latents by number format."""
    quantize = None if number_format in ("bf16", "fp32") else number_format
    if quantize not in expected:
        pipe = engine.Pipeline.load(device="cpu", dtype="fp32", quantize=quantize)
        expected[quantize] = torch.cat([latents.flatten() for latents in pipe(**fields).latents])
    options = {"dtype": "fp32" if number_format == "fp32" else "bf16", **options}
    pipe = engine.Pipeline.load(device=bench.device, quantize=quantize, **options)
    drawn: list[Any] = []
    first = bench.timer.wall_ms(lambda: drawn.append(pipe(**fields)))
    distance = engine.relative(torch.cat([latents.flatten() for latents in drawn[0].latents]), expected[quantize])
    bound = BOUNDS[number_format]
    yield {
        "distance": distance, "bound": bound, "within": distance <= bound, "first_ms": first,
        "again_ms": bench.timer.wall_ms(lambda: pipe(**fields)),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ forward
def forward(bench: Bench) -> Iterator[Row]:
    """Measure forwards of the whole transformer in every number format at every side."""
    for number_format in engine.FORMATS:
        yield from bench.attempt(10, partial(_forwards, bench, number_format), format=number_format)


def _forwards(bench: Bench, number_format: str) -> Iterator[Row]:
    """All sides of one number format, with one set of weights."""
    model = engine.transformer(number_format, bench.device, bench.dry)
    for side in bench.sides:
        yield from bench.attempt(6, partial(_forward, bench, model, BOUNDS[number_format], side), side=side)


def _forward(bench: Bench, model: Any, bound: float, side: int) -> Iterator[Row]:
    """One forward: eager, recorded, host time, memory; then at the smallest side its distance to the reference."""
    args = engine.model_inputs(model, side, bench.device)
    run = partial(model, *args)
    first_ms = bench.timer.wall_ms(run)
    bench.timer.release()
    row: Row = {"tokens": len(args[2].gather), "first_ms": first_ms, "eager_ms": bench.timer.eager_ms([run, run])}
    row |= {"host_us": bench.timer.host_us(run, 1), "peak_gb": bench.timer.peak_gb()}
    values = run()
    yield row | {"finite": bool(values.isfinite().all()), "clocks": clocks()}
    # Without a GPU a recording that does nothing: the rest of the way is the same.
    replay = engine.Replay(model, None if bench.timer.cuda else lambda call: (lambda: None, call()))
    recorded = replay(*args)
    graph_ms = bench.timer.eager_ms([partial(replay, *args)] * 3)
    yield {
        "graph_ms": graph_ms,
        "graph_peak_gb": bench.timer.peak_gb(),
        "graph_equals_eager": torch.equal(recorded, values),
    }
    del replay, recorded
    if side == bench.sides[-1]:
        with engine.use_backend("reference"):
            distance = engine.relative(values, run())
        yield {"distance": distance, "bound": bound, "within": distance <= bound}


# ------------------------------------------------------------------------------------------------------ picture
def picture(bench: Bench) -> Iterator[Row]:
    """Time a picture end to end: text encoding, context, 8 recorded steps, decoding to the host."""
    for number_format in ("bf16", "fp8"):
        yield from bench.attempt(12, partial(_picture, bench, number_format), format=number_format)


def _picture(bench: Bench, number_format: str) -> Iterator[Row]:
    """Three pictures after one to warm up; each part's time is the median."""
    side, steps = bench.sides[0], 1 if bench.dry else 8
    model = engine.transformer(number_format, bench.device, bench.dry)
    encoder, vae = engine.text_encoder(bench.device, bench.dry), engine.autoencoder(bench.device, bench.dry)
    embedded = torch.randn(engine.CAPTION, encoder.config.hidden_size, device=bench.device, dtype=BF16)
    step = engine.Replay(model) if bench.timer.cuda else model
    state: dict[str, Any] = {}

    def encode() -> None:
        """Text features of the caption."""
        state["text"] = encoder(embedded, [engine.CAPTION])

    def prepare() -> None:
        """Noise, time, context and modulation."""
        state["inputs"] = engine.model_inputs(model, side, bench.device, state["text"])

    def sample() -> None:
        """All steps, by Euler's method."""
        x, *rest = state["inputs"]
        for _ in range(steps):
            x = x + step(x, *rest) / steps
        # Latents (1, 16, h, w) of patches (h/2 · w/2, 2 · 2 · 16); their order does not matter for time.
        state["latents"] = x.reshape(1, side // 8, side // 8, 16).permute(0, 3, 1, 2).contiguous()

    def decode() -> None:
        """Pixels, on the host."""
        state["pixels"] = vae.decode(state["latents"]).float().cpu()

    parts = {"text_ms": encode, "context_ms": prepare, "steps_ms": sample, "decode_ms": decode}
    rounds = [{name: bench.timer.wall_ms(run) for name, run in parts.items()} for _ in range(2 if bench.dry else 4)]
    row: Row = {name: median(each[name] for each in rounds[1:]) for name in parts}
    whole = median(sum(each.values()) for each in rounds[1:]) / 1e3
    yield {"side": side, "steps": steps, "picture_s": whole, "first_s": sum(rounds[0].values()) / 1e3} | row | {
        "peak_gb": bench.timer.peak_gb(), "finite": bool(state["pixels"].isfinite().all()),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- micro
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


def _draw(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=BF16)


def _arguments(bench: Bench, shapes: tuple[tuple[int, ...], ...], *others: Any) -> tuple[Any, ...]:
    """Arguments of an Op: random bf16 tensors of these shapes, and the others as they are."""
    return (*(_draw(bench, *shape) for shape in shapes), *others)


def _row_kernels(bench: Bench, n: int) -> Iterator[tuple[str, Callable[[], tuple[Any, ...]], Any, float]]:
    """Name, function that draws arguments, Op, and bytes read and written, of each kernel that works by rows."""
    dim, ffn, heads, head = _sizes(bench)
    row = torch.zeros(n, dtype=torch.int64, device=bench.device)
    weight, table, head_weight = _draw(bench, dim), _draw(bench, 1, dim).float(), _draw(bench, head)
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
        lambda: (*(_draw(bench, n, heads, head) for _ in range(3)), spans, spans), 6 * n * heads * head
    )
    flops = 4 * n * n * heads * head
    for name, function in engine.implementations(op, inputs[0], bench.device).items():
        chosen = inputs[:1] if name == "reference" else inputs
        measure = partial(_implementation, bench, function, chosen, lambda ms: {"tflops": flops / ms / 1e9})
        yield from bench.attempt(2, measure, op=op.name, implementation=name)


def _swiglu_layers(bench: Bench, n: int, number_format: str) -> Iterator[Row]:
    """Both products of a feed-forward's first half and what joins them, rounded for the next layer."""
    width, out, *_ = _sizes(bench)
    scheme = engine.SCHEMES[number_format]
    assert scheme.activation is not None
    inputs: list[tuple[Any, ...]] = []
    for _ in range(2):
        gate, up = (engine.random_tensors(scheme.spec(out, width), bench.device) for _ in range(2))
        x = engine.quantize_rows(_draw(bench, n, width), scheme.activation)
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
        return _draw(bench, 1, channels, side, side).contiguous(memory_format=torch.channels_last)

    yield "group_moments", lambda: (picture(), groups), engine.group_moments, nbytes
    make = lambda: (picture(), zeros, ones, ones.to(BF16), zeros.to(BF16), 1e-6, True)  # noqa: E731
    yield "normalize_rows", make, engine.normalize_rows, 2 * nbytes


def _products(bench: Bench, n: int, out: int, width: int) -> Iterator[Row]:
    """One linear layer: in bf16 by cuBLAS and by our own kernel, then in every number format."""
    flops, rate = 2 * n * out * width, lambda ms: {"tflops": 2 * n * out * width / ms / 1e9}
    plain = bench.timer.input_sets(lambda: (_draw(bench, n, width), _draw(bench, out, width)), 2 * width * (n + out))
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


# ---------------------------------------------------------------------------------- profile, compile, streaming
def profile(bench: Bench) -> Iterator[Row]:
    """List the kernels of forwards, of decoding and of text encoding by their time on the device, in profile.txt."""
    (bench.out / "profile.txt").write_text("")
    for what in ("bf16", "fp8", "decode", "int8", "int4", "text"):
        yield from bench.attempt(3, partial(_profile, bench, what), of=what)


def _profiled(bench: Bench, what: str) -> Callable[[], Any]:
    """What is profiled: a forward of a number format, the decoding of latents, or the encoding of a caption."""
    side = bench.sides[0]
    if what == "decode":
        latents = torch.randn(1, 16, side // 8, side // 8, device=bench.device)
        return partial(engine.autoencoder(bench.device, bench.dry).decode, latents)
    if what == "text":
        encoder = engine.text_encoder(bench.device, bench.dry)
        return partial(encoder, _draw(bench, engine.CAPTION, encoder.config.hidden_size), [engine.CAPTION])
    model = engine.transformer(what, bench.device, bench.dry)
    return partial(model, *engine.model_inputs(model, side, bench.device))


def _profile(bench: Bench, what: str) -> Iterator[Row]:
    """One run, of the larger side, under torch's profiler."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    run = _profiled(bench, what)
    run()
    run()
    bench.timer.synchronize()
    with profiler(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * bench.timer.cuda]) as record:
        run()
        bench.timer.synchronize()
    kernels = []
    for event in record.key_averages():
        taken = event.self_device_time_total if bench.timer.cuda else event.self_cpu_time_total
        if taken and (not bench.timer.cuda or "CUDA" in str(event.device_type)):
            kernels.append((taken / 1e3, event.count, event.key))
    kernels.sort(reverse=True)
    total, launches = sum(ms for ms, *_ in kernels), sum(count for _, count, _ in kernels)
    with (bench.out / "profile.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n{what}, {bench.sides[0]}²: {total:.2f} ms on the device, {launches} launches\n")
        for ms, count, name in kernels[:KERNELS_LISTED]:
            file.write(
                f"{ms:9.3f} ms {100 * ms / total:5.1f} % {count:5d} x {1e3 * ms / count:8.1f} µs  {name[:150]}\n"
            )
    yield {
        "side": bench.sides[0],
        "device_ms": total,
        "launches": launches,
        "largest": [name[:60] for *_, name in kernels[:3]],
    }


def compiled(bench: Bench) -> Iterator[Row]:
    """Compile the blocks of a transformer of 4 main blocks, at one side and then another, beside eager ones."""
    for number_format in ("bf16", "fp8"):
        yield from bench.attempt(12, partial(_compiled, bench, number_format), format=number_format)


def _compiled(bench: Bench, number_format: str) -> Iterator[Row]:
    """Eager and compiled forwards; first_ms of the second side shows whether it compiles anew."""
    model = engine.transformer(number_format, bench.device, bench.dry, layers=4)
    calls = {side: partial(model, *engine.model_inputs(model, side, bench.device)) for side in bench.sides}
    eager = {side: (bench.timer.eager_ms([run, run]), run()) for side, run in calls.items()}
    engine.compile_blocks(model, "inductor" if bench.timer.cuda else "eager")
    for side, run in calls.items():
        first_ms = bench.timer.wall_ms(run)
        eager_ms, expected = eager[side]
        yield {
            "side": side, "layers": 4, "first_ms": first_ms, "eager_ms": eager_ms,
            "compiled_ms": bench.timer.eager_ms([run, run]), "distance": engine.relative(run(), expected),
        }  # fmt: skip


def streamed(bench: Bench) -> Iterator[Row]:
    """Stream the blocks of a transformer of 8 main blocks from host memory, beside the same one on the device."""
    for number_format in ("bf16", "fp8"):
        yield from bench.attempt(8, partial(_streamed, bench, number_format), format=number_format)


def _streamed(bench: Bench, number_format: str) -> Iterator[Row]:
    """The rate is that of all bytes of the blocks that pass through, to be held against the bus in `env`."""
    model = engine.transformer(number_format, bench.device, bench.dry, layers=8)
    run = partial(model, *engine.model_inputs(model, bench.sides[0], bench.device))
    resident_ms, expected = bench.timer.eager_ms([run, run], 3), run()
    blocks = [*model.noise_refiner, *model.layers]
    nbytes = sum(t.nbytes for block in blocks for t in (*block.parameters(), *block.buffers()))
    model.to("cpu")
    engine.stream(model, bench.device, kept=0)
    values = run()
    streamed_ms = bench.timer.eager_ms([run, run], 3)
    yield {
        "side": bench.sides[0], "resident_ms": resident_ms, "streamed_ms": streamed_ms, "gb": nbytes / 1e9,
        "gb_s": nbytes / streamed_ms / 1e6, "same_bits": torch.equal(values, expected),
    }  # fmt: skip


STAGES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "env": env, "tests": kernel_tests, "accuracy": accuracy, "forward": forward, "picture": picture, "micro": micro,
    "profile": profile, "compile": compiled, "stream": streamed,
}  # fmt: skip
