"""The server on a Ray cluster: replicas, each an engine behind the interface of `api`, and before them Ray's proxy.

Ray Serve starts a Replica in a process of its own, as many as asked for or as the load wants, hands each request to one
that has few, asks each whether it draws, and replaces one that does not or whose process ends. The proxy is on every
machine that has a replica, and forwards events as they are sent and connections that are closed. `serve_forever` stays
with it: a signal stops the engines as it stops that of one process, then Ray Serve.

A replica is sent the options of the model, and of a key its digest alone. Files must be on every machine under the same
names.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayError

from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.runtime.ray_cluster import connected, needs, room
from s3dit.serve.door import App, Receive, Scope, Send
from s3dit.serve.engine import DIED, Engine
from s3dit.serve.errors import ApiError
from s3dit.serve.server import MOST_CONNECTIONS, SENDING, Serving, application, handled, interface, logged
from s3dit.terminal import say

# The name of the application and of its one deployment, as Ray shows them.
NAME, DEPLOYMENT = "s3dit", "Replica"
# Where Ray Serve is found if it runs on a cluster.
CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}
# Seconds between looks at how many replicas run, of the metrics of all, and beside --timeout of a request in the proxy.
LOOK, GATHERING, PROXY = 1.0, 5.0, 90.0
ERRORS = {f"{kind.__module__}.{kind.__name__}: ": kind for kind in (RequestError, CheckpointError, BackendError)}


class Replica:
    """A server without a listener; Ray's proxy hands requests to its ASGI application."""

    def __init__(self, opened: Callable[[], tuple[Engine, Serving]], address: str) -> None:
        """opened: loads a model · address: where the proxy listens."""
        self.logs = ExitStack()
        self.logs.enter_context(logged())
        self.engine, self.serving = opened()
        self.api, self.address = interface(self.engine, self.serving, self._metrics_of_all), address
        self.id = serve.get_replica_context().replica_id.unique_id

    def __serve_build_asgi_app__(self) -> App:
        """The application, for Ray."""
        return _Forwarded(application(self.api, self.serving, self.address))

    def check_health(self) -> None:
        """Raise what Ray replaces this replica for: an engine that died, though nobody stopped it."""
        if not self.engine.alive and not self.api.stopping.is_set():
            raise BackendError(DIED)

    def name(self) -> str:
        """What clients call the model."""
        return self.serving.name

    async def stop(self, grace: float) -> None:
        """Hand back what waits and what comes; what runs has the grace."""
        self.api.stopping.set()
        await asyncio.to_thread(self.engine.stop, grace)

    def metrics(self) -> tuple[str, list[Metric]]:
        """The id of this replica and its metrics."""
        return self.id, self.api.drawer.metrics.families()

    async def _metrics_of_all(self) -> bytes:
        """The metrics of all replicas; raises ApiError."""
        asked = serve.get_deployment_handle(DEPLOYMENT, NAME).broadcast("metrics")
        try:
            found = await asked.results_async(timeout_s=GATHERING, return_exceptions=True)
        except TimeoutError:
            raise ApiError(503, f"a replica did not answer within {GATHERING:g} s", retry_after=GATHERING) from None
        # One that just ended is left out.
        return generate_latest(_Labelled([each for each in found if not isinstance(each, BaseException)]))


@dataclass(frozen=True, slots=True)
class _Forwarded:
    """An ASGI application behind Ray's proxy: an answer's X-Request-Id is the proxy's, which is that of the request."""

    app: App

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                pairs = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                message = {**message, "headers": pairs}
            await send(message)

        async def received() -> MutableMapping[str, Any]:
            try:
                return await receive()
            except RayError:
                # The proxy gave the request up, or ended.
                return {"type": "http.disconnect"}

        await self.app(scope, received, answer)


