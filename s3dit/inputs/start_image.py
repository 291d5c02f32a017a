"""What a request adds to the state: noise, start images, what is kept of them, and a second pass.

There is one path through the model, and a start image is data on it. The state starts part of the way down the flow, at
(1 - sigma)·image + sigma·noise, and fewer steps are left (img2img). Where a mask says so, the state is put back after
every step onto the straight line from the noise to the image (`InpaintBlend`: inpainting; outpainting is a mask of
margins; a gray mask may also say for how many steps). A second pass is the first one's picture, enlarged, as the start
image of another. Everything is per picture, so that a batch may hold other sizes, images and masks, and per patch, so
that solvers and model see nothing of it.

Images are read before any weight (`read`). What decodes outside of the mask is laid under again from the input's own
pixels (`StartImage.over`), which are then the input's to the bit.

Sources: diffusers' `ZImageImg2ImgPipeline` (which steps are left, the start), `ZImageInpaintPipeline` (mask, blending),
its community pipeline for differential img2img (thresholds). Not here: steps (sampler.py), files (images.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.inputs.images import Picture, Pictures
from s3dit.inputs.resize import resized
from s3dit.model.config import SchedulerConfig
from s3dit.model.layout import patchify
from s3dit.request import IMAGES, Request
from s3dit.sampling.schedules import sigmas
from s3dit.values import LARGEST_SIDE

# Pixels along the side of a patch; sizes are multiples of it.
PATCH = 16

Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class StartImage:
    """What is known of one picture before it is drawn.

    pixels (3, H, W) fp32 in [-1, 1] · mask (1, H, W) fp32, 1 painted anew and 0 kept, or None: all is painted anew ·
    hashes: of the inputs, by the name of the request's field.
    """

    pixels: Tensor
    mask: Tensor | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    def over(self, drawn: Tensor, differential: bool = False) -> Tensor:
        """Lay the kept pixels over what was drawn, (3, H, W) -> (3, H, W); those of mask 0 are the input's bits."""
        if self.mask is None:
            return drawn
        # Of a map of change, what lies between was redrawn for fewer steps, not blended.
        mask = (self.mask > 0).float() if differential else self.mask
        return torch.where(mask > 0, (1 - mask) * self.pixels + mask * drawn, self.pixels)


def read(request: Request, pictures: Pictures, notes: list[str]) -> tuple[Request, tuple[StartImage, ...]]:
    """Read and check a request's start images; returns it with sizes filled in, and one for each picture; adds notes.

    A request without a start image has none. Raises RequestError.
    """
    if request.image is None:
        return request, ()
    margins = _margins(request.extend, notes)
    start_images: dict[tuple[int, int, int, int], StartImage] = {}
    found = []
    rows = zip(*(request.per_image(name) for name in (*IMAGES, "height", "width")), strict=True)
    for source, mask_source, height, width in rows:
        start = pictures.open(source, "image")
        mask = None if mask_source is None else pictures.open(mask_source, "mask_image")
        size = _size(start, height, width, margins, notes)
        # Equal inputs are encoded once.
        key = (id(start), id(mask), *size)
        if key not in start_images:
            start_images[key] = _canvas(request, start, mask, size, margins)
        found.append((size, start_images[key]))
    request = request.filled(
        height=tuple(height for (height, _), _ in found),
        width=tuple(width for (_, width), _ in found),
        extend=request.extend and margins,
    )
    return request, tuple(start_image for _, start_image in found)


