"""The instrument: shows the tensor of every chosen site to a function as it is computed, and puts back what that gives.

Forward hooks on modules, and replacements of Ops (`op.using`) that act only inside a block that is looked at; when the
`with` ends nothing of it is left. A function that returns None changes no number. On a GPU, blocks and layers that are
looked at run by themselves, in place of several in one launch, which may round in another place.

`Item` is one picture's part of a site's tensor. A `Splitter` cuts a packed tensor into them: which rows are whose is
read off the map of tokens, and whether guidance doubled the pass off the number of rows.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.errors import RequestError
from s3dit.kernels.attention import attention
from s3dit.kernels.dispatch import Op
from s3dit.kernels.norm import gated_residual, gated_residual_norm, qk_norm_rope, residual_norm, rms_norm_modulate
from s3dit.kernels.scheme import dequantize_rows
from s3dit.loaded_model import LoadedModel, Now
from s3dit.plan import Plan
from s3dit.research.sites import Site
from s3dit.research.tokens import ItemTokens, tokens

# visit(site, tensor) -> what is to take the tensor's place, None to leave it.
Visit = Callable[[Site, Tensor], Tensor | None]


@contextmanager
def attached(pipe: LoadedModel, chosen: Iterable[Site], visit: Visit) -> Iterator[None]:
    """Call visit(site, tensor) for the tensors of the chosen sites, as long as the `with` lasts.

    Raises RequestError for a pipeline with compile or graphs, which would not stop at a site.
    """
    _check(pipe)
    inside: dict[str, dict[str, Site]] = defaultdict(dict)
    with ExitStack() as stack:
        for site in chosen:
            module = pipe.parts.component(site.part).module.get_submodule(site.module)
            if site.side == "op":
                inside[site.block][site.suffix] = site
            elif site.side == "in":
                stack.callback(module.register_forward_pre_hook(_before(site, visit)).remove)
            else:
                stack.callback(module.register_forward_hook(_after(site, visit)).remove)
        if inside:
            blocks = {name: pipe.parts.component("transformer").module.get_submodule(name) for name in inside}
            _Blocks(blocks, inside, visit).enter(stack)
        yield


def _check(pipe: LoadedModel) -> None:
    """Raise RequestError where the pipeline runs the transformer as a whole."""
    whole = ("compile", pipe.parts.compiled), ("graphs", pipe.graphs), ("parallel", pipe.parts.ranks.size > 1)
    for name, on in whole:
        if on:
            raise RequestError(
                f"this model is loaded with {name}, where sites cannot be seen whole one by one; needed one without; "
                f"load it without {name}"
            )


def _before(site: Site, visit: Visit) -> Callable[..., Any]:
    """A hook that shows, and may replace, the first argument of a module."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        given = visit(site, dequantize_rows(args[0]))
        return None if given is None else (given, *args[1:])

    return hook


