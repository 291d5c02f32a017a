"""Atlases: how much each layer matters, and how much it changes from step to step.

    with layer_atlas(pipe, "layers.*", ["drop", "repeat", "int4"]) as atlas:
        pipe("a red star above a blue ring", seed=7)
    atlas.errors().picture().save("layers.png")      # error of the velocity, by module and change
    with step_atlas(pipe, "layers.*.output") as steps:
        pipe("a red star above a blue ring", seed=7)
    steps.changes().picture().save("steps.png")      # how far each output is from that of the step before

The layer atlas runs the pass of each step once more for every change (`changes.py`), on the very state that the
unchanged model has come to, and keeps two numbers of it; the picture is the unchanged one. `score_atlas` draws with a
change from beginning to end, and says what a score makes of the pictures.

The step atlas keeps a sketch of each output, `SKETCH` numbers, from which cosines and differences follow to about 1 %.
`reuse` draws what a cache would that skips what hardly changed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3dit.errors import RequestError
from s3dit.loaded_model import LoadedModel
from s3dit.research.changes import CHANGES, changed, modules, why_not
from s3dit.research.instrument import Item, attached
from s3dit.research.observe import Edit, observe, splitter
from s3dit.research.record import Record
from s3dit.research.sites import nearest, sites
from s3dit.research.table import Table

# Prime, so that no channel of every row falls on the same few numbers.
SKETCH = 16381
# What runs in every pass; the rest runs once a request.
IN_PASS = ("layers.", "noise_refiner.")


class LayerAtlas:
    """How far the velocity of a changed model is from that of the unchanged one.

    squares: by module, change and step, the sums of squares of the difference and of the unchanged velocity, over all
    pictures and branches · missing: of modules and changes that do not go together, why.
    """

    def __init__(self, modules: Sequence[str], changes: Sequence[str], missing: Mapping[tuple[str, str], str]) -> None:
        self.modules, self.changes, self.missing = list(modules), list(changes), dict(missing)
        self.squares: dict[tuple[str, str, int], tuple[float, float]] = {}

    @property
    def steps(self) -> list[int]:
        """The steps of the solver that were seen, in order."""
        return list(dict.fromkeys(step for *_, step in self.squares))

    def error(self, module: str, change: str, steps: Sequence[int] | None = None) -> float | None:
        """Return ‖changed - unchanged‖ / ‖unchanged‖ of the velocity over steps (default: all); None where missing."""
        found = [self.squares.get((module, change, step)) for step in (self.steps if steps is None else steps)]
        pairs = [pair for pair in found if pair is not None]
        if not pairs:
            return None
        return math.sqrt(sum(difference for difference, _ in pairs) / sum(whole for _, whole in pairs))

    def errors(self, step: int | None = None) -> Table:
        """Return the errors by module and change, over all steps or at one."""
        steps = None if step is None else [step]
        rows = [[self.error(name, change, steps) for change in self.changes] for name in self.modules]
        where = "over all steps" if step is None else f"at step {step}"
        return Table.of(f"Relative error of the velocity, {where}", self.modules, self.changes, rows, log=True)

    def by_step(self, change: str) -> Table:
        """Return the errors of a change by module and step."""
        if change not in self.changes:
            raise RequestError(f"change {change!r} is not in this atlas; needed one of {', '.join(self.changes)}")
        rows = [[self.error(name, change, [step]) for step in self.steps] for name in self.modules]
        return Table.of(
            f"Relative error of the velocity by {change}, by step", self.modules, self.steps, rows, log=True
        )


@contextmanager
def layer_atlas(
    pipe: LoadedModel,
    patterns: str | Sequence[str] = "layers.*",
    changes: Sequence[str] = CHANGES,
    *,
    steps: Sequence[int] | None = None,
) -> Iterator[LayerAtlas]:
    """Measure changes of one module at a time for as long as the `with` lasts; the picture stays the unchanged one.

    patterns: of blocks layers.* or noise_refiner.*, their attention, feed_forward or linear layers · changes: of
    CHANGES · steps: of the solver, from 1. Each picture takes a pass more for each module, change and step; with
    guidance the error is that of both branches before they are mixed. What is observed inside sees those passes too.
    Raises RequestError for modules and changes that do not exist.
    """
    names = modules(pipe, patterns)
    if outside := [name for name in names if not f"{name}.".startswith(IN_PASS)]:
        raise RequestError(f"{outside[0]} runs once a request, before its passes; needed modules of layers or "
                           "noise_refiner, or score_atlas")  # fmt: skip
    atlas = LayerAtlas(names, changes, _missing(pipe, names, changes))
    split, site = splitter(pipe, steps, None, None, None), sites(pipe, "velocity")["velocity"]

    def again(model: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if pipe.now is None:
            raise RequestError("atlases are of pictures; needed a call of the pipeline itself, or of its stream")
        if any(True for _ in split(site, output)):
            _measure(atlas, pipe, model, args, output)

    with attached(pipe, (), lambda site, tensor: None):
        handle = pipe.parts.component("transformer").module.register_forward_hook(again)
        try:
            yield atlas
        finally:
            handle.remove()
    if unseen := sorted(set(steps or ()) - set(atlas.steps)):
        raise RequestError(f"steps {unseen} were chosen, and not computed; needed some of those that were drawn")


def _measure(atlas: LayerAtlas, pipe: LoadedModel, model: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Run a pass once more for every change, and add how far its velocity is from the output."""
    assert pipe.now is not None
    unchanged, step = output.cpu().double(), pipe.now.step
    whole = unchanged.square().sum().item()
    for name in atlas.modules:
        for change in atlas.changes:
            if (name, change) not in atlas.missing:
                with changed(pipe, name, change):
                    # Not the modulation that was computed before.
                    other = model.forward(*args[:4])
                before = atlas.squares.get((name, change, step), (0.0, 0.0))
                difference = (other.cpu().double() - unchanged).square().sum().item()
                atlas.squares[name, change, step] = (before[0] + difference, before[1] + whole)


