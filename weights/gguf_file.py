"""GGUF files: header, metadata and tensor table, with every length checked against the file before it is used.

A file from the internet may claim anything: 10^9 tensors, a string of 2^63 bytes, tensors that overlap. So nothing is
allocated by what a number states; a count must fit into the bytes that are left, and arrays of the metadata (a
vocabulary has 151,936 strings) are read only when they are asked for. The file is mapped privately: tensors are views
of the map, and writing into a view never changes the file.

Dimensions are stored fastest first, so torch's shape is the reverse. A tensor of integers or floats has its dtype in
torch; a tensor in blocks is bytes, uint8 (…, bytes a row), since blocks run along a row: cutting by rows is exact.
`ggml_types` has the block type of such a tensor and `shapes` the shape of its decoded values; `formats` makes a Scheme.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little endian; block sizes of ggml.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3dit.errors import CheckpointError
from s3dit.weights.container import MAX_TENSORS, REFUSED, Entry
from s3dit.weights.lazy_torch import torch
from s3dit.weights.mapped_file import MappedFile, StoredCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

# Type id -> name, numbers in a block, bytes of a block.
GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
PLAIN_TYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip

# Metadata type id -> struct code; strings and arrays have lengths of their own.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# Far above what any model has: 40 keys, names of 90 bytes, a chat template of 10 kB.
MAX_KEYS, MAX_NAME_BYTES, MAX_TEXT_BYTES, MAX_DIMENSIONS = 1 << 12, 1 << 10, 1 << 20, 4
ALIGNMENTS = [1 << i for i in range(3, 17)]


@dataclass(frozen=True, slots=True)
class Array:
    """A list of the metadata that was not read: type of its items, how many, and where the first begins."""

    kind: int
    count: int
    start: int


class GGUFFile(StoredCheckpoint):
    """The checkpoint of a GGUF file.

    fields: the metadata with its types, with `Array` for lists (`items` reads a list) · ggml_types: block type of the
    tensors that are in blocks, such as "Q4_K" · shapes: torch's shape of the values of each tensor.
    """

    def __init__(self, path: Path) -> None:
        """Read the header; raises CheckpointError for anything that is inconsistent."""
        self._file = MappedFile(path)
        self._files = [self._file]
        if self._file.container != "gguf":
            raise CheckpointError(f"{path}: {REFUSED.get(self._file.container, 'is not a GGUF file')}")
        self.path = path
        reader = _Reader(self._file.map(), path)
        tensors = reader.open()
        self.fields = reader.fields()
        self.metadata = {key: str(value) for key, value in self.fields.items() if not isinstance(value, Array)}
        self.ggml_types: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._entries: dict[str, Entry] = {}
        self._starts: dict[str, int] = {}
        self._read_table(reader, tensors)

    def _read_table(self, reader: _Reader, count: int) -> None:
        """Read the tensor table; every tensor must be inside the file, and none may overlap another."""
        alignment = self.fields.get("general.alignment", 32)
        if isinstance(alignment, bool) or alignment not in ALIGNMENTS:
            raise reader.error(f"general.alignment is {str(alignment)[:40]}; needed a power of two from 8 to 65536")
        listed = sorted((reader.tensor() for _ in range(count)), key=lambda row: row[3])
        data = -(-reader.at // alignment) * alignment
        end = 0
        for name, shape, kind, offset in listed:
            block, size, unit = GGML_TYPES[kind]
            length = math.prod(shape) // size * unit
            if offset % alignment or offset < end or data + offset + length > len(reader.data):
                raise reader.error(
                    f"{name} is said to lie at {offset} + {length} bytes of {max(0, len(reader.data) - data)}; needed "
                    f"a multiple of {alignment} behind the tensor before it and inside the file"
                )
            if name in self._entries:
                raise reader.error(f"{name} is listed twice")
            end = offset + length
            self.shapes[name], self._starts[name] = shape, data + offset
            if block in PLAIN_TYPES:
                self._entries[name] = Entry(shape, PLAIN_TYPES[block], length)
            else:
                self.ggml_types[name] = block
                self._entries[name] = Entry((*shape[:-1], shape[-1] // size * unit), "uint8", length)

    def place(self, name: str) -> tuple[MappedFile, int]:
        """Return the file, and where the bytes of a tensor begin in it."""
        return self._file, self._starts[name]

    def is_mapped(self, name: str) -> bool:
        """Return whether a tensor is loaded as a view of the file: every one, while it is mapped."""
        return self._file.mapped and name in self

    def load(self, name: str) -> Tensor:
        """Return a tensor as stored (blocks as uint8), on the CPU: a view of the mapped file."""
        entry = self.entry(name)
        dtype = getattr(torch, entry.dtype)
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype, device="cpu")
        return self._file.read(self._starts[name], entry.nbytes).view(dtype).view(entry.shape)

    def format(self, name: str) -> str:
        """Return the number format of a tensor as ggml calls it."""
        return self.ggml_types.get(name) or super().format(name)

    def items(self, key: str) -> list[Any]:
        """Read a list of the metadata; raises CheckpointError where there is none."""
        array = self.fields.get(key)
        if not isinstance(array, Array):
            raise CheckpointError(f"{self.path}: its metadata has no list {key!r}; take a complete GGUF file")
        return list(_Reader(self._file.map(), self.path, array.start).array(array))


class _Reader:
    """A cursor over the mapped header: whatever does not fit into the file is an error."""

    def __init__(self, data: mmap.mmap, path: Path, at: int = 4) -> None:
        self.data, self.path, self.at = data, path, at

    def error(self, fault: str) -> CheckpointError:
        """What to raise for a header that does not hold."""
        return CheckpointError(
            f"{self.path}: broken GGUF: {fault}; the file is short, damaged or hostile; download it again"
        )

    def open(self) -> int:
        """Version and counts; leaves the cursor at the metadata and gives the number of tensors."""
        version = self.scalar("I")
        if version not in (2, 3):
            other = "big-endian" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise CheckpointError(
                f"{self.path}: is a GGUF file of {other}; needed version 2 or 3, little endian; convert or download it "
                "again"
            )
        tensors, self._keys = self.scalar("Q"), self.scalar("Q")
        # The least that a tensor and a key take in the file.
        for what, count, most, least in (("tensors", tensors, MAX_TENSORS, 32), ("keys", self._keys, MAX_KEYS, 13)):
            if count > most or count * least > self.left:
                raise self.error(f"it claims {count} {what} in {self.left} bytes, needed at most {most}")
        return tensors

    @property
    def left(self) -> int:
        """Bytes from the cursor to the end."""
        return len(self.data) - self.at

    def skip(self, size: int, what: str) -> int:
        """Move the cursor behind `size` bytes, which must be there, and give their start."""
        if size > self.left:
            raise self.error(f"{what} of {size} bytes where {max(0, self.left)} are left")
        self.at += size
        return self.at - size

    def scalar(self, code: str) -> Any:
        """One number of a struct code, little endian."""
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.data, self.skip(size, "a number"))[0]

    def text(self, most: int) -> str:
        """A length and that many bytes of UTF-8."""
        length = self.scalar("Q")
        if length > most:
            raise self.error(f"a text of {length} bytes where at most {most} make sense")
        start = self.skip(length, "a text")
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            raise self.error("a text that is not UTF-8") from None

    def fields(self) -> dict[str, Any]:
        """All metadata, lists unread."""
        fields: dict[str, Any] = {}
        for _ in range(self._keys):
            key = self.text(MAX_NAME_BYTES)
            if key in fields:
                raise self.error(f"the key {key!r} is there twice")
            fields[key] = self.value(self.scalar("I"))
        return fields

    def value(self, kind: int) -> Any:
        """One value of a metadata type; a list is walked over, so that all of it is known to be there."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.text(MAX_TEXT_BYTES)
        if kind != ARRAY:
            raise self.error(f"a value of type {kind}, needed one of 0 to 12")
        inner, count = self.scalar("I"), self.scalar("Q")
        array = Array(inner, count, self.at)
        if inner in SCALARS:
            self.skip(count * struct.calcsize("<" + SCALARS[inner]), "a list")
        elif inner == STRING:
            if count * 8 > self.left:
                raise self.error(f"a list of {count} texts in {self.left} bytes")
            self._walk(count)
        else:
            raise self.error(f"a list of type {inner}, needed numbers or texts")
        return array

    def _walk(self, count: int) -> None:
        """Move over `count` texts; a vocabulary has 151,936, so this loop is kept bare."""
        data, at, end, read = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                raise self.error("a list of texts that is longer than the file")
            at += 8 + read(data, at)[0]
        if at > end:
            raise self.error("a text of a list that is longer than the file")
        self.at = at

    def array(self, array: Array) -> Iterator[Any]:
        """The items of a list, from the cursor on."""
        for _ in range(array.count):
            yield self.text(MAX_TEXT_BYTES) if array.kind == STRING else self.scalar(SCALARS[array.kind])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, torch's shape, type id and offset of the next tensor of the table."""
        name = self.text(MAX_NAME_BYTES)
        dims = self.scalar("I")
        if dims > MAX_DIMENSIONS:
            raise self.error(f"{name} has {dims} dimensions, needed at most {MAX_DIMENSIONS}")
        sizes = [self.scalar("Q") for _ in range(dims)]
        kind, offset = self.scalar("I"), self.scalar("Q")
        if kind not in GGML_TYPES:
            raise self.error(f"{name} is of type {kind}, which is none of ggml's")
        # A size of zero hides no wild one beside it.
        if math.prod(size or 1 for size in sizes) >= 1 << 48:
            raise self.error(f"{name} has the sizes {sizes}")
        block, size, _ = GGML_TYPES[kind]
        row = sizes[0] if sizes else 1
        if row % size or (block not in PLAIN_TYPES and 0 in sizes):
            raise self.error(f"{name} has {sizes} numbers, {block} needs rows of a multiple of {size}")
        return name, tuple(reversed(sizes)), kind, offset
