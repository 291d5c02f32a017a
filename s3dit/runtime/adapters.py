"""The adapters of a pipeline: `pipe.lora.attach(file)`, `detach`, `scale`, `merge`.

Parts of a model come and go (`residency`), adapters stay: a part in memory is changed at once, and a part that comes in
is given all that belong to it (`merge_into`, `attach_to`). So nothing is loaded again for a new strength, and nothing
is forgotten when a part is. The list itself belongs to the parts, which know nothing else of this room.

What is called while a picture is drawn by another thread waits for it; between two steps of a `stream` it acts from the
next step on.

A file is held to the model before anything is changed: the report says what of it matched, what did not and what has a
wrong shape, and the rest is an error unless partial use is allowed.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from s3dit.errors import CheckpointError, RequestError
from s3dit.runtime import lora
from s3dit.runtime.devices import Placement, own_settings
from s3dit.weights.adapter import Adapter, Deltas, read_adapter
from s3dit.weights.delta import Delta
from s3dit.weights.hub import resolve_file

# Layers that a report spells out, how much of a name, and the largest strength that is no accident.
SHOWN, LONGEST = 10, 120
STRONGEST = 1000.0


@dataclass(frozen=True, slots=True)
class Report:
    """What became of an adapter's layers: matched by the model, unmatched, of a wrong shape, said twice in the file.

    notes: what the file says without effect.
    """

    name: str
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    misshapen: tuple[str, ...]
    redundant: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = f"{len(self.matched)} matched, {len(self.unmatched)} unmatched, {len(self.misshapen)} of a wrong shape"
        lost = [*self.unmatched, *self.misshapen]
        return "; ".join([f"{self.name}: {counts}{f' ({_listed(lost)})' if lost else ''}", *self.notes])


def _listed(names: list[str]) -> str:
    return ", ".join(name[:LONGEST] for name in names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def match_layers(
    adapter: Adapter, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], name: str, allow_partial: bool = False
) -> tuple[dict[str, Deltas], Report]:
    """Hold an adapter to the layers of a model, by part: what of it fits, and the report.

    Raises CheckpointError where nothing fits, and where something does not unless that is allowed.
    """
    fitting: dict[str, Deltas] = {}
    unmatched, misshapen = list(adapter.unmatched), list(adapter.misshapen)
    for part, deltas in adapter.deltas.items():
        for layer, delta in deltas.items():
            home = shapes.get(part, {}).get(layer)
            if home is None:
                unmatched.append(f"{part}.{layer}")
            elif wrong := _unfit(delta, home):
                misshapen.append(f"{layer} {wrong}")
            else:
                fitting.setdefault(part, {})[layer] = delta
    matched = tuple(layer for deltas in fitting.values() for layer in deltas)
    report = Report(name, matched, tuple(unmatched), tuple(misshapen), tuple(adapter.redundant), tuple(adapter.notes))
    if not matched:
        raise CheckpointError(f"{adapter.path}: nothing in it fits this model: {report}; take one made for this model")
    if (unmatched or misshapen) and not allow_partial:
        raise CheckpointError(
            f"{adapter.path}: not all of it fits this model: {report}; take one made for this model, or allow partial "
            "use (--lora-allow-partial)"
        )
    return fitting, report


def _unfit(delta: Delta, home: tuple[int, ...]) -> str:
    """What keeps a Delta from a layer, in a few words; empty where nothing does."""
    if len(home) < 2 and (delta.bias is not None or delta.magnitude is not None):
        return "with a bias or norms, needed a change of its weight"
    return "" if delta.fits(home) else f"{list(delta.shape)}, needed {list(home)}"


@dataclass(slots=True)
class Loaded:
    """One adapter of a pipeline: where it came from, what of it fits, how strong it is, whether it is merged."""

    source: str
    sha256: str
    deltas: dict[str, Deltas]
    scale: float
    partial: bool
    merged: bool = False


class Host(Protocol):
    """A part that adapters are attached to: `residency.Component`."""

    module: nn.Module
    attachments: lora.Attachments
    recorded: Any


class Hosts(Protocol):
    """The parts of a model: `components.Components`.

    adapters: by name, in the order in which they came · revisions: how often those of a part changed.
    """

    lock: threading.RLock
    placement: Placement
    adapters: dict[str, Loaded]
    revisions: Counter[str]

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the parts in memory."""

    def component(self, name: str) -> Any:
        """A part, in memory or not; its `module` is the same object for good."""

    def blank(self, part: str) -> tuple[nn.Module, tuple[str, ...]]:
        """A part's module on the meta device, and the names that are never read."""

    def changed_by_hand(self, part: str) -> bool:
        """Whether somebody has changed parameters of a part."""

    def free(self) -> None:
        """Let every part go."""


