"""Read and check the rows of a batch: one JSON object a line, with the fields of a Request under their own names.

A row is the operator's own, as options of the command line are: it may name files, relative to the folder of the rows.
`id` (default: the line's number) names its pictures and its result. A row without a seed has one that follows from the
seed of the batch and its id, so that whoever draws it, and whenever, draws the same. A row that is wrong is found here
or when it is drawn, and fails alone; only what would mix up results, an id that is there twice, ends the batch.

Importing this module does not import torch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from s3dit import files
from s3dit.cli.replay import RIVALS
from s3dit.control import IMAGES as CONTROL_IMAGES
from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.request import IMAGES, UNNAMED, Request
from s3dit.weights.json_files import parse_json

NEEDED = "JSON lines in UTF-8, an object of a request's fields a line"
# Bytes of a file of rows and of a line of it, and rows of a batch: all of them are held in memory.
LARGEST_ROWS, LONGEST_ROW, MOST_ROWS = 1 << 31, 1 << 20, 1_000_000
# Bytes of a name that every file system takes, with room for what is put behind it.
LONGEST_NAME = 200
# Fields of which the pictures of one pass may have values of their own, and those that may be any in all of them.
OWN = ("prompt", "negative_prompt", "seed", "height", "width")
SHARED = {
    "num_inference_steps", "guidance_scale", "cfg", "cfg_normalization", "cfg_truncation", "guidance_interval",
    "guidance_method", "sigmas", "shift", "schedule", "solver", "target_timestep", "max_sequence_length",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a batch.

    line: its number, from 1 · id · data: the request as JSON text, with its seed · digest: of all that decides what is
    drawn, files included · shares: rows with the same text may be drawn in one pass; None: alone · named: whether it
    names files · error: what is wrong with it; such a row is not drawn.
    """

    line: int
    id: str
    data: str = ""
    digest: str = ""
    shares: str | None = None
    named: bool = False
    error: str | None = None

    @property
    def name(self) -> str:
        """The name of its pictures without an ending: the id, with %-escapes for all but letters, digits, - _ . ~."""
        name = quote(self.id, safe="")
        return f"%2E{name[1:]}" if name.startswith(".") else name

    def request(self) -> Request:
        """The request; raises RequestError."""
        return request_of(json.loads(self.data))


@dataclass(frozen=True, slots=True)
class Reading:
    """What rows are read with.

    seed: of the batch · defaults: JSON values of fields that a row does not give · settings: what else decides what is
    drawn, as JSON values · hashed: the hash of a file that a row names.
    """

    seed: int
    defaults: Mapping[str, Any]
    settings: Mapping[str, Any]
    hashed: Callable[[str], str]


