"""Resizes planes of floats and images by Lanczos, as diffusers' image processor does.

Source: diffusers `image_processor.py` (`resize` with resample lanczos).
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize planes (C, H, W) fp32 to (C, height, width) by Lanczos, which may overshoot the range of the values.

    The planes themselves are returned where that is their size; otherwise the result is on the CPU.
    """
    if tuple(planes.shape[1:]) == size:
        return planes
    scaled = [resized_image(Image.fromarray(plane.numpy()), size) for plane in planes.float().cpu()]
    return torch.stack([torch.from_numpy(np.array(plane)) for plane in scaled])


def resized_image(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Resize an image to (height, width) by Lanczos; the same image where that is its size, or size is None."""
    if size is None or (image.height, image.width) == size:
        return image
    return image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
