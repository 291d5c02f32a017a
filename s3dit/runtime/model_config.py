"""Makes the ModelConfig of a model: reads the configs of a directory, and checks that those of its parts fit."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from s3dit.configs.model_files import KINDS, read_json, read_own, read_vision
from s3dit.configs.part_configs import need
from s3dit.errors import CheckpointError
from s3dit.model.config import (
    TWINFLOW,
    VARIANTS,
    ModelConfig,
    SchedulerConfig,
    Settings,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    Variant,
    variant_of,
)


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
    if transformer.target_timestep:
        settings = replace(TWINFLOW, height=settings.height, width=settings.width)
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
