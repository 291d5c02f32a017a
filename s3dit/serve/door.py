"""Who comes in: hosts, origins, keys, the size of bodies; and one line of the log for every request that did.

Against DNS rebinding a server on the loopback interface answers to its own names alone, whatever a page calls it by;
and a page of another site, which a browser names as the Origin, is refused everywhere unless the operator lets it in.
"""

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any
from urllib.parse import urlsplit

from s3dit.control import shown
from s3dit.serve.errors import ApiError
from s3dit.serve.page import files
from s3dit.terminal import line

LOG = getLogger(__name__)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What needs no key: the page asks for one, and who balances loads has none.
OPEN = ("/health", *files())
IDENTIFIER = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Headers of every answer: nothing of it is to be guessed at, framed or kept.
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
           "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"}  # fmt: skip


@dataclass(slots=True)
class Visit:
    """One request as the log and the metrics see it; handlers fill in what it draws, and how it ended if not well."""

    id: str
    size: str = ""
    steps: int = 0
    pictures: int = 0
    user: str | None = None
    prompt: str | None = None
    ended: str = ""


@dataclass(frozen=True, slots=True)
class Door:
    """An ASGI application around another.

    hosts: names that the server answers to, or none for any · origins: of other sites whose pages may ask · key: digest
    of the one that clients must have · body: bytes of the longest · log_prompts: whether lines of the log hold
    prompts · done: is told method, path, status and seconds of every request.
    """

    app: App
    hosts: Collection[str] = LOOPBACK
    origins: Collection[str] = ()
    key: bytes | None = field(default=None, repr=False)
    body: int = 1 << 25
    log_prompts: bool = False
    done: Callable[[str, str, int, float], None] = lambda *visit: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer with what is wrong with it."""
        if scope["type"] != "http":
            # Of the others only the lifespan is asked for.
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        sent = headers.get(b"x-request-id", "")
        visit = Visit(sent if IDENTIFIER.fullmatch(sent) else secrets.token_hex(8))
        scope["visit"], start, status = visit, time.perf_counter(), 499

        async def answer(message: MutableMapping[str, Any]) -> None:
            """Send on, with the headers of every answer."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {"X-Request-Id": visit.id, **HEADERS}
                there = {name.lower() for name, _ in message["headers"]}
                more = [(n.lower().encode(), v.encode()) for n, v in own.items() if n.lower().encode() not in there]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            self._check(scope["method"], scope["path"], headers)
            await self.app(scope, receive, answer)
        except ApiError as error:
            await refuse(error, answer)
        finally:
            seconds = time.perf_counter() - start
            LOG.info(self._line(scope, visit, status, seconds))
            self.done(scope["method"], scope["path"], status, seconds)

    def _check(self, method: str, path: str, headers: dict[bytes, str]) -> None:
        """Raise ApiError for a request that may not come in."""
        host = headers.get(b"host", "")
        if self.hosts and _name(host) not in self.hosts:
            raise ApiError(
                403, f"Host is {shown(host)}; needed {', '.join(sorted(self.hosts))}; another name is allowed with "
                "--allow-host", code="wrong_host",
            )  # fmt: skip
        origin = headers.get(b"origin")
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != host:
            raise ApiError(403, f"pages of {shown(origin)} may not ask; --allow-origin lets them", code="wrong_origin")
        if self.key is not None and path not in OPEN and not self._has_key(headers.get(b"authorization", "")):
            raise ApiError(401, "no valid API key; needed the header Authorization: Bearer KEY")
        length = headers.get(b"content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self.body:
            raise ApiError(413, f"the body has {int(length[:20]):,} bytes; needed at most {self.body:,}")

    def _has_key(self, header: str) -> bool:
        """Whether a header holds the key; takes as long for one that is nearly right."""
        scheme, _, given = header.partition(" ")
        assert self.key is not None
        return hmac.compare_digest(digest(given.strip()), self.key) and scheme.lower() == "bearer"

    def _line(self, scope: Scope, visit: Visit, status: int, seconds: float) -> str:
        """The line of the log."""
        drawn = f" {visit.pictures}x{visit.size} steps={visit.steps}" if visit.size else ""
        user = f" user={json.dumps(visit.user)}" if visit.user else ""
        prompt = f" prompt={json.dumps(visit.prompt)}" if self.log_prompts and visit.prompt is not None else ""
        ended = f" {visit.ended}" if visit.ended else ""
        text = f"{scope['method']} {scope['path']} {status} {visit.id} {seconds:.3f}s{drawn}{ended}{user}{prompt}"
        return line(text)


def digest(key: str) -> bytes:
    """The SHA-256 of a key: all that a server keeps of it."""
    return hashlib.sha256(key.encode("utf-8")).digest()


async def refuse(error: ApiError, send: Send) -> None:
    """Answer with an error."""
    body = json.dumps(error.body()).encode("ascii")
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
