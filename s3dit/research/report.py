"""A report: one picture drawn with everything looked at, as a page that shows it and a file of the numbers behind it.

    from s3dit.research.report import report

    page = report(pipe, "a red star above a blue ring", "report", seed=7)      # report/index.html

In the folder are `index.html`, which is complete in itself, `data.safetensors` and `picture.png`. The file holds every
map and table of the page, in more digits: its metadata name the axes (`INDEX`); `trace.load` reads it.

Everything comes from the one run that draws the picture, whose bits stay as they do in `observe`; then the estimates of
the image are decoded. What is kept is bounded beforehand, whatever the model: maps of attention by `BoundedMaps`, 12
million numbers; estimates of the image at PREVIEWS steps; what `residual` takes, which at 1024 × 1024 with 30 blocks is
450 MB, and as much again with guidance. All together stays below 1 GB there. Where a solver calls the model twice in a
step, attention is the mean of both calls and the residual stream that of the first; with guidance all is of the
positive branch.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.files import REPORT, report_folder, whole
from s3dit.inputs.save_image import save_png
from s3dit.loaded_model import LoadedModel
from s3dit.plan import Plan
from s3dit.research import trace
from s3dit.research.atlases import StepAtlas, step_atlas
from s3dit.research.attention import gathering
from s3dit.research.bounded_maps import BoundedMaps, Column, pooled, side
from s3dit.research.concept_stream import Source
from s3dit.research.concepts import ConceptMaps, concept_maps
from s3dit.research.lenses import decode
from s3dit.research.observe import observe
from s3dit.research.record import Record, fingerprint
from s3dit.research.report_page import page
from s3dit.research.residual import Residual, residual
from s3dit.research.table import Table
from s3dit.research.tokens import ItemTokens, tokens
from s3dit.sampling.step import Step

PAGE, DATA, PICTURE = REPORT
# The key of the description in the metadata of DATA.
INDEX = "s3dit.report"
# Steps whose estimate of the image is decoded, spread evenly; room for the numbers of the residual stream's maps, and
# as much for those of concepts.
PREVIEWS, ROOM = 16, 1_000_000
# Concepts at most: at 1024 × 1024 with 30 blocks and 8 steps 8 MB each while the picture is drawn.
CONCEPTS = 16
# One item and branch of a request.
CHOICE: dict[str, Any] = {"items": [0], "branch": "positive"}


@dataclass(frozen=True, slots=True)
class Report:
    """What was seen of one picture.

    picture, metadata: as `pipe(…)` gives them · item: its map of tokens · columns: what maps of attention are of ·
    layers, steps: names of the main blocks, and numbers of the steps with the noise level that each begins at · heads:
    of a block · concepts: whose maps were asked for · previews: estimate of the image by step · tensors: maps by name;
    `attention…` have the axes columns, those in their name, rows and columns; `residual.norm` has layers, steps, rows,
    columns, `concept.by_layer_and_step` concepts before them · tables: by name, one, or one for each layer or step ·
    model: fingerprint of the transformer.
    """

    picture: Image.Image
    metadata: dict[str, Any]
    item: ItemTokens
    columns: Sequence[Column]
    layers: Sequence[str]
    steps: dict[int, float]
    heads: int
    concepts: Sequence[str]
    previews: dict[int, Image.Image]
    tensors: dict[str, Tensor]
    tables: dict[str, list[Table]]
    model: str

    def index(self) -> dict[str, Any]:
        """Describe the tensors of DATA: JSON values."""
        return {
            "prompt": self.item.prompt, "grid": list(self.item.grid), "layers": list(self.layers),
            "steps": list(self.steps), "sigmas": list(self.steps.values()), "heads": self.heads,
            "concepts": list(self.concepts),
            "columns": [asdict(column) for column in self.columns], "model": self.model, "request": self.metadata,
            "tables": {
                name: {"title": table.title, "rows": table.rows, "columns": table.columns}
                for name, table in self._named_tables()
            },
        }  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Write the files into a folder, those of the same names are replaced -> the page. Raises RequestError."""
        folder = Path(folder)
        save_png(self.picture, folder / PICTURE, self.metadata)
        trace.save(self.tensors | {f"table.{name}": _numbers(table) for name, table in self._named_tables()},
                   folder / DATA, {INDEX: json.dumps(self.index())})  # fmt: skip
        # Last: whoever sees a page finds the rest beside it.
        with whole(folder / PAGE) as file:
            file.write(page(self.index(), self.picture, self.previews, self.tensors, self.tables).encode())
        return folder / PAGE

    def _named_tables(self) -> list[tuple[str, Table]]:
        """Tables by a name for each."""
        return [
            (name if len(tables) == 1 else f"{name}.{i}", table)
            for name, tables in self.tables.items()
            for i, table in enumerate(tables)
        ]


