"""The stages of the GPU benchmark: each is a function from a `Bench` to rows, which are dictionaries of JSON values.

A stage measures one thing after another through `Bench.attempt`: an error in a measurement is its row and the next one
goes on; a measurement for which too little time is left is skipped and says so.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import bench_gpu_model as engine
import torch
from bench_gpu_micro import draw, micro
from bench_gpu_process import package_version, program_output
from bench_gpu_row import BF16, E4M3, INT8, Bench, Row
from bench_machine import ROOT
from torch import Tensor

# Largest relative distance that counts as within bounds, by number format.
BOUNDS = {"fp32": 1e-4, "bf16": 1e-2, "int4": 1e-2, "fp8-weights": 1e-2, "fp8": 2e-2, "int8": 2e-2}
# Kernels of a forward that profile.txt lists.
KERNELS_LISTED = 40
PACKAGES = ("torch", "triton", "numpy", "safetensors", "pytest", "pytest-xdist", "gguf", "diffusers")


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
    bench.timer.warm_up()
    for name, measure in {"copy": _copy, "matmul": _matmul, "bus": _bus, "launch": _launch}.items():
        yield from bench.attempt(3, partial(measure, bench), name=name)


def _copy(bench: Bench) -> Iterator[Row]:
    """Copies inside the device's memory, by a kernel: a copy of so much goes another way in a graph, and slower."""
    size = 1 << (12 if bench.dry else 28)
    source, target = (torch.randn(size, device=bench.device, dtype=BF16) for _ in range(2))
    yield {"gb_s": 4 * size / bench.timer.graph_ms([lambda: torch.neg(source, out=target)]) / 1e6}


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
    # Of a number format and of none.
    expected: dict[str | None, Tensor] = {}
    guided = fields | batch | {"guidance_scale": 2.0}
    measure = partial(_case, bench, "fp32", {}, guided, {})
    yield from bench.attempt(10, measure, format="fp32", options={"guided batch of two sizes": True})
    cases = list(CASES)
    if bench.dry:
        cases = [
            (form, {name: value for name, value in options.items() if name not in CUDA_OPTIONS})
            for form, options in CASES
        ]
        cases = [case for i, case in enumerate(cases) if case not in cases[:i] and case[1].get("backend") != "triton"]
    for number_format, options in cases:
        measure = partial(_case, bench, number_format, options, fields, expected)
        yield from bench.attempt(10, measure, format=number_format, options=options)
    for number_format in ("bf16", "fp8"):
        yield from bench.attempt(10, partial(_looked_into, bench, number_format, fields), format=number_format)


def _looked_into(bench: Bench, number_format: str, fields: Row) -> Iterator[Row]:
    """What looking inside costs the picture, and how far the maps of a word are from those of the CPU in fp32."""
    quantize = None if number_format == "bf16" else number_format
    maps: dict[str, Tensor] = {}
    for device, dtype in ((torch.device("cpu"), "fp32"), (bench.device, "bf16")):
        pipe = engine.Pipeline.load(device=device, dtype=dtype, quantize=quantize)
        plain = pipe(**fields).latents[0]
        with engine.attention_maps(pipe, "circle") as gathered:
            mapped = pipe(**fields).latents[0]
        maps[dtype] = gathered.map("circle")
        with pipe.observe("**", reduce="rms") as record:
            observed = pipe(**fields).latents[0]
        yield {
            "options": {"looked into": str(device)}, "sites": len({key.site for key in record}),
            "map_bits": torch.equal(mapped, plain),
            "observed_distance": engine.relative(observed, plain),
        }  # fmt: skip
    yield {"options": {"looked into": "maps"}, "distance": engine.relative(maps["bf16"], maps["fp32"])}


def _case(
    bench: Bench, number_format: str, options: dict[str, Any], fields: Row, expected: dict[str | None, Tensor]
) -> Iterator[Row]:
    """One picture on the device; `expected` keeps the CPU's latents by number format."""
    quantize = None if number_format in ("bf16", "fp32") else number_format
    for each in {quantize, None} - expected.keys():
        pipe = engine.Pipeline.load(device="cpu", dtype="fp32", quantize=each)
        expected[each] = torch.cat([latents.flatten() for latents in pipe(**fields).latents])
    options = {"dtype": "fp32" if number_format == "fp32" else "bf16", **options}
    pipe = engine.Pipeline.load(device=bench.device, quantize=quantize, **options)
    drawn: list[Any] = []
    first = bench.timer.wall_ms(lambda: drawn.append(pipe(**fields)))
    latents = torch.cat([latents.flatten() for latents in drawn[0].latents])
    distance, off = engine.relative(latents, expected[quantize]), engine.relative(expected[quantize], expected[None])
    # Rounding to 8 bits magnifies what is a rounding before it, so two devices part by what the format costs, once for
    # each of them: by its square root of 2.
    bound = max(BOUNDS[number_format], 1.5 * off)
    yield {
        "distance": distance, "bound": bound, "within": distance <= bound, "format_costs": off,
        "costs_here": engine.relative(latents, expected[None]), "first_ms": first,
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
        yield from bench.attempt(6, partial(_forward, bench, model, side), side=side)


def _forward(bench: Bench, model: Any, side: int) -> Iterator[Row]:
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
        yield from _distance(model, args, values)


def _distance(model: Any, args: tuple[Any, ...], values: Tensor) -> Iterator[Row]:
    """Hold a forward against the references in fp32, beside the references in bf16: both are off by roundings alone.

    Activations of 8 bits are rounded in all three.
    """
    with engine.use_backend("reference"):
        plain = model(*args)
        engine.upcast(model)
        exact = model(*engine.in_fp32(args))
    distance, of_reference = engine.relative(values, exact), engine.relative(plain, exact)
    yield {"distance": distance, "reference_distance": of_reference, "within": distance <= 1.1 * of_reference}


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
    # As `Pipeline.load(graphs=True)` encodes; without a GPU a recording that does nothing.
    recorded = engine.Replay(encoder, None if bench.timer.cuda else lambda call: (lambda: None, call()))
    again = partial(recorded, embedded, (engine.CAPTION,), encoder.rope_of((engine.CAPTION,), bench.device))
    again()
    row["text_graph_ms"] = median(bench.timer.wall_ms(again) for _ in range(3))
    yield {"side": side, "steps": steps, "picture_s": whole, "first_s": sum(rounds[0].values()) / 1e3} | row | {
        "peak_gb": bench.timer.peak_gb(), "finite": bool(state["pixels"].isfinite().all()),
    }  # fmt: skip


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
        return partial(encoder, draw(bench, engine.CAPTION, encoder.config.hidden_size), [engine.CAPTION])
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
        "distance": engine.relative(values, expected),
    }  # fmt: skip


STAGES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "env": env, "tests": kernel_tests, "accuracy": accuracy, "forward": forward, "picture": picture, "micro": micro,
    "profile": profile, "compile": compiled, "stream": streamed,
}  # fmt: skip
