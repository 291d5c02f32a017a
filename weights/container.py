"""A checkpoint: names, each with a shape, a dtype and a tensor that is read when asked for, over any container.

`Checkpoint` is what every container gives: a lazy mapping whose tensors are views of the mapped file, so that a model
that is stored in the dtype it runs in costs no memory of its own, and the token embedding can be read by rows. `sniff`
tells containers apart by their first bytes, never by the file's name, so a renamed file is read for what it is.

This room knows no model and no names. Pickles are recognized and refused unopened: unpickling runs code of the file.
"""

import json
import math
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from s3dit.errors import CheckpointError
from s3dit.kernels.scheme import Scheme

# How a plain file is opened: a pipe may stand there, whose writer never comes. Windows has only the other flag, and
# without it makes one byte of two at the end of a line.
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
# What a plain weight may be stored in.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a tensor before it is read; `dtype` is a plain name where torch has no such type."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    nbytes: int


class Checkpoint(ABC):
    """A lazy mapping from name to tensor; reading a header is cheap, tensors are read one by one on demand.

    `schemes` says of each quantized layer, by its name in this checkpoint, its number format; such a layer's tensors
    are `layer.part` for the parts of the scheme's spec (see `formats`).
    """

    path: Path
    metadata: dict[str, str]
    schemes: Mapping[str, Scheme] = {}

    @abstractmethod
    def keys(self) -> list[str]:
        """All names, in the order in which the tensors lie on disk."""

    @abstractmethod
    def entry(self, name: str) -> Entry:
        """Shape, dtype and bytes of one tensor, without reading it; CheckpointError for an unknown name."""

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """One tensor in its stored dtype, on the CPU: a view of the mapped file, to be treated as read-only."""

    def check(self) -> None:  # noqa: B027
        """Raise CheckpointError where a file is gone, or another one than was opened; its tensors must not be used."""

    def release(self) -> None:  # noqa: B027
        """Let go of whatever keeps a file mapped besides the tensors given out; it is mapped anew when one is read."""

    def disable_mmap(self) -> None:  # noqa: B027
        """From now on read each tensor into memory of its own, instead of giving views of a mapped file."""

    def __contains__(self, name: object) -> bool:
        return name in self.keys()  # noqa: SIM118

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(self.entry(name).nbytes for name in self)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Some rows of a matrix, in a tensor of their own: ids (n,) int64 -> (n, columns); only these rows are read.

        A quantized matrix is decoded, in these rows only, to fp32.
        Raises CheckpointError where an id lies outside the matrix: tokenizer and weights do not belong together.
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
        if layer not in self.schemes:
            return self.load(name).index_select(0, ids)
        parts = {
            key.rpartition(".")[2]: self.load(key)
            for key in self
            if key.rpartition(".")[0] == layer and not key.endswith(".bias")
        }
        # What is not of as many rows as the weight is shared by all of them.
        cut = {
            leaf: part.index_select(0, ids) if part.dim() and len(part) == shape[0] else part
            for leaf, part in parts.items()
        }
        return self.schemes[layer].decode(cut)

    def format(self, name: str) -> str:
        """What numbers a tensor is stored in, in a word: of its layer's scheme, or of its dtype."""
        scheme = self.schemes.get(name.rpartition(".")[0])
        return scheme.name if scheme is not None else str(self.entry(name).dtype).removeprefix("torch.")


class View(Checkpoint):
    """A checkpoint shown in another way: other names, other tensors made of its own."""

    _checkpoint: Checkpoint

    def check(self) -> None:
        """Check the files of the checkpoint below."""
        self._checkpoint.check()

    def release(self) -> None:
        """Let go of what the checkpoint below keeps mapped."""
        self._checkpoint.release()

    def disable_mmap(self) -> None:
        """Read the files of the checkpoint below instead of mapping them."""
        self._checkpoint.disable_mmap()


Container = Literal["safetensors", "gguf", "pickle", "pointer", "page", "empty", "unknown"]

# A header is parsed into objects ten times its size. Real ones are far below 1 MB, with a trainer's notes below 10; the
# safetensors library would take 100 MB.
LONGEST_HEADER = 1 << 25
# Far above what any model has, in any container.
MOST_TENSORS = 1 << 16

REFUSED: dict[Container, str] = {
    "gguf": "is a GGUF file, where safetensors was needed; give its own path, or name it *.gguf",
    "pickle": "is a pickle (.bin, .pt, .ckpt), which is never opened, because loading one runs code it carries; "
    "take the safetensors files of the model",
    "pointer": "is a Git LFS pointer, not the weights it stands for; run `git lfs pull` or download the file itself",
    "page": "is a web page, not weights; the download was answered with a page (login?), download it again",
    "empty": "is empty; download it again",
    "unknown": "is neither safetensors nor GGUF, told by its first bytes; needed one of them; download it again",
}


def parse_json(text: str | bytes) -> Any:
    """Parse a stranger's JSON; ValueError where readers could differ: a key twice, or a number that is none.

    Python's own reader takes NaN and Infinity, which are no JSON, and makes infinity of 1e999.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("lists or objects in one another, too deep") from None


def read_json(path: Path, most: int = 1 << 24) -> Any:
    """Parse a small JSON file of at most `most` bytes; raises CheckpointError, and FileNotFoundError where none is."""
    try:
        return parse_json(read_regular(path, most))
    except (CheckpointError, FileNotFoundError):
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({error}); needed JSON with finite numbers, no key twice; download it again"
        ) from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name[:40]} is not a number of JSON")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _no_number(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:80]!r} is there twice")
    return found


def read_regular(path: Path, most: int) -> bytes:
    """A small plain file, whole; raises CheckpointError for anything else at that path, OSError where nothing is.

    Not a pipe, whose writer may never come, nor a device without an end; the opened file itself is looked at.
    """
    try:
        with os.fdopen(os.open(path, READ), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path}: not a plain file; needed one; download it again")
            if found.st_size > most:
                raise CheckpointError(
                    f"{path}: {found.st_size:,} bytes is too large; needed at most {most:,}; download it again"
                )
            return file.read(most + 1)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: no path ({error}); needed the path of a file") from None


def sniff(path: Path) -> Container:
    """Tell what a file holds from its first bytes; raises CheckpointError when it cannot be read."""
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
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
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