def report(
    pipe: LoadedModel,
    request: Any = None,
    folder: str | Path = "report",
    *,
    overwrite: bool = False,
    concepts: Sequence[str] = (),
    on_step: Callable[[Step], None] | None = None,
    **fields: Any,
) -> Path:
    """Draw one picture and write a report of it into a folder -> its page.

    request, fields, on_step: as of `pipe(…)` · overwrite: replace a report that is there · concepts: as of `look`.
    Raises RequestError, of the folder before anything is drawn.
    """
    folder = report_folder(folder, overwrite)
    return look(pipe, request, concepts=concepts, on_step=on_step, **fields).save(folder)


def look(
    pipe: LoadedModel,
    request: Any = None,
    *,
    concepts: Sequence[str] = (),
    on_step: Callable[[Step], None] | None = None,
    **fields: Any,
) -> Report:
    """Draw one picture and look at everything that a report shows.

    concepts: at most CONCEPTS words or pieces of text whose maps (`concepts.py`) are shown too, of several each less
    the mean of the others; those of the prompt where all stand in it, else each as a prompt of its own · the rest as of
    `pipe(…)`. Raises RequestError.
    """
    draw: Any = pipe
    plan: Plan = draw.plan(request, **fields) if fields or not isinstance(request, Plan) else request
    _check(plan, concepts)
    item, config, count = tokens(pipe, plan)[0], pipe.config.transformer, len(plan.sigmas) - 1
    estimates, see = _estimates(count, on_step)
    maps = BoundedMaps(item, layers=config.n_layers, heads=config.n_heads, steps=count)
    cells = side(item.grid, config.n_layers * count, ROOM)
    with (
        gathering(pipe, maps, **CHOICE),
        residual(pipe, **CHOICE) as terms,
        step_atlas(pipe, "layers.*.output", tokens="image", **CHOICE) as atlas,
        observe(pipe, "layers.*.output", tokens="image", reduce=_lengths(item, cells), **CHOICE) as norms,
        _likeness(pipe, item, concepts) as likeness,
    ):
        result = draw(plan, on_step=see)
    layers = [f"layers.{i}" for i in range(config.n_layers)]
    tensors = maps.tensors() | {"residual.norm": _stacked(norms, layers, count)}
    previews = dict(zip(estimates, decode(pipe, estimates.values()), strict=True))
    return Report(
        result.images[0], result.metadata[0], item, maps.columns, layers,
        {i: float(sigma) for i, sigma in enumerate(plan.sigmas[:-1], 1)}, config.n_heads, concepts, previews,
        tensors | _concepts(likeness, item, layers, count), _tables(maps, terms, atlas, layers, count),
        fingerprint(pipe),
    )  # fmt: skip


def _estimates(count: int, on_step: Callable[[Step], None] | None) -> tuple[dict[int, Tensor], Callable[[Step], None]]:
    """What keeps the estimates of the image of up to PREVIEWS steps of `count`, by step, and the function that does."""
    wanted = torch.linspace(1, count, min(count, PREVIEWS)).round().int().tolist()
    estimates: dict[int, Tensor] = {}

    def see(step: Step) -> None:
        if step.i in wanted:
            estimates[step.i] = step.denoised[0].cpu()
        if on_step is not None:
            on_step(step)

    return estimates, see


