"""Calls of the transformer of which some are spared: the border between a pipeline and the caches of a request.

Each picture decides by itself, both of its branches together where guidance is on, so that a picture does not depend on
those beside it. Rules that look at nothing decide before the call: it is computed, or nothing of the model runs. The
others look at the joined tokens or the first block's residual, so a pass stops there for the pictures that are spared,
and goes on with the tokens of the rest. The transformer knows nothing of it: while a call runs, its way through the
main blocks leads through here.

Not here: rules and what they predict (`sampling/caches.py`).
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3dit.cache import FILE, Cache, read_calibration
from s3dit.errors import RequestError
from s3dit.kernels.attention import Spans
from s3dit.kernels.dispatch import numerics, overridden
from s3dit.kernels.norm import rms_norm_modulate
from s3dit.model.hooks import watched
from s3dit.model.layout import Pack
from s3dit.model.timestep import Modulation, modulation_tables
from s3dit.model.transformer import Context, Steering, Transformer
from s3dit.request import Request
from s3dit.sampling.caches import Rule, extrapolated, rule
from s3dit.sampling.guidance import flow_time
from s3dit.sampling.solvers import TWICE

Hints = Iterable[Tensor | None]


@dataclass(slots=True)
class PictureCalls:
    """What one picture remembers.

    seen: the tensor that its rule looks at, of each of its items, from the call against which the change is taken ·
    past: the last computed velocities with their times, by item.
    """

    rule: Rule
    seen: list[Tensor] | None = None
    past: dict[int, list[tuple[float, Tensor]]] = field(default_factory=dict)


class _AllSpared(Exception):
    """Leaves a pass in the middle: no picture of it is computed."""


class CachedCalls:
    """Calls a transformer, or predicts what it would answer; called like it.

    reused: calls that were spared so far, of every picture.
    """

    def __init__(
        self, model: Transformer, cache: Cache | str, sigmas: Tensor, patches: Sequence[int], owners: Sequence[int]
    ) -> None:
        """sigmas (n + 1,) fp32 on the CPU, as the solver steps through them · patches: of each picture.

        owners: the picture of each item without guidance, several of one where it has regions.
        """
        assert isinstance(cache, Cache)
        self.reused = [0] * len(patches)
        self._model, self._cache, self._patches = model, cache, list(patches)
        self._times: list[float] = flow_time(sigmas[:-1]).tolist()
        self._looks_at = rule(cache, self._times).looks_at
        # By the number of items of a pass: its context and ControlNets, to others of which nothing remembered belongs.
        self._pictures: dict[int, tuple[tuple[Any, ...], list[PictureCalls]]] = {}
        # With guidance every picture comes once more.
        self._every_owner = [*owners, *range(len(patches))]
        # Of the call that runs: its number, None once it has been decided; the picture of each item; what is computed.
        self._open: int | None = None
        self._owners: list[int] = []
        self._computes: list[bool] = []

    def __call__(
        self, x: Tensor, t: Tensor, context: Context, control: Steering | None = None,
        modulation: Modulation | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Transformer.forward`; (n, patch_dim) of the transformer's dtype, fp32 where something is predicted."""
        # Of TwinFlow's models the time comes with the one that the step aims at.
        time, items, out = t.flatten()[0].item(), len(context.joint.spans.lengths), None
        known, pictures = self._pictures.get(items, ((), []))
        given = context, *getattr(control, "nets", ())
        if len(known) != len(given) or not all(map(operator.is_, known, given)):
            pictures = [PictureCalls(rule(self._cache, self._times)) for _ in self._patches]
            self._pictures[items] = given, pictures
        self._owners = self._every_owner[:items]
        # The nearest, as some solvers leave out what is next to pure noise.
        self._open = min(range(len(self._times)), key=lambda i: abs(self._times[i] - time))
        if self._looks_at is None:
            self._decide(pictures, None)
        with self._instead(), suppress(_AllSpared):
            if self._looks_at is not None or any(self._computes):
                out = self._model(x, t, context, control, modulation)
        return self._answer(pictures, out, time)

    def _answer(self, pictures: list[PictureCalls], out: Tensor | None, time: float) -> Tensor:
        """Remember what was computed, and put predictions in the place of what was not."""
        computed = [None] * len(self._owners) if out is None else out.split([self._patches[i] for i in self._owners])
        answer = []
        for item, (owner, piece) in enumerate(zip(self._owners, computed, strict=True)):
            past = pictures[owner].past.setdefault(item, [])
            if piece is not None and self._computes[owner]:
                past[:] = [*past, (time, piece)][-1 - self._cache.degree :]
            else:
                piece = extrapolated(past, time)
            answer.append(piece)
        return out if out is not None and all(self._computes) else torch.cat(answer)

    def _decide(self, pictures: list[PictureCalls], looked: list[list[Tensor]] | None) -> None:
        """Find which pictures of the open call are computed; looked: of each, what its rule looks at, by item."""
        assert self._open is not None
        i, self._open = self._open, None
        first, end = self._cache.always(len(self._times))
        changes = [0.0] * len(pictures)
        if looked is not None and pictures[0].seen is not None:
            changes = _changes(looked, [picture.seen or [] for picture in pictures])
        self._computes = []
        for number, picture in enumerate(pictures):
            computes = not picture.past or not first <= i < end or not picture.rule.spares(i, changes[number])
            if computes:
                picture.rule.computed(i)
            if looked is not None and (computes or self._looks_at == "input"):
                picture.seen = looked[number]
            self._computes.append(computes)
            self.reused[number] += not computes

    @contextmanager
    def _instead(self) -> Iterator[None]:
        """Lead the transformer's way through its main blocks through `_through`, once."""
        if self._looks_at is None:
            yield
            return
        # The model has one word for it, `_through`; whoever renames it sees the tests of this file fail.
        held = vars(self._model)
        held["_through"] = self._through
        try:
            yield
        finally:
            del held["_through"]

    def _through(
        self, which: slice, x: Tensor, rope: Tensor, pack: Pack, modulation: Modulation, hints: Hints
    ) -> Tensor:
        """As `Transformer._through`, of the main blocks only for the pictures that are to be computed."""
        run = type(self._model)._through.__get__(self._model)
        first = len(self._model.noise_refiner)
        if which.start != first or self._open is None:
            out: Tensor = run(which, x, rope, pack, modulation, hints)
            return out
        hints, start = iter(hints), first
        if self._looks_at == "residual":
            before, start = x, first + 1
            x = run(slice(first, start), x, rope, pack, modulation, [next(hints)])
            looked = x - before
        else:
            looked = self._modulated_input(x, pack, modulation)
        parts, (_, pictures) = looked.split(list(pack.spans.lengths)), self._pictures[len(self._owners)]
        of_picture = [[part for part, owner in zip(parts, self._owners, strict=True) if owner == number]
                      for number in range(len(pictures))]  # fmt: skip
        self._decide(pictures, of_picture)
        return self._computed(slice(start, None), x, rope, pack, modulation, hints)

    def _computed(
        self, which: slice, x: Tensor, rope: Tensor, pack: Pack, modulation: Modulation, hints: Iterator[Tensor | None]
    ) -> Tensor:
        """Run the tokens of the pictures that are computed through blocks -> (N, dim); the others stay as they are."""
        run, lengths, device = type(self._model)._through.__get__(self._model), pack.spans.lengths, x.device
        if not any(self._computes):
            raise _AllSpared
        if all(self._computes):
            out: Tensor = run(which, x, rope, pack, modulation, hints)
            return out
        if overridden() or watched(self._model.modules()):
            raise RequestError(
                "a cache spares some pictures of a pass whose insides are looked at or edited; needed whole passes; "
                "draw one picture at a time, or without cache"
            )
        chosen = [self._computes[owner] for owner in self._owners]
        mask = torch.repeat_interleave(torch.tensor(chosen), torch.tensor(lengths))
        rows = mask.nonzero()[:, 0].to(device)
        spans = Spans.of(tuple(length for length, taken in zip(lengths, chosen, strict=True) if taken), device)
        part = replace(pack, spans=spans, modulation_row=pack.modulation_row[rows])
        chosen_hints = (None if hint is None else hint[rows] for hint in hints)
        return x.index_copy(0, rows, run(which, x[rows], rope[rows], part, modulation, chosen_hints))

    def _modulated_input(self, x: Tensor, pack: Pack, modulation: Modulation) -> Tensor:
        """What the first main block's attention reads: the tokens normed and scaled by the time, (N, dim)."""
        block: Any = self._model.layers[0]
        # Of a streamed block the weights are not on the device.
        where = next(block.adaLN_modulation.parameters()).device
        answer = block.adaLN_modulation(modulation.time.to(where))
        factor = modulation_tables(answer, block.norms().to(where))[0].to(x.device)
        out = rms_norm_modulate(x, factor, pack.modulation_row, block.eps)
        assert isinstance(out, Tensor)
        return out


