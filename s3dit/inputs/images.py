"""Pictures at the border of the engine: files, Pillow images and arrays on one side, tensors in [-1, 1] on the other.

Whatever a user gives as an image becomes a `Picture`, in one place: its header is looked at first, then its pixels are
read whole, turned upright and laid over white. A conversion to pixels rounds exactly like diffusers, so that equal
latents give equal bytes.

Source: diffusers `image_processor.py` (VaeImageProcessor) for values and rounding. Not here: files (image_files.py,
save_image.py), what they say (image_metadata.py), which sizes a request may have (request.py), what the model does with
a picture (start_image.py).
"""

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.inputs.image_arrays import from_array
from s3dit.inputs.image_files import FORMATS, NEEDED, decoded, image_errors, open_image, rgb_sha256
from s3dit.inputs.resize import resized, resized_image

if TYPE_CHECKING:
    from s3dit.request import ImageSource


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert decoded pixels to Pillow images, one an item of the batch.

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
    """An input image: checked, upright and opaque; `name` is what messages call it.

    content: RGB of 8 bits a channel; or (3, H, W) fp32 in [0, 1] where more than 8 bits were given.
    """

    name: str
    content: Image.Image | Tensor

    @classmethod
    def open(cls, source: "ImageSource", name: str = "image") -> "Picture":
        """Read and check an image, all of its pixels.

        source: a file; a Pillow image of any mode; an array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W), of
        1, 3 or 4 channels: 8 or 16 bits, or floats in [0, 1], as diffusers takes them. EXIF says which side is up,
        transparency is laid over white, 16-bit gray is scaled to 8. name: for messages. Raises RequestError where it
        is missing, damaged, moving, far too large or no picture.
        """
        if isinstance(source, str | os.PathLike):
            with open_image(source, NEEDED, FORMATS) as image:
                return cls(str(source), decoded(image, str(source)))
        if isinstance(source, Image.Image):
            with image_errors(name, "a Pillow image that can be read"):
                return cls(name, decoded(source, name))
        if isinstance(source, np.ndarray | Tensor):
            return cls(name, from_array(source, name))
        raise RequestError(
            f"{name} is a {type(source).__name__}; needed a path, a Pillow image, a numpy array or a torch tensor"
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if isinstance(self.content, Tensor):
            return self.content.shape[1], self.content.shape[2]
        return self.content.height, self.content.width

    @property
    def sha256(self) -> str:
        """SHA-256 of size and pixels, as hex: the same for the same picture in another file."""
        if isinstance(self.content, Tensor):
            return hashlib.sha256(f"fp32 {self.size}\n".encode() + self.content.numpy().tobytes()).hexdigest()
        return rgb_sha256(self.content)

    def pixels(self, size: tuple[int, int] | None = None) -> Tensor:
        """Return pixels for the autoencoder: (3, H, W) fp32 in [-1, 1]; `size` (height, width) resizes by Lanczos."""
        return 2.0 * self._levels(size) - 1.0

    def mask(self, size: tuple[int, int] | None = None, cut: bool = True) -> Tensor:
        """Return the picture as a mask: white is 1, what is to be painted anew; black is 0, what is kept.

        -> (1, H, W) fp32, zeros and ones if `cut` at one half, else gray too; `size` resizes by Lanczos before the cut.
        Source: diffusers' mask processor of the inpainting pipelines.
        """
        if isinstance(self.content, Tensor):
            # The weights of luminance, as Pillow has them.
            red, green, blue = self._levels(size)
            gray = (0.299 * red + 0.587 * green + 0.114 * blue)[None]
        else:
            levels = np.asarray(resized_image(self.content, size).convert("L"), dtype=np.float32)
            gray = torch.from_numpy(levels / 255.0)[None]
        return (gray >= 0.5).float() if cut else gray

    def _levels(self, size: tuple[int, int] | None) -> Tensor:
        """The picture as planes (3, H, W) fp32 in [0, 1], resized by Lanczos if `size` is given."""
        if isinstance(self.content, Tensor):
            return self.content if size is None else resized(self.content, size).clamp(0, 1)
        levels = np.asarray(resized_image(self.content, size), dtype=np.float32)
        return torch.from_numpy(levels / 255.0).permute(2, 0, 1).contiguous()


class Pictures:
    """A cache of a request's input pictures: each file, or image given in Python, is opened once."""

    def __init__(self) -> None:
        self._opened: dict[str | int, tuple[Any, Picture]] = {}

    def open(self, source: "ImageSource", name: str) -> Picture:
        """Return `Picture.open(source, name)`, or what it returned for this source before; raises RequestError."""
        key = str(source) if isinstance(source, str | os.PathLike) else id(source)
        if key not in self._opened:
            # The source too, whose id is then its own.
            self._opened[key] = source, Picture.open(source, name)
        return self._opened[key][1]
