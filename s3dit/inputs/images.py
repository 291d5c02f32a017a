"""Pictures at the border of the engine: files, Pillow images and arrays on one side, tensors in [-1, 1] on the other.

Four ideas. Whatever a user gives as an image becomes a `Picture`, in one place: its header is looked at first, then its
pixels are read whole, turned upright and laid over white. A conversion rounds exactly like diffusers, so that equal
latents give equal bytes. A file is written whole or not at all. And a picture carries what made it, twice:
`parameters` in the form that AUTOMATIC1111 began and galleries read, and `s3dit`, one JSON object that is enough to
make the picture again. A PNG has them as text chunks, JPEG and WebP as UserComment and ImageDescription of their Exif.

Source: diffusers `image_processor.py` (VaeImageProcessor) for values and rounding; the PNG specification for chunks.
Not here: which sizes a request may have (request.py), what the model does with a picture (conditioning.py).
"""

import hashlib
import io
import json
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.files import ENDINGS, opened, whole
from s3dit.terminal import hushed
from s3dit.weights.container import parse_json

if TYPE_CHECKING:
    from s3dit.request import ImageSource

# Larger pictures are refused before their pixels are unpacked: 8192 × 8192, more than any model here reads or makes.
LARGEST_PIXELS = 1 << 26
# What is read. Not everything that Pillow knows: some of its formats run other programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO")
# Bytes of a file that is opened: what so many pixels of 8 bytes take without compression.
LARGEST_FILE = 1 << 29
# What Pillow and its decoders raise for files that are damaged, one way or another.
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AssertionError, AttributeError,
    NameError, BufferError, MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# Longer metadata is an accident or an attack; the longest honest one is a prompt of a few thousand words.
LARGEST_TEXT = 1 << 20
# Honest pictures have a few; each may take 4 MB.
MOST_TEXTS = 15

# Where Exif has them: tags of TIFF and Exif, and what tells our description from another's.
DESCRIPTION, MAKE, MODEL, ORIENTATION, EXIF, COMMENT = 0x010E, 0x010F, 0x0110, 0x0112, 0x8769, 0x9286
MARK = "s3dit:"
# Texts that say what made a picture: ours, AUTOMATIC1111's, ComfyUI's two.
TEXTS = ("s3dit", "parameters", "prompt", "workflow")
# What the headers of a form can say: pixels a side, and bytes of Exif in the one segment of a JPEG.
LARGEST_SIDES = {"PNG": (1 << 31) - 1, "JPEG": 65535, "WEBP": 16383}
LARGEST_EXIF = 65533

