"""Draw rows of a batch: a Worker keeps one model, and gives back one result a row.

A result is a dict of JSON values: `id`, `line` and `digest` of the row, then `files`, the SHA-256 of each file by its
name, or `error`, and `seconds` and `worker` (machine and process). `notes` may stand beside, for the user. What is the
row's fault, or its files', or memory's, is an error of that row; an output that cannot be written is raised, and ends
the batch; whatever else goes wrong ends the worker.
"""

import hashlib
import os
import socket
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3dit.batch.rows import Row, joined
from s3dit.batch.stores import open_store
from s3dit.cli.importing import importing
from s3dit.cli.prepare import load_with_adapters
from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.files import ENDINGS
from s3dit.request import Request

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """What all rows of a batch have in common; workers on other machines are sent it.

    options: of the model, as the command line has them · start: the folder where these names of files begin · folder:
    of the rows, where theirs begin · output: what -o names · ending: of pictures' names · quality: of JPEG and WebP ·
    metadata: whether pictures carry what drew them · threads: of a worker on a CPU; None: torch's own number · size:
    rows of a pass at most.
    """

    options: Namespace
    start: Path
    folder: Path
    output: str
    ending: str = ".png"
    quality: int | None = None
    metadata: bool = True
    threads: int | None = None
    size: int = 1


class Worker:
    """A model, and where its pictures go."""

    def __init__(self, job: Job, number: int = 0) -> None:
        """Load the model. number: of the worker on its machine, which chooses among several GPUs.

        The current folder of the process becomes that of the rows, so that pictures name files as the rows do.
        """
        self.job, self.store = job, open_store(job.output)
        self.notes: list[str] = []
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        with importing():
            import torch
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        options = Namespace(**vars(job.options))
        if options.device in (None, "cuda") and torch.cuda.device_count() > 1:
            options.device = f"cuda:{number % torch.cuda.device_count()}"
        if job.start.is_dir():
            os.chdir(job.start)
        self.pipe = load_with_adapters(options, report=self.notes.append)
        self.here = job.folder.is_dir()
        if self.here:
            os.chdir(job.folder)

    def draw(self, rows: Sequence[Row]) -> Iterator[Result]:
        """Draw rows, in one pass if they are several, and save their pictures; one result each.

        Raises RequestError where the pictures cannot be written.
        """
        start = time.perf_counter()
        try:
            requests = [self._request(row) for row in rows]
            results = self._drawn(rows, joined(requests) if len(rows) > 1 else requests[0])
        except (RequestError, CheckpointError, BackendError) as error:
            if len(rows) > 1:
                # One of them is at fault, or they are too many for the memory.
                for row in rows:
                    yield from self.draw([row])
                return
            results = [{"error": str(error)}]
        for files in (result["files"] for result in results if "files" in result):
            for name, data in files.items():
                self.store.write(name, data)
                files[name] = hashlib.sha256(data).hexdigest()
        seconds = round((time.perf_counter() - start) / len(rows), 4)
        for row, result in zip(rows, results, strict=True):
            yield head(row) | result | {"seconds": seconds, "worker": self.name}

    def _request(self, row: Row) -> Request:
        if row.named and not self.here:
            raise RequestError(
                f"it names files, and the folder of the rows, {self.job.folder}, is not on the worker's machine; "
                "needed one that all machines share"
            )
        return row.request()

    def _drawn(self, rows: Sequence[Row], request: Request) -> list[Result]:
        """Draw a request; `files` are the contents of its pictures: of each row one, or all of the only row."""
        from s3dit.inputs.save_image import encoded

        plan = self.pipe.plan(request)
        drawn = self.pipe(plan)
        each, form = len(drawn.images) // len(rows), ENDINGS[self.job.ending]
        names = [f"{row.name}{f'+{i + 1}' if each > 1 else ''}{self.job.ending}" for row in rows for i in range(each)]
        files: list[dict[str, bytes]] = [{} for _ in rows]
        for i, (name, image, record) in enumerate(zip(names, drawn.images, drawn.metadata, strict=True)):
            files[i // each][name] = encoded(image, form, record if self.job.metadata else None, self.job.quality)
        notes = {"notes": list(plan.unused)} if plan.unused else {}
        return [{"files": contents} | notes for contents in files]


def head(row: Row) -> Result:
    """What a result says of its row."""
    return {"id": row.id, "line": row.line, "digest": row.digest}


def passes(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Rows that share passes together, at most so many in one; those that can share nothing are alone."""
    if size == 1:
        return [[row] for row in rows]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.shares or f"alone {row.line}", []).append(row)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def in_process(job: Job, rows: Sequence[Row]) -> Iterator[Result]:
    """Draw rows in this process, one pass after another; the first result has no id, but the model's notes."""
    folder = Path.cwd()
    try:
        worker = Worker(job)
        yield {"notes": worker.notes}
        for group in passes(rows, job.size):
            yield from worker.draw(group)
    finally:
        os.chdir(folder)
