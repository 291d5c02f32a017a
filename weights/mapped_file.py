"""A mapped file of weights that is checked against its identity whenever it is opened again.

A header is valid for the file that it was read from. So size, time of change and inode are kept (`MappedFile`), and
mapping the file again, or `check`, raises CheckpointError where the file was replaced, cut short or removed. The path
is made absolute at once: a change of the current folder changes nothing.

The map is private, so that writing into a view changes the view and never the file, and reserves no memory, so that a
file may be larger than memory and swap. It is released with the last tensor that is a view of it.

A map cannot protect from this: a file that is cut short in place while tensors are views of it ends the process
(SIGBUS) at the first missing page. Replace model files by renaming a new file over them, as downloaders do, and never
write into a file that is in use; weights that are cast as they are read (bf16 to fp32) or are on a GPU are safe. Where
files cannot be trusted to stay (a network share), `mapped = False` (`Checkpoint.disable_mmap`) reads each tensor into
memory of its own. It holds for tensors only: the header of a GGUF file, and the lists of its metadata, are read through
a map even then (`gguf_file`), which is released right after; a safetensors header is never mapped.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
import weakref
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from s3dit.errors import CheckpointError
from s3dit.weights.container import Checkpoint, Entry, sniff
from s3dit.weights.json_files import OPEN_FLAGS
from s3dit.weights.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# Bytes that are asked for at once: short enough to be left off soon, long enough for a disk.
AHEAD = 1 << 25
# Where Linux says of each page of this process whether it is a file's or was written to.
PAGEMAP = Path("/proc/self/pagemap")
# The maps that are alive, by the address of their first byte.
_maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
# Python names it from 3.12 on.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """A file as it was when it was first opened; `mapped`: whether `read` returns views of a map, or copies."""

    def __init__(self, path: Path) -> None:
        """Open the file and keep its identity; raises CheckpointError where it is not a readable plain file."""
        self.path = path.absolute()
        self.container = sniff(self.path)
        with self._open() as file:
            self._identity = _identity(file)
        self.size = self._identity[0]
        self.mapped = True
        self._map: weakref.ref[mmap.mmap] | None = None
        self._held: mmap.mmap | None = None

    def head(self, count: int) -> bytes:
        """Return the first bytes, at most `count`."""
        with self._open() as file:
            return file.read(min(count, self.size))

    def check(self) -> None:
        """Raise CheckpointError where the file at this path is not what was opened."""
        with self._open():
            pass

    def map(self) -> mmap.mmap:
        """Return the map of the file: the one that tensors still hold, else a new one; raises as `check` does."""
        mapped = self._map() if self._map is not None else None
        if mapped is None:
            with self._open() as file:
                mapped = _map_file(file, self.path)
            self._map = weakref.ref(mapped)
        return mapped

    def read(self, start: int, count: int) -> Tensor:
        """Return bytes of the file, (count,) uint8: a view of the map, which is held until `release`, or a copy.

        Raises CheckpointError as `check` does, and where the file ends before.
        """
        if self.mapped:
            self._held = self._held or self.map()
            view = torch.frombuffer(self._held, dtype=torch.uint8, count=count, offset=start)
            _maps[view.data_ptr() - start] = self._held
            return view
        buffer = torch.empty(count, dtype=torch.uint8, device="cpu")
        with self._open() as file:
            file.seek(start)
            if file.readinto(buffer.numpy()) < count:  # type: ignore[attr-defined]
                raise CheckpointError(f"{self.path}: cut short while it was read; needed {start + count:,} bytes")
        return buffer

    def read_bytes(self, start: int, count: int) -> bytes:
        """Return bytes of the file without mapping it; raises CheckpointError as `read` does."""
        with self._open() as file:
            file.seek(start)
            data = file.read(count)
        if len(data) < count:
            raise CheckpointError(f"{self.path}: cut short while it was read; needed {start + count:,} bytes")
        return data

    def read_ahead(self) -> Iterator[None]:
        """Ask the system to read the file into its cache, AHEAD bytes at every `next`; nothing where it cannot."""
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(CheckpointError, OSError), self._open() as file:
            for start in range(0, self.size, AHEAD):
                os.posix_fadvise(file.fileno(), start, AHEAD, os.POSIX_FADV_WILLNEED)
                yield

    def release(self) -> None:
        """Release the map that is held; tensors given out keep theirs."""
        self._held = None

    def _open(self) -> BinaryIO:
        """Open the file for reading; raises CheckpointError where it is not the file that it was."""
        known = getattr(self, "_identity", None)
        try:
            file = os.fdopen(os.open(self.path, OPEN_FLAGS), "rb")
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


class StoredCheckpoint(Checkpoint):
    """The checkpoint of files whose headers were read: `_entries`, in the order of the tensors on disk."""

    _entries: dict[str, Entry]
    _files: list[MappedFile]

    @abstractmethod
    def place(self, name: str) -> tuple[MappedFile, int]:
        """Return the file of a tensor, and where its bytes begin in it."""

    def raw(self, name: str) -> bytes:
        """Return the bytes of a tensor as stored; does not import torch."""
        count = self.entry(name).nbytes
        file, start = self.place(name)
        return file.read_bytes(start, count)

    def check(self) -> None:
        """Raise CheckpointError where a file is not what it was when it was opened."""
        for file in self._files:
            file.check()

    def release(self) -> None:
        """Release the maps that are held; tensors given out keep theirs."""
        for file in self._files:
            file.release()

    def read_ahead(self) -> Iterator[None]:
        """Ask the system to read the files into its cache, in the order of the tensors."""
        for file in self._files:
            yield from file.read_ahead()

    def disable_mmap(self) -> None:
        """Read each tensor into memory of its own from now on."""
        self.release()
        for file in self._files:
            file.mapped = False

    def keys(self) -> list[str]:
        """Return all names, in the order of the tensors on disk, file by file."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def entry(self, name: str) -> Entry:
        """Return shape, dtype and bytes of a tensor as stored; raises CheckpointError for an unknown name."""
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r} among {len(self._entries)}; the files are of another model"
            ) from None


