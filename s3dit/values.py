"""What the values of a request's fields may be: types and bounds, checked before anything of their size is allocated.

A `Kind` says how a value is checked and how the command line reads one; `request` gives each of its fields one. A check
is called with a field's name and one value of it, and raises RequestError. It knows no default: whether None is one,
and whether a list is one value or several, is the field's affair. What is wrong with several fields together is found
by `Request.check`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from typing import Any, get_args

from s3dit.cache import FORM as CACHE_FORM
from s3dit.cache import Cache
from s3dit.control import LONGEST_PATH, Control, shown
from s3dit.errors import RequestError
from s3dit.json_values import objects_from_json, objects_to_json, paths, paths_from_json, same, value_to_json
from s3dit.region import Region

# 512 patches of 16 pixels a side: what the published rotary tables were made for.
LARGEST_SIDE = 8192
# Pictures of a request, which are all drawn in one pass: four of the largest size are a million tokens, and one
# activation of the official width is then 8 GB in bf16. Their number bounds what is kept of each besides pixels.
MOST_PIXELS, MOST_PICTURES = 4 * LARGEST_SIDE**2, 1024
# Characters of a prompt, four for each token that is read at most; and of all prompts of a request.
MOST_TOKENS = 1 << 15
LONGEST_PROMPT, MOST_TEXT = 4 * MOST_TOKENS, 1 << 22
MOST_STEPS = 1000
# Each ControlNet is a model beside the transformer; each reference adds as many tokens as a picture of 1024², each
# region as many as the picture.
MOST_CONTROLS = MOST_REFERENCES = MOST_REGIONS = 16


def several(value: Any) -> bool:
    """Whether a value is several: text and bytes are one."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def as_list(value: Any) -> list[Any]:
    """The entries of a value that may be several; none of None."""
    return [] if value is None else list(value) if several(value) else [value]


def tensor_of(value: Any) -> Any:
    """An array of numpy as a tensor that shares its memory; anything else as it is."""
    import numpy as np
    import torch

    # Arrays of objects and of text stay, and are refused by name.
    return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else value


def check_floats(name: str, tensor: Any, needed: str) -> None:
    """Check that a value is a tensor of finite floats that has its numbers at hand; the message ends with `needed`."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise RequestError(f"{name} is {shown(tensor)}; needed {needed}")
    if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
        kind = f"{tensor.dtype} on {tensor.device}".removeprefix("torch.")
        kind += "" if tensor.layout == torch.strided else f", {str(tensor.layout).removeprefix('torch.')}"
        raise RequestError(f"{name} holds a tensor of {kind}; needed {needed}")
    if not tensor.isfinite().all():
        raise RequestError(f"{name} holds NaN or infinity; needed finite numbers: {needed}")


def one_by_one(given: Any) -> Any:
    """Make a list of what is several images in one: a batch of an array or tensor; anything else stays as it is."""
    return list(given) if getattr(given, "ndim", None) == 4 else given


def plain(value: Any) -> Any:
    """Numbers of numpy or torch, single or in a row or in a list, as Python's own; anything else as it is."""
    if getattr(value, "ndim", None) in (0, 1) and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple) and any(hasattr(number, "tolist") for number in value):
        return [number.tolist() if getattr(number, "ndim", None) == 0 else number for number in value]
    return value


