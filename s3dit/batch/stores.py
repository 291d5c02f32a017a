"""Where pictures and results of a batch go: a folder, or a bucket such as s3://name/place through pyarrow.

A folder appends its results to one file, results.jsonl, and is one run's alone while it lasts. A bucket cannot append,
so results are objects of several lines, written now and then; a run that is killed draws the rows again whose results
were not written yet. Whatever is written is there as a whole or not at all.

Importing this module imports neither torch nor pyarrow.
"""

import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

from s3dit import files
from s3dit.errors import BackendError, RequestError
from s3dit.terminal import say

RESULTS = "results.jsonl"
PARTIAL = re.compile(r"\.[0-9a-f]{16}\.tmp")
PART = re.compile(r"results-\d{14}-[0-9a-f]{8}-\d{6}\.jsonl")
# A bucket's results are written when there are so many, or so many seconds after the last ones.
MOST_LINES, MOST_SECONDS = 500, 30.0


class Store(Protocol):
    """What a batch needs of a place. results: the names of the files of results, with a * where they are several."""

    results: str

    def begin(self) -> list[bytes]:
        """Make the place this run's own; the lines of results that are there, the oldest first. Raises RequestError."""

    def append(self, line: bytes) -> None:
        """Add a line to the results."""

    def end(self) -> None:
        """Write what is not written yet, and give the place back."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file, in the place of one that is there; raises RequestError."""

    def read(self, name: str) -> bytes | None:
        """A file's content, None where there is none; raises RequestError."""

    def names(self) -> set[str]:
        """The names of all files."""

    def holds(self, name: str) -> bool:
        """Whether there is a file of this name."""


def open_store(output: str) -> Store:
    """The place that -o names: a URI with a scheme that pyarrow knows, or else a folder. Raises RequestError."""
    if not output:
        raise RequestError("--output is empty; needed a folder, . for this one, or a bucket such as s3://name/place")
    return Bucket(output) if files.ADDRESS.match(output) else Folder(Path(output))


class Folder:
    """A folder of this machine, or one that all machines share."""

    results = RESULTS

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: IO[bytes] | None = None

    def begin(self) -> list[bytes]:
        """Lock results.jsonl, cut off a line that was half-written, and remove what was being written then."""
        path = self.folder / RESULTS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise RequestError(f"{path}: cannot be written ({error.strerror}); choose another folder with -o") from None
        _lock(self.file, path)
        self.file.seek(0)
        text = self.file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            say(f"{path}: its last line was half-written; that row is drawn again")
            self.file.truncate(whole)
        for name in self.names():
            if PARTIAL.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)
        return text[:whole].splitlines()

    def append(self, line: bytes) -> None:
        """Add a line to results.jsonl."""
        assert self.file is not None
        try:
            self.file.write(line + b"\n")
            self.file.flush()
        except OSError as error:
            raise RequestError(f"{self.folder / RESULTS}: cannot be written ({error.strerror}); make room") from None

    def end(self) -> None:
        """Close results.jsonl, and with it its lock."""
        if self.file is not None:
            # Every line was flushed, or `append` has said that it could not be.
            with suppress(OSError):
                self.file.close()

    def write(self, name: str, data: bytes) -> None:
        """Write a file under a hidden name, and rename it."""
        with files.whole(self.folder / name) as file:
            file.write(data)

    def read(self, name: str) -> bytes | None:
        """A file's content."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RequestError(f"{self.folder / name}: cannot be read ({error.strerror}); check the file") from None

    def names(self) -> set[str]:
        """The names of what is in the folder."""
        return {entry.name for entry in os.scandir(self.folder)}

    def holds(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.folder / name).is_file()


def _lock(file: IO[bytes], path: Path) -> None:
    """Raise RequestError where another process has the file; where there are no such locks, take it as free."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RequestError(
                f"{path}: another batch writes to it; wait for its end, or choose another folder"
            ) from None
        except OSError:
            say(f"{path} cannot be locked on this file system; no other batch may write to it meanwhile")


class Bucket:
    """A place of any file system that pyarrow opens by its URI: s3://, gs://, hdfs://, file://."""

    results = "results-*.jsonl"

    def __init__(self, uri: str) -> None:
        try:
            from pyarrow import fs
        except ImportError:
            raise BackendError(
                f"--output {uri} needs the package pyarrow; pip install 's3dit[ray]', or name a folder"
            ) from None
        self.uri = uri
        with self._speaking():
            self.system, self.place = fs.FileSystem.from_uri(uri)
        self.place = self.place.rstrip("/")
        self.lines: list[bytes] = []
        self.run = f"results-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        self.parts, self.written = 0, time.monotonic()

    def begin(self) -> list[bytes]:
        """Read the lines of all results that are there; nothing keeps another run from writing beside this one."""
        with self._speaking():
            self.system.create_dir(self.place)
            parts = sorted(filter(PART.fullmatch, self.names()))
        return [line for part in parts for line in (self.read(part) or b"").splitlines()]

    def append(self, line: bytes) -> None:
        """Keep a line, and write all that are kept when it is time."""
        self.lines.append(line)
        if len(self.lines) >= MOST_LINES or time.monotonic() - self.written >= MOST_SECONDS:
            self.end()

    def end(self) -> None:
        """Write the lines that are kept as an object of their own."""
        if self.lines:
            self.write(f"{self.run}-{self.parts:06}.jsonl", b"".join(line + b"\n" for line in self.lines))
            self.parts += 1
        self.lines, self.written = [], time.monotonic()

    def write(self, name: str, data: bytes) -> None:
        """Write an object."""
        with self._speaking(), self.system.open_output_stream(f"{self.place}/{name}") as stream:
            stream.write(data)

    def read(self, name: str) -> bytes | None:
        """An object's content."""
        with self._speaking():
            try:
                with self.system.open_input_stream(f"{self.place}/{name}") as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

    def names(self) -> set[str]:
        """The names of what is in the place."""
        from pyarrow import fs

        with self._speaking():
            found = self.system.get_file_info(fs.FileSelector(self.place, allow_not_found=True))
        return {info.base_name for info in found}

    def holds(self, name: str) -> bool:
        """Whether a worker wrote it, which it says only when it did: the place is the same from everywhere."""
        return True

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Turn pyarrow's errors into RequestError."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                f"{self.uri}: {str(error).splitlines()[0]}; needed a place that can be written"
            ) from None
