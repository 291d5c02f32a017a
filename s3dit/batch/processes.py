"""Draw rows in several processes of this machine, each with a model of its own.

Processes are spawned, since torch must not be forked. They take their passes one at a time, so none waits for another.
One that dies is replaced; the rows that it was drawing are drawn once more, each alone, and fail if another one dies
with them. Ctrl-C is left to the parent, which ends its workers with SIGTERM; a worker whose parent is gone ends too.
"""

import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from s3dit.batch.rows import Row
from s3dit.batch.worker import Job, Result, Worker, head, passes
from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.terminal import Stopped, say, stoppable

ERRORS = (RequestError, CheckpointError, BackendError)
# Seconds in which a worker that is told to end must be gone.
PATIENCE = 10.0


@dataclass(eq=False, slots=True)
class Process:
    """A worker's process: its end of the pipe, whether its model is loaded, and the rows that it is drawing."""

    number: int
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    rows: list[Row] = field(default_factory=list)


def in_processes(job: Job, rows: Sequence[Row], count: int) -> Iterator[Result]:
    """Draw rows in `count` processes; results come as they are done. One without an id has notes of the model.

    Raises the error of a worker that cannot load its model or write pictures, and BackendError where workers die before
    they have loaded it.
    """
    pool = Pool(job, passes(rows, job.size))
    try:
        for number in range(min(count, len(pool.waiting))):
            pool.start(number)
        while pool.workers:
            for pipe in wait([worker.pipe for worker in pool.workers]):
                worker = next(worker for worker in pool.workers if worker.pipe is pipe)
                try:
                    message = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    yield from pool.died(worker)
                    continue
                yield from pool.heard(worker, message)
    finally:
        pool.end()


class Pool:
    """The processes of a batch, and the passes that are still to be drawn."""

    def __init__(self, job: Job, waiting: Sequence[list[Row]]) -> None:
        self.job, self.waiting = job, deque(waiting)
        self.workers: list[Process] = []
        # Rows with which a worker died.
        self.tried: set[str] = set()

    def start(self, number: int) -> None:
        """Start a worker."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.job, number), name=f"worker {number}", daemon=True)
        process.start()
        theirs.close()
        self.workers.append(Process(number, process, ours))

    def heard(self, worker: Process, message: Any) -> Iterator[Result]:
        """Take what a worker says: an error that ends the batch, a result, or None when it has nothing to do."""
        if isinstance(message, ERRORS):
            raise message
        if message is not None:
            worker.ready = True
            worker.rows = [row for row in worker.rows if row.id != message.get("id")]
            yield message
        elif self.waiting:
            worker.rows = self.waiting.popleft()
            # One that has just died is found by its closed pipe.
            with suppress(OSError):
                worker.pipe.send(worker.rows)
        else:
            worker.pipe.close()
            self.workers.remove(worker)
            worker.process.join(PATIENCE)

    def died(self, worker: Process) -> Iterator[Result]:
        """Replace a worker that is gone, and put back what it was drawing; a row's second time is its last."""
        self.workers.remove(worker)
        worker.process.join(PATIENCE)
        reason = _reason(worker.process.exitcode)
        if not worker.ready:
            raise BackendError(f"a worker ended while it loaded the model ({reason}); try fewer --workers, or one")
        for row in reversed(worker.rows):
            if row.id in self.tried:
                yield head(row) | {"error": f"two workers ended while they drew it (the second: {reason})"}
            else:
                self.tried.add(row.id)
                self.waiting.appendleft([row])
        if self.waiting:
            say(f"worker {worker.number} ended ({reason}); another takes its place")
            self.start(worker.number)

    def end(self) -> None:
        """End all workers, and wait until they are gone."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(PATIENCE)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()


def _reason(code: int | None) -> str:
    """What an exit code says."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
    return f"{name}; out of memory?" if name == "SIGKILL" else name


def _work(pipe: Connection, job: Job, number: int) -> None:
    """The whole of a worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable(lambda *_: os._exit(143)):
            try:
                worker = Worker(job, number)
                pipe.send({"notes": worker.notes})
                while True:
                    pipe.send(None)
                    for result in worker.draw(pipe.recv()):
                        pipe.send(result)
            except ERRORS as error:
                pipe.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError, Stopped):
        # The parent has no more to draw, or is gone, or says that it is enough.
        pipe.close()
