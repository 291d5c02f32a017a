"""A Plan: a request with everything that the model and its input files decide, made once, before any weight is read.

`make_plan` reads the input pictures, tokenizes the prompts, finds the noise levels, and says which part of the model
has its turn when, and how many bytes that takes; whatever is wrong is raised here. `Pipeline` runs a plan as it is, and
`s3dit plan` prints one. A second pass is a plan of its own behind the first.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from s3dit import presets
from s3dit.few_steps import with_adapters
from s3dit.inputs import control_hints, references, region_masks, start_image
from s3dit.inputs.images import Pictures
from s3dit.kernels.dispatch import numerics
from s3dit.model.config import TransformerConfig
from s3dit.model.edit_layout import edit
from s3dit.model.layout import Grid, Layout, text_to_image
from s3dit.model.tokenizer import Tokenizer
from s3dit.notes import notes as notes_on
from s3dit.notes import on_calls, without_effect
from s3dit.request import Request
from s3dit.resolve import resolve
from s3dit.runtime import cached_calls
from s3dit.runtime.budget import Budget, MemoryPlan
from s3dit.runtime.components import Components
from s3dit.runtime.encoders import PromptEmbeds, Text
from s3dit.runtime.sources import Sources
from s3dit.sampling.guidance_methods import extra_calls
from s3dit.sampling.solvers import model_calls
from s3dit.stages import References, Stage, Work, memory_plan, new_tokens, stages_of

# The texts of an item: one prompt, or the segments around its references.
Caption = tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A resolved request and everything prepared for it.

    captions: texts of every item of a pass, the pictures' prompts, those of regions, and with guidance negative ones
    behind · sigmas: noise levels · calls: of the model, in all passes · notes: what the user should know · unused:
    those of them that are about fields without effect · memory: the plan of memory where there is a budget ·
    start_images, controls, references: read and checked · shares: of each picture's prompts, if there are regions ·
    then: the second pass if there is one, whose start images the first one draws.
    """

    request: Request
    captions: tuple[Caption, ...]
    stages: tuple[Stage, ...]
    sigmas: tuple[float, ...]
    calls: int
    notes: tuple[str, ...]
    unused: tuple[str, ...] = ()
    memory: MemoryPlan | None = None
    start_images: tuple[start_image.StartImage, ...] = ()
    controls: tuple[control_hints.PreparedControl, ...] = ()
    references: References = ()
    shares: region_masks.Shares = ()
    then: "Plan | None" = None

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of patches of every picture."""
        return start_image.grids_of(self.request)

    @property
    def tile(self) -> int | None:
        """The side of a tile of the autoencoder, in latent cells, where the budget wants tiles."""
        return None if self.memory is None else self.memory.tile

    @property
    def owners(self) -> tuple[int, ...]:
        """The picture of every item of a pass without guidance: one each, or with regions one for each prompt."""
        return tuple(picture for picture, _ in region_masks.items(self.shares, self.request.count))

    def layout(self, config: TransformerConfig, guided: bool, device: torch.device | str) -> Layout:
        """Where the tokens of a pass stand: items for the prompts, with guidance others for negative prompts behind."""
        return _layout(self.request, self.captions, self.owners, self.references, config, guided, device)


def make_plan(
    request: Request,
    sources: Sources,
    tokenizer: Tokenizer,
    components: Components,
    limit: Budget | None,
    kept_prompts: Collection[Any],
    kept_references: Collection[Any],
) -> Plan:
    """Prepare a request; raises RequestError, CheckpointError, and BackendError where a budget is too small.

    limit: the budget of memory, if any · kept_prompts, kept_references: keys of the features that need not be computed.
    """
    sources = with_adapters(request, sources, components.adapters)
    config, pictures, notes = sources.config, Pictures(), list[str]()
    # Before anything is read, because conventions are about that, too.
    request, start_images = start_image.read(presets.applied(request), pictures, notes)
    request, seen = references.read(request, config, sources.path, pictures, notes)
    request, controls = control_hints.read(resolve(request, config), components.controlnet, pictures, notes)
    shares = region_masks.read(request, pictures, notes)
    items = tuple(region_masks.items(shares, request.count))
    request = cached_calls.read(request, sources.path)
    unused = tuple(without_effect(request, sources))
    if numerics() == "approximate" and request.cache is None:
        unused += ("numerics approximate has no effect: nothing approximates at present",)
    if request.seed is None:
        request = request.filled(seed=components.ranks.seed())
    passes = tuple(start_image.passes(request, notes))
    sigmas = [start_image.remaining_sigmas(each, config.scheduler) for each in passes]
    unused += tuple(cached_calls.without_effect(request.cache, sigmas))
    notes += [*unused, *(note for each in (request, passes[-1]) for note in notes_on(each, sources))]
    captions = _captions(request, items, tokenizer)
    notes += on_calls(request, sigmas)
    work = Work(
        request=passes[-1], items=len(captions),
        calls=tuple(model_calls(request.solver, each) + extra_calls(request, each) for each in sigmas),
        new_tokens=new_tokens(captions, kept_prompts),
        new_references=len({picture.key for row in seen for picture in row} - set(kept_references)),
        has_start_images=bool(start_images), controls=controls, references=seen,
    )  # fmt: skip
    memory = None if limit is None else _memory(work, captions, [picture for picture, _ in items], components, limit)
    if memory is not None and components.pinned:
        notes.append(f"{', '.join(components.pinned)}: in use by the caller, so kept in memory beside the budget")
    stages = stages_of(components, work, components.kept if memory is None else memory.kept)
    plan = None
    for each, levels in reversed(list(zip(passes, sigmas, strict=True))):
        plan = Plan(
            request=each, captions=captions, stages=stages, sigmas=tuple(levels.tolist()), calls=sum(work.calls),
            notes=tuple(dict.fromkeys(notes)), unused=unused, memory=memory, start_images=start_images,
            controls=controls, references=seen, shares=shares, then=plan,
        )  # fmt: skip
    assert plan is not None
    return plan


def _memory(
    work: Work, captions: Sequence[Caption], owners: Sequence[int], components: Components, limit: Budget
) -> MemoryPlan:
    """How a plan's work is done within a budget; BackendError where it cannot be."""
    guided = bool(work.request.guidance_scale)
    layout = _layout(work.request, captions, owners, work.references, components.config.transformer, guided, "cpu")
    return memory_plan(components, limit, work, sum(layout.joint.spans.lengths))


