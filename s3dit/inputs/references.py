"""Reads the reference pictures of Omni and Edit models, and prepares them for autoencoder and vision tower.

An Omni model reads each reference twice: the autoencoder makes latents of it, which become clean tokens of the image
stream, and the vision tower makes features, which become the vision stream. Both are the same for every step, every
prompt and every seed, so they are made once and kept (`ReferenceFeatures`).

A picture of more than 1024 × 1024 pixels is scaled to an area (`Request.reference_area`), its proportions kept; for the
autoencoder its edges are then cut to multiples of 16, for the tower they are not. Pictures are read and checked before
any weight (`read`).

Source: diffusers' `ZImageOmniPipeline` and its `Flux2ImageProcessor` for sizes and limits. One thing is not taken over
unless the convention is diffusers: it rounds the pixels to bf16 before the autoencoder, whatever that computes in; here
fp32 stays fp32. Not here: where
the tokens stand (model/layout.py), the tower (model/vision_encoder.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from s3dit.errors import CheckpointError, RequestError
from s3dit.inputs.images import Picture, Pictures, to_pil
from s3dit.inputs.resize import resized
from s3dit.model.config import ModelConfig, VisionInputConfig
from s3dit.model.edit_layout import released_order
from s3dit.model.layout import Grid, patchify
from s3dit.model.vision_encoder import patches_of
from s3dit.request import Request

# Pixels along the side of a token; a reference's sides are cut to multiples of it.
PATCH = 16
# A picture of more pixels is scaled; smaller sides and longer shapes are refused.
LARGE, SMALLEST_SIDE, LONGEST = 1024 * 1024, 64, 8


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference picture as autoencoder and vision tower read it.

    pixels (3, H, W) fp32 in [-1, 1], sides multiples of 16 · patches (n, 3 · 16²) fp32 on the grid `seen` · sha256 of
    the picture as it was given · size (height, width) that it was scaled to · name: what messages call it ·
    rounded: whether its pixels are to bf16.
    """

    name: str
    pixels: Tensor
    patches: Tensor
    seen: Grid
    sha256: str
    size: tuple[int, int]
    rounded: bool = False

    @property
    def grid(self) -> Grid:
        """Rows and columns of its latents' patches."""
        return self.pixels.shape[1] // PATCH, self.pixels.shape[2] // PATCH

    @property
    def shape(self) -> tuple[Grid, Grid]:
        """Its two grids, as `edit_layout.edit` takes them: of latents' patches, and of vision features."""
        return self.grid, self.seen

    @property
    def key(self) -> tuple[str, tuple[int, int], bool]:
        """A key that is equal for pictures that are equal to the model: hash, scaled size, rounding."""
        return self.sha256, self.size, self.rounded


@dataclass(frozen=True, slots=True)
class ReferenceFeatures:
    """The transformer's input of a reference: patches of latents (n, 64) fp32, and vision features (m, D)."""

    patches: Tensor
    features: Tensor

    @classmethod
    def of(cls, latents: Tensor, features: Tensor) -> "ReferenceFeatures":
        """Make them of the autoencoder's latents (16, H/8, W/8) and the tower's features (m, D), row by row."""
        return cls(patchify(latents.float().contiguous()), released_order(features))