class Adapters:
    """The adapters of one pipeline, by name, in the order in which they came."""

    def __init__(self, parts: Hosts) -> None:
        self._parts = parts

    @property
    def _loaded(self) -> dict[str, Loaded]:
        return self._parts.adapters

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Alone with the parts, whatever the caller has switched on in torch."""
        with self._parts.lock, own_settings(self._parts.placement.device):
            yield

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters, merged ones too."""
        return tuple(self._loaded)

    def attach(
        self, source: str | Path, scale: float = 1.0, name: str | None = None, allow_partial: bool = False
    ) -> Report:
        """Put an adapter beside the weights; returns what became of its layers.

        source: a .safetensors file, a folder that holds one, or "org/name/file.safetensors" on the Hub · scale: its
        strength, any sign · name: to speak of it later (default: the file's) · allow_partial: leave out what fits no
        layer. Raises CheckpointError (the file, and what does not fit), RequestError (name, scale).
        """
        with self._turn():
            _check_scale(scale)
            if name is not None and name in self._loaded:
                raise RequestError(f"there is an adapter {name!r} already; detach it, or give this one another name")
            adapter = read_adapter(resolve_file(str(source)))
            name = name or self._free(adapter.path.stem)
            shapes = {part: lora.homes(self._parts.blank(part)[0]) for part in adapter.deltas}
            deltas, report = match_layers(adapter, shapes, name, allow_partial)
            loaded = Loaded(str(source), adapter.digest(), deltas, float(scale), allow_partial)
            try:
                for part, component in self._held(deltas):
                    attach_one(loaded, name, part, component, self._parts.placement)
            except BaseException:
                # A part that comes in again has nothing half attached.
                self._parts.free()
                raise
            self._loaded[name] = loaded
            self._tell(deltas)
            return report

    def detach(self, name: str | None = None) -> None:
        """Take one adapter off, or all; the weights are bit for bit what they were. RequestError for a merged one."""
        with self._turn():
            for one in self._chosen(name):
                if self._loaded[one].merged:
                    raise RequestError(f"{one} is merged into the weights and cannot be detached; load the model again")
            for one in self._chosen(name):
                gone = self._loaded[one]
                for _, component in self._held(gone.deltas):
                    component.attachments.detach(one)
                    component.recorded = None
                del self._loaded[one]
                self._tell(gone.deltas)

    def scale(self, name: str, value: float) -> None:
        """Change the strength of an adapter, from the next model call on; nothing is loaded or compiled anew."""
        with self._turn():
            _check_scale(value)
            (one,) = self._chosen(name)
            loaded = self._loaded[one]
            if loaded.merged:
                raise RequestError(f"{one} is merged into the weights at scale {loaded.scale:g}; load the model again")
            for _, component in self._held(loaded.deltas):
                component.attachments.rescale(one, value)
            loaded.scale = float(value)
            self._tell(loaded.deltas)

    def merge(self, name: str | None = None) -> None:
        """Write one adapter, or all, into the float weights: no cost in a pass, no way back but a new pipeline.

        The parts in memory are let go and loaded again when next needed. BackendError where a layer is quantized,
        RequestError where somebody has changed weights of the part.
        """
        with self._turn():
            chosen = self._chosen(name)
            for one in chosen:
                for part, deltas in self._loaded[one].deltas.items():
                    if self._parts.changed_by_hand(part):
                        raise RequestError(
                            f"weights of the {part} were changed by hand, into which {one} cannot be merged; merge "
                            "first and change them then, or take the changes back (parts.restore)"
                        )
                    lora.check_merge(self._parts.blank(part)[0], deltas)
            for one in chosen:
                self._loaded[one].merged = True
                self._tell(self._loaded[one].deltas)
            self._parts.free()

    def records(self) -> list[dict[str, Any]]:
        """What a picture's metadata says: names for people, and hashes by which the same files are known again."""
        return [
            {"file": one.source, "sha256": one.sha256, "scale": one.scale}
            | ({"partial": True} if one.partial else {})
            | ({"merged": True} if one.merged else {})
            for one in self._loaded.values()
        ]

    def _chosen(self, name: str | None) -> list[str]:
        if name is not None and name not in self._loaded:
            there = ", ".join(self._loaded) or "none"
            raise RequestError(f"no adapter {name!r}; there is {there}; attach it first")
        return list(self._loaded) if name is None else [name]

    def _free(self, stem: str) -> str:
        """A name that is not taken: the stem, stem-2, …"""
        names = (stem if i == 1 else f"{stem}-{i}" for i in range(1, len(self._loaded) + 2))
        return next(name for name in names if name not in self._loaded)

    def _held(self, deltas: Mapping[str, Deltas]) -> list[tuple[str, Host]]:
        """The parts in memory that an adapter changes."""
        return [(part, self._parts.component(part)) for part in deltas if part in self._parts.held]

    def _tell(self, deltas: Mapping[str, Deltas]) -> None:
        self._parts.revisions.update(deltas.keys())


def merge_into(module: nn.Module, part: str, adapters: Mapping[str, Loaded], dtype: torch.dtype) -> None:
    """Write the merged adapters into the weights of a part that was just read; dtype: what these are kept in."""
    for one in adapters.values():
        if one.merged and part in one.deltas:
            lora.merge(module, one.deltas[part], one.scale, dtype)


def attach_to(component: Host, part: str, adapters: Mapping[str, Loaded], placement: Placement) -> None:
    """Put the adapters that are not merged beside a part that was just loaded."""
    for name, one in adapters.items():
        if not one.merged and part in one.deltas:
            attach_one(one, name, part, component, placement)


def attach_one(one: Loaded, name: str, part: str, component: Host, placement: Placement) -> None:
    """Put one adapter beside a part, whose recorded passes no longer hold."""
    component.attachments.attach(name, one.deltas[part], one.scale, placement.device, placement.compute)
    component.recorded = None


def nbytes(part: str, adapters: Mapping[str, Loaded], dtype: torch.dtype) -> int:
    """What the adapters beside a part hold on the device."""
    deltas = [d for one in adapters.values() if not one.merged for d in one.deltas.get(part, {}).values()]
    return dtype.itemsize * sum(tensor.numel() for delta in deltas for tensor in _tensors(delta))


def _check_scale(value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or abs(value) > STRONGEST:
        raise RequestError(
            f"the scale of an adapter is {value!r}; needed a number within ±{STRONGEST:g}, 1 for full strength"
        )


def _tensors(delta: Delta) -> list[Tensor]:
    """Every tensor of a Delta."""
    inside = [] if delta.term is None else [getattr(delta.term, field.name) for field in fields(delta.term)]
    return [tensor for tensor in (*inside, delta.bias, delta.magnitude) if tensor is not None]
