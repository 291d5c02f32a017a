"""Prepares the state that a solver starts from: start images, masks, and the second pass.

There is one path through the model, and a start image is data on it. The state starts part of the way along the flow,
at (1 - sigma)·image + sigma·noise, and fewer steps are left (img2img). Where a mask says so, the state is set after
every step to the straight line from the noise to the image (`InpaintBlend`: inpainting; outpainting is a mask of
margins; a gray mask may also say for how many steps). A second pass is the first one's picture, enlarged, as the start
image of another. Everything is per picture, so that a batch may hold other sizes, images and masks, and per patch, so
that solvers and model need not know of it.

Images are read before any weight (`read`). What is decoded outside of the mask is replaced by the input's own pixels
(`StartImage.over`), which are then the input's to the bit.

Sources: diffusers' `ZImageImg2ImgPipeline` (which steps are left, the start), `ZImageInpaintPipeline` (mask, blending),
its community pipeline for differential img2img (thresholds). Not here: noise (noise.py), steps
(sampling/solvers.py), files (images.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.inputs.images import Picture, Pictures
from s3dit.inputs.noise import Source, given_state, starting_noise
from s3dit.inputs.resize import resized
from s3dit.model.config import SchedulerConfig
from s3dit.model.layout import patchify
from s3dit.request import IMAGES, Request
from s3dit.sampling import comfyui
from s3dit.sampling.guidance_methods import zero_init_steps
from s3dit.sampling.schedules import sigmas
from s3dit.values import LARGEST_SIDE

# Pixels along the side of a patch; sizes are multiples of it.
PATCH = 16


@dataclass(frozen=True, slots=True)
class StartImage:
    """The start image of a picture, with its mask.

    pixels (3, H, W) fp32 in [-1, 1] · mask (1, H, W) fp32, 1 painted anew and 0 kept, or None: all is painted anew ·
    hashes: of the inputs, by the name of the request's field.
    """

    pixels: Tensor
    mask: Tensor | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    def over(self, drawn: Tensor, differential: bool = False) -> Tensor:
        """Lay the kept pixels over what was drawn, (3, H, W) -> (3, H, W): the input's bits where the mask is 0.

        differential: the mask is a map of change, whose gray values were redrawn for fewer steps, not blended.
        """
        if self.mask is None:
            return drawn
        mask = (self.mask > 0).float() if differential else self.mask
        return torch.where(mask > 0, (1 - mask) * self.pixels + mask * drawn, self.pixels)


def read(request: Request, pictures: Pictures, notes: list[str]) -> tuple[Request, tuple[StartImage, ...]]:
    """Read and check a request's start images; returns it with sizes filled in, and a start image for each picture.

    -> no start images where the request has none. Adds notes; raises RequestError.
    """
    if request.image is None:
        return request, ()
    margins = _margins(request.extend, notes)
    start_images: dict[tuple[int, int, int, int], StartImage] = {}
    sizes, of_pictures = [], []
    columns = [request.per_image(name) for name in (*IMAGES, "height", "width")]
    for source, mask_source, height, width in zip(*columns, strict=True):
        start = pictures.open(source, "image")
        mask = None if mask_source is None else pictures.open(mask_source, "mask_image")
        size = _size(start, height, width, margins, notes)
        # Equal inputs are encoded once.
        key = (id(start), id(mask), *size)
        if key not in start_images:
            start_images[key] = _start_image(request, start, mask, size, margins)
        sizes.append(size)
        of_pictures.append(start_images[key])
    request = request.filled(
        height=tuple(height for height, _ in sizes),
        width=tuple(width for _, width in sizes),
        extend=request.extend and margins,
    )
    return request, tuple(of_pictures)


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
    own, (left, top, right, bottom) = picture.size, margins
    inner = (
        own[0] // PATCH * PATCH if height is None else height - top - bottom,
        own[1] // PATCH * PATCH if width is None else width - left - right,
    )
    shape = f"{picture.name} is {own[1]}×{own[0]} pixels"
    if min(inner) < PATCH:
        raise RequestError(f"{shape}, which leaves {inner[1]}×{inner[0]} of it; needed at least {PATCH}×{PATCH}")
    size = inner[0] + top + bottom, inner[1] + left + right
    if max(size) > LARGEST_SIDE:
        raise RequestError(
            f"{shape}, so {size[1]}×{size[0]} would be drawn; needed sides of at most {LARGEST_SIDE}; give a smaller "
            "height and width"
        )
    if inner != own:
        stretch = inner[0] * own[1] / (inner[1] * own[0])
        changed = "" if 0.9 < stretch < 1.1 else ", which changes its proportions"
        notes.append(f"{shape}; it is scaled to {inner[1]}×{inner[0]}{changed}")
    return size


def _start_image(
    request: Request, picture: Picture, mask: Picture | None, size: tuple[int, int], margins: tuple[int, int, int, int]
) -> StartImage:
    """Scale a picture and its mask into `size`; margins are filled with the picture's edge. Raises RequestError."""
    left, top, right, bottom = margins
    inner, around = (size[0] - top - bottom, size[1] - left - right), (left, right, top, bottom)
    pixels = F.pad(picture.pixels(inner)[None], around, mode="replicate")[0]
    hashes = {"image": picture.sha256}
    if mask is None and not any(margins):
        return StartImage(pixels, None, hashes)
    if mask is None:
        paint = torch.zeros(1, *inner, dtype=torch.float32)
    else:
        if mask.size != picture.size and request.convention != "diffusers":
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
    """Resize a mask (1, H, W) to that of latents, (1, H/8, W/8), as diffusers does: one pixel a cell."""
    return F.interpolate(mask[None], scale_factor=0.125, mode="nearest")[0]


