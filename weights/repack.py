"""Layers of other producers shown as the parts of a Scheme: what `formats` and the producers' modules are written with.

`Layer` is a quantized layer as a file holds it: its tensors by the last part of their names. A producer's module checks
the tensors that it needs by `Layer.require`, from the header alone, and gets a `DerivedTensors`: entries that a view
can show at once, and a function that makes the tensors when they are loaded, layer by layer. `RepackedView` is that
view.

Values are checked when they are made: a scale that is NaN or infinite would spoil a whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from s3dit.errors import CheckpointError
from s3dit.kernels.number_format import ITEM_BYTES, NumberFormat
from s3dit.weights.container import Checkpoint, Entry, View, dtype_name
from s3dit.weights.lazy_torch import torch
from s3dit.weights.mapped_file import give_back

if TYPE_CHECKING:
    from torch import Tensor

# Of formats that ComfyUI pads with zeros: to which multiple rows and columns are, and how many columns a number holds.
PADDED_FORMATS = {"mxfp8": (32, 1), "nvfp4": (16, 2)}
# Bits from which on an 8-bit float is no number, its sign apart: e4m3 has one NaN, e5m2 infinity and NaN.
FIRST_NAN_BITS = {"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7C}


@dataclass(frozen=True, slots=True)
class DerivedTensors:
    """Tensors that are made of stored tensors.

    entries: what is shown, by full name · sources: the stored names that they replace · make: returns the tensors, by
    full name, raising CheckpointError · formats: of the layers, by name, that they are the parts of · views: those that
    are stored under the same name and need no copy.
    """

    entries: dict[str, Entry]
    sources: tuple[str, ...]
    make: Callable[[], dict[str, Tensor]]
    formats: Mapping[str, NumberFormat] = field(default_factory=dict)
    views: tuple[str, ...] = ()


class Layer:
    """A quantized layer as stored: `layer("weight")` reads a tensor of it, `require` checks its shape and dtype."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name
        self._taken: list[str] = []

    def key(self, leaf: str) -> str:
        """Return the full name of a tensor of the layer."""
        return f"{self.name}.{leaf}"

    def has(self, leaf: str) -> bool:
        """Return whether it has such a tensor."""
        return self.key(leaf) in self.checkpoint

    def __call__(self, leaf: str) -> Tensor:
        """Load a tensor."""
        return self.checkpoint.load(self.key(leaf))

    def error(self, fault: str) -> CheckpointError:
        """Return the CheckpointError of a layer that is not as it must be."""
        return CheckpointError(f"{self.checkpoint.path}: {self.name}: {fault}; download the file again, or another one")

    def require(self, leaf: str, dtypes: Iterable[str], *shapes: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a tensor that must be there, of one of these dtypes and, if given, shapes."""
        if not self.has(leaf):
            raise self.error(f"no {leaf}; needed one beside its weight")
        entry, dtypes = self.checkpoint.entry(self.key(leaf)), tuple(dtypes)
        if entry.dtype not in dtypes:
            raise self.error(f"{leaf} is {entry.dtype}; needed {' or '.join(dtypes)}")
        if shapes and entry.shape not in [tuple(shape) for shape in shapes]:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise self.error(f"{leaf} is {list(entry.shape)}; needed {wanted}")
        self._taken.append(leaf)
        return entry.shape

    def matrix(self, leaf: str, dtypes: Iterable[str]) -> tuple[int, int]:
        """Return rows and columns of a tensor that must be a matrix, not empty, of one of these dtypes."""
        shape = self.require(leaf, dtypes)
        if len(shape) != 2 or 0 in shape:
            raise self.error(f"{leaf} is {list(shape)}; needed a matrix")
        return shape[0], shape[1]

    def optional(self, leaf: str, dtypes: Iterable[str], *shapes: Sequence[int]) -> bool:
        """Return whether the tensor is there; if it is, `require` it."""
        if self.has(leaf):
            self.require(leaf, dtypes, *shapes)
            return True
        return False

    def ignore(self, *leaves: str) -> None:
        """Hide tensors that are not read, where they are there."""
        self._taken += [leaf for leaf in leaves if self.has(leaf)]

    def derive(
        self, number_format: NumberFormat, out: int, in_: int, make: Callable[[], dict[str, Tensor]],
        views: Sequence[str] = (),
    ) -> DerivedTensors:  # fmt: skip
        """Return the parts of a format that `make` will return, for a weight (out, in).

        views: parts that are the stored tensors of these names as they are. Raises CheckpointError for widths that the
        format refuses; loading raises it for NaN and infinity.
        """
        try:
            layout = number_format.layout(out, in_)
        except ValueError as error:
            raise self.error(str(error)) from None
        good: set[str] = set()

        def checked() -> dict[str, Tensor]:
            parts = make()
            assert {part: (tuple(tensor.shape), dtype_name(tensor.dtype)) for part, tensor in parts.items()} == layout
            # An embedding is made for every prompt; its numbers are looked at once.
            for part, tensor in parts.items():
                if part not in good:
                    self.check_finite(part, tensor)
                    give_back(tensor)
                good.add(part)
            return {self.key(part): tensor.contiguous() for part, tensor in parts.items()}

        entries = {
            self.key(part): Entry(shape, dtype, math.prod(shape) * ITEM_BYTES[dtype])
            for part, (shape, dtype) in layout.items()
        }
        sources = tuple(self.key(leaf) for leaf in self._taken)
        formats = {self.name: number_format}
        return DerivedTensors(entries, sources, checked, formats, tuple(map(self.key, views)))

    def check_finite(self, part: str, tensor: Tensor) -> None:
        """Raise CheckpointError where a tensor of floats holds NaN or infinity."""
        if (first := FIRST_NAN_BITS.get(dtype_name(tensor.dtype))) is not None:
            bits = tensor.contiguous().view(torch.uint8) & 0x7F
            wrong = int(bits.max()) >= first
        else:
            wrong = tensor.dtype.is_floating_point and not bool(tensor.float().isfinite().all())
        if wrong:
            raise self.error(f"{part} holds NaN or infinity; needed finite numbers")


def row_scales(scale: Tensor, out: int) -> Tensor:
    """Return a scale of one number, or a number for each output channel in any shape, as (out, 1) fp32."""
    return scale.float().reshape(-1, 1).expand(out, 1)


def row_scale_shapes(out: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that `row_scales` takes."""
    return (), (1,), (1, 1), (out,), (out, 1)


def swap_nibbles(packed: Tensor) -> Tensor:
    """Return bytes (…), uint8, with their two halves exchanged."""
    packed = packed.view(torch.uint8)
    return packed << 4 | packed >> 4


def upcast_tensor(checkpoint: Checkpoint, name: str, dtype: str) -> DerivedTensors:
    """Return a tensor in an 8-bit float, which is not a layer's weight, in a dtype that holds it exactly."""
    entry = checkpoint.entry(name)
    layer, _, leaf = name.rpartition(".")

    def make() -> dict[str, Tensor]:
        tensor = checkpoint.load(name)
        Layer(checkpoint, layer).check_finite(leaf, tensor)
        return {name: tensor.to(getattr(torch, dtype))}

    return DerivedTensors({name: Entry(entry.shape, dtype, math.prod(entry.shape) * ITEM_BYTES[dtype])}, (name,), make)


class RepackedView(View):
    """A checkpoint in which derived tensors replace stored ones, and some are hidden."""

    def __init__(self, checkpoint: Checkpoint, made: Iterable[DerivedTensors], dropped: Iterable[str] = ()) -> None:
        self.path, self.metadata = checkpoint.path, checkpoint.metadata
        self._checkpoint = checkpoint
        self._made: dict[str, DerivedTensors] = {}
        self.formats = {}
        first: dict[str, DerivedTensors] = {}
        hidden = set(dropped)
        place = {name: i for i, name in enumerate(checkpoint)}
        for derived in made:
            hidden.update(derived.sources)
            first[min(derived.sources, key=place.__getitem__)] = derived
            self._made |= dict.fromkeys(derived.entries, derived)
            self.formats |= derived.formats
        self._names: dict[str, None] = {}
        for name in checkpoint:
            if name in first:
                self._names |= dict.fromkeys(first[name].entries)
            elif name not in hidden:
                self._names[name] = None
        # The parts of one layer, which are asked for one after another, or rows of each.
        self._held: tuple[DerivedTensors, dict[str, Tensor]] | None = None

    def release(self) -> None:
        """Release the layer that was made last, and what the checkpoint below keeps mapped."""
        self._held = None
        super().release()

    def keys(self) -> list[str]:
        """Return all names, in the order of the tensors on disk, the parts of a layer together."""
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def entry(self, name: str) -> Entry:
        """Return shape, dtype and bytes of a tensor, derived or stored; CheckpointError for an unknown name."""
        if name in self._made:
            return self._made[name].entries[name]
        if name not in self._names:
            raise CheckpointError(f"{self.path}: no tensor {name!r} among {len(self)}; the files are of another model")
        return self._checkpoint.entry(name)

    def is_mapped(self, name: str) -> bool:
        """Return whether a tensor, stored or derived, is loaded as a view of its file."""
        made = self._made.get(name)
        return (made is None or name in made.views) and self._checkpoint.is_mapped(name)

    def raw(self, name: str) -> bytes:
        """Return the bytes of a tensor; of a stored one without importing torch."""
        return super().raw(name) if name in self._made else self._checkpoint.raw(name)

    def load(self, name: str) -> Tensor:
        """Return a tensor on the CPU, to be treated as read-only; raises CheckpointError where it cannot be made."""
        if name not in self._made:
            self.entry(name)
            return self._checkpoint.load(name)
        made = self._made[name]
        if self._held is None or self._held[0] is not made:
            self._held = None
            self._held = made, made.make()
        return self._held[1][name]


def unpadded(checkpoint: Checkpoint, homes: Mapping[str, Tensor]) -> Checkpoint:
    """Return the checkpoint with its padded layers as float weights of the shape that a model has for them.

    parameters: the model's state dict, under the names of the checkpoint. Only ComfyUI's newest files state the shape
    themselves.
    """
    parts: dict[str, list[str]] = {}
    for name in checkpoint:
        layer, _, leaf = name.rpartition(".")
        if leaf != "bias" and layer in checkpoint.formats and checkpoint.formats[layer].name in PADDED_FORMATS:
            parts.setdefault(layer, []).append(name)
    made = [
        _cropped_layer(checkpoint, layer, names, tuple(homes[key].shape))
        for layer, names in parts.items()
        if (key := f"{layer}.weight") in homes and _is_padded(checkpoint, layer, tuple(homes[key].shape))
    ]
    if not made:
        return checkpoint
    view = RepackedView(checkpoint, made)
    cut = {name for derived in made for name in derived.entries}
    view.formats = {layer: kind for layer, kind in checkpoint.formats.items() if f"{layer}.weight" not in cut}
    return view


def _is_padded(checkpoint: Checkpoint, layer: str, shape: tuple[int, ...]) -> bool:
    """Return whether a stored layer has this shape and padding."""
    multiple, packed = PADDED_FORMATS[checkpoint.formats[layer].name]
    rows, columns = checkpoint.entry(f"{layer}.weight").shape
    full = tuple(-(-size // multiple) * multiple for size in shape)
    # A layer that is swapped already has its home in the form that is stored.
    return shape != full == (rows, columns * packed) and shape != (rows, columns)


def _cropped_layer(checkpoint: Checkpoint, layer: str, names: Sequence[str], shape: tuple[int, ...]) -> DerivedTensors:
    """Return the rows and columns of a layer that are not padding, as a float weight."""
    scheme, (out, in_) = checkpoint.scheme(layer), shape

    def make() -> dict[str, Tensor]:
        parts = {name.rpartition(".")[2]: checkpoint.load(name) for name in names}
        return {f"{layer}.weight": scheme.decode(parts)[:out, :in_].contiguous()}

    return DerivedTensors({f"{layer}.weight": Entry(shape, "float32", 4 * out * in_)}, tuple(names), make)
