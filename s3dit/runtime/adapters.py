"""The adapters of a pipeline: `pipe.lora.attach(file)`, `detach`, `scale`, `merge`.

Adapters outlast the parts of a model, which are loaded and unloaded (`residency`): a part in memory is changed at once,
and a part that is loaded is given all of its adapters (`merge_into`, `attach_to`). So nothing is loaded again for a new
strength, and no adapter is lost with a part. The list itself belongs to the parts (`Components.adapters`).

A call while another thread draws a picture waits for it; between two steps of a `stream` it acts from the next step on.

A file is matched with the model before anything is changed: the report says what of it matched, what did not and what
has a wrong shape, and the rest is an error unless partial use is allowed.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from s3dit.errors import RequestError
from s3dit.runtime import lora
from s3dit.runtime.adapter_match import Report, match_layers
from s3dit.runtime.adapter_strength import ALL_STEPS, by_block, check_blocks, check_scale, check_steps
from s3dit.runtime.devices import Placement, own_settings
from s3dit.weights.adapter import Deltas, read_adapter
from s3dit.weights.delta import Delta
from s3dit.weights.few_steps import FewSteps
from s3dit.weights.hub import resolve_file


@dataclass(slots=True)
class Loaded:
    """An adapter of a pipeline: its source and hash, its deltas by part, its strength, whether partial or merged.

    blocks: factors by block, which its deltas have already · steps: it acts in the steps i of n with steps[0] <= i/n <
    steps[1] · resting: whether a step is computed that is none of them · few_steps: what it was distilled for, or None.
    """

    source: str
    sha256: str
    deltas: dict[str, Deltas]
    scale: float
    partial: bool
    few_steps: FewSteps | None = None
    merged: bool = False
    blocks: dict[str, float] = field(default_factory=dict)
    steps: tuple[float, float] = ALL_STEPS
    resting: bool = False

    @property
    def strength(self) -> float:
        """The strength now: none in steps that are not its own."""
        return 0.0 if self.resting else self.scale

    def acts(self, i: int, n: int) -> bool:
        """Return whether it acts in step i (from 0) of n."""
        return self.steps[0] <= i / n < self.steps[1]


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
        self,
        source: str | Path,
        scale: float = 1.0,
        name: str | None = None,
        allow_partial: bool = False,
        blocks: Mapping[str, float] | None = None,
        steps: Sequence[float] = ALL_STEPS,
    ) -> Report:
        """Attach an adapter beside the weights; returns the report on its layers.

        source: a .safetensors file, a folder that holds one, or "org/name/file.safetensors" on the Hub · scale: its
        strength, any sign · name: to speak of it later (default: the file's) · allow_partial: leave out what fits no
        layer · blocks: factors of the strength by layers' names, {"layers.0-9": 0} (see `adapter_strength`) · steps:
        (start, end), it acts in the steps i of n with start <= i/n < end. Raises CheckpointError (the file, and what
        does not fit), RequestError (the rest).
        """
        with self._turn():
            check_scale(scale)
            blocks = check_blocks(blocks or {})
            if name is not None and name in self._loaded:
                raise RequestError(f"there is an adapter {name!r} already; detach it, or give this one another name")
            adapter = read_adapter(resolve_file(str(source)))
            name = name or self._free(adapter.path.stem)
            shapes = {part: lora.layer_shapes(self._parts.blank(part)[0]) for part in adapter.deltas}
            matched, report = match_layers(adapter, shapes, name, allow_partial)
            deltas = by_block(matched, blocks) if blocks else matched
            loaded = Loaded(str(source), adapter.digest(), deltas, float(scale), allow_partial, adapter.few_steps)
            loaded.blocks, loaded.steps = blocks, check_steps(steps, deltas)
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
            check_scale(value)
            (name,) = self._chosen(name)
            loaded = self._loaded[name]
            if loaded.merged:
                raise RequestError(f"{name} is merged into the weights at scale {loaded.scale:g}; load the model again")
            for _, component in self._held(loaded.deltas):
                component.attachments.rescale(name, 0.0 if loaded.resting else value)
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
                if self._loaded[adapter].steps != ALL_STEPS:
                    raise RequestError(
                        f"{adapter} acts in some steps only, and what is merged acts in all; leave it attached, or "
                        "attach it without steps"
                    )
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

    @contextmanager
    def step(self, i: int, n: int) -> Iterator[None]:
        """Let those adapters rest inside the `with` whose steps do not include step i (from 0) of n."""
        # After the last step a solver has no more to compute.
        resting = [(name, each) for name, each in self._loaded.items() if not each.acts(min(i, n - 1), n)]
        try:
            self._set_resting(resting, True)
            yield
        finally:
            self._set_resting(resting, False)

    @property
    def state(self) -> tuple[object, ...]:
        """A value that is another once adapters change the transformer otherwise, also from one step to the next."""
        return self._parts.revisions["transformer"], *(name for name, each in self._loaded.items() if each.resting)

    def _set_resting(self, adapters: list[tuple[str, Loaded]], resting: bool) -> None:
        """Set whether some adapters rest, those that were detached meanwhile left out."""
        for name, adapter in adapters:
            adapter.resting = resting
            if self._loaded.get(name) is adapter:
                for _, component in self._held(adapter.deltas):
                    component.attachments.rescale(name, adapter.strength)

    def records(self) -> list[dict[str, Any]]:
        """Return what a picture's metadata says of the adapters: file, hash, strength, and what is not usual."""
        return [
            {"file": adapter.source, "sha256": adapter.sha256, "scale": adapter.scale}
            | ({"partial": True} if adapter.partial else {})
            | ({"merged": True} if adapter.merged else {})
            | ({"blocks": dict(adapter.blocks)} if adapter.blocks else {})
            | ({"steps": list(adapter.steps)} if adapter.steps != ALL_STEPS else {})
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
    component.attachments.attach(name, adapter.deltas[part], adapter.strength, placement.device, placement.compute)
    component.recorded = None


def nbytes(part: str, adapters: Mapping[str, Loaded], dtype: torch.dtype) -> int:
    """Return the bytes that the adapters beside a part hold on the device, in a dtype."""
    deltas = [
        delta for adapter in adapters.values() if not adapter.merged for delta in adapter.deltas.get(part, {}).values()
    ]
    return dtype.itemsize * sum(tensor.numel() for delta in deltas for tensor in _tensors(delta))


def _tensors(delta: Delta) -> list[Tensor]:
    """Every tensor of a Delta."""
    inside = [] if delta.term is None else [getattr(delta.term, field.name) for field in fields(delta.term)]
    return [tensor for tensor in (*inside, delta.bias, delta.magnitude) if tensor is not None]
