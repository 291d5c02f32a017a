"""The server: a pipeline, its engine and the HTTP interface in one process, from binding a port to a graceful end."""

import asyncio
import logging
import signal
import socket
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import FrameType
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from s3dit.errors import RequestError
from s3dit.serve.api import Api
from s3dit.serve.bounds import Limits
from s3dit.serve.connection import Connection
from s3dit.serve.door import LOOPBACK, Door
from s3dit.serve.drawing import Drawer
from s3dit.serve.engine import Engine
from s3dit.serve.fields import Fields
from s3dit.serve.metrics import Metrics
from s3dit.terminal import say

# Connections at a time; more get 503 at once, or are cut. And files that are open beside these.
MOST_CONNECTIONS, OWN_FILES = 1024, 256
# Seconds in which answers that are made are still sent at the end.
SENDING = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a server behaves; what the engine does is the engine's.

    name: of the model, as clients call it · key: digest of the one that clients must have · hosts, origins: beside its
    own · scales: of adapters that act unless a request says otherwise · grace: seconds that what runs has to finish at
    the end · log_prompts: whether the log holds prompts.
    """

    name: str
    limits: Limits = Limits()
    key: bytes | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    grace: float = 30.0
    log_prompts: bool = False


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, not yet listening: clients are refused until there is something to hear them.

    Raises RequestError.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        raise _not_bound(host, port, error) from None
    return sock


def _not_bound(host: str, port: int, error: Exception) -> RequestError:
    """What to say of an address that cannot be had."""
    why = getattr(error, "strerror", None) or error
    return RequestError(f"--host {host} --port {port} cannot be bound ({why}); choose another port")


def is_local(address: str) -> bool:
    """Whether only this machine reaches an IP address."""
    return ip_address(address).is_loopback


def _connections() -> int:
    """Connections at a time: as many as there may be files, of which the process takes more where it has too few."""
    try:
        from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit
    except ImportError:
        return MOST_CONNECTIONS
    wanted = MOST_CONNECTIONS + OWN_FILES
    soft, hard = (wanted if number == RLIM_INFINITY else number for number in getrlimit(RLIMIT_NOFILE))
    if soft < wanted:
        soft = min(wanted, hard)
        setrlimit(RLIMIT_NOFILE, (soft, getrlimit(RLIMIT_NOFILE)[1]))
    return max(1, min(MOST_CONNECTIONS, soft - OWN_FILES))


def url_of(sock: socket.socket) -> str:
    """Where a server is found."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def interface(engine: Engine, serving: Serving, metrics_of_all: Callable[[], Awaitable[bytes]] | None = None) -> Api:
    """The HTTP interface of an engine; metrics_of_all: what /metrics answers where there are several."""
    pipe = engine.pipe
    fields = Fields(serving.name, serving.limits, pipe.lora.names, pipe.numerics)
    metrics = Metrics(engine.stats, lambda: engine.alive)
    drawer = Drawer(engine, pipe, serving.limits, metrics, pipe.lora.names, serving.scales, serving.grace)
    return Api(drawer, fields, metrics_of_all)


def application(api: Api, serving: Serving, address: str) -> Any:
    """An ASGI application: the interface with its door, and where other sites may ask, what browsers want for that.

    address: the IP address where it listens.
    """
    own = (*LOOPBACK, address) if is_local(address) else ()
    hosts = (*own, *(name.lower() for name in serving.hosts))
    app: Any = Door(
        api.app(), hosts, serving.origins, serving.key, serving.limits.body, serving.log_prompts, api.answered
    )
    if serving.origins:
        app = CORSMiddleware(
            app, allow_origins=serving.origins, allow_methods=["GET", "POST"],
            # OpenAI's client for browsers sends a dozen of its own.
            allow_headers=["*"], expose_headers=["Retry-After", "X-Request-Id", "X-Seed"],
        )  # fmt: skip
    return app


class Server(uvicorn.Server):
    """An engine behind HTTP; `run(sockets=[…])` serves until a signal, or until `should_exit` is set."""

    def __init__(self, engine: Engine, serving: Serving, sock: socket.socket) -> None:
        self.engine, self.serving, self.sock = engine, serving, sock
        self.api = interface(engine, serving)
        super().__init__(
            uvicorn.Config(
                application(self.api, serving, sock.getsockname()[0]), http=Connection, loop="asyncio", ws="none",
                lifespan="off", log_config=None, access_log=False, server_header=False, proxy_headers=False,
                # Of those that wait in the system no more are taken at a time than there are files to spare.
                limit_concurrency=_connections(), backlog=OWN_FILES // 2, timeout_graceful_shutdown=SENDING,
            )
        )  # fmt: skip

    def serve_forever(self) -> None:
        """Serve until a signal; then finish what runs within the grace, hand back what waits, and return."""
        with logged():
            self.run(sockets=[self.sock])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where; raises RequestError where another listens there since the port was bound."""
        try:
            await super().startup(sockets)
        except OSError as error:
            host, port = self.sock.getsockname()[:2]
            raise _not_bound(host, port, error) from None
        say(f"{self.serving.name} at {url_of(self.sock)} (POST /v1/images/generations, page at /); Ctrl-C stops")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the engine end, hand back what comes meanwhile, then close the door and send what was made.

        The door is open until then: /health tells those who balance loads that the server stops, and no connection is
        reset because it was not taken yet.
        """
        say(f"stopping: what is drawn has {self.serving.grace:g} s to finish; a second signal ends at once")
        self.api.stopping.set()
        ending = asyncio.create_task(asyncio.to_thread(self.engine.stop, self.serving.grace))
        while not ending.done() and not self.force_exit:
            await asyncio.wait([ending], timeout=0.1)
        if self.force_exit:
            await asyncio.to_thread(self.engine.stop, 0.0)
        await super().shutdown(sockets)
        await ending
        say("stopped")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While inside, a signal asks for a graceful end, and a second one for the end; neither is raised again."""
        with handled(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of a signal."""
        self.force_exit = self.should_exit
        self.should_exit = True


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While inside, SIGINT, SIGTERM and SIGHUP call a handler, but for what is ignored, and outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _Lines(logging.Handler):
    """Says what is logged, a line each; of an error also where it came from."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say one record."""
        say(record.getMessage())
        if record.exc_info and record.exc_info[0] is not None:
            for part in traceback.format_exception(*record.exc_info):
                for text in part.splitlines():
                    say(text)


@contextmanager
def logged() -> Iterator[None]:
    """While inside, lines of requests, and errors of the server, go to standard error."""
    ours, theirs, handler = logging.getLogger("s3dit.serve"), logging.getLogger("uvicorn.error"), _Lines()
    before = [(log, log.level, log.propagate) for log in (ours, theirs)]
    try:
        for log, level in ((ours, logging.INFO), (theirs, logging.ERROR)):
            log.addHandler(handler)
            log.setLevel(level)
            log.propagate = False
        yield
    finally:
        for log, level, propagate in before:
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate
