"""Engine: draws the requests of many at a time with one model, in passes that they share.

    pipe = Pipeline.load("Tongyi-MAI/Z-Image-Turbo", residency="resident")
    engine = Engine(pipe)
    job = engine.submit(Request(prompt="a red fox", seed=7), partial_images=2)
    for event in job.events(): ...
    engine.stop()

Requests join and leave between two passes, whatever their sizes, prompts, steps, solvers and guidance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from s3dit.pipeline import Pipeline
from s3dit.request import Request
from s3dit.serve.job import Event, Job


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of an engine since it began, and what it does now.

    queued, running: now · done, failed, cancelled, timed_out, refused: requests by how they ended; refused: queue full ·
    passes: model calls · batch_sizes: how many passes served how many requests · tokens: of all passes · pixels: of the
    pictures that are done · steps: of all requests · seconds: by stage, of the requests that are done, and "queue" ·
    latencies: seconds from submit to the end of the last 1,000 that are done · first_partials: likewise to the first
    partial picture · memory: bytes that are held, of the device or, on a CPU, of the process.
    """

    queued: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    refused: int = 0
    passes: int = 0
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    tokens: int = 0
    pixels: int = 0
    steps: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    latencies: Sequence[float] = ()
    first_partials: Sequence[float] = ()
    memory: int = 0


class Engine:
    """Draws the requests that are submitted to it, with a pipeline that is its own until `stop`.

    Safe to call from any thread. Load the pipeline with residency "resident" (or a `vram` that holds all of it); with
    parts that take turns, requests are drawn one after another.
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        queue_limit: int = 64,
        max_batch_tokens: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """queue_limit: requests that may wait · max_batch_tokens: image and text tokens that are computed in a pass, of
        all requests together; one that has more is drawn alone (default: as memory allows) · timeout: seconds that a
        request has, if it does not say itself.
        """
        raise NotImplementedError

    def submit(
        self,
        request: Request,
        *,
        adapters: Mapping[str, float] | None = None,
        partial_images: int = 0,
        timeout: float | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Job:
        """Take a request in -> its Job, at once.

        adapters: strengths by name, of those that are attached to the pipeline (`pipe.lora.names`), the others resting;
        None: all, as they are attached · partial_images: how many pictures of each to show on the way, evenly spread
        over the steps · timeout: seconds from now · on_event: called with every event by the engine's threads, which it
        must not hold up (`loop.call_soon_threadsafe`); then `Job.events` has none.
        Raises RequestError (and CheckpointError, BackendError) for whatever is wrong with it, QueueFull, Stopping.
        """
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        """Whether requests are drawn: not stopped, and no thread of the engine has died."""
        raise NotImplementedError

    def stats(self) -> Stats:
        """Counts until now; cheap enough to ask for every second."""
        raise NotImplementedError

    def warm_up(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Draw one picture in one step of each size (width, height), and wait for them: loads, tunes and records."""
        raise NotImplementedError

    def stop(self, grace: float = 0.0) -> None:
        """Take no more requests, hand back those that wait (Failed(Stopping)) and end what runs; returns when all is.

        grace: seconds that what runs has to finish; what is left then is handed back as well. May be called again.
        """
        raise NotImplementedError
