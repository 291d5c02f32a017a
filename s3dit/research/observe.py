"""Observe and edit the sites of a pipeline while it draws.

    with observe(pipe, "layers.*.attention.output", steps=[1, 8], reduce="norms") as record:
        pipe("a red star above a blue ring", seed=7)
    with edit(pipe, {"layers.5.attention.heads": edits.zero_heads(2)}, tokens="image"):
        changed = pipe("a red star above a blue ring", seed=7)

Both work in every residency, batch, number format and with guidance; they may be nested, and several be in force at
once. What is only observed has the bits that it has unobserved on a CPU; on a GPU, what is looked at runs by itself in
place of several layers in one launch, which may round in another place. Of prompts, features are computed anew while
their encoder is looked at.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from s3dit.errors import RequestError
from s3dit.loaded_model import LoadedModel
from s3dit.research.instrument import Item, Splitter, attached
from s3dit.research.record import Key, Record, fingerprint
from s3dit.research.reductions import REDUCTIONS
from s3dit.research.sites import Site, nearest, sites
from s3dit.research.trace import pattern_regex

# edit(rows of an item, where) -> rows of the same shape, or None to leave them.
Edit = Callable[[Tensor, Item], Tensor | None]
Reduce = str | Callable[[Tensor], Tensor] | Sequence[str]


@contextmanager
def observe(
    pipe: LoadedModel,
    patterns: str | Sequence[str],
    *,
    steps: Sequence[int] | None = None,
    items: Sequence[int] | None = None,
    branch: str | None = None,
    tokens: str | Sequence[str] | None = None,
    reduce: Reduce | None = None,
) -> Iterator[Record]:
    """Record the tensors of sites for as long as the `with` lasts.

    patterns: of names of sites · steps: of the solver, from 1 · items: indices of pictures · branch: "positive" or
    "negative" · tokens: kinds of tokens or words (`ItemTokens.find`), whose rows alone are kept, of the items that have
    them · reduce: what to keep of each, a name of `REDUCTIONS` or several, or a function of the rows; everything
    without. Steps, branch and tokens choose among sites of the transformer. Of several pictures drawn one after the
    other, the last one's tensors stay.
    Raises RequestError for sites, branches, steps, words or reductions that do not exist; warns where nothing was seen.
    """
    keep = _reducers(reduce)
    chosen = sites(pipe, patterns)
    split = splitter(pipe, steps, items, branch, tokens)
    record = Record()
    record.model = fingerprint(pipe)

    def visit(site: Site, tensor: Tensor) -> None:
        for item in split(site, tensor):
            if item.tokens is not None and item.tokens not in record.items_seen:
                record.items_seen.append(item.tokens)
            rows = tensor.detach()[item.index]
            for statistic, function in keep.items():
                key = Key(site.name, item.step, item.call, item.item, item.branch, statistic)
                # A copy: the model may go on to write into it.
                record[key] = function(rows).detach().to("cpu", copy=True)

    with attached(pipe, chosen.values(), visit):
        yield record
    _warn_of_silence("observed nothing of", [patterns] if isinstance(patterns, str) else patterns, split)


@contextmanager
def edit(
    pipe: LoadedModel,
    changes: Mapping[str, Edit],
    *,
    steps: Sequence[int] | None = None,
    items: Sequence[int] | None = None,
    branch: str | None = None,
    tokens: str | Sequence[str] | None = None,
) -> Iterator[None]:
    """Put what functions give in the place of sites' tensors, for as long as the `with` lasts.

    changes: pattern of sites -> function(rows of an item, where) that returns rows of the same shape, or None to leave
    them; several that match a site act one after the other · the rest as in `observe`. Raises RequestError, also out of
    the run where a function returns another shape, or numbers that are not finite, or the run has no such step; warns
    where nothing was edited.
    """
    chosen, by_site = _chosen(pipe, changes)
    split = splitter(pipe, steps, items, branch, tokens)

    def visit(site: Site, tensor: Tensor) -> Tensor | None:
        out: Tensor | None = None
        for item in split(site, tensor):
            for function in by_site[site.name]:
                rows = (tensor if out is None else out)[item.index]
                changed = function(rows, item)
                if changed is None:
                    continue
                _check(changed, rows, item)
                out = tensor.clone() if out is None else out
                out[item.index] = changed.to(out)
        return out

    with attached(pipe, chosen.values(), visit):
        yield
    _warn_of_silence("edited nothing of", changes, split)


def _warn_of_silence(done: str, patterns: Iterable[str], split: Splitter) -> None:
    """Warn of patterns none of whose sites was computed, at the steps, items and tokens that were chosen."""
    silent = [each for each in patterns if not any(pattern_regex(each).fullmatch(name) for name in split.seen)]
    if silent:
        choice = "nothing of it was computed at the steps, items, branch and tokens that were chosen"
        warnings.warn(f"{done} {', '.join(silent)}: {choice}", stacklevel=4)


def _chosen(pipe: LoadedModel, changes: Mapping[str, Edit]) -> tuple[dict[str, Site], dict[str, list[Edit]]]:
    """The sites that edits are for, and the edits of each, by name."""
    by_site: dict[str, list[Edit]] = {}
    chosen: dict[str, Site] = {}
    for pattern, function in changes.items():
        if not callable(function):
            raise RequestError(
                f"the edit of {pattern} is {type(function).__name__}; needed a function of rows and Item"
            )
        model = getattr(function, "model", "")
        if model and model != fingerprint(pipe):
            raise RequestError(
                f"the edit of {pattern} is of a record of model {model[:12]}, this one is {fingerprint(pipe)[:12]}; "
                "needed one model; record it again with this one"
            )
        for name, site in sites(pipe, pattern).items():
            chosen[name] = site
            by_site.setdefault(name, []).append(function)
    return chosen, by_site


def _check(changed: Any, rows: Tensor, item: Item) -> None:
    """Raise RequestError for what an edit may not return."""
    where = f"the edit of {item.site.name} at step {item.step}, item {item.item} ({item.branch})"
    if not isinstance(changed, Tensor) or changed.shape != rows.shape:
        found = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise RequestError(f"{where} returned {found}; needed a tensor {tuple(rows.shape)}, or None")
    # In the dtype that it will have: what is finite in fp32 need not be in 16 bits.
    if not changed.to(rows.dtype).isfinite().all():
        raise RequestError(f"{where} returned numbers that are not finite; needed finite ones")


def splitter(pipe: LoadedModel, steps: Any, items: Any, branch: str | None, what: Any) -> Splitter:
    """A Splitter of checked choices."""
    if branch is not None and not re.fullmatch("positive( [0-9]+)?|negative", str(branch)):
        raise RequestError(f"branch is {branch!r}; needed positive or negative (with regions also positive 2, …)")
    for name, numbers, least in (("steps", steps, 1), ("items", items, 0)):
        if numbers is not None and not all(isinstance(number, int) and number >= least for number in numbers):
            raise RequestError(f"{name} are {list(numbers)}; needed whole numbers from {least}")
    return Splitter(pipe, steps, items, branch, what)


def _reducers(reduce: Reduce | None) -> dict[str, Callable[[Tensor], Tensor]]:
    """The functions of what is kept, by name; "" for all of it, or what a function of the user's own gives."""
    if reduce is None:
        return {"": lambda rows: rows}
    if callable(reduce):
        return {"": reduce}
    names = [reduce] if isinstance(reduce, str) else list(reduce)
    for name in names:
        if name not in REDUCTIONS:
            raise RequestError(
                f"reduce is {name!r}; needed {', '.join(REDUCTIONS)}, or a function; the nearest is "
                f"{nearest(name, REDUCTIONS)[0]}"
            )
    return {name: REDUCTIONS[name] for name in names}
