"""Score the embedded model by solver and number of steps: shares of pictures that show what their prompt demands.

`python tools/solver_scores.py` prints a table, a row for each solver, of `--count` fixed prompts, a fifth of which have
a color and a shape that were never trained together; `--json FILE` writes it too. The model is distilled to 8 steps of
euler; solvers of twice as many calls are given half the steps, so that a column is one number of model calls.
`--presets` scores presets instead, comfyui-2k over the pictures of comfyui-turbo; `--model` takes another model of the
same world.
"""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tiny_score import judge
from tiny_world import fixed_prompts

from s3dit import Pipeline
from s3dit.request import Solver
from s3dit.sampling.solvers import TWICE

CALLS = (2, 4, 8, 16)


def scored(pipe: Pipeline, count: int, **fields: Any) -> tuple[float, list[Any]]:
    """Share of pictures in which everything is as the prompt demands, and the pictures."""
    every = fixed_prompts()
    scenes, prompts = zip(*every[:: len(every) // count][:count], strict=True)
    drawn = pipe(list(prompts), seed=list(range(count)), **fields).images
    right = sum(judge(np.asarray(each), scene).everything for each, scene in zip(drawn, scenes, strict=True))
    return right / count, drawn


def right(pipe: Pipeline, solver: Solver, calls: int, count: int) -> float:
    """Share of pictures that a solver draws right with so many model calls."""
    steps = calls // 2 if solver in TWICE else calls
    return scored(pipe, count, num_inference_steps=steps, solver=solver)[0]


def presets(pipe: Pipeline, count: int) -> None:
    """Print a table of presets."""
    print("| preset | right |\n|---|---|")
    share, turbo = scored(pipe, count, preset="comfyui-turbo")
    print(f"| comfyui-turbo | {share:.0%} |", flush=True)
    for preset in ("comfyui-base", "diffusers", "official", "comfyui-2k"):
        again = {"image": turbo} if preset == "comfyui-2k" else {}
        print(f"| {preset} | {scored(pipe, count, preset=preset, **again)[0]:.0%} |", flush=True)


def main() -> None:
    """Score every solver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="prompts (default 100)")
    parser.add_argument("--json", type=Path, help="a file for the table")
    parser.add_argument("--model", default="embedded", help="a model of the same world (default embedded)")
    parser.add_argument("--presets", action="store_true", help="score presets, not solvers")
    args = parser.parse_args()
    pipe, table = Pipeline.load(args.model), dict[str, dict[int, float]]()
    if args.presets:
        presets(pipe, args.count)
        return
    print("| solver |", " | ".join(f"{calls} calls" for calls in CALLS), "|\n" + "|---" * (len(CALLS) + 1) + "|")
    for solver in get_args(Solver):
        table[solver] = {calls: right(pipe, solver, calls, args.count) for calls in CALLS}
        print(f"| {solver} |", " | ".join(f"{share:.0%}" for share in table[solver].values()), "|", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"prompts": args.count, "right": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
