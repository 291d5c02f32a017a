"""Safetensors: a file, or the shards that an index names.

Headers are read and checked here, as strictly as the safetensors library does: its own reader maps a file with memory
reserved for all of it, for which a file larger than memory has no room, and keeps some bytes of every tensor that was
ever loaded. Tensors are views of a map (`mapped_file`), which they keep alive by themselves; a single file is kept
mapped at a time, so a shard whose tensors were cast leaves memory before the next is read.

All headers are read when the files are opened (a few hundred kB), so a folder with a missing, cut or foreign shard is
refused before the first tensor is read. An index is not trusted: the names in it must stay inside the folder.

Source: https://github.com/huggingface/safetensors (format), transformers' sharded index (`weight_map`).
"""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3dit.errors import CheckpointError
from s3dit.kernels.number_format import ITEM_BYTES
from s3dit.weights.container import MAX_TENSORS, REFUSED, Checkpoint, Entry, is_dtype
from s3dit.weights.json_files import parse_json, read_json
from s3dit.weights.lazy_torch import torch
from s3dit.weights.mapped_file import MappedFile, StoredCheckpoint
from s3dit.weights.model_folder import allowed_places, contained

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}

# Bits of a number in types that torch has not, or not in that form.
OTHER_DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
SUFFIX = ".safetensors"
# torch takes 64.
MAX_DIMENSIONS = 32
# Of a file, on every file system in use.
MAX_FILE_NAME = 255
# Bytes; the official one has 50 kB.
MAX_INDEX_BYTES = 1 << 24


