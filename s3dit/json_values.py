"""Values of a request's fields as JSON has them, and back: what a picture's metadata say of how it was drawn.

Files are named, Controls and Regions become objects; whatever else is one value or a list. What comes back is checked
only as far as it must be to be read: `values` checks the rest. Wrong data raises ValueError.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Protocol

from s3dit.control import shown


class Composite(Protocol):
    """The interface of a value with parts: Control, Region."""

    def to_json(self) -> dict[str, Any]:
        """Return what is not a default, as plain JSON values."""


def value_to_json(value: Any) -> Any:
    """A value, or several as a list."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray) else value


def same(name: str, data: Any) -> Any:
    """Data as they are."""
    return data


def paths(given: Any, deep: int = 2) -> Any:
    """Paths of image files as JSON has them, in lists like theirs; None where one is no file."""
    if isinstance(given, str | PathLike):
        return str(given)
    if not isinstance(given, list | tuple) or not deep:
        return None
    named = [paths(entry, deep - 1) for entry in given]
    return None if None in named else named


def paths_from_json(name: str, data: Any) -> Any:
    """Check that data are paths, or None; ValueError."""
    if data is not None and paths(data) is None:
        raise ValueError(f"replay data has a {name} of {shown(data)}; needed paths")
    return data


def objects_to_json(given: Composite | Sequence[Any] | None) -> list[Any] | None:
    """A composite value, or several in a list or in lists, as objects in a list; None stays."""
    if given is None:
        return None
    several = given if isinstance(given, list | tuple) else [given]
    return _each(several, lambda composite: composite.to_json())


def objects_from_json(read: Callable[[Any], Any], most: int) -> Callable[[str, Any], Any]:
    """Return the function that reads what `objects_to_json` gave: at most so many entries; ValueError.

    read: one object.
    """

    def objects(name: str, data: Any) -> Any:
        """Read the composite values of a field."""
        if data is None:
            return None
        if not isinstance(data, list) or len(data) > most:
            raise ValueError(f"replay data has a {name} of {shown(data)}; needed at most {most}, in a list")
        return _each(data, read) or None

    return objects


def _each(given: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
    """The entries of a list, changed, or those of the lists in it; None in such a list's place stays."""
    rows = [entry if isinstance(entry, list | tuple) else [entry] for entry in given]
    changed = [[None if entry is None else change(entry) for entry in row] for row in rows]
    return [new if row is entry else new[0] for entry, row, new in zip(given, rows, changed, strict=True)]
