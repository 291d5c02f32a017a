"""Opens image files that anybody may have written: every check runs before pixels are unpacked or memory is taken.

Whatever goes wrong with a file becomes one RequestError that names it. Formats are a fixed list, because some decoders
of Pillow run other programs; a file is opened by handle, because Pillow would map it by name and a mapped file that is
cut short ends the process; sizes, frames, compressed texts and tiles that do not cover the picture are checked first.

Source: the PNG specification for chunks; Pillow's decoders for what they raise. Not here: what a picture says about how
it was made (image_metadata.py).
"""

import hashlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from s3dit.errors import RequestError
from s3dit.files import opened
from s3dit.terminal import hushed

# Larger pictures are refused before their pixels are unpacked: 8192 × 8192, more than any model here reads or makes.
LARGEST_PIXELS = 1 << 26
# What is read. Not everything that Pillow knows: some of its formats run other programs.
NEEDED = "a picture that can be read, such as a PNG or JPEG file"
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO")
# Bytes of a file that is opened: what so many pixels of 8 bytes take without compression.
LARGEST_FILE = 1 << 29
# What Pillow and its decoders raise for files that are damaged, one way or another.
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AssertionError, AttributeError,
    NameError, BufferError, MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# Compressed texts in a PNG: honest pictures have up to five or so, and each may unpack to 4 MB.
MOST_TEXTS = 15
# Tag of TIFF and Exif.
ORIENTATION = 0x0112


@contextmanager
def open_image(path: str | os.PathLike[str], needed: str, formats: Sequence[str]) -> Iterator[Image.Image]:
    """Open an image file with Pillow, its pixels not yet read.

    needed: what the message asks for · formats: Pillow's names of those that are accepted. Raises RequestError, also
    for whatever goes wrong inside the `with`.
    """
    # Pillow gets the file, not its name: it would map it, and a file cut short then ends the process.
    with opened(path, needed, LARGEST_FILE) as file, image_in(file, str(path), needed, formats) as image:
        yield image


@contextmanager
def image_in(file: BinaryIO, name: str, needed: str, formats: Sequence[str]) -> Iterator[Image.Image]:
    """Do as `open_image` with an opened file, or bytes in memory, which messages call `name`."""
    Image.init()
    with image_errors(name, needed):
        _check_chunks(file, name)
        with Image.open(file, formats=[known for known in formats if known in Image.OPEN]) as image:
            yield image


@contextmanager
def image_errors(name: str | Path, needed: str) -> Iterator[None]:
    """Turn whatever Pillow raises inside the `with` into a RequestError that names the picture."""
    try:
        with warnings.catch_warnings():
            # Sizes are checked here; else Pillow warns of metadata that it can do without.
            warnings.simplefilter("ignore")
            yield
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow says how many there are, and a limit that is not ours.
        pixels = next(iter(re.findall(r"\d+", str(error))), "far too many")
        raise RequestError(f"{name}: {pixels} pixels; needed at most {LARGEST_PIXELS:,}; scale it down") from None
    except UnidentifiedImageError:
        raise RequestError(f"{name}: cannot be read (it is no picture); needed {needed}; check the file") from None
    except DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise RequestError(f"{name}: cannot be read ({reason}); needed {needed}; check the file") from None


def _check_chunks(file: BinaryIO, name: str) -> None:
    """Raise RequestError for a PNG with more than MOST_TEXTS compressed texts; leaves the file at its start.

    Each may take a thousand times its size in memory; Pillow limits each, but of all of them only the letters.
    """
    count = 0
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            count += kind in (b"zTXt", b"iTXt")
            file.seek(length + 4, io.SEEK_CUR)
    file.seek(0)
    if count > MOST_TEXTS:
        raise RequestError(f"{name}: {count:,} compressed texts; needed at most {MOST_TEXTS}; save it anew")


def check_size(name: str, height: int, width: int) -> None:
    """Raise RequestError for a picture without pixels, or with more than LARGEST_PIXELS."""
    if height < 1 or width < 1:
        raise RequestError(f"{name}: {width}x{height} pixels; needed at least one")
    if height * width > LARGEST_PIXELS:
        raise RequestError(f"{name}: {width}x{height} pixels; needed at most {LARGEST_PIXELS:,}; scale it down")


def decoded(image: Image.Image, name: str) -> Image.Image:
    """Check an opened image's header, then decode it: RGB of 8 bits a channel, upright, opaque; raises RequestError."""
    check_size(name, image.height, image.width)
    # An MPO is what cameras write: a photograph, and the same one small or from beside.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        # How many is not counted: that reads all of them.
        raise RequestError(f"{name}: at least 2 frames; needed one picture; save one of them")
    _check_tiles(image, name)
    with hushed() if image.format == "TIFF" else nullcontext():
        image.load()
    return to_rgb(image, name)


def _check_tiles(image: Image.Image, name: str) -> None:
    """Raise RequestError where a header claims far more pixels than the file can hold.

    Pillow would take memory for them and leave them black.
    """
    tiles = getattr(image, "tile", None) or ()
    if tiles and any(max(tile[1][side + 2] for tile in tiles) < image.size[side] for side in (0, 1)):
        raise RequestError(f"{name}: holds less than its {image.width}x{image.height} pixels; take the original file")
    file = getattr(image, "fp", None)
    if file is None or image.format not in ("PNG", "JPEG2000"):
        return
    length = file.seek(0, io.SEEK_END)
    # A megapixel of black in a few bytes is real; deflate makes a byte of 1032 at best, of 8256 pixels of one bit.
    most = (1 << 22) + (length << 13)
    if image.format == "PNG" and image.mode not in ("1", "P"):
        most = 1032 * length // len(image.getbands())
    if image.width * image.height > most:
        raise RequestError(
            f"{name}: {image.width}x{image.height} pixels in {length:,} bytes, which cannot be; take the original file"
        )


def to_rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """Convert an image of any mode to RGB of 8 bits a channel: turned as its Exif says, transparency over white.

    16-bit gray is scaled to 8 bits. Raises RequestError for floating-point pixels.
    """
    if image.mode == "F":
        raise RequestError(f"{name} has floating-point pixels; needed 8 or 16 bits a channel; convert it first")
    if image.getexif().get(ORIENTATION, 1) != 1:
        # Only then: it copies.
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit gray at 255 instead of scaling it.
        levels = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def rgb_sha256(image: Image.Image) -> str:
    """Return the SHA-256 of the size and pixels of an RGB image, as hex."""
    size = image.height, image.width
    return hashlib.sha256(f"rgb8 {size}\n".encode() + image.tobytes()).hexdigest()


def file_sha256(path: str) -> str:
    """Return `images.Picture.sha256` of a picture in a file, without importing torch; raises RequestError."""
    with open_image(path, NEEDED, FORMATS) as image:
        return rgb_sha256(decoded(image, path))
