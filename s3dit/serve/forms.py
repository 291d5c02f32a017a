"""Reads multipart/form-data, whole and in memory, from a body whose size is bounded already.

No library for it is needed: a form is parts between boundaries, none inside another, bytes as they are. A reader that
spools parts to files would bound neither their number of bytes on disk nor, beside the body's bound, anything else.

Source: RFC 7578 (the form; 4.7: its parts are not encoded), RFC 2046 5.1 (boundaries), HTML (names' quotes and line
feeds are %-escapes).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s3dit.control import shown
from s3dit.serve.errors import ApiError
from s3dit.serve.values import Schema
from s3dit.weights.json_files import parse_json

BOUNDARY = re.compile(
    r'multipart/form-data\s*;.*?\bboundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))\s*(?:;|$)', re.IGNORECASE | re.DOTALL
)
DISPOSITION = re.compile(rb"content-disposition:[ \t]*form-data[ \t]*;(.*)", re.IGNORECASE)
ENCODING = re.compile(rb"content-transfer-encoding:(?![ \t]*(?:7bit|8bit|binary)[ \t]*$)", re.IGNORECASE)
PARAMETER = re.compile(
    rb'[ \t]*(name|filename|filename\*)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))[ \t]*(?:;|$)', re.IGNORECASE
)
# Parts of a form, and bytes of the header of one.
MOST_PARTS, LONGEST_HEADER = 128, 2048
# Bytes of all texts of a request: parsing JSON holds up all other threads, a second for 6 MB of empty lists.
LONGEST_TEXT = 1 << 21


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a form: its name, its bytes, and whether it is a file."""

    name: str
    content: bytes
    is_file: bool


def parts_of(content_type: str, body: bytes) -> list[Part]:
    """The parts of a form; raises ApiError."""
    found = BOUNDARY.match(content_type)
    if found is None:
        raise ApiError(415, f"content type is {shown(content_type)}; needed multipart/form-data with a boundary")
    mark = b"\r\n--" + (found[1] or found[2]).encode("latin-1", "replace")
    # What stands before the first boundary and behind the last is no part.
    pieces = (b"\r\n" + body).split(mark, MOST_PARTS + 2)
    if len(pieces) > MOST_PARTS + 2 or (len(pieces) == MOST_PARTS + 2 and not pieces[-1].startswith(b"--")):
        raise ApiError(413, f"the form has more than {MOST_PARTS} parts; leave some out")
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise ApiError(400, "the form has no closing boundary; it was cut short, or is no form", code="invalid_body")
    return [_part(piece) for piece in pieces[1:-1]]


def _part(piece: bytes) -> Part:
    """One part, from behind its boundary to the next."""
    head, blank, content = piece.lstrip(b" \t").partition(b"\r\n\r\n")
    if not blank or len(head) > LONGEST_HEADER or not head.startswith(b"\r\n"):
        raise ApiError(400, "the form has a part without a header that ends; send it anew", code="invalid_body")
    lines = re.sub(rb"\r\n[ \t]+", b" ", head[2:]).split(b"\r\n")
    found = next((match for line in lines if (match := DISPOSITION.fullmatch(line))), None)
    if any(ENCODING.match(line) for line in lines):
        raise ApiError(400, "the form has an encoded part; needed its bytes as they are", code="invalid_body")
    values = {m[1].lower(): m[2] if m[2] is not None else m[3] for m in PARAMETER.finditer(found[1] if found else b"")}
    if b"name" not in values:
        raise ApiError(400, "the form has a part without a name; send it anew", code="invalid_body")
    try:
        name = values[b"name"].decode("utf-8").replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")
    except UnicodeDecodeError:
        raise ApiError(400, "the form has a name that is no UTF-8; send it anew", code="invalid_body") from None
    return Part(name, content, len(values) > 1)


def fields_of(parts: list[Part], schemas: Mapping[str, Schema]) -> dict[str, Any]:
    """The values of the parts that are no files, by name; name[] is an entry of a list. Raises ApiError.

    schemas: of the fields that are known, whose texts are read as JSON where they are not texts.
    """
    found: dict[str, Any] = {}
    if (length := sum(len(part.content) for part in parts)) > LONGEST_TEXT:
        raise ApiError(413, f"the form's texts have {length:,} bytes; needed at most {LONGEST_TEXT:,}; send less")
    for part in parts:
        name, text = part.name.removesuffix("[]"), _text(part)
        schema = schemas.get(name, {"type": "string"})
        if part.name.endswith("[]"):
            items = next(
                (each["items"] for each in schema.get("anyOf", [schema]) if "items" in each), {"type": "string"}
            )
            found.setdefault(part.name, []).append(_value(name, text, items))
        elif name in found:
            raise ApiError(400, f"{name} is given twice; needed it once, or {name}[] for a list", name)
        else:
            found[name] = _value(name, text, schema)
    for listed in [name for name in found if name.endswith("[]")]:
        if (name := listed[:-2]) in found:
            raise ApiError(400, f"both {name} and {listed} are given; needed one of them", name)
        found[name] = found.pop(listed)
    return found


def _text(part: Part) -> str:
    """A part's text."""
    try:
        return part.content.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, f"{part.name[:80]} is no UTF-8 text; send it anew", part.name[:80]) from None


def _value(name: str, text: str, schema: Schema) -> Any:
    """The value that a text says: itself where one is needed, else JSON."""
    kinds = {each.get("type") for each in schema.get("anyOf", [schema])}
    if "string" in kinds and not text.lstrip().startswith(("[", "{") if len(kinds) > 1 else ()):
        return text
    try:
        return parse_json(text)
    except ValueError:
        needed = " or ".join(sorted(map(str, kinds - {None})))
        raise ApiError(400, f"{name} is {shown(text)}; needed {needed}, as JSON", name) from None
