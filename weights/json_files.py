"""Reads small files of unknown origin, JSON above all, strictly; without torch, so that what needs no more is quick."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from s3dit.errors import CheckpointError

# How a plain file is opened: a pipe may stand there, whose writer never comes. Windows has only the other flag, and
# without it makes one byte of two at the end of a line.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of unknown origin.

    Raises ValueError where parsers could differ: a key twice, or NaN, Infinity and 1e999, which are not JSON's numbers
    but which Python's parser takes.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_number, parse_float=_finite_number)
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


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name[:40]} is not a number of JSON")


def _finite_number(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refuse_number(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        # Each is taken out when it is met: counting every key of a large object would take minutes.
        twice = next(key for key, _ in pairs if unique.pop(key, pairs) is pairs)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return unique


def read_regular(path: Path, most: int) -> bytes:
    """Return the content of a small plain file; raises CheckpointError for anything else, OSError where nothing is.

    A pipe, whose writer may never come, and a device without an end are refused, judged by the opened file itself.
    """
    try:
        with os.fdopen(os.open(path, OPEN_FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a plain file; needed one; download it again")
            if status.st_size > most:
                raise CheckpointError(
                    f"{path}: {status.st_size:,} bytes is too large; needed at most {most:,}; download it again"
                )
            return file.read(most + 1)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: no path ({error}); needed the path of a file") from None