def _captions(
    request: Request, items: Sequence[tuple[int, region_masks.Share | None]], tokenizer: Tokenizer
) -> tuple[Caption, ...]:
    """The texts of every item of a resolved request, tokenized, and cut into segments where there are references.

    items: picture and share of each that is there without guidance.
    """
    length = request.max_sequence_length
    counts = [len(pictures) for pictures in request.references()]
    made: dict[tuple[Any, int], Caption] = {}

    def caption(text: Any, features: torch.Tensor | None, count: int) -> Caption:
        key = (text, count) if features is None else (id(features), count)
        if key not in made:
            if features is None:
                made[key] = tuple(map(tuple, tokenizer.segments(text or "", count, length)))
            else:
                made[key] = (PromptEmbeds(features),)
        return made[key]

    texts, features = request.per_image("prompt"), request.per_image("prompt_embeds")
    captions = [
        caption(texts[i], features[i], counts[i])
        if share is None or share.prompt is None
        else caption(share.prompt, None, counts[i])
        for i, share in items
    ]
    if request.guidance_scale:
        negatives = (request.per_image("negative_prompt"), request.per_image("negative_prompt_embeds"))
        captions += map(caption, *negatives, counts)
    return tuple(captions)


def _layout(
    request: Request,
    captions: Sequence[Caption],
    owners: Sequence[int],
    seen: References,
    config: TransformerConfig,
    guided: bool,
    device: torch.device | str,
) -> Layout:
    pictures = [*owners, *(range(request.count) if guided else ())]
    grids = start_image.grids_of(request)
    lengths = [tuple(map(len, caption)) for caption in captions[: len(pictures)]]
    shapes = [[reference.shape for reference in seen[i]] for i in pictures] if seen else []
    return layout_of(
        [grids[i] for i in pictures], lengths, shapes, config, device, slide=request.reference_positions == "released"
    )


def layout_of(
    grids: Sequence[Grid],
    lengths: Sequence[tuple[int, ...]],
    shapes: Sequence[Sequence[tuple[Grid, Grid]]],
    config: TransformerConfig,
    device: torch.device | str,
    *,
    slide: bool = True,
) -> Layout:
    """Where the tokens of items stand, as their model wants it; arguments as of `edit`, shapes may be empty."""
    if config.siglip_feat_dim is None:
        return text_to_image(grids, [length for (length,) in lengths], device)
    return edit(grids, lengths, shapes or [()] * len(grids), device, slide=slide)
