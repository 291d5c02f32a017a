"""Checkpoint, the interface of every container: names with shapes, dtypes and tensors that are loaded on demand.

It is a lazy mapping whose tensors are views of the mapped file, so that a model that runs in the dtype it is stored in
costs no memory of its own, and the token embedding can be read by rows. `sniff` detects containers by their first
bytes, never by the file's name, so a renamed file is read for what it is.

This module knows no model and no names. Pickles are recognized and refused unopened: unpickling runs code of the file.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from s3dit.errors import CheckpointError
from s3dit.kernels.number_format import ITEM_BYTES, NumberFormat
from s3dit.weights.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

    from s3dit.kernels.scheme import Scheme

# What a plain weight may be stored in.
FLOATS = ("float32", "bfloat16", "float16")
# How `struct` reads numbers; a bfloat16 is the upper half of a float32.
STRUCT_CODES = {
    "bool": "?", "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i", "uint64": "Q",
    "int64": "q", "float16": "e", "bfloat16": "f", "float32": "f", "float64": "d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """The shape, dtype and bytes of a stored tensor; dtype: its name in torch, else in the file (see `is_dtype`)."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch.", such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def is_dtype(name: str) -> bool:
    """Return whether torch has a dtype of that name."""
    return name in ITEM_BYTES


