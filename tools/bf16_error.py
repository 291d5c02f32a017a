"""Measure what bf16 costs here and in diffusers: each side's error against the fp32 answer, and their ratio.

`python tools/bf16_error.py` draws `--count` cases (prompts of the embedded model's world, in turn without guidance,
with it, with a limit of its norm, and in another size) three times from the same noise: by diffusers in fp32, by
diffusers in bf16 and here in bf16, weights and activations, on a CPU or with `--device`. An error is
‖latents - latents in fp32‖ / ‖latents in fp32‖: after one model call, where rounding is all there is, and after the
last step, where each error has moved what comes after. The geometric means of the ratios are the figures; it ends with
1 where one is not below 1.
`--model` takes another model in the official layout.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from tiny_world import fixed_prompts

from s3dit import Pipeline
from s3dit.runtime.embedded import EMBEDDED

# What a case has besides prompt and noise; each takes its turn.
KINDS: tuple[dict[str, Any], ...] = (
    {"guidance_scale": 0.0},
    {"guidance_scale": 3.0, "negative_prompt": "a gray background"},
    {"guidance_scale": 3.0, "cfg_normalization": 0.8},
    {"guidance_scale": 0.0, "height": 96, "width": 160},
)
SIZE = {"height": 128, "width": 128}


def cases(count: int) -> Iterator[dict[str, Any]]:
    """Fields of each case, its noise with them as latents (1, 16, H/8, W/8)."""
    every = fixed_prompts()
    for i in range(count):
        fields = SIZE | {"prompt": every[i * len(every) // count][1]} | KINDS[i % len(KINDS)]
        shape = (1, 16, fields["height"] // 8, fields["width"] // 8)
        yield fields | {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(i))}


def theirs(pipe: Any, fields: dict[str, Any]) -> torch.Tensor:
    """Latents of diffusers' pipeline after the last step, fp32."""
    latents = fields["latents"].clone().to(pipe.device)
    drawn: torch.Tensor = pipe(**fields | {"latents": latents}, output_type="latent").images
    return drawn[0].float().cpu()


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over that of the truth, in float64."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def measured(folder: Path, count: int, steps: int, device: str = "cpu") -> list[dict[str, float]]:
    """Error of each case, ours and theirs, after one model call and after `steps`."""
    ours = Pipeline.load(folder, device=device, dtype="bf16", residency="resident")
    # Arithmetic in bf16 also on CPUs where fp32 is faster and would be taken.
    if ours.placement.compute != torch.bfloat16:
        raise SystemExit(f"{ours.placement} computes in fp32 here, with no error to compare; needed a device with bf16")
    pipes = []
    for dtype in (torch.float32, torch.bfloat16):
        pipes.append(diffusers.ZImagePipeline.from_pretrained(folder, torch_dtype=dtype).to(device))
        pipes[-1].set_progress_bar_config(disable=True)
    rows = []
    for fields in cases(count):
        row = {}
        for name, n in (("one", 1), ("all", steps)):
            wanted = fields | {"num_inference_steps": n}
            truth = theirs(pipes[0], wanted)
            row[f"theirs, {name}"] = error(theirs(pipes[1], wanted), truth)
            row[f"ours, {name}"] = error(ours(output_type="latent", **wanted).latents[0], truth)
        rows.append(row)
    return rows


def mean(values: Any) -> float:
    """Geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def ratios(rows: list[dict[str, float]], name: str) -> list[float]:
    """Our error over theirs, of each case; name: one (model call) or all."""
    return [row[f"ours, {name}"] / row[f"theirs, {name}"] for row in rows]


def main() -> int:
    """Print the table; returns 1 where we are not nearer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="cases (default 40)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a picture (default 8)")
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="a folder in the official layout")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default cpu)")
    parser.add_argument("--json", type=Path, help="a file for the errors of every case")
    args = parser.parse_args()
    rows = measured(args.model, args.count, args.steps, args.device)
    print("| after | ours | diffusers | ratio | least | most |\n|---|---|---|---|---|---|")
    for name, after in (("one", "one model call"), ("all", f"{args.steps} steps")):
        found = ratios(rows, name)
        means = [mean(row[f"{side}, {name}"] for row in rows) for side in ("ours", "theirs")]
        print(
            f"| {after} | {means[0]:.2e} | {means[1]:.2e} | {mean(found):.3f} | {min(found):.2f} | {max(found):.2f} |"
        )
    if args.json is not None:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(any(mean(ratios(rows, name)) >= 1 for name in ("one", "all")))


if __name__ == "__main__":
    sys.exit(main())
