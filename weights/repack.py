"""Layers of other producers shown as the parts of a Scheme: what `formats` and its rooms are written with.

`Layer` is one quantized layer as a file holds it: its tensors by the last part of their names. A producer's room asks
it for what it needs, which checks shapes and dtypes from the header alone, and gets a `DerivedTensors`: entries that a
view can show at once, and a function that makes the tensors when they are asked for, one layer at a time.
`RepackedView` is that view.

What a tensor holds is looked at when it is made: a scale that is NaN or infinite would spoil a whole picture.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s3dit.errors import CheckpointError
from s3dit.kernels.scheme import Scheme
from s3dit.weights.container import Checkpoint, Entry, View

# Of formats that ComfyUI pads with zeros: to which multiple rows and columns are, and how many columns a number holds.
PADDED = {"mxfp8": (32, 1), "nvfp4": (16, 2)}
# Bits from which on an 8-bit float is no number, its sign apart: e4m3 has one NaN, e5m2 infinity and NaN.
NO_NUMBER = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}


@dataclass(frozen=True, slots=True)
class DerivedTensors:
    """Tensors that are made of stored ones.

    entries: what is shown, by full name · sources: the stored names that it takes the place of · make: the tensors, by
    full name, raising CheckpointError · layer, scheme: where they are the parts of one.
    """

    entries: dict[str, Entry]
    sources: tuple[str, ...]
    make: Callable[[], dict[str, Tensor]]
    layer: str = ""
    scheme: Scheme | None = None


class Layer:
    """A quantized layer as stored: `layer("weight")` reads one of its tensors, `need` holds its entry to the rules."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name
        self._taken: list[str] = []

    def key(self, leaf: str) -> str:
        """The full name of one of its tensors."""
        return f"{self.name}.{leaf}"

    def has(self, leaf: str) -> bool:
        """Whether it has such a tensor."""
        return self.key(leaf) in self.checkpoint

    def __call__(self, leaf: str) -> Tensor:
        """Read a tensor."""
        return self.checkpoint.load(self.key(leaf))

    def error(self, found: str) -> CheckpointError:
        """What to raise where the layer is not as it must be."""
        return CheckpointError(f"{self.checkpoint.path}: {self.name}: {found}; download the file again, or another one")

    def need(self, leaf: str, dtypes: Iterable[torch.dtype | str], *shapes: Sequence[int]) -> tuple[int, ...]:
        """The shape of a tensor that must be there, of one of these dtypes and shapes (any, if none is given)."""
        if not self.has(leaf):
            raise self.error(f"no {leaf}; needed one beside its weight")
        entry, dtypes = self.checkpoint.entry(self.key(leaf)), tuple(dtypes)
        if entry.dtype not in dtypes:
            raise self.error(f"{leaf} is {_plain(entry.dtype)}; needed {' or '.join(map(_plain, dtypes))}")
        if shapes and entry.shape not in [tuple(shape) for shape in shapes]:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise self.error(f"{leaf} is {list(entry.shape)}; needed {wanted}")
        self._taken.append(leaf)
        return entry.shape

    def matrix(self, leaf: str, dtypes: Iterable[torch.dtype]) -> tuple[int, int]:
        """Rows and columns of a tensor that must be a matrix, not empty, of one of these dtypes."""
        shape = self.need(leaf, dtypes)
        if len(shape) != 2 or 0 in shape:
            raise self.error(f"{leaf} is {list(shape)}; needed a matrix")
        return shape[0], shape[1]

    def maybe(self, leaf: str, dtypes: Iterable[torch.dtype | str], *shapes: Sequence[int]) -> bool:
        """`need`, where the tensor is there at all; whether it is."""
        if self.has(leaf):
            self.need(leaf, dtypes, *shapes)
            return True
        return False

    def drop(self, *leaves: str) -> None:
        """Take tensors that nobody reads out of sight, where they are there."""
        self._taken += [leaf for leaf in leaves if self.has(leaf)]

    def made(self, scheme: Scheme, out: int, in_: int, make: Callable[[], dict[str, Tensor]]) -> DerivedTensors:
        """The parts that `make` will give, as the scheme's spec says; raises CheckpointError for widths it refuses."""
        try:
            spec = scheme.spec(out, in_)
        except ValueError as error:
            raise self.error(str(error)) from None
        good: set[str] = set()

        def checked() -> dict[str, Tensor]:
            parts = make()
            assert {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in parts.items()} == spec
            # An embedding is made for every prompt; its numbers are looked at once.
            for part, tensor in parts.items():
                if part not in good:
                    self.numbers(part, tensor)
                good.add(part)
            return {self.key(part): tensor.contiguous() for part, tensor in parts.items()}

        entries = {
            self.key(part): Entry(shape, dtype, math.prod(shape) * dtype.itemsize)
            for part, (shape, dtype) in spec.items()
        }
        return DerivedTensors(entries, tuple(self.key(leaf) for leaf in self._taken), checked, self.name, scheme)

    def numbers(self, part: str, tensor: Tensor) -> None:
        """Raise CheckpointError where a tensor of floats holds NaN or infinity."""
        if tensor.dtype in NO_NUMBER:
            bits = tensor.contiguous().view(torch.uint8) & 0x7F
            wrong = int(bits.max()) >= NO_NUMBER[tensor.dtype]
        else:
            wrong = tensor.dtype.is_floating_point and not bool(tensor.float().isfinite().all())
        if wrong:
            raise self.error(f"{part} holds NaN or infinity; needed finite numbers")


