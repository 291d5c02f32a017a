"""From the fields and pictures that a client sent to what is asked of the engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from s3dit.errors import RequestError
from s3dit.model.tokenizer import Tokenizer
from s3dit.plan import Plan
from s3dit.request import Request
from s3dit.serve import values
from s3dit.serve.bounds import Limits
from s3dit.serve.errors import ApiError, of_request
from s3dit.serve.fields import Fields
from s3dit.serve.forms import Part
from s3dit.serve.pictures import Form, Unpacker

# Tokens of the template around a prompt, and more.
ROOM = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A request of a client: what to draw, and how to answer.

    given: names of the fields that were sent · names: of the API by those of the Request, where they differ · loras:
    scale by name of the adapters that it asks for · compression: of jpeg and webp, or None for the format's own.
    """

    request: Request
    given: frozenset[str]
    names: Mapping[str, str]
    loras: Mapping[str, float]
    form: Form = "png"
    compression: int | None = None
    as_file: bool = False
    stream: bool = False
    partial_images: int = 0
    progress: bool = False
    user: str | None = None

    def wrong(self, error: Exception) -> ApiError:
        """What the engine says is wrong with the request, as an answer."""
        return of_request(error, self.given, self.names)


def wanted(fields: Fields, given: Mapping[str, Any], parts: Sequence[Part], sees: bool) -> Wanted:
    """Make a Wanted of checked fields, and of files; raises ApiError for what does not go together.

    sees: whether the model looks at reference pictures.
    """
    answer = _answer(given)
    asked: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in given.items():
        if takes := fields.table[name].takes:
            if takes in asked:
                raise ApiError(400, f"both {names.get(takes, takes)} and {name} are given; needed one of them", name)
            asked[takes] = value
            names |= {takes: name} if takes != name else {}
    asked |= _size(given)
    if (region := asked.get("region")) is not None:
        several = region if isinstance(region, list) else [region]
        asked["region"] = [values.region_of("region", each) for each in several]
    asked |= _pictures(parts, fields.limits, sees, names, "strength" in given)
    loras = values.scales_of("lora", given["lora"], fields.loras) if "lora" in given else {}
    sent = frozenset({*given, *(part.name.removesuffix("[]") for part in parts)})
    try:
        request = Request(**asked)
        _check_pixels(request, fields.limits)
    except RequestError as error:
        raise of_request(error, sent, names) from None
    return Wanted(request=request, given=sent, names=names, loras=loras, **answer)


def _answer(given: Mapping[str, Any]) -> dict[str, Any]:
    """How to answer, of the fields that say it; raises ApiError."""
    form, stream = given.get("output_format", "png"), given.get("stream", False)
    as_file = given.get("response_format") == "file"
    if "output_compression" in given and form == "png":
        raise ApiError(
            400, "output_compression is given for png, which has none; give output_format jpeg or webp too",
            "output_compression",
        )  # fmt: skip
    if given.get("user") and given.get("safety_identifier"):
        raise ApiError(400, "both user and safety_identifier are given; needed one of them", "user")
    for name in ("partial_images", "progress"):
        if given.get(name) and not stream:
            raise ApiError(400, f"{name} is given without stream; give stream true, or leave {name} out", name)
    if as_file and stream:
        raise ApiError(400, "response_format is file, and events hold no files; leave one of them out", "stream")
    return {
        "form": form, "compression": given.get("output_compression"), "as_file": as_file, "stream": stream,
        "partial_images": given.get("partial_images", 0), "progress": given.get("progress", False),
        "user": given.get("safety_identifier") or given.get("user"),
    }  # fmt: skip


def _size(given: Mapping[str, Any]) -> dict[str, int]:
    """Width and height of the field size; raises ApiError where they are given as well."""
    if "size" in given and ("width" in given or "height" in given):
        raise ApiError(400, "both size and width or height are given; needed one of them", "size")
    sides = values.size_of(given.get("size"))
    return {} if sides is None else {"width": sides[0], "height": sides[1]}


