"""Writes and reads what made a picture: the texts that an image file carries.

A picture carries it twice: `parameters`, in the form that AUTOMATIC1111 began and galleries read, and `s3dit`, one JSON
object that is enough to make the picture again. A PNG has them as text chunks, JPEG and WebP as UserComment and
ImageDescription of their Exif.

Source: the PNG specification (tEXt, iTXt), Exif 2.3 (UserComment), AUTOMATIC1111's `infotext`. Not here: the file
itself (image_files.py, save_image.py).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from s3dit.errors import RequestError
from s3dit.inputs.image_files import open_image
from s3dit.weights.json_files import parse_json

# Longer metadata is an accident or an attack; the longest honest one is a prompt of a few thousand words.
LARGEST_TEXT = 1 << 20
# Tags of TIFF and Exif that hold texts, and the prefix by which our description is detected.
DESCRIPTION, MAKE, MODEL, EXIF, COMMENT = 0x010E, 0x010F, 0x0110, 0x8769, 0x9286
MARK = "s3dit:"
# Texts that say what made a picture: ours, AUTOMATIC1111's, ComfyUI's two.
TEXTS = ("s3dit", "parameters", "prompt", "workflow")
# What the headers of a form can say: pixels a side, and bytes of Exif in the one segment of a JPEG.
LARGEST_SIDES = {"PNG": (1 << 31) - 1, "JPEG": 65535, "WEBP": 16383}
LARGEST_EXIF = 65533
# Names of the request's fields in the line that galleries read, in the order they expect.
LABELS = {"num_inference_steps": "Steps", "solver": "Sampler", "guidance_scale": "CFG scale", "seed": "Seed"}


def carried(metadata: Mapping[str, Any] | None, size: tuple[int, int], form: str) -> dict[str, Any]:
    """Return the options for Pillow's `Image.save` that put metadata into a file of a format.

    size (width, height) in pixels · form: PNG, JPEG or WEBP · metadata None gives no options. Raises RequestError where
    the format cannot hold pictures so large, or so much metadata, or it is not JSON.
    """
    if max(size) > LARGEST_SIDES[form]:
        raise RequestError(
            f"{size[0]}x{size[1]} pixels; needed at most {LARGEST_SIDES[form]:,} a side for {form}; save it as .png"
        )
    if metadata is None:
        return {}
    contents = texts(metadata, size)
    if form == "PNG":
        chunks = PngInfo()
        for key, text in contents.items():
            chunks.add_text(key, text)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[DESCRIPTION] = MARK + contents["s3dit"]
    exif.get_ifd(EXIF)[COMMENT] = b"UNICODE\0" + contents["parameters"].encode("utf-16-be")
    length = len(exif.tobytes())
    if form == "JPEG" and length > LARGEST_EXIF:
        raise RequestError(
            f"metadata is {length:,} bytes; needed at most {LARGEST_EXIF:,} for JPEG; save it as .png or .webp"
        )
    return {"exif": exif}


def texts(metadata: Mapping[str, Any], size: tuple[int, int]) -> dict[str, str]:
    """Return the texts that a picture carries: `parameters` for galleries and `s3dit`, JSON in ASCII, to make it again.

    size (width, height) of the picture in pixels. "CFG scale" counts as galleries do, one more than `guidance_scale`
    here, of several the first. Raises RequestError if the metadata cannot be written as JSON, or is longer than
    LARGEST_TEXT characters.
    """
    try:
        replay = json.dumps(dict(metadata), allow_nan=False, check_circular=True)
    except (TypeError, ValueError) as error:
        raise RequestError(f"metadata cannot be written as JSON ({error}); needed plain finite values") from None
    if len(replay) > LARGEST_TEXT:
        raise RequestError(
            f"metadata is {len(replay):,} characters; needed at most {LARGEST_TEXT:,}; save it elsewhere"
        )
    values = {**metadata}
    values.setdefault("solver", "euler")
    scale = values.get("guidance_scale")
    scale = scale[0] if isinstance(scale, list) and scale else scale
    if isinstance(scale, int | float):
        values["guidance_scale"] = f"{scale + 1:g}"
    settings = {label: values[name] for name, label in LABELS.items() if values.get(name) is not None}
    settings["Size"] = f"{size[0]}x{size[1]}"
    if values.get("model") is not None:
        settings["Model"] = values["model"]
    lines = [str(values.get("prompt") or "")]
    if values.get("negative_prompt"):
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    lines.append(", ".join(f"{label}: {value}" for label, value in settings.items()))
    # A folder's name may be no UTF-8.
    shown = "\n".join(lines).encode("utf-8", "backslashreplace").decode()
    return {"parameters": shown, "s3dit": replay}


def read_texts(
    path: str | Path, names: Sequence[str] = TEXTS, needed: str = "a PNG, JPEG or WebP file"
) -> dict[str, str]:
    """Read the texts of an image file that say what made it, by name, without unpacking the pixels.

    names: of those wanted (TEXTS) · needed: what a message asks for. Raises RequestError if the file is broken or a
    text is longer than LARGEST_TEXT characters.
    """
    with open_image(path, needed, ("PNG", "JPEG", "WEBP")) as image:
        values = image.info if image.format == "PNG" else _exif_texts(image.getexif(), "parameters" in names)
        contents = {name: values[name] for name in names if isinstance(values.get(name), str)}
        for text in contents.values():
            if len(text) > LARGEST_TEXT:
                raise RequestError(f"{path}: {len(text):,} characters of metadata; needed at most {LARGEST_TEXT:,}")
    return contents


def _exif_texts(exif: Image.Exif, comments: bool) -> dict[str, Any]:
    """Read texts out of Exif: our description, ComfyUI's graphs, with `comments` AUTOMATIC1111's UserComment too."""
    contents: dict[str, Any] = {}
    for tag in (DESCRIPTION, MAKE, MODEL):
        name, _, text = str(exif.get(tag, "")).partition(":")
        if name in ("s3dit", "prompt", "workflow"):
            contents[name] = text
    comment = exif.get_ifd(EXIF).get(COMMENT) if comments else None
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        contents["parameters"] = comment[8:].decode("utf-16-le" if comment[9:10] == b"\0" else "utf-16-be", "replace")
    elif isinstance(comment, bytes | str):
        text = comment.decode("utf-8", "replace") if isinstance(comment, bytes) else comment
        contents["parameters"] = text.removeprefix("ASCII\0\0\0")
    return contents


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata of a picture that `save_picture` wrote, without unpacking the pixels.

    -> the mapping given to `save_picture`. Raises RequestError if the file is no picture of s3dit, or broken.
    """
    needed = "a PNG, JPEG or WebP file written by s3dit"
    text = read_texts(path, ("s3dit",), needed).get("s3dit")
    if text is None:
        raise RequestError(
            f"{path}: carries no s3dit metadata; needed {needed} with it; other programs drop it when they save, so "
            "take the original file"
        )
    try:
        metadata = parse_json(text)
    except ValueError as error:
        raise RequestError(f"{path}: its s3dit metadata is damaged ({error}); take the original file") from None
    if not isinstance(metadata, dict):
        raise RequestError(f"{path}: its s3dit metadata is a {type(metadata).__name__}; needed a JSON object")
    return metadata
