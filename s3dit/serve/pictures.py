"""Pictures that clients send, and those that they get.

What is sent is bytes, never a name: its header is checked against the server's bounds before a pixel is unpacked. What
they get carries the metadata of `Pipeline.records`, with the names of the server's files instead of their paths.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal

from PIL import Image, ImageOps

from s3dit.errors import RequestError
from s3dit.inputs.image_files import decoded, image_errors, image_in
from s3dit.inputs.save_image import encoded
from s3dit.serve.errors import ApiError

# What OpenAI's API takes, and what telephones call a JPEG.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP")
NEEDED = "a PNG, JPEG or WebP picture"
Form = Literal["png", "jpeg", "webp"]


class Unpacker:
    """Unpacks the pictures of one request, which together have at most so many pixels."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def picture(self, name: str, data: bytes) -> Image.Image:
        """RGB, upright, opaque; raises ApiError with the field's name."""
        return self._unpacked(name, data, decoded)

    def mask(self, name: str, data: bytes) -> Image.Image:
        """A mask as a Request takes it, white where is to be painted; raises ApiError.

        Of a picture with transparent pixels those are to be painted, the less opaque the more (OpenAI's rule for
        `mask`); of any other what is white, and of `mask_image` (vllm-omni's) always.
        """
        return self._unpacked(name, data, decoded if name == "mask_image" else _mask)

    def _unpacked(self, name: str, data: bytes, read: Any) -> Image.Image:
        try:
            with image_in(io.BytesIO(data), name, NEEDED, FORMATS) as image:
                pixels = image.width * image.height
                if pixels > self.left:
                    raise ApiError(
                        413, f"{name} is {image.width}x{image.height}; needed at most {self.most:,} pixels in all "
                        "pictures of a request; scale it down", name,
                    )  # fmt: skip
                self.left -= pixels
                made: Image.Image = read(image, name)
                return made
        except RequestError as error:
            raise ApiError(400, str(error), name, "invalid_image") from None


def _mask(image: Image.Image, name: str) -> Image.Image:
    """White where a picture is transparent; the picture itself where it is so nowhere."""
    # Before: it converts, and lays what is transparent over white.
    transparent = image.has_transparency_data
    plain = decoded(image, name)
    if not transparent:
        return plain
    with image_errors(name, NEEDED):
        alpha = ImageOps.exif_transpose(image.convert("RGBA")).getchannel("A")
    return plain if alpha.getextrema()[0] == 255 else ImageOps.invert(alpha).convert("RGB")


def public(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as clients get them: adapters by the names of their files."""
    adapters = [each | {"file": PurePath(each["file"]).name} for each in metadata.get("adapters", ())]
    return dict(metadata) | ({"adapters": adapters} if adapters else {})


def file_of(image: Image.Image, metadata: Mapping[str, Any] | None, form: Form, compression: int | None) -> bytes:
    """A picture's file; compression: 0 to 100, of jpeg and webp; raises RequestError where it has no room."""
    # Pillow's scale of quality begins at 1.
    quality = None if compression is None else max(1, compression)
    return encoded(image, form.upper(), metadata, quality)


def zipped(files: Sequence[bytes], form: Form) -> bytes:
    """A zip of files by number, as they are: pictures are packed already."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        for i, content in enumerate(files, 1):
            # With a fixed time the same pictures are the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{i}.{form}"), content)
    return data.getvalue()