def _number(value: Any, kind: Any = int) -> bool:
    """Whether a value is a number of Python's; a truth value is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def integer(name: str, value: Any, low: int, high: int) -> None:
    """Check that a value is an integer from low to high; a truth value is none."""
    if not _number(value) or not low <= value <= high:
        raise RequestError(f"{name} is {shown(value)}; needed an integer from {low} to {high}")


def number(name: str, value: Any, low: float, high: float) -> None:
    """Check that a value is a finite number from low to high; a truth value is none."""
    # NaN is in no range.
    if not _number(value, int | float) or not low <= value <= high:
        raise RequestError(f"{name} is {shown(value)}; needed a number from {low:g} to {high:g}")


def one_or_several(name: str, value: Any, low: float, high: float) -> None:
    """Check that a value is a number from low to high, or a list of such, one a step at most."""
    given = list(value) if several(value) and 1 <= len(value) <= MOST_STEPS else [value]
    for each in given:
        number(name, each, low, high)


def interval(name: str, value: Any) -> None:
    """Check that a value is two times, from and to, within 0 (noise) and 1 (image)."""
    given = list(value) if several(value) and len(value) == 2 else []
    if not given or not all(_number(t, int | float) for t in given) or not 0 <= given[0] <= given[1] <= 1:
        raise RequestError(f"{name} is {shown(value)}; needed two times from 0 (noise) to 1 (image), as in 0.1-0.8")


def number_or_bool(name: str, value: Any, low: float, high: float) -> None:
    """Check that a value is a number from low to high, or a truth value: False for 0, True for 1."""
    number(name, float(value) if isinstance(value, bool) else value, low, high)


def true_or_false(name: str, value: Any) -> None:
    """Check that a value is a truth value."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {shown(value)}; needed true or false")


def choice(name: str, value: Any, kind: Any) -> None:
    """Check that a value is one of the strings of a Literal."""
    if not isinstance(value, str) or value not in get_args(kind):
        raise RequestError(f"{name} is {shown(value)}; needed one of {', '.join(get_args(kind))}")


