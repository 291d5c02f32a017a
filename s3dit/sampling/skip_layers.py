"""Passes of the transformer without some of its main layers, to be guided away from (skip-layer guidance).

A model without a few layers draws the same picture worse; `guidance.guide` adds scale · (pos - pos without the layers).
Such a pass has the pictures with their prompts once, whether guidance doubles the other pass or not. A skipped layer
gives what it was given, to which a ControlNet adds as ever.

Source: Stability AI's sd3.5 repository; the form is that of diffusers' `SkipLayerGuidance`, original formulation.
"""

from typing import Any

from torch import Tensor

from s3dit.guidance_options import SkipLayers
from s3dit.model.transformer import Transformer


class SkippedLayers:
    """Calls a transformer without some of its main layers, and counts these calls."""

    def __init__(self, transformer: Transformer, skip: SkipLayers) -> None:
        self._transformer, self._skip = transformer, skip
        self.calls = 0

    def at(self, t: float) -> float:
        """Return the weight at time t (0 noise, 1 image), 0 where there is no pass."""
        return self._skip.at(t)

    def __call__(self, *args: Any) -> Tensor:
        """Return what `Transformer.forward` would, had it no such layers; others that look on see them stand still."""
        self.calls += 1
        held = [vars(self._transformer.layers[i]) for i in self._skip.layers]
        # Compiled blocks have a forward of their own already.
        before = [attributes.get("forward") for attributes in held]
        for attributes in held:
            attributes["forward"] = lambda x, *rest: x
        try:
            return self._transformer(*args)
        finally:
            for attributes, forward in zip(held, before, strict=True):
                if forward is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = forward