def _after(site: Site, visit: Visit) -> Callable[..., Any]:
    """A hook that shows, and may replace, the output of a module; x0 stands for the velocity that leads to it."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if site.suffix != "x0":
            return visit(site, output)
        state, t, context = args[:3]
        # One time for all, or one an item.
        rows = context.image.modulation_row[context.image.token_index]
        sigma = (1.0 - (t if len(t) == 1 else t[rows]))[:, None]
        given = visit(site, state + sigma * output.float())
        return None if given is None else ((given - state) / sigma).to(output.dtype)

    return hook


class _Blocks:
    """The sites that are results of Ops: who called an Op is known by the block that runs."""

    def __init__(self, blocks: dict[str, nn.Module], inside: dict[str, dict[str, Site]], visit: Visit) -> None:
        self._blocks, self._inside, self._visit = blocks, inside, visit
        self._running = threading.local()

    def enter(self, stack: ExitStack) -> None:
        """Hook the blocks and replace the Ops whose results are sites, until the stack is left."""
        for name, block in self._blocks.items():
            stack.callback(block.register_forward_pre_hook(self._enters(name)).remove)
            stack.callback(block.register_forward_hook(self._leaves, always_call=True).remove)
        wanted = {suffix for suffixes in self._inside.values() for suffix in suffixes}
        replaced: dict[Op[..., Any], tuple[set[str], Callable[..., Any]]] = {
            qk_norm_rope: ({"attention.q_rope", "attention.k_rope"}, self._rope),
            attention: ({"attention.heads"}, self._heads),
            gated_residual_norm: ({"attention.added", "between"}, self._between),
            residual_norm: ({"between"}, self._plain_between),
            gated_residual: ({"ffn.added"}, self._end),
        }
        for op, (suffixes, run) in replaced.items():
            if suffixes & wanted:
                stack.enter_context(_around(op, run, self._looking))

    def _enters(self, name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            self._running.block = name

        return hook

    def _leaves(self, *args: Any) -> None:
        self._running.block = None

    def _looking(self) -> bool:
        """Whether this thread is inside of a block that is looked at."""
        return getattr(self._running, "block", None) is not None

    def _show(self, suffix: str, tensor: Callable[[], Tensor]) -> Tensor | None:
        """Show the tensor of a site of the running block, if it is chosen; -> what is to take its place."""
        site = self._inside[self._running.block].get(suffix)
        return None if site is None else self._visit(site, tensor())

    def _rope(self, op: Callable[..., Any], *args: Any) -> Any:
        q, k = op(*args)
        q_given = self._show("attention.q_rope", lambda: q)
        k_given = self._show("attention.k_rope", lambda: k)
        return (q if q_given is None else q_given), (k if k_given is None else k_given)

    def _heads(self, op: Callable[..., Any], *args: Any) -> Any:
        heads = op(*args)
        given = self._show("attention.heads", lambda: heads)
        return heads if given is None else given

    def _between(self, op: Callable[..., Any], *args: Any) -> Any:
        residual, x, gate, factor, row, eps, *rest = args
        between, normed = op(*args)
        added = self._show("attention.added", lambda: _added(x, gate, row, eps))
        if added is not None:
            between = _sum(residual, added)
        given = self._show("between", lambda: between)
        if added is None and given is None:
            return between, normed
        between = between if given is None else given
        return between, rms_norm_modulate(between, factor, row, eps, *rest)

    def _plain_between(self, op: Callable[..., Any], *args: Any) -> Any:
        between, normed = op(*args)
        given = self._show("between", lambda: between)
        return (between, normed) if given is None else op(given, torch.zeros_like(given), *args[2:])

    def _end(self, op: Callable[..., Any], *args: Any) -> Any:
        residual, x, gate, row, eps = args
        added = self._show("ffn.added", lambda: _added(x, gate, row, eps))
        return op(*args) if added is None else _sum(residual, added)


def _added(x: Tensor, gate: Tensor, row: Tensor, eps: float) -> Tensor:
    """What a gated residual adds: gate · RMSNorm(x), dtype of x."""
    # Not the Op itself, which is replaced too.
    return gated_residual.reference(torch.zeros_like(x), x, gate, row, eps)


def _sum(residual: Tensor, added: Tensor) -> Tensor:
    """The residual and what is added, in fp32, rounded once."""
    return (residual.float() + added.float()).to(residual.dtype)


@contextmanager
def _around(op: Op[..., Any], run: Callable[..., Any], looking: Callable[[], bool]) -> Iterator[None]:
    """Call run(op, *args) in place of an Op's calls while `looking()`; what it calls runs as if nobody looked."""
    with ExitStack() as stack:

        def replacement(*args: Any) -> Any:
            # Out of its own replacement for the moment, so that the Op chooses as it would.
            stack.close()
            try:
                return run(op, *args) if looking() else op(*args)
            finally:
                stack.enter_context(op.using(replacement))

        stack.enter_context(op.using(replacement))
        yield


@dataclass(frozen=True, slots=True)
class Item:
    """One item's part of a site's tensor.

    site · step: of the solver, from 1; 0 for what is no part of a step (text encoder, autoencoder) · call: of the site
    within the step, from 0 · item: index of the picture; of the text encoder and the autoencoder, of their call ·
    branch: positive or negative · tokens: the item's map, None where its rows are no tokens of a pass · index: its part
    of the tensor: its rows, or those of the chosen tokens.
    """

    site: Site
    step: int
    call: int
    item: int
    branch: str
    tokens: ItemTokens | None
    index: int | slice | Tensor