class SafetensorsFiles(StoredCheckpoint):
    """The checkpoint of one or several safetensors files."""

    def __init__(self, path: Path, shards: list[Path]) -> None:
        self.path = path
        self.metadata = {}
        self._entries: dict[str, Entry] = {}
        self._home: dict[str, tuple[MappedFile, int]] = {}
        self._files = [MappedFile(shard) for shard in shards]
        for file in self._files:
            entries, starts, metadata = read_header(file)
            for name, start in starts.items():
                if name in self._home:
                    raise CheckpointError(
                        f"{path}: {name} lies in two shards, {self._home[name][0].path.name} and {file.path.name}; "
                        "needed one place for each tensor; download the folder again"
                    )
                self._home[name] = file, start
            self._entries |= entries
            self.metadata = metadata | self.metadata

    def shards(self) -> dict[str, str]:
        """Return the name of the file that holds each tensor."""
        return {name: file.path.name for name, (file, _) in self._home.items()}

    def is_mapped(self, name: str) -> bool:
        """Return whether a tensor is loaded as a view of its file."""
        entry, (file, start) = self.entry(name), self._home[name]
        return file.mapped and is_dtype(entry.dtype) and start % ITEM_BYTES[entry.dtype] == 0

    def place(self, name: str) -> tuple[MappedFile, int]:
        """Return the file of a tensor, and where its bytes begin in it."""
        return self._home[name]

    def load(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU: a view of the mapped file, a copy where misaligned."""
        entry = self.entry(name)
        file, start = self._home[name]
        if not is_dtype(entry.dtype):
            raise CheckpointError(
                f"{file.path}: {name} is of the type {entry.dtype}, which torch has not; take a file in another format"
            )
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="cpu")
        # As many maps are held as are read from: one.
        for other in self._files:
            if other is not file:
                other.release()
        flat = file.read(start, entry.nbytes)
        # Old writers did not pad the header; an address off the dtype's grid is not promised to work everywhere.
        aligned = flat.clone() if start % ITEM_BYTES[entry.dtype] else flat
        return aligned.view(getattr(torch, entry.dtype)).view(entry.shape)


def read_header(file: MappedFile) -> tuple[dict[str, Entry], dict[str, int], dict[str, str]]:
    """Return the tensors of a file in the order of their bytes, where each begins, and the file's metadata.

    Raises CheckpointError where the header is inconsistent: its tensors must fill the file exactly, end to end.
    """

    def error(detail: str) -> CheckpointError:
        return CheckpointError(
            f"{file.path}: {file.size:,} bytes, not a whole safetensors file ({detail}); the download was cut short or "
            "damaged, download it again"
        )

    if file.container != "safetensors":
        raise CheckpointError(f"{file.path}: {REFUSED[file.container]}")
    length = int.from_bytes(file.head(8), "little")
    text = file.head(8 + length)[8:]
    if len(text) < length:
        raise error(f"its header is said to have {length:,} bytes")
    if text.count(b'"data_offsets"') > MAX_TENSORS:
        raise CheckpointError(
            f"{file.path}: lists more than {MAX_TENSORS} tensors; needed those of one model; do not use it"
        )
    try:
        header = parse_json(text)
    except ValueError as fault:
        raise error(f"its header is not sound: {fault}") from None
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error("its metadata is no object of strings")
    for name, tensor in header.items():
        if wrong := _entry_fault(tensor):
            raise error(f"{name[:80]!r}: {wrong}")
    entries, starts, at = {}, {}, 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = tensor["data_offsets"]
        if begin != at:
            raise error(f"{name[:80]!r} begins at {begin:,} instead of {at:,}")
        entries[name] = Entry(tuple(tensor["shape"]), DTYPES.get(tensor["dtype"], tensor["dtype"]), end - begin)
        starts[name], at = 8 + length + begin, end
    if 8 + length + at != file.size:
        raise error(f"its tensors need {8 + length + at:,} bytes")
    return entries, starts, metadata


def _entry_fault(tensor: Any) -> str:
    """Return what is wrong with an entry of a header by itself, or nothing."""
    if not isinstance(tensor, dict) or not {"dtype", "shape", "data_offsets"} <= set(tensor):
        return "no dtype, shape and data_offsets"
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in OTHER_DTYPE_BITS):
        return f"its dtype is {dtype!r:.40}"
    for counts in (shape, offsets):
        if not isinstance(counts, list) or not all(type(count) is int and 0 <= count < 1 << 63 for count in counts):
            return "its shape or data_offsets are no list of counts"
    if len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        return f"{len(offsets)} data_offsets and {len(shape)} dimensions"
    bits = math.prod(shape) * (OTHER_DTYPE_BITS[dtype] if dtype in OTHER_DTYPE_BITS else 8 * ITEM_BYTES[DTYPES[dtype]])
    if 8 * (offsets[1] - offsets[0]) != bits:
        return f"{offsets[1] - offsets[0]} bytes for {shape} of {dtype}"
    return ""


def open_file(path: Path) -> Checkpoint:
    """Open a safetensors file; raises CheckpointError."""
    return SafetensorsFiles(path, [path])


def open_files(folder: Path, names: list[str]) -> Checkpoint:
    """Open files of a folder as one checkpoint, without an index; raises CheckpointError."""
    return SafetensorsFiles(folder, [shard_path(folder, name) for name in names])


def open_index(index: Path) -> Checkpoint:
    """Open the shards that an index names, and check the index against their content; raises CheckpointError."""
    home = read_index(index)
    shards = [shard_path(index.parent, name) for name in sorted(set(home.values()))]
    checkpoint = SafetensorsFiles(index.parent, shards)
    actual = checkpoint.shards()
    absent = [f"{name} (not in {home[name]})" for name in home if actual.get(name) != home[name]]
    extra = [f"{name} (in {actual[name]})" for name in actual if name not in home]
    if absent or extra:
        raise CheckpointError(
            f"{index}: the index and the shards disagree: {len(absent)} tensors are not where it says"
            f"{_first_ten(absent)}, {len(extra)} are in a shard but not in the index{_first_ten(extra)}; the files are "
            "of different downloads, fetch the folder again"
        )
    return checkpoint


def _first_ten(items: list[str]) -> str:
    """Return the first ten items as a text."""
    return f": {', '.join(items[:10])}{', …' if len(items) > 10 else ''}" if items else ""


def read_index(path: Path) -> dict[str, str]:
    """Return the `weight_map` of an index: tensor name -> file name; raises CheckpointError."""
    try:
        data = read_json(path, MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; needed the index of the shards; download it again") from None
    home = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(home, dict) or not home or not all(isinstance(name, str) for name in home.values()):
        raise CheckpointError(f"{path}: needed a `weight_map` of tensor name to file name; download it again")
    return home


def shard_path(folder: Path, name: str) -> Path:
    """Return the path of a shard, which must be a plain safetensors file of this folder; raises CheckpointError.

    A symlink may stay in the folder or lead to `blobs` of the same Hugging Face cache entry, where its snapshots point.
    """
    if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(SUFFIX):
        raise CheckpointError(
            f"{folder}: the index names a shard {name!r}; needed the plain name of a *{SUFFIX} file in this folder; "
            "do not use this folder, fetch the model from its official place"
        )
    path = folder / name
    if len(name) > MAX_FILE_NAME or not path.exists():
        raise CheckpointError(f"{path}: missing, the index names it; download this shard")
    if not contained(path, allowed_places(folder)):
        raise CheckpointError(
            f"{path}: a link that leaves the folder ({path.resolve()}), or no plain file; needed a file inside; move "
            "the file here, or link the folder as a whole"
        )
    return path


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file with the permissions of any new one; raises OSError or SafetensorError.

    safetensors 0.8 writes files that nobody but their owner may read.
    """
    # It imports torch.
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata)
    path.chmod(mode)
