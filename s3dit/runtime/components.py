"""The parts of a model: from open checkpoints to modules in memory, each loaded when it is first used.

`Components` is a Residency that knows what a part is: its module and the names that are never read, the number formats
of its layers, how many bytes it takes, the adapters that belong on it. ControlNets are parts as well; they come when a
request first wants them.

Headers are read and checked against the modules at once, weights when a part is loaded. Fixed order: swap, assign,
merge, join or stream, attach, compile.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.control import Control
from s3dit.errors import BackendError
from s3dit.kernels.number_format import DFLOAT11
from s3dit.model.controlnet import ControlNet, open_controlnet
from s3dit.model.controlnet_config import ControlNetConfig
from s3dit.model.hooks import unhookable, why_not
from s3dit.model.linear import JOINED_ON, swap
from s3dit.model.meta import on_meta
from s3dit.model.part_specs import SPECS
from s3dit.model.vision_encoder import VisionEncoder
from s3dit.parallel.alone import Alone
from s3dit.runtime import adapters, budget
from s3dit.runtime.block_streaming import Mode, repeated, tensors
from s3dit.runtime.devices import Placement, own_settings
from s3dit.runtime.graphs import compile_blocks
from s3dit.runtime.joining import join
from s3dit.runtime.read_ahead import ReadAhead
from s3dit.runtime.residency import Component, Residency
from s3dit.runtime.sources import VISION_TOWER, Sources
from s3dit.runtime.stopwatch import Stopwatch
from s3dit.weights.assign import assign, fitted, pending, schemes
from s3dit.weights.checkpoint import Checkpoint
from s3dit.weights.container import dtype_name
from s3dit.weights.hub import resolve_file
from s3dit.weights.quantize import named, schemes_for

LOG = getLogger(__name__)


class Components(Residency):
    """The parts of a model, by name: text_encoder, transformer, vae, siglip, and ControlNets."""

    def __init__(
        self,
        sources: Sources,
        placement: Placement,
        mode: Mode,
        quantize: Mapping[str, str | None],
        compiled: bool,
        disable_mmap: bool = False,
        ranks: Alone | None = None,
    ) -> None:
        """quantize: the number format asked for, by part · compiled: of what draws · ranks: that share the work."""
        self._disable_mmap, self._quantize, self.ranks = disable_mmap, quantize, ranks or Alone()
        self.config, self.placement, self.compiled = sources.config, placement, compiled
        self.checkpoints: dict[str, Checkpoint] = {}
        self.controlnets: dict[str, ControlNetConfig] = {}
        # Modules on the meta device that are made already, plain ones and as `blank` returns them: making is slow.
        self._plain: dict[str, nn.Module] = {}
        self._blanks: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
        for part, checkpoint in sources.checkpoints.items():
            self._open(part, checkpoint)
        self._weights: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self._staying: dict[str, int] = {}
        super().__init__(mode)
        self.clock = Stopwatch()
        if mode == "streamed":
            self.kept = {"text_encoder": 0, "transformer": 0}
        self._on_read: Callable[[str, int], None] | None = None
        # The order in which a plan needs the parts.
        self.turns: Sequence[str] = ()
        self._ahead = ReadAhead()
        self.adapters: dict[str, adapters.Loaded] = {}
        self.revisions: Counter[str] = Counter()
        # The number format that each part is in, "" for plain floats.
        self.formats: dict[str, str] = {}
        for part in self.checkpoints:
            module, unused = self.blank(part)
            self.formats[part] = named(schemes(module))
            self._weigh(part, module, unused)
            self._blanks[part] = module, unused
        self._check_compiled()

    def _check_compiled(self) -> None:
        """Raise BackendError where every block of the transformer would be compiled by itself."""
        if self.compiled and self.formats["transformer"] == DFLOAT11:
            raise BackendError(
                f"{self.checkpoints['transformer'].path}: is in {DFLOAT11}, whose layers are each of another size, so "
                "that every block would be compiled by itself; load it without compile, or `s3dit convert` it to bf16"
            )

    def _open(self, part: str, checkpoint: Checkpoint, config: ControlNetConfig | None = None) -> None:
        """Take in a checkpoint: from here on it has official names, and no padding."""
        if self._disable_mmap:
            checkpoint.disable_mmap()
        self._plain[part] = self._module(part, config)
        self.checkpoints[part] = fitted(checkpoint, self._plain[part].state_dict())

    @contextmanager
    def reading(self, callback: Callable[[str, int], None]) -> Iterator[None]:
        """While inside, call `callback(part, count)` for each tensor of `count` bytes that is read for a part.

        Parts that are streamed read block by block as they compute, and are not reported.
        """
        before, self._on_read = self._on_read, callback
        try:
            yield
        finally:
            self._on_read = before

    def _module(self, part: str, controlnet: ControlNetConfig | None) -> nn.Module:
        """A part's module as its config says, on the meta device, every layer a plain one."""
        with on_meta():
            if controlnet is not None:
                return ControlNet(controlnet, self.config.transformer)
            if part == VISION_TOWER:
                assert self.config.vision is not None
                return VisionEncoder(self.config.vision)
            return SPECS[part].module(getattr(self.config, part))

    def blank(self, part: str) -> tuple[nn.Module, tuple[str, ...]]:
        """Make a part's module on the meta device; returns it and the patterns of names that are never read."""
        checkpoint, controlnet = self.checkpoints[part], self.controlnets.get(part)
        module = self._plain.pop(part, None) or self._module(part, controlnet)
        unused: Any = module.unused if controlnet is None else controlnet.unused(checkpoint)
        with on_meta():
            for name, kind in schemes_for(part, checkpoint, self._quantize.get(part)).items():
                if not any(fnmatchcase(f"{name}.weight", pattern) for pattern in unused):
                    swap(module, kind, name.__eq__)
        return module, unused

    def make(self, name: str) -> nn.Module:
        """Make a part's module on the meta device, in which modules that are never called refuse hooks."""
        module, unused = self._blanks.pop(name) if name in self._blanks else self.blank(name)
        names = list(module.state_dict())
        read = [leaf for leaf in names if not any(fnmatchcase(leaf, pattern) for pattern in unused)]
        unread = _owners(names) - _owners(read)
        for path, inner in module.named_modules():
            if path in unread:
                unhookable(inner, "no picture needs it, so it is not read")
            elif why := why_not(inner):
                unhookable(inner, why)
        self.ranks.prepare(module)
        return module

    def load(self, name: str, component: Component) -> None:
        """Load a part's weights and apply number formats, adapters, streaming and compiling, in that order."""
        module, device, kept = component.module, self.placement.device, self.kept.get(name)
        dtype, checkpoint = self._kept_in(name), self.checkpoints[name]
        self._ahead.read([self.checkpoints[part] for part in (name, *self._following(name))])
        with own_settings(device), self.clock.stage(f"load {name}"):
            filled, unused = self._blanks.pop(name) if name in self._blanks else self.blank(name)
            places = list(tensors(filled))
            if kept is None:
                seen = None if self._on_read is None else partial(self._on_read, name)
                assign(filled, checkpoint, dtype=dtype, device=device, unused=unused, progress=seen)
            else:
                # Streamed blocks stay what they are in the file, and are cast on their way to the device.
                assign(filled, checkpoint, dtype=None, unused=unused)
            adapters.merge_into(filled, name, self.adapters, dtype)
            if joined := kept is None and device.type in JOINED_ON:
                join(filled)
            component.set_parameters(filled)
            if not joined and not self.adapters:
                # For the next time, without the tensors.
                for owner, leaf, blank in places:
                    owner[leaf] = blank
                self._blanks[name] = filled, unused
            if kept is not None:
                component.stream(device, kept, dtype)
            component.mark()
            adapters.attach_to(component, name, self.adapters, self.placement)
            if self.compiled and name not in ("text_encoder", "vae") and not _compiled(module):
                compile_blocks(module)
            module.eval()
        LOG.info("loaded %s on %s%s", name, device, "" if kept is None else f", of its blocks {kept} to stay")

    def _following(self, name: str) -> list[str]:
        """The part that is needed after this one and is not in memory, if a plan says so."""
        turns = list(self.turns)
        later = turns[turns.index(name) + 1 :] if name in turns else []
        return [part for part in later if part not in self.held and part != name][:1]

    def unload(self, name: str, component: Component) -> None:
        """Undo `load`, with torch's settings those of the engine; see `Residency.unload`."""
        with own_settings(self.placement.device):
            super().unload(name, component)

    def changed_by_hand(self, part: str) -> bool:
        """Return whether a user has changed parameters of a part."""
        return bool(self.component(part).touched())

    def state(self, *names: str) -> tuple[object, ...]:
        """Return a value that is another once what these parts compute may be: adapters, parameters, modules."""
        return tuple(self.revisions[name] for name in names), *(self.component(name).state() for name in names)

    def sizes(self, part: str) -> tuple[int, int, tuple[int, ...]]:
        """Return the bytes of a part: read from disk, held outside of its blocks, held by each block.

        Raises CheckpointError when names or shapes are not this model's.
        """
        if part not in self._weights:
            self._weigh(part, *self.blank(part))
        read, fixed, blocks = self._weights[part]
        return read, fixed + adapters.nbytes(part, self.adapters, self.placement.compute), blocks

    def need(self, part: str, work: Sequence[tuple[int | None, int]] = (), staying: bool = True) -> budget.Need:
        """Return the memory of a part, with its arithmetic, `work` as in `budget.Need`; raises as `sizes` does.

        staying: on a CPU, count what is no view of its file.
        """
        _, fixed, blocks = self.sizes(part)
        if self.placement.device.type != "cpu":
            return budget.Need(fixed, blocks, tuple(work))
        # What is merged is no view of a file any more.
        merged = any(each.merged and part in each.deltas for each in self.adapters.values())
        stays = sum(blocks) if merged else self._staying[part]
        return budget.Need(fixed, blocks, tuple(work), 1, stays if staying else 0)

    def _weigh(self, part: str, module: nn.Module, unused: tuple[str, ...]) -> None:
        """Keep the bytes of a part, by its module as `blank` makes it."""
        read = pending(module, self.checkpoints[part], unused)
        fixed, blocks = budget.sizes(module, self._kept_in(part), unused)
        # The lists of the VAE are no repeated blocks: each is of another shape, and all are small.
        self._weights[part] = (read, fixed + sum(blocks), ()) if part == "vae" else (read, fixed, blocks)
        checkpoint = self.checkpoints[part]

        def views(name: str, tensor: Tensor) -> bool:
            if name not in checkpoint:
                return False
            # What is cast is so while its block computes; what is encoded, once and for all.
            as_it_is = isinstance(tensor, nn.Parameter) or checkpoint.entry(name).dtype == dtype_name(tensor.dtype)
            return as_it_is and checkpoint.is_mapped(name)

        self._staying[part] = budget.staying(module, unused, views)

    def _kept_in(self, part: str) -> torch.dtype:
        """The dtype of a part's weights in memory."""
        # The VAE is small and convolutions have no widening path: it is kept in the dtype it computes in.
        return self.placement.compute if part == "vae" else self.placement.dtype

    def controlnet(self, control: Control) -> tuple[str, ControlNetConfig]:
        """Return the name and configuration of a control's ControlNet; opened and checked when first used.

        Raises CheckpointError where it is not for this model.
        """
        path = resolve_file(str(control.model))
        part = f"controlnet {path}" + (f" as {control.version}" if control.version else "")
        if part not in self.controlnets:
            checkpoint, config = open_controlnet(path, self.config.transformer, control.version)
            self._open(part, checkpoint, config)
            self.controlnets[part] = config
            if self.mode == "streamed":
                self.kept = {**self.kept, part: 0}
        return part, self.controlnets[part]


def _owners(names: Iterable[str]) -> set[str]:
    """The modules that hold tensors of these names, directly or further in; "" is the part itself."""
    return {name[:i] for name in names for i in (0, *(at for at, letter in enumerate(name) if letter == "."))}


def _compiled(module: nn.Module) -> bool:
    """Whether its blocks are compiled already, when it was in memory before."""
    return any("forward" in vars(block) for blocks in repeated(module) for block in blocks)
