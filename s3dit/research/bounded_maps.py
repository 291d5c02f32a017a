"""Maps of attention to everything at once, in memory that does not grow with the picture, the words or the steps.

    maps = BoundedMaps(item, layers=6, heads=6, steps=8)
    with gathering(pipe, maps, items=[0], branch="positive"):
        pipe("a red star above a blue ring", seed=7)
    maps.tensors()["attention.by_layer_and_head"]       # (columns, layers, heads, rows, columns)

Of every column, which is a word at its place in the prompt, a kind of token, or the entropy, three means are kept as
the model runs: over everything, by layer and step (over heads), and by layer and head (over steps). Each of the three
has room for so many numbers, AXES; its maps are averaged over squares of cells, as large as that takes. At 1024 × 1024
with 30 layers, 30 heads, 8 steps and 18 columns these are squares of 1, 2 and 4 cells: 8.6 million numbers, 70 MB.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.model.layout import Grid
from s3dit.research.attention import AttentionMaps
from s3dit.research.tokens import KINDS, ItemTokens

# Means by name: their further axes, and room for the numbers of their maps.
AXES = {
    "attention": ((), 2_000_000),
    "attention.by_layer_and_step": (("layers", "steps"), 5_000_000),
    "attention.by_layer_and_head": (("layers", "heads"), 5_000_000),
}
# What a map counts for beside its cells: on a page its range and its mean.
BESIDE = 16
# A word, or one character of a writing that puts no spaces between words.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


@dataclass(frozen=True, slots=True)
class Column:
    """What image tokens look at: a word, a kind of token, all of the text, or the entropy of where they look.

    name · kind: "word", "kind", "text" or "entropy" · start, stop: of a word, its characters in the prompt · tokens: of
    the joint sequence.
    """

    name: str
    kind: str
    start: int
    stop: int
    tokens: tuple[int, ...]


def columns(item: ItemTokens) -> list[Column]:
    """Return the words of an item's prompt, each at its place, then the kinds of token that it has, text and entropy.

    Words behind the end of what the text encoder was given are none.
    """
    found = []
    for match in WORD.finditer(item.prompt):
        start, stop = match.span()
        tokens = [i for i, place in enumerate(item.places) if place and place[0] < stop and start < place[1]]
        if tokens:
            found.append(Column(match[0], "word", start, stop, tuple(tokens)))
    found += [Column(kind, "kind", 0, 0, tuple(item.find(kind))) for kind in KINDS if kind in item.kinds]
    found += [Column("text", "text", 0, 0, tuple(item.find("text"))), Column("entropy", "entropy", 0, 0, ())]
    return found


def side(grid: Grid, maps: int, room: int) -> int:
    """Return the side of the smallest squares of cells of a grid by which so many maps fit into a room of numbers.

    Of the whole grid where even a number a map does not fit.
    """
    cells = 1
    while cells < max(grid) and maps * (-(-grid[0] // cells) * -(-grid[1] // cells) + BESIDE) > room:
        cells += 1
    return cells


def pooled(values: Tensor, cells: int) -> Tensor:
    """Average maps (n, rows, columns) over squares of cells, those at the end as far as they reach."""
    return F.avg_pool2d(values[:, None], cells, ceil_mode=True, count_include_pad=False)[:, 0]


class BoundedMaps(AttentionMaps):
    """Means of one item's attention, made by `gathering`; `tensors` gives them."""

    def __init__(self, item: ItemTokens, *, layers: int, heads: int, steps: int) -> None:
        """item: whose tokens · layers: main blocks · heads: of each · steps: of the solver."""
        super().__init__((), ())
        self.columns, self.grid = columns(item), item.grid
        named = [f"word {i}" if column.kind == "word" else column.name for i, column in enumerate(self.columns)]
        self._place = {name: i for i, name in enumerate(named)}
        sizes, self._sides, self._totals = {"layers": layers, "heads": heads, "steps": steps}, {}, dict[str, Tensor]()
        for name, (axes, room) in AXES.items():
            shape = (len(named), *(sizes[axis] for axis in axes))
            self._sides[name] = side(item.grid, math.prod(shape), room)
            rows = [-(-cells // self._sides[name]) for cells in item.grid]
            self._totals[name] = torch.zeros(*shape, *rows, dtype=torch.float64)
            self._totals[name.replace("attention", "share")] = torch.zeros(shape, dtype=torch.float64)
        self._calls = torch.zeros(len(named), layers, steps)

    def groups(self, item: ItemTokens) -> dict[str, tuple[int, ...]]:
        """Return the tokens of every word, by name."""
        named = zip(self._place, self.columns, strict=True)
        return {name: column.tokens for name, column in named if column.kind == "word"}

    def add(self, item: ItemTokens, step: int, layer: str, found: Mapping[str, Tensor]) -> None:
        """Add what one layer looks at in one step, (heads, queries) each."""
        at, now = int(layer.removeprefix("layers.")), step - 1
        which = torch.tensor([self._place[name] for name in found])
        by_head = torch.stack(list(found.values())).detach().float().unflatten(2, self.grid)
        mean = by_head.mean(1)
        for name, place, maps in (("", (which,), mean), (".by_layer_and_step", (which, at, now), mean),
                                  (".by_layer_and_head", (which, at), by_head)):  # fmt: skip
            small = pooled(maps.flatten(0, -3), self._sides[f"attention{name}"])
            self._totals[f"attention{name}"][place] += small.unflatten(0, maps.shape[:-2]).double().cpu()
            self._totals[f"share{name}"][place] += maps.double().mean((-2, -1)).cpu()
        self._calls[which, at, now] += 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the means by name, fp32: of every column, and in names its further axes; NaN where nothing was seen.

        `attention` are maps (…, rows, columns), `share` means over the image.
        """
        calls = {"": self._calls.sum((1, 2)), "by_layer_and_step": self._calls,
                 "by_layer_and_head": self._calls.sum(2)[:, :, None]}  # fmt: skip
        means = {}
        for name, total in self._totals.items():
            count = calls[name.partition(".")[2]]
            means[name] = (total / count.view(*count.shape, *[1] * (total.ndim - count.ndim))).float()
        return means
