"""Measure on a CUDA device: kernels beside torch's own, forwards in every number format, pictures end to end, memory.

    python tools/bench.py --gpu --json tools/results      everything; meant for ten minutes of an H200
    python tools/bench.py --gpu --only forward            one part: kernels, forward, picture
    python tools/bench.py --gpu --table tools/results     the README's tables of the committed files

Weights are random and of full size. Each part writes its own JSON file, so that a cut run leaves what it has. The
kernel tests run on the device first: there are no figures on red. Times are medians of CUDA events after warming up;
`share` compares with what the device has just been seen to do (a plain copy, a plain matrix product).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_machine import ROOT, write_checkpoint
from torch import Tensor

from s3dit.kernels.attention import Spans, attention
from s3dit.kernels.dispatch import Op
from s3dit.kernels.norm import gated_residual, qk_norm_rope, rms_norm_modulate
from s3dit.kernels.scheme import quantize_rows
from s3dit.kernels.schemes import SCHEMES, linear
from s3dit.kernels.swiglu import swiglu

DIM, FFN, HEADS, HEAD = 3840, 10240, 30, 128
# Sides of a picture -> tokens of a pass with 128 caption tokens.
LENGTHS = {512: 1152, 1024: 4224, 2048: 16512}
FORMATS = (None, "fp8", "int8", "int4", "fp8-weights")
# Linear layers of the block: name -> (out, in).
LAYERS = {"attention": (DIM, DIM), "w1, w3": (FFN, DIM), "w2": (DIM, FFN)}


def milliseconds(run: Callable[..., Any], *args: Any, repeat: int = 20) -> float:
    """Median time of a call on the device, after three to warm up."""
    for _ in range(3):
        run(*args)
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(*args)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    def said(*command: str) -> str:
        """What a program prints."""
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": said("git", "rev-parse", "--short", "HEAD") or "unknown",
    }


def everyone(op: Op, *args: Any) -> dict[str, float | str]:
    """Time of each implementation of an Op that serves these arguments, and of its reference; which one is chosen."""
    found: dict[str, float | str] = {"chosen": op.choose(*args).__name__.strip("_")}
    for stand_in in op.implementations:
        if stand_in.why_not("cuda", args):
            continue
        found[stand_in.function.__name__.strip("_")] = milliseconds(stand_in.function, *args)
    found["reference"] = milliseconds(op.reference, *args, repeat=5)
    return found


def kernels() -> Iterator[dict[str, Any]]:
    """Each Op at the model's shapes: row kernels against a copy of the same bytes, products against cuBLAS."""

    def draw(*shape: int) -> Tensor:
        """A random bf16 tensor on the device."""
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    for side, n in LENGTHS.items():
        row = torch.zeros(n, dtype=torch.int32, device="cuda")
        weight, table, x, other = draw(DIM), draw(1, DIM), draw(n, DIM), draw(n, DIM)
        q, k, v = (draw(n, HEADS, HEAD) for _ in range(3))
        rope, spans = torch.randn(n, HEAD // 2, 2, device="cuda"), Spans.of((n,), "cuda")
        gate, up = draw(n, FFN), draw(n, FFN)
        rows: list[tuple[Op, tuple[Any, ...], int]] = [
            (rms_norm_modulate, (x, weight, table, row, 1e-5), 2 * x.nbytes),
            (gated_residual, (x, other, weight, table, row, 1e-5), 3 * x.nbytes),
            (qk_norm_rope, (q, k, draw(HEAD), draw(HEAD), rope, 1e-5), 4 * q.nbytes + rope.nbytes),
            (swiglu, (gate, up), 3 * gate.nbytes),
        ]
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        copy = 2 * source.nbytes / milliseconds(source.clone) / 1e6
        for op, args, moved in rows:
            times = everyone(op, *args)
            best = times[str(times["chosen"])] if times["chosen"] in times else times["reference"]
            yield {"op": op.name, "side": side, "ms": times, "share": moved / float(best) / 1e6 / copy, "gb_s": copy}
        times = everyone(attention, q, k, v, spans, spans)
        tflops = {name: 4 * n * n * DIM / ms / 1e9 for name, ms in times.items() if isinstance(ms, float)}
        yield {"op": "attention", "side": side, "ms": times, "tflops": tflops}
        for layer, (out, width) in LAYERS.items():
            yield from products(side, layer, draw(n, width), draw(out, width))


def products(side: int, layer: str, x: Tensor, weight: Tensor) -> Iterator[dict[str, Any]]:
    """One linear layer in every format, each of its implementations, beside cuBLAS in bf16."""
    plain = milliseconds(torch.mm, x, weight.T)
    flops = 2 * len(x) * weight.numel()
    for name, scheme in SCHEMES.items():
        assert scheme.encode is not None
        parts = {key: part.cuda() for key, part in scheme.encode(weight.float().cpu()).items()}
        given = x if scheme.activation is None else quantize_rows(x, scheme.activation)
        times = everyone(scheme.linear, given, parts, None)
        yield {
            "op": f"linear {name}", "side": side, "layer": layer, "ms": times, "cublas_bf16_ms": plain,
            "tflops": {key: flops / ms / 1e9 for key, ms in times.items() if isinstance(ms, float)},
            "with_rounding_ms": milliseconds(linear, x, scheme, parts),
        }  # fmt: skip


def request(side: int, words: str = "a red circle ") -> dict[str, Any]:
    """A picture of 8 steps without guidance, of a prompt that fills 128 tokens."""
    return {
        "prompt": words * 20, "height": side, "width": side, "num_inference_steps": 8, "guidance_scale": 0.0,
    }  # fmt: skip


def pictures(folder: Path, sides: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Forward and picture of 8 steps in every format, from one full-size directory."""
    from s3dit import Pipeline

    for name in FORMATS:
        for side in sides:
            # Recorded passes decide the small sizes, and cost memory where the large ones need it.
            options: dict[str, Any] = {"device": "cuda", "dtype": "bf16", "quantize": name, "graphs": side <= 1024}
            fields = request(side) | {"output_type": "tensor"}
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            # Staged first: its peak is that of the largest part and its activations.
            Pipeline.load(folder, **options)(**fields)
            peak = torch.cuda.max_memory_allocated() / 1e9
            pipe = Pipeline.load(folder, residency="resident", **options)
            pipe(**fields)
            # Other words each time, so that the text encoder is in the figure.
            whole = [seconds(pipe, **fields | request(side, f"{i} blue stars ")) for i in range(4)]
            ends: list[float] = []
            for _ in pipe.stream(**fields):
                torch.cuda.synchronize()
                ends.append(time.perf_counter())
            forward = median(after - before for before, after in zip(ends, ends[1:], strict=False))
            yield {
                "format": name or "bf16", "side": side, "forward_ms": 1e3 * forward, "picture_s": median(whole[1:]),
                "staged_peak_gb": peak, "graphs": options["graphs"],
            }  # fmt: skip


def theirs(folder: Path, sides: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The pipeline of diffusers on the same weights, eager and with its blocks compiled."""
    try:
        from diffusers import ZImagePipeline
    except ImportError:
        yield {"format": "diffusers bf16", "skipped": "diffusers is not installed here"}
        return
    pipe = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    for compiled in (False, True):
        if compiled:
            pipe.transformer.compile_repeated_blocks()
        for side in sides:
            torch.cuda.reset_peak_memory_stats()
            fields = request(side) | {"output_type": "pt"}
            pipe(**fields)
            yield {
                "format": "diffusers bf16" + (", compiled" if compiled else ""), "side": side,
                "picture_s": median(seconds(pipe, **fields) for _ in range(3)),
                "resident_peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            }  # fmt: skip


def seconds(run: Callable[..., object], **fields: Any) -> float:
    """Wall time of a call and of all that it has sent to the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(**fields)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def table(folder: Path) -> str:
    """The README's rows of all result files in a folder."""
    lines = [
        "| GPU | format | picture | one forward | 8 steps, text and VAE included | peak |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("picture*.json")):
        data = json.loads(path.read_text())
        for row in data["rows"]:
            if "skipped" not in row:
                forward = f"{row['forward_ms']:.1f} ms" if "forward_ms" in row else ""
                peak = row.get("staged_peak_gb", row.get("resident_peak_gb"))
                lines.append(
                    f"| {data['environment']['gpu']} | {row['format']} | {row['side']}² | {forward} | "
                    f"{row['picture_s']:.2f} s | {peak:.1f} GB |"
                )
    return "\n".join(lines)


def save(folder: Path, name: str, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as they come: a run that is cut leaves a whole file of what it measured."""
    folder.mkdir(parents=True, exist_ok=True)
    place = environment()
    path = folder / f"{name}-{place['gpu'].replace(' ', '-').lower()}.json"
    done: list[dict[str, Any]] = []
    for row in rows:
        done.append(row)
        print(json.dumps(row), flush=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"environment": place, "rows": done}, indent=1) + "\n")
        temporary.replace(path)


def main(argv: list[str]) -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "tools" / "results", help="folder of the result files")
    parser.add_argument("--only", choices=("kernels", "forward", "diffusers"), help="one part")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048], help="pictures' sides in pixels")
    parser.add_argument(
        "--model", type=Path, help="a full-size directory; without it a random one is written and removed"
    )
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the README's table of a folder and stop")
    parser.add_argument("--no-tests", action="store_true", help="skip the kernel tests that guard the figures")
    args = parser.parse_args(argv)
    if args.table is not None:
        print(table(args.table))
        return
    if not torch.cuda.is_available():
        raise SystemExit("this measures a CUDA device, found none; run it on the machine that the figures are for")
    if (
        not args.no_tests
        and subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/kernels"], cwd=ROOT).returncode
    ):
        raise SystemExit("the kernel tests fail on this device: no figures on red")
    if args.only in (None, "kernels"):
        save(args.json, "kernels", kernels())
    if args.only == "kernels":
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "model"
        if args.model is None:
            write_checkpoint(model)
        if args.only in (None, "forward"):
            save(args.json, "picture", pictures(model, tuple(args.sides)))
        if args.only in (None, "diffusers"):
            save(args.json, "picture-diffusers", theirs(model, tuple(args.sides)))
