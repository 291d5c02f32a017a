"""Score maps of concepts on pictures of the embedded model: which methods, layers, heads and steps find a thing.

    python tools/concept_scores.py              draws 260 pictures, writes tools/results/concepts.json, prints the table
    python tools/concept_scores.py --table      prints the table of that file

Concepts are a thing's shape ("star"), its color ("red") and both ("red star"); of the first two, things count whose
word is not the other thing's as well. What is best is chosen on 60 prompts and scored on 200 others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from concept_truth import GRID, MEASURES, Truth, score, truths
from numpy.typing import NDArray
from tiny_world import Scene, fixed_prompts

from s3dit import Pipeline
from s3dit.research.attention import attention_maps
from s3dit.research.concepts import METHODS, concept_maps

RESULTS = Path(__file__).resolve().parent / "results" / "concepts.json"
KINDS = ("shape", "color", "phrase")
# Name of a variant -> how concepts go along.
VARIANTS: dict[str, dict[str, Any]] = {
    "template": {"source": "template"},
    "bare": {"source": "bare"},
    "prompt": {"source": "prompt"},
    "tokens": {"source": "tokens"},
    "mutual": {"source": "template", "mutual": True},
}
ROWS = [(variant, method) for variant in VARIANTS for method in METHODS] + [("word", "attention_maps")]
LAYERS, HEADS, STEPS = 6, 6, 8
RANGES = {"1-4": slice(0, 4), "5-8": slice(4, 8), "1-8": slice(0, 8)}
# Where maps are read: each head of each layer, each layer, all.
PLACES = [
    *((layer, head) for layer in range(LAYERS) for head in range(HEADS)),
    *((layer, -1) for layer in range(LAYERS)),
    (-1, -1),
]
# Heads that are combined, and those among which they are sought.
COMBINED, CANDIDATES = 6, 100
Floats = NDArray[np.float32]


def word_of(truth: Truth, kind: str) -> str:
    """What a thing is called."""
    return {"shape": truth.shape, "color": truth.colour, "phrase": f"{truth.colour} {truth.shape}"}[kind]


@dataclass
class Seen:
    """What one thing's maps are scored with: truth, kind of concept, and maps (rows, steps, layers, heads, 64)."""

    truth: Truth
    kind: str
    maps: Floats


def look(pipe: Pipeline, index: int, scene: Scene, prompt: str) -> Iterator[Seen]:
    """Draw a prompt, its seed the index, and yield what was seen of its things; nothing where one is wrong."""
    words = [f"{thing.colour} {thing.shape}" for thing in scene.things]
    words = list(dict.fromkeys(words + [word for phrase in words for word in phrase.split()]))
    keep = ("step", "layer", "head")
    with ExitStack() as stack:
        gathered = {
            name: stack.enter_context(concept_maps(pipe, words, methods=list(METHODS), keep=keep, **how))
            for name, how in VARIANTS.items()
        }
        word_maps = stack.enter_context(attention_maps(pipe, words, keep=keep))
        picture = np.asarray(pipe(prompt, seed=index).images[0])

    def read(variant: str, method: str, word: str) -> Floats:
        """Maps of a word by one method, (steps, layers, heads, 64)."""
        by = [(step, f"layers.{layer}") for step in range(1, STEPS + 1) for layer in range(LAYERS)]
        if variant == "word":
            found = [word_maps.weights(word, step=s, layer=at, head=h) for s, at in by for h in range(HEADS)]
        else:
            maps = gathered[variant]
            found = [maps.values(word, method=method, step=s, layer=at, head=h) for s, at in by for h in range(HEADS)]
        return np.stack([each.numpy() for each in found]).astype(np.float32).reshape(STEPS, LAYERS, HEADS, -1)

    things = truths(picture, scene)
    by_word = {word: np.stack([read(*row, word) for row in ROWS]) for word in words} if things else {}
    for i, truth in enumerate(things):
        for kind in KINDS:
            word = word_of(truth, kind)
            if len(things) == 1 or word != word_of(things[1 - i], kind):
                yield Seen(truth, kind, by_word[word])


