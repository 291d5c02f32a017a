"""The one thread of an engine that encodes prompts and pictures and decodes, beside the passes of the transformer."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


class EncoderThread:
    """Does work in its order; on a CPU it comes before the passes, which would compute on the same cores.

    So what is prepared together is sampled together, and what is done is not kept waiting. Where passes are recorded it
    does, too: nothing else may run on the device while a CUDA graph is captured.
    """

    def __init__(self, takes_turns: bool, threads: int) -> None:
        """takes_turns: whether passes wait for it, and it for passes · threads: that torch may take for it."""
        self._thread = ThreadPoolExecutor(1, "s3dit-encoders", torch.set_num_threads, (threads,))
        self._takes_turns, self._waiting = takes_turns, 0
        self._changed, self._computing = threading.Condition(), threading.Lock()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Let the thread do some work."""
        with self._changed:
            future = self._thread.submit(self._run, work)
            self._waiting += 1
            return future

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
        """Compute a pass inside the `with`, where they take turns once nothing waits for this thread."""
        if self._takes_turns:
            with self._changed:
                self._changed.wait_for(lambda: not self._waiting)
        with self._alone():
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._takes_turns:
            yield
            return
        with self._computing:
            yield

    def close(self) -> None:
        """End the thread, once it has done what it was given."""
        self._thread.shutdown()
