"""A Plan: a request with everything that the model and its input files decide, made once, before any weight is read.

`make_plan` reads the input pictures, tokenizes the prompts, finds the noise levels, and says which part of the model
has its turn when, and how many bytes that takes; whatever is wrong is raised here. `Pipeline` runs a plan as it is, and
`s3dit plan` prints one. A second pass is a plan of its own behind the first. `records` says of each picture what drew
it, as a request that draws it again.
"""

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from s3dit.errors import RequestError
from s3dit.inputs import control_hints, references, start_image
from s3dit.inputs.images import Pictures
from s3dit.kernels.dispatch import backend
from s3dit.model.config import ModelConfig, TransformerConfig
from s3dit.model.layout import Layout, edit, text_to_image
from s3dit.model.tokenizer import Tokenizer
from s3dit.request import IMAGES, Request
from s3dit.runtime import budget
from s3dit.runtime.components import Components
from s3dit.runtime.sources import SHIFT_NOTE, Sources
from s3dit.sampling.solvers import model_calls

# References of every picture.
References = tuple[tuple[references.Reference, ...], ...]
# Token ids of an item's texts: one, or the segments around its references.
Caption = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """One turn of a part: what is read from disk and what is then held in memory, in bytes.

    beside: held in the same turn by other parts (ControlNets beside the transformer).
    """

    part: str
    reads: int
    holds: int
    work: str
    beside: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """A resolved request and everything prepared for it.

    captions: token ids of every item of a pass, the pictures' prompts and with guidance their negative ones behind ·
    sigmas: noise levels · calls: of the model, in all passes · memory: the plan of memory where there is a budget ·
    canvases, controls, references: its start images, what steers it, and what it looks at, read · then: the second pass
    if there is one, whose canvases the first one draws.
    """

    request: Request
    captions: tuple[Caption, ...]
    stages: tuple[Stage, ...]
    sigmas: tuple[float, ...]
    calls: int
    notes: tuple[str, ...]
    memory: budget.MemoryPlan | None = None
    start_images: tuple[start_image.StartImage, ...] = ()
    controls: tuple[control_hints.PreparedControl, ...] = ()
    references: References = ()
    then: "Plan | None" = None

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of patches of every picture."""
        return start_image.grids_of(self.request)

    @property
    def tile(self) -> int | None:
        """The side of a tile of the autoencoder, in latent cells, where the budget wants tiles."""
        return None if self.memory is None else self.memory.tile

    def layout(self, config: TransformerConfig, guided: bool, device: torch.device | str) -> Layout:
        """Where the tokens of a pass stand: with guidance the pictures twice, with their prompts and negative ones."""
        return _layout(self.request, self.captions, self.references, config, guided, device)


def make_plan(
    request: Request,
    sources: Sources,
    tokenizer: Tokenizer,
    parts: Components,
    vram: int | None,
    features: Collection[Any],
    reference_features: Collection[Any],
) -> Plan:
    """Prepare a request; raises RequestError, CheckpointError, and BackendError where a budget is too small.

    vram: the budget in bytes · features, looks: keys of what is already kept of prompts and references.
    """
    config, pictures, notes = sources.config, Pictures(), []  # type: ignore[var-annotated]
    request, start_images = start_image.read(request, pictures, notes)
    request, seen = references.read(request, config, sources.path, pictures, notes)
    request, controls = control_hints.read(resolve(request, config), parts.controlnet, pictures, notes)
    if request.seed is None:
        request = request.filled(seed=secrets.randbits(32))
    passes = tuple(start_image.passes(request, notes))
    largest = passes[-1]
    notes += [note for one in (request, largest) for note in _notes(one, sources)]
    captions = _captions(request, tokenizer)
    sigmas = [start_image.remaining_sigmas(one, config.scheduler) for one in passes]
    calls = [model_calls(request.solver, few) for few in sigmas]
    new = [ids for ids in dict.fromkeys(ids for caption in captions for ids in caption) if ids not in features]
    strange = {one.key for row in seen for one in row} - set(reference_features)
    works = [("text_encoder", f"{sum(map(len, new))} tokens")] if new else []
    read = [f"{len(strange)} references"] if strange else []
    works += [("siglip", read[0])] if strange else []
    read += [f"{request.count} start images"] * bool(start_images) + ["control images"] * bool(controls)
    works += [("vae", " and ".join(read))] if read else []
    for turn, count in enumerate(calls, 1):
        works.append(("transformer", f"{count} model calls, {len(captions)} items each"))
        works += [(part, "beside the transformer") for part in dict.fromkeys(one.part for one in controls)]
        if turn < len(calls):
            works.append(("vae", f"{request.count} pictures, enlarged, and start images again"))
    if request.output_type != "latent":
        works.append(("vae", f"{request.count} pictures"))
    memory = None
    if vram is not None:
        whole = _layout(largest, captions, seen, config.transformer, bool(request.guidance_scale), "cpu").joint
        names = tuple(dict.fromkeys(part for part, _ in works))
        memory = memory_plan(
            parts, vram, largest, seen, sum(whole.spans.lengths), sum(map(len, new)), names, len(controls)
        )
    then = None
    for one, few in reversed(list(zip(passes, sigmas, strict=True))):
        then = Plan(
            request=one, captions=captions, stages=_stages(parts, works, parts.kept if memory is None else memory.kept),
            sigmas=tuple(few.tolist()), calls=sum(calls), notes=tuple(dict.fromkeys(notes)), memory=memory,
            start_images=start_images, controls=controls, references=seen, then=then,
        )  # fmt: skip
    assert then is not None
    return then


def resolve(request: Request, config: ModelConfig) -> Request:
    """Put the model's own settings where a request says None; raises RequestError."""
    settings = config.settings
    if request.prompt is None and not config.prompt:
        raise RequestError('no prompt; needed one, as in: s3dit generate "a red fox in the snow" --model …')
    guidance = request.cfg - 1.0 if request.cfg is not None else request.guidance_scale

    def size(name: str) -> int | Sequence[int]:
        value = getattr(request, name)
        if value is None and request.latents is not None:
            return int(request.latents.shape[-2 if name == "height" else -1]) * 8
        return getattr(settings, name) if value is None else value

    steps = request.num_inference_steps or settings.num_inference_steps
    if request.sigmas is not None:
        steps = len([s for s in request.sigmas if s > 0])
    masked = request.mask_image is not None or request.extend is not None
    dynamic_or_own = None if config.scheduler.use_dynamic_shifting else config.scheduler.shift
    strength = None if request.image is None else 1.0 if masked else 0.6
    resolved = request.filled(
        strength=strength if request.strength is None else float(request.strength),
        upscale_strength=0.35 if request.upscale and request.upscale_strength is None else request.upscale_strength,
        prompt=[config.prompt] if request.prompt is None else request.prompts,
        height=size("height"),
        width=size("width"),
        num_inference_steps=steps,
        guidance_scale=settings.guidance_scale if guidance is None else float(guidance),
        cfg=None,
        schedule=config.scheduler.schedule if request.schedule == "official" else request.schedule,
        # A shift that follows from the size stays None, so that a second pass and a replay find their own.
        shift=dynamic_or_own if request.shift is None else float(request.shift),
    )
    resolved.check_pixels()
    resolved.check_latents()
    return resolved


