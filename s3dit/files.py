"""Open files that a user, a request or a picture's metadata names, and reserve names for new ones.

`opened` opens regular files of a bounded size alone: a pipe or a device may block, or never end. `check_file` and
`check_models` find a path that leads to nothing without opening it. Pictures are written to the files that `outputs`
names: a file that exists is replaced only where the user named it (`-o FILE`, or `--overwrite`), else `claimed` takes a
free name. `whole` writes a file completely or not at all.

Errors are RequestError. Importing this module does not import torch. Weights are opened in weights/.
"""

import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO

from s3dit.errors import RequestError

# The form of a picture, by the ending of its name.
ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DEFAULT = "s3dit.png"
# The files of a report (`s3dit microscope`): the page, the numbers behind it, the picture; and its folder.
REPORT = ("index.html", "data.safetensors", "picture.png")
REPORTS = "report"
# Endings of files of weights.
WEIGHTS = (".safetensors", ".gguf")
# The names of the Hub for what other programs call by a short one.
PUBLISHED = {"z-image-turbo": "Tongyi-MAI/Z-Image-Turbo", "z-image": "Tongyi-MAI/Z-Image"}
ADDRESS = re.compile(r"[a-zA-Z][\w+.-]+://")
# Prompts are a few kilobytes each; a request holds at most so many pictures.
LARGEST_PROMPTS = 1 << 24
MOST_PROMPTS = 1024


@contextmanager
def opened(path: str | os.PathLike[str], needed: str, largest: int) -> Iterator[BinaryIO]:
    """Open a regular file of 1 to `largest` bytes for reading; RequestError for anything else.

    needed: what the file should be, for messages.
    """
    # Before it is opened, because opening a device may set it going; and after, because it may be another by now.
    with _finding(path, needed):
        status = os.stat(path)
    _check_regular(path, status, needed, largest)
    with _finding(path, needed):
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(number, "rb") as file:
        _check_regular(path, os.fstat(number), needed, largest)
        yield file


def check_file(option: str, path: str, needed: str) -> None:
    """Raise RequestError where the path that an option gives is not that of a regular file with something in it.

    The file is not opened. needed: what it should be, for the message.
    """
    named = f"{option} {path or repr(path)}"
    if ADDRESS.match(path):
        raise RequestError(f"{named}: is an address; needed {needed} in a file; download it first")
    with _finding(named, needed):
        status = os.stat(path)
    _check_regular(named, status, needed, sys.maxsize)


def check_models(given: Iterable[tuple[str, str]]) -> None:
    """Raise RequestError for the first (option, name) that can only be a path and does not exist.

    A name of the Hub may be anything else: it has a slash and does not begin as a path does, nor is it a file of
    weights in a folder that is here. option: "" for what is given without one.
    """
    for option, name in given:
        begins = name.startswith(("/", "./", "../", "~")) or "/" not in name
        if not begins and not (name.endswith(WEIGHTS) and os.path.isdir(os.path.dirname(name))):
            continue
        if not os.path.exists(os.path.expanduser(name)):
            named = f"{option} {name or repr(name)}".lstrip()
            hint = f"; did you mean {PUBLISHED[name.lower()]}?" if name.lower() in PUBLISHED else ""
            raise RequestError(
                f"{named}: not found; needed a file or folder that is here, or a Hub name (org/name){hint}"
            )


