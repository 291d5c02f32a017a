"""One request on its way through the engine, seen from asyncio: submitted, told of, answered.

Where its client leaves before that, it is cancelled.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from logging import getLogger
from time import perf_counter
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from s3dit.errors import BackendError, RequestError
from s3dit.inputs.image_metadata import carried
from s3dit.pipeline import Pipeline
from s3dit.plan import Plan
from s3dit.serve.answers import Answers, error_event
from s3dit.serve.bounds import Limits
from s3dit.serve.door import Visit
from s3dit.serve.engine import Engine
from s3dit.serve.errors import ApiError
from s3dit.serve.job import Cancelled, Done, Event, Failed, Job, Partial, QueueFull, Stopping, TimedOut
from s3dit.serve.metrics import Metrics
from s3dit.serve.pictures import public
from s3dit.serve.wanted import Wanted, check_plan, check_texts

LOG = getLogger(__name__)
# Seconds after which a stream says that it is still there.
QUIET = 15.0
# Threads that plan.
PLANNERS = 4


@dataclass(frozen=True, slots=True)
class Drawer:
    """What draws the requests of a server.

    scales: of the adapters that act unless a request says otherwise · loras: names of those that it may ask for ·
    grace: seconds after which a client that finds the server stopping may try again · planners: threads in which plans
    are made, which may wait for the model, and so have none in common with what packs and sends pictures.
    """

    engine: Engine
    pipe: Pipeline
    limits: Limits
    metrics: Metrics
    loras: tuple[str, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    grace: float = 30.0
    planners: Executor = field(default_factory=lambda: ThreadPoolExecutor(PLANNERS, "s3dit-plan"))

    @asynccontextmanager
    async def drawing(self, asked: Wanted, kind: str, visit: Visit) -> AsyncIterator["Drawing"]:
        """Submit a request, and cancel it at the end if it is not done; raises ApiError."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            """Hand an event over from a thread of the engine, whose loop may be gone."""
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(told.put_nowait, event)

        job = await self._submitted(asked, tell)
        try:
            answers = Answers(kind, asked, job.plan)
            visit.size, visit.pictures, visit.steps = answers.size, job.plan.request.count, len(job.plan.sigmas) - 1
            yield Drawing(self, asked, answers, told, visit)
        finally:
            job.cancel()

    async def _submitted(self, asked: Wanted, tell: Any) -> Job:
        """The job of a request, checked as far as a plan can be; also where its client leaves meanwhile."""
        task = asyncio.get_running_loop().run_in_executor(self.planners, self._submit, asked, tell)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_given_up)
            raise

    def _submit(self, asked: Wanted, tell: Any) -> Job:
        adapters = dict(self.scales) | dict(asked.loras) if self.loras or self.scales else None
        try:
            check_texts(asked.request, self.pipe.tokenizer)
            job = self.engine.submit(
                asked.request, adapters=adapters, partial_images=asked.partial_images, on_event=tell
            )
        except (RequestError, BackendError) as error:
            # The latter where a budget of memory is too small for what is asked.
            raise asked.wrong(error) from None
        except (QueueFull, Stopping) as error:
            raise self.why(error, asked) from None
        try:
            check_plan(job.plan, self.limits)
            self._check_file(job.plan, asked)
        except (RequestError, ApiError) as error:
            job.cancel()
            raise (error if isinstance(error, ApiError) else asked.wrong(error)) from None
        return job

    def _check_file(self, plan: Plan, asked: Wanted) -> None:
        """Raise ApiError before anything is drawn where the file has no room for the metadata or the size."""
        last = (plan if plan.then is None else plan.then).request
        size = last.per_image("width")[0], last.per_image("height")[0]
        try:
            for record in self.pipe.records(plan):
                carried(public(record), size, asked.form.upper())
        except RequestError as error:
            raise ApiError(400, str(error), "output_format") from None

    def why(self, error: BaseException, asked: Wanted) -> ApiError:
        """The answer to a request that was not drawn; what nobody expects goes to the log."""
        if isinstance(error, RequestError):
            return asked.wrong(error)
        if isinstance(error, QueueFull):
            return ApiError(429, str(error), retry_after=error.retry_after)
        if isinstance(error, Stopping):
            return ApiError(503, "the server is stopping; try again, here later or elsewhere", retry_after=self.grace)
        if isinstance(error, TimedOut):
            return ApiError(504, "it was not done in time; draw less at once, or when less is asked for")
        if isinstance(error, Cancelled):
            return ApiError(499, "it was cancelled")
        if isinstance(error, BackendError):
            code = "out_of_memory" if str(error).startswith("out of memory") else "backend_error"
            return ApiError(503, str(error), code=code, retry_after=1.0)
        LOG.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed; its log says why")


@dataclass(frozen=True, slots=True)
class Drawing:
    """A request that was submitted: what it will be answered with, and the events that come."""

    drawer: Drawer
    asked: Wanted
    answers: Answers
    told: "asyncio.Queue[Event]"
    visit: Visit
    began: float = field(default_factory=perf_counter)

    async def done(self, request: Request) -> Done | None:
        """Wait for the pictures; None where the client left before. Raises ApiError."""
        last, gone = asyncio.create_task(self._last()), asyncio.create_task(_left(request))
        try:
            await asyncio.wait({last, gone}, return_when=asyncio.FIRST_COMPLETED)
            event = last.result() if last.done() else None
        finally:
            last.cancel()
            gone.cancel()
        if isinstance(event, Failed):
            raise self.drawer.why(event.error, self.asked)
        return event

    async def _last(self) -> Done | Failed:
        while True:
            event = await self.told.get()
            if isinstance(event, Done | Failed):
                return event

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, up to the pictures or an error."""
        self.visit.ended = "left"
        while True:
            try:
                event = await asyncio.wait_for(self.told.get(), QUIET)
            except TimeoutError:
                yield b": still there\n\n"
                continue
            if isinstance(event, Done):
                self.visit.ended = ""
                yield await asyncio.to_thread(self.answers.completed, event)
                return
            if isinstance(event, Failed):
                error = self.drawer.why(event.error, self.asked)
                self.visit.ended = error.code_name
                yield error_event(error.body())
                return
            if isinstance(event, Partial):
                made = await asyncio.to_thread(self.answers.partial, event)
                if event.index == 0:
                    self.drawer.metrics.first_partial(perf_counter() - self.began)
            else:
                made = self.answers.progress(event)
            if made:
                yield made


def _given_up(submitted: "asyncio.Future[Job]") -> None:
    """Cancel a job whose client left before it had one."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


async def _left(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """An answer of events, whose drawing is closed behind it however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], stack: AsyncExitStack) -> None:
        super().__init__(events, headers={"X-Accel-Buffering": "no"})
        self.stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        async with self.stack:
            await super().__call__(scope, receive, send)
