"""Engine: draws the requests of many at a time with one model, in passes that they share.

    pipe = Pipeline.load("Tongyi-MAI/Z-Image-Turbo", residency="resident")
    engine = Engine(pipe)
    job = engine.submit(Request(prompt="a red fox", seed=7), partial_images=2)
    for event in job.events(): ...
    engine.stop()

Every job draws in a thread of its own; one thread computes the model calls of all of them (`turn`), round by round: in
a round every job that has its place goes on to its next call, and the calls are computed together (`packing`), so that
requests join and leave between two passes, whatever their sizes, prompts, steps, solvers, guidance and strengths of
adapters. Calls that cannot share a pass have one of their own in every round: those with a ControlNet, a cache, skipped
layers or other strengths of adapters that change norms (which no token has for itself), all where the pipeline records
graphs or is loaded with numerics "exact".

A picture is the one that is drawn alone but for sums in another order, which no kernel of more rows promises to keep:
1e-5 of the embedded model's pictures in fp32, of which a test sees to it, and in bf16 a rounding of each product. (On
an AMD EPYC with AVX2 24 random requests in company had every bit of those alone.) With numerics "exact" they have.

A further thread encodes prompts and pictures and decodes, on a GPU beside the passes. Places go by tokens, first come,
first served; a request that does not fit may be overtaken OVERTAKES times. An error ends its own job only.
"""

import atexit
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from logging import getLogger
from typing import Any

import torch

from s3dit import values
from s3dit.control import shown
from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.pipeline import Pipeline
from s3dit.request import Request
from s3dit.sampling.step import Step
from s3dit.serve import limits
from s3dit.serve.encoder_thread import EncoderThread
from s3dit.serve.job import Cancelled, Done, Event, Failed, Job, Partial, Queued, QueueFull, Started, StepDone, Stopping
from s3dit.serve.job import TimedOut as TimedOut
from s3dit.serve.job_pipeline import JobPipeline
from s3dit.serve.passes import Passes, Task
from s3dit.serve.stats import Counts
from s3dit.serve.stats import Stats as Stats
from s3dit.serve.turn import Turn

LOG = getLogger(__name__)
DIED = "the engine's thread died; start the server again"
# Errors that say all themselves.
EXPECTED = (RequestError, CheckpointError, BackendError, Cancelled, Stopping, TimedOut)
# How often a request may be overtaken by others that fit where it does not.
OVERTAKES = 8
# Requests that are prepared ahead of their place in the passes, and most that have one.
AHEAD, MOST_RUNNING = 8, 64
# Most partial pictures of a request, and seconds between looks at what waits.
MOST_PARTIALS, LOOK = 100, 0.2


