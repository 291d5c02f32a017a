"""The OpenAPI 3.1 document of the interface, made of the table of fields that checks what clients send."""

from typing import Any

from s3dit import __version__
from s3dit.serve.fields import FILES, Door, Fields
from s3dit.serve.values import Schema, list_schema, object_schema

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANY: Schema = {"type": "object"}
FILE: Schema = {"type": "string", "contentMediaType": "image/*", "format": "binary"}
# What is wrong, by status.
ERRORS = {
    400: "a field is wrong, unknown or has no effect here", 401: "no valid key", 403: "another host or origin",
    404: "no such model", 408: "the body took too long", 413: "a body, part or picture is beyond its bound",
    415: "another content type", 429: "the queue is full, or too much is sent at a time; Retry-After",
    500: "the server failed", 503: "stopping, or out of memory; Retry-After says when to try again",
    504: "not done in time",
}  # fmt: skip
# What a field with several files is called by OpenAI's clients.
SEVERAL = ("image", "reference")


def document(fields: Fields) -> dict[str, Any]:
    """The document of a server."""
    paths = {
        "/health": {"get": _asks("health", "Whether requests are drawn", _json("Health"), security=[], errors=(503,))},
        "/metrics": {"get": _asks("metrics", "Metrics for Prometheus", {"text/plain": {"schema": TEXT}})},
        "/v1/models": {"get": _asks("listModels", "The model, in a list", _json("Models"))},
        "/v1/models/{model}": {
            "get": _asks("retrieveModel", "The model", _json("Model"), errors=(404,))
            | {"parameters": [{"name": "model", "in": "path", "required": True, "schema": TEXT}]}
        },
        "/v1/options": {"get": _asks("options", "Defaults, sizes, adapters, limits, fields", _json("Options"))},
        "/v1/images/generations": {"post": _draws("createImage", "Draw from a prompt", "generations", fields)},
        "/v1/images/edits": {"post": _draws("createImageEdit", "Redraw pictures", "edits", fields)},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"s3dit serve: {fields.model}", "version": __version__,
            "description": "Pictures by the contract of OpenAI's images API, with more fields.",
        },
        "paths": paths,
        "security": [{}, {"key": []}],
        "components": {
            "schemas": _schemas(),
            "responses": {"Error": {"description": "What is wrong", "content": _json("Error")}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }  # fmt: skip


def _json(name: str) -> dict[str, Any]:
    """Content of JSON, by the name of its schema."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    return {str(status): {"$ref": "#/components/responses/Error"} for status in statuses}


def _asks(name: str, text: str, content: dict[str, Any], errors: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
    """An operation without a body."""
    answers = {"200": {"description": text, "content": content}} | _errors((401, 403, *errors))
    if name == "health":
        answers["503"] = {"description": "stopping, or dead", "content": content}
    return {"operationId": name, "summary": text, "responses": answers, **more}


def _draws(name: str, text: str, door: Door, fields: Fields) -> dict[str, Any]:
    """An operation that draws."""
    properties = {each.name: _or_null(each.schema) for each in fields.of(door).values()}
    kind, required = "application/json", ["prompt"]
    if door == "edits":
        kind, required = "multipart/form-data", ["prompt", "image"]
        for file in FILES:
            properties[file] = {"anyOf": [FILE, list_schema(FILE, 1, 16)]} if file in SEVERAL else FILE
    content = {
        **_json("Images"),
        "text/event-stream": {"schema": TEXT},
        **{form: {"schema": FILE} for form in ("image/png", "image/jpeg", "image/webp", "application/zip")},
    }
    return {
        "operationId": name, "summary": text,
        "requestBody": {"required": True, "content": {kind: {"schema": object_schema(required, **properties)}}},
        "responses": {"200": {"description": "The pictures", "content": content}} | {
            str(status): {"description": why, "content": _json("Error")} for status, why in ERRORS.items()
        },
    }  # fmt: skip


def _or_null(schema: Schema) -> Schema:
    """A schema that null fits, too; a description stays."""
    kind = schema.get("type")
    if isinstance(kind, str):
        choices = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
        return schema | {"type": kind if kind == "null" else [kind, "null"]} | choices
    return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}


def _schemas() -> dict[str, Schema]:
    """What is answered."""
    details = object_schema(["text_tokens", "image_tokens"], text_tokens=COUNT, image_tokens=COUNT)
    usage = object_schema(
        ["input_tokens", "output_tokens", "total_tokens"], input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT,
        input_tokens_details=details, output_tokens_details=details,
    )  # fmt: skip
    picture = object_schema(["b64_json", "seed", "metadata"], b64_json=TEXT, seed={"type": "integer"}, metadata=ANY)
    nothing = {"type": ["string", "null"]}
    error = object_schema(["message", "type", "param", "code"], message=TEXT, type=TEXT, param=nothing, code=nothing)
    model = object_schema(["id", "object", "created", "owned_by"], id=TEXT, object=TEXT, created=COUNT, owned_by=TEXT)
    return {
        "Images": object_schema(
            ["created", "data", "output_format", "size", "usage"], created=COUNT, background=TEXT, output_format=TEXT,
            size=TEXT, data=list_schema(picture, 1, 10), usage=usage, seconds=ANY,
            notes={"type": "array", "items": TEXT}, safety_identifier=TEXT,
        ),
        "Error": object_schema(["error"], error=error),
        "Model": model,
        "Models": object_schema(["object", "data"], object=TEXT, data=list_schema(model, 1, 1)),
        "Health": object_schema(["status"], status={"type": "string", "enum": ["ok", "stopping", "dead"]}),
        "Options": ANY,
    }  # fmt: skip
