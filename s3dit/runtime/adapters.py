"""The adapters of a pipeline: `pipe.lora.attach(file)`, `detach`, `scale`, `merge`.

Adapters outlast the parts of a model, which are loaded and unloaded (`residency`): a part in memory is changed at once,
and a part that is loaded is given all of its adapters (`merge_into`, `attach_to`). So nothing is loaded again for a new
strength, and no adapter is lost with a part. The list itself belongs to the parts (`Components.adapters`).

A call while another thread draws a picture waits for it; between two steps of a `stream` it acts from the next step on.

A file is matched with the model before anything is changed: the report says what of it matched, what did not and what
has a wrong shape, and the rest is an error unless partial use is allowed.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from s3dit.errors import CheckpointError, RequestError
from s3dit.runtime import lora
from s3dit.runtime.devices import Placement, own_settings
from s3dit.weights.adapter import Adapter, Deltas, read_adapter
from s3dit.weights.delta import Delta
from s3dit.weights.few_steps import FewSteps
from s3dit.weights.hub import resolve_file

# Layers that a report spells out, how much of a name, and the largest strength that is no accident.
SHOWN, LONGEST = 10, 120
STRONGEST = 1000.0


@dataclass(frozen=True, slots=True)
class Report:
    """The result of matching an adapter with a model: its layers that matched, did not, or have a wrong shape.

    redundant: those that the file holds twice · notes: what the file says without effect.
    """

    name: str
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    misshapen: tuple[str, ...]
    redundant: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Describe it in a line: the counts, the first layers that are lost, the notes."""
        counts = f"{len(self.matched)} matched, {len(self.unmatched)} unmatched, {len(self.misshapen)} of a wrong shape"
        lost = [*self.unmatched, *self.misshapen]
        return "; ".join([f"{self.name}: {counts}{f' ({_listed(lost)})' if lost else ''}", *self.notes])


def _listed(names: list[str]) -> str:
    """The first names, for messages."""
    return ", ".join(name[:LONGEST] for name in names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def match_layers(
    adapter: Adapter, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], name: str, allow_partial: bool = False
) -> tuple[dict[str, Deltas], Report]:
    """Match an adapter with the layers of a model -> what of it fits, by part, and the report.

    shapes: by part and official name · name: the adapter's, for the report. Raises CheckpointError where nothing fits,
    and where something does not unless that is allowed.
    """
    fitting: dict[str, Deltas] = {}
    unmatched, misshapen = list(adapter.unmatched), list(adapter.misshapen)
    for part, deltas in adapter.deltas.items():
        for layer, delta in deltas.items():
            shape = shapes.get(part, {}).get(layer)
            if shape is None:
                unmatched.append(f"{part}.{layer}")
            elif wrong := _unfit(delta, shape):
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


def _unfit(delta: Delta, shape: tuple[int, ...]) -> str:
    """Why a Delta does not fit a layer of this shape, for messages; empty where it does."""
    if len(shape) < 2 and (delta.bias is not None or delta.magnitude is not None):
        return "with a bias or norms, needed a change of its weight"
    return "" if delta.fits(shape) else f"{list(delta.shape)}, needed {list(shape)}"


@dataclass(slots=True)
class Loaded:
    """An adapter of a pipeline: its source and hash, its deltas by part, its strength, whether partial or merged.

    few_steps: what it was distilled for, if it was.
    """

    source: str
    sha256: str
    deltas: dict[str, Deltas]
    scale: float
    partial: bool
    few_steps: FewSteps | None = None
    merged: bool = False


class Host(Protocol):
    """The interface of a part that adapters are attached to: `residency.Component`."""

    module: nn.Module
    attachments: lora.Attachments
    recorded: Any


class Hosts(Protocol):
    """The interface of a model's parts: `components.Components`.

    adapters: by name, in the order in which they were attached · revisions: how often those of a part changed.
    """

    lock: threading.RLock
    placement: Placement
    adapters: dict[str, Loaded]
    revisions: Counter[str]

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the parts in memory."""

    def component(self, name: str) -> Any:
        """Return a part, in memory or not; its `module` is always the same object."""

    def blank(self, part: str) -> tuple[nn.Module, tuple[str, ...]]:
        """Make a part's module on the meta device; returns it and the names that are never read."""

    def changed_by_hand(self, part: str) -> bool:
        """Return whether a user has changed parameters of a part."""

    def reload(self) -> None:
        """Free every part, and load again those that somebody has."""


