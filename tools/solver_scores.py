"""Score the embedded model by solver and number of steps: shares of pictures that show what their prompt demands.

`python tools/solver_scores.py` prints a table, a row for each solver, of `--count` fixed prompts, a fifth of which have
a color and a shape that were never trained together; `--json FILE` writes it too. The model is distilled to 8 steps of
euler; solvers of twice as many calls are given half the steps, so that a column is one number of model calls.
"""

import argparse
import json
from pathlib import Path
from typing import get_args

import numpy as np
from tiny_score import judge
from tiny_world import fixed_prompts

from s3dit import Pipeline
from s3dit.request import Solver
from s3dit.sampling.solvers import TWICE

CALLS = (2, 4, 8, 16)


def right(pipe: Pipeline, solver: Solver, calls: int, count: int) -> float:
    """Share of pictures in which everything is as the prompt demands."""
    every = fixed_prompts()
    scenes, prompts = zip(*every[:: len(every) // count][:count], strict=True)
    steps = calls // 2 if solver in TWICE else calls
    drawn = pipe(list(prompts), seed=list(range(count)), num_inference_steps=steps, solver=solver).images
    return sum(judge(np.asarray(each), scene).everything for each, scene in zip(drawn, scenes, strict=True)) / count


def main() -> None:
    """Score every solver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="prompts (default 100)")
    parser.add_argument("--json", type=Path, help="a file for the table")
    args = parser.parse_args()
    pipe, table = Pipeline.load(), dict[str, dict[int, float]]()
    print("| solver |", " | ".join(f"{calls} calls" for calls in CALLS), "|\n" + "|---" * (len(CALLS) + 1) + "|")
    for solver in get_args(Solver):
        table[solver] = {calls: right(pipe, solver, calls, args.count) for calls in CALLS}
        print(f"| {solver} |", " | ".join(f"{share:.0%}" for share in table[solver].values()), "|", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"prompts": args.count, "right": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
