"""Engine: draws the requests of many at a time with one model, in passes that they share.

    pipe = Pipeline.load("Tongyi-MAI/Z-Image-Turbo", residency="resident")
    engine = Engine(pipe)
    job = engine.submit(Request(prompt="a red fox", seed=7), partial_images=2)
    for event in job.events(): ...
    engine.stop()

Every job draws in a thread of its own; one thread computes the model calls of all of them (`turn`), round by round: in
a round every job that has its place goes on to its next call, and the calls are computed together (`packing`), so that
requests join and leave between two passes, whatever their sizes, prompts, steps, solvers and guidance. Calls that
cannot share a pass have one of their own in every round: those with a ControlNet, a cache, skipped layers or other
strengths of adapters, all where the pipeline records graphs or is loaded with numerics "exact".

A further thread encodes prompts and pictures and decodes, on a GPU beside the passes. Places go by tokens, first come,
first served; a request that does not fit may be overtaken OVERTAKES times. An error ends its own job only.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from torch import Tensor

from s3dit import values
from s3dit.errors import BackendError, RequestError
from s3dit.kernels.dispatch import overridden
from s3dit.model.timestep import Modulation
from s3dit.model.transformer import Context, Transformer
from s3dit.pipeline import Pipeline
from s3dit.request import Request
from s3dit.sampling.step import Step
from s3dit.serve import limits
from s3dit.serve.job import Cancelled, Done, Event, Failed, Job, Partial, Queued, QueueFull, Started, StepDone, Stopping
from s3dit.serve.job import TimedOut as TimedOut
from s3dit.serve.job_pipeline import JobPipeline
from s3dit.serve.packing import join
from s3dit.serve.stats import Counts
from s3dit.serve.stats import Stats as Stats
from s3dit.serve.turn import Turn

LOG = getLogger(__name__)
# How often a request may be overtaken by others that fit where it does not.
OVERTAKES = 8
# Requests that are prepared ahead of their place in the passes, and most that have one.
AHEAD, MOST_RUNNING = 8, 64
# Times whose modulation is kept, 2 MB each of the published models; on a CPU, where calls compute their own.
MODULATIONS = 64
# Most partial pictures of a request, and seconds between looks at what waits.
MOST_PARTIALS, LOOK = 100, 0.2


@dataclass(slots=True, eq=False)
class _Task:
    """A job in the engine. tokens: of its largest call · partials: steps after which to show what there is."""

    job: Job
    pipe: JobPipeline
    tokens: int
    partials: Sequence[int]
    turn: Turn = field(init=False)
    shown: int = 0
    overtaken: int = 0
    # What ends it from outside.
    halt: BaseException | None = None

    def why_stop(self) -> BaseException | None:
        """The reason to end it before its next step, if there is one."""
        return self.halt or self.job.why_stop()

    @property
    def strengths(self) -> dict[str, float]:
        """Of the adapters beside the transformer, in its present step."""
        return self.pipe.parts.strengths("transformer")


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
        self._queue: deque[_Task] = deque()
        # Left the queue; of these, those that wait for their first turn, or another one; and those that have one.
        self._running: list[_Task] = []
        self._ready: list[_Task] = []
        self._sampling: list[_Task] = []
        self._changed = threading.Condition()
        self._planning, self._computing, self._to_encode = threading.Lock(), threading.Lock(), 0
        self._submitted, self._stopping, self._alive = 0, False, True
        self._worn = {part: _strengths(pipe, part) for part in ("transformer", "text_encoder")}
        self._before = {part: dict(worn) for part, worn in self._worn.items()}
        self._modulations: OrderedDict[Any, Modulation] = OrderedDict()
        self._encoding = ThreadPoolExecutor(1, "s3dit-encoders")
        self._thread = threading.Thread(target=self._work, name="s3dit-engine", daemon=True)
        self._thread.start()

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
        # Before its pictures are read, and again when it is put in.
        self._check_room()
        with self._planning:
            pipe = JobPipeline(self.pipe, adapters, self.resident)
            plan = pipe.plan(request)
            tokens = pipe.tokens(plan)
            self._submitted += 1
            job = Job(str(self._submitted), plan, timeout, on_event)
        steps = len(plan.sigmas) - 1 + (0 if plan.then is None else len(plan.then.sigmas) - 1)
        task = _Task(job, pipe, tokens, _spread(partial_images, steps))
        task.turn = Turn(lambda: self._announce(task), lambda: self._wear("transformer", task.strengths))
        job.on_cancel(self._look)
        with self._changed:
            self._check_room()
            self._queue.append(task)
            job.tell(Queued(len(self._queue) - 1))
            self._changed.notify_all()
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
        self._encoding.shutdown()
        for part, strengths in self._before.items():
            self._wear(part, strengths)

    def _check_room(self) -> None:
        """Raise QueueFull or Stopping where no request can be taken in."""
        if self._stopping or not self.alive:
            raise Stopping("the server stops; ask again later")
        if len(self._queue) >= self.queue_limit:
            self.counts.add(refused=1)
            rounds = 1 + len(self._queue) // max(1, len(self._running))
            raise QueueFull(self.queue_limit, max(1.0, rounds * self.counts.latency()))

    def _look(self) -> None:
        """Let the engine's thread look at what has changed."""
        with self._changed:
            self._changed.notify_all()

    def _announce(self, task: _Task) -> None:
        """A job waits for its turn; called in its thread."""
        with self._changed:
            self._ready.append(task)
            self._changed.notify_all()

    def _wear(self, part: str, strengths: Mapping[str, float]) -> None:
        """Set the strengths of the adapters beside a part, by the one thread that computes with it now."""
        worn = self._worn[part]
        # A part that comes and goes is given those of the job that loads it.
        if worn == strengths or part not in self.pipe.parts.held:
            return
        attachments = self.pipe.parts.component(part).attachments
        for name, strength in strengths.items():
            if worn.get(name) != strength or not self.resident:
                attachments.rescale(name, strength)
                worn[name] = strength

    # What follows runs in the engine's thread.

    def _work(self) -> None:
        """Compute until the engine is stopped; when it dies, nobody waits for it in vain."""
        try:
            while self._alive:
                self._admit()
                self._round()
        finally:
            if self._alive:
                self._alive, self._stopping = False, True
                died = BackendError("the engine's thread died; start the server again")
                for task in [*self._queue, *self._running]:
                    self._end(task, died)

    def _admit(self) -> None:
        """Wait for something to do; begin requests, and give those that are prepared a place in the passes."""
        with self._changed:
            if not self._sampling and not self._ready and not self._may_begin():
                self._changed.wait(LOOK if self._queue else None)
            over = [(task, why) for task in self._queue if (why := task.why_stop())]
            for task, _ in over:
                self._queue.remove(task)
            begun = []
            while self._may_begin():
                begun.append(self._queue.popleft())
                self._running.append(begun[-1])
            self._sampling += self._fitting()
        for task, why in over:
            self._end(task, why)
        for task in begun:
            threading.Thread(target=self._draw, args=(task,), name=f"s3dit-job-{task.job.id}", daemon=True).start()

    def _may_begin(self) -> bool:
        """Whether the first in the queue may leave it, to be prepared."""
        if not self._queue or len(self._running) >= MOST_RUNNING:
            return False
        prepared = len(self._running) - len(self._sampling)
        return prepared < AHEAD if self.resident else not self._running

    def _fitting(self) -> list[_Task]:
        """Those that wait for their turn and fit beside what is sampled; they are taken from the list."""
        chosen: list[_Task] = []
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
            task.turn.run(task.why_stop())
            if task.turn.call is not None:
                asking.append(task)
        self._sampling = [task for task in self._sampling if task.turn.held]
        groups: dict[Any, list[_Task]] = {}
        separate = self._separate()
        for task in asking:
            assert task.turn.call is not None
            key = task if separate else (task.turn.call.kind, *task.strengths.items())
            groups.setdefault(key, []).append(task)
        for group in groups.values():
            for batch in self._batches(group):
                self._pass(batch)

    def _separate(self) -> bool:
        """Whether every call takes a pass of its own: where others would change its bits, or somebody looks on."""
        return self.pipe.numerics == "exact" or overridden() or self.pipe.parts.watched("transformer")

    def _batches(self, group: Sequence[_Task]) -> list[list[_Task]]:
        """Calls that are computed together, in their order, max_batch_tokens at most."""
        batches: list[list[_Task]] = []
        room = 0
        for task in group:
            assert task.turn.call is not None
            if not batches or task.turn.call.tokens > room:
                batches.append([])
                room = self.max_batch_tokens
            batches[-1].append(task)
            room -= task.turn.call.tokens
        return batches

    def _pass(self, batch: Sequence[_Task]) -> None:
        """Compute the calls of some jobs in one pass; where it fails, in halves, until it is known whose fault it is."""
        error = self._computed(batch)
        if error is None:
            return
        if len(batch) == 1:
            batch[0].turn.answer = error
            return
        LOG.warning("a pass of %d requests failed, and is computed in halves: %s", len(batch), error)
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            self._pass(half)

    def _computed(self, batch: Sequence[_Task]) -> BaseException | None:
        """Compute the calls of some jobs in one pass; returns its error, without the frames that hold its tensors."""
        calls = [task.turn.call for task in batch if task.turn.call is not None]
        if self._shares_cores:
            # Requests that are prepared soon are computed together, and decoded ones are done.
            with self._changed:
                self._changed.wait_for(lambda: not self._to_encode)
        try:
            with self._computing if self._shares_cores else nullcontext(), self.pipe._turn():
                transformer = self.pipe.parts["transformer"]
                self._wear("transformer", batch[0].strengths)
                joined = join(calls)
                out: Tensor = transformer(joined.x, joined.t, joined.context, None, joined.modulation)
                for task, answer in zip(batch, out.split([len(call.x) for call in calls]), strict=True):
                    task.turn.answer = answer
        except BaseException as error:
            return error.with_traceback(None)
        self.counts.passed(len(batch), joined.tokens)
        return None

    @property
    def _shares_cores(self) -> bool:
        """Whether encoders and passes take turns, because they would compute on the same cores."""
        return self.pipe.placement.device.type == "cpu"

    # What follows runs in the job's thread, or in that for encoders.

    def _draw(self, task: _Task) -> None:
        """Draw a job, in a thread of its own."""
        job, pipe, turn = task.job, task.pipe, task.turn
        outcome: Event
        try:
            began = job.seconds()
            job.tell(Started())
            pipe.begin(turn, lambda work: self._stage(task, work), self._modulated_at)
            result = pipe(job.plan, on_step=lambda step: self._step_done(task, step))
            if why := task.why_stop():
                raise why
            outcome = Done(result, {"queue": began, **result.seconds})
        except BaseException as error:
            # Without the frames, which hold tensors.
            outcome = Failed(error.with_traceback(None))
            error.__context__ = None
        turn.give()
        turn.close()
        self._end(task, outcome)

    def _step_done(self, task: _Task, step: Step) -> None:
        """Tell of a step, show it if it is one of those, and let others have their turn."""
        task.job.tell(StepDone(step.i, step.n))
        self.counts.add(steps=1)
        if step.i in task.partials:
            self._encode(lambda: self._show(task, step))
        task.turn.pause()

    def _show(self, task: _Task, step: Step) -> None:
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

    def _stage(self, task: _Task, work: Callable[[], Any]) -> Any:
        """Return what `work` does in the thread for encoders."""

        def run() -> Any:
            if why := task.why_stop():
                raise why
            with task.pipe._turn():
                self._wear("text_encoder", task.pipe.parts.strengths("text_encoder"))
                return work()

        return self._encode(run).result()

    def _encode(self, work: Callable[[], Any]) -> Future[Any]:
        """Let the thread for encoders do some work."""

        def run() -> Any:
            try:
                with self._computing if self._shares_cores else nullcontext():
                    return work()
            finally:
                with self._changed:
                    self._to_encode -= 1
                    self._changed.notify_all()

        with self._changed:
            self._to_encode += 1
        return self._encoding.submit(run)

    def _modulated_at(self, t: Tensor, context: Context) -> Modulation:
        """The modulation of a call at times t, kept on a CPU: requests of one schedule share their times."""
        transformer = self.pipe.parts["transformer"]
        assert isinstance(transformer, Transformer)
        times, dtype = context.times(t), context.text.dtype
        if times.device.type != "cpu":
            return transformer.modulation(times, dtype)
        key = (times.shape, *times.flatten().tolist(), dtype, self.pipe.parts.revisions["transformer"])
        key += tuple(self._worn["transformer"].items())
        if key not in self._modulations:
            self._modulations[key] = transformer.modulation(times, dtype)
            while len(self._modulations) > MODULATIONS:
                self._modulations.popitem(last=False)
        self._modulations.move_to_end(key)
        return self._modulations[key]

    def _end(self, task: _Task, outcome: Event | BaseException) -> None:
        """Tell a job its last event, and forget it."""
        job = task.job
        event = Failed(outcome) if isinstance(outcome, BaseException) else outcome
        if job.over:
            return
        if isinstance(event, Done):
            sizes = [latent.shape[-1] * latent.shape[-2] * 64 for latent in event.result.latents]
            self.counts.done(job.seconds(), sum(sizes), event.seconds)
        elif isinstance(event, Failed):
            kinds = {Cancelled: "cancelled", TimedOut: "timed_out", Stopping: "handed_back"}
            self.counts.add(**{kinds.get(type(event.error), "failed"): 1})
        with self._changed:
            self._running = [other for other in self._running if other is not task]
            self._changed.notify_all()
        job.tell(event)


def _strengths(pipe: Pipeline, part: str) -> dict[str, float]:
    """The strengths of the adapters beside a part."""
    return {
        name: each.strength for name, each in pipe.parts.adapters.items() if part in each.deltas and not each.merged
    }


def _checked_timeout(timeout: float | None) -> float | None:
    """The seconds of a request; raises RequestError where they are no number above 0."""
    if timeout is None or (isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout > 0):
        return timeout
    raise RequestError(f"timeout is {timeout!r}; needed seconds, more than 0, or None")


def _spread(count: int, steps: int) -> list[int]:
    """Steps, from 1, after which to show `count` pictures on the way to the last of `steps`."""
    places = {max(1, round(k * steps / (count + 1))) for k in range(1, count + 1)}
    return sorted(places - {steps})