class Engine:
    """Draws the requests that are submitted to it, with a pipeline that is its own until `stop`.

    Safe to call from any thread. Load the pipeline with residency "resident" (or a `vram` that holds all of it); with
    parts that take turns, requests are drawn one after another. Adapters are attached before.
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
        all requests together; one that has more is drawn alone (default: `limits.most_tokens`) · timeout: seconds that
        a request has, if it does not say itself. Raises RequestError; and what loading the model raises.
        """
        values.integer("queue_limit", queue_limit, 1, 1_000_000)
        self.pipe, self.queue_limit, self.timeout = pipe, queue_limit, _checked_timeout(timeout)
        self.resident = limits.stays(pipe)
        if self.resident:
            for part in pipe.parts.checkpoints:
                with pipe.parts.beside():
                    pipe.parts[part]
        if max_batch_tokens is not None:
            values.integer("max_batch_tokens", max_batch_tokens, 1, 1 << 40)
        self.max_batch_tokens = max_batch_tokens or limits.most_tokens(pipe)
        self.counts = Counts()
        self._queue: deque[Task] = deque()
        # Left the queue; of these, those that wait for their first turn, or another one; and those that have one.
        self._running: list[Task] = []
        self._ready: list[Task] = []
        self._sampling: list[Task] = []
        self._changed = threading.Condition()
        self._planning, self._submitted, self._stopping, self._alive = threading.Lock(), 0, False, True
        # What `torch.set_num_threads` sets for MKL holds for the thread that called it.
        self._threads = torch.get_num_threads()
        self._encoders = EncoderThread(pipe.placement.device.type == "cpu" or pipe.graphs, self._threads)
        self._passes = Passes(pipe, self.resident, self.max_batch_tokens, self._encoders, self.counts)
        self._thread = threading.Thread(target=self._work, name="s3dit-engine", daemon=True)
        self._thread.start()
        # Threads that compute when the interpreter ends would abort the process.
        atexit.register(self.stop)

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

        adapters: strengths by name, of those that are attached to the pipeline (`pipe.lora.names`), the others at 0;
        None: all, as they are attached · partial_images: how often to show the pictures on the way, evenly spread over
        the steps before the last; less often where there are fewer steps · timeout: seconds from now · on_event: called
        with every event by the engine's threads, which it must not hold up (`loop.call_soon_threadsafe`); then
        `Job.events` has none. Raises RequestError (and CheckpointError, BackendError) for whatever is wrong with it,
        QueueFull, Stopping.
        """
        values.integer("partial_images", partial_images, 0, MOST_PARTIALS)
        timeout = self.timeout if timeout is None else _checked_timeout(timeout)
        if on_event is not None and not callable(on_event):
            raise RequestError(f"on_event is {shown(on_event)}; needed a function that takes an Event")
        # Before its pictures are read, and again when it is put in.
        self._check_room()
        with self._planning:
            pipe = JobPipeline(self.pipe, adapters, self.resident)
            plan = pipe.plan(request)
            tokens = pipe.tokens(plan)
            if self.resident and plan.memory is not None and plan.memory.mode != "resident":
                raise RequestError(
                    f"this request takes turns of the parts to fit into memory ({plan.memory}), and here every part "
                    "stays for the other requests; needed a smaller picture, or a server with more memory"
                )
            self._submitted += 1
            job = Job(str(self._submitted), plan, timeout, on_event)
        steps = len(plan.sigmas) - 1 + (0 if plan.then is None else len(plan.then.sigmas) - 1)
        task = Task(job, pipe, tokens, _spread(partial_images, steps))
        task.turn = Turn(lambda: self._announce(task), lambda: self._passes.wear("transformer", task.strengths))
        job.on_cancel(lambda: self._cancelled(task))
        with self._changed:
            self._check_room()
            self._queue.append(task)
            job.tell(Queued(len(self._queue) - 1))
        self._begin()
        return job

    @property
    def alive(self) -> bool:
        """Whether requests are drawn: it was not stopped, and its thread has not died."""
        return self._alive and self._thread.is_alive()

    def stats(self) -> Stats:
        """Counts until now; cheap enough to be asked for every second."""
        with self._changed:
            waiting, running = len(self._queue), len(self._running)
        return self.counts.stats(waiting, running, self.pipe.placement.device)

    def warm_up(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Draw a picture in one step of each size (width, height), and wait for it; raises what goes wrong."""
        for width, height in sizes:
            request = Request(prompt="warm up", seed=0, width=width, height=height, num_inference_steps=1)
            self.submit(request).result()

    def stop(self, grace: float = 0.0) -> None:
        """Take no more requests, hand back those that wait (Failed(Stopping)), and return when nothing runs any more.

        grace: seconds that those have which run; what is not done then is handed back before its next step. May be
        called again.
        """
        with self._changed:
            self._stopping = True
            waiting = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for task in waiting:
            self._end(task, Stopping("the server stops; ask again later"))
        with self._changed:
            if not self._changed.wait_for(lambda: not self._running, grace):
                for task in self._running:
                    task.halt = Stopping("the server stopped before the picture was done; ask again later")
                self._changed.wait_for(lambda: not self._running)
            self._alive = False
            self._changed.notify_all()
        self._thread.join()
        self._encoders.close()
        self._passes.undress()
        atexit.unregister(self.stop)

    def _check_room(self) -> None:
        """Raise QueueFull or Stopping where no request can be taken in."""
        if self._stopping or not self.alive:
            raise Stopping("the server stops; ask again later")
        if len(self._queue) >= self.queue_limit:
            self.counts.add(refused=1)
            rounds = 1 + len(self._queue) // max(1, len(self._running))
            raise QueueFull(self.queue_limit, max(1.0, rounds * self.counts.latency()))

    def _cancelled(self, task: Task) -> None:
        """Take a job that is cancelled out of the queue; one that has left it ends before its next step."""
        with self._changed:
            waits = task in self._queue
            if waits:
                self._queue.remove(task)
        if waits and (why := task.why_stop()):
            self._end(task, why)

    def _announce(self, task: Task) -> None:
        """A job waits for its turn; called in its thread."""
        with self._changed:
            if not self._alive:
                task.turn.refuse(BackendError(DIED))
                return
            self._ready.append(task)
            self._changed.notify_all()

    def _begin(self) -> None:
        """Let requests leave the queue, as many as may; called by any thread after something changed."""
        begun = []
        with self._changed:
            while self._may_begin():
                begun.append(self._queue.popleft())
                self._running.append(begun[-1])
            self._changed.notify_all()
        for task in begun:
            threading.Thread(target=self._draw, args=(task,), name=f"s3dit-job-{task.job.id}", daemon=True).start()

    def _may_begin(self) -> bool:
        """Whether the first in the queue may leave it, to be prepared."""
        if not self._queue or len(self._running) >= MOST_RUNNING:
            return False
        prepared = len(self._running) - len(self._sampling)
        return prepared < AHEAD if self.resident else not self._running

    # What follows runs in the engine's thread.

    def _work(self) -> None:
        """Compute until the engine is stopped; when it dies, nobody waits for it in vain."""
        torch.set_num_threads(self._threads)
        try:
            while self._alive:
                self._admit()
                self._round()
        finally:
            if self._alive:
                with self._changed:
                    self._alive, self._stopping = False, True
                    left, waiting = [*self._queue, *self._running], [*self._ready, *self._sampling]
                    self._queue.clear()
                for task in left:
                    self._end(task, BackendError(DIED))
                for task in waiting:
                    task.turn.refuse(BackendError(DIED))

    def _admit(self) -> None:
        """Wait for something to do, and give those that are prepared a place in the passes."""
        with self._changed:
            # Looked at under the lock: `stop` may have come since, and nothing would wake this thread any more.
            if self._alive and not self._sampling and not self._ready:
                self._changed.wait(LOOK if self._queue else None)
            over = [(task, why) for task in self._queue if (why := task.why_stop())]
            for task, _ in over:
                self._queue.remove(task)
            self._sampling += self._fitting()
        for task, why in over:
            self._end(task, why)
        self._begin()

    def _fitting(self) -> list[Task]:
        """Those that wait for their turn and fit beside what is sampled; they are taken from the list."""
        chosen: list[Task] = []
        taken = sum(task.tokens for task in self._sampling)
        for i, task in enumerate(list(self._ready)):
            if not task.why_stop() and taken and taken + task.tokens > self.max_batch_tokens:
                if task.overtaken >= OVERTAKES:
                    break
                continue
            chosen.append(task)
            taken += task.tokens
            for other in self._ready[:i]:
                other.overtaken += other not in chosen
        self._ready = [task for task in self._ready if task not in chosen]
        return chosen

    def _round(self) -> None:
        """Let every job that has a place go on to its next call, and compute these."""
        asking = []
        for task in self._sampling:
            with self._encoders.beside():
                task.turn.run(task.why_stop())
            if task.turn.call is not None:
                asking.append(task)
        self._sampling = [task for task in self._sampling if task.turn.held]
        self._passes.compute(asking)
        if not self._sampling:
            self._passes.forget()

    # What follows runs in the job's thread, or in that for encoders.

    def _draw(self, task: Task) -> None:
        """Draw a job, in a thread of its own."""
        job, pipe, turn = task.job, task.pipe, task.turn
        outcome: Event
        torch.set_num_threads(self._threads)
        try:
            began = job.seconds()
            job.tell(Started())
            pipe.begin(turn, lambda work: self._stage(task, work), self._passes.modulated_at)
            result = pipe(job.plan, on_step=lambda step: self._step_done(task, step))
            if why := task.why_stop():
                raise why
            outcome = Done(result, {"queue": began, **result.seconds})
        except BaseException as error:
            if not isinstance(error, EXPECTED):
                LOG.error("job %s failed", job.id, exc_info=error)
            # Without the frames, which hold tensors.
            error.__context__ = error.__cause__ = None
            outcome = Failed(error.with_traceback(None))
        turn.give()
        turn.close()
        self._end(task, outcome)

    def _step_done(self, task: Task, step: Step) -> None:
        """Tell of a step, show it if it is one of those, and let others have their turn."""
        task.job.tell(StepDone(step.i, step.n))
        self.counts.add(steps=1)
        if step.i in task.partials:
            self._encoders.submit(lambda: self._show(task, step))
        task.turn.pause()

    def _show(self, task: Task, step: Step) -> None:
        """Decode what a step takes the pictures for, and tell of it; where that fails, the job does."""
        if task.why_stop():
            return
        try:
            pictures = task.pipe.preview(step, task.job.plan.request.output_type)
        except BaseException as error:
            task.halt = error.with_traceback(None)
            return
        if not task.shown:
            self.counts.partial(task.job.seconds())
        task.shown += 1
        task.job.tell(Partial(task.shown - 1, pictures))

    def _stage(self, task: Task, work: Callable[[], Any]) -> Any:
        """Return what `work` does in the thread for encoders."""

        def run() -> Any:
            if why := task.why_stop():
                raise why
            with task.pipe._turn():
                self._passes.wear("text_encoder", task.pipe.parts.strengths("text_encoder"))
                return work()

        return self._encoders.submit(run).result()

    def _end(self, task: Task, outcome: Event | BaseException) -> None:
        """Tell a job its last event, and forget it."""
        job = task.job
        event = Failed(outcome) if isinstance(outcome, BaseException) else outcome
        if job.over:
            return
        if isinstance(event, Done):
            sizes = [latent.shape[-1] * latent.shape[-2] * 64 for latent in event.result.latents]
            self.counts.done(job.seconds(), sum(sizes), event.seconds)
        elif isinstance(event, Failed):
            kinds: dict[type[BaseException], str] = {
                Cancelled: "cancelled",
                TimedOut: "timed_out",
                Stopping: "handed_back",
            }
            self.counts.add(**{kinds.get(type(event.error), "failed"): 1})
        with self._changed:
            self._running = [other for other in self._running if other is not task]
        self._begin()
        job.tell(event)


def _checked_timeout(timeout: float | None) -> float | None:
    """The seconds of a request; raises RequestError where they are no number above 0."""
    if timeout is None or (isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout > 0):
        return timeout
    raise RequestError(f"timeout is {timeout!r}; needed seconds, more than 0, or None")


def _spread(count: int, steps: int) -> list[int]:
    """Steps, from 1, after which to show `count` pictures on the way to the last of `steps`."""
    places = {max(1, round(k * steps / (count + 1))) for k in range(1, count + 1)}
    return sorted(places - {steps})