@contextmanager
def _finding(path: object, needed: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise RequestError(f"{path}: not found; needed {needed}; check the file") from None
    except (OSError, ValueError) as error:
        # ValueError: a name with a zero byte, or with characters that no name of this system has.
        raise _unreadable(path, error, needed) from None


def _unreadable(path: object, error: Exception, needed: str) -> RequestError:
    reason = getattr(error, "strerror", None) or error
    return RequestError(f"{path}: cannot be read ({reason}); needed {needed}; check the file")


def _check_regular(path: object, status: os.stat_result, needed: str, largest: int) -> None:
    kind = _kind(status.st_mode)
    if kind != "a file":
        raise RequestError(f"{path}: cannot be read (it is {kind}); needed {needed}; name a regular file")
    # Empty are, too, the files of /proc that hold something, and never end.
    if status.st_size == 0:
        raise RequestError(f"{path}: cannot be read (it is empty); needed {needed}; check the file")
    if status.st_size > largest:
        raise RequestError(
            f"{path}: holds {status.st_size:,} bytes; needed {needed} of at most {largest:,}; check the file"
        )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def prompts(path: str) -> list[str]:
    """Read the prompts of a text file, one a line, without empty lines; `-` is standard input. Raises RequestError.

    UTF-8 with or without a byte order mark, or UTF-16 or UTF-32 with one. Lines end in LF, CR LF or CR and nothing
    else: what str.splitlines cuts at (U+2028, form feeds, …) stands in prompts that were copied from somewhere.
    """
    needed = "text in UTF-8, one prompt a line (- reads standard input)"
    if path == "-":
        if sys.stdin is None:
            raise RequestError(f"standard input is closed; needed {needed}; name a file")
        data = sys.stdin.buffer.read(LARGEST_PROMPTS + 1)
        if len(data) > LARGEST_PROMPTS:
            raise RequestError(f"standard input holds more than {LARGEST_PROMPTS:,} bytes; needed {needed}")
    else:
        with opened(path, needed, LARGEST_PROMPTS) as file:
            data = file.read(LARGEST_PROMPTS)
    marks = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _unreadable(path, error, needed) from None
    if "\0" in text:
        raise RequestError(f"{path}: holds zero bytes, so it is no text, or UTF-16 without a mark; needed {needed}")
    lines = [line.strip(" \t") for line in re.split("\r\n|\n|\r", text) if line.strip()]
    if not lines:
        raise RequestError(f"{path}: holds no prompt; needed {needed}")
    if len(lines) > MOST_PROMPTS:
        raise RequestError(f"{path}: holds {len(lines):,} prompts; needed at most {MOST_PROMPTS:,}; cut it in several")
    return lines


def outputs(given: str | None, pictures: int, overwrite: bool) -> tuple[list[Path], bool]:
    """The files of a request's pictures, and whether they may be replaced; raises RequestError.

    given: what -o says. A file takes one picture, several are FILE-1, FILE-2, …, which must not exist; a folder, or
    nothing, takes s3dit.png, s3dit-2.png, … as they are free. `overwrite` takes what exists.
    """
    folder = given is not None and (given.endswith(("/", os.sep)) or os.path.isdir(given))
    named = given is not None and not folder
    first = Path(given or ".") / DEFAULT if not named else Path(given or "")
    if first.suffix.lower() not in ENDINGS:
        *others, last = ENDINGS
        raise RequestError(
            f"output is {first.name!r}; needed a name that ends in {', '.join(others)} or {last}, or a folder (with a "
            "slash at its end)"
        )
    _check_folder(first)
    names = (first if n == pictures == 1 else first.with_stem(f"{first.stem}-{n}") for n in count(1))
    if named or overwrite:
        paths = [next(names) for _ in range(pictures)]
        replaced = [path for path in paths if taken(path)]
        if replaced and not overwrite and pictures > 1:
            raise RequestError(
                f"{len(replaced)} of the {pictures} outputs exist, such as {replaced[0]}; needed names that are free; "
                "give another with -o, or replace them with --overwrite"
            )
        for path in replaced:
            if not path.is_symlink() and (kind := _kind(path.stat().st_mode)) != "a file":
                raise RequestError(f"output {path} is {kind}; needed a file; choose another name with -o")
        return paths, overwrite or pictures == 1
    free = (path for path in names if not taken(path))
    return [next(free) for _ in range(pictures)], False


def report_folder(given: str | os.PathLike[str] | None, overwrite: bool) -> Path:
    """The folder of a report: the one that -o names, which must hold none unless `overwrite`, else a free name.

    Raises RequestError.
    """
    if given is None:
        names = chain([REPORTS], (f"{REPORTS}-{n}" for n in count(2)))
        return next(path for path in map(Path, names) if not taken(path))
    folder = Path(given)
    _check_folder(folder / REPORT[0])
    if (there := [name for name in REPORT if taken(folder / name)]) and not overwrite:
        raise RequestError(
            f"output is {folder}, which holds {', '.join(there)} already; needed one without; name another, or replace "
            "them with --overwrite"
        )
    return folder


def taken(path: Path) -> bool:
    """Whether a file of any kind has this name, a broken link too; RequestError where none can have it."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None
    return True


def _check_folder(path: Path) -> None:
    """Raise RequestError unless a file can be made in the folder of a path, or in the nearest existing one above it."""
    folder = next((parent for parent in path.parents if os.path.lexists(parent)), Path("."))
    try:
        # The surest way to know; permissions alone do not tell of a read-only disk, nor root of anything.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: Exception) -> RequestError:
    return RequestError(
        f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); needed a folder that is writable, "
        "with room for the picture; choose another place"
    )


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """Reserve a free name, this or the next: an empty file holds it, and is removed if an error ends the block.

    Missing folders are made. Raises RequestError.
    """
    names = chain([path], (path.with_stem(f"{path.stem}-{n}") for n in count(2)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = next(name for name in names if _made(name))
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield free
    except BaseException:
        free.unlink(missing_ok=True)
        raise


def _made(path: Path) -> bool:
    """Make an empty file; whether the name was free."""
    try:
        open(path, "xb").close()
    except FileExistsError:
        return False
    return True


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Write a file completely or not at all: under a hidden name beside it, then renamed over what is there.

    Missing folders are made. Raises RequestError.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "xb") as file:
                yield file
            os.replace(partial, path)
        finally:
            # After the rename there is nothing left under this name; after an error or Ctrl-C there may be.
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise _unwritable(path, error) from None
