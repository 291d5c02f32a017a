"""Measure speed and memory at the official widths, with random weights, beside diffusers in the same process.

    python tools/bench.py transformer        one refiner of each kind and --layers main blocks, 512², 64 text tokens
    python tools/bench.py text               a 20-token prompt; diffusers pads to 512
    python tools/bench.py vae                decode of a picture of --side pixels (default 512)
    python tools/bench.py research           what instruments cost: unused, and attention maps (bench_research.py)
    python tools/bench.py start              fresh processes beside one that imports torch (bench_start.py)
    python tools/bench.py checkpoint         write a full-size random bf16 model (20 GB), draw 256² in 2 steps
    python tools/bench.py table FILE         the README's table from a file of results
    python tools/bench.py --quality …        what number formats cost in quality (bench_formats.py; --quality --help)
    python tools/bench.py --gpu …            the same questions on a CUDA device (bench_gpu.py; --gpu --help)

Every measurement is one JSON line (also appended to --json FILE) with the machine, torch, threads and commit; times are
medians with the minimum beside them, `ratio` is diffusers' time over ours. The parity tests run first, and nothing is
measured on red. bf16 weights throughout; where the CPU has no bf16 arithmetic this engine computes in fp32, as it does
for a user, and diffusers in emulated bf16, as it does for a user.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_machine import ROOT, machine, watched, write_checkpoint
from bench_research import bench_research
from bench_start import bench_start

DIFFUSERS_RUN = """
import json, sys, time, torch
start = time.perf_counter()
from diffusers import ZImagePipeline
pipe = ZImagePipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
def done(pipe, i, t, values):
    print(json.dumps({"event": "step", "seconds": time.perf_counter() - start}), flush=True)
    return {}
pipe(prompt=["a red circle"], height=256, width=256, num_inference_steps=2, guidance_scale=0.0,
     callback_on_step_end=done)
"""


def medians(run: Callable[[], object], repeat: int) -> dict[str, float]:
    """Seconds of a call: median and minimum of `repeat`, after one call to warm up."""
    run()
    took = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return {"median_s": round(statistics.median(took), 4), "min_s": round(min(took), 4)}


def beside(name: str, ours: Callable[[], object], theirs: Callable[[], object], repeat: int) -> dict[str, Any]:
    """Both sides of one measurement and their ratio."""
    a, b = medians(ours, repeat), medians(theirs, repeat)
    return {"name": name, "ours": a, "diffusers": b, "ratio": round(b["median_s"] / a["median_s"], 2)}


def matmul_rate(dtype: Any) -> float:
    """GFLOP/s of a plain square matrix product: the ceiling of this machine."""
    import torch

    n = 2048
    a, b = torch.randn(2, n, n).to(dtype)
    return 2 * n**3 / medians(lambda: a @ b, 3)["min_s"] / 1e9


def bench_transformer(args: argparse.Namespace) -> dict[str, Any]:
    """Whole forwards of a transformer of the official width."""
    import torch
    from diffusers import ZImageTransformer2DModel

    from s3dit.model.config import TransformerConfig
    from s3dit.model.layout import patchify, text_to_image
    from s3dit.model.transformer import Transformer
    from s3dit.runtime.devices import place

    torch.manual_seed(0)
    theirs = ZImageTransformer2DModel(n_layers=args.layers, n_refiner_layers=1).to(torch.bfloat16).eval()
    json_config = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.config.items()}
    with torch.device("meta"):
        ours = Transformer(TransformerConfig.from_json(json_config, "diffusers"))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    compute = place("cpu", "bf16").compute
    latents, text, t = torch.randn(16, 64, 64), torch.randn(64, 2560).bfloat16(), torch.tensor([0.3])
    context = ours.context(text_to_image([(32, 32)], [64]), text.to(compute))
    x = patchify(latents)
    with torch.inference_mode():
        row = beside(
            f"transformer forward, 512² + 64 tokens, {args.layers} main blocks and both refiners, bf16 weights",
            lambda: ours(x, t, context),
            lambda: theirs([latents[:, None].bfloat16()], t, [text], return_dict=False),
            args.repeat,
        )
    tokens, per_token = 1088, 2 * (4 * 3840**2 + 3 * 3840 * 10240)
    flops = per_token * (tokens * args.layers + 1024) + 4 * 3840 * (tokens**2 * args.layers + 1024**2)
    row["gflops"] = round(flops / row["ours"]["median_s"] / 1e9, 1)
    row["matmul_gflops"] = {str(d).split(".")[1]: round(matmul_rate(d), 1) for d in (torch.bfloat16, torch.float32)}
    row["share_of_matmul"] = round(row["gflops"] / row["matmul_gflops"][str(compute).split(".")[1]], 3)
    return row


def bench_text(args: argparse.Namespace) -> dict[str, Any]:
    """The text encoder's layers on a 20-token prompt; diffusers runs every layer on 512 tokens."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    from s3dit.model.config import TextEncoderConfig
    from s3dit.model.text_encoder import TextEncoder
    from s3dit.runtime.devices import place

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 1024, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": args.layers + 1,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    }  # fmt: skip
    theirs = Qwen3Model(Qwen3Config(**sizes)).to(torch.bfloat16).eval()
    with torch.device("meta"):
        ours = TextEncoder(TextEncoderConfig.from_json(sizes, "sizes"))
    ours.load_state_dict({f"model.{k}": v for k, v in theirs.state_dict().items()}, assign=True)
    ids = torch.randint(0, 1024, (1, 20))
    padded = torch.cat((ids, torch.zeros(1, 492, dtype=torch.long)), dim=1)
    mask = torch.arange(512)[None] < 20
    x = theirs.embed_tokens.weight[ids[0]].to(place("cpu", "bf16").compute)
    with torch.inference_mode():
        return beside(
            f"text encoding, 20 tokens, {args.layers + 1} of 36 layers (the last is not run here), bf16 weights",
            lambda: ours(x, [20]),
            lambda: theirs(padded, attention_mask=mask, output_hidden_states=True).hidden_states[-2],
            args.repeat,
        )