def remaining_sigmas(request: Request, scheduler: SchedulerConfig | None = None) -> Tensor:
    """Return the sigmas of a resolved request, (steps + 1,) fp32: all of them, or with a strength the last ones.

    Without a picture to begin from, cfg_zero's first steps, which have no velocity, are left out.

    scheduler: of the model, for a request without a shift, whose shift follows from its size. Raises RequestError.
    """
    dynamic = request.shift is None and scheduler is not None
    shift = _dynamic_shift(request, scheduler) if dynamic and scheduler else request.shift or 1.0
    steps, strength, theirs = request.num_inference_steps or 1, request.strength, request.convention == "comfyui"
    if theirs and (request.sigmas is None or request.schedule != "official"):
        levels = comfyui.sigmas(steps, shift, request.schedule, dynamic, strength)
    else:
        levels = sigmas(steps, shift, request.schedule, request.sigmas, dynamic)
        n = len(levels) - 1
        if strength is not None:
            # parity: diffusers' get_timesteps, in floats of 64 bits.
            levels = levels[int(max(n - min(n * strength, n), 0)) :]
    levels = comfyui.below_noise(levels, request.solver, shift, dynamic) if theirs else levels
    return levels[zero_init_steps(request) :] if strength is None else levels


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
    """Return rows and columns of patches of every picture of a resolved request."""
    sides = zip(request.per_image("height"), request.per_image("width"), strict=True)
    return tuple((height // PATCH, width // PATCH) for height, width in sides)


def noised(image: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the state of an image at a noise level: image and noise (tokens, 64) fp32, sigma () fp32."""
    return sigma * noise + (1.0 - sigma) * image


@dataclass(frozen=True, slots=True)
class InpaintBlend:
    """Replaces, after every step, what is to be kept of the state by the noised image; all tensors (tokens, 64).

    paint: 1 where the model's state is taken, 0 where the image, noised with the same noise to the sigma reached; in
    between a blend, or if `differential` the share of the `steps` in which the model's state is taken.
    """

    image: Tensor
    noise: Tensor
    paint: Tensor
    steps: int
    differential: bool

    def __call__(self, x: Tensor, i: int, sigma: Tensor) -> Tensor:
        """Return the state after step i (from 1), at sigma: x where it is painted, the noised image where kept."""
        paint = self.paint
        if self.differential:
            # parity: the last step is the model's everywhere, so that its seams close.
            if i == self.steps:
                return x
            paint = (1 - paint <= torch.tensor((i - 1) / self.steps, dtype=torch.float32)).to(x)
        return (1 - paint) * noised(self.image, self.noise, sigma) + paint * x


def drawn(
    start_images: Sequence[StartImage], request: Request, sources: Sequence[Source], encode: Callable[..., list[Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """Draw a request's noise (tokens, 64) and encode its start images, (16, H/8, W/8) each.

    sources: of the noise, whose generators posterior sample takes first; after the noise where that is only blended
    with, as in diffusers · encode: as `Encoders.encode_images`.
    """
    grids = grids_of(request)
    first = None if given_state(request) is None else starting_noise(request, grids, sources)
    sampled = [source.generator for source in sources] if request.posterior == "sample" else None
    latents = encode([image.pixels for image in start_images], sampled, shared=request.convention != "own")
    return starting_noise(request, grids, sources) if first is None else first, latents


def begin(
    start_images: Sequence[StartImage],
    latents: Sequence[Tensor],
    noise: Tensor,
    sigmas: Tensor,
    differential: bool,
    state: Tensor | None = None,
) -> tuple[Tensor, InpaintBlend | None]:
    """Return the state to start from, and an InpaintBlend if any start image has a mask.

    latents: of the start images, one (16, H/8, W/8) fp32 each · noise (tokens, 64) on the device of the sampler ·
    sigmas as from `remaining_sigmas` · state: to start from, where it is given.
    """
    image = torch.cat([patchify(of_image) for of_image in latents]).to(noise)
    x = noised(image, noise, sigmas[0]) if state is None else state.to(noise)
    if all(start_image.mask is None for start_image in start_images):
        return x, None
    masks = [
        torch.ones_like(of_image) if start.mask is None else _cells(start.mask).to(of_image).expand_as(of_image)
        for start, of_image in zip(start_images, latents, strict=True)
    ]
    paint = torch.cat([patchify(mask.contiguous()) for mask in masks]).to(noise)
    return x, InpaintBlend(image, noise, paint, len(sigmas) - 1, differential)


def passes(request: Request, notes: list[str]) -> Iterator[Request]:
    """Yield a resolved request, and its second pass if it has one: the same, larger, for the last part of the flow.

    Adds a note where sizes are rounded to whole patches. Raises RequestError where the second pass is too large.
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
    """Make the start images of a second pass: pictures of the first, (3, H, W) each, and its masks, enlarged.

    request: of the second pass, which has the sizes.
    """
    sizes = zip(request.per_image("height"), request.per_image("width"), strict=True)
    masks = [start_image.mask for start_image in start_images] or [None] * len(pictures)
    larger = []
    for picture, mask, size in zip(pictures, masks, sizes, strict=True):
        if mask is not None:
            hard = bool(((mask == 0) | (mask == 1)).all())
            mask = resized(mask, size).clamp(0, 1)
            mask = (mask >= 0.5).float() if hard else mask
        larger.append(StartImage(resized(picture.clamp(-1, 1), size).clamp(-1, 1), mask))
    return tuple(larger)
