"""Measure the number formats: speed and memory at the official width, and what they cost in quality.

    python tools/bench_formats.py transformer      one forward of --layers main blocks, 512² + 64 tokens, each format
    python tools/bench_formats.py products         a product by 3840 × 3840 at --tokens, each format and GGUF's
    python tools/bench_formats.py text             text encoding of --tokens in each format: seconds, error against fp32
    python tools/bench_formats.py memory           a full-size random model: quantize it, draw 256², peaks of memory
    python tools/bench_formats.py quality          velocity error on the embedded model, teacher-forced, against fp32
    python tools/bench_formats.py quality --score 500        and the share of pictures that show their prompt
    python tools/bench.py --quality …                        the same, from the program that measures the rest

Every measurement is one JSON line; `quality` prints a markdown table. transformer: random weights, all formats in one
process and each beside bf16 measured just before it; times are medians, of processor time with --cpu-time (on a machine
that others use), `ratio` is bf16's time over the format's. products: medians, each in turn with bf16; `against_bf16` is
the format's time over that of bf16. memory needs 36 GB of disk under --folder.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_machine import machine, watched, write_checkpoint
from torch import Tensor

from s3dit.inputs.noise import Source, draw
from s3dit.kernels.gguf import GGUF
from s3dit.kernels.scheme import Scheme
from s3dit.kernels.schemes import SCHEMES, linear
from s3dit.model.config import TextEncoderConfig, TransformerConfig
from s3dit.model.layout import text_to_image
from s3dit.model.linear import Linear, QuantLinear, swap
from s3dit.model.text_encoder import TextEncoder
from s3dit.model.transformer import Transformer
from s3dit.pipeline import Pipeline
from s3dit.runtime.devices import place
from s3dit.weights.quantize import quantizable_layers

PROMPTS = (
    "a red star above a blue ring on a white background", "a green circle", "black background, large pink heart",
    "a small yellow square", "a blue triangle left of a red circle", "an orange ring in the top left corner",
    "a purple star", "white heart below a green square",
)  # fmt: skip
OFFICIAL: dict[str, Any] = {
    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 3840, "n_refiner_layers": 1,
    "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 2560, "siglip_feat_dim": None,
    "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": (32, 48, 48),
}  # fmt: skip


def blank(layers: int, name: str | None) -> Transformer:
    """A transformer of the official width with random weights, in a number format or in bf16."""
    with torch.device("meta"):
        model = Transformer(TransformerConfig(n_layers=layers, **OFFICIAL))
        if name is not None:
            names = [n.removesuffix(".weight") for n in model.state_dict() if n.endswith(".weight")]
            for layer, scheme in quantizable_layers("transformer", names, SCHEMES[name]).items():
                swap(model, scheme, layer.__eq__)
    filled = {}
    for key, tensor in model.state_dict().items():
        if tensor.dtype in (torch.int8, torch.uint8):
            filled[key] = torch.randint(
                -127 if tensor.dtype == torch.int8 else 0, 127, tensor.shape, dtype=tensor.dtype
            )
        else:
            dtype = torch.bfloat16 if tensor.dtype == torch.float32 and not key.endswith(".scale") else tensor.dtype
            filled[key] = (torch.randn(tensor.shape) * 0.02).to(dtype)
    model.load_state_dict(filled, assign=True)
    return model.requires_grad_(False)


def bench_transformer(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Whole forwards, each format in turn with bf16."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    compute = place("cpu", "bf16").compute
    layout, x, text = text_to_image([(32, 32)], [64]), torch.randn(1024, 64), torch.randn(64, 2560).to(compute)

    def seconds(model: Transformer) -> float:
        """Median time of a forward, without the first."""
        context, took = model.context(layout, text), []
        for _ in range(args.repeat + 1):
            start = clock()
            model(x, torch.tensor([0.3]), context)
            took.append(clock() - start)
        return statistics.median(took[1:])

    plain = blank(args.layers, None)
    for name in args.formats:
        wide, narrow = seconds(plain), seconds(blank(args.layers, name))
        what = f"transformer forward in {name}, 512² + 64 tokens, {args.layers} main blocks and both refiners"
        yield {"name": what, "bf16_s": round(wide, 4), "s": round(narrow, 4), "ratio": round(wide / narrow, 2)}


def bench_products(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One product of each format, in turn with the same one in bf16."""
    out, in_ = 3840, 3840
    plain = torch.randn(out, in_).bfloat16() * 0.02
    for name in [*args.formats, *args.gguf]:
        scheme = {**SCHEMES, **GGUF}[name]
        parts = scheme.encode(plain) if scheme.encode else random_blocks(scheme.spec(out, in_))
        row: dict[str, Any] = {"name": f"product with {name}, {out} × {in_}"}
        for tokens in args.tokens:
            x = torch.randn(tokens, in_).bfloat16()
            took = []
            for _ in range(args.repeat + 1):
                start = time.perf_counter()
                F.linear(x, plain)
                middle = time.perf_counter()
                linear(x, scheme, parts)
                took.append((middle - start, time.perf_counter() - middle))
            wide, narrow = (statistics.median(times) for times in zip(*took[1:], strict=True))
            row[str(tokens)] = {"bf16_ms": round(wide * 1e3, 2), "ms": round(narrow * 1e3, 2)}
            row[str(tokens)]["against_bf16"] = round(narrow / wide, 2)
        yield row