def bench_vae(args: argparse.Namespace) -> dict[str, Any]:
    """Decode a picture of --side pixels with the official autoencoder."""
    import torch
    from diffusers import AutoencoderKL

    from s3dit.model.config import VAEConfig
    from s3dit.model.vae import Autoencoder
    from s3dit.runtime.devices import place

    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    ).to(torch.bfloat16).eval()  # fmt: skip
    ours = Autoencoder(VAEConfig(3, 3, 16, (128, 256, 512, 512), 2, 32, 0.3611, 0.1159))
    ours.load_state_dict(theirs.state_dict())
    ours = ours.to(place("cpu", "bf16").compute).eval()
    latents = torch.randn(1, 16, args.side // 8, args.side // 8)
    with torch.inference_mode():
        return beside(
            f"VAE decode, {args.side}², bf16 weights",
            lambda: ours.decode(latents),
            lambda: theirs.decode(latents.bfloat16(), return_dict=False),
            args.repeat,
        )


def bench_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """A picture from a full-size checkpoint, in a process of its own."""
    free = shutil.disk_usage(args.folder).free
    if free < 24e9:
        raise SystemExit(f"{args.folder}: {free / 1e9:.0f} GB free; needed 24 GB for the random model; use --folder")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model = Path(folder) / "model"
        write_checkpoint(model)
        ours = [sys.executable, "-m", "s3dit", "generate", "a red circle", "--model", str(model), "--dtype", "bf16"]
        ours += ["--height", "256", "--width", "256", "--steps", "2", "--guidance", "0", "--json"]
        row = {
            "name": "full-size bf16 checkpoint from disk, 256², 2 steps",
            "ours": watched([*ours, "-o", str(Path(folder) / "out.png")]),
        }
        if not args.ours_only:
            row["diffusers"] = watched([sys.executable, "-c", DIFFUSERS_RUN, str(model)])
    return row


def table(path: Path) -> str:
    """The README's table of a file of results."""
    lines = ["| measured | s3dit | diffusers | ratio |", "|---|---|---|---|"]
    for row in map(json.loads, path.read_text().splitlines()):
        both = [row.get(side, {}) for side in ("ours", "diffusers")]
        if "median_s" in both[0]:
            cells = [f"{side['median_s']:.3g} s" for side in both]
        else:
            cells = [
                f"first step {side.get('first_step_s', '–')} s, all {side['seconds']} s, "
                f"{side['peak_anonymous_gb']} GB anonymous"
                if side
                else "not run"
                for side in both
            ]
        lines.append(f"| {row['name']} | {cells[0]} | {cells[1]} | {row.get('ratio', '')} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and measure."""
    if "--gpu" in sys.argv:
        import bench_gpu

        bench_gpu.main([word for word in sys.argv[1:] if word != "--gpu"])
        return
    if "--quality" in sys.argv:
        import bench_formats

        bench_formats.main(["quality", *(one for one in sys.argv[1:] if one != "--quality")])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("transformer", "text", "vae", "research", "start", "checkpoint", "table"))
    parser.add_argument("file", nargs="?", type=Path, help="results, for table")
    parser.add_argument("--layers", type=int, default=1, help="main blocks, or text layers (default 1)")
    parser.add_argument("--side", type=int, default=512, help="of the picture that vae decodes (default 512)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append the result to this file")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the 20 GB model goes")
    parser.add_argument("--ours-only", action="store_true", help="checkpoint: do not run diffusers")
    parser.add_argument("--no-tests", action="store_true", help="skip the parity tests that guard the figures")
    args = parser.parse_args()
    if args.what == "table":
        print(table(args.file))
        return
    guards = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "tests/parity"]
    if not args.no_tests and subprocess.run(guards, cwd=ROOT).returncode:
        raise SystemExit("the tests fail: no figures on red")
    bench = {
        "transformer": bench_transformer, "text": bench_text, "vae": bench_vae, "research": bench_research,
        "start": lambda args: bench_start(args.repeat), "checkpoint": bench_checkpoint,
    }  # fmt: skip
    line = json.dumps(bench[args.what](args) | {"machine": machine()}, ensure_ascii=False)
    print(line)
    if args.json is not None:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