def places(maps: Floats) -> Floats:
    """Maps (…, layers, heads, 64) at all PLACES: (…, places, 64)."""
    flat = maps.reshape(*maps.shape[:-3], LAYERS * HEADS, -1)
    of_layers = maps.mean(-2)
    return np.concatenate((flat, of_layers, of_layers.mean(-2, keepdims=True)), -2)


def everywhere(seen: Seen) -> NDArray[np.float64]:
    """Score a thing's maps by every row, range of steps and place: (rows, ranges, places, 4)."""
    ranges = np.stack([seen.maps[:, steps].mean(1) for steps in RANGES.values()], 1)
    return score(places(ranges), seen.truth)


def standard(maps: Floats) -> Floats:
    """Maps (…, 64) with their means taken away, divided by their deviations."""
    deviation = maps.std(-1, keepdims=True)
    centered: Floats = (maps - maps.mean(-1, keepdims=True)) / np.maximum(deviation, 1e-30)
    return centered


def merit(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """How near mean scores (…, 4) come to the goals, which more than reaching own before other does not help."""
    merits: NDArray[np.float64] = np.minimum(scores[..., 0], 0.97) / 0.9 + scores[..., 1] / 0.6 + scores[..., 2] / 0.95
    return merits


@dataclass
class Totals:
    """Sums of scores over things, NaN left out."""

    total: Any = 0.0
    count: Any = field(default=0.0)

    def add(self, scores: NDArray[np.float64]) -> None:
        """Add one thing's."""
        self.total = self.total + np.nan_to_num(scores)
        self.count = self.count + ~np.isnan(scores)

    @property
    def mean(self) -> NDArray[np.float64]:
        """The means."""
        means: NDArray[np.float64] = self.total / self.count
        return means


def choose(things: Sequence[tuple[Truth, Floats]]) -> list[int]:
    """Choose heads whose standardized maps add up to the best, one after the other.

    things: truth and standardized maps (candidates, 64) of each -> indices of candidates.
    """

    def mean(maps: Sequence[Floats]) -> NDArray[np.float64]:
        totals = Totals()
        for (truth, _), of_thing in zip(things, maps, strict=True):
            totals.add(score(of_thing, truth))
        return merit(totals.mean)

    alone = mean([maps for _, maps in things])
    pool = np.argsort(-alone)[:CANDIDATES]
    chosen, best = [int(pool[0])], float(alone[pool[0]])
    while len(chosen) < COMBINED:
        merits = mean([maps[pool] + maps[chosen].sum(0) for _, maps in things])
        if merits.max() < best + 0.004:
            break
        best = float(merits.max())
        chosen.append(int(pool[int(merits.argmax())]))
    return chosen


def candidates(seen: Seen) -> Floats:
    """The maps that are combined: of the variant "template", every method, layer and head, over all steps."""
    rows = [i for i, (variant, _) in enumerate(ROWS) if variant == "template"]
    return standard(seen.maps[rows].mean(1).reshape(len(rows) * LAYERS * HEADS, -1))


def baselines(truth: Truth, rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """Scores of no knowledge and of the whole: random, a Gaussian in the middle, and the truth on the grid."""
    middle = (np.arange(GRID) - (GRID - 1) / 2) ** 2
    gaussian = np.exp(-(middle[:, None] + middle) / 8).ravel()
    side = round(len(truth.own) ** 0.5)
    exact = truth.own.reshape(GRID, side // GRID, GRID, -1).mean((1, 3)).ravel()
    maps = {"random": rng.random(GRID * GRID), "centered Gaussian": gaussian, "ceiling of the 8 × 8 grid": exact}
    return {name: score(each, truth) for name, each in maps.items()}


def measure(count: int, choosing: int) -> dict[str, Any]:
    """Draw and score: `choosing` of the odd fixed prompts to choose by, then `count` of the even ones."""
    pipe, prompts, rng = Pipeline.load(device="cpu", dtype="fp32", residency="resident"), fixed_prompts(), None
    numbers = range(1, 2 * choosing, 2), range(0, 2 * count, 2)
    found: dict[str, Any] = {"prompts": {"choose": choosing, "score": count}, "steps": [*RANGES], "measures": MEASURES}
    grids: list[dict[str, Totals]] = [{kind: Totals() for kind in KINDS} for _ in numbers]
    material: dict[str, list[tuple[Truth, Floats]]] = {kind: [] for kind in KINDS}
    for index in numbers[0]:
        for seen in look(pipe, index, *prompts[index]):
            grids[0][seen.kind].add(everywhere(seen))
            material[seen.kind].append((seen.truth, candidates(seen)))
    chosen = {kind: choose(material[kind]) for kind in KINDS}
    rng, base = np.random.default_rng(0), {kind: dict[str, Totals]() for kind in KINDS}
    drawn, things = 0, dict.fromkeys(KINDS, 0)
    for index in numbers[1]:
        right = False
        for seen in look(pipe, index, *prompts[index]):
            right, kind = True, seen.kind
            things[kind] += 1
            grids[1][kind].add(everywhere(seen))
            of_heads = candidates(seen)[chosen[kind]].mean(0)
            rows = baselines(seen.truth, rng) | {"combined heads": score(of_heads, seen.truth)}
            for name, scores in rows.items():
                base[kind].setdefault(name, Totals()).add(scores)
        drawn += right
    names = [(method, *at) for variant, method in ROWS if variant == "template" for at in PLACES[: LAYERS * HEADS]]
    found |= {"pictures that are right": drawn, "things": things, "combined": {}, "baselines": {}, "rows": []}
    for kind in KINDS:
        found["combined"][kind] = [[method, f"layers.{layer}", head] for method, layer, head in map(names.__getitem__, chosen[kind])]
        found["baselines"][kind] = {name: totals.mean.round(4).tolist() for name, totals in base[kind].items()}
        before, scored = (grid[kind].mean for grid in grids)
        for i, (variant, method) in enumerate(ROWS):
            steps, place = np.unravel_index(int(merit(before[i]).argmax()), before[i].shape[:2])
            found["rows"].append({
                "concept": kind, "variant": variant, "method": method, "best": {
                    "steps": [*RANGES][steps], "layer": PLACES[place][0], "head": PLACES[place][1],
                    "scores": scored[i, steps, place].round(4).tolist(),
                },
                # By range of steps and place (36 heads, 6 layers, all), as in PLACES.
                "all": (scored[i] * 1000).round().astype(int).reshape(len(RANGES), len(PLACES), -1).tolist(),
            })  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    """The table of the README."""
    rows = {(row["concept"], row["variant"], row["method"]): row["best"] for row in found["rows"]}

    def cells(scores: Sequence[float]) -> str:
        return " · ".join(f"{value:.2f}"[0 if value >= 1 else 1:] if value < 1 else "1.0" for value in scores)

    lines = ["| map | *star* | *red* | *red star* |", "|---|---|---|---|"]
    for name in found["baselines"]["shape"]:
        if name != "combined heads":
            lines.append(f"| {name} | " + " | ".join(cells(found["baselines"][kind][name]) for kind in KINDS) + " |")
    for variant, method in ROWS:
        best = [rows[kind, variant, method] for kind in KINDS]
        where = [f"{cells(each['scores'])} <sub>{_place(each)}</sub>" for each in best]
        lines.append(f"| {variant}, {method} | " + " | ".join(where) + " |")
    combined = [f"**{cells(found['baselines'][kind]['combined heads'])}**" for kind in KINDS]
    lines.append("| combined heads | " + " | ".join(combined) + " |")
    return "\n".join(lines)


def _place(best: dict[str, Any]) -> str:
    """Layer.head and steps, for the table."""
    layer, head = ("all" if best[name] < 0 else best[name] for name in ("layer", "head"))
    steps = "" if best["steps"] == "1-8" else f", {best['steps']}"
    return f"{layer}.{head}{steps}"


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    parser.add_argument("--count", type=int, default=200, help="prompts that are scored")
    parser.add_argument("--choosing", type=int, default=60, help="other prompts, by which layers and heads are chosen")
    wanted = parser.parse_args()
    if not wanted.table:
        RESULTS.write_text(json.dumps(measure(wanted.count, wanted.choosing), separators=(",", ":")) + "\n")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
