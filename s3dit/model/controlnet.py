"""ControlNet: a second stack of blocks that reads a control image and adds hints to the streams of the transformer.

It embeds the control latents as tokens at the positions of the image tokens, refines them, joins them with the caption
and runs them through its own blocks, each of which gives a hint: `x = block(x)`, then `x = x + hint`. Time embedding,
pad token, refined caption and rotary tables are those of the transformer's pass. Three published forms, detected by the
tensors (`ControlNetConfig.of`):

  1.0  16 channels; its refiner are two plain blocks, and nothing is added to the base's refiner
  2.0  33 channels (control, mask, inpaint); its own `control_layers` run as the refiner too, two of their hints serve
  2.1  33 channels; two blocks of `control_noise_refiner` with projections refine and give the two hints

The authors add the refiner's hints to the base's image stream; diffusers adds them to a copy that only the ControlNet
reads. Both are here (`Rule`), the authors' is the default. The two are one for 1.0.

Source: VideoX-Fun `z_image_transformer2d_control.py` (the authors), diffusers `controlnet_z_image.py`. Not here: making
control images (canny, depth, pose); in which steps a ControlNet acts (`inputs/control_hints.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.control import Rule, Version
from s3dit.kernels.attention import Spans
from s3dit.model.config import TransformerConfig
from s3dit.model.controlnet_config import ControlNetConfig, settings_of
from s3dit.model.layout import patchify
from s3dit.model.linear import Linear
from s3dit.model.meta import on_meta
from s3dit.model.timestep import Modulation
from s3dit.model.transformer import PATCH, Block, Context, Transformer
from s3dit.weights.assign import verify
from s3dit.weights.checkpoint import Checkpoint, open_checkpoint


class ControlBlock(Block):
    """A block of the control stream: the first of its list adds the base's stream, each gives a hint."""

    def __init__(self, config: TransformerConfig, *, first: bool) -> None:
        super().__init__(config, modulated=True)
        self.first = first
        if first:
            self.before_proj = Linear(config.dim, config.dim)
        self.after_proj = Linear(config.dim, config.dim)

    def forward(  # type: ignore[override]
        self, c: Tensor, x: Tensor, rope: Tensor, spans: Spans, time: Tensor, modulation_row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply to the control stream c (N, dim), x (N, dim) being the base's stream at entry -> c and its hint.

        rope, spans, time and modulation_row as in `Block.forward`.
        """
        c = self.before_proj(c) + x if self.first else c
        c = super().forward(c, rope, spans, time, modulation_row)
        return c, self.after_proj(c)


class ControlNet(nn.Module):
    """A ControlNet's modules under the authors' names; see the module's docstring."""

    def __init__(self, config: ControlNetConfig, base: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.refiner_layers, self.layers = base.n_refiner_layers, base.n_layers
        self.control_all_x_embedder = nn.ModuleDict({PATCH: Linear(4 * config.channels, base.dim)})
        self.control_layers = nn.ModuleList(ControlBlock(base, first=place == 0) for place in config.places)
        # An empty list would be no state: 2.0 has no refiner of its own.
        kinds = {
            "1.0": lambda i: Block(base, modulated=True),
            "2.1": lambda i: ControlBlock(base, first=i == 0),
        }
        if make := kinds.get(config.version):
            self.control_noise_refiner = nn.ModuleList(make(i) for i in range(base.n_refiner_layers))

    def refine(
        self, patches: Tensor, pad: Tensor, image: Tensor, modulation: Modulation, context: Context
    ) -> tuple[Tensor, list[Tensor]]:
        """Embed and refine control patches (n, 4 · channels) beside embedded image tokens (N_image, dim).

        A pass with guidance holds the same pictures twice; so then do the patches, and of those of more items the first
        are taken. -> control tokens (N_image, dim),
        and the hints for the base's refiner, one a block, or none (1.0).
        """
        pack = context.image
        # By shape, since len() would be a fixed number in a graph.
        tokens, given = pack.token_index.shape[0], patches.shape[0]
        if given != tokens:
            patches = patches[:tokens] if given > tokens else patches.repeat(tokens // max(given, 1), 1)
        c = pack.fill(self.control_all_x_embedder[PATCH](patches.to(image.dtype)), pad)
        place = (context.image_rope, pack.spans, modulation.time, pack.modulation_row)
        if self.config.version == "1.0":
            for block in self.control_noise_refiner:
                c = block(c, *place)
            return c, []
        hints: list[Tensor] = []
        for block in self.control_layers if self.config.version == "2.0" else self.control_noise_refiner:
            c, hint = block(c, image, *place)
            # 2.0 runs all of its layers here, and has no use for what the later ones say.
            hints += [hint] if len(hints) < self.refiner_layers else []
        return c, hints

    def hints(self, c: Tensor, tokens: Tensor, modulation: Modulation, context: Context) -> Iterator[Tensor | None]:
        """Yield for each layer of the base in turn what to add after it, (N, dim) or None.

        c (N_image, dim): refined control tokens · tokens (N, dim): the joined stream at the entry of the layers. One
        hint is held at a time, as the control stream does not look at the base's again.
        """
        joint, blocks = context.joint, dict(zip(self.config.places, self.control_layers, strict=True))
        place = (context.joint_rope, joint.spans, modulation.time, joint.modulation_row)
        c = torch.cat((c, context.text))[context.gather]
        for i in range(self.layers):
            hint = None
            if i in blocks:
                c, hint = blocks[i](c, tokens, *place)
            yield hint


@dataclass(frozen=True, slots=True)
class ActiveControlNet:
    """A ControlNet with the inputs of a pass: control patches (n, 4 · channels) of all pictures, strength and rule.

    strength: in a graph, () fp32.
    """

    net: ControlNet
    patches: Tensor
    strength: float | Tensor
    rule: Rule = "authors"

    def refine(
        self, pad: Tensor, image: Tensor, modulation: Modulation, context: Context
    ) -> tuple[Tensor, list[Tensor]]:
        """Call `ControlNet.refine` -> control tokens (N_image, dim), and its hints times the strength."""
        c, hints = self.net.refine(self.patches, pad, image, modulation, context)
        return c, [hint * self.strength for hint in hints]

    def hints(self, c: Tensor, tokens: Tensor, modulation: Modulation, context: Context) -> Iterator[Tensor | None]:
        """Yield `ControlNet.hints` times the strength."""
        for hint in self.net.hints(c, tokens, modulation, context):
            yield None if hint is None else hint * self.strength


@dataclass(frozen=True, slots=True)
class Controls:
    """The ControlNets of a pass, whose hints add up; implements `transformer.Steering`."""

    nets: tuple[ActiveControlNet, ...]

    def __call__(
        self, model: Transformer, image: Tensor, modulation: Modulation, context: Context
    ) -> tuple[Tensor, Iterator[Tensor | None]]:
        """Refine the image stream and join it with the caption, with the hints for the refiner.

        image (N_image, dim): embedded image tokens -> the joined stream (N, dim), and for each
        layer of the base what to add after it, (N, dim) or None.
        """
        refined = [net.refine(model.x_pad_token, image, modulation, context) for net in self.nets]
        shared = [hints for net, (_, hints) in zip(self.nets, refined, strict=True) if net.rule == "authors" and hints]
        tokens = model.joined(image, modulation, context, [_sum(of_block) for of_block in zip(*shared, strict=True)])
        streams = []
        for net, (c, hints) in zip(self.nets, refined, strict=True):
            # parity: diffusers adds a refiner's hints to a copy of the stream, which only its ControlNet reads.
            separate = net.rule == "diffusers" and hints
            entry = model.joined(image, modulation, context, hints) if separate else tokens
            streams.append(net.hints(c, entry, modulation, context))
        of_layers = zip(*streams, strict=True)
        return tokens, (_sum([hint for hint in of_layer if hint is not None]) for of_layer in of_layers)


def _sum(hints: Sequence[Tensor]) -> Any:
    """The sum of some hints, None where there are none."""
    return reduce(torch.add, hints) if hints else None


def open_controlnet(
    path: Path, base: TransformerConfig, version: Version | None = None
) -> tuple[Checkpoint, ControlNetConfig]:
    """Open an official file, or a folder as diffusers writes it, and check it against its base.

    version: as in `ControlNetConfig.of`. Reads headers; raises CheckpointError.
    """
    checkpoint = open_checkpoint(path)
    config = ControlNetConfig.of(checkpoint, base, version, settings_of(path))
    with on_meta():
        verify(ControlNet(config, base), checkpoint, config.unused(checkpoint))
    return checkpoint, config


def condition(
    encode: Callable[[Tensor], Tensor],
    channels: int,
    control: Tensor | None,
    inpaint: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Make the control patches of one picture: the input of a ControlNet of so many channels.

    encode: pixels (3, H, W) to model-space latents (16, H/8, W/8) · control, inpaint: pixels (3, H, W) fp32 in [-1, 1],
    at least one of them; without the other its channels are 0, as in the authors' code · mask (1, H, W): 1 is to be
    painted anew, there the picture is blanked -> (H/16 · W/16, 4 · channels) fp32.
    """
    shown = None if control is None else encode(control)
    masked = None if inpaint is None or mask is None else encode(inpaint * (mask < 0.5))
    given = shown if shown is not None else masked
    assert given is not None
    depth, rows, columns = given.shape
    latents = torch.zeros(channels, rows, columns, dtype=torch.float32, device=given.device)
    if shown is not None:
        latents[:depth] = shown
    if masked is not None and mask is not None:
        # parity: one pixel a cell, the upper left one. Here 1 is what is kept.
        latents[depth] = 1 - mask[0, :: mask.shape[1] // rows, :: mask.shape[2] // columns]
        latents[depth + 1 :] = masked
    return patchify(latents)
