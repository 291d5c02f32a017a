"""Draw rows on a Ray cluster: Ray Data hands them to actors that keep a model each, as many as there is room for.

Actors join while the cluster grows, and are made anew where one dies; the rows that it was drawing are handed out once
more at the end, each alone, and fail if their actor dies again. An actor writes pictures itself, into a folder that all
machines share or a bucket; results come back to the caller, which alone writes them down.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from threading import get_ident
from typing import Any

from s3dit.batch.rows import Row
from s3dit.batch.worker import Job, Result, Worker, head, passes
from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.runtime.ray_cluster import ABSENT, connected, needs, room
from s3dit.terminal import say

ERRORS = {kind.__name__: kind for kind in (RequestError, CheckpointError, BackendError)}
# Passes of a task at most: a task costs Ray about 10 ms, and what a dead actor had in hand is drawn again.
MOST_PASSES = 32
# Tasks that each worker has in all at least, where there are passes enough, so that none waits long for the last.
TASKS = 16
# Times that an actor is made anew before its place is given up.
RESTARTS = 100


def on_cluster(job: Job, rows: Sequence[Row], address: str, workers: int | None) -> Iterator[Result]:
    """Draw rows on the cluster at an address; `local` makes one of this machine's CPUs for as long as it takes.

    workers: at most so many (default: what the cluster has room for now). Results come as they are done; one without an
    id has notes of the model. Raises BackendError, also where there is no cluster, and the error of an actor that
    cannot load its model or write pictures.
    """
    with _connected(address) as ray:
        needed = needs(job.options.device, job.threads or 1, ray.cluster_resources())
        workers = workers or room(needed, ray.cluster_resources())
        left = {row.id: row for row in rows}
        for size in (MOST_PASSES, 1):
            groups = passes(list(left.values()), job.size if size > 1 else 1)
            for result in _drawn(ray, job, groups, size, workers, needed):
                left.pop(result.get("id", ""), None)
                yield result
            if not left:
                return
            if size > 1:
                say(f"a worker ended: {len(left):,} rows have no result; each is drawn once more, alone")
        for row in left.values():
            yield head(row) | {"error": "two workers ended while they drew it; Ray's logs say more"}


def _drawn(
    ray: Any, job: Job, groups: Sequence[list[Row]], size: int, workers: int, needed: dict[str, float]
) -> Iterator[Result]:
    """The results of passes that Ray hands to actors; nothing of those whose actor died."""
    size = max(1, min(size, len(groups) // (workers * TASKS)))
    items = [{"rows": json.dumps([asdict(row) for row in group])} for group in groups]
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=workers, max_tasks_in_flight_per_actor=2)
    with warnings.catch_warnings():
        # Of the two last: without them a row that ends its worker is tried for ever.
        warnings.simplefilter("ignore")
        data = ray.data.from_items(items, override_num_blocks=-(-len(items) // size)).map_batches(
            Actor, fn_constructor_args=(job,), batch_size=None, compute=pool, num_cpus=needed["CPU"],
            num_gpus=needed["GPU"], max_restarts=RESTARTS, max_task_retries=0,
        )  # fmt: skip
    for item in data.iter_rows():
        result = json.loads(item["result"])
        if "raised" in result:
            raise ERRORS[result["raised"]](result["message"])
        yield result


class Actor:
    """What Ray makes once in each of its processes, and calls with rows."""

    def __init__(self, job: Job) -> None:
        """Load the model; what is wrong with it is told by each call, since Ray would try again."""
        self.told: list[Result] = []
        try:
            self.worker = Worker(job)
            self.told.append({"notes": self.worker.notes})
        except tuple(ERRORS.values()) as error:
            self.told.append(_raised(error))

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        """Draw the passes of a block; results as JSON."""
        told, self.told = self.told, [result for result in self.told if "raised" in result]
        yield {"result": [json.dumps(result) for result in told]}
        if self.told:
            return
        for text in block["rows"]:
            rows = [Row(**values) for values in json.loads(text)]
            try:
                results = list(self.worker.draw(rows))
            except tuple(ERRORS.values()) as error:
                results = [_raised(error)]
            yield {"result": [json.dumps(result) for result in results]}


def _raised(error: Exception) -> Result:
    """An error that ends the batch, as it is sent to the caller."""
    return {"raised": type(error).__name__, "message": str(error)}


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module ray, connected, and Ray Data as rows want it; raises BackendError."""
    # Its core says on standard error what Ray Data does as it should.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with connected(address) as ray:
        try:
            from ray.data import DataContext
        except ImportError:
            raise BackendError(ABSENT) from None
        context = DataContext.get_current()
        context.enable_progress_bars = False
        # Rows whose actor died have no result, and are seen to.
        context.max_errored_blocks = -1
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        with redirect_stdout(_Output(sys.stdout)):
            yield ray


class _Output:
    """Standard output of the thread that made this; what others print, as Ray's do, goes to standard error."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.thread = stream, get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream if get_ident() == self.thread else sys.stderr, name)
