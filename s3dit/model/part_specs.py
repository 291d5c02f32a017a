"""The parts of a model in one table: what each is called, configured by, built as and given by on the command line.

A ControlNet is a part as well, and so is the vision tower of Omni models; both are handled where they are opened. Which
tensors tell a part is the files' affair (`weights.split_checkpoint`). Only `PartSpec.module` imports torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from s3dit.configs import infer_config
from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One part of a model.

    config: the dataclass of its config.json · infer(checkpoint, known, notes): reads that from tensors · published: of
    the released models · made_by: file and class of its module, whose `unused` are patterns of names that are not read
    """

    config: type[Any]
    infer: Callable[..., Any]
    published: Any
    made_by: str
    option: str

    def module(self, config: Any) -> Any:
        """Make the module of a config."""
        room, _, name = self.made_by.partition(".")
        return getattr(import_module(f"s3dit.model.{room}"), name)(config)


# Keys are the names of its folders.
SPECS: Mapping[str, PartSpec] = {
    "transformer": PartSpec(
        TransformerConfig, infer_config.transformer, infer_config.TRANSFORMER, "transformer.Transformer",
        "--transformer",
    ),
    "text_encoder": PartSpec(
        TextEncoderConfig, infer_config.text_encoder, infer_config.TEXT_ENCODER, "text_encoder.TextEncoder",
        "--text-encoder",
    ),
    "vae": PartSpec(VAEConfig, infer_config.vae, infer_config.VAE, "vae.Autoencoder", "--vae"),
}  # fmt: skip
