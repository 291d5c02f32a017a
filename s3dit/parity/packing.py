"""Brings what the reference computes for a padded batch into this engine's form: items end to end, without padding."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from s3dit.model.layout import Layout, Pack
from s3dit.parity.taps import FINAL, STREAMS, by_name

X_EMBEDDER = "all_x_embedder.2-1"


def unpadded(output: Tensor, pack: Pack) -> Tensor:
    """Cut the padding of a batch (B, L, …) off, and lay its items end to end -> (N, …)."""
    return torch.cat([item[:length] for item, length in zip(output, pack.spans.lengths, strict=True)])


def _pack(name: str, layout: Layout) -> Pack:
    """The stream that a stage of the transformer is of."""
    top = name.split(".")[0]
    stream = name.partition(" of ")[2] or next((s for s, blocks in STREAMS.items() if blocks == top), "whole")
    pack = {"text": layout.text, "image": layout.image, "vision": layout.vision}.get(stream, layout.joint)
    assert pack is not None
    return pack


def of_reference(seen: Mapping[str, Tensor], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Yield the stages of one call of the reference's transformer, in this engine's form."""
    for name, outputs in by_name(seen).items():
        output = outputs[-1]
        if name == "t_embedder" or "adaLN_modulation" in name:
            # What follows from the time alone is the same for every item; with references their time comes last.
            yield name, outputs[0][:1] if layout.clean is None else torch.cat((outputs[0], outputs[1][:1]))
        elif name == X_EMBEDDER:
            if layout.clean is not None:
                yield f"{name} of references", output[layout.clean]
            yield name, output[layout.image.token_index]
        elif name in ("cap_embedder", "siglip_embedder"):
            yield name, output[layout.text.token_index if name == "cap_embedder" else layout.vision.token_index]  # type: ignore[union-attr]
        elif name == FINAL:
            yield name, unpadded(output, layout.joint)[layout.joint.token_index]
        elif output.ndim == 2:
            # A module inside of an embedder, over the tokens of all items.
            yield name, output[layout.text.token_index] if name.startswith("cap_embedder") else output[:1]
        else:
            yield name, unpadded(output, _pack(name, layout))


def of_ours(seen: Mapping[str, Tensor], clean: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the stages of one call of this engine's transformer.

    clean: whether references are embedded beside the picture, by a call before it.
    """
    for name, outputs in by_name(seen).items():
        if name == X_EMBEDDER and clean:
            yield f"{name} of references", outputs[0]
            yield name, outputs[-1]
        elif name == X_EMBEDDER or name == "t_embedder":
            # Times may have been embedded ahead of the call, too.
            yield name, outputs[-1]
        else:
            # parity: by diffusers' rule a ControlNet runs the refiner a second time, for itself.
            yield name, outputs[0]
