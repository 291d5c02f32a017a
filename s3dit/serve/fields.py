"""The fields of the API, as one table: it checks what a client sends, and the OpenAPI document is made of it.

Most fields are those of a Request that have an option on the command line, under their names, with the Request's own
checks and help. Beside them stand OpenAI's, and the names by which vllm-omni and SGLang call some of ours. A field that
is unknown, or a value that could only be ignored, is refused. null is the same as leaving a field out.

Source: OpenAI's API reference, createImage and createImageEdit; vllm-omni and SGLang, their image protocols. Not here:
what values may be (values.py), how a Request is made of them (wanted.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal

from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.request import Request
from s3dit.serve import values
from s3dit.serve.bounds import Limits
from s3dit.serve.errors import ApiError
from s3dit.serve.values import Check, Schema, Values

Door = Literal["generations", "edits"]
DOORS: tuple[Door, ...] = ("generations", "edits")

# Fields of a Request that have another form here, or none: files, several prompts.
APART = (
    "prompt", "negative_prompt", "height", "width", "num_images_per_prompt", "num_inference_steps", "seed", "image",
    "mask_image", "reference", "region", "control", "cache", "sigmas",
)  # fmt: skip
# Those that mean something only beside a picture that is sent.
BESIDE_PICTURES = (
    "strength", "extend", "mask_mode", "mask_blur", "composite", "posterior", "reference_area", "reference_positions",
)  # fmt: skip
# Names of peers for fields of a Request.
ALIASES = {"true_cfg_scale": "cfg", "flow_shift": "shift"}
# What others have, and why it is not taken.
REFUSED = {
    "complexity": "no model here plans a picture before it draws",
    "frame_count": "one picture is drawn, and no animation",
    "frame_duration_ms": "one picture is drawn, and no animation",
    "svg": "pixels are drawn, and no vectors",
    "input_fidelity": "how much of a picture is redrawn is said by strength, from 0 to 1",
    "markup": "where a picture is painted anew is said by mask",
    "url": "nothing is fetched for a request; send the picture itself",
    "control": "ControlNets are not served",
    "num_images_per_prompt": "it is called n here",
    "steps": "it is called num_inference_steps here",
}
# Pictures of a form, each also with [] behind it.
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
    takes: str
    doors: tuple[Door, ...]


@dataclass(frozen=True, slots=True)
class Fields:
    """The table of a server.

    model: the name of what it draws with · loras: names of the adapters that a request may ask for · numerics: of the
    pipeline, which a request may say as its quality.
    """

    model: str
    limits: Limits = Limits()
    loras: tuple[str, ...] = ()
    numerics: str = "lossless"
    table: dict[str, ApiField] = field(init=False)

    def __post_init__(self) -> None:
        made = [*_openai(self), *_apart(self), *_derived()]
        object.__setattr__(self, "table", {each.name: each for each in made})

    def of(self, door: Door) -> dict[str, ApiField]:
        """The fields of one door, files left out."""
        return {name: each for name, each in self.table.items() if door in each.doors}

    def checked(self, sent: Mapping[str, Any], door: Door) -> dict[str, Any]:
        """What a client sent, without nulls, each value right by itself; raises ApiError."""
        known = self.of(door)
        given = {name: value for name, value in sent.items() if value is not None}
        for name in given:
            if name not in known:
                raise ApiError(400, self._unknown(name, door), name[:80], "unknown_parameter")
        for name in given:
            value = given[name] = _whole(given[name], known[name].schema)
            try:
                known[name].check(name, value)
            except RequestError as error:
                wrong_model = name == "model"
                status, code = (404, "model_not_found") if wrong_model else (400, None)
                raise ApiError(status, str(error), name, code) from None
        if "prompt" not in given:
            raise ApiError(400, "prompt is missing; needed what to draw, as text", "prompt", "missing_parameter")
        return given

    def _unknown(self, name: str, door: Door) -> str:
        """The message for a field that is not taken at a door."""
        if name in REFUSED:
            return f"{name} is not served: {REFUSED[name]}"
        if (file := name.removesuffix("[]") in FILES) or name in self.table:
            where = DOORS[1] if file else self.table[name].doors[0]
            return f"{name} is taken {'as a file ' * file}in POST /v1/images/{where} alone"
        near = get_close_matches(name[:80], self.of(door), 1)
        return f"there is no field {shown(name)}; " + (f"did you mean {near[0]}?" if near else "see /openapi.json")


def _whole(value: Any, schema: Schema) -> Any:
    """A number as JSON means it: 8.0 is an integer, where one is needed."""
    forms = schema.get("anyOf", [schema])
    items = next((form["items"] for form in forms if "items" in form), None)
    if isinstance(value, list) and items is not None:
        # Where the schema has no more lists, those of the value are not looked into, however deep.
        return [_whole(each, items) for each in value]
    if isinstance(value, dict):
        properties: dict[str, Schema] = next((form["properties"] for form in forms if "properties" in form), {})
        return {name: _whole(each, properties.get(name, {})) for name, each in value.items()}
    integral = isinstance(value, float) and value.is_integer()
    return int(value) if integral and any(form.get("type") == "integer" for form in forms) else value


def made(name: str, kind: Values, text: str, takes: str = "", doors: tuple[Door, ...] = DOORS) -> ApiField:
    """An ApiField of what its values may be."""
    return ApiField(name, kind[0] | {"description": text}, kind[1], takes, doors)


def _openai(server: Fields) -> Iterator[ApiField]:
    """The fields of OpenAI's API."""
    limits, generations = server.limits, DOORS[:1]
    exactness = {"exact": ("exact", "lossless"), "lossless": ("lossless",)}.get(server.numerics, ())
    yield made("prompt", values.text(limits.prompt), "what to draw", "prompt")
    kind = values.one_of((server.model,), else_why="no other is served here")
    yield made("model", kind, "the model that this server draws with, and no other")
    yield made("n", values.whole(1, limits.pictures), "pictures; seeds count up", "num_images_per_prompt")
    text = "WIDTHxHEIGHT in pixels, multiples of 16; auto is the model's own, in edits the picture's"
    yield made("size", values.size(limits.side), text)
    text = "a model draws with one quality, its own; for more steps see num_inference_steps"
    yield made("quality", values.one_of(("auto", "standard", *exactness)), text)
    kind = values.one_of(("b64_json", "file"), {"url": "pictures are not kept here"})
    yield made("response_format", kind, "pictures in the JSON, or the picture's bytes (with n > 1 a zip)")
    yield made("output_format", values.one_of(("png", "jpeg", "webp")), "of the pictures (default: png)")
    text = "quality of jpeg and webp (default: jpeg 95, webp lossless)"
    yield made("output_compression", values.whole(0, 100), text)
    kind = values.one_of(("auto", "opaque"), {"transparent": "pictures have no transparency"})
    yield made("background", kind, "pictures are opaque")
    why = "models here have no styles; say it in the prompt"
    yield made("style", values.nothing(why), why, doors=generations)
    yield made("moderation", values.one_of(("auto", "low")), "nothing is filtered here", doors=generations)
    yield made("user", values.text(512), "who asks, for the server's log")
    yield made("safety_identifier", values.text(512), "the same by its newer name")
    yield made("stream", values.SWITCH, "answer with server-sent events")
    yield made("partial_images", values.whole(0, limits.partial_images), "with stream: pictures on the way")