def _plain(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def rows(scale: Tensor, out: int) -> Tensor:
    """A scale of one number, or one an output channel in any shape -> (out, 1) fp32."""
    return scale.float().reshape(-1, 1).expand(out, 1)


def row_shapes(out: int) -> tuple[tuple[int, ...], ...]:
    """The shapes that `rows` takes."""
    return (), (1,), (1, 1), (out,), (out, 1)


def swapped(packed: Tensor) -> Tensor:
    """Bytes (…) with their halves changed over."""
    packed = packed.view(torch.uint8)
    return packed << 4 | packed >> 4


def widened(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> DerivedTensors:
    """A tensor that is no layer's weight, in an 8-bit float, as a plain tensor in a dtype that holds it exactly."""
    entry = checkpoint.entry(name)
    layer, _, leaf = name.rpartition(".")

    def make() -> dict[str, Tensor]:
        tensor = checkpoint.load(name)
        Layer(checkpoint, layer).numbers(leaf, tensor)
        return {name: tensor.to(dtype)}

    return DerivedTensors({name: Entry(entry.shape, dtype, math.prod(entry.shape) * dtype.itemsize)}, (name,), make)


class RepackedView(View):
    """A checkpoint in which some tensors are shown as others are made of them, and some not at all."""

    def __init__(self, checkpoint: Checkpoint, made: Iterable[DerivedTensors], dropped: Iterable[str] = ()) -> None:
        self.path, self.metadata = checkpoint.path, checkpoint.metadata
        self._checkpoint = checkpoint
        self._made: dict[str, DerivedTensors] = {}
        self.schemes = {}
        first: dict[str, DerivedTensors] = {}
        hidden = set(dropped)
        place = {name: i for i, name in enumerate(checkpoint)}
        for one in made:
            hidden.update(one.sources)
            first[min(one.sources, key=place.__getitem__)] = one
            self._made |= dict.fromkeys(one.entries, one)
            if one.scheme is not None:
                self.schemes[one.layer] = one.scheme
        self._names: dict[str, None] = {}
        for name in checkpoint:
            if name in first:
                self._names |= dict.fromkeys(first[name].entries)
            elif name not in hidden:
                self._names[name] = None
        # The parts of one layer, which are asked for one after another, or rows of each.
        self._held: tuple[DerivedTensors, dict[str, Tensor]] | None = None

    def release(self) -> None:
        """Let go of the layer made last, and of what the checkpoint below keeps mapped."""
        self._held = None
        super().release()

    def keys(self) -> list[str]:
        """All names, in the order in which the tensors lie on disk, the parts of a layer together."""
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def entry(self, name: str) -> Entry:
        """Shape, dtype and bytes of one tensor, made or stored; CheckpointError for an unknown name."""
        if name in self._made:
            return self._made[name].entries[name]
        if name not in self._names:
            raise CheckpointError(f"{self.path}: no tensor {name!r} among {len(self)}; the files are of another model")
        return self._checkpoint.entry(name)

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, to be treated as read-only; raises CheckpointError where it cannot be made."""
        if name not in self._made:
            self.entry(name)
            return self._checkpoint.load(name)
        made = self._made[name]
        if self._held is None or self._held[0] is not made:
            self._held = None
            self._held = made, made.make()
        return self._held[1][name]


def unpadded(checkpoint: Checkpoint, homes: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint whose padded layers are float weights of the shape that a model has for them.

    homes: what the model has, by the names of the checkpoint. Only ComfyUI's newest files say the shape themselves.
    """
    parts: dict[str, list[str]] = {}
    for name in checkpoint:
        layer, _, leaf = name.rpartition(".")
        if leaf != "bias" and layer in checkpoint.schemes and checkpoint.schemes[layer].name in PADDED:
            parts.setdefault(layer, []).append(name)
    made = [
        _cut(checkpoint, layer, names, tuple(homes[key].shape))
        for layer, names in parts.items()
        if (key := f"{layer}.weight") in homes and _is_padded(checkpoint, layer, tuple(homes[key].shape))
    ]
    if not made:
        return checkpoint
    view = RepackedView(checkpoint, made)
    cut = {name for one in made for name in one.entries}
    view.schemes = {layer: kind for layer, kind in checkpoint.schemes.items() if f"{layer}.weight" not in cut}
    return view


def _is_padded(checkpoint: Checkpoint, layer: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored layer is one of this shape and padding."""
    multiple, packed = PADDED[checkpoint.schemes[layer].name]
    rows, columns = checkpoint.entry(f"{layer}.weight").shape
    full = tuple(-(-one // multiple) * multiple for one in shape)
    # A layer that is swapped already has its home in the form that is stored.
    return shape != full == (rows, columns * packed) and shape != (rows, columns)


def _cut(checkpoint: Checkpoint, layer: str, names: Sequence[str], shape: tuple[int, ...]) -> DerivedTensors:
    """The rows and columns of a layer that are no padding, as a float weight."""
    scheme, (out, in_) = checkpoint.schemes[layer], shape

    def make() -> dict[str, Tensor]:
        parts = {name.rpartition(".")[2]: checkpoint.load(name) for name in names}
        return {f"{layer}.weight": scheme.decode(parts)[:out, :in_].contiguous()}

    return DerivedTensors({f"{layer}.weight": Entry(shape, torch.float32, 4 * out * in_)}, tuple(names), make)