def bench_text(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Layers of the official width: seconds in bf16 and in each format, and errors against fp32.

    Weights are normal; four input channels and three of every norm are 20 to 30 times as large, as in trained models.
    """
    exact = text_encoder(args.layers, None, torch.float32)
    for name in (None, *args.formats):
        model = text_encoder(args.layers, name, torch.bfloat16)
        row: dict[str, Any] = {"name": f"text encoding in {name or 'bf16'}, {args.layers} layers"}
        for tokens in args.tokens:
            x = torch.randn(tokens, 2560, generator=torch.Generator().manual_seed(0)) / 2
            x[:, :4] *= 30
            expected, took = exact(x, [tokens]), []
            for _ in range(args.repeat + 1):
                start = time.perf_counter()
                found = model(x.bfloat16(), [tokens])
                took.append(time.perf_counter() - start)
            error = float((found.float() - expected).norm() / expected.norm())
            row[str(tokens)] = {"s": round(statistics.median(took[1:]), 4), "error": round(error, 5)}
        yield row


def text_encoder(layers: int, name: str | None, dtype: torch.dtype) -> TextEncoder:
    """The same random weights every time, in a dtype, or the linear layers in a number format."""
    sizes = {"vocab_size": 8, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": layers + 1}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = TextEncoderConfig.from_json({**sizes, **heads, "rms_norm_eps": 1e-6, "rope_theta": 1000000}, "bench")
    model, draw = TextEncoder(config).requires_grad_(False), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.02, generator=draw)
        else:
            parameter.fill_(1.0)
            parameter[torch.randperm(len(parameter), generator=draw)[:3]] *= 20
    model = model.to(dtype)
    for path, module in list(model.named_modules()) if name else []:
        if type(module) is Linear:
            parent, _, leaf = path.rpartition(".")
            layer = QuantLinear(SCHEMES[str(name)], module.in_features, module.out_features)
            layer._buffers.update(encode(SCHEMES[str(name)], module.weight))
            setattr(model.get_submodule(parent), leaf, layer)
    return model


def encode(scheme: Scheme, weight: Tensor) -> dict[str, Tensor]:
    """A weight in a format that is written here."""
    assert scheme.encode is not None
    return scheme.encode(weight)


def random_blocks(spec: Any) -> dict[str, Tensor]:
    """Parts of a GGUF weight with random bytes, whose fp16 scales are finite: no byte has its highest exponent bits."""
    return {name: torch.randint(0, 100, shape, dtype=dtype) for name, (shape, dtype) in spec.items()}


def bench_memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Peaks of memory of quantizing a full-size model, and of drawing with it."""
    program = [sys.executable, "-m", "s3dit"]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        full, small, picture = (str(Path(folder) / name) for name in ("full", "small", "out.png"))
        write_checkpoint(Path(full))
        for name in args.formats:
            command = [*program, "quantize", full, small, "--to", name, "--text", "int8-weights", "--force"]
            yield {"name": f"s3dit quantize --to {name}, full size, from bf16"} | watched(command)
            command = [*program, "generate", "a red circle", "--model", small, "--height", "256", "--width", "256"]
            command += ["--steps", str(args.steps), "--guidance", "0", "--json", "-o", picture]
            yield {"name": f"256² from a full-size {name} model, {args.steps} steps"} | watched(command)


def trajectory(pipe: Pipeline, prompts: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor, float, Tensor]]:
    """Of every prompt and step: text features, state, sigma and velocity of this pipeline, each step from the last."""
    transformer: Any = pipe.parts["transformer"]
    for seed, prompt in enumerate(prompts):
        text = pipe.encode([prompt])[0]
        context = transformer.context(text_to_image([(8, 8)], [len(text)]), text)
        x = draw(((8, 8),), [Source(torch.Generator().manual_seed(seed))])
        levels = pipe.plan(prompt=prompt, seed=seed).sigmas
        for sigma, following in zip(levels, levels[1:], strict=False):
            velocity = transformer(x, torch.tensor([1 - sigma]), context)
            yield text, x, sigma, velocity
            x = x + (sigma - following) * velocity