# Names of the request's fields in the line that galleries read, in the order they expect.
LABELS = {"num_inference_steps": "Steps", "solver": "Sampler", "guidance_scale": "CFG scale", "seed": "Seed"}


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Turn decoded pixels into pictures, one an item of the batch.

    pixels (B, 3, H, W) of a float dtype, [-1, 1], clamped here -> B images in RGB. Raises RequestError where a value is
    not finite. Rounding: half to even, as diffusers' numpy does.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise RequestError(
            f"pixels are {tuple(pixels.shape)} of {pixels.dtype}; needed (batch, 3, height, width) of a float dtype"
        )
    pixels = pixels.detach().float()
    if not pixels.isfinite().all():
        raise RequestError(
            "the picture holds values that are not finite; run in bfloat16 or float32 instead of float16"
        )
    levels = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(item) for item in levels.permute(0, 2, 3, 1).cpu().numpy()]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that was given, checked, upright and opaque; `name` is what messages call it.

    content: RGB of 8 bits a channel; or (3, H, W) fp32 in [0, 1] where more than 8 bits were given.
    """

    name: str
    content: Image.Image | Tensor

    @classmethod
    def open(cls, source: "ImageSource", name: str = "image") -> "Picture":
        """Read what was given, whole; RequestError if it is missing, damaged, moving, far too large or no picture.

        source: a file; a Pillow image of any mode; an array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W), of
        1, 3 or 4 channels: 8 or 16 bits, or floats in [0, 1], as diffusers takes them. EXIF says which side is up,
        transparency is laid over white, 16-bit gray is scaled to 8.
        """
        if isinstance(source, str | os.PathLike):
            with _image(source, "a picture that can be read, such as a PNG or JPEG file", FORMATS) as image:
                return cls(str(source), _loaded(image, str(source)))
        if isinstance(source, Image.Image):
            with _reading(name, "a Pillow image that can be read"):
                return cls(name, _loaded(source, name))
        if isinstance(source, np.ndarray | Tensor):
            return cls(name, _from_array(source, name))
        raise RequestError(
            f"{name} is a {type(source).__name__}; needed a path, a Pillow image, a numpy array or a torch tensor"
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.content, Tensor):
            return self.content.shape[1], self.content.shape[2]
        return self.content.height, self.content.width

    @property
    def sha256(self) -> str:
        """Hash of size and pixels: the same for the same picture in another file."""
        exact = isinstance(self.content, Tensor)
        data = self.content.numpy().tobytes() if isinstance(self.content, Tensor) else self.content.tobytes()
        return hashlib.sha256(f"{'fp32' if exact else 'rgb8'} {self.size}\n".encode() + data).hexdigest()

    def pixels(self, size: tuple[int, int] | None = None) -> Tensor:
        """Pixels for the autoencoder: (3, H, W) fp32 in [-1, 1]; `size` (height, width) resizes by Lanczos."""
        return 2.0 * self._levels(size) - 1.0

    def mask(self, size: tuple[int, int] | None = None, cut: bool = True) -> Tensor:
        """The picture read as a mask: white is 1, what is to be painted anew; black is 0, what is kept.

        -> (1, H, W) fp32, zeros and ones if `cut` at one half, else gray too; `size` resizes by Lanczos before the cut.
        Source: diffusers' mask processor of the inpainting pipelines.
        """
        if isinstance(self.content, Tensor):
            # The weights of luminance, as Pillow has them.
            red, green, blue = self._levels(size)
            gray = (0.299 * red + 0.587 * green + 0.114 * blue)[None]
        else:
            levels = np.asarray(_resized(self.content, size).convert("L"), dtype=np.float32)
            gray = torch.from_numpy(levels / 255.0)[None]
        return (gray >= 0.5).float() if cut else gray

    def _levels(self, size: tuple[int, int] | None) -> Tensor:
        """(3, H, W) fp32 in [0, 1]."""
        if isinstance(self.content, Tensor):
            return self.content if size is None else resized(self.content, size).clamp(0, 1)
        levels = np.asarray(_resized(self.content, size), dtype=np.float32)
        return torch.from_numpy(levels / 255.0).permute(2, 0, 1).contiguous()


class Pictures:
    """The input pictures of one request: each file, or picture given in Python, is opened once."""

    def __init__(self) -> None:
        self._opened: dict[str | int, tuple[Any, Picture]] = {}

    def open(self, source: "ImageSource", name: str) -> Picture:
        """`Picture.open`, or what it gave before; raises RequestError."""
        key = str(source) if isinstance(source, str | os.PathLike) else id(source)
        if key not in self._opened:
            # The source too, whose id is then its own.
            self._opened[key] = source, Picture.open(source, name)
        return self._opened[key][1]


@contextmanager
def _image(path: str | os.PathLike[str], needed: str, formats: Sequence[str]) -> Iterator[Image.Image]:
    """Open a file of one of the formats, its pixels not yet read; all that is wrong with it becomes RequestError."""
    Image.init()
    # Pillow gets the file, not its name: it would map it, and a file cut short then ends the process.
    with opened(path, needed, LARGEST_FILE) as file, _reading(str(path), needed):
        _check_chunks(file, str(path))
        with Image.open(file, formats=[name for name in formats if name in Image.OPEN]) as image:
            yield image


def _check_chunks(file: BinaryIO, name: str) -> None:
    """Compressed texts of a PNG take a thousand times their size; Pillow limits each, and only the letters of all."""
    found = 0
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            found += kind in (b"zTXt", b"iTXt")
            file.seek(length + 4, io.SEEK_CUR)
    file.seek(0)
    if found > MOST_TEXTS:
        raise RequestError(f"{name}: {found:,} compressed texts; needed at most {MOST_TEXTS}; save it anew")


@contextmanager
def _reading(name: str | Path, needed: str) -> Iterator[None]:
    """Whatever goes wrong with a file inside becomes one RequestError."""
    try:
        with warnings.catch_warnings():
            # Sizes are checked here; else Pillow warns of metadata that it can do without.
            warnings.simplefilter("ignore")
            yield
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow says how many there are, and a limit that is not ours.
        found = next(iter(re.findall(r"\d+", str(error))), "far too many")
        raise RequestError(f"{name}: {found} pixels; needed at most {LARGEST_PIXELS:,}; scale it down") from None
    except UnidentifiedImageError:
        raise RequestError(f"{name}: cannot be read (it is no picture); needed {needed}; check the file") from None
    except DAMAGED as error:
        said = str(error) or type(error).__name__
        raise RequestError(f"{name}: cannot be read ({said}); needed {needed}; check the file") from None


def _check_size(name: str, height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise RequestError(f"{name}: {width}x{height} pixels; needed at least one")
    if height * width > LARGEST_PIXELS:
        raise RequestError(f"{name}: {width}x{height} pixels; needed at most {LARGEST_PIXELS:,}; scale it down")


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """Check a header, then read the pixels: upright, opaque, three channels of eight bits."""
    _check_size(name, image.height, image.width)
    # An MPO is what cameras write: a photograph, and the same one small or from beside.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        # How many is not counted: that reads all of them.
        raise RequestError(f"{name}: at least 2 frames; needed one picture; save one of them")
    _check_tiles(image, name)
    with hushed() if image.format == "TIFF" else nullcontext():
        image.load()
    return _rgb(image, name)


def _check_tiles(image: Image.Image, name: str) -> None:
    """A header may claim far more pixels than the file has: Pillow leaves them black, and memory is taken for them."""
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


def _rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """Upright, opaque, three channels of eight bits."""
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


def _from_array(given: np.ndarray | Tensor, name: str) -> Image.Image | Tensor:
    """Check an array (H, W[, C]) or a tensor ([C, ]H, W); 8 bits become an image, anything finer stays a tensor."""
    planes = given.ndim == 3 and isinstance(given, Tensor)
    shape = tuple(given.shape[1:]) + tuple(given.shape[:1]) if planes else tuple(given.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        order = "(H, W) or (C, H, W)" if isinstance(given, Tensor) else "(H, W) or (H, W, C)"
        raise RequestError(f"{name} has shape {tuple(given.shape)}; needed {order} with 1, 3 or 4 channels C")
    _check_size(name, *shape[:2])
    try:
        levels = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.array(given, order="C"))
    except TypeError:
        raise RequestError(f"{name} is an array of {given.dtype}; needed 8 or 16 bits, or floats in [0, 1]") from None
    levels = levels.permute(1, 2, 0) if planes else levels
    levels = levels if levels.ndim == 3 else levels[..., None]
    if levels.dtype == torch.uint8:
        return _rgb(Image.fromarray(levels.numpy().squeeze(2) if levels.shape[2] == 1 else levels.numpy()), name)
    if levels.dtype in (torch.bool, torch.uint16):
        levels = levels.float() / (1.0 if levels.dtype == torch.bool else 65535.0)
    if not levels.is_floating_point():
        raise RequestError(f"{name} is an array of {given.dtype}; needed 8 or 16 bits, or floats in [0, 1]")
    if not levels.isfinite().all():
        raise RequestError(f"{name} holds NaN or infinity; needed finite numbers from 0 to 1")
    low, high = levels.min().item(), levels.max().item()
    if low < 0 or high > 1:
        raise RequestError(
            f"{name} has values from {low:g} to {high:g}; needed floats from 0 to 1, as diffusers takes them; what "
            "output_type tensor gives lies in [-1, 1], so pass (x / 2 + 0.5).clamp(0, 1)"
        )
    levels = levels.float().movedim(2, 0)
    if len(levels) == 4:
        levels = levels[:3] * levels[3:] + (1 - levels[3:])
    return levels.expand(3, -1, -1).contiguous()


def resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize planes (C, H, W) fp32 to (C, *size) by Lanczos, which may overshoot; the same planes if that is theirs."""
    if tuple(planes.shape[1:]) == size:
        return planes
    scaled = [_resized(Image.fromarray(plane.numpy()), size) for plane in planes.float().cpu()]
    return torch.stack([torch.from_numpy(np.array(plane)) for plane in scaled])


