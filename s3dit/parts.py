"""The parts of one model: from open checkpoints to modules in memory, each made when it is asked for.

`Parts` is a Residency that knows what a part is: its module and the names that are never read, the number formats of
its layers, how many bytes it takes, the adapters that belong on it. ControlNets are parts as well; they come when a
request first wants them.

Headers are read and held to the modules at once, weights when a part is made. Fixed order: swap, assign, stream,
attach, compile.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from s3dit import budget
from s3dit.adapters import Adapters
from s3dit.control import Control
from s3dit.controlnet import ControlNet, ControlNetConfig, open_controlnet
from s3dit.devices import Placement
from s3dit.graphs import compile_blocks
from s3dit.linear import swap
from s3dit.offload import Mode, Residency, stream
from s3dit.sources import Sources
from s3dit.text_encoder import TextEncoder
from s3dit.transformer import Transformer
from s3dit.vae import Autoencoder
from s3dit.vision_encoder import VisionEncoder
from s3dit.weights import keymap
from s3dit.weights.assign import assign, pending, schemes
from s3dit.weights.hub import resolve_file
from s3dit.weights.quantize import named, schemes_for


class Parts(Residency):
    """The parts of one model, by name: text_encoder, transformer, vae, siglip, and ControlNets."""

    def __init__(
        self, sources: Sources, placement: Placement, mode: Mode, quantize: Mapping[str, str | None], compiled: bool
    ) -> None:
        """quantize: the number format asked for, by part · compiled: compile the blocks of what draws."""
        self.config, self.placement, self.compiled = sources.config, placement, compiled
        self.checkpoints = dict(sources.checkpoints)
        self.controlnets: dict[str, ControlNetConfig] = {}
        self._quantize = quantize
        self._weights: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        super().__init__({part: self._maker(part) for part in self.checkpoints}, mode)
        if mode == "streamed":
            self.kept = {"text_encoder": 0, "transformer": 0}
        # Called with the part's name and the bytes of each tensor that is read, as parts come in.
        self.on_read: Callable[[str, int], None] | None = None
        # Called with the name of a part whose adapters changed.
        self.on_change: Callable[[str], None] = lambda part: None
        self.lora = Adapters(
            self, lambda part: self.blank(part)[0], placement.device, placement.compute,
            lambda part: self.on_change(part),
        )  # fmt: skip
        # The number format that each part is in, "" for plain floats.
        self.formats = {part: named(schemes(self.blank(part)[0])) for part in self.checkpoints}
        for part in self.checkpoints:
            self.sizes(part)

    def blank(self, part: str) -> tuple[nn.Module, tuple[str, ...]]:
        """A part's module on the meta device, and the names that are never read."""
        module: nn.Module
        unused: tuple[str, ...]
        with torch.device("meta"):
            if part == "transformer":
                module, unused = Transformer(self.config.transformer), ("norm_final.weight",)
            elif part == "vae":
                module, unused = Autoencoder(self.config.vae), ()
            elif part in self.controlnets:
                module = ControlNet(self.controlnets[part], self.config.transformer)
                unused = self.controlnets[part].unused(self.checkpoints[part])
            elif part == "siglip":
                assert self.config.vision is not None
                module, unused = VisionEncoder(self.config.vision), VisionEncoder.unused
            else:
                module = encoder = TextEncoder(self.config.text_encoder)
                unused = encoder.unused
            stored = keymap.official(self.checkpoints[part], module.state_dict())
            for name, kind in schemes_for(part, stored, self._quantize.get(part)).items():
                if not any(fnmatchcase(f"{name}.weight", pattern) for pattern in unused):
                    swap(module, kind, name.__eq__)
        return module, unused

    def _maker(self, part: str) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            module, unused = self.blank(part)
            dtype = self._kept_in(part)
            device, kept = self.placement.device, self.kept.get(part)
            if kept is None:
                seen = None if self.on_read is None else partial(self.on_read, part)
                assign(module, self.checkpoints[part], dtype=dtype, device=device, unused=unused, progress=seen)
            else:
                # Streamed blocks stay what they are in the file, and are cast on their way to the device.
                assign(module, self.checkpoints[part], dtype=None, unused=unused)
                stream(module, device, kept, dtype)
            self.lora.give(part, module)
            if self.compiled and part not in ("text_encoder", "vae"):
                compile_blocks(module)
            return module.eval()

        return make

    def sizes(self, part: str) -> tuple[int, int, tuple[int, ...]]:
        """Bytes of a part: read, held outside of its blocks, held by each block.

        Raises CheckpointError when names or shapes are not this model's.
        """
        if part in self._weights:
            read, fixed, blocks = self._weights[part]
            return read, fixed + self.lora.nbytes(part), blocks
        module, unused = self.blank(part)
        read = pending(module, self.checkpoints[part], unused)
        fixed, blocks = budget.sizes(module, self._kept_in(part), unused)
        # The lists of the VAE are no repeated blocks: each is of another shape, and all are small.
        self._weights[part] = (read, fixed + sum(blocks), ()) if part == "vae" else (read, fixed, blocks)
        return self._weights[part]

    def _kept_in(self, part: str) -> torch.dtype:
        """The dtype of a part's weights in memory."""
        # The VAE is small and convolutions have no widening path: it is kept in the dtype it computes in.
        return self.placement.compute if part == "vae" else self.placement.dtype

    def controlnet(self, control: Control) -> tuple[str, ControlNetConfig]:
        """The part that a control wants, and what it is; opened and held to this model when first asked for."""
        path = resolve_file(str(control.model))
        part = f"controlnet {path}" + (f" as {control.version}" if control.version else "")
        if part not in self.controlnets:
            checkpoint, config = open_controlnet(path, self.config.transformer, control.version)
            self.checkpoints[part], self.controlnets[part] = checkpoint, config
            self.add(part, self._maker(part))
            if self.mode == "streamed":
                self.kept = {**self.kept, part: 0}
        return part, self.controlnets[part]