def _pictures(parts: Sequence[Part], limits: Limits, sees: bool, names: dict[str, str], strong: bool) -> dict[str, Any]:
    """The fields of a Request that hold pictures; `names` learns what they are called here. Raises ApiError.

    The first `image` is the start image where a mask or a strength says so, or the model sees no references; all others
    are references.
    """
    if len(parts) > limits.images:
        raise ApiError(413, f"there are {len(parts)} pictures; needed at most {limits.images}; leave some out", "image")
    unpack, found = Unpacker(limits.image_pixels), dict[str, Any]()
    by_name: dict[str, list[Part]] = {}
    for part in parts:
        by_name.setdefault(part.name.removesuffix("[]"), []).append(part)
    masks = [name for name in ("mask", "mask_image") if name in by_name]
    if len(masks) > 1 or any(len(by_name[name]) > 1 for name in masks):
        raise ApiError(400, "there are two masks; needed one", masks[0])
    images, references = by_name.get("image", []), by_name.get("reference", []) + by_name.get("reference_image", [])
    starts = images[:1] if masks or strong or not sees else []
    references = images[len(starts) :] + references
    if references and not sees:
        raise ApiError(
            400, "this model redraws one image and looks at no references (Omni and Edit models do); send one image",
            references[0].name.removesuffix("[]"),
        )  # fmt: skip
    if starts:
        found["image"] = unpack.picture("image", starts[0].content)
    if masks:
        found["mask_image"] = unpack.mask(masks[0], by_name[masks[0]][0].content)
        names["mask_image"] = masks[0]
    if references:
        found["reference"] = [unpack.picture(part.name.removesuffix("[]"), part.content) for part in references]
    return found


def _check_pixels(request: Request, limits: Limits) -> None:
    """Hold the pixels of all pictures, and their sides, to the server's bounds, as far as they are known.

    Raises RequestError. An edit that says no size has that of its start image.
    """
    own = request.image.size if isinstance(request.image, Image) else (0, 0)
    sides = zip(request.per_image("width"), request.per_image("height"), strict=True)
    pairs = [(width or own[0] // 16 * 16, height or own[1] // 16 * 16) for width, height in sides]
    times = request.upscale or 1
    if (longest := max(map(max, pairs)) * times) > limits.side:
        raise RequestError(f"size gives a side of {longest:,.0f} pixels; needed at most {limits.side:,}; draw less")
    area = sum(width * height for width, height in pairs) * times**2
    if area > limits.pixels:
        raise RequestError(f"size gives {area:,.0f} pixels in all; needed at most {limits.pixels:,}; draw less at once")


def check_texts(request: Request, tokenizer: Tokenizer) -> None:
    """Refuse a prompt whose end would be cut off; raises RequestError."""
    most, texts = request.max_sequence_length, {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    texts |= {f"region {i} prompt": region.prompt for i, region in enumerate(request.regions()[0], 1)}
    for name, text in texts.items():
        # No text has more tokens than bytes, so the short ones are not looked at.
        if isinstance(text, str) and 4 * len(text) + ROOM > most:
            references = len(request.references()[0])
            count = max(map(len, tokenizer.segments(text, references, 4 * len(text) + ROOM)))
            if count > most:
                raise RequestError(f"{name} has {count} tokens; needed at most {most}; shorten it, or give "
                                   f"max_sequence_length {count}")  # fmt: skip


def check_plan(plan: Plan, limits: Limits) -> None:
    """Refuse a plan whose size, which may be a picture's, is beyond the bound, and fields without effect.

    Raises RequestError.
    """
    last = plan if plan.then is None else plan.then
    _check_pixels(last.request, limits)
    for note in plan.unused:
        # Others say that something is odd, or are about the server's own settings.
        if " no effect" in note and not note.startswith("numerics"):
            raise RequestError(note)