def read(request: Request, folder: Path) -> Request:
    """Take in the calibration of the model in `folder`, where the cache of a resolved request needs one and has none.

    Raises RequestError where there is none, and for what does not go together with a cache.
    """
    cache = request.cache
    if not isinstance(cache, Cache):
        return request
    if request.solver in TWICE:
        raise RequestError(
            f"solver {request.solver} calls the model twice a step, of which a cache would predict one from the "
            "other; needed a solver with one call a step, or no cache"
        )
    if numerics() == "exact":
        raise RequestError("both cache and numerics exact are given; a cache approximates; leave one of them out")
    if cache.missing is not None:
        if not (own := folder / FILE).is_file():
            raise RequestError(
                f"cache {cache.method} needs numbers that were calibrated for this model; make a file of them with "
                f"s3dit calibrate-cache, and give it as {cache}:{FILE}; first-block and taylor need none"
            )
        try:
            cache = cache.calibrated(read_calibration(own))
        except ValueError as error:
            raise RequestError(f"{own}: {error}") from None
    return request.filled(cache=cache)


def notes(request: Request, sigmas: Sequence[Tensor]) -> Iterator[str]:
    """Say what the calibrated cache of a request spares, of the calls of its passes at noise levels (n + 1,) each."""
    cache = request.cache
    if not isinstance(cache, Cache) or [*without_effect(cache, sigmas)]:
        return
    calls, counts = sum(len(each) - 1 for each in sigmas), [computed_calls(cache, each) for each in sigmas]
    known = [count for count in counts if count is not None]
    # Where guidance or control begins or ends, a call more is.
    least = "at least " * any((request.guidance_interval, request.cfg_truncation < 1, request.controls))
    spared = f"{least}{sum(known)} of {calls} model calls are computed"
    if len(known) < len(counts):
        spared = f"how many of {calls} model calls are computed depends on the picture"
    yield f"cache {cache} approximates: {spared}, the others predicted"


