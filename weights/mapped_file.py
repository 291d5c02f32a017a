"""One file of weights, mapped: opened once to be judged, later read as that very file or not at all.

What a header says holds for the file that it was read from. So size, time of change and inode are kept from then on
(`MappedFile`), and whoever maps the file again, or asks `check`, gets a CheckpointError where another file, a cut one
or none is at its place by now. The path is made absolute at once: a change of the current folder changes nothing.

The map is private, so that writing into a view of it changes the view and never the file, and reserves no memory, so
that a file may be larger than memory and swap. It goes with the last tensor that looks at it.

What a map cannot do: a file that is cut short in place while tensors look at it ends the process (SIGBUS) at the first
missing page, since the system has nothing to give. Replace model files by renaming a new one over them, as downloaders
do, and never write into one that is in use; weights that are cast on their way in (bf16 to fp32) or on a GPU are safe.
Where files cannot be trusted to stay (a network share), `mapped = False` (`Checkpoint.disable_mmap`) reads each tensor
into memory of its own. It holds for tensors only: the header of a GGUF file, and the lists of its metadata, are read
through a map even then (`gguf_file`), and that map is released right after; a safetensors header is never mapped.
"""

import mmap
import os
import stat
import sys
import weakref
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from s3dit.errors import CheckpointError
from s3dit.weights.container import READ, Checkpoint, Entry, sniff

# Python names it from 3.12 on.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """A file as it was when it was first opened. mapped: whether `read` gives views of a map, or copies."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where there is no plain file that may be read."""
        self.path = path.absolute()
        self.container = sniff(self.path)
        with self._open() as file:
            self._identity = _identity(file)
        self.size = self._identity[0]
        self.mapped = True
        self._map: weakref.ref[mmap.mmap] | None = None
        self._held: mmap.mmap | None = None

    def head(self, count: int) -> bytes:
        """The first bytes, at most `count`."""
        with self._open() as file:
            return file.read(min(count, self.size))

    def check(self) -> None:
        """Raise CheckpointError where the file at this path is not what was opened."""
        with self._open():
            pass

    def map(self) -> mmap.mmap:
        """The file's bytes: the map that tensors still hold, else a new one; raises CheckpointError as `check` does."""
        found = self._map() if self._map is not None else None
        if found is None:
            with self._open() as file:
                found = _mapped(file, self.path)
            self._map = weakref.ref(found)
        return found

    def read(self, start: int, count: int) -> Tensor:
        """Bytes of the file, (count,) uint8: a view of the map, which is held until `release`, or a copy.

        Raises CheckpointError as `check` does, and where the file ends before.
        """
        if self.mapped:
            self._held = self._held or self.map()
            return torch.frombuffer(self._held, dtype=torch.uint8, count=count, offset=start)
        found = torch.empty(count, dtype=torch.uint8, device="cpu")
        with self._open() as file:
            file.seek(start)
            if file.readinto(found.numpy()) < count:  # type: ignore[attr-defined]
                raise CheckpointError(f"{self.path}: cut short while it was read; needed {start + count:,} bytes")
        return found

    def release(self) -> None:
        """Let go of the map that is held; tensors given out keep theirs."""
        self._held = None

    def _open(self) -> BinaryIO:
        """The file, opened for reading, the one that it was."""
        known = getattr(self, "_identity", None)
        try:
            file = os.fdopen(os.open(self.path, READ), "rb")
        except (OSError, ValueError) as error:
            what = "gone since it was opened" if known and isinstance(error, FileNotFoundError) else "not readable"
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"{self.path}: {what} ({reason}); needed the file of weights; put it back and load the model again"
            ) from None
        if known is not None and _identity(file) != known:
            size = os.fstat(file.fileno()).st_size
            file.close()
            raise CheckpointError(
                f"{self.path}: {size:,} bytes, replaced or changed since it was opened with {known[0]:,}; needed the "
                "same file; load the model again"
            )
        return file


class Stored(Checkpoint):
    """The tensors of files whose headers were read: `_entries`, in the order in which the tensors lie on disk."""

    _entries: dict[str, Entry]
    _files: list[MappedFile]

    def check(self) -> None:
        """Raise CheckpointError where a file is not what it was when it was opened."""
        for file in self._files:
            file.check()

    def release(self) -> None:
        """Let go of the maps that are held; tensors given out keep theirs."""
        for file in self._files:
            file.release()

    def disable_mmap(self) -> None:
        """From now on read each tensor into memory of its own."""
        self.release()
        for file in self._files:
            file.mapped = False

    def keys(self) -> list[str]:
        """All names, in the order in which the tensors lie on disk, file by file."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def entry(self, name: str) -> Entry:
        """Shape, dtype and bytes of one tensor as stored; CheckpointError for an unknown name."""
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r} among {len(self._entries)}; the files are of another model"
            ) from None


def _identity(file: BinaryIO) -> tuple[int, int, int, int]:
    """What tells a file from another at its path: size, time of change in ns, inode, device."""
    found = os.fstat(file.fileno())
    assert stat.S_ISREG(found.st_mode) or not found.st_size
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def _mapped(file: BinaryIO, path: Path) -> mmap.mmap:
    try:
        if not NO_RESERVE:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flags = mmap.MAP_PRIVATE | NO_RESERVE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be mapped into memory ({error}); needed address space for a file of its size; on Linux "
            "allow it with vm.overcommit_memory 0 or 1"
        ) from None
