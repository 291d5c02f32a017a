"""The results of a batch: which rows are done, a line for each row as it is drawn, and counts of them.

A line is a result as `worker` gives it. Of several lines of one id the last counts. A row is done if it has one without
an error, of the same digest, and its files are there; any other is drawn. What drew a place's pictures stands in
batch.json: rows are not added to those of another model.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from s3dit.batch.rows import Row
from s3dit.batch.stores import Store
from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.terminal import say

SETTINGS = "batch.json"
# Failed rows that are named on the terminal; all are among the results.
MOST_NAMED = 20


class Results:
    """The results of a place, in a `with`."""

    def __init__(self, store: Store, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """settings: what decides beside the rows what is drawn, as JSON values · overwrite: begin anew."""
        self.store, self.settings, self.overwrite = store, dict(settings), overwrite
        self.known: dict[str, dict[str, Any]] = {}
        self.drawn = self.pictures = 0
        self.failed: list[dict[str, Any]] = []
        self.said: set[str] = set()
        self.started: float | None = None

    def __enter__(self) -> "Results":
        """Make the place this run's own, and read what is there; raises RequestError."""
        try:
            for number, line in enumerate(self.store.begin(), 1):
                result = _result(line)
                if result is None:
                    say(f"line {number} of the results is none of s3dit batch; it is left alone")
                elif not self.overwrite:
                    self.known[result["id"]] = result
            self._check_settings()
        except BaseException:
            self.store.end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Write what is not written yet."""
        self.store.end()

    def _check_settings(self) -> None:
        """Hold the settings to those of the run before, or write them."""
        text = self.store.read(SETTINGS)
        if text is not None and not self.overwrite:
            try:
                before = json.loads(text)
            except ValueError:
                before = None
            if not isinstance(before, dict):
                raise RequestError(f"{SETTINGS} in the output is damaged; choose another place, or --overwrite")
            for name in sorted({*before, *self.settings}):
                was, now = before.get(name), self.settings.get(name)
                if was != now:
                    raise RequestError(
                        f"the output holds pictures drawn with {name} {shown(was)}, not {shown(now)}; needed the same; "
                        "choose another place with -o, or draw all rows anew with --overwrite"
                    )
        else:
            self.store.write(SETTINGS, json.dumps(self.settings, indent=1).encode() + b"\n")

    def left(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that are not done."""
        names = self.store.names() if self.known else set()

        def done(row: Row) -> bool:
            result = self.known.get(row.id, {})
            return result.get("digest") == row.digest and "files" in result and names.issuperset(result["files"])

        return [row for row in rows if row.error is not None or not done(row)]

    def add(self, result: dict[str, Any]) -> bool:
        """Record what a runner gives; whether it was a result of a row. Anything new that it notes is said."""
        for note in result.get("notes", ()):
            if note not in self.said:
                self.said.add(note)
                say(note)
        if "id" not in result:
            # A worker has loaded its model.
            self.started = self.started or time.perf_counter()
            return False
        if missing := [name for name in result.get("files", ()) if not self.store.holds(name)]:
            del result["files"]
            result["error"] = (
                f"{missing[0]} was written and is not in the output as seen from here; needed a folder that all "
                "machines share, or a bucket"
            )
        self.store.append(json.dumps(result).encode())
        self.drawn += 1
        self.pictures += len(result.get("files", ()))
        if "error" in result:
            self.failed.append(result)
            if len(self.failed) <= MOST_NAMED:
                say(f"line {result['line']}, id {shown(result['id'])}: {result['error']}")
            elif len(self.failed) == MOST_NAMED + 1:
                say("more rows fail; all of them are among the results")
        return True

    @property
    def seconds(self) -> float:
        """Seconds since the first worker was ready."""
        return 0.0 if self.started is None else time.perf_counter() - self.started


def _result(line: bytes) -> dict[str, Any] | None:
    """A line of results; None for anything else."""
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return None
    right = isinstance(result, dict) and isinstance(result.get("id"), str) and isinstance(result.get("files", {}), dict)
    return result if right else None
