"""The HTTP interface: routes, what they take and what they answer.

    GET  /, /main.js, ...         the web page, whose policy lets nothing else run (page.py)
    GET  /health                  200 {"status": "ok"}; 503 {"status": "dead" | "stopping"}; needs no key
    GET  /metrics                 Prometheus text; on Ray of all replicas, with the label replica
    GET  /openapi.json            this interface as an OpenAPI 3.1 document, made of the same table of fields
    GET  /v1/models, /v1/models/ID
    GET  /v1/options              what this server draws: see below
    POST /v1/images/generations   application/json
    POST /v1/images/edits         multipart/form-data: image (or image[]), mask, reference (or reference[]), and fields

With a key, all but the page and /health want `Authorization: Bearer KEY`. Every answer has an X-Request-Id, the
client's own where it sends one. Where a client closes its connection, what it asked for is cancelled between two steps.

A field that is unknown or has no effect is an error. Errors have OpenAI's form, with `param` the field that is wrong:
    {"error": {"message": "...", "type": "invalid_request_error", "param": "size", "code": "invalid_value"}}
    400 a field · 401 the key · 403 another site's page, or a Host that is not this one · 404 a path or model ·
    413 a body, picture or part beyond its bound · 415 another content type · 429 a full queue, or more
    bytes on their way than are taken at a time (Retry-After: seconds) · 500 a failure of ours · 503 stopping
    (Retry-After), dead · 504 longer than --timeout.

The answer to a POST without `stream` (response_format b64_json):
    {"created": 1764300000, "background": "opaque", "output_format": "png", "size": "1024x1024",
     "data": [{"b64_json": "...", "seed": 7, "metadata": {...}}], "usage": {...}, "seconds": {"queue": 0.1, ...}}
metadata is what the file carries (fields of a Request; `s3dit generate --replay` draws it again), one entry a picture.
response_format "file" answers with the picture's bytes, or a zip of 1.png, 2.png, ... where n > 1.

With `stream: true` the answer is text/event-stream, each event one `event:` and one `data:` line of JSON:
    event: image_generation.partial_image    (image_edit.partial_image of edits), partial_images of each picture
    data: {"type": "image_generation.partial_image", "b64_json": "...", "partial_image_index": 0, "created_at": ...,
           "size": "1024x1024", "quality": "auto", "background": "opaque", "output_format": "png", "image_index": 0}
    event: image_generation.completed        one of each picture
    data: {"type": "image_generation.completed", "b64_json": "...", "created_at": ..., "size", "quality",
           "background", "output_format", "usage": {...}, "image_index": 0, "seed": 7, "metadata": {...},
           "seconds": {...}}
    event: error
    data: {"error": {...}}                   and the stream ends
With `progress: true` (ours; without it a client of OpenAI's sees only events that it knows) also:
    event: s3dit.queued    data: {"type": "s3dit.queued", "position": 2}      again when it changes
    event: s3dit.started   data: {"type": "s3dit.started"}
    event: s3dit.step      data: {"type": "s3dit.step", "step": 3, "steps": 8}
Lines that begin with a colon keep the connection open.

GET /v1/options answers, for the page and for programs:
    {"model": "Z-Image-Turbo", "variant": "turbo", "version": "0.1.0", "sizes": ["1024x1024", ...],
     "defaults": {"size": "1024x1024", "num_inference_steps": 8, "guidance_scale": 0.0, "solver": "euler", ...},
     "solvers": [...], "schedules": [...], "loras": [{"name": "style", "scale": 1.0, "on": false}],
     "references": 0,                          how many reference pictures the model takes; 0: none
     "limits": {"n": 10, "steps": 200, "pixels": 8388608, "side": 4096, "multiple": 16, "prompt": 32000,
                "partial_images": 3, "body": 33554432, "image_pixels": 16777216},
     "example": "a red star above a blue ring",
     "fields": {"generations": {NAME: JSON schema with "description", ...}, "edits": {...}}}

Of a `mask`, what is transparent is painted anew, as OpenAI has it; of one without transparent pixels, what is white
(of `mask_image` always). lora: "style", {"name": "style", "scale": 0.8}, or a list of these; names as in /v1/options.
In edits every field but files is text: numbers, true and false, lists and objects as JSON.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from time import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from s3dit.control import shown
from s3dit.serve.door import Visit
from s3dit.serve.drawing import Drawer, EventStream
from s3dit.serve.errors import ApiError
from s3dit.serve.fields import FILES, Door, Fields
from s3dit.serve.forms import LONGEST_TEXT, Part, fields_of, parts_of
from s3dit.serve.openapi import document
from s3dit.serve.options import options, sees
from s3dit.serve.page import HEADERS, files
from s3dit.serve.wanted import Wanted, wanted
from s3dit.weights.json_files import parse_json

# Bodies that are unpacked and planned at a time, each of which may take as much memory as its bounds allow; and as many
# of the longest may be on their way. Who sends slowly takes no place but that of the bytes that have come.
READERS = 16
# Where the handlers of `Api` are found, in their order.
PATHS = (
    "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/models/{name:path}", "/v1/options",
    "/v1/images/generations", "/v1/images/edits",
)  # fmt: skip
# What events are called, by the door of their request.
KINDS: dict[Door, str] = {"generations": "image_generation", "edits": "image_edit"}


@dataclass(frozen=True, slots=True)
class Api:
    """The handlers of a server; `app` makes an ASGI application of them, before which `door.Door` stands.

    metrics_of_all: what /metrics answers where there are several servers; None: the metrics of this one.
    """

    drawer: Drawer
    fields: Fields
    metrics_of_all: Callable[[], Awaitable[bytes]] | None = None
    readers: asyncio.Semaphore = field(default_factory=partial(asyncio.Semaphore, READERS))
    coming: dict[int, int] = field(default_factory=dict)
    began: float = field(default_factory=time)
    stopping: threading.Event = field(default_factory=threading.Event)

    def app(self) -> Starlette:
        """The routes."""
        handlers = dict(zip(PATHS, (
            self.health, self.metrics, self.openapi, self.models, self.model, self.options, self.generations,
            self.edits,
        ), strict=True)) | dict.fromkeys(files(), self.page)  # fmt: skip
        routes = [
            Route(path, handler, methods=["POST" if path.startswith("/v1/images") else "GET"])
            for path, handler in handlers.items()
        ]
        errors: Any = {ApiError: _refused, HTTPException: _not_routed, ClientDisconnect: _left, 500: _failed}
        app = Starlette(routes=routes, exception_handlers=errors)
        # To another scheme than the proxy's before it, and a redirect is no answer of this interface.
        app.router.redirect_slashes = False
        return app

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count an answer, under paths and methods that there are, lest what strangers try piles up."""
        served = path in PATHS or path in files()
        known = path if served else "/v1/models/{name:path}" if path.startswith("/v1/models/") else "other"
        self.drawer.metrics.answered(method if method in ("GET", "POST") else "other", known, status, seconds)

    async def page(self, request: Request) -> Response:
        """A file of the web page."""
        content, kind = files()[request.url.path]
        return Response(content, media_type=kind, headers=HEADERS)

    async def health(self, request: Request) -> Response:
        """Whether requests are drawn."""
        status = "stopping" if self.stopping.is_set() else "ok" if self.drawer.engine.alive else "dead"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """The metrics, for Prometheus."""
        whole = await self.metrics_of_all() if self.metrics_of_all else self.drawer.metrics.text()
        return Response(whole, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """This interface as a document."""
        return JSONResponse(document(self.fields))

    async def models(self, request: Request) -> Response:
        """The one model, in a list."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The one model."""
        name = request.path_params["name"]
        if name != self.fields.model:
            there = f"there is {self.fields.model}"
            raise ApiError(404, f"no model {shown(name)}; {there}", "model", "model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.fields.model, "object": "model", "created": int(self.began), "owned_by": "s3dit"}

    async def options(self, request: Request) -> Response:
        """What this server draws."""
        return JSONResponse(options(self.drawer.pipe, self.fields, self.drawer.scales))

    async def generations(self, request: Request) -> Response:
        """Draw from a prompt."""
        _check_kind(request, "application/json")
        most = min(self.fields.limits.body, LONGEST_TEXT)
        return await self._answer(request, "generations", most, self._of_json)

    async def edits(self, request: Request) -> Response:
        """Redraw pictures that come in a form."""
        content = _check_kind(request, "multipart/form-data")
        return await self._answer(request, "edits", self.fields.limits.body, partial(self._of_form, content))

    def _of_json(self, body: bytes) -> Wanted:
        """What a body of JSON asks for; raises ApiError."""
        try:
            sent = parse_json(body)
        except ValueError as error:
            raise ApiError(
                400, f"the body is no JSON ({error}); send an object of fields", code="invalid_body"
            ) from None
        if not isinstance(sent, dict):
            raise ApiError(400, f"the body is {shown(sent)}; needed a JSON object of fields", code="invalid_body")
        return wanted(self.fields, self.fields.checked(sent, "generations"), (), sees(self.drawer.pipe))

    def _of_form(self, content: str, body: bytes) -> Wanted:
        """What a form asks for; raises ApiError."""
        parts = parts_of(content, body)
        files = [part for part in parts if part.name.removesuffix("[]") in FILES]
        _check_files(parts, files)
        schemas = {name: each.schema for name, each in self.fields.of("edits").items()}
        texts = [part for part in parts if part not in files]
        given = self.fields.checked(fields_of(texts, schemas), "edits")
        return wanted(self.fields, given, files, sees(self.drawer.pipe))

    @asynccontextmanager
    async def _body(self, request: Request, most: int) -> AsyncIterator[bytes]:
        """The body, if it has at most so many bytes and comes in time; raises ApiError."""
        body, limits = bytearray(), self.fields.limits
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    self.coming[id(body)] = len(body)
                    if len(body) > most:
                        raise ApiError(413, f"the body is longer than {most:,} bytes; send less")
                    if sum(self.coming.values()) > READERS * limits.body:
                        raise ApiError(429, "too much is being sent at a time; try again", code="busy", retry_after=1.0)
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {limits.body_seconds:g} s; send less, or faster") from None
        else:
            yield bytes(body)
        finally:
            self.coming.pop(id(body), None)

    async def _answer(self, request: Request, door: Door, most: int, read: Callable[[bytes], Wanted]) -> Response:
        """Read a body of at most so many bytes, have drawn what it asks for, and answer as it says; raises ApiError."""
        visit: Visit = request.scope["visit"]
        async with AsyncExitStack() as stack:
            async with self._body(request, most) as body, self.readers:
                asked = await asyncio.to_thread(read, body)
                visit.user, visit.prompt = asked.user, str(asked.request.prompt)
                drawing = await stack.enter_async_context(self.drawer.drawing(asked, KINDS[door], visit))
            if asked.stream:
                return EventStream(drawing.events(), stack.pop_all())
            done = await drawing.done(request)
            if done is None:
                raise ClientDisconnect
            if asked.as_file:
                kind, content = await asyncio.to_thread(drawing.answers.file, done)
                seeds = ",".join(str(record["seed"]) for record in done.result.metadata)
                return Response(content, media_type=kind, headers={"X-Seed": seeds})
            # Base64 of large pictures takes a while: not in the loop that all others wait for.
            made = await asyncio.to_thread(lambda: json.dumps(drawing.answers.whole(done)))
            return Response(made, media_type="application/json")


def _check_kind(request: Request, needed: str) -> str:
    """The content type of a body of this kind, in full; raises ApiError for another, and for fields outside of it."""
    content, coding = (request.headers.get(f"content-{name}", "") for name in ("type", "encoding"))
    if content.partition(";")[0].strip().lower() != needed:
        raise ApiError(415, f"content type is {shown(content)}; needed {needed}")
    if coding.strip().lower() not in ("", "identity"):
        raise ApiError(415, f"content encoding is {shown(coding)}; needed none: the body as it is")
    for name in request.query_params:
        text = f"{shown(name)} is in the URL; needed every field in the body"
        raise ApiError(400, text, name[:80], "unknown_parameter")
    return content


def _check_files(parts: Sequence[Part], files: Sequence[Part]) -> None:
    """Raise ApiError where a picture is no file, a file no picture, or there is none."""
    for part in parts:
        if part.is_file != (part in files):
            found, needed = ("text", "a file: the picture itself") if part in files else ("a file", "text")
            raise ApiError(400, f"{shown(part.name)} is {found}; needed {needed}", part.name[:80])
    if not any("mask" not in part.name for part in files):
        raise ApiError(400, "image is missing; needed the picture to edit, as a file", "image", "missing_parameter")


async def _refused(request: Request, error: Exception) -> Response:
    """The answer that an ApiError is."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _not_routed(request: Request, error: Exception) -> Response:
    """The answer to a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} is not served" if error.status_code == 405 else "there is nothing"
    said = ApiError(error.status_code, f"{text} at this path; see /openapi.json")
    return JSONResponse(said.body(), said.status, error.headers)


async def _left(request: Request, error: Exception) -> Response:
    """What nobody reads: the client has closed the connection."""
    return await _refused(request, ApiError(499, "the client left"))


async def _failed(request: Request, error: Exception) -> Response:
    """The answer to a failure of ours, which the log describes and the client does not learn."""
    return await _refused(
        request, ApiError(500, f"the server failed; its log has more under {request.scope['visit'].id}")
    )
