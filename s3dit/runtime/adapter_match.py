"""Matches an adapter with the layers of a model: what of it fits, and a report of what does not."""

from collections.abc import Mapping
from dataclasses import dataclass

from s3dit.errors import CheckpointError
from s3dit.weights.adapter import Adapter, Deltas
from s3dit.weights.delta import Delta

# Layers that a report spells out, and how much of a name.
SHOWN, LONGEST = 10, 120


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
