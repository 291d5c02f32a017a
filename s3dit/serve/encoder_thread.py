"""The one thread of an engine that encodes prompts and pictures and decodes, beside the passes of the transformer."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


class EncoderThread:
    """Does work in its order; on a CPU it comes before the passes, which would compute on the same cores.

    So what is prepared together is sampled together, and what is done is not kept waiting.
    """

    def __init__(self, shares_cores: bool) -> None:
        """shares_cores: whether passes wait for it, and it for passes."""
        self._thread = ThreadPoolExecutor(1, "s3dit-encoders")
        self._shares_cores, self._waiting = shares_cores, 0
        self._changed, self._computing = threading.Condition(), threading.Lock()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Let the thread do some work."""
        with self._changed:
            self._waiting += 1
        return self._thread.submit(self._run, work)

    def _run(self, work: Callable[[], Any]) -> Any:
        try:
            with self._alone():
                return work()
        finally:
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Compute a pass inside the `with`, once nothing waits for this thread where both share their cores."""
        if self._shares_cores:
            with self._changed:
                self._changed.wait_for(lambda: not self._waiting)
        with self._alone():
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._shares_cores:
            yield
            return
        with self._computing:
            yield

    def close(self) -> None:
        """End the thread, once it has done what it was given."""
        self._thread.shutdown()
