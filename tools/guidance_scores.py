"""Score guidance by method and scale, and variation by strength, on a model of the embedded one's world.

`python tools/guidance_scores.py --model embedded-base` prints two tables of `--count` fixed prompts, a fifth of which
have a color and a shape that were never trained together; `--json FILE` writes them too. The first has, for each
method and scale, the share of pictures that show what their prompt demands, and the share of color values outside of
what pixels can hold, which are cut off: that is how too much guidance saturates. The second has, for each strength,
the share that is right and how far apart pictures of one prompt are: the root mean square of their pixels' difference
(of 255), mean over all pairs of `--seeds` seeds; the first noise of a prompt is once the same for all its pictures,
so that variation alone tells them apart, and once each has its own.

The embedded model is distilled to draw without guidance; only its undistilled twin, embedded-base, shows what
guidance is for.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_score import judge
from tiny_world import Scene, fixed_prompts

from s3dit import Pipeline

# By name, what a request has beside a scale; layers are those of the embedded model, which has six.
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cfg_normalization 1": {"cfg_normalization": 1.0},
    "guidance_interval 0.1-0.8": {"guidance_interval": (0.1, 0.8)},
    "apg": {"guidance_method": "apg"},
    "apg:norm_threshold=10": {"guidance_method": "apg:norm_threshold=10"},
    "cfg_zero": {"guidance_method": "cfg_zero"},
    "skip_layers 3:0.5@0-0.2": {"skip_layers": "3:0.5@0-0.2"},
}


def numbers(text: str) -> list[float]:
    """Numbers that commas part, none of an empty text."""
    return [float(part) for part in text.split(",") if part]


def pixels(tensor: torch.Tensor) -> np.ndarray:
    """A picture (3, H, W) in [-1, 1] as bytes (H, W, 3)."""
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def score(pipe: Pipeline, scenes: list[Scene], prompts: list[str], **fields: Any) -> dict[str, float]:
    """Shares of pictures that are right, and of color values that are cut off by half a step of a byte or more."""
    drawn = pipe(prompts, seed=list(range(len(prompts))), output_type="tensor", **fields).images
    right = [judge(pixels(each), scene).everything for each, scene in zip(drawn, scenes, strict=True)]
    clipped = [(each.abs() > 1 + 1 / 255).float().mean().item() for each in drawn]
    return {"right": float(np.mean(right)), "clipped": float(np.mean(clipped))}


def vary(
    pipe: Pipeline, scenes: list[Scene], prompts: list[str], seeds: int, strength: float, own: bool, **fields: Any
) -> dict[str, float]:
    """Share of pictures that are right, and distance of pictures of one prompt; own: whether each has its own noise."""
    count = len(prompts)
    noises = [1000 * (i if own else 0) + k for i in range(seeds) for k in range(count)]
    varied = [f"{strength}:{7000 * i + k}" for i in range(seeds) for k in range(count)] if strength else None
    drawn = pipe(prompts * seeds, seed=noises, variation=varied, output_type="tensor", **fields).images
    pictures = np.stack([pixels(each) for each in drawn]).reshape(seeds, count, -1).astype(float)
    apart = [np.sqrt(((a - b) ** 2).mean(1)).mean() for a, b in combinations(pictures, 2)]
    right = [judge(pixels(each), scene).everything for each, scene in zip(drawn, scenes * seeds, strict=True)]
    return {"right": float(np.mean(right)), "apart": float(np.mean(apart))}


def method_row(name: str, row: dict[Any, dict[str, float]]) -> str:
    """A row of the first table in Markdown: of each scale the share right and the share cut off."""
    return f"| {name} | " + " | ".join("{right:.0%}, {clipped:.2%}".format(**each) for each in row.values()) + " |"


def variation_row(strength: Any, row: dict[str, dict[str, float]]) -> str:
    """A row of the second table: with one noise and with their own the share right and how far pictures are apart."""
    return (
        f"| {float(strength):g} | "
        + " | ".join("{right:.0%}, {apart:.1f}".format(**each) for each in row.values())
        + " |"
    )


def main() -> None:
    """Print and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="embedded-base, or a folder (default: embedded)")
    parser.add_argument("--count", type=int, default=100, help="prompts (default 100)")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt for the variety (default 4)")
    parser.add_argument("--scales", type=numbers, default="4,16", help="of guidance (default 4,16; none: '')")
    parser.add_argument(
        "--strengths", type=numbers, default="0,0.3,0.5,0.7,1", help="of variation (default 0,0.3,0.5,0.7,1)"
    )
    parser.add_argument("--json", type=Path, help="a file for the tables")
    args = parser.parse_args()
    pipe, every = Pipeline.load(args.model), fixed_prompts()
    scenes, prompts = map(list, zip(*every[:: len(every) // args.count][: args.count], strict=True))
    table: dict[str, Any] = {"prompts": args.count, "steps": pipe.config.settings.num_inference_steps}
    if args.scales:
        table["without"] = score(pipe, scenes, prompts, guidance_scale=0.0)
        print("right, clipped without guidance: {right:.0%}, {clipped:.2%}\n".format(**table["without"]))
        print("| right, clipped |", " | ".join(f"{scale:g}" for scale in args.scales), "|")
        print("|---" * (len(args.scales) + 1) + "|")
        for name, fields in METHODS.items():
            row = {scale: score(pipe, scenes, prompts, guidance_scale=scale, **fields) for scale in args.scales}
            print(method_row(name, row), flush=True)
            table.setdefault("methods", {})[name] = row
    if args.strengths:
        print("\n| right, apart | one noise | own noise |\n|---|---|---|")
        for strength in args.strengths:
            pair = [vary(pipe, scenes, prompts, args.seeds, strength, own) for own in (False, True)]
            row = dict(zip(("one noise", "own noise"), pair, strict=True))
            print(variation_row(strength, row), flush=True)
            table.setdefault("variation", {})[strength] = row
    if args.json is not None:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
