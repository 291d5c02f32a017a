"""Sums and repetition of pictures in channels last, in two Ops: `add_pictures` and `repeat_pixels`.

On an H200, torch adds the bias of a convolution in a pass of its own, and one that takes several times as long as a
copy; so does its repetition of pixels. Both were 8 of the 29 ms that decoding 1024² took there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import kernel, launcher, op, tl, why_unsupported
from s3dit.kernels.rows import FLOAT_DTYPES, PROGRAM_NUMBERS, holding


@op
def add_pictures(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
    """Compute a + b + offset in at least fp32, rounded once: a, b (B, C, H, W), offset (C,) -> like a."""
    upcast = torch.promote_types(a.dtype, torch.float32)
    return (a.to(upcast) + b + offset[:, None, None]).to(a)


@op
def repeat_pixels(picture: Tensor) -> Tensor:
    """Make four of every pixel: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(picture, scale_factor=2.0, mode="nearest")


@kernel
def _add_kernel(a: "Any", b: "Any", offset: "Any", out: "Any", N: "Any", C: tl.constexpr, ROWS: tl.constexpr) -> Any:
    """Add ROWS positions."""
    channel = tl.arange(0, C)[None, :]
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    y = tl.load(a + n * C + channel, mask=n < N, other=0.0).to(tl.float32)
    y += tl.load(b + n * C + channel, mask=n < N, other=0.0).to(tl.float32)
    y += tl.load(offset + channel).to(tl.float32)
    tl.store(out + n * C + channel, y.to(out.dtype.element_ty), mask=n < N)


@kernel
def _repeat_kernel(x: "Any", out: "Any", N: "Any", W: "Any", C: tl.constexpr, ROWS: tl.constexpr) -> Any:
    """Repeat ROWS positions of rows of W; the rows of all pictures are one below another."""
    channel = tl.arange(0, C)[None, :]
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    y = tl.load(x + n * C + channel, mask=n < N, other=0.0)
    corner = out + (n // W * (4 * W) + n % W * 2) * C + channel
    for row in tl.static_range(2):
        for column in tl.static_range(2):
            tl.store(corner + (row * 2 * W + column) * C, y, mask=n < N)


def _programs(picture: Tensor) -> tuple[int, int, int, int]:
    """Return channels, positions, positions of a program, and programs."""
    channels = picture.shape[1]
    positions, each = picture.numel() // max(1, channels), max(1, PROGRAM_NUMBERS // channels)
    return channels, positions, each, -(-positions // each)


@launcher(lambda a, b, offset: torch.empty_like(a))
def launch_add(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
    """Compute `add_pictures` of pictures in channels last, C a power of two."""
    out = torch.empty_like(a)
    channels, positions, each, programs = _programs(a)
    if positions:
        _add_kernel[(programs,)](a, b, offset, out, positions, channels, each, num_warps=4)
    return out


def _fake_repeated(picture: Tensor) -> Tensor:
    batch, channels, height, width = picture.shape
    shape = (batch, channels, 2 * height, 2 * width)
    return torch.empty(shape, dtype=picture.dtype, device=picture.device, memory_format=torch.channels_last)


@launcher(_fake_repeated)
def launch_repeat(picture: Tensor) -> Tensor:
    """Compute `repeat_pixels` of pictures in channels last, C a power of two."""
    out = _fake_repeated(picture)
    channels, positions, each, programs = _programs(picture)
    if positions:
        _repeat_kernel[(programs,)](picture, out, positions, picture.shape[3], channels, each, num_warps=4)
    return out


def in_kernel(picture: Tensor, *others: Any) -> bool | str:
    """Return True, or why kernels of pictures cannot take these: channels last, their number a power of two."""
    last = all(
        each.is_contiguous(memory_format=torch.channels_last)
        for each in (picture, *others)
        if isinstance(each, Tensor) and each.dim() == 4
    )
    if not last or picture.shape[1] != holding(picture.shape[1]):
        return "takes pictures in channels last whose channels are a power of two"
    return why_unsupported(picture, FLOAT_DTYPES) or True


add_pictures.on("cuda", "triton", when=in_kernel)(launch_add)
repeat_pixels.on("cuda", "triton", when=in_kernel, numerics="exact")(launch_repeat)