def velocity_errors(states: list[tuple[Tensor, Tensor, float, Tensor]], pipe: Pipeline) -> list[float]:
    """Relative L2 errors of a pipeline's velocity at given states."""
    transformer: Any = pipe.parts["transformer"]
    errors = []
    for text, x, sigma, expected in states:
        context = transformer.context(text_to_image([(8, 8)], [len(text)]), text.to(pipe.placement.compute))
        found = transformer(x, torch.tensor([1 - sigma]), context).float()
        errors.append(float((found - expected).norm() / expected.norm()))
    return errors


def bench_quality(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Errors of the velocity of every format, and with --score what its pictures show."""
    options: dict[str, Any] = {"device": "cpu", "residency": "resident"}
    states = list(trajectory(Pipeline.load(dtype="fp32", **options), PROMPTS))
    print("| format | velocity error, mean | worst | score |\n|---|---|---|---|")
    for name in ("fp32", "bf16", *args.formats):
        dtype, quantize = (name, None) if name in ("fp32", "bf16") else ("bf16", name)
        pipe = Pipeline.load(dtype=dtype, quantize=quantize, **options)
        # In the arithmetic that a GPU has, also where this CPU would be faster, and more exact, in fp32.
        pipe.parts.placement = replace(pipe.placement, compute=pipe.placement.dtype)
        errors = velocity_errors(states, pipe)
        score = share(pipe, args.score) if args.score else None
        mean, worst = statistics.mean(errors), max(errors)
        print(f"| {name} | {mean:.2e} | {worst:.2e} | {'–' if score is None else f'{score:.1%}'} |", flush=True)
        yield {"name": f"quality of {name}", "mean": round(mean, 5), "worst": round(worst, 5), "score": score}


def share(pipe: Pipeline, count: int) -> float:
    """The share of `count` fixed scenes that are drawn with everything right; see tiny_score."""
    import numpy as np
    from tiny_score import judge
    from tiny_world import fixed_prompts

    drawn = [(s, pipe(prompt=caption, seed=i).images[0]) for i, (s, caption) in enumerate(fixed_prompts()[:count])]
    return sum(judge(np.asarray(picture), scene).everything for scene, picture in drawn) / len(drawn)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("transformer", "products", "text", "memory", "quality"))
    parser.add_argument("--formats", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument(
        "--gguf", nargs="*", default=["Q8_0", "Q4_K", "Q5_K", "Q6_K"], choices=list(GGUF), help="products"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 320, 1088], help="products, text (64 320 1088)")
    parser.add_argument("--layers", type=int, default=1, help="transformer: main blocks (default 1)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="memory: steps of the picture (default 2)")
    parser.add_argument("--score", type=int, default=0, metavar="N", help="quality: draw N of the fixed prompts")
    parser.add_argument("--cpu-time", action="store_true", help="transformer: processor time instead of the clock")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="memory: where the models go")
    args = parser.parse_args(argv)
    bench = {
        "transformer": bench_transformer,
        "products": bench_products,
        "text": bench_text,
        "memory": bench_memory,
        "quality": bench_quality,
    }[args.what]
    with torch.inference_mode():
        for row in bench(args):
            print(json.dumps(row | {"machine": machine()}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
