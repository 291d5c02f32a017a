"""The reference's ControlNet: its hints as stages, and the authors' rule, which diffusers' pipeline does not follow."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from s3dit.control import Control
from s3dit.model.layout import Layout
from s3dit.parity.packing import unpadded


class ControlTaps:
    """What a ControlNet of diffusers says in its last pass.

    By the authors' rule the refiner's hints are also added to the base's own stream, which diffusers leaves out; hooks
    do so, behind those that record, so that a block's stage is without its hint on both sides.
    """

    def __init__(self, stack: ExitStack, net: Any, base: Any, control: Control) -> None:
        self._strength, self._inside = control.strength or 0.0, False
        self._embedded: Tensor | None = None
        self._hints: dict[int, Tensor] = {}
        self._refined: Tensor | None = None
        self._refiners = len(base.noise_refiner)
        own = net.config.add_control_noise_refiner
        hooks = [
            net.register_forward_pre_hook(self._begins),
            net.control_all_x_embedder["2-1"].register_forward_hook(self._embeds),
            net.register_forward_hook(self._answers),
        ]
        if own is not None:
            hooks.append(getattr(net, own)[-1].register_forward_hook(self._refines))
        if own is not None and control.rule != "diffusers":
            hooks += [base.register_forward_pre_hook(self._enters), base.register_forward_hook(self._leaves)]
            hooks += [block.register_forward_hook(self._adds(i)) for i, block in enumerate(base.noise_refiner)]
        for hook in hooks:
            stack.callback(hook.remove)

    def stages(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """Yield patches and hints in this engine's form."""
        assert self._embedded is not None
        yield "control 1: embedded", self._embedded[layout.image.token_index]
        for i in range(0 if self._refined is None else self._refiners):
            assert self._refined is not None
            hint = self._refined[i].cpu() * self._strength
            yield f"control 1: hint of noise_refiner.{i}", unpadded(hint, layout.image)
        for layer, hint in self._hints.items():
            yield f"control 1: hint of layers.{layer}", unpadded(hint.cpu(), layout.joint)

    def _begins(self, *_: Any) -> None:
        self._refined = None

    def _embeds(self, module: Any, args: Any, output: Tensor) -> None:
        self._embedded = output.cpu()

    def _answers(self, module: Any, args: Any, output: dict[int, Tensor]) -> None:
        self._hints = output

    def _refines(self, module: Any, args: Any, output: Tensor) -> None:
        # The list may run a second time, for the layers: what it says to the refiner comes first.
        self._refined = output if self._refined is None else self._refined

    def _enters(self, *_: Any) -> None:
        self._inside = True

    def _leaves(self, *_: Any) -> None:
        self._inside = False

    def _adds(self, i: int) -> Any:
        """A hook that adds a hint to a block of the base's refiner, which the ControlNet runs for itself, too."""

        def add(module: Any, args: Any, output: Tensor) -> Tensor | None:
            return output + self._strength * self._refined[i] if self._inside and self._refined is not None else None

        return add
