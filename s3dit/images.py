"""Pictures at the border of the engine: Pillow images and PNG files on one side, tensors in [-1, 1] on the other.

Three ideas. A conversion rounds exactly like diffusers, so that equal latents give equal bytes. A file is written whole
or not at all: under a hidden name beside its target first, then renamed. And a picture carries what made it, twice:
the text chunk `parameters` in the form that AUTOMATIC1111 began and galleries read, and the chunk `s3dit`, one JSON
object that is enough to make the picture again.

Source: diffusers `image_processor.py` (VaeImageProcessor) for values and rounding; the PNG specification for chunks.
Not here: which sizes a request may have (request.py), what the model does with a picture (conditioning.py).
"""

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from s3dit.request import RequestError

# Larger pictures are refused before their pixels are unpacked: 8192 × 8192, more than any model here reads or makes.
LARGEST_PIXELS = 1 << 26
# Longer metadata is an accident or an attack; the longest honest one is a prompt of a few thousand words.
LARGEST_TEXT = 1 << 20

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


def from_pil(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """Turn a picture into pixels for the autoencoder.

    image of any mode: turned as its EXIF says, transparency over white, 16-bit gray scaled down; `size` (height, width)
    resizes by Lanczos -> (1, 3, H, W) fp32 in [-1, 1]. Raises RequestError.
    """
    levels = np.asarray(_resized(_rgb(image), size), dtype=np.float32)
    return 2.0 * torch.from_numpy(levels / 255.0).permute(2, 0, 1)[None].contiguous() - 1.0


def mask_from_pil(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """Turn a picture into a mask: white is 1, what is to be painted anew; black is 0, what is kept.

    `size` (height, width) resizes by Lanczos, before the cut at one half -> (1, 1, H, W) fp32 of zeros and ones.
    Raises RequestError. Source: diffusers' mask processor of the inpainting pipelines.
    """
    levels = np.asarray(_resized(_rgb(image), size).convert("L"), dtype=np.float32)
    return (torch.from_numpy(levels / 255.0) >= 0.5).float()[None, None]


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """Read a picture file whole, or pass a picture on; RequestError if it is missing, broken or far too large."""
    if isinstance(source, Image.Image):
        return source
    try:
        with Image.open(source) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise RequestError(
                    f"{source}: {image.width}x{image.height} pixels; needed at most {LARGEST_PIXELS:,}; scale it down"
                )
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        _refuse(source, error, "a picture that can be read, such as a PNG or JPEG file")


def _refuse(path: str | Path, error: BaseException, needed: str) -> NoReturn:
    """Raise RequestError for a file that could not be read."""
    if isinstance(error, RequestError):
        raise error
    found = "not found" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
    raise RequestError(f"{path}: {found}; needed {needed}; check the file") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Upright, opaque, three channels of eight bits."""
    if image.mode == "F":
        raise RequestError("the picture has floating-point pixels; needed 8 or 16 bits a channel; convert it first")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit gray at 255 instead of scaling it.
        levels = np.asarray(image, dtype=np.float64) / 257.0
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _resized(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    if size is None or (image.height, image.width) == size:
        return image
    return image.resize((size[1], size[0]), Image.Resampling.LANCZOS)


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write one picture whole or not at all, with what made it in its text chunks.

    metadata: what JSON can hold, under the names of Request's fields; None writes no text. An existing file is
    replaced. Raises RequestError if the place cannot be written or the metadata is not JSON.
    """
    path = Path(path)
    chunks = PngInfo()
    for key, text in ({} if metadata is None else texts(metadata, image.size)).items():
        chunks.add_text(key, text)
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(partial, "xb") as file:
                image.save(file, "PNG", pnginfo=chunks)
            os.replace(partial, path)
        finally:
            # After the rename there is nothing left under this name; after an error or Ctrl-C there may be.
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(
            f"{path}: cannot be written ({error.strerror or error}); needed a folder that exists and is writable, with "
            "room for the picture; choose another place"
        ) from None


def texts(metadata: Mapping[str, Any], size: tuple[int, int]) -> dict[str, str]:
    """The text chunks of a picture: `parameters` for galleries and `s3dit` to make it again.

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
    return {"parameters": "\n".join(lines), "s3dit": replay}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read what made a picture out of its `s3dit` chunk, without unpacking the pixels.

    -> the mapping given to `save_png`. Raises RequestError if the file is no PNG, is broken, or carries none.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get("s3dit")
        if text is not None and len(text) > LARGEST_TEXT:
            raise RequestError(f"{path}: {len(text):,} characters of metadata; needed at most {LARGEST_TEXT:,}")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        _refuse(path, error, "a PNG file written by s3dit")
    if text is None:
        raise RequestError(
            f"{path}: carries no s3dit metadata; needed a PNG that s3dit wrote with it; other programs "
            "drop it when they save, so take the original file"
        )
    try:
        metadata = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: its s3dit metadata is damaged ({error}); take the original file") from None
    if not isinstance(metadata, dict):
        raise RequestError(f"{path}: its s3dit metadata is a {type(metadata).__name__}; needed a JSON object")
    return metadata


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


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
