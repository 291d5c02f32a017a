"""The parts of a model in one table: what each is called, configured by, built as and given by on the command line.

A ControlNet is a part as well, but one for each file, and the vision tower of Omni models takes no option of its own;
both are handled where they are opened. Which tensors tell a part, and under which prefixes, is the files' affair
(`weights.split_checkpoint`). Importing this module does not import torch, which `module` does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s3dit.configs import infer_config
from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One part of a model.

    config: the dataclass of its config.json · infer: reads that from tensors where there is no JSON,
    `infer(checkpoint, known, notes)` · published: the configuration of the released models · module: built of a
    config; its `unused` are patterns of names that no picture needs, which are not read · option: gives it on the
    command line.
    """

    config: type[Any]
    infer: Callable[..., Any]
    published: Any
    module: "Callable[[Any], nn.Module]"
    option: str


def _transformer(config: TransformerConfig) -> "nn.Module":
    from s3dit.model.transformer import Transformer

    return Transformer(config)


def _text_encoder(config: TextEncoderConfig) -> "nn.Module":
    from s3dit.model.text_encoder import TextEncoder

    return TextEncoder(config)


def _vae(config: VAEConfig) -> "nn.Module":
    from s3dit.model.vae import Autoencoder

    return Autoencoder(config)


# Keys are the names of its folders.
SPECS: Mapping[str, PartSpec] = {
    "transformer": PartSpec(
        TransformerConfig, infer_config.transformer, infer_config.TRANSFORMER, _transformer, "--transformer"
    ),
    "text_encoder": PartSpec(
        TextEncoderConfig, infer_config.text_encoder, infer_config.TEXT_ENCODER, _text_encoder, "--text-encoder"
    ),
    "vae": PartSpec(VAEConfig, infer_config.vae, infer_config.VAE, _vae, "--vae"),
}