def read(
    request: Request, config: ModelConfig, folder: Path, pictures: Pictures, notes: list[str]
) -> tuple[Request, tuple[tuple[Reference, ...], ...]]:
    """Read and check a request's references; returns it with sizes filled in, and the references of each picture.

    The size of a picture is, where nothing else says it, that of its last reference. Adds notes. Raises RequestError
    for pictures that cannot be read, are too small or too long, or are given to a model without a vision tower;
    CheckpointError where the model's folder lacks its tower.
    """
    sources = request.references()
    if not any(sources):
        return request, ((),) * request.count
    vision = _vision_input(config, folder)
    made: dict[tuple[int, int], Reference] = {}
    references, sizes, areas = [], [], []
    columns = (request.per_image(name) for name in ("height", "width", "reference_area"))
    for of_picture, height, width, area in zip(sources, *columns, strict=True):
        sized = height is not None and width is not None
        area = area or (height * width if sized else LARGE)
        keys = []
        for i, source in enumerate(of_picture, 1):
            picture = pictures.open(source, f"reference {i}")
            keys.append((id(picture), area))
            if keys[-1] not in made:
                made[keys[-1]] = _reference(picture, area, vision, notes, request.convention == "diffusers")
        references.append(tuple(made[key] for key in keys))
        settings = (config.settings.height, config.settings.width)
        last = tuple(PATCH * side for side in references[-1][-1].grid) if of_picture else settings
        sizes.append((last[0] if height is None else height, last[1] if width is None else width))
        areas.append(area if of_picture else None)
    request = request.filled(reference_area=areas)
    # Given latents say the size by themselves.
    if request.latents is None:
        request = request.filled(height=[h for h, _ in sizes], width=[w for _, w in sizes])
    return request, tuple(references)


def _vision_input(config: ModelConfig, folder: Path) -> VisionInputConfig:
    """How the model's vision tower takes pictures; raises RequestError or CheckpointError where it has none."""
    if config.transformer.siglip_feat_dim is None:
        raise RequestError(
            f"reference images are given to a {config.variant} model; needed an Omni or Edit model, which has siglip/; "
            "for a start image give image"
        )
    if config.vision_input is None:
        raise CheckpointError(
            f"{folder}: no siglip/ in it; reference images need the vision tower; download the whole model directory"
        )
    return config.vision_input


def _reference(picture: Picture, area: int, config: VisionInputConfig, notes: list[str], rounded: bool) -> Reference:
    """Scale and cut a picture for autoencoder and tower; adds a note where it is changed. Raises RequestError.

    rounded: the autoencoder's pixels are rounded to bf16, as diffusers does.
    """
    height, width = picture.size
    shape = f"{picture.name} is {width}×{height} pixels"
    if min(height, width) < SMALLEST_SIDE:
        raise RequestError(f"{shape}; a reference needs at least {SMALLEST_SIDE} a side; scale it up")
    if max(height, width) > LONGEST * min(height, width):
        raise RequestError(f"{shape}; a reference may be {LONGEST} times as long as wide at most; cut it")
    content = picture.content
    if height * width > LARGE:
        scale = math.sqrt(area / (width * height))
        height, width = int(height * scale), int(width * scale)
        content = (
            content.resize((width, height), Image.Resampling.LANCZOS)
            if isinstance(content, Image.Image)
            else resized(content, (height, width)).clamp(0, 1)
        )
    rows, columns = height // PATCH, width // PATCH
    if min(rows, columns) < 1:
        raise RequestError(
            f"{shape}, scaled to {area} in all {width}×{height}; needed {PATCH} a side; raise reference_area"
        )
    if (rows * PATCH, columns * PATCH) != picture.size:
        notes.append(f"{shape}; the model looks at {columns * PATCH}×{rows * PATCH} of it")
    pixels = Picture(picture.name, content).pixels()
    image = content if isinstance(content, Image.Image) else to_pil(pixels[None])[0]
    top, left = (height - rows * PATCH) // 2, (width - columns * PATCH) // 2
    cut = pixels[:, top : top + rows * PATCH, left : left + columns * PATCH]
    cut = cut.bfloat16().float() if rounded else cut
    return Reference(picture.name, cut, *patches_of(image, config), picture.sha256, (height, width), rounded)


def joined(references: Sequence[ReferenceFeatures]) -> tuple[Tensor | None, Tensor | None]:
    """Concatenate patches and features of all references of a pass; None and None where there is none."""
    if not references:
        return None, None
    return torch.cat([each.patches for each in references]), torch.cat([each.features for each in references])
