"""A Job: one request on its way through an engine, and the Events that tell of it.

Events come in this order: Queued, Started, then StepDone and Partial, at last one of Done and Failed; after that there
are none.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from s3dit.plan import Plan
from s3dit.result import Result

LOG = getLogger(__name__)


class QueueFull(RuntimeError):
    """The queue holds as many requests as it may; `retry_after` seconds are about what the next place takes."""

    def __init__(self, limit: int, retry_after: float) -> None:
        super().__init__(f"{limit} requests wait already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Stopping(RuntimeError):
    """The engine takes no more requests, or hands back one that it did not begin."""


class TimedOut(RuntimeError):
    """A request was not done within its time."""


class Cancelled(RuntimeError):
    """A request was cancelled by the one who made it."""


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits; position: how many came before it and wait, too."""

    position: int


@dataclass(frozen=True, slots=True)
class Started:
    """The request has left the queue."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """Step i of n is done, counted from 1 and through both passes of a request that has two."""

    i: int
    n: int


@dataclass(frozen=True, slots=True)
class Partial:
    """What the pictures look like so far.

    index: from 0, of the partial pictures · images: one a picture, Pillow's, or tensors (3, H, W) in [-1, 1] where the
    request's output_type is tensor.
    """

    index: int
    images: list[Any]


@dataclass(frozen=True, slots=True)
class Done:
    """The pictures are drawn.

    seconds: by stage, those of `Result.seconds` and "queue"; "transformer" are those from its start to its last step
    without what other stages took, in company with the requests beside it.
    """

    result: Result
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Failed:
    """There are no pictures: RequestError, CheckpointError, BackendError, or one of the errors of this file."""

    error: BaseException


Event = Queued | Started | StepDone | Partial | Done | Failed


class Job:
    """A request in an engine; made by `Engine.submit`, and safe to use from any thread.

    id: such as "7", unique in its engine · plan: what is drawn, with its notes and the resolved request.
    """

    def __init__(
        self, name: str, plan: Plan, timeout: float | None = None, on_event: Callable[[Event], None] | None = None
    ) -> None:
        """timeout: seconds from now · on_event: is called with every event instead of their waiting in `events`."""
        self.id, self.plan = name, plan
        self.born = time.monotonic()
        self.deadline = None if timeout is None else self.born + timeout
        self._on_event = on_event
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._over, self._telling = threading.Event(), threading.RLock()
        self._last: Done | Failed | None = None
        self._wanted = threading.Event()
        self._wake: Callable[[], None] = lambda: None

    def seconds(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self.born

    def on_cancel(self, wake: Callable[[], None]) -> None:
        """Set what is called when it is cancelled."""
        self._wake = wake

    def events(self) -> Iterator[Event]:
        """Wait for the events, in their order; ends after Done or Failed. For one reader, without `on_event`."""
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Done | Failed):
                return

    def cancel(self) -> None:
        """Give the request up: at once while it waits, else before its next step; nothing where it is over."""
        self._wanted.set()
        self._wake()

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the pictures; raises what went wrong, and TimeoutError after `timeout` seconds without an end."""
        if not self._over.wait(timeout):
            raise TimeoutError(f"job {self.id} is not done after {timeout:g} s")
        assert self._last is not None
        if isinstance(self._last, Failed):
            raise self._last.error
        return self._last.result

    @property
    def over(self) -> bool:
        """Whether there are no more events."""
        return self._over.is_set()

    def why_stop(self) -> BaseException | None:
        """The reason to give it up before its next step, if there is one."""
        if self._wanted.is_set():
            return Cancelled(f"job {self.id} was cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            return TimedOut(f"job {self.id} was not done within {self.deadline - self.born:g} s")
        return None

    def _called(self, on_event: Callable[[Event], None], event: Event) -> None:
        """Call what was given for events; where it raises, nobody listens, and the request is given up."""
        try:
            on_event(event)
        except BaseException as error:
            LOG.exception("on_event of job %s failed; the job is cancelled", self.id)
            self.cancel()
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise

    def tell(self, event: Event) -> bool:
        """Hand an event on; returns whether it was, which after the last one it is not."""
        with self._telling:
            if self._over.is_set():
                return False
            if isinstance(event, Done | Failed):
                self._last = event
            if self._on_event is None:
                self._events.put(event)
            else:
                self._called(self._on_event, event)
            if self._last is not None:
                self._over.set()
            return True
