"""HTTP/1.1 of one connection, as uvicorn speaks it, with an end to waiting for its client.

A body has its own bound (api.py), and what is drawn the engine's. Beside these a client has ASKING seconds for the head
of a request, from the connection or the last answer on, however it sends it; and TAKING seconds to read what waits to
be sent to it, once that is more than a little. Then the connection is cut.

Source: uvicorn's H11Protocol, whose own bound is of connections that send nothing after an answer.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

ASKING, TAKING = 10.0, 300.0


class Connection(H11Protocol):
    """One connection."""

    asking, taking = ASKING, TAKING

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._seconds: float | None = None
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came; there are no more than may be, whose requests uvicorn would still read to refuse them."""
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            transport.abort()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        super().connection_lost(exc)
        self._set(None)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """An answer is made, though perhaps not sent."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """More waits to be sent than is good."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """The client has read enough for more to be sent."""
        super().resume_writing()
        self._watch()

    def _watch(self) -> None:
        """Let the time run for what the client has to do now, where that is another thing than before."""
        answering = self.cycle is not None and not self.cycle.response_complete
        seconds = self.taking if self.flow.write_paused else None if answering else self.asking
        if seconds != self._seconds:
            self._set(seconds)

    def _set(self, seconds: float | None) -> None:
        if self._end is not None:
            self._end.cancel()
        self._seconds = seconds
        self._end = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
