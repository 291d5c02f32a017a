"""The parts of a model as functions of tensors alone, of any number of items and any size.

`Features`, `Velocity`, `Pixels` and `Latents` call the model's own modules; what they add is the batch: pictures of one
size, captions filled up to one length. Pictures go between them as patches on their grid, (B, H/16, W/16, 64) fp32,
each patch (row, column, channel) of 2 × 2 latent cells, which a solver need not cut or join.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from s3dit.control import Rule
from s3dit.export.layout import rectangle
from s3dit.model.controlnet import ActiveControlNet, ControlNet, Controls
from s3dit.model.layout import unpatchify
from s3dit.model.text_encoder import TextEncoder, rotations
from s3dit.model.transformer import Transformer
from s3dit.model.vae import Autoencoder

# An example of a part's inputs, and for each which of its sizes are free.
Sizes = tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]


class Features(nn.Module):
    """The text encoder, its embedding included."""

    def __init__(self, encoder: TextEncoder, embedding: Tensor, dtype: torch.dtype) -> None:
        """embedding (vocabulary, hidden): as it is kept · dtype: of what is computed."""
        super().__init__()
        self.config, self.layers, self.dtype = encoder.config, encoder.model.layers[:-1], dtype
        self.register_buffer("embedding", embedding)

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the features of prompts: ids (B, L) int64 -> (B, L, hidden).

        What a prompt is filled up with behind its end changes nothing before it.
        """
        items, length = ids.shape
        x = self.get_buffer("embedding")[ids.flatten()].to(self.dtype)
        rope = rotations(torch.arange(length), self.config.head_dim, self.config.rope_theta).repeat(items, 1, 1)
        for layer in self.layers:
            x = layer(x, rope, length)
        return x.unflatten(0, (items, length))

    def sizes(self) -> Sizes:
        """Return an example of the inputs, and which of their sizes are free."""
        return (torch.zeros(2, 7, dtype=torch.int64),), ({0: Dim("batch"), 1: Dim("length")},)


class Velocity(nn.Module):
    """The transformer, without guidance, and its ControlNet if it has one."""

    def __init__(
        self, transformer: Transformer, dtype: torch.dtype, net: ControlNet | None = None, rule: Rule = "authors"
    ) -> None:
        """dtype: of what is computed · net, rule: as in `ActiveControlNet`."""
        super().__init__()
        self.transformer, self.dtype, self.net, self.rule = transformer, dtype, net, rule

    def forward(
        self, patches: Tensor, t: Tensor, features: Tensor, lengths: Tensor, control: Tensor | None = None,
        strength: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Predict the velocity: patches + (sigma - sigma_next) · velocity is the next state.

        patches (B, rows, columns, 64) fp32 · t (B,) fp32: 1 - sigma, 0 noise to 1 image · features (B, L, D) of
        captions, of which the first lengths (B,) int64 count · where there is a ControlNet: control (B, rows, columns,
        4 · channels) fp32, as `controlnet.condition` makes it, and strength () fp32, 0 for none -> velocity, like
        patches.
        """
        layout = rectangle(patches.shape[:3], lengths, features.shape[1])
        context = self.transformer.context(layout, features.to(self.dtype).flatten(0, 1))
        controls = None
        if self.net is not None and control is not None and strength is not None:
            controls = Controls((ActiveControlNet(self.net, control.flatten(0, 2), strength, self.rule),))
        velocity = self.transformer(patches.flatten(0, 2), t, context, controls)
        return velocity.float().unflatten(0, patches.shape[:3])

    def sizes(self) -> Sizes:
        """Return an example of the inputs, and which of their sizes are free."""
        batch, rows, columns, config = Dim("batch"), Dim("rows"), Dim("columns"), self.transformer.config
        example = [
            torch.zeros(2, 3, 5, config.patch_dim), torch.zeros(2), torch.zeros(2, 7, config.cap_feat_dim),
            torch.ones(2, dtype=torch.int64),
        ]  # fmt: skip
        free: list[dict[int, Any]] = [{0: batch, 1: rows, 2: columns}, {0: batch}, {0: batch, 1: Dim("length")}]
        free.append({0: batch})
        if self.net is not None:
            example += [torch.zeros(2, 3, 5, 4 * self.net.config.channels), torch.ones(())]
            free += [free[0], {}]
        return tuple(example), tuple(free)


class Pixels(nn.Module):
    """The autoencoder's decoder."""

    def __init__(self, vae: Autoencoder) -> None:
        super().__init__()
        self.vae, self.held = _without(vae, "encoder"), (vae,)

    def forward(self, patches: Tensor) -> Tensor:
        """Decode patches (B, rows, columns, 64) fp32 -> pixels (B, 3, 16 · rows, 16 · columns) fp32, about [-1, 1]."""
        items, rows, columns, _ = patches.shape
        # Pictures one below the other are one picture, whose patches are theirs one after the other.
        latents = unpatchify(patches.flatten(0, 2), (items * rows, columns)).unflatten(1, (items, 2 * rows))
        return self.vae.decode(latents.transpose(0, 1).contiguous())

    def sizes(self) -> Sizes:
        """Return an example of the inputs, and which of their sizes are free."""
        example = torch.zeros(2, 3, 5, 4 * self.vae.config.latent_channels)
        return (example,), ({0: Dim("batch"), 1: Dim("rows"), 2: Dim("columns")},)


class Latents(nn.Module):
    """The autoencoder's encoder."""

    def __init__(self, vae: Autoencoder) -> None:
        super().__init__()
        self.vae, self.held = _without(vae, "decoder"), (vae,)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, rows, 16, columns, 16) fp32 in [-1, 1] -> patches (B, rows, columns, 64) fp32.

        The mode of what the autoencoder answers. Sides are cut in two, so that both sizes of the grid are inputs.
        """
        rows, columns = pixels.shape[2], pixels.shape[4]
        latents = self.vae.encode(pixels.flatten(4).flatten(2, 3))
        cells = latents.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # (B, 16, rows, 2, columns, 2)
        return cells.permute(0, 2, 4, 3, 5, 1).contiguous().flatten(3)

    def sizes(self) -> Sizes:
        """Return an example of the inputs, and which of their sizes are free."""
        example = torch.zeros(2, self.vae.config.in_channels, 3, 16, 5, 16)
        return (example,), ({0: Dim("batch"), 2: Dim("rows"), 4: Dim("columns")},)


def _without(vae: Autoencoder, half: str) -> Autoencoder:
    """Return an autoencoder of the same modules without one half, whose weights a graph would hold unused.

    Its memory layout is the plain one: what is faster is a compiler's to say. The weights stay in memory for as long as
    somebody has `vae` itself.
    """
    other = copy.copy(vae)
    other.memory_format = torch.contiguous_format
    other._modules = {name: module for name, module in vae._modules.items() if name != half}
    return other