def without_effect(cache: Cache | str | None, sigmas: Sequence[Tensor]) -> Iterator[str]:
    """Say where a calibrated cache spares nothing."""
    if isinstance(cache, Cache) and all(computed_calls(cache, each) == len(each) - 1 for each in sigmas):
        yield (f"cache {cache} has no effect: every call is computed; raise its threshold, draw with more steps, or "
               "lower first and last")  # fmt: skip


def computed_calls(cache: Cache, sigmas: Tensor) -> int | None:
    """How many calls at noise levels (n + 1,) a calibrated cache computes; None where that depends on the picture."""
    times = flow_time(sigmas[:-1]).tolist()
    own, n = rule(cache, times), len(times)
    first, end = cache.always(n)
    asked = range(max(1, first), end)
    if not asked or not cache.limit:
        return n
    if own.looks_at is not None:
        return None
    own.computed(asked[0] - 1)
    spared = 0
    for i in asked:
        if own.spares(i, 0.0):
            spared += 1
        else:
            own.computed(i)
    return n - spared


def _changes(now: list[list[Tensor]], before: list[list[Tensor]]) -> list[float]:
    """Of each picture ‖now - before‖ / ‖before‖, all of its branches together."""
    norms = []
    for pair in zip(now, before, strict=True):
        new, old = (torch.cat(branches).float() for branches in pair)
        norms.append(torch.stack([(new - old).norm(), old.norm()]))
    return [difference / whole for difference, whole in torch.stack(norms).tolist()]
