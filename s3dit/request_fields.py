"""The fields of a Request as keywords of a call, for type checkers and editors; a test holds them to the Request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from s3dit.control import Control
from s3dit.request import Convention, MaskMode, OutputType, Positions, Posterior, Preset, Schedule, Solver

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
    guidance_scale: float | None
    cfg: float | None
    cfg_normalization: bool | float
    cfg_truncation: float
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
    convention: Convention
    batch_place: Sequence[int] | None
    max_sequence_length: int
    image: ImageSource | Sequence[ImageSource] | None
    mask_image: ImageSource | Sequence[ImageSource | None] | None
    strength: float | None
    extend: Sequence[int] | None
    mask_mode: MaskMode
    mask_blur: float
    composite: bool
    posterior: Posterior
    upscale: float | None
    upscale_strength: float | None
    control: Control | Sequence[Control] | None
    reference: ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]] | None
    reference_area: int | Sequence[int | None] | None
    reference_positions: Positions
    output_type: OutputType
