"""Score regions: whether two things, asked for by two prompts with masks, are drawn right, each in its half.

    python tools/region_scores.py                     the embedded model, 240 cases a form, about 5 minutes
    python tools/region_scores.py --model DIR --json regions.json

A case is two things of `tiny_world` in the halves of a picture, left and right or top and bottom, with a seed of its
own. It is right if the picture shows two things and no more, each of the color and shape asked for, on its own half and
on the right background. The forms differ in what a region's prompt says: where the thing is (`placed`), nothing of it
(`plain`, whose thing then lies where the halves meet), or that it is small, in a centered region; and in the share that
a prompt of the background alone has (`base_weight`). `one prompt` says both things without regions, for comparison.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny_score import MIN_OVERLAP, find
from tiny_world import SIDE, Scene, draw_scene

from s3dit import Pipeline, Region

HALVES = {
    "left of": (("left", (0, 0, 0.5, 1)), ("right", (0.5, 0, 0.5, 1))),
    "above": (("top", (0, 0, 1, 0.5)), ("bottom", (0, 0.5, 1, 0.5))),
}


@dataclass(frozen=True)
class Form:
    """How a case is put into words: of each half (thing, place, background); centered, and the base's weight."""

    words: str = "a {thing} on a {back} background"
    centered: bool = False
    base: float = 0.0

    def regions(self, scene: Scene) -> list[Region]:
        """The regions of a case."""
        pairs = zip(scene.things, HALVES[scene.arrangement], strict=True)
        return [
            Region(box, self.words.format(thing=f"{thing.colour} {thing.shape}", place=place, back=scene.background),
                   centered=self.centered)
            for thing, (place, box) in pairs
        ]  # fmt: skip


PLACED = "a {thing} at the {place} on a {back} background"
SMALL = "a small {thing} on a {back} background"
FORMS = {
    "plain": Form(),
    "placed": Form(PLACED),
    "placed, base 0.2": Form(PLACED, base=0.2),
    "small, centered": Form(SMALL, centered=True),
    "small, centered, base 0.2": Form(SMALL, centered=True, base=0.2),
}


def cases(count: int) -> list[Scene]:
    """Scenes of two things, one left of or above the other."""
    rng = np.random.default_rng(13)
    scenes: list[Scene] = []
    while len(scenes) < count:
        # One in five has a pair of color and shape that the training never showed, as in the fixed prompts.
        scene = draw_scene(rng, held_out=len(scenes) % 5 == 4)
        scenes += [scene] if scene.arrangement in HALVES else []
    return scenes


def right(picture: Any, scene: Scene) -> bool:
    """Whether both things are there, right, each on its own half, and nothing else."""
    ground, found = find(np.asarray(picture))
    if ground != scene.background or len(found) != 2:
        return False
    axis: Callable[[Any], float] = (lambda thing: thing.x) if scene.arrangement == "left of" else (lambda t: t.y)
    found.sort(key=axis)
    things = zip(found, scene.things, strict=True)
    alike = all(a.colour == b.colour and a.shape == b.shape and a.overlap >= MIN_OVERLAP for a, b in things)
    return alike and axis(found[0]) < SIDE / 2 < axis(found[1])


def draw(pipe: Pipeline, scenes: list[Scene], form: Form | None, first: int) -> list[Any]:
    """Pictures of cases; form: None is one prompt without regions · first: seed of the first."""
    fields: dict[str, Any] = {"seed": list(range(first, first + len(scenes)))}
    prompts = [f"a {scene.background} background" for scene in scenes]
    if form is None:
        prompts = [
            f"a {a.colour} {a.shape} {scene.arrangement} a {b.colour} {b.shape} on a {scene.background} background"
            for scene in scenes
            for a, b in [scene.things]
        ]
    else:
        fields |= {"region": [form.regions(scene) for scene in scenes], "base_weight": form.base}
    return pipe(prompts, **fields).images


def main() -> None:
    """Score every form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of the same world (default: the embedded one)")
    parser.add_argument("--count", type=int, default=240, help="cases (default 240)")
    parser.add_argument("--batch", type=int, default=24, help="pictures a call (default 24)")
    parser.add_argument("--json", type=Path, help="a file for the table")
    args = parser.parse_args()
    pipe, scenes = Pipeline.load(args.model), cases(args.count)
    table: dict[str, float] = {}
    print("| form | right |\n|---|---|")
    for name, form in {"one prompt": None, **FORMS}.items():
        hits = 0
        for first in range(0, len(scenes), args.batch):
            batch = scenes[first : first + args.batch]
            hits += sum(map(right, draw(pipe, batch, form, first), batch))
        table[name] = hits / len(scenes)
        print(f"| {name} | {table[name]:.1%} |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"cases": len(scenes), "right": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
