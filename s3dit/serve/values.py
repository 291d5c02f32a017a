"""What the values of the API's fields may be: for each kind its JSON schema, and a check that says what is wrong.

A check is called with a field's name and a value, and raises RequestError; the schema says the same to programs. Those
of a Request's fields come from its own kinds and bounds (`of_field`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from functools import partial
from typing import Any, get_args

from s3dit import guidance_options
from s3dit import values as own
from s3dit.cache import THRESHOLDS
from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.region import FARTHEST, HEAVIEST, LIGHTEST, Region
from s3dit.request import LARGEST_SEED
from s3dit.runtime.adapter_strength import STRONGEST

Schema = dict[str, Any]
Check = Callable[[str, Any], None]
# What a field may be: for programs, and as a check.
Values = tuple[Schema, Check]

SIZE = re.compile(r"([1-9][0-9]{1,3})x([1-9][0-9]{1,3})")
MOST_LORAS = 16


def number_schema(low: float, high: float, kind: str = "number") -> Schema:
    """The schema of a number."""
    return {"type": kind, "minimum": low, "maximum": high}


def list_schema(items: Schema, least: int, most: int) -> Schema:
    """The schema of a list."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def object_schema(required: Sequence[str], **properties: Schema) -> Schema:
    """The schema of an object without further keys."""
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def of_field(spec: "Field[Any]") -> Values:
    """What a Request's field may be here, one value of it, by its kind and bounds."""
    kind, bounds = spec.metadata["kind"], spec.metadata["bounds"]

    def check(name: str, value: Any) -> None:
        """Check a value as the Request does; lists only where one value is a list."""
        if isinstance(value, list | dict) and (spec.metadata["each"] or not value):
            raise RequestError(f"{name} is {shown(value)}; needed one value")
        kind.check(name, value, *bounds)

    made: dict[Any, Callable[[], Schema]] = {
        own.CHOICE: lambda: {"type": "string", "enum": list(get_args(bounds[0]))},
        own.INTEGER: lambda: number_schema(bounds[0], bounds[1], "integer"),
        own.NUMBER: lambda: number_schema(*bounds),
        own.SCALES: lambda: {"anyOf": [number_schema(*bounds), list_schema(number_schema(*bounds), 1, own.MOST_STEPS)]},
        own.LIMIT: lambda: {"anyOf": [{"type": "boolean"}, number_schema(*bounds)]},
        own.SWITCH: lambda: {"type": "boolean"},
        own.INTERVAL: lambda: list_schema(number_schema(0, 1), 2, 2),
        own.MARGINS: lambda: list_schema(number_schema(0, own.LARGEST_SIDE - 1, "integer"), 4, 4),
        own.PLACE: lambda: list_schema(number_schema(0, own.MOST_PICTURES, "integer"), 2, 2),
        guidance_options.METHOD: lambda: {"type": "string", "maxLength": guidance_options.LONGEST},
        guidance_options.SKIPPED: lambda: {"type": "string", "maxLength": guidance_options.LONGEST},
        guidance_options.VARIED: lambda: {
            "anyOf": [number_schema(0, 10), {"type": "string", "maxLength": guidance_options.LONGEST}]
        },
    }
    return made[kind](), check


def one_of(choices: Sequence[str], why: Mapping[str, str] | None = None, else_why: str = "") -> Values:
    """One of a few words; why, else_why: what the message says of others that somebody may send."""

    def check(name: str, value: Any) -> None:
        """Raise RequestError for any other value."""
        if not isinstance(value, str) or value not in choices:
            reason = (why or {}).get(value, else_why) if isinstance(value, str) else else_why
            raise RequestError(f"{name} is {shown(value)}; needed {' or '.join(choices)}" + (reason and f": {reason}"))

    return {"type": "string", "enum": list(choices)}, check


def text(most: int) -> Values:
    """A text of so many characters at most."""

    def check(name: str, value: Any) -> None:
        """Raise RequestError for anything else."""
        if not isinstance(value, str):
            raise RequestError(f"{name} is {shown(value)}; needed text")
        if len(value) > most:
            raise RequestError(f"{name} has {len(value):,} characters; needed at most {most:,}; shorten it")
        own.texts(name, value)

    return {"type": "string", "maxLength": most}, check


def whole(low: int, high: int) -> Values:
    """An integer from low to high."""
    return number_schema(low, high, "integer"), partial(own.integer, low=low, high=high)


SWITCH: Values = {"type": "boolean"}, own.true_or_false


def size_of(value: Any) -> tuple[int, int] | None:
    """Width and height of a text such as 1024x768; None of anything else."""
    found = SIZE.fullmatch(value) if isinstance(value, str) else None
    return (int(found[1]), int(found[2])) if found else None


def size(most: int) -> Values:
    """WIDTHxHEIGHT of at most so many pixels a side, or auto."""

    def check(name: str, value: Any) -> None:
        """Raise RequestError for anything else."""
        sides = size_of(value)
        if value != "auto" and sides is None:
            raise RequestError(f"{name} is {shown(value)}; needed auto, or a width and a height such as 1024x768")
        for each in sides or ():
            side(most)[1](name, each)

    return {"type": "string", "pattern": r"^(auto|[1-9][0-9]{1,3}x[1-9][0-9]{1,3})$"}, check


def side(most: int) -> Values:
    """A height or width: a multiple of 16 up to `most`."""

    def check(name: str, value: Any) -> None:
        """Raise RequestError for anything else."""
        own.side(name, value)
        own.integer(name, value, 16, most)

    return number_schema(16, most, "integer") | {"multipleOf": 16}, check