def _margins(extend: Sequence[int] | None, notes: list[str]) -> tuple[int, int, int, int]:
    """Margins (left, top, right, bottom), each a multiple of PATCH."""
    if extend is None:
        return 0, 0, 0, 0
    left, top, right, bottom = (-(-margin // PATCH) * PATCH for margin in extend)
    if (left, top, right, bottom) != tuple(extend):
        notes.append(f"margins are made multiples of {PATCH}: {left},{top},{right},{bottom}")
    return left, top, right, bottom


def _size(
    picture: Picture, height: int | None, width: int | None, margins: tuple[int, int, int, int], notes: list[str]
) -> tuple[int, int]:
    """The size that is drawn, (height, width), margins included: as asked, else the picture's, cut to whole patches."""
    found, (left, top, right, bottom) = picture.size, margins
    inner = (
        found[0] // PATCH * PATCH if height is None else height - top - bottom,
        found[1] // PATCH * PATCH if width is None else width - left - right,
    )
    shape = f"{picture.name} is {found[1]}×{found[0]} pixels"
    if min(inner) < PATCH:
        raise RequestError(f"{shape}, which leaves {inner[1]}×{inner[0]} of it; needed at least {PATCH}×{PATCH}")
    size = inner[0] + top + bottom, inner[1] + left + right
    if max(size) > LARGEST_SIDE:
        raise RequestError(
            f"{shape}, so {size[1]}×{size[0]} would be drawn; needed sides of at most {LARGEST_SIDE}; give a smaller "
            "height and width"
        )
    if inner != found:
        stretch = inner[0] * found[1] / (inner[1] * found[0])
        changed = "" if 0.9 < stretch < 1.1 else ", which changes its proportions"
        notes.append(f"{shape}; it is scaled to {inner[1]}×{inner[0]}{changed}")
    return size


def _canvas(
    request: Request, picture: Picture, mask: Picture | None, size: tuple[int, int], margins: tuple[int, int, int, int]
) -> StartImage:
    left, top, right, bottom = margins
    inner, around = (size[0] - top - bottom, size[1] - left - right), (left, right, top, bottom)
    pixels = F.pad(picture.pixels(inner)[None], around, mode="replicate")[0]
    hashes = {"image": picture.sha256}
    if mask is None and not any(margins):
        return StartImage(pixels, None, hashes)
    if mask is None:
        paint = torch.zeros(1, *inner, dtype=torch.float32)
    else:
        if mask.size != picture.size:
            (h, w), (height, width) = mask.size, picture.size
            raise RequestError(f"{mask.name} is {w}×{h} pixels; needed the size of {picture.name}, {width}×{height}")
        paint = mask.mask(inner, cut=request.mask_mode == "inpaint")
        hashes["mask_image"] = mask.sha256
    paint = F.pad(paint, around, value=1.0)
    name = "mask_image" if mask is None else mask.name
    if not paint.any():
        raise RequestError(
            f"{name} is black everywhere, so nothing would be painted; needed white where the picture is to change (in "
            "8 bits white is 255)"
        )
    if request.mask_blur:
        gray = Image.fromarray((paint[0] * 255).round().to(torch.uint8).numpy())
        softened = np.array(gray.filter(ImageFilter.GaussianBlur(request.mask_blur)), dtype=np.float32)
        paint = torch.from_numpy(softened / 255.0)[None]
    if not _cells(paint).any():
        raise RequestError(f"{name} is too thin: it holds no latent cell of 8×8 pixels; needed broader strokes")
    return StartImage(pixels, paint, hashes)


def _cells(mask: Tensor) -> Tensor:
    """A mask (1, H, W) at the size of latents, (1, H/8, W/8), as diffusers takes it: one pixel a cell."""
    return F.interpolate(mask[None], scale_factor=0.125, mode="nearest")[0]


def remaining_sigmas(request: Request, scheduler: SchedulerConfig | None = None) -> Tensor:
    """Noise levels of a resolved request: all of them, or with a strength the last ones; (steps + 1,) fp32.

    scheduler: of the model, for a request without a shift, whose shift follows from its size. Raises RequestError.
    """
    dynamic = request.shift is None and scheduler is not None
    shift = _dynamic_shift(request, scheduler) if dynamic and scheduler else request.shift or 1.0
    found = sigmas(request.num_inference_steps or 1, shift, request.schedule, request.sigmas, dynamic)
    n = len(found) - 1
    if request.strength is None:
        return found
    # parity: diffusers' get_timesteps, in floats of 64 bits.
    return found[int(max(n - min(n * request.strength, n), 0)) :]


def _dynamic_shift(request: Request, scheduler: SchedulerConfig) -> float:
    """The shift that follows from the size of the pictures; RequestError where they have several."""
    tokens = {rows * columns for rows, columns in grids_of(request)}
    if len(tokens) > 1:
        raise RequestError(
            "the pictures have several sizes, and this model's noise levels follow from the size "
            "(use_dynamic_shifting in its scheduler_config.json); needed one size in a call; draw them one after the "
            "other, or give one shift for all"
        )
    try:
        return scheduler.shift_at(tokens.pop())
    except ValueError as error:
        raise RequestError(str(error)) from None


def grids_of(request: Request) -> tuple[tuple[int, int], ...]:
    """Rows and columns of patches of every picture of a resolved request."""
    sides = zip(request.per_image("height"), request.per_image("width"), strict=True)
    return tuple((height // PATCH, width // PATCH) for height, width in sides)


def generators(request: Request) -> list[torch.Generator]:
    """One source of random numbers a picture; a single generator given by the caller serves all in order."""
    given = request.generator
    if given is None:
        return [torch.Generator().manual_seed(seed) for seed in request.seeds()]
    several = [given] * request.count if isinstance(given, torch.Generator) else list(given)
    if len(several) != request.count:
        raise RequestError(f"{len(several)} generators for {request.count} pictures; needed one, or one a picture")
    return several


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers in fp32; a generator gives others in other dtypes."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


def draw(grids: Grids, generators: Sequence[torch.Generator]) -> Tensor:
    """Noise for every picture from its own generator, drawn as latents so that it is diffusers' noise: (tokens, 64)."""
    return torch.cat(
        [
            patchify(_normal((16, 2 * rows, 2 * columns), g).cpu())
            for (rows, columns), g in zip(grids, generators, strict=True)
        ]
    )


def starting_noise(request: Request, grids: Grids, generators: Sequence[torch.Generator]) -> Tensor:
    """The noise that a request starts from: the latents it gives, or drawn; (tokens, 64) fp32."""
    if request.latents is not None:
        return torch.cat([patchify(one.float().contiguous()) for one in request.latents])
    return draw(grids, generators)


def noised(image: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The state of an image at a noise level; both (tokens, 64) fp32, sigma () fp32."""
    return sigma * noise + (1.0 - sigma) * image


@dataclass(frozen=True, slots=True)
class InpaintBlend:
    """Holds what is kept of the state on its course, after every step; all tensors (tokens, 64).

    paint: 1 where the model's state stands, 0 where the image does, noised with the same noise to the level reached;
    between them a blend, or if `differential` the share of the `steps` in which the model's state stands.
    """

    image: Tensor
    noise: Tensor
    paint: Tensor
    steps: int
    differential: bool

    def __call__(self, x: Tensor, i: int, sigma: Tensor) -> Tensor:
        """The state after step i (from 1), at level sigma: x where it is painted, the image's where it is kept."""
        paint = self.paint
        if self.differential:
            # parity: the last step is the model's everywhere, so that its seams close.
            if i == self.steps:
                return x
            paint = (1 - paint <= torch.tensor((i - 1) / self.steps, dtype=torch.float32)).to(x)
        return (1 - paint) * noised(self.image, self.noise, sigma) + paint * x


def begin(
    start_images: Sequence[StartImage], latents: Sequence[Tensor], noise: Tensor, sigmas: Tensor, differential: bool
) -> tuple[Tensor, InpaintBlend | None]:
    """The state to start from, and what keeps it on course if any start image has a mask.

    latents: of the start images, one (16, H/8, W/8) fp32 each · noise (tokens, 64) on the device of the sampler ·
    levels as from `remaining_sigmas`.
    """
    image = torch.cat([patchify(one) for one in latents]).to(noise)
    x = noised(image, noise, sigmas[0])
    if all(start_image.mask is None for start_image in start_images):
        return x, None
    paint = [
        torch.ones_like(one) if start_image.mask is None else _cells(start_image.mask).to(one).expand_as(one)
        for start_image, one in zip(start_images, latents, strict=True)
    ]
    return x, InpaintBlend(image, noise, torch.cat([patchify(one.contiguous()) for one in paint]).to(noise),
                   len(sigmas) - 1, differential)  # fmt: skip


def passes(request: Request, notes: list[str]) -> Iterator[Request]:
    """A resolved request, and its second pass if it wants one: the same, larger, for the last part of the flow.

    Raises RequestError where that is too large.
    """
    yield request
    if request.upscale is None:
        return
    heights, widths = (
        tuple(round(side * request.upscale / PATCH) * PATCH for side in request.per_image(name))
        for name in ("height", "width")
    )
    if (largest := max(*heights, *widths)) > LARGEST_SIDE:
        raise RequestError(
            f"upscale {request.upscale:g} makes a side of {largest} pixels; needed at most {LARGEST_SIDE}; scale less"
        )
    pairs = zip(heights, widths, request.per_image("height"), request.per_image("width"), strict=True)
    for height, width, h, w in pairs:
        if (height, width) != (h * request.upscale, w * request.upscale):
            notes.append(f"{w}×{h} enlarged {request.upscale:g} times is made whole patches: {width}×{height}")
    yield request.filled(
        height=heights, width=widths, strength=request.upscale_strength, upscale=None, upscale_strength=None,
        latents=None,
    )  # fmt: skip


def enlarged(
    start_images: Sequence[StartImage], pictures: Sequence[Tensor], request: Request
) -> tuple[StartImage, ...]:
    """Start images of a second pass: what the first drew, (3, H, W) each, and its masks, at the size of `request`."""
    sizes = zip(request.per_image("height"), request.per_image("width"), strict=True)
    masks = [start_image.mask for start_image in start_images] or [None] * len(pictures)
    found = []
    for picture, mask, size in zip(pictures, masks, sizes, strict=True):
        if mask is not None:
            hard = bool(((mask == 0) | (mask == 1)).all())
            mask = resized(mask, size).clamp(0, 1)
            mask = (mask >= 0.5).float() if hard else mask
        found.append(StartImage(resized(picture.clamp(-1, 1), size).clamp(-1, 1), mask))
    return tuple(found)