def _apart(server: Fields) -> Iterator[ApiField]:
    """Fields of a Request that have a form of their own here, and those of this server alone."""
    limits, says = server.limits, {spec.name: str(spec.metadata["help"]) for spec in fields(Request)}
    for name, kind in (
        ("negative_prompt", values.text(limits.prompt)),
        ("num_inference_steps", values.whole(1, limits.steps)),
        ("sigmas", values.sigmas(limits.steps)),
        ("cache", values.cache()),
    ):
        yield made(name, kind, says[name], name)
    for name in ("width", "height"):
        yield made(name, values.side(limits.side), "instead of size", name)
    text = "of the first picture, the next ones count up; or one a picture (default: random)"
    yield made("seed", values.seeds(limits.pictures), text, "seed")
    yield made("generator_device", values.one_of(("cpu",)), "noise is drawn on the CPU, whatever computes")
    text = (
        "prompts for parts of the picture, by boxes: left, top, width, height in pixels, or up to 1 in parts of sides"
    )
    yield made("region", values.regions(limits.prompt), text, "region")
    yield made("lora", values.loras(server.loras), "adapters of this server, by name, with a scale (default: 1)")
    yield made("progress", values.SWITCH, "with stream: also events of the queue and of every step")


def _derived() -> Iterator[ApiField]:
    """The fields of a Request that are the same here, and peers' other names for some."""
    for spec in fields(Request):
        if not spec.metadata["group"] or spec.name in APART:
            continue
        doors = DOORS[1:] if spec.name in BESIDE_PICTURES else DOORS
        for name in (spec.name, *(theirs for theirs, ours in ALIASES.items() if ours == spec.name)):
            yield made(name, values.of_field(spec), spec.metadata["help"], spec.name, doors)