def _missing(pipe: LoadedModel, names: Sequence[str], changes: Sequence[str]) -> dict[tuple[str, str], str]:
    """Why modules and changes do not go together, where they do not."""
    for change in changes:
        if change not in CHANGES:
            near = nearest(str(change), CHANGES)[0]
            raise RequestError(f"change is {change!r}; needed some of {', '.join(CHANGES)}; the nearest is {near}")
    return {(name, change): why for name in names for change in changes if (why := why_not(pipe, name, change))}


def score_atlas(
    pipe: LoadedModel,
    prompts: Sequence[str],
    score: Callable[[Sequence[Any], Sequence[str]], float],
    patterns: str | Sequence[str] = "layers.*",
    changes: Sequence[str] = CHANGES,
    **fields: Any,
) -> Table:
    """Draw prompts with one module changed at a time -> scores by module and change; the last row: nothing changed.

    score(pictures, prompts) -> a number · patterns: as of `layer_atlas`, and of context_refiner too · fields: of the
    Request, such as seed. All prompts are one batch.
    """
    names, prompts = modules(pipe, patterns), list(prompts)
    missing = _missing(pipe, names, changes)
    assert callable(pipe)

    def drawn() -> float:
        return score(pipe(prompts, **fields).images, prompts)

    plain, rows = drawn(), []
    for name in names:
        row: list[float | None] = []
        for change in changes:
            if (name, change) in missing:
                row.append(None)
                continue
            with changed(pipe, name, change):
                row.append(drawn())
        rows.append(row)
    title = f"Score of {len(prompts)} pictures with one module changed"
    return Table.of(title, [*names, "unchanged"], changes, [*rows, [plain] * len(changes)])


@lru_cache(maxsize=4)
def _signs(count: int, device: torch.device) -> Tensor:
    """So many signs, 1 or -1 int8, always the same."""
    drawn = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return (2 * drawn - 1).to(device)


