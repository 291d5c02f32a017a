"""A double of `s3dit.serve.engine.Engine` that draws requests one after another in a thread, without the scheduler."""

import itertools
import queue
import threading
import time

from s3dit.inputs.images import to_pil
from s3dit.serve.engine import Stats
from s3dit.serve.job import Cancelled, Done, Failed, Job, Partial, Queued, QueueFull, Started, StepDone, Stopping


class OneByOne:
    def __init__(self, pipe, *, queue_limit=64, timeout=None, max_batch_tokens=None):
        self.pipe, self.limit, self.timeout = pipe, queue_limit, timeout
        self.jobs, self.numbers, self.counts = queue.Queue(), itertools.count(1), {}
        self.stopped, self.idle = threading.Event(), threading.Event()
        self.idle.set()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @property
    def alive(self):
        return self.thread.is_alive() and not self.stopped.is_set()

    def submit(self, request, *, adapters=None, partial_images=0, timeout=None, on_event=None):
        if self.stopped.is_set():
            raise Stopping("the engine stops")
        plan = self.pipe.plan(request)
        if self.jobs.qsize() >= self.limit:
            raise QueueFull(self.limit, 3.0)
        job = Job(str(next(self.numbers)), plan, timeout or self.timeout, on_event)
        job.partials = partial_images
        job.tell(Queued(self.jobs.qsize()))
        self.jobs.put(job)
        return job

    def _run(self):
        while (job := self.jobs.get()) is not None:
            self.idle.clear()
            started = time.monotonic()
            try:
                if self.stopped.is_set():
                    raise Stopping("the engine stops")
                job.tell(Started())
                shown = [0]

                def on_step(step, job=job, shown=shown):
                    if (why := job.why_stop()) is not None:
                        raise why
                    job.tell(StepDone(step.i, step.n))
                    if shown[0] < job.partials and step.i * (job.partials + 1) >= (shown[0] + 1) * step.n:
                        pictures = self.pipe.decode([p.cpu() for p in step.latents])
                        job.tell(Partial(shown[0], [to_pil(p[None])[0] for p in pictures]))
                        shown[0] += 1

                result = self.pipe(job.plan, on_step=on_step)
                job.tell(Done(result, {**result.seconds, "queue": started - job.born}))
                self.counts["done"] = self.counts.get("done", 0) + 1
            except Exception as error:
                self.counts["cancelled" if isinstance(error, Cancelled) else "failed"] = 1
                job.tell(Failed(error))
            self.idle.set()

    def stats(self):
        return Stats(
            queued=self.jobs.qsize(), done=self.counts.get("done", 0), batch_sizes={1: 3}, seconds={"vae": 1.0}
        )

    def warm_up(self, sizes):
        pass

    def stop(self, grace=0.0):
        self.stopped.set()
        self.jobs.put(None)
        self.thread.join(grace + 5)
