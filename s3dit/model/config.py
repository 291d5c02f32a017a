"""What a model is made of: the configurations of its parts, its variant, and the settings it is meant to be run with.

`VARIANTS` holds what the files do not say: a variant's settings. Which variant a directory holds is detected from its
files (SigLIP width, the shift of the schedule where it is exactly one of the published ones), never from its name. A
directory may say more in `s3dit.json` (variant, size, steps, the words it knows); the embedded tiny model does. How
the files are read and checked is in `s3dit/configs/`; the dataclasses of the parts are re-exported here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from s3dit.configs.model_files import KINDS, read_json, read_own, read_vision
from s3dit.configs.part_configs import (
    LARGEST,
    MOST_LAYERS,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    VisionConfig,
    VisionInputConfig,
    need,
)
from s3dit.errors import CheckpointError

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


VARIANTS: dict[Variant, Settings] = {
    "turbo": Settings(num_inference_steps=8, guidance_scale=0.0),
    "base": Settings(num_inference_steps=28, guidance_scale=4.0),
    "omni": Settings(num_inference_steps=28, guidance_scale=4.0),
    "tiny": Settings(num_inference_steps=8, guidance_scale=0.0, height=128, width=128),
}


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


def read_model(folder: Path) -> ModelConfig:
    """Read every config of a model in the official directory layout; raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: not a folder; needed a model directory with transformer/, text_encoder/, vae/"
        )
    missing = [
        part
        for part in ("transformer", "text_encoder", "vae", "scheduler", "tokenizer")
        if not (folder / part).is_dir()
    ]
    if missing:
        raise CheckpointError(
            f"{folder}: not a Z-Image model directory, it lacks {'/, '.join(missing)}/; "
            "needed the layout of Tongyi-MAI/Z-Image-Turbo"
        )

    def part(kind: type[Any], name: str, file: str = "config.json") -> Any:
        path = folder / name / file
        return kind.from_json(read_json(path), path)

    scheduler = part(SchedulerConfig, "scheduler", "scheduler_config.json")
    configs = {name: part(kind, name) for name, kind in KINDS.items()}
    if configs["transformer"].siglip_feat_dim is not None:
        configs |= read_vision(folder)
    return compose(configs, scheduler, read_own(folder), folder)


def compose(
    configs: Mapping[str, Any], scheduler: SchedulerConfig, own: Mapping[str, Any], source: Path
) -> ModelConfig:
    """Make the configuration of a model of those of its parts, after checking that they fit each other.

    configs: by folder name, siglip and siglip_processor only where there is a vision tower · own: what the model's
    `s3dit.json` says · source: for messages. Raises CheckpointError.
    """
    _check_fit(configs, source)
    transformer: TransformerConfig = configs["transformer"]
    # Of the two wrong guesses the cheaper one: Turbo drawn like Z-Image takes seven times as long and is burnt.
    variant: Variant = own.get("variant") or variant_of(transformer, scheduler) or "turbo"
    settings = VARIANTS[variant]
    known = {f.name: own.get(f.name, getattr(settings, f.name)) for f in fields(Settings)}
    return ModelConfig(
        transformer=transformer,
        text_encoder=configs["text_encoder"],
        vae=configs["vae"],
        scheduler=scheduler,
        variant=variant,
        settings=Settings(**known),
        vision=configs.get("siglip"),
        vision_input=configs.get("siglip_processor"),
        words=frozenset(own.get("words", ())),
        note=str(own.get("note", "")),
        prompt=str(own.get("prompt", "")),
    )


def _check_fit(configs: Mapping[str, Any], source: Path) -> None:
    """Raise CheckpointError where parts are of different models, or of sizes that no Z-Image has."""
    transformer: TransformerConfig = configs["transformer"]
    text_encoder: TextEncoderConfig = configs["text_encoder"]
    if transformer.cap_feat_dim != text_encoder.hidden_size:
        raise CheckpointError(
            f"{source}: the transformer takes text of width {transformer.cap_feat_dim}, the text encoder gives "
            f"{text_encoder.hidden_size}; the parts are of different models"
        )
    vision, vision_input = configs.get("siglip"), configs.get("siglip_processor")
    if vision is not None and vision_input is not None:
        sizes = (vision.hidden_size, vision.patch_size, vision.num_channels)
        needed = (transformer.siglip_feat_dim, vision_input.patch_size, 3)
        if sizes != needed:
            raise CheckpointError(
                f"{source}: siglip/ has (width, patch_size, channels) {sizes}, transformer and siglip_processor/ need "
                f"{needed}; the parts are of different models"
            )
    vae: VAEConfig = configs["vae"]
    channels = (vae.in_channels, vae.out_channels, vae.latent_channels, transformer.in_channels)
    need(
        channels == (3, 3, 16, 16) and len(vae.block_out_channels) == 4, source,
        f"channels of (pictures in, pictures out, latents, transformer) are {channels}, the VAE's block_out_channels "
        f"{list(vae.block_out_channels)}", "(3, 3, 16, 16), and 4 levels, which make 8 pixels one cell",
    )  # fmt: skip


def variant_of(transformer: TransformerConfig, scheduler: SchedulerConfig) -> Variant | None:
    """Detect the variant by the files: SigLIP input means Omni or Edit, the shift exactly 3 Turbo, exactly 6 Z-Image.

    None for another shift, which was chosen by hand: then the files do not say whether the model is distilled.
    """
    if transformer.siglip_feat_dim is not None:
        return "omni"
    return {3.0: "turbo", 6.0: "base"}.get(scheduler.shift)  # type: ignore[return-value]
