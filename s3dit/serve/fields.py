"""The fields of the API, as one table: it checks what a client sends, and the OpenAPI document is made of it.

Most fields are those of a Request that have an option on the command line, under their names, with the Request's own
checks and help. Beside them stand OpenAI's, and the names by which vllm-omni and SGLang call some of ours. A field that
is unknown, or a value that could only be ignored, is refused. null is the same as leaving a field out.

Source: OpenAI's API reference, createImage and createImageEdit; vllm-omni and SGLang, their image protocols.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, get_args

from s3dit import guidance_options, values
from s3dit.cache import THRESHOLDS
from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.request import Request
from s3dit.serve.errors import ApiError
from s3dit.serve.limits import Limits

Door = Literal["generations", "edits"]
Schema = dict[str, Any]
Check = Callable[[str, Any], None]

# Fields of a Request that have another form here, or none: files, several prompts.
APART = (
    "prompt", "negative_prompt", "height", "width", "num_images_per_prompt", "num_inference_steps", "seed", "image",
    "mask_image", "reference", "region", "control", "cache",
)  # fmt: skip
# What only means something beside a picture that is sent.
EDITS = (
    "strength", "extend", "mask_mode", "mask_blur", "composite", "posterior", "reference_area", "reference_positions",
)  # fmt: skip
# Names of peers for fields of a Request.
ALIASES = {"true_cfg_scale": "cfg", "flow_shift": "shift"}
# What OpenAI has and this cannot do, and why.
REFUSED = {
    "complexity": "no model here plans a picture before it draws",
    "frame_count": "one picture is drawn, and no animation",
    "frame_duration_ms": "one picture is drawn, and no animation",
    "svg": "pixels are drawn, and no vectors",
    "input_fidelity": "how much of a picture is kept is said by strength, from 0 to 1",
    "markup": "where a picture is painted anew is said by mask",
    "url": "nothing is fetched for a request; send the picture itself",
    "control": "ControlNets are not served",
    "num_images_per_prompt": "it is called n here",
    "steps": "it is called num_inference_steps here",
    "size_w": "it is called width here",
}
FILES = ("image", "mask", "mask_image", "reference", "reference_image")


@dataclass(frozen=True, slots=True)
class ApiField:
    """A field that clients send.

    schema: of its values in JSON, with a description · check(name, value) raises RequestError · takes: the field of a
    Request that gets the value, or none · doors: where it is taken.
    """

    name: str
    schema: Schema
    check: Check
    takes: str = ""
    doors: tuple[Door, ...] = ("generations", "edits")


def number_schema(low: float, high: float, kind: str = "number") -> Schema:
    """The schema of a number."""
    return {"type": kind, "minimum": low, "maximum": high}


def several_schema(items: Schema, least: int, most: int) -> Schema:
    """The schema of a list."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def schema_of(spec: "Field[Any]") -> Schema:
    """The schema of a Request's field, one value of it, made from its kind and bounds."""
    kind, bounds = spec.metadata["kind"], spec.metadata["bounds"]
    if kind is values.CHOICE:
        return {"type": "string", "enum": list(get_args(bounds[0]))}
    if kind is values.SCALES:
        return {"anyOf": [number_schema(*bounds), several_schema(number_schema(*bounds), 1, values.MOST_STEPS)]}
    if kind is guidance_options.VARIED:
        return {"anyOf": [number_schema(0, 10), {"type": "string", "maxLength": guidance_options.LONGEST}]}
    made: dict[Any, Callable[[], Schema]] = {
        values.INTEGER: lambda: number_schema(*bounds, kind="integer"),
        values.NUMBER: lambda: number_schema(*bounds),
        values.LIMIT: lambda: {"anyOf": [{"type": "boolean"}, number_schema(*bounds)]},
        values.SWITCH: lambda: {"type": "boolean"},
        values.SIGMAS: lambda: several_schema(number_schema(0, 1), 1, values.MOST_STEPS + 1),
        values.INTERVAL: lambda: several_schema(number_schema(0, 1), 2, 2),
        values.MARGINS: lambda: several_schema(number_schema(0, values.LARGEST_SIDE - 1, "integer"), 4, 4),
        values.PLACE: lambda: several_schema(number_schema(0, values.MOST_PICTURES, "integer"), 2, 2),
        guidance_options.METHOD: lambda: {"type": "string", "maxLength": guidance_options.LONGEST},
        guidance_options.SKIPPED: lambda: {"type": "string", "maxLength": guidance_options.LONGEST},
    }
    return made[kind]()