def texts_of(request: Request) -> list[str]:
    """The text of every item of a pass: prompts, and after them the negative ones when guidance is on."""
    negatives = [n or "" for n in request.per_image("negative_prompt")] if request.guidance_scale else []
    return [*(p for p in request.prompts for _ in range(request.num_images_per_prompt)), *negatives]


def _captions(request: Request, tokenizer: Tokenizer) -> tuple[Caption, ...]:
    """Token ids of the texts of a resolved request, cut into segments where there are references."""
    texts = texts_of(request)
    counts = [len(row) for row in request.references()] * (len(texts) // request.count)
    known: dict[tuple[str, int], Caption] = {}
    for item in zip(texts, counts, strict=True):
        if item not in known:
            known[item] = tuple(map(tuple, tokenizer.segments(*item, request.max_sequence_length)))
    return tuple(known[item] for item in zip(texts, counts, strict=True))


def _layout(
    request: Request,
    captions: Sequence[Caption],
    seen: References,
    config: TransformerConfig,
    guided: bool,
    device: torch.device | str,
) -> Layout:
    times = 2 if guided else 1
    grids = start_image.grids_of(request) * times
    lengths = [tuple(map(len, caption)) for caption in captions[: len(grids)]]
    if config.siglip_feat_dim is None:
        return text_to_image(grids, [length for (length,) in lengths], device)
    shapes = [[one.shape for one in row] for row in seen] * times
    return edit(grids, lengths, shapes, device, slide=request.reference_positions == "released")


def _notes(request: Request, sources: Sources) -> Iterator[str]:
    """What the user should know: the embedded model's world, sizes far from home."""
    config, settings = sources.config, sources.config.settings
    yield from sources.notes
    if sources.guessed and request.shift == config.scheduler.shift:
        yield SHIFT_NOTE
    if config.words:
        text = " ".join(texts_of(request)).lower()
        unknown = sorted({w for w in (w.strip(".,;:!?\"'()") for w in text.split()) if w} - config.words)
        sizes = set(request.per_image("height")) | set(request.per_image("width"))
        if unknown or sizes != {settings.height}:
            odd = f"unknown words: {', '.join(unknown[:8])}" if unknown else f"its size is {settings.height}"
            yield f"{config.note} ({odd})"
    elif any(not 512 <= side <= 2048 for n in ("height", "width") for side in request.per_image(n)):
        yield "the model was trained for sides of 512 to 2048 pixels; other sizes draw, but less well"


def _stages(parts: Components, works: Sequence[tuple[str, str]], kept: Mapping[str, int]) -> tuple[Stage, ...]:
    """The turns of parts, with their bytes."""
    stages = [stage_of(parts, part, work, kept) for part, work in works]
    held = sum({stage.part: stage.holds for stage in stages if stage.part in parts.controlnets}.values())
    return tuple(replace(stage, beside=held if stage.part == "transformer" else 0) for stage in stages)


def stage_of(parts: Components, part: str, work: str, kept: Mapping[str, int]) -> Stage:
    """A part's turn; kept: how many blocks of a streamed part stay on the device."""
    read, fixed, blocks = parts.sizes(part)
    whole = fixed + sum(blocks)
    streamed = fixed + (kept[part] + 2) * max(blocks) if part in kept else whole
    return Stage(part, read, min(whole, streamed), work)


def memory_plan(
    parts: Components,
    size: int,
    request: Request,
    seen: References,
    tokens: int,
    new: int,
    names: Sequence[str],
    controls: int,
) -> budget.MemoryPlan:
    """The plan of memory of a request for `size` bytes; BackendError where there is none.

    tokens: of a pass · new: prompt tokens to encode · names: of the parts it needs · controls: how many act on it.
    """
    config, compute, device = parts.config, parts.placement.compute, parts.placement.device.type
    pictures = [one for row in seen for one in row]
    # Encoding a reference takes less than decoding a picture of its size.
    sides = [(one.pixels.shape[1], one.pixels.shape[2]) for one in pictures]
    sides += zip(request.per_image("height"), request.per_image("width"), strict=True)
    # Where SwiGLU has an implementation; plain, it is the widest place of a pass.
    lean = {"cpu": ("auto", "torch"), "cuda": ("auto", "triton")}.get(device, ())
    kind = {"lean": backend() in lean, "quantized": bool(parts.formats["transformer"])}
    passing = budget.transformer_work(config.transformer, tokens, compute, **kind)
    passing += budget.control_work(config.transformer, tokens, compute, controls)
    tiles = [tile for tile in budget.TILES if tile is None or 8 * tile < max(map(max, sides))]
    works: dict[str, list[tuple[int | None, int]]] = {
        "text_encoder": [(None, budget.encoder_work(config.text_encoder, new, compute))],
        "transformer": [(None, passing)],
        "vae": [
            (tile, max(budget.decoder_work(config.vae, *side, tile, compute, device) for side in sides))
            for tile in tiles
        ],
    }
    if config.vision is not None:
        patches = sum(len(one.patches) for one in pictures)
        works["siglip"] = [(None, budget.vision_work(config.vision, patches, compute))]
    needs = {part: budget.Need(*parts.sizes(part)[1:], tuple(works.get(part, [(None, 0)]))) for part in names}
    guests = {part: needs.pop(part) for part in names if part in parts.controlnets}
    return budget.plan_memory_beside(size, needs, "transformer", guests, budget.RESERVE[device])


def records(plan: Plan, engine: dict[str, Any], beside: dict[str, Any]) -> list[dict[str, Any]]:
    """For each picture, a request that draws it alone, and what drew it.

    engine: what is true of the pipeline · beside: what stands beside the request in each record.
    """
    request = plan.request
    engine = {**engine, "levels": list(plan.sigmas), "model_calls": plan.calls}
    shared = request.filled(num_images_per_prompt=1, generator=None, latents=None)
    prompts = [p for p in request.prompts for _ in range(request.num_images_per_prompt)]
    names = ("negative_prompt", "height", "width", *IMAGES, "reference_area")
    rows = zip(prompts, request.seeds(), *(request.per_image(name) for name in names), strict=True)
    found = []
    for i, (prompt, seed, *values) in enumerate(rows):
        own = dict(zip(names, values, strict=True)) | {"reference": request.references()[i] or None}
        if own["reference"] is None:
            own["reference_positions"] = "released"
        controls = request.controls_of(i)
        data = shared.filled(prompt=prompt, seed=seed, control=controls or None, **own).to_json()
        # Without these the request alone does not say where noise and images came from.
        whole = request.generator is None and request.latents is None
        whole = whole and all(name in data for name, value in own.items() if value is not None)
        whole = whole and all(one.named for one in controls)
        hashes: dict[str, Any] = dict(plan.start_images[i].hashes) if plan.start_images else {}
        hashes |= control_hints.hashes(plan.controls, i)
        if plan.references[i]:
            hashes["reference"] = [one.sha256 for one in plan.references[i]]
        inputs = {"inputs": hashes} if hashes else {}
        found.append(data | {"engine": engine | {"replayable": whole} | inputs} | beside)
    return found


def out_of_memory(plan: Plan, error: str) -> str:
    """What to say when memory ran out."""
    held = max(stage.holds + stage.beside for stage in plan.stages)
    return (
        f"out of memory ({error.splitlines()[0][:120]}); the largest part holds {held / 1e9:.1f} GB besides "
        "activations; draw fewer or smaller pictures at once, give a budget (vram), or use dtype bf16"
    )
