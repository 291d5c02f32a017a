"""Seconds of the stages of a call: what is spent inside a stage that another one is begun in counts for that one."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Adds up the seconds of stages, in the order in which they were first begun.

    Work on a GPU counts in the stage that waits for it, which every stage of a model does at its end.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since, self._stage = 0.0, ""

    @contextmanager
    def measured(self) -> Iterator[dict[str, float]]:
        """Give a dictionary that holds the seconds of the stages inside when the `with` is left."""
        before, spent = dict(self.seconds), dict[str, float]()
        yield spent
        spent |= {name: total - before.get(name, 0.0) for name, total in self.seconds.items()}
        for name in [name for name, seconds in spent.items() if not seconds]:
            del spent[name]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """While inside, seconds are this stage's."""
        outer = self._stage
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> None:
        """Count what has passed for the stage until now, and go on with another; "" counts nowhere."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] += now - self._since
        if name:
            self.seconds.setdefault(name, 0.0)
        self._since, self._stage = now, name


def shown_seconds(seconds: Mapping[str, float]) -> str:
    """The seconds of stages in a line."""
    return ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