def give_back(*tensors: Tensor) -> None:
    """Take the pages of views of mapped files out of this process's memory; what is read later comes from the file.

    Of each tensor the whole pages, unless one was written to. Nothing happens for a tensor that is no such view, nor
    where the system has no PAGEMAP, without which what a user wrote might be lost.
    """
    for tensor in tensors:
        for mapped, start, count in _pages(tensor):
            if not _written(tensor, count):
                mapped.madvise(mmap.MADV_DONTNEED, start, count)


def ask_for(*tensors: Tensor) -> None:
    """Ask the system to read what is mapped under tensors into its cache, beside what is computed meanwhile."""
    for tensor in tensors:
        for mapped, start, count in _pages(tensor):
            with suppress(OSError):
                mapped.madvise(mmap.MADV_WILLNEED, start, count)


def _pages(tensor: Tensor) -> Iterator[tuple[mmap.mmap, int, int]]:
    """Yield the map that a contiguous tensor is a view of, if any, with start and bytes of its whole pages in there."""
    if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_DONTNEED") or not tensor.is_contiguous():
        return
    begin = tensor.data_ptr()
    for base, mapped in list(_maps.items()):
        if base <= begin < base + len(mapped):
            start = -((base - begin) // mmap.PAGESIZE) * mmap.PAGESIZE
            count = (begin + tensor.nbytes - base) // mmap.PAGESIZE * mmap.PAGESIZE - start
            if count > 0:
                yield mapped, start, count


def _written(tensor: Tensor, count: int) -> bool:
    """Return whether one of the whole pages of a view, `count` bytes, was written to; True where nobody knows."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    try:
        with PAGEMAP.open("rb", buffering=0) as file:
            file.seek(8 * first)
            entries = bytearray(file.read(8 * (count // mmap.PAGESIZE)))
    except OSError:
        return True
    if len(entries) < 8 * (count // mmap.PAGESIZE):
        return True
    # Bit 63: in memory, bit 62: in swap, bit 61: a page of a file. A private page that was written to is no file's.
    bits = torch.frombuffer(entries, dtype=torch.int64) >> 61
    return bool(((bits & 1 == 0) & (bits & 6 != 0)).any())


def _identity(file: BinaryIO) -> tuple[int, int, int, int]:
    """Return what identifies a file at its path: size, time of change in ns, inode, device."""
    status = os.fstat(file.fileno())
    assert stat.S_ISREG(status.st_mode) or not status.st_size
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _map_file(file: BinaryIO, path: Path) -> mmap.mmap:
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
