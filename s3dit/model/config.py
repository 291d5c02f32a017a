"""What a model is made of: the configurations of its parts, its variant, and the settings it is meant to be run with.

`VARIANTS` holds what the files do not say: a variant's settings. Which variant a directory holds is detected from its
files (SigLIP width, the shift of the schedule where it is exactly one of the published ones), never from its name. A
directory may say more in `s3dit.json` (variant, size, steps, the words it knows); the embedded tiny model does. How
the files are read is in `configs/`, how a ModelConfig is made of them in `runtime/model_config.py`; the dataclasses of
the parts are re-exported here.
"""

from dataclasses import dataclass
from typing import Literal

from s3dit.configs.part_configs import (
    LARGEST,
    MOST_LAYERS,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    VisionConfig,
    VisionInputConfig,
)
from s3dit.request import Schedule, Solver

__all__ = [
    "LARGEST", "MOST_LAYERS", "ModelConfig", "SchedulerConfig", "Settings", "TextEncoderConfig", "TransformerConfig",
    "VAEConfig", "VisionConfig", "VisionInputConfig",
]  # fmt: skip

Variant = Literal["turbo", "base", "omni", "tiny"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings a variant is meant to be run with, where neither the request nor the directory says otherwise."""

    num_inference_steps: int
    guidance_scale: float
    height: int = 1024
    width: int = 1024
    solver: Solver = "euler"
    schedule: Schedule = "official"


VARIANTS: dict[Variant, Settings] = {
    "turbo": Settings(num_inference_steps=8, guidance_scale=0.0),
    "base": Settings(num_inference_steps=28, guidance_scale=4.0),
    "omni": Settings(num_inference_steps=28, guidance_scale=4.0),
    "tiny": Settings(num_inference_steps=8, guidance_scale=0.0, height=128, width=128),
}
# A TwinFlow model's, whose steps aim at the end; the other ones that it was made of are its variant's.
TWINFLOW = Settings(num_inference_steps=4, guidance_scale=0.0, solver="lcm", schedule="twinflow")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The configuration of a whole model: its parts, its variant and its settings."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    variant: Variant
    settings: Settings
    # None where the directory has no siglip/: then the model takes no reference images.
    vision: VisionConfig | None = None
    vision_input: VisionInputConfig | None = None
    # What the directory says of its own world (embedded model): words it knows, one sentence, a prompt that suits it.
    words: frozenset[str] = frozenset()
    note: str = ""
    prompt: str = ""


def variant_of(transformer: TransformerConfig, scheduler: SchedulerConfig) -> Variant | None:
    """Detect the variant by the files: SigLIP input means Omni or Edit, the shift exactly 3 Turbo, exactly 6 Z-Image.

    None for another shift, which was chosen by hand: then the files do not say whether the model is distilled.
    """
    if transformer.siglip_feat_dim is not None:
        return "omni"
    return {3.0: "turbo", 6.0: "base"}.get(scheduler.shift)  # type: ignore[return-value]
