"""Safetensors: one file, or the shards that an index names, through the safetensors library.

The library maps a file and gives views of the map. Such a view holds the map alive by itself, and nothing else does:
one file is kept open at a time, so a shard that was read through, and whose tensors were cast, leaves memory
whole before the next is touched. The map is private: writing into a view changes the view, never the file.

The header is read here once more, for what the library of the oldest supported version does not tell: order on disk
and size in bytes. The library has judged it by then.

All headers are read when the files are opened (a few hundred kB), so a folder with a missing, cut or foreign shard is
refused before the first tensor. An index is data of a stranger: the names in it must stay inside the folder.

Source: https://github.com/huggingface/safetensors (format), transformers' sharded index (`weight_map`).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from s3dit.weights.container import MOST_TENSORS, REFUSED, Checkpoint, CheckpointError, Entry, Stored, sniff, unique

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

SUFFIX = ".safetensors"
# Bytes; the official one has 50 kB.
LARGEST_INDEX = 1 << 24


class SafetensorsFiles(Stored):
    """Tensors of one or several safetensors files, under one roof."""

    def __init__(self, path: Path, shards: list[Path]) -> None:
        self.path = path
        self.metadata = {}
        self._entries: dict[str, Entry] = {}
        self._home: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        for shard in shards:
            entries, metadata = read_header(shard)
            for name in entries:
                if name in self._home:
                    raise CheckpointError(
                        f"{path}: {name} lies in two shards, {self._home[name].name} and {shard.name}; needed one "
                        "place for each tensor; download the folder again"
                    )
                self._home[name] = shard
            self._entries |= entries
            self.metadata = metadata | self.metadata

    def release(self) -> None:
        """Close the file that is open; tensors given out keep their map."""
        self._open = None

    def load(self, name: str) -> Tensor:
        """One tensor in its stored dtype, on the CPU, a view of the mapped file (misaligned: a copy)."""
        self.entry(name)
        shard = self._home[name]
        if self._open is None or self._open[0] != shard:
            self._open = None
            self._open = (shard, _open(shard))
        try:
            tensor: Tensor = self._open[1].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{shard}: {name} is not readable ({error}); download the file again") from None
        # Old writers did not pad the header; an address off the dtype's grid is not promised to work everywhere.
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _open(path: Path) -> Any:
    """Map one file through the library, its complaints turned into a CheckpointError."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: {path.stat().st_size:,} bytes, not a whole safetensors file ({error}); the download was cut "
            "short or damaged, download it again"
        ) from None


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of one file in the order of their bytes, and the file's own metadata; raises CheckpointError."""
    container = sniff(path)
    if container != "safetensors":
        raise CheckpointError(f"{path}: {REFUSED[container]}")
    with path.open("rb") as file:
        # Reading would make room for as much as a header claims to be.
        text = file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size))
    if text.count(b'"data_offsets"') > MOST_TENSORS:
        raise CheckpointError(
            f"{path}: lists more than {MOST_TENSORS} tensors; needed those of one model; do not use it"
        )
    _open(path)
    try:
        header = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not sound: {error}; download it again") from None
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = tensor["data_offsets"]
        entries[name] = Entry(tuple(tensor["shape"]), DTYPES.get(tensor["dtype"], tensor["dtype"]), end - begin)
    return entries, metadata


def open_file(path: Path) -> Checkpoint:
    """Open one safetensors file; raises CheckpointError."""
    return SafetensorsFiles(path, [path])


def open_index(index: Path) -> Checkpoint:
    """Open the shards that an index names, holding the index to what the shards contain; raises CheckpointError."""
    home = read_index(index)
    shards = [inside(index.parent, name) for name in sorted(set(home.values()))]
    checkpoint = SafetensorsFiles(index.parent, shards)
    found = {name: path.name for name, path in checkpoint._home.items()}
    absent = [f"{name} (not in {home[name]})" for name in home if found.get(name) != home[name]]
    extra = [f"{name} (in {found[name]})" for name in found if name not in home]
    if absent or extra:
        raise CheckpointError(
            f"{index}: the index and the shards disagree: {len(absent)} tensors are not where it says"
            f"{_listed(absent)}, {len(extra)} are in a shard but not in the index{_listed(extra)}; the files are of "
            "different downloads, fetch the folder again"
        )
    return checkpoint


def _listed(items: list[str]) -> str:
    """The first ten, in words."""
    return f": {', '.join(items[:10])}{', …' if len(items) > 10 else ''}" if items else ""


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> file name; raises CheckpointError."""
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many for an index")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from None
    home = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(home, dict) or not home or not all(isinstance(name, str) for name in home.values()):
        raise CheckpointError(f"{path}: needed a `weight_map` of tensor name to file name; download it again")
    return home


def inside(folder: Path, name: str) -> Path:
    """The path of a shard, which must be a plain safetensors file of this folder; raises CheckpointError.

    A symlink may stay in the folder or lead to `blobs` of the same Hugging Face cache entry, where its snapshots point.
    """
    if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(SUFFIX):
        raise CheckpointError(
            f"{folder}: the index names a shard {name!r}; needed the plain name of a *{SUFFIX} file in this folder; "
            "do not use this folder, fetch the model from its official place"
        )
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{path}: missing, the index names it; download this shard")
    target = path.resolve()
    if not any(target.is_relative_to(home) for home in _homes(folder)):
        raise CheckpointError(
            f"{path}: a link that leaves the folder ({target}); needed a file inside; move the file here, or link the "
            "folder as a whole"
        )
    return path


def _homes(folder: Path) -> list[Path]:
    """Where a shard of this folder may really lie."""
    real = folder.resolve()
    caches = [parent.parent for parent in real.parents if parent.name == "snapshots"]
    return [real, *(cache / "blobs" for cache in caches)]
