"""Draw the atlases of a model: which layer matters, in which number format, and what changes from step to step.

`python tools/atlas.py DIR` writes tables as JSON and as pictures: errors of the velocity and, of the embedded model,
shares of pictures that show what their prompt demands, with one block or part of it dropped, repeated or quantized; the
lens after every block; what every block wrote; changes and cosines between steps, and what a cache loses that reuses
what changed little. `--model` takes any other model, without scores; it is drawn at its own size.
The embedded model takes some seven minutes of one core, nearly all of them for scores of 24 pictures.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_score import judge
from tiny_world import fixed_prompts

from s3dit import Pipeline
from s3dit.research import pictures
from s3dit.research.atlases import StepAtlas, layer_atlas, score_atlas, step_atlas
from s3dit.research.changes import CHANGES
from s3dit.research.lenses import lens, x0_images
from s3dit.research.residual import OF_TERMS, residual
from s3dit.research.table import Table

PROMPT = "a red star above a blue ring"
PARTS = ("layers.*", "layers.*.attention", "layers.*.feed_forward")
ADDED = ("layers.*.attention.added", "layers.*.ffn.added")
# Of what a cache reuses: changes up to these.
LIMITS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


def right(drawn: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    """Share of pictures in which everything is as the prompt, one of `fixed_prompts`, demands."""
    scenes = {prompt: scene for scene, prompt in fixed_prompts()}
    verdicts = [judge(np.asarray(each), scenes[prompt]) for each, prompt in zip(drawn, prompts, strict=True)]
    return sum(verdict.everything for verdict in verdicts) / len(verdicts)


def errors(pipe: Pipeline, modules: Sequence[str], plan: dict[str, Any]) -> dict[str, Table | Image.Image]:
    """Errors of the velocity: by module and change, and of dropping by step."""
    with layer_atlas(pipe, modules, CHANGES) as atlas:
        pipe(**plan)
    return {"velocity": atlas.errors(), "velocity-drop": atlas.by_step("drop")}


def cached(pipe: Pipeline, atlas: StepAtlas, prompts: Sequence[str], plan: dict[str, Any]) -> Table:
    """What a cache loses: by the change up to which it reuses, what it skips, and the error of latents or the score."""
    plain = pipe(**plan).latents[0]
    rows = []
    for limit in LIMITS:
        skips = atlas.skippable(limit)
        share = sum(x or 0 for row in skips.values for x in row) / (len(skips.rows) * len(skips.columns))
        with pipe.edit(atlas.reuse(limit)):
            error = ((pipe(**plan).latents[0] - plain).norm() / plain.norm()).item()
            score = right(pipe(**plan | {"request": prompts}).images, prompts) if prompts else None
        rows.append([share, error, score])
    return Table.of("A cache that reuses what changes by at most …", LIMITS, ["skipped", "error", "right"], rows)


def main() -> None:
    """Write everything into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where tables and pictures are written")
    parser.add_argument("--model", help="a folder, file or hub name (default: the embedded model)")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--steps", type=int, help="of the solver (default: the model's own number)")
    parser.add_argument("--modules", nargs="+", default=PARTS, help="patterns of blocks, parts and linear layers")
    parser.add_argument("--count", type=int, default=24, help="pictures that are scored, of the embedded model")
    chosen = parser.parse_args()
    # Rounding to bf16 would be as large as the errors of 8-bit formats.
    pipe = Pipeline.load(chosen.model) if chosen.model else Pipeline.load(dtype="fp32")
    prompts = [] if chosen.model else [prompt for _, prompt in fixed_prompts()][: chosen.count]
    plan = {"request": chosen.prompt, "seed": 7, "num_inference_steps": chosen.steps}
    chosen.folder.mkdir(parents=True, exist_ok=True)

    def write(found: dict[str, Table | Image.Image]) -> None:
        """Save tables and pictures by their names."""
        for name, each in found.items():
            if isinstance(each, Table):
                each.save(chosen.folder / f"{name}.json")
                each = each.picture()
            each.save(chosen.folder / f"{name}.png")
            print(f"{time.perf_counter() - start:6.1f} s  {name}", flush=True)

    start = time.perf_counter()
    with lens(pipe) as seen, residual(pipe) as terms, step_atlas(pipe, ["layers.*.output", *ADDED]) as steps:
        pipe(**plan)
    write({"lens": seen.picture(), "lens-error": seen.errors()})
    write({"x0": pictures.strip(x0_images(pipe, pipe.stream(**plan)), seen.steps, f"x0 by step: {chosen.prompt}")})
    write({f"residual-{statistic}": terms.table(statistic) for statistic in OF_TERMS})
    write({"massive": terms.massive(seen.steps[len(seen.steps) // 2])})
    write({"steps": steps.changes(), "steps-cosine": steps.cosines(steps.sites[-1])})
    with step_atlas(pipe, ADDED) as added:
        pipe(**plan)
    write({"cache": cached(pipe, added, prompts, plan)})
    write(errors(pipe, chosen.modules, plan))
    if prompts:
        write(
            {
                "score": score_atlas(
                    pipe, prompts, right, chosen.modules, CHANGES, seed=7, num_inference_steps=chosen.steps
                )
            }
        )


if __name__ == "__main__":
    main()
