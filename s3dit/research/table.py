"""A Table: numbers by named rows and columns, as JSON and as a picture."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

from s3dit.errors import RequestError
from s3dit.research import pictures


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers of rows and columns; None where there is none.

    title: says what they are, and of what · log: whether they range over orders of magnitude, for pictures.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    log: bool = False

    @classmethod
    def of(
        cls, title: str, rows: Sequence[Any], columns: Sequence[Any], values: Sequence[Sequence[Any]], log: bool = False
    ) -> Self:
        """Make a table of anything whose rows and columns have names and whose values are numbers, NaN or None."""
        cells = tuple(tuple(None if x is None or math.isnan(x) else float(x) for x in row) for row in values)
        return cls(title, tuple(map(str, rows)), tuple(map(str, columns)), cells, log)

    def at(self, row: Any, column: Any) -> float | None:
        """Return one number; raises RequestError for names that are none."""
        for name, names in ((str(row), self.rows), (str(column), self.columns)):
            if name not in names:
                raise RequestError(f"{name!r} is not in the table {self.title!r}; needed one of {', '.join(names)}")
        return self.values[self.rows.index(str(row))][self.columns.index(str(column))]

    def column(self, column: Any) -> dict[str, float | None]:
        """Return the numbers of a column, by row."""
        return {row: self.at(row, column) for row in self.rows}

    def picture(self) -> Image.Image:
        """Draw it as a heat map."""
        return pictures.heatmap(self._floats(), self.rows, self.columns, self.title, log=self.log)

    def lines(self) -> Image.Image:
        """Draw it as curves, one a row, over the columns, whose names are numbers or are counted from 1."""
        numbers = [float(name) for name in self.columns] if all(map(_is_number, self.columns)) else None
        curves = dict(zip(self.rows, self._floats(), strict=True))
        return pictures.lines(curves, numbers, self.title, log=self.log)

    def save(self, path: str | Path) -> None:
        """Write it as JSON; raises RequestError."""
        try:
            Path(path).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{path}: cannot be written ({error}); needed a writable folder with room") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises RequestError."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.of(data["title"], data["rows"], data["columns"], data["values"], bool(data["log"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise RequestError(f"{path}: is no table ({error}); needed a file that `Table.save` wrote") from None

    def _floats(self) -> list[list[float]]:
        return [[math.nan if x is None else x for x in row] for row in self.values]


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
