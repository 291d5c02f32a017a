"""Converts pictures given as numpy arrays or torch tensors, in any layout diffusers takes, to an image or planes.

Source: diffusers `image_processor.py` (VaeImageProcessor) for shapes and value ranges.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.inputs.image_files import check_size, to_rgb


def from_array(given: np.ndarray | Tensor, name: str) -> Image.Image | Tensor:
    """Convert an array (H, W[, C]) or a tensor ([C, ]H, W) of 1, 3 or 4 channels to a picture's content.

    8 bits become an RGB image; bool, 16 bits and floats in [0, 1] become planes (3, H, W) fp32, transparency laid over
    white. name: for messages. Raises RequestError for other shapes, dtypes and ranges.
    """
    levels = _channels_last(given, name)
    if levels.dtype == torch.uint8:
        array = levels.numpy()
        return to_rgb(Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array), name)
    planes = _unit_range(levels, name, given.dtype).movedim(2, 0)
    if len(planes) == 4:
        planes = planes[:3] * planes[3:] + (1 - planes[3:])
    return planes.expand(3, -1, -1).contiguous()


def _channels_last(given: np.ndarray | Tensor, name: str) -> Tensor:
    """The values as a tensor (H, W, C) on the CPU, in their own dtype; RequestError for another shape or dtype."""
    planes = given.ndim == 3 and isinstance(given, Tensor)
    shape = tuple(given.shape[1:]) + tuple(given.shape[:1]) if planes else tuple(given.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        order = "(H, W) or (C, H, W)" if isinstance(given, Tensor) else "(H, W) or (H, W, C)"
        raise RequestError(f"{name} has shape {tuple(given.shape)}; needed {order} with 1, 3 or 4 channels C")
    check_size(name, *shape[:2])
    try:
        levels = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.array(given, order="C"))
    except TypeError:
        raise RequestError(f"{name} is an array of {given.dtype}; needed 8 or 16 bits, or floats in [0, 1]") from None
    levels = levels.permute(1, 2, 0) if planes else levels
    return levels if levels.ndim == 3 else levels[..., None]


def _unit_range(levels: Tensor, name: str, dtype: object) -> Tensor:
    """Scale bool and 16-bit values to [0, 1] and check floats for that range: the same shape, fp32.

    dtype: what was given, for the message. Raises RequestError.
    """
    if levels.dtype in (torch.bool, torch.uint16):
        levels = levels.float() / (1.0 if levels.dtype == torch.bool else 65535.0)
    if not levels.is_floating_point():
        raise RequestError(f"{name} is an array of {dtype}; needed 8 or 16 bits, or floats in [0, 1]")
    if not levels.isfinite().all():
        raise RequestError(f"{name} holds NaN or infinity; needed finite numbers from 0 to 1")
    low, high = levels.min().item(), levels.max().item()
    if low < 0 or high > 1:
        raise RequestError(
            f"{name} has values from {low:g} to {high:g}; needed floats from 0 to 1, as diffusers takes them; what "
            "output_type tensor gives lies in [-1, 1], so pass (x / 2 + 0.5).clamp(0, 1)"
        )
    return levels.float()
