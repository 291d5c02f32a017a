"""Time of a model call and of decoding on several ranks beside one, at the official sizes with random weights.

    python tools/bench_parallel.py --ranks 4              on four GPUs of this machine, bf16, 1024², as CUDA graphs
    python tools/bench_parallel.py --ranks 2 --dry        on the CPU (gloo), a tiny model: whether it runs, no figures
    python tools/bench_parallel.py --estimate             the table of s3dit/PARALLEL.md: arithmetic, nothing is run

Starts its own processes, with torchrun. Rank 0 first computes alone while the others wait, then all compute together:
a call with one item, split by tokens, and one with guidance, two items, split into groups first; and the decoder by
strips. One JSON line each: milliseconds (median of `--repeat`), the ratio, bytes that the busiest rank sends, and
‖difference‖ / ‖one rank's answer‖.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_gpu_model as engine
import torch
from bench_machine import machine
from torch import Tensor

from s3dit.model.layout import text_to_image
from s3dit.parallel.join import join
from s3dit.parallel.passes import Places, SharedPasses
from s3dit.parallel.ranks import Ranks
from s3dit.runtime.devices import place

# A recorded call of one H200 at 1024², in ms (README.md): the H100's arithmetic is the same. Bytes a second that a rank
# gets of an all-gather, of NVLink's 450e9, and the seconds until it begins: assumed. Rate of products by rows of a rank
# beside that of 4,224: 0.95 at 1,152 was measured (22.7 ms at 512²); 2,112 lie between; 528 fill 0.8 of tiles of 128.
ALONE_MS, NVLINK, BEGIN, RATES = 89.7, 300e9, 20e-6, {1: 1.0, 2: 0.98, 4: 0.95, 8: 0.8}
TOKENS, DIM, BLOCKS, FLOPS = 4224, 3840, 32, 630e12


def estimate(ranks: int, groups: int) -> dict[str, float]:
    """Milliseconds of a model call of 1024² whose items are in groups of as many ranks, one item each: an estimate."""
    own = ranks // groups
    compute = ALONE_MS / own / RATES[own]
    transfer = 2 * 2 * TOKENS * DIM * (own - 1) / own / NVLINK + BEGIN * (own > 1)
    # Behind the product that gives the queries.
    hidden = 2 * TOKENS / own * DIM**2 / (FLOPS * RATES[own])
    exposed = 1000 * BLOCKS * max(transfer - hidden, 0.0)
    # Velocities at the end, and the texts by which ranks meet at the begin.
    end = 0.3 if ranks > 1 else 0.0
    total = compute + exposed + end
    return {"compute": compute, "transfer": 1000 * BLOCKS * transfer, "exposed": exposed, "ms": total,
            "ratio": groups * ALONE_MS / total}  # fmt: skip


def estimates() -> str:
    """The estimates as a table of Markdown."""
    lines = ["| ranks | call | computing | sending, of it not hidden | ms | beside one rank |", "|---" * 6 + "|"]
    for ranks in (2, 4, 8):
        for groups, name in ((1, "one item"), (2, "guidance")):
            row = estimate(ranks, groups)
            cells = f"{row['compute']:.1f} | {row['transfer']:.1f}, {row['exposed']:.1f} | {row['ms']:.1f}"
            lines.append(f"| {ranks} | {name} | {cells} | {row['ratio']:.1f} × |")
    return "\n".join(lines)


def milliseconds(run: Callable[[], Tensor], repeat: int, device: torch.device) -> tuple[float, Tensor]:
    """Median time of a call after one to warm up, the device's work included -> it, and the answer."""

    def timed() -> tuple[float, Tensor]:
        """One call: milliseconds, and the answer."""
        start = time.perf_counter()
        answer = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - start), answer

    times = [timed() for _ in range(repeat + 2)][2:]
    return statistics.median(took for took, _ in times), times[-1][1]


def beside(name: str, alone: Callable[[], Tensor], shared: Callable[[], Tensor], ranks: Ranks, repeat: int) -> Any:
    """One measurement: rank 0 alone, then all ranks; the row on rank 0, None elsewhere."""
    ranks.exchange("")
    took, expected = milliseconds(alone, repeat, ranks.device) if ranks.rank == 0 else (0.0, None)
    ranks.exchange("")
    together, answer = milliseconds(shared, repeat, ranks.device)
    if expected is None:
        return None
    row = {"name": name, "ranks": ranks.size, "alone_ms": round(took, 3), "ms": round(together, 3)}
    return row | {"ratio": round(took / together, 3), "error": engine.relative(answer, expected)}


@torch.no_grad()
def bench(args: argparse.Namespace) -> None:
    """Measure as one of the ranks."""
    ranks, placement = join(args.ranks, place("cpu" if args.dry else "cuda", "bf16"), False)
    assert isinstance(ranks, Ranks)
    device, side = placement.device, 128 if args.dry else args.side
    torch.manual_seed(0)
    model = engine.transformer("bf16", device, args.dry)
    ranks.prepare(model)
    run: Callable[..., Tensor] = engine.Replay(model) if device.type == "cuda" and args.graphs else model
    grid = side // 16
    for items, name in ((1, "one item"), (2, "guidance")):
        layout = text_to_image([(grid, grid)] * items, [engine.CAPTION, 20][:items], device)
        width = model.config.cap_feat_dim
        text = torch.randn(len(layout.text.token_index), width, device=device, dtype=torch.bfloat16)
        context = model.context(layout, text)
        inputs = torch.randn(items * grid * grid, 64, device=device), torch.tensor([0.3], device=device), context
        shared = SharedPasses(run, ranks)
        row = beside(f"{name}, {side}²", lambda: run(*inputs), lambda: shared(*inputs), ranks, args.repeat)  # noqa: B023
        places = Places.of(ranks.form, layout.image, layout.joint, layout.gather)
        show(row, args.json, groups=places.groups, sent=max(places.sent(model.config, 2, ranks.size)))
    vae = engine.autoencoder(device, args.dry)
    latents = torch.randn(1, 16, side // 8, side // 8, device=device)
    whole = vae.decode(latents)
    ranks.prepare(vae)
    row = beside(f"decoding, {side}²", lambda: _whole(vae, latents), lambda: vae.decode(latents), ranks, args.repeat)
    assert whole.shape[-1] == side
    show(row, args.json)


def _whole(vae: Any, latents: Tensor) -> Tensor:
    """Decode without strips."""
    forward = vars(vae.decoder).pop("forward")
    try:
        picture: Tensor = vae.decode(latents)
    finally:
        vae.decoder.forward = forward
    return picture


def show(row: dict[str, Any] | None, path: Path | None, **more: Any) -> None:
    """Print a row on rank 0, and append it to a file."""
    if row is not None:
        line = json.dumps(row | more | {"machine": machine()}, ensure_ascii=False)
        print(line, flush=True)
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def main() -> None:
    """Parse the command line, start the processes, or measure as one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, each with a GPU (default 2)")
    parser.add_argument("--side", type=int, default=1024, help="of the picture, in pixels (default 1024)")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="launch passes one by one")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with a tiny model")
    parser.add_argument("--estimate", action="store_true", help="print the estimates, run nothing")
    parser.add_argument("--json", type=Path, help="append the results to this file")
    args = parser.parse_args()
    if args.estimate:
        print(estimates())
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        bench(args)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    raise SystemExit(subprocess.run([*torchrun, __file__, *sys.argv[1:]]).returncode)


if __name__ == "__main__":
    main()
