"""Writes a picture to a PNG, JPEG or WebP file, whole or not at all, together with what made it."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from s3dit.errors import RequestError
from s3dit.files import ENDINGS, whole
from s3dit.inputs.image_files import to_rgb
from s3dit.inputs.image_metadata import carried


def save_picture(
    image: Image.Image,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    form: str | None = None,
    quality: int | None = None,
) -> None:
    """Write a picture and its metadata to a file, whole or not at all.

    An existing file is replaced, missing folders are made. metadata: JSON values under the names of Request's fields;
    None writes no text · form: PNG, JPEG or WEBP (default: by the name's ending) · quality: of JPEG (default: 95) or
    WebP (default: lossless), 1 to 100. Raises RequestError if the place cannot be written, the metadata is not JSON,
    or the format cannot hold it.
    """
    path = Path(path)
    form = form or ENDINGS.get(path.suffix.lower())
    if form is None:
        raise RequestError(f"{path.name!r} says no format; needed a name that ends in {', '.join(ENDINGS)}")
    with whole(path) as file:
        # Encoded in memory first: an encoder that writes to a full disk does not say so.
        file.write(encoded(image, form, metadata, quality))


def encoded(
    image: Image.Image, form: str, metadata: Mapping[str, Any] | None = None, quality: int | None = None
) -> bytes:
    """The bytes of the file that `save_picture` writes, with its arguments; raises RequestError."""
    if quality is not None and (form == "PNG" or not 1 <= quality <= 100):
        raise RequestError(f"quality is {quality} for {form}; needed 1 to 100 for JPEG or WEBP, or none")
    if form != "PNG" and image.mode not in ("L", "RGB"):
        image = to_rgb(image)
    options = carried(metadata, image.size, form)
    if form == "JPEG":
        # A color for every pixel, as they were drawn.
        options |= {"quality": quality or 95, "subsampling": 0}
    elif form == "WEBP":
        options |= {"lossless": quality is None, "quality": quality or 80}
    data = io.BytesIO()
    # Pillow's own method, also of a subclass whose `save` adds metadata: what is written was decided above.
    Image.Image.save(image, data, form, **options)
    return data.getvalue()


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a picture and its metadata as a PNG, whatever the name's ending; see `save_picture`."""
    save_picture(image, path, metadata, form="PNG")
