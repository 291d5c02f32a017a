"""The stages of a plan: which part of a model has its turn when, how many bytes that takes, what a budget allows."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from s3dit.errors import BackendError
from s3dit.inputs.control_hints import PreparedControl
from s3dit.inputs.references import Reference
from s3dit.kernels.dispatch import backend
from s3dit.request import Request
from s3dit.runtime import budget
from s3dit.runtime.components import Components
from s3dit.runtime.encoders import PromptEmbeds, Text

# The references of every picture.
References = tuple[tuple[Reference, ...], ...]
# A part, and what it has to do in a turn.
Turn = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Stage:
    """One turn of a part: what is read from disk and what is then held in memory, in bytes.

    beside: held in the same turn by other parts (ControlNets beside the transformer) · again: read from its file once
    more by every further pass, of streamed blocks on a CPU.
    """

    part: str
    reads: int
    holds: int
    work: str
    beside: int = 0
    again: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What a plan's request, the last and largest of its passes, has to compute.

    request: of the last pass · items: pictures of a model call, twice as many with guidance · calls: of the model, in
    each pass · new_tokens: of prompts that are to be encoded · new_references: pictures that are · has_start_images:
    whether start images are.
    """

    request: Request
    items: int
    calls: tuple[int, ...]
    new_tokens: int
    new_references: int
    has_start_images: bool
    controls: tuple[PreparedControl, ...]
    references: References

    def turns(self) -> Iterator[Turn]:
        """The turns of the parts, in their order."""
        count = self.request.count
        given = self.request.guidance_interval, self.request.skip_layers
        varying = bool(self.request.guidance_scale) and given != (None, None)
        if self.new_tokens:
            yield "text_encoder", f"{self.new_tokens} tokens"
        references = [f"{self.new_references} references"] if self.new_references else []
        if references:
            yield "siglip", references[0]
        read = references + [f"{count} start images"] * self.has_start_images + ["control images"] * bool(self.controls)
        if read:
            yield "vae", " and ".join(read)
        for i, calls in enumerate(self.calls, 1):
            items = f"at most {self.items} items each" if varying else f"{self.items} items each"
            yield "transformer", f"{calls} model calls, {items}"
            yield from ((part, "beside the transformer") for part in dict.fromkeys(c.part for c in self.controls))
            if i < len(self.calls):
                yield "vae", f"{count} pictures, enlarged, and start images again"
        if self.request.output_type != "latent":
            yield "vae", f"{count} pictures"


def new_tokens(captions: Sequence[Sequence[Text]], kept: Collection[Any]) -> int:
    """Tokens of the distinct texts that are to be encoded: not given as features, and not among the kept ones."""
    texts = dict.fromkeys(text for caption in captions for text in caption)
    return sum(len(ids) for ids in texts if not isinstance(ids, PromptEmbeds) and ids not in kept)


def stages_of(components: Components, work: Work, kept: Mapping[str, int]) -> tuple[Stage, ...]:
    """The turns of a plan's work with their bytes; kept: how many blocks of each streamed part stay on the device."""
    stages = [stage_of(components, part, todo, kept) for part, todo in work.turns()]
    held = sum({stage.part: stage.holds for stage in stages if stage.part in components.controlnets}.values())
    return tuple(replace(stage, beside=held if stage.part == "transformer" else 0) for stage in stages)


def stage_of(components: Components, part: str, work: str, kept: Mapping[str, int]) -> Stage:
    """A part's turn; kept: how many blocks of each streamed part stay on the device."""
    read, need = components.sizes(part)[0], components.need(part)
    if part not in kept:
        return Stage(part, read, need.weights, work)
    # What streams on a CPU streams from its file.
    again = sum(need.streamed(kept[part])) / need.weights if components.placement.device.type == "cpu" else 0
    return Stage(part, read, need.held(kept[part]), work, again=round(again * read))


def memory_plan(components: Components, limit: budget.Budget, work: Work, tokens: int) -> budget.MemoryPlan:
    """How a plan's work is done within a budget; BackendError where it cannot be. tokens: of a model call."""
    config, compute = components.config, components.placement.compute
    device, request = components.placement.device.type, work.request
    pictures = [reference for of_picture in work.references for reference in of_picture]
    # Encoding a reference takes less than decoding a picture of its size.
    sides = [(reference.pixels.shape[1], reference.pixels.shape[2]) for reference in pictures]
    sides += zip(request.per_image("height"), request.per_image("width"), strict=True)
    # Where SwiGLU has an implementation; plain, it is the widest place of a pass.
    lean = {"cpu": ("auto", "torch"), "cuda": ("auto", "triton")}.get(device, ())
    kind = {"lean": backend() in lean, "quantized": bool(components.formats["transformer"])}
    passing = budget.transformer_work(config.transformer, tokens, compute, **kind)
    passing += budget.control_work(config.transformer, tokens, compute, len(work.controls))
    tiles = [tile for tile in budget.TILES if tile is None or 8 * tile < max(map(max, sides))]
    # Of each part: bytes beside its weights, by the side of a tile.
    activations: dict[str, list[tuple[int | None, int]]] = {
        "text_encoder": [(None, budget.encoder_work(config.text_encoder, work.new_tokens, compute))],
        "transformer": [(None, passing)],
        "vae": [(tile, max(budget.decoder_work(config.vae, *side, tile, compute) for side in sides)) for tile in tiles],
    }
    if config.vision is not None:
        patches = sum(len(reference.patches) for reference in pictures)
        activations["siglip"] = [(None, budget.vision_work(config.vision, patches, compute))]
    parts = tuple(dict.fromkeys(part for part, _ in work.turns()))
    needs = {part: components.need(part, activations.get(part, [(None, 0)]), limit.process) for part in parts}
    guests = {part: needs.pop(part) for part in parts if part in components.controlnets}
    return budget.plan_memory_beside(limit.size, needs, "transformer", guests, limit.reserve)


@contextmanager
def out_of_memory(stages: Sequence[Stage]) -> Iterator[None]:
    """Raise BackendError where memory runs out inside the `with`, which says what these stages hold and what to do."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        held = max(stage.holds + stage.beside for stage in stages)
        message = (
            f"out of memory ({str(error).splitlines()[0][:120]}); the largest part holds {held / 1e9:.1f} GB besides "
            "activations; draw fewer or smaller pictures at once, give a budget (vram), or use dtype bf16"
        )
    else:
        return
    raise BackendError(message) from None
