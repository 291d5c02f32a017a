"""The fields of a Request as keywords of a call, for type checkers and editors; a test holds them to the Request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from s3dit.cache import Cache
from s3dit.control import Control
from s3dit.region import Region
from s3dit.request import (
    Convention,
    MaskMode,
    OutputType,
    Positions,
    Posterior,
    Preset,
    Schedule,
    Solver,
    TargetTimestep,
)

if TYPE_CHECKING:
    import torch

    from s3dit.request import Embeds, ImageSource


class RequestFields(TypedDict, total=False):
    """What `Pipeline.__call__`, `plan` and `stream` take beside a prompt; `Request` says what each means."""

    prompt: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    height: int | Sequence[int] | None
    width: int | Sequence[int] | None
    preset: Preset | None
    num_inference_steps: int | None
    guidance_scale: float | Sequence[float] | None
    cfg: float | Sequence[float] | None
    cfg_normalization: bool | float
    cfg_truncation: float
    guidance_interval: Sequence[float] | None
    guidance_method: str | None
    skip_layers: str | None
    variation: float | str | Sequence[float | str] | None
    num_images_per_prompt: int
    seed: int | Sequence[int] | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: torch.Tensor | Sequence[torch.Tensor] | None
    prompt_embeds: Embeds | None
    negative_prompt_embeds: Embeds | None
    sigmas: Sequence[float] | None
    shift: float | None
    schedule: Schedule
    solver: Solver
    target_timestep: TargetTimestep | None
    convention: Convention
    batch_place: Sequence[int] | None
    cache: Cache | str | None
    max_sequence_length: int
    image: ImageSource | Sequence[ImageSource] | None
    mask_image: ImageSource | Sequence[ImageSource | None] | None
    strength: float | None
    extend: Sequence[int] | None
    mask_mode: MaskMode
    mask_blur: float
    composite: bool | None
    posterior: Posterior
    upscale: float | None
    upscale_strength: float | None
    control: Control | Sequence[Control] | None
    reference: ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]] | None
    reference_area: int | Sequence[int | None] | None
    reference_positions: Positions
    region: Region | Sequence[Region] | Sequence[Sequence[Region] | None] | None
    base_weight: float
    output_type: OutputType