@dataclass(frozen=True, slots=True)
class _Labelled(Collector):
    """Metrics of several replicas, each with the label `replica`."""

    found: Iterable[tuple[str, Sequence[Metric]]]

    def collect(self) -> Iterator[Metric]:
        """Each metric once, with the samples of all."""
        whole: dict[str, Metric] = {}
        for replica, metrics in self.found:
            for metric in metrics:
                one = whole.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                one.samples += [each._replace(labels=each.labels | {"replica": replica}) for each in metric.samples]
        yield from whole.values()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """How many replicas there are, and what each takes.

    least, most: replicas; where they differ, Ray adds one when each has more than two requests for half a minute, and
    takes one away after ten minutes with fewer · threads: of a replica on a CPU, and CPUs that Ray reserves for it ·
    device: of the options of the model.
    """

    least: int
    most: int
    threads: int
    device: str | None

    def options(self, resources: dict[str, float]) -> dict[str, Any]:
        """Options of a deployment; raises BackendError where the cluster has no room for `least`."""
        needed = needs(self.device, self.threads, resources)
        if (most := room(needed, resources)) < self.least:
            raise BackendError(
                f"the cluster has room for {most} replicas of {self.threads} threads; needed {self.least}; give fewer "
                "--replicas or --worker-threads, or --replicas MIN:MAX, of which MAX may wait for machines to join"
            )
        scale: dict[str, Any] = {"num_replicas": self.least}
        if self.least < self.most:
            scale = {"autoscaling_config": {"min_replicas": self.least, "max_replicas": self.most}}
        return scale | {"ray_actor_options": {"num_cpus": needed["CPU"], "num_gpus": needed["GPU"]}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """What runs on a cluster.

    opened: loads a model in a replica · cluster: its address · host, port: where proxies listen · queue: requests that
    a proxy holds while no replica takes them · timeout, grace: seconds, of a request and of the end.
    """

    opened: Callable[[], tuple[Engine, Serving]]
    fleet: Fleet
    cluster: str
    host: str
    port: int
    queue: int
    timeout: float
    grace: float

    def serve_forever(self) -> None:
        """Serve until a signal, then end in order; raises BackendError, and what a replica raises when it loads."""
        with connected(self.cluster, show=True) as ray:
            try:
                ray.get_actor(**CONTROLLER)
            except ValueError:
                options = self.fleet.options(ray.cluster_resources())
            else:
                raise BackendError(
                    f"Ray Serve already runs on the cluster at {self.cluster}, with an address and options of its own; "
                    "needed a cluster without it: end it with `serve shutdown`, or take another cluster"
                )
            try:
                # Its controller prints the traceback of a replica that does not load; `serve status` has it, too.
                logging.getLogger("ray.serve").setLevel(logging.WARNING)
                serve.start(
                    proxy_location="EveryNode", logging_config={"log_level": "CRITICAL", "enable_access_log": False},
                    http_options={
                        "host": self.host, "port": self.port, "request_timeout_s": self.timeout + PROXY,
                    },
                )  # fmt: skip
                self._stay(self._deployed(options))
            finally:
                serve.shutdown()
        say("stopped")

    def _deployed(self, options: dict[str, Any]) -> Any:
        """A handle of the replicas, when as many draw as there are to be; raises what their loading raised."""
        deployment = serve.deployment(
            serve.ingress()(Replica), name=DEPLOYMENT, max_ongoing_requests=MOST_CONNECTIONS,
            max_queued_requests=self.queue, backpressure_config={"status_code": 429, "retry_after_s": 1.0},
            health_check_period_s=5.0, graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=self.grace + SENDING, max_constructor_retry_count=1,
            logging_config={"log_level": "WARNING", "enable_access_log": False}, **options,
        )  # fmt: skip
        try:
            return serve.run(deployment.bind(self.opened, self.host), name=NAME)
        except RuntimeError:
            raise _why(serve.status().applications[NAME]) from None

    def _stay(self, replicas: Any) -> None:
        """Until a signal say how many replicas run; then stop their engines, at once after a second signal."""
        signals: list[int] = []

        def asked(number: int, frame: FrameType | None) -> None:
            signals.append(number)

        with handled(asked), ThreadPoolExecutor(1) as threads:
            host = f"[{self.host}]" if ":" in self.host else self.host
            say(f"{replicas.name.remote().result()} at http://{host}:{self.port} of every machine that has a replica "
                "(POST /v1/images/generations, page at /); Ctrl-C stops")  # fmt: skip
            said = ""
            while not signals:
                if (now := _states()) != said:
                    say(now)
                    said = now
                time.sleep(LOOK)
            say(f"stopping: what is drawn has {self.grace:g} s to finish; a second signal ends at once")
            ending = threads.submit(self._stop, replicas, self.grace)
            while len(signals) < 2 and not ending.done():
                wait_for([ending], 0.1)
            if not ending.done():
                self._stop(replicas, 0.0)

    @staticmethod
    def _stop(replicas: Any, grace: float) -> None:
        """Stop the engines of all replicas; one that does not answer is left to Ray."""
        with suppress(TimeoutError, RayError):
            replicas.broadcast("stop", grace).results(timeout_s=grace + SENDING, return_exceptions=True)


def _states() -> str:
    """How many replicas there are in each state, in words; raises BackendError where the cluster is gone."""
    try:
        states = serve.status().applications[NAME].deployments[DEPLOYMENT].replica_states
    except (RayError, KeyError) as error:
        raise BackendError(f"the application is gone from the cluster ({type(error).__name__})") from None
    return "replicas: " + ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))


def _why(status: Any) -> Exception:
    """The error that a replica raised when it loaded, of the status of an application that was not deployed."""
    text = "\n".join([status.message, *(each.message for each in status.deployments.values())])
    for line in text.splitlines():
        for start, kind in ERRORS.items():
            if line.startswith(start):
                return kind(line.removeprefix(start))
    return BackendError(f"no replica could be started ({text.strip().splitlines()[-1]}); Ray's logs say more")
