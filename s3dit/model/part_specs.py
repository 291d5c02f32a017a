"""The parts of a model in one table: what each is called, configured by, built as and given by on the command line.

A ControlNet is a part as well, and so is the vision tower of Omni models; both are handled where they are opened. Which
tensors tell a part is the files' affair (`weights.split_checkpoint`). Only `PartSpec.module` imports torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from s3dit.configs import infer_config
from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One part of a model.

    config: the dataclass of its config.json · infer(checkpoint, known, notes): reads that from tensors · published: of
    the released models · option: gives it on the command line
    """

    config: type[Any]
    infer: Callable[..., Any]
    published: Any
    option: str

    def module(self, config: Any) -> Any:
        """Make the module of a config, whose `unused` are patterns of names that no picture needs."""
        from s3dit.model.text_encoder import TextEncoder
        from s3dit.model.transformer import Transformer
        from s3dit.model.vae import Autoencoder

        made = {TransformerConfig: Transformer, TextEncoderConfig: TextEncoder, VAEConfig: Autoencoder}
        return made[self.config](config)


# Keys are the names of its folders.
SPECS: Mapping[str, PartSpec] = {
    "transformer": PartSpec(TransformerConfig, infer_config.transformer, infer_config.TRANSFORMER, "--transformer"),
    "text_encoder": PartSpec(TextEncoderConfig, infer_config.text_encoder, infer_config.TEXT_ENCODER, "--text-encoder"),
    "vae": PartSpec(VAEConfig, infer_config.vae, infer_config.VAE, "--vae"),
}
