"""Errors in the form of OpenAI's API, and which field of a request a message of the engine is about."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

# `type` of an error by its status; of others 4xx is the request's, 5xx ours.
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "service_unavailable"}
CODES = {
    400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    408: "body_timeout", 413: "too_large", 415: "unsupported_media_type", 429: "queue_full", 499: "client_closed",
    500: "server_error", 503: "stopping", 504: "timeout",
}  # fmt: skip
# An absolute path, of at least two names; those of this interface are none.
PATH = re.compile(r"(?<![\w.:/])(?!/v1/)(?:[A-Za-z]:\\|/)[^\s'\":;,()]*[/\\][^\s'\":;,()]*")


@dataclass
class ApiError(Exception):
    """An answer that is an error: its status, its message, the field that is wrong, and a code for programs.

    retry_after: seconds, of 429 and 503.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None

    @property
    def code_name(self) -> str:
        """Its code for programs: the one that it has, or that of its status."""
        return self.code or CODES.get(self.status, "error")

    def body(self) -> dict[str, Any]:
        """The answer's JSON; paths of the server's files are left out of the message."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], self.message)
        # A name that a client sent may hold half of a surrogate pair, which no encoding has.
        said = {"message": message, "param": self.param}
        said = {name: text and text.encode("utf-8", "replace").decode() for name, text in said.items()}
        return {"error": {"message": said["message"], "type": kind, "param": said["param"], "code": self.code_name}}

    @property
    def headers(self) -> dict[str, str]:
        """What stands beside the body."""
        found = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Connection": "close"}}.get(self.status, {})
        return found if self.retry_after is None else found | {"Retry-After": f"{max(1, round(self.retry_after))}"}


def of_request(error: Exception, given: Collection[str], names: Mapping[str, str]) -> ApiError:
    """What the engine says is wrong with a request, as an error 400 in the names of the API.

    given: names of the fields that the client sent · names: of the API by those of a Request, where they differ.
    """
    message = str(error)
    for own, theirs in names.items():
        message = re.sub(rf"(?<![\w./-]){own}(?![\w./-])", theirs, message)
    # A field that was sent is meant rather than one that the message advises.
    words = re.findall(r"\w+", message)
    param = next((word for word in words if word in given), None)
    return ApiError(400, message, param)