def sketch(x: Tensor) -> Tensor:
    """Return SKETCH sums of the numbers of x with random signs, or all numbers where there are fewer.

    Lengths and products of sketches are those of the tensors up to about sqrt(2 / SKETCH) = 1.1 %, whatever these are,
    massive channels included; and the sketch of a difference is the difference of sketches. Source: Alon, Matias and
    Szegedy 1996.
    """
    flat = x.detach().reshape(-1)
    if flat.numel() <= SKETCH:
        return flat.float()
    signed = flat.float() * _signs(flat.numel(), flat.device)
    return F.pad(signed, (0, -flat.numel() % SKETCH)).view(-1, SKETCH).sum(0)


class StepAtlas:
    """Sketches of what sites have at every step, and what follows of them. record: of `observe`, by site and step."""

    def __init__(self, record: Record) -> None:
        self.record = record

    @property
    def sites(self) -> list[str]:
        """The sites, in the order of the computation."""
        return list(dict.fromkeys(key.site for key in self.record))

    @property
    def steps(self) -> list[int]:
        """The steps of the solver that were seen, in order."""
        return list(dict.fromkeys(key.step for key in self.record))

    def change(self, site: str, step: int, before: int) -> float:
        """Return ‖a - b‖ / ‖a‖ of a site at a step against an earlier one, the largest of all pictures and branches."""
        pairs = [(tensor, self.record.at(site, before, key.item, key.branch, key.call))
                 for key, tensor in self.record.select(site, step=step, call=0).items()]  # fmt: skip
        if not pairs:
            raise RequestError(f"the atlas has nothing of {site} at step {step}; needed one that was drawn")
        return max(((a.double() - b.double()).norm() / a.double().norm()).item() for a, b in pairs)

    def changes(self) -> Table:
        """Return how far each site's tensor is from that of the step before, by site and step, from the second on."""
        rows = [[self.change(site, now, before) for before, now in pairwise(self.steps)]
                for site in self.sites]  # fmt: skip
        title = "Relative change since the step before, by step"
        return Table.of(title, self.sites, self.steps[1:], rows)

    def cosines(self, site: str, item: int = 0, branch: str = "positive") -> Table:
        """Return the cosine of a site's tensors at any two steps."""
        values = self.record.select(site, item=item, branch=branch, call=0).cosines().tolist()
        return Table.of(f"Cosine of {site} between steps", self.steps, self.steps, values)

    def skippable(self, limit: float) -> Table:
        """Return 1 where a site's tensor is within `limit` of the last one that was computed, else 0, by site and step.

        So a cache that reuses it there, and computes it elsewhere, is never further off, if the states stay the same.
        """
        rows = []
        for site in self.sites:
            row, last = [0], self.steps[0]
            for step in self.steps[1:]:
                row.append(int(self.change(site, step, last) <= limit))
                last = last if row[-1] else step
            rows.append(row)
        share = sum(map(sum, rows)) / max(1, sum(map(len, rows)))
        return Table.of(f"What changes by at most {limit:g}, {share:.0%}", self.sites, self.steps, rows)

    def reuse(self, limit: float) -> dict[str, Edit]:
        """Return edits for `pipe.edit` that put the last computed tensor where `skippable` says so, as a cache would.

        Such sites are held in memory: of attention.added or ffn.added a stream each.
        """
        table = self.skippable(limit)
        held: dict[tuple[str, int, str, int], Tensor] = {}

        def edit(rows: Tensor, where: Item) -> Tensor | None:
            place = (where.site.name, where.item, where.branch, where.call)
            if table.at(where.site.name, where.step) and place in held:
                return held[place]
            held[place] = rows.detach().clone()
            return None

        return {site: edit for site, row in zip(table.rows, table.values, strict=True) if any(row)}


@contextmanager
def step_atlas(
    pipe: LoadedModel, patterns: str | Sequence[str] = "layers.*.output", **choice: Any
) -> Iterator[StepAtlas]:
    """Gather sketches of sites for as long as the `with` lasts. choice: steps, items, branch, tokens of `observe`.

    64 KB a site, step, picture and branch.
    """
    with observe(pipe, patterns, reduce=sketch, **choice) as record:
        yield StepAtlas(record)