class Checkpoint(ABC):
    """A lazy mapping from name to tensor: opening it reads headers, tensors are read one by one on demand.

    `formats` says of each quantized layer, by its name in this checkpoint, its number format; such a layer's tensors
    are `layer.part` for the parts of the format's layout (see `formats`, the module). Nothing but `load` and what calls
    it (`rows`, `schemes`) imports torch.
    """

    path: Path
    metadata: dict[str, str]
    formats: Mapping[str, NumberFormat] = {}

    @abstractmethod
    def keys(self) -> list[str]:
        """Return all names, in the order of the tensors on disk."""

    @abstractmethod
    def entry(self, name: str) -> Entry:
        """Return shape, dtype and bytes of a tensor without reading it; CheckpointError for an unknown name."""

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU: a view of the mapped file, to be treated as read-only."""

    def is_mapped(self, name: str) -> bool:
        """Return whether `load` is sure to return a view of a mapped file, which takes no memory of its own."""
        return False

    def raw(self, name: str) -> bytes:
        """Return the bytes of a tensor as `load` gives it, of a stored one without importing torch."""
        return bytes(self.load(name).contiguous().reshape(-1).view(torch.uint8).numpy())

    def numbers(self, name: str) -> list[float]:
        """Return the numbers of a small tensor."""
        dtype = self.entry(name).dtype
        if dtype not in STRUCT_CODES:
            return self.load(name).double().flatten().tolist()
        raw = self.raw(name)
        if dtype == "bfloat16":
            raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
        return [float(number) for (number,) in struct.iter_unpack("<" + STRUCT_CODES[dtype], raw)]

    def is_zero(self, name: str) -> bool:
        """Return whether all numbers of a tensor are zero, of either sign where they are floats."""
        dtype, raw = self.entry(name).dtype, self.raw(name)
        size, zeros = ITEM_BYTES.get(dtype, 1), b"\0\x80" if "float" in dtype else b"\0"
        return not raw[size - 1 :: size].strip(zeros) and not any(raw[i::size].strip(b"\0") for i in range(size - 1))

    def scheme(self, layer: str) -> Scheme:
        """Return the Scheme of a quantized layer, a key of `formats`."""
        from s3dit.kernels.schemes import scheme_of

        return scheme_of(self.formats[layer])

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Return the Schemes of all quantized layers."""
        return {layer: self.scheme(layer) for layer in self.formats}

    def check(self) -> None:  # noqa: B027
        """Raise CheckpointError where a file is gone or was replaced since it was opened; then use no tensor of it."""

    def release(self) -> None:  # noqa: B027
        """Release maps that are held besides those of tensors given out; a later `load` maps the file anew."""

    def disable_mmap(self) -> None:  # noqa: B027
        """Read each tensor into memory of its own from now on, instead of returning views of a map."""

    def read_ahead(self) -> Iterator[None]:
        """Ask the system to read the files into its cache, a piece at every `next`; where it cannot, do nothing."""
        yield from ()

    def __contains__(self, name: object) -> bool:
        return name in self.keys()  # noqa: SIM118

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors as stored."""
        return sum(self.entry(name).nbytes for name in self)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Return some rows of a matrix, in a tensor of their own: ids (n,) int64 -> (n, columns).

        Only these rows are read; of a quantized matrix only these rows are decoded, to fp32.
        Raises CheckpointError where an id is outside the matrix: tokenizer and weights do not belong together.
        """
        shape = self.entry(name).shape
        if len(shape) != 2:
            raise CheckpointError(
                f"{self.path}: {name} is {list(shape)}; needed a matrix; take the model's own weights"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < shape[0]:
            raise CheckpointError(
                f"{self.path}: rows {int(ids.min())}..{int(ids.max())} of {name} were asked for, it has {shape[0]}; "
                "take the tokenizer from the same model as the weights"
            )
        ids, layer = ids.to("cpu", torch.int64), name.removesuffix(".weight")
        if layer not in self.formats:
            return self.load(name).index_select(0, ids)
        parts = {
            key.rpartition(".")[2]: self.load(key)
            for key in self
            if key.rpartition(".")[0] == layer and not key.endswith(".bias")
        }
        if (own := self.scheme(layer).rows) is not None:
            return own(parts, ids)
        # What is not of as many rows as the weight is shared by all of them.
        cut = {
            leaf: part.index_select(0, ids) if part.dim() and len(part) == shape[0] else part
            for leaf, part in parts.items()
        }
        return self.scheme(layer).decode(cut)

    def format(self, name: str) -> str:
        """Return the number format of a tensor in a word: its layer's, or its dtype."""
        number_format = self.formats.get(name.rpartition(".")[0])
        return number_format.name if number_format is not None else self.entry(name).dtype


class View(Checkpoint):
    """A checkpoint that shows another with other names, or with tensors that are derived from its tensors."""

    _checkpoint: Checkpoint

    def check(self) -> None:
        """Check the files of the checkpoint below."""
        self._checkpoint.check()

    def release(self) -> None:
        """Release what the checkpoint below keeps mapped."""
        self._checkpoint.release()

    def disable_mmap(self) -> None:
        """Read the files of the checkpoint below instead of mapping them."""
        self._checkpoint.disable_mmap()

    def read_ahead(self) -> Iterator[None]:
        """Read the files of the checkpoint below ahead."""
        return self._checkpoint.read_ahead()


Container = Literal["safetensors", "gguf", "pickle", "pointer", "page", "empty", "unknown"]

# A header is parsed into objects ten times its size. Real ones are far below 1 MB, with a trainer's notes below 10; the
# safetensors library would take 100 MB.
MAX_HEADER_BYTES = 1 << 25
# Far above what any model has, in any container.
MAX_TENSORS = 1 << 16

REFUSED: dict[Container, str] = {
    "gguf": "is a GGUF file, where safetensors was needed; give its own path, or name it *.gguf",
    "pickle": "is a pickle (.bin, .pt, .ckpt), which is never opened, because loading one runs code it carries; "
    "take the safetensors files of the model",
    "pointer": "is a Git LFS pointer, not the weights it stands for; run `git lfs pull` or download the file itself",
    "page": "is a web page, not weights; the download was answered with a page (login?), download it again",
    "empty": "is empty; download it again",
    "unknown": "is neither safetensors nor GGUF, by its first bytes; needed one of them; download it again",
}


def sniff(path: Path) -> Container:
    """Return the container of a file, detected by its first bytes; raises CheckpointError when it cannot be read."""
    # Opening a pipe would wait for a writer that may never come.
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: not a plain file; needed a file of weights; give the path of one")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror}); needed a file of weights") from None
    if not head:
        return "empty"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        return "safetensors"
    if head.startswith(b"GGUF"):
        return "gguf"
    # A zip archive is how torch.save writes; 0x80 with a protocol number is a bare pickle.
    if head.startswith(b"PK\x03\x04") or (head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        return "pointer"
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "page"
    return "unknown"