def side(name: str, value: Any) -> None:
    """Check that a value is a picture's height or width: pixels, a multiple of 16 up to LARGEST_SIDE."""
    if not _number(value):
        raise RequestError(f"{name} is {shown(value)}; needed an integer, a multiple of 16")
    if not 0 < value <= LARGEST_SIDE:
        raise RequestError(
            f"{name} is {shown(value)}; needed 16 to {LARGEST_SIDE} pixels (the model is at home in 512 to 2048)"
        )
    if value % 16:
        low = max(16, value // 16 * 16)
        near = f"{low} or {low + 16}" if low < value else f"{low}"
        raise RequestError(f"{name} is {value}, not a multiple of 16; the nearest that work are {near}")


def texts(name: str, value: Any) -> None:
    """Check that a value is a string or a list of strings, within bounds of their length and number."""
    if not isinstance(value, str) and not several(value):
        raise RequestError(f"{name} is a {type(value).__name__}; needed a string or a list of strings")
    given = [value] if isinstance(value, str) else value
    if not len(given):
        raise RequestError(f"{name} is an empty list; needed at least one string (an empty one is a prompt)")
    if len(given) > MOST_PICTURES:
        raise RequestError(f"{name} has {len(given):,} entries; needed at most {MOST_PICTURES}; draw fewer at once")
    for text in given:
        if not isinstance(text, str):
            raise RequestError(f"{name} holds a {type(text).__name__}; needed strings")
        if len(text) > LONGEST_PROMPT:
            raise RequestError(f"{name} has {len(text):,} characters; needed at most {LONGEST_PROMPT:,}; shorten it")
        if any("\ud800" <= letter <= "\udfff" for letter in (() if text.isascii() else text)):
            raise RequestError(f"{name} holds what is no Unicode text; needed UTF-8; check where it comes from")
    if (total := sum(map(len, given))) > MOST_TEXT:
        raise RequestError(
            f"{name} has {total:,} characters in all; needed at most {MOST_TEXT:,}; draw fewer at once, or shorten them"
        )


def sigmas(name: str, value: Any) -> None:
    """Check that a value is a list of noise levels: descending, within 0 and 1."""
    if not several(value):
        raise RequestError(f"{name} is {shown(value)}; needed a list of numbers such as 1, 0.75, 0.4")
    if len(value) > MOST_STEPS + 1:
        raise RequestError(f"{name} has {len(value):,} numbers; needed at most {MOST_STEPS + 1}")
    given = list(value)
    if not all(_number(entry, int | float) for entry in given):
        raise RequestError(f"{name} holds something else than numbers; needed floats between 0 and 1")
    descending = all(a > b for a, b in pairwise(given))
    if not given or not descending or not 0 < given[0] <= 1 or not given[-1] >= 0:
        raise RequestError(
            f"{name} is {shown(value)}; needed a descending list that starts at 1 or below and stays at 0 or above"
        )


def margins(name: str, value: Any) -> None:
    """Check that a value is four margins in pixels (left, top, right, bottom), at least one of which is not 0."""
    given = value if several(value) and len(value) == 4 else ()
    if not any(given) or not all(_number(margin) and 0 <= margin < LARGEST_SIDE for margin in given):
        raise RequestError(f"{name} is {shown(value)}; needed four margins in pixels: left, top, right, bottom")


def place(name: str, value: Any) -> None:
    """Check that a value is a place in a batch, from 0, and the batch's size."""
    given = value if several(value) and len(value) == 2 and all(map(_number, value)) else (0, 0)
    if not 0 <= given[0] < given[1] <= MOST_PICTURES:
        raise RequestError(
            f"{name} is {shown(value)}; needed a place from 0 and the size of the batch, up to {MOST_PICTURES}, "
            "such as 2,4"
        )


def image(name: str, value: Any) -> None:
    """Check that a value is a path, or has pixels; `inputs.images.Picture` opens it."""
    if isinstance(value, str | PathLike):
        if not 0 < len(str(value)) <= LONGEST_PATH or "\0" in str(value):
            raise RequestError(f"{name} is {shown(value)}, which is no path; needed the path of a picture")
    elif not hasattr(value, "size"):
        raise RequestError(f"{name} is {shown(value)}; needed a path, a Pillow image, an array or a tensor")


def references(name: str, value: Any) -> None:
    """Check that a value is an image, a list of them, or a list for each prompt, where None is an empty list."""
    given = value if isinstance(value, list | tuple) else [value]
    rows = [entry for entry in given if isinstance(entry, list | tuple)]
    most = MOST_PICTURES if rows else MOST_REFERENCES
    for row, bound in ((given, most), *((row, MOST_REFERENCES) for row in rows)):
        if len(row) > bound:
            raise RequestError(f"{name} has {len(row):,} entries; needed at most {bound}; leave some out")
        for entry in row:
            if entry is not None and not (row is given and isinstance(entry, list | tuple)):
                image(name, entry)


def controls(name: str, value: Any) -> None:
    """Check that a value is a Control or a list of at most MOST_CONTROLS of them, each right by itself."""
    given = [value] if isinstance(value, Control) else value
    if not isinstance(given, list | tuple) or not all(isinstance(control, Control) for control in given):
        raise RequestError(f"{name} is {shown(value)}; needed a Control, or a list of them")
    if len(given) > MOST_CONTROLS:
        raise RequestError(f"{name} has {len(given):,} entries; needed at most {MOST_CONTROLS}; leave some out")
    try:
        for control in given:
            control.check()
    except ValueError as error:
        raise RequestError(str(error)) from None


def regions(name: str, value: Any) -> None:
    """Check that a value is a Region, a list of them, or a list for each prompt, where None is an empty list."""
    given = value if isinstance(value, list | tuple) else [value]
    rows = [entry for entry in given if entry is None or isinstance(entry, list | tuple)]
    if len(rows) > MOST_PICTURES:
        raise RequestError(f"{name} has {len(rows):,} entries; needed at most {MOST_PICTURES}; draw fewer at once")
    for row in rows or [given]:
        if row is not None and len(row) > MOST_REGIONS:
            raise RequestError(f"{name} has {len(row):,} entries; needed at most {MOST_REGIONS} a picture")
    for region in (region for entry in given for region in (entry if isinstance(entry, list | tuple) else [entry])):
        if region is None:
            continue
        if not isinstance(region, Region):
            raise RequestError(f"{name} is {shown(value)}; needed a Region, a list of them, or a list for each prompt")
        try:
            region.check()
        except ValueError as error:
            raise RequestError(str(error)) from None
        if not isinstance(region.prompt, str):
            raise RequestError(f"{name} prompt is {shown(region.prompt)}; needed a string")
        texts(f"{name} prompt", region.prompt)


def cache(name: str, value: Any) -> None:
    """Check that a value is a Cache, or a text that says one."""
    try:
        if not isinstance(value, Cache):
            raise ValueError(f"{name} is {shown(value)}; needed {CACHE_FORM}, or a Cache")
        value.check()
    except ValueError as error:
        raise RequestError(str(error)) from None


def cache_of(value: Any) -> Any:
    """A Cache of a text that says one, or of its JSON; anything else as it is. Raises RequestError."""
    try:
        if isinstance(value, str):
            return Cache.parse(value)
        return Cache.from_json(value) if isinstance(value, dict) else value
    except ValueError as error:
        raise RequestError(str(error)) from None


def generators(name: str, value: Any) -> None:
    """Check that a value is a torch.Generator, or a list of them."""
    import torch

    given = value if several(value) else [value]
    if not all(isinstance(generator, torch.Generator) for generator in given):
        raise RequestError(f"{name} is {shown(value)}; needed a torch.Generator, or one a picture; or give seed")


def latents_of(value: Any) -> Any:
    """Latents as a list of tensors, one a picture, from a batch, a single one (16, H/8, W/8), a list, or arrays."""
    if value is None or isinstance(value, list | tuple):
        return value if value is None else [tensor_of(latent) for latent in value]
    tensor = tensor_of(value)
    return [tensor] if getattr(tensor, "ndim", None) == 3 else one_by_one(tensor)


def latents(name: str, value: Any) -> None:
    """Check that a value is a list of latents (16, H/8, W/8), one a picture; `one_by_one` makes one of a batch."""
    needed = "floats (pictures, 16, height/8, width/8), or a list of (16, height/8, width/8)"
    given = value if isinstance(value, list | tuple) else [value]
    if not given:
        raise RequestError(f"{name} is {shown(value)}; needed {needed}")
    for latent in given:
        check_floats(name, latent, needed)
        if latent.ndim != 3 or latent.shape[0] != 16:
            raise RequestError(
                f"{name} has shape {tuple(latent.shape)} a picture; needed (16, height/8, width/8), in a list or batch"
            )


# What prompt_embeds may be.
EMBEDS_FORMS = (
    "features (tokens, width) as pipe.encode gives them, a list of them, or a padded batch (prompts, tokens, width) "
    "with its lengths: (batch, lengths)"
)


def embeds_of(name: str, value: Any) -> Any:
    """Features of prompts in one form, not yet checked: one tensor (tokens, width), or a tuple of such, one a prompt.

    value: that, or a batch (prompts, tokens, width), or one padded on the right with the lengths of its prompts: a pair
    (batch, lengths); tensors or arrays. Raises RequestError for lengths that are not the batch's.
    """
    lengths = None
    if isinstance(value, tuple) and len(value) == 2 and getattr(value[0], "ndim", None) == 3:
        value, lengths = value[0], plain(value[1])
    value = tensor_of(value)
    if getattr(value, "ndim", None) == 3:
        lengths = [value.shape[1]] * len(value) if lengths is None else lengths
        right = isinstance(lengths, list | tuple) and len(lengths) == len(value)
        if not right or not all(_number(n) and 1 <= n <= value.shape[1] for n in lengths):
            raise RequestError(
                f"{name} has {len(value)} prompts, {value.shape[1]} tokens a prompt and lengths {shown(lengths)}; "
                f"needed {EMBEDS_FORMS}"
            )
        value = [features[:n] for features, n in zip(value, lengths, strict=True)]
    return tuple(tensor_of(features) for features in value) if isinstance(value, list | tuple) else value


def embeds(name: str, value: Any) -> None:
    """Check what `embeds_of` gives: features of finite floats, (tokens, width) each."""
    given = value if isinstance(value, tuple) else (value,)
    if not given or len(given) > MOST_PICTURES:
        raise RequestError(f"{name} has {len(given):,} prompts; needed {EMBEDS_FORMS}")
    for features in given:
        check_floats(name, features, EMBEDS_FORMS)
        if features.ndim != 2 or not 1 <= len(features) <= MOST_TOKENS:
            raise RequestError(f"{name} has shape {tuple(features.shape)}; needed {EMBEDS_FORMS}")


def floats_of(text: str) -> list[float]:
    """Read numbers that commas part; ValueError."""
    return [float(part) for part in text.split(",")]


def scales_of(text: str) -> float | list[float]:
    """Read a number, or several that commas part; ValueError."""
    return floats_of(text) if "," in text else float(text)


def interval_of(text: str) -> tuple[float, float]:
    """Read A-B; ValueError."""
    start, end = text.split("-")
    return float(start), float(end)


def integers_of(text: str) -> list[int]:
    """Read integers that commas part; ValueError."""
    return [int(part) for part in text.split(",")]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field holds.

    check(name, value, *bounds) raises RequestError · parse: a value from the command line's text (ValueError), None
    where a field cannot be given there · metavar: what stands for the value in --help · several: whether the option may
    be repeated, each time one value more · name: what a text is not that cannot be read · to_json(value),
    from_json(name, data): to what a picture's metadata hold, and back (ValueError).
    """

    check: Callable[..., None]
    parse: Callable[[str], Any] | None = None
    metavar: str = ""
    several: bool = False
    name: str = ""
    to_json: Callable[[Any], Any] = value_to_json
    from_json: Callable[[str, Any], Any] = same


TEXT = Kind(texts, str, "TEXT")
SIDE = Kind(side, int, "N", name="an integer")
INTEGER = Kind(integer, int, "N", name="an integer")
NUMBER = Kind(number, float, "X", name="a number")
SCALES = Kind(one_or_several, scales_of, "X[,X,…]", name="a number, or a list of numbers such as 6,2")
INTERVAL = Kind(interval, interval_of, "A-B", name="two times such as 0.1-0.8")
LIMIT = Kind(number_or_bool, float, "X", name="a number")
CHOICE = Kind(choice, str)
SWITCH = Kind(true_or_false)
SIGMAS = Kind(sigmas, floats_of, "A,B,…", name="a list of numbers such as 1,0.75,0.4")
MARGINS = Kind(margins, integers_of, "L,T,R,B", name="four margins in pixels such as 64,0,64,0")
PLACE = Kind(place, integers_of, "I,N", name="a place and a size such as 2,4")
# Values that are no JSON: what of them a picture's metadata hold, and how that is read back.
PATHS: Any = {"to_json": paths, "from_json": paths_from_json}
IMAGE = Kind(image, str, "FILE", **PATHS)
REFERENCES = Kind(references, str, "FILE", several=True, **PATHS)
CONTROLS = Kind(
    controls, Control.parse, "FILE:IMAGE[:…]", several=True,
    to_json=objects_to_json, from_json=objects_from_json(Control.from_json, MOST_CONTROLS),
)  # fmt: skip
REGIONS = Kind(
    regions, Region.parse, "MASK:PROMPT", several=True,
    to_json=objects_to_json, from_json=objects_from_json(Region.from_json, MOST_PICTURES),
)  # fmt: skip
CACHE = Kind(
    cache, Cache.parse, "METHOD[:…]",
    to_json=lambda value: None if value is None else value.to_json(),
    from_json=lambda name, value: None if value is None else Cache.from_json(value),
)  # fmt: skip
GENERATORS = Kind(generators)
LATENTS = Kind(latents)
EMBEDS = Kind(embeds)
# Whose values are numbers, or rows of them: also numpy's and torch's.
NUMERIC = (SIDE, INTEGER, NUMBER, SCALES, INTERVAL, LIMIT, SWITCH, SIGMAS, MARGINS, PLACE)