def said(schema: Schema, text: str) -> Schema:
    """A schema with a description."""
    return schema | {"description": text}


@dataclass(frozen=True, slots=True)
class Fields:
    """The table of a server: what it takes depends on its model's name, its limits and its adapters.

    loras: names of the adapters that a request may ask for.
    """

    model: str
    limits: Limits = Limits()
    loras: tuple[str, ...] = ()
    numerics: str = "lossless"
    table: dict[str, ApiField] = field(init=False)

    def __post_init__(self) -> None:
        made = [*_openai(self), *_own(self), *_derived(self.limits)]
        object.__setattr__(self, "table", {each.name: each for each in made})

    def of(self, door: Door) -> dict[str, ApiField]:
        """The fields of one door, files left out."""
        return {name: each for name, each in self.table.items() if door in each.doors}

    def checked(self, sent: Mapping[str, Any], door: Door) -> dict[str, Any]:
        """What a client sent, without nulls, each value by itself right; raises ApiError."""
        known = self.of(door)
        given = {name: value for name, value in sent.items() if value is not None}
        for name in given:
            if name not in known:
                raise ApiError(400, _unknown(name, known, self.table, door), shown(name)[1:-1], "unknown_parameter")
        for name, value in given.items():
            value = given[name] = _whole(value, known[name].schema)
            try:
                known[name].check(name, value)
            except RequestError as error:
                code = "model_not_found" if name == "model" else None
                raise ApiError(404 if name == "model" else 400, str(error), name, code) from None
        if not isinstance(given.get("prompt"), str):
            raise ApiError(400, "prompt is missing; needed what to draw, as text", "prompt", "missing_parameter")
        return given


def _whole(value: Any, schema: Schema) -> Any:
    """A number as JSON means it: 8.0 is an integer, where one is needed."""
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole and schema.get("type") == "integer" else value


def _unknown(name: str, known: Mapping[str, ApiField], table: Mapping[str, ApiField], door: Door) -> str:
    """The message for a field that is not taken here."""
    if name in REFUSED:
        return f"{name} is not served: {REFUSED[name]}"
    if name in table or name in FILES:
        return f"{name} is not taken here; it is one of POST /v1/images/{'edits' if door == 'generations' else door}"
    near = get_close_matches(name, known, 1)
    return f"there is no field {shown(name)}; " + (f"did you mean {near[0]}?" if near else "see /openapi.json")


def one_of(choices: Sequence[str], why: Mapping[str, str]) -> tuple[Schema, Check]:
    """Schema and check of a field with a few values; why: what a message says of others that are OpenAI's."""

    def check(name: str, value: Any) -> None:
        """Raise RequestError for any other value."""
        if not isinstance(value, str) or value not in choices:
            reason = why.get(value, "") if isinstance(value, str) else ""
            raise RequestError(f"{name} is {shown(value)}; needed {' or '.join(choices)}" + (reason and f": {reason}"))

    return {"type": "string", "enum": list(choices)}, check


def text_field(most: int) -> tuple[Schema, Check]:
    """Schema and check of a text with a bound of its length in characters."""

    def check(name: str, value: Any) -> None:
        """Raise RequestError for anything else."""
        if not isinstance(value, str):
            raise RequestError(f"{name} is {shown(value)}; needed text")
        if len(value) > most:
            raise RequestError(f"{name} has {len(value):,} characters; needed at most {most:,}; shorten it")
        values.texts(name, value)

    return {"type": "string", "maxLength": most}, check


def whole_field(low: int, high: int) -> tuple[Schema, Check]:
    """Schema and check of an integer."""
    return number_schema(low, high, "integer"), partial(values.integer, low=low, high=high)


def switch_field() -> tuple[Schema, Check]:
    """Schema and check of true or false."""
    return {"type": "boolean"}, values.true_or_false