def read_rows(path: Path, seed: int, defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """Read and check every row of a file; empty lines are none; arguments as of Reading. Raises RequestError."""
    reading = Reading(seed, defaults, settings, cache(lambda name: _hash(path.parent, name)))
    rows: list[Row] = []
    lines: dict[str, int] = {}
    for number, text in _lines(path):
        row = _row(number, text, reading)
        if row.id in lines:
            raise RequestError(
                f"{path}:{number}: id {shown(row.id)} is that of line {lines[row.id]}; needed another for each row; a "
                "row without an id has its line's number"
            )
        lines[row.id] = number
        rows.append(row)
        if len(rows) > MOST_ROWS:
            raise RequestError(f"{path}: holds more than {MOST_ROWS:,} rows; needed fewer; cut it in several")
    if not rows:
        raise RequestError(f"{path}: holds no row; needed {NEEDED}")
    return rows


def request_of(data: Mapping[str, Any]) -> Request:
    """Make a request of JSON values; raises RequestError, which names an unknown field and the nearest one."""
    kinds = {spec.name: spec.metadata["kind"] for spec in fields(Request)}
    for name in data:
        if name in UNNAMED:
            raise RequestError(f"{name} is no value of JSON; needed a seed, and prompts as text; leave {name} out")
    try:
        values = {name: kinds[name].from_json(name, data[name]) if name in kinds else data[name] for name in data}
    except ValueError as error:
        raise RequestError(str(error).replace("replay data has", "it has")) from None
    request = Request.of(None, **values)
    if request.prompt is None and not any(request.regions()):
        raise RequestError("it has no prompt; needed one, or regions with prompts of their own")
    return request


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, by their numbers from 1. Raises RequestError."""
    with files.opened(path, NEEDED, LARGEST_ROWS) as file:
        for number, line in enumerate(file, 1):
            if text := line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                yield number, text


def _row(number: int, text: bytes, reading: Reading) -> Row:
    """Read a line; what is wrong with it becomes its error."""
    row = Row(number, str(number))
    try:
        if len(text) > LONGEST_ROW:
            raise RequestError(f"it holds {len(text):,} bytes; needed at most {LONGEST_ROW:,}")
        given = _object(text)
        row = replace(row, id=_id(given.pop("id", None), number))
        rivals = {RIVALS.get(name) for name in given} | {name for name, rival in RIVALS.items() if rival in given}
        data = {name: value for name, value in reading.defaults.items() if name not in rivals} | given
        if data.get("seed") is None:
            data["seed"] = derived_seed(reading.seed, row.id)
        request_of(data)
        named = sorted({*_files(data)})
        deciding = [data, [reading.hashed(name) for name in named], reading.settings]
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    except (RequestError, ValueError) as error:
        return replace(row, error=str(error))
    return replace(row, data=json.dumps(data), digest=digest.hexdigest(), shares=_shares(data), named=bool(named))


def derived_seed(seed: int, name: str) -> int:
    """The seed of a row without one, of 48 bits: the same wherever and whenever the row is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big")


def _object(text: bytes) -> dict[str, Any]:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise RequestError(f"it is no JSON ({error}); needed {NEEDED}") from None
    if not isinstance(data, dict):
        raise RequestError(f"it is {shown(data)}; needed {NEEDED}")
    return data


def _id(given: Any, number: int) -> str:
    """The id of a row as text; raises RequestError."""
    if given is None:
        return str(number)
    name = str(given) if isinstance(given, int) and not isinstance(given, bool) else given
    # A lone surrogate is no character of any name.
    if not isinstance(name, str) or not name or not name.encode(errors="replace").decode() == name:
        raise RequestError(f"its id is {shown(given)}; needed text or an integer")
    if len(quote(name, safe="")) > LONGEST_NAME:
        raise RequestError(
            f"its id {shown(name)} is too long for the name of a file; needed at most {LONGEST_NAME} letters, of which "
            "others than a-z, A-Z, 0-9 and -_.~ count three for each byte"
        )
    return name


def _files(data: Mapping[str, Any]) -> Iterator[str]:
    """Every picture that a row names. Not models: they are named by path, as the batch's own model is."""
    for name in (*IMAGES, "reference"):
        yield from _texts(data.get(name))
    for control in data.get("control") or ():
        yield from (path for name in CONTROL_IMAGES for path in _texts(control.get(name)))
    for entry in data.get("region") or ():
        for region in entry if isinstance(entry, list) else [entry]:
            yield from _texts(None if region is None or isinstance(region["mask"], list) else region["mask"])


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, or in its lists."""
    if isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, str):
        yield value


def _hash(folder: Path, name: str) -> str:
    """The SHA-256 of a file that a row names; raises RequestError."""
    with files.opened(os.path.join(folder, name), "a picture", LARGEST_ROWS) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _shares(data: Mapping[str, Any]) -> str | None:
    """What rows of one pass have in common, as text; None for a row that is drawn alone."""
    if not {*data} <= {*OWN, *SHARED} or not isinstance(data.get("prompt"), str) or not isinstance(data["seed"], int):
        return None
    sizes = all(isinstance(data.get(name, 0), int) for name in ("height", "width"))
    negative = data.get("negative_prompt")
    if not sizes or not isinstance(negative, str | None):
        return None
    common = {name: value for name, value in data.items() if name not in OWN}
    return json.dumps([common, negative is None, *(data.get(name) is None for name in ("height", "width"))])


def joined(requests: Sequence[Request]) -> Request:
    """One request for the pictures of rows that share."""
    first = requests[0]
    lists: dict[str, Any] = {name: [getattr(request, name) for request in requests] for name in OWN}
    return replace(first, **{name: values for name, values in lists.items() if values[0] is not None})