def _resized(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    if size is None or (image.height, image.width) == size:
        return image
    return image.resize((size[1], size[0]), Image.Resampling.LANCZOS)


def save_picture(
    image: Image.Image,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    form: str | None = None,
    quality: int | None = None,
) -> None:
    """Write one picture whole or not at all, with what made it; an existing file is replaced, missing folders are made.

    metadata: what JSON can hold, under the names of Request's fields; None writes no text · form: PNG, JPEG or WEBP
    (default: by the name's ending) · quality: of JPEG (default: 95) or WebP (default: lossless), 1 to 100. Raises
    RequestError if the place cannot be written, the metadata is not JSON, or the form cannot hold it.
    """
    path = Path(path)
    form = form or ENDINGS.get(path.suffix.lower())
    if form is None:
        raise RequestError(f"{path.name!r} says no format; needed a name that ends in {', '.join(ENDINGS)}")
    if quality is not None and (form == "PNG" or not 1 <= quality <= 100):
        raise RequestError(f"quality is {quality} for {form}; needed 1 to 100 for JPEG or WEBP, or none")
    if form != "PNG" and image.mode not in ("L", "RGB"):
        image = _rgb(image)
    options = carried(metadata, image.size, form)
    if form == "JPEG":
        # A color for every pixel, as they were drawn.
        options |= {"quality": quality or 95, "subsampling": 0}
    elif form == "WEBP":
        options |= {"lossless": quality is None, "quality": quality or 80}
    with whole(path) as file:
        # Encoded in memory first: an encoder that writes to a full disk does not say so.
        data = io.BytesIO()
        # Pillow's own, also of a picture that carries metadata by itself: what is written was decided above.
        Image.Image.save(image, data, form, **options)
        file.write(data.getbuffer())


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """`save_picture` as a PNG, whatever the name."""
    save_picture(image, path, metadata, form="PNG")


def carried(metadata: Mapping[str, Any] | None, size: tuple[int, int], form: str) -> dict[str, Any]:
    """Pillow's options that make a file of a form carry metadata; RequestError if it cannot, or cannot be so large.

    size (width, height) in pixels.
    """
    if max(size) > LARGEST_SIDES[form]:
        raise RequestError(
            f"{size[0]}x{size[1]} pixels; needed at most {LARGEST_SIDES[form]:,} a side for {form}; save it as .png"
        )
    if metadata is None:
        return {}
    found = texts(metadata, size)
    if form == "PNG":
        chunks = PngInfo()
        for key, text in found.items():
            chunks.add_text(key, text)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[DESCRIPTION] = MARK + found["s3dit"]
    exif.get_ifd(EXIF)[COMMENT] = b"UNICODE\0" + found["parameters"].encode("utf-16-be")
    length = len(exif.tobytes())
    if form == "JPEG" and length > LARGEST_EXIF:
        raise RequestError(
            f"metadata is {length:,} bytes; needed at most {LARGEST_EXIF:,} for JPEG; save it as .png or .webp"
        )
    return {"exif": exif}


def texts(metadata: Mapping[str, Any], size: tuple[int, int]) -> dict[str, str]:
    """What a picture carries: `parameters` for galleries and `s3dit`, in ASCII, to make it again.

    size (width, height) of the picture. "CFG scale" counts as galleries do, one more than `guidance_scale` here.
    Raises RequestError if the metadata cannot be written as JSON.
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
    if isinstance(values.get("guidance_scale"), int | float):
        values["guidance_scale"] = f"{values['guidance_scale'] + 1:g}"
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
    """Texts of a picture that say what made it, by name, without unpacking the pixels; RequestError if it is broken."""
    with _image(path, needed, ("PNG", "JPEG", "WEBP")) as image:
        found = image.info if image.format == "PNG" else _exif_texts(image.getexif(), "parameters" in names)
        texts = {name: found[name] for name in names if isinstance(found.get(name), str)}
        for text in texts.values():
            if len(text) > LARGEST_TEXT:
                raise RequestError(f"{path}: {len(text):,} characters of metadata; needed at most {LARGEST_TEXT:,}")
    return texts


def _exif_texts(exif: Image.Exif, comments: bool) -> dict[str, Any]:
    """The same out of Exif: our description, ComfyUI's graphs, and the comment of AUTOMATIC1111's kin if asked for."""
    found: dict[str, Any] = {}
    for tag in (DESCRIPTION, MAKE, MODEL):
        name, _, text = str(exif.get(tag, "")).partition(":")
        if name in ("s3dit", "prompt", "workflow"):
            found[name] = text
    comment = exif.get_ifd(EXIF).get(COMMENT) if comments else None
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        found["parameters"] = comment[8:].decode("utf-16-le" if comment[9:10] == b"\0" else "utf-16-be", "replace")
    elif isinstance(comment, bytes | str):
        text = comment.decode("utf-8", "replace") if isinstance(comment, bytes) else comment
        found["parameters"] = text.removeprefix("ASCII\0\0\0")
    return found


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read what made a picture out of what `save_picture` wrote, without unpacking the pixels.

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


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None, gap: int = 8) -> Image.Image:
    """Lay pictures side by side, row by row, each centered in a cell of the largest size; `columns` None is square."""
    if not images or (columns is not None and columns < 1) or gap < 0:
        raise RequestError(
            f"{len(images)} pictures in {columns} columns; needed at least one of each and no gap below 0"
        )
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        x, y = i % columns * (width + gap), i // columns * (height + gap)
        sheet.paste(_rgb(image), (x + (width - image.width) // 2, y + (height - image.height) // 2))
    return sheet


def ansi(image: Image.Image, columns: int = 64) -> str:
    """Draw a picture with colored half blocks for a terminal of 24-bit color, at most `columns` characters wide.

    -> lines with their escape codes, each ending in a reset and a newline. A cell is two pixels, one above the other.
    """
    columns = max(1, min(columns, image.width))
    height = 2 * max(1, round(image.height * columns / image.width / 2))
    levels = np.asarray(_rgb(image).resize((columns, height), Image.Resampling.BOX))
    lines = []
    for upper, lower in zip(levels[::2].tolist(), levels[1::2].tolist(), strict=True):
        line, last = "", None
        for pair in zip(upper, lower, strict=True):
            if pair != last:
                (r, g, b), (s, h, c) = pair
                line += f"\x1b[38;2;{r};{g};{b};48;2;{s};{h};{c}m"
            line, last = line + "▀", pair
        lines.append(line + "\x1b[0m\n")
    return "".join(lines)