class Adapters:
    """The adapters of a pipeline, by name, in the order in which they were attached: `pipe.lora`."""

    def __init__(self, parts: Hosts) -> None:
        self._parts = parts

    @property
    def _loaded(self) -> dict[str, Loaded]:
        return self._parts.adapters

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock of the parts, with torch's settings those of the engine and not of the caller."""
        with self._parts.lock, own_settings(self._parts.placement.device):
            yield

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, merged ones too."""
        return tuple(self._loaded)

    def attach(
        self, source: str | Path, scale: float = 1.0, name: str | None = None, allow_partial: bool = False
    ) -> Report:
        """Attach an adapter beside the weights; returns the report on its layers.

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
            shapes = {part: lora.layer_shapes(self._parts.blank(part)[0]) for part in adapter.deltas}
            deltas, report = match_layers(adapter, shapes, name, allow_partial)
            loaded = Loaded(str(source), adapter.digest(), deltas, float(scale), allow_partial, adapter.few_steps)
            try:
                for part, component in self._held(deltas):
                    attach_one(loaded, name, part, component, self._parts.placement)
            except BaseException:
                # A part that is loaded again has nothing half attached.
                self._parts.reload()
                raise
            self._loaded[name] = loaded
            self._tell(deltas)
            few = () if adapter.few_steps is None else (f"distilled for {adapter.few_steps}",)
            return replace(report, notes=(*report.notes, *few))

    def detach(self, name: str | None = None) -> None:
        """Remove an adapter, or all; the weights are bit for bit what they were.

        Raises RequestError for a merged one, and for a name that is not attached.
        """
        with self._turn():
            chosen = self._chosen(name)
            for adapter in chosen:
                if self._loaded[adapter].merged:
                    raise RequestError(
                        f"{adapter} is merged into the weights and cannot be detached; load the model again"
                    )
            for adapter in chosen:
                deltas = self._loaded[adapter].deltas
                for _, component in self._held(deltas):
                    component.attachments.detach(adapter)
                    component.recorded = None
                del self._loaded[adapter]
                self._tell(deltas)

    def scale(self, name: str, value: float) -> None:
        """Set the strength of an adapter, from the next model call on; nothing is loaded or compiled anew.

        Raises RequestError for a name that is not attached, a merged adapter, or a value beyond ±1000.
        """
        with self._turn():
            _check_scale(value)
            (name,) = self._chosen(name)
            loaded = self._loaded[name]
            if loaded.merged:
                raise RequestError(f"{name} is merged into the weights at scale {loaded.scale:g}; load the model again")
            for _, component in self._held(loaded.deltas):
                component.attachments.rescale(name, value)
            loaded.scale = float(value)
            self._tell(loaded.deltas)

    def merge(self, name: str | None = None) -> None:
        """Write an adapter, or all, into the float weights: no cost in a pass, undone only by a new pipeline.

        The parts in memory are freed and loaded again when next needed. Raises BackendError where a layer is quantized,
        RequestError where a user has changed weights of the part.
        """
        with self._turn():
            chosen = self._chosen(name)
            for adapter in chosen:
                for part, deltas in self._loaded[adapter].deltas.items():
                    if self._parts.changed_by_hand(part):
                        raise RequestError(
                            f"weights of the {part} were changed by hand, into which {adapter} cannot be merged; merge "
                            "first and change them then, or take the changes back (parts.restore)"
                        )
                    lora.check_merge(self._parts.blank(part)[0], deltas)
            for adapter in chosen:
                self._loaded[adapter].merged = True
                self._tell(self._loaded[adapter].deltas)
            self._parts.reload()

    def records(self) -> list[dict[str, Any]]:
        """Return what a picture's metadata says of the adapters: file, hash, strength, if partial or merged."""
        return [
            {"file": adapter.source, "sha256": adapter.sha256, "scale": adapter.scale}
            | ({"partial": True} if adapter.partial else {})
            | ({"merged": True} if adapter.merged else {})
            for adapter in self._loaded.values()
        ]

    def _chosen(self, name: str | None) -> list[str]:
        """The name, or all names; raises RequestError for one that is not attached."""
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
        """Count a change of the parts that these deltas are for, so that kept features are dropped."""
        self._parts.revisions.update(deltas.keys())


def merge_into(module: nn.Module, part: str, adapters: Mapping[str, Loaded], dtype: torch.dtype) -> None:
    """Write the merged adapters into the weights of a part that was just read; dtype: what these are kept in."""
    for adapter in adapters.values():
        if adapter.merged and part in adapter.deltas:
            lora.merge(module, adapter.deltas[part], adapter.scale, dtype)


def attach_to(component: Host, part: str, adapters: Mapping[str, Loaded], placement: Placement) -> None:
    """Attach the adapters that are not merged to a part that was just loaded."""
    for name, adapter in adapters.items():
        if not adapter.merged and part in adapter.deltas:
            attach_one(adapter, name, part, component, placement)


def attach_one(adapter: Loaded, name: str, part: str, component: Host, placement: Placement) -> None:
    """Attach an adapter to a part, and drop the part's recorded passes, which do not hold it."""
    component.attachments.attach(name, adapter.deltas[part], adapter.scale, placement.device, placement.compute)
    component.recorded = None


def nbytes(part: str, adapters: Mapping[str, Loaded], dtype: torch.dtype) -> int:
    """Return the bytes that the adapters beside a part hold on the device, in a dtype."""
    deltas = [
        delta for adapter in adapters.values() if not adapter.merged for delta in adapter.deltas.get(part, {}).values()
    ]
    return dtype.itemsize * sum(tensor.numel() for delta in deltas for tensor in _tensors(delta))


def _check_scale(value: Any) -> None:
    """Raise RequestError for a strength that is no finite number within ±STRONGEST."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or abs(value) > STRONGEST:
        raise RequestError(
            f"the scale of an adapter is {value!r}; needed a number within ±{STRONGEST:g}, 1 for full strength"
        )


def _tensors(delta: Delta) -> list[Tensor]:
    """Every tensor of a Delta."""
    inside = [] if delta.term is None else [getattr(delta.term, field.name) for field in fields(delta.term)]
    return [tensor for tensor in (*inside, delta.bias, delta.magnitude) if tensor is not None]