def _likeness(
    pipe: LoadedModel, item: ItemTokens, concepts: Sequence[str]
) -> AbstractContextManager[ConceptMaps | None]:
    """Maps of concepts, if there are any, for as long as the `with` lasts."""
    if not concepts:
        return nullcontext()
    source: Source = "prompt" if all(map(item.has, concepts)) else "template"
    return concept_maps(pipe, concepts, source=source, keep=("step", "layer"), **CHOICE)


def _check(plan: Plan, concepts: Sequence[str]) -> None:
    """Raise RequestError for a plan that draws more than one picture, or one in two passes, and for many concepts."""
    request = plan.request
    if request.count != 1:
        raise RequestError(f"the request is for {request.count} pictures; needed 1, which a report is of")
    if plan.then is not None:
        raise RequestError(f"upscale is {request.upscale:g}; needed none: a report is of a single pass")
    if request.cache is not None:
        raise RequestError("a cache spares steps, of which a report shows each; needed none; leave cache out")
    if isinstance(concepts, str) or len(concepts) > CONCEPTS:
        found = f"the text {concepts!r}" if isinstance(concepts, str) else f"{len(concepts)} of them"
        raise RequestError(f"concepts are {found}; needed a list of at most {CONCEPTS} words")
    if request.output_type != "pil":
        raise RequestError(f"output_type is {request.output_type!r}; needed 'pil', the picture that the page shows")


def _concepts(maps: ConceptMaps | None, item: ItemTokens, layers: Sequence[str], count: int) -> dict[str, Tensor]:
    """The maps of concepts by layer and step, averaged over squares of cells as far as they have to be."""
    if maps is None:
        return {}
    values = torch.stack([
        torch.stack([
            torch.stack([maps.values(concept, layer=layer, step=step) for step in range(1, count + 1)])
            for layer in layers
        ])
        for concept in maps.concepts
    ])  # fmt: skip
    if (n := len(values)) > 1:
        values = (values - values.mean(0)) * (n / (n - 1))
    small = pooled(values.reshape(-1, *item.grid), side(item.grid, n * len(layers) * count, ROOM))
    return {"concept.by_layer_and_step": small.unflatten(0, values.shape[:-1]).float()}


def _lengths(item: ItemTokens, cells: int) -> Callable[[Tensor], Tensor]:
    """A reduction of an item's image tokens to a map of their lengths, averaged over squares of cells."""

    def lengths(rows: Tensor) -> Tensor:
        return pooled(torch.linalg.vector_norm(rows.float(), dim=1).view(1, *item.grid), cells)[0]

    return lengths


def _stacked(record: Record, layers: Sequence[str], count: int) -> Tensor:
    """The tensors of the first call of every layer and step, (layers, steps, …)."""
    return torch.stack([
        torch.stack([record.at(f"{layer}.output", step) for step in range(1, count + 1)]) for layer in layers
    ])  # fmt: skip


def _tables(
    maps: BoundedMaps, terms: Residual, atlas: StepAtlas, layers: Sequence[str], count: int
) -> dict[str, list[Table]]:
    """The tables of a report by name, a list of one, or of one for each layer or step."""
    steps, sites = range(1, count + 1), [f"{layer}.output" for layer in layers]
    between = [atlas.record.select("layers.*.output", step=step, call=0).cosines().tolist() for step in steps]
    tables = {f"residual.{name}": [terms.table(name)] for name in ("norm", "cosine", "share")}
    tables["residual.massive"] = [terms.massive(step) for step in steps]
    tables["cosine.between_layers"] = [
        Table.of(f"Cosine of the residual stream between layers, step {step}", layers, layers, values)
        for step, values in zip(steps, between, strict=True)
    ]
    tables["cosine.between_steps"] = [atlas.cosines(site) for site in sites]
    if count > 1:
        tables["change.by_step"] = [atlas.changes()]
    return tables


def _numbers(table: Table) -> Tensor:
    """The numbers of a table, fp64; NaN where there is none."""
    return torch.tensor([[float("nan") if x is None else x for x in row] for row in table.values], dtype=torch.float64)