def nothing(why: str) -> Values:
    """No value; why: what the message says of any."""

    def check(name: str, value: Any) -> None:
        """Raise RequestError."""
        raise RequestError(f"{name} is {shown(value)}; {why}")

    return {"type": "null"}, check


def seeds(most: int) -> Values:
    """A seed, or up to so many of them."""
    bounds = -(2**63), LARGEST_SEED

    def check(name: str, value: Any) -> None:
        """Raise RequestError for anything else."""
        given = value if isinstance(value, list) else [value]
        if not 1 <= len(given) <= most:
            raise RequestError(f"{name} has {len(given):,} entries; needed 1 to {most}, one a picture")
        for seed in given:
            own.integer(name, seed, *bounds)

    seed = number_schema(bounds[0], bounds[1], "integer")
    return {"anyOf": [seed, list_schema(seed, 1, most)]}, check


def sigmas(most: int) -> Values:
    """Noise levels of at most so many steps."""

    def check(name: str, value: Any) -> None:
        """Raise RequestError for anything else."""
        own.sigmas(name, value)
        if (steps := len(value) - (value[-1] == 0)) > most:
            raise RequestError(f"{name} has {steps:,} levels above 0, a step each; needed at most {most:,}")

    return list_schema(number_schema(0, 1), 1, most + 1), check


def cache() -> Values:
    """A cache as text, or as the object that a picture's metadata hold; a file of a calibration is not read."""

    def check(name: str, value: Any) -> None:
        """Raise RequestError for anything else."""
        if isinstance(value, str) and (len(value) > 100 or ".json" in value):
            raise RequestError(f"{name} is {shown(value)}; needed METHOD[:THRESHOLD][:order=N][:first=N][:last=N]")
        own.cache(name, own.cache_of(value))

    number, count = number_schema(0, 1000), number_schema(0, 1000, "integer")
    stated = object_schema(
        ["method"], method={"type": "string", "enum": list(THRESHOLDS)}, threshold=number, order=count | {"maximum": 3},
        first=count, last=count, polynomial=list_schema({"type": "number"}, 1, 8),
        magnitudes=list_schema(list_schema({"type": "number"}, 2, 2), 2, 1001),
    )  # fmt: skip
    return {"anyOf": [{"type": "string", "maxLength": 100}, stated]}, check


def regions(most_text: int) -> Values:
    """A region, or several, whose masks are boxes."""

    def check(name: str, value: Any) -> None:
        """Raise RequestError for anything else."""
        given = value if isinstance(value, list) else [value]
        if not given:
            raise RequestError(f"{name} is an empty list; needed a value")
        found = [region_of(name, each) for each in given]
        for region in found:
            text(most_text)[1](f"{name} prompt", region.prompt)
        own.regions(name, found)

    region = object_schema(
        ["mask", "prompt"], mask=list_schema(number_schema(0, FARTHEST), 4, 4),
        prompt={"type": "string", "maxLength": most_text}, weight=number_schema(LIGHTEST, HEAVIEST),
        centered={"type": "boolean"},
    )  # fmt: skip
    return {"anyOf": [region, list_schema(region, 1, own.MOST_REGIONS)]}, check


def region_of(name: str, value: Any) -> Region:
    """A Region of a JSON object; RequestError where its mask is no box, or a key is unknown or missing."""
    known = {spec.name for spec in fields(Region)}
    if not isinstance(value, dict) or not {"mask", "prompt"} <= set(value) <= known:
        raise RequestError(f"{name} is {shown(value)}; needed an object of mask, prompt, and perhaps weight, centered")
    region = Region(**value)
    if region.box is None:
        raise RequestError(f"{name} mask is {shown(region.mask)}; needed a box: left, top, width, height")
    return region


def loras(names: Sequence[str]) -> Values:
    """An adapter of these by name, or with its scale, or several."""
    name: Schema = {"type": "string", "enum": list(names)} if names else {"type": "string", "maxLength": 0}
    stated = object_schema(["name"], name=name, scale=number_schema(-STRONGEST, STRONGEST))
    lora: Schema = {"anyOf": [name, stated]}

    def check(name: str, value: Any) -> None:
        """Raise RequestError for anything else."""
        scales_of(name, value, names)

    return {"anyOf": [lora, list_schema(lora, 1, MOST_LORAS)]}, check


def scales_of(name: str, value: Any, names: Sequence[str]) -> dict[str, float]:
    """Scale by name of the adapters that a request asks for; RequestError where one is not of these names."""
    given = value if isinstance(value, list) else [value]
    found: dict[str, float] = {}
    if not 1 <= len(given) <= MOST_LORAS:
        raise RequestError(f"{name} has {len(given):,} entries; needed 1 to {MOST_LORAS}")
    for each in given:
        lora = each if isinstance(each, dict) else {"name": each}
        if "name" not in lora or set(lora) - {"name", "scale"}:
            raise RequestError(f"{name} is {shown(sorted(lora))}; needed name and perhaps scale; no file is read for a "
                               "request")  # fmt: skip
        if lora["name"] not in names:
            there = ", ".join(names) or "none"
            raise RequestError(f"{name} is {shown(lora['name'])}, which is not served here; there is {there}")
        if lora["name"] in found:
            raise RequestError(f"{name} has {lora['name']} twice; needed it once")
        found[lora["name"]] = lora.get("scale", 1.0)
        own.number(f"{name} scale", found[lora["name"]], -STRONGEST, STRONGEST)
    return found