class Splitter:
    """Cuts tensors of sites into items, and counts steps and calls; chosen by step, item, branch and kind of token."""

    def __init__(
        self,
        pipe: LoadedModel,
        steps: Sequence[int] | None,
        items: Sequence[int] | None,
        branch: str | None,
        what: str | Sequence[str] | None,
    ) -> None:
        """what: kinds of tokens, or words, as `ItemTokens.find` takes them; RequestError where no item has one."""
        self._pipe, self._steps, self._items, self._branch = pipe, steps, items, branch
        self._what = [what] if isinstance(what, str) else what
        self._maps: dict[bool, list[ItemTokens]] = {}
        self._calls: dict[str, int] = defaultdict(int)
        self._now: Now | None = None
        # Names of the sites of which something was chosen.
        self.seen: set[str] = set()

    def __call__(self, site: Site, tensor: Tensor) -> Iterator[Item]:
        """Yield the items of a site's tensor that are chosen."""
        now = self._pipe.now
        step = now.step if now is not None and site.part == "transformer" else 0
        if step and now is not None and now is not self._now:
            # Another step, or another run.
            if self._now is None or now.plan is not self._now.plan:
                self._maps.clear()
                self._check_steps(now)
            self._now = now
            self._calls.clear()
        call = self._calls[site.name]
        self._calls[site.name] += 1
        if site.stream in ("prompt", "picture") or now is None:
            if self._items is None or call in self._items:
                self.seen.add(site.name)
                # Pictures come one by one, each as a batch.
                yield Item(site, step, 0, call, "positive", None, 0 if site.stream == "picture" else slice(None))
            return
        if self._steps is not None and step not in self._steps:
            return
        parts = list(self._parts(site, len(tensor), now.plan))
        for what in self._what or ():
            if not any(item.has(what) for item, _, _ in parts):
                parts[0][0].find(what)
        for item, start, rows in parts:
            if self._items is not None and item.item not in self._items:
                continue
            if self._branch not in (None, item.branch):
                continue
            index: slice | Tensor = slice(start, start + len(rows))
            if self._what is not None and site.stream != "rows":
                wanted = {token for what in self._what if item.has(what) for token in item.find(what)}
                found = [start + row for row, token in enumerate(rows) if token in wanted]
                if not found:
                    continue
                index = torch.tensor(found, device=tensor.device)
            self.seen.add(site.name)
            yield Item(site, step, call, item.item, item.branch, item, index)

    def _check_steps(self, now: Now) -> None:
        """Raise RequestError for steps that a run which begins does not have."""
        count, plan = 0, now.plan if now.step == 1 else None
        while plan is not None:
            # Steps are counted on through a second pass.
            count, plan = count + len(plan.sigmas) - 1, plan.then
        if count and (wrong := [step for step in self._steps or () if step > count]):
            raise RequestError(f"steps {wrong} were chosen of a run that has {count}; needed some of 1 to {count}")

    def _parts(self, site: Site, n: int, plan: Plan) -> Iterator[tuple[ItemTokens, int, Sequence[int]]]:
        """Of every item of a pass: its map, where its rows begin in the site's tensor of n rows, and their tokens."""
        for guided in (False, True):
            if guided and not plan.request.guidance_scale:
                continue
            if guided not in self._maps:
                self._maps[guided] = tokens(self._pipe, plan, guided=guided)
            items = self._maps[guided]
            if site.stream == "rows":
                shared = n == 1
                clean = any("reference" in item.kinds for item in items)
                if shared or n == len(items) + clean:
                    yield from ((item, 0 if shared else i, (0,)) for i, item in enumerate(items))
                    return
                continue
            if site.stream == "patches":
                runs = [item.find("image") for item in items]
            else:
                runs = [list(item.rows.get(site.stream, ())) for item in items]
            if sum(map(len, runs)) == n:
                start = 0
                for item, rows in zip(items, runs, strict=True):
                    if rows:
                        yield item, start, rows
                    start += len(rows)
                return
        raise RequestError(
            f"{site.name} has {n} rows, which are of no pass of this request; needed a pass that the pipeline itself "
            "runs; observe pipe(…) or pipe.stream(…)"
        )
