"""What a request will do, known before any weight is read: its turns, their bytes, its noise levels.

`Plan` is what `Pipeline.plan` makes and `s3dit plan` prints; a second pass is a plan of its own behind the first.
`records` says of each picture what drew it, as a request that draws it again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from s3dit import branches, budget, conditioning, references
from s3dit.kernels.dispatch import backend
from s3dit.parts import Parts
from s3dit.request import IMAGES, Request

# References of every picture.
Seen = tuple[tuple[references.Reference, ...], ...]


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
    """What a request will do, known before any weight is read.

    calls: of the model, in all · fit: the plan of memory where there is a budget · canvases: its start images, read ·
    controls: what steers it, read · references: of each picture, read · then: the second pass if there is one, whose
    canvases the first one draws.
    """

    request: Request
    stages: tuple[Stage, ...]
    sigmas: tuple[float, ...]
    calls: int
    notes: tuple[str, ...]
    fit: budget.Fit | None = None
    canvases: tuple[conditioning.Canvas, ...] = ()
    controls: tuple[branches.Prepared, ...] = ()
    then: "Plan | None" = None
    references: Seen = ()


def stage_of(parts: Parts, part: str, work: str, kept: Mapping[str, int]) -> Stage:
    """A part's turn; kept: how many blocks of a streamed part stay on the device."""
    read, fixed, blocks = parts.sizes(part)
    whole = fixed + sum(blocks)
    streamed = fixed + (kept[part] + 2) * max(blocks) if part in kept else whole
    return Stage(part, read, min(whole, streamed), work)


def fit_of(
    parts: Parts, size: int, request: Request, seen: Seen, tokens: int, new: int, names: Sequence[str], controls: int
) -> budget.Fit:
    """The plan of memory of a request for `size` bytes; BackendError where there is none.

    tokens: of a pass · new: prompt tokens to encode · names: of the parts it needs · controls: how many act on it.
    """
    config, compute, device = parts.config, parts.placement.compute, parts.placement.device.type
    pictures = [one for row in seen for one in row]
    # Encoding a reference takes less than decoding a picture of its size.
    sides = [(one.pixels.shape[1], one.pixels.shape[2]) for one in pictures]
    sides += zip(request.per_image("height"), request.per_image("width"), strict=True)
    # Where SwiGLU has a stand-in; plain, it is the widest place of a pass.
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
    return budget.fit_beside(size, needs, "transformer", guests, budget.RESERVE[device])


def records(plan: Plan, engine: dict[str, Any], beside: dict[str, Any]) -> list[dict[str, Any]]:
    """For each picture, a request that draws it alone, and what drew it.

    engine: what is true of the pipeline · beside: what stands beside the request in each record.
    """
    request = plan.request
    engine = {**engine, "levels": list(plan.sigmas), "model_calls": plan.calls}
    shared = replace(request, num_images_per_prompt=1, generator=None, latents=None)
    prompts = [p for p in request.prompts for _ in range(request.num_images_per_prompt)]
    names = ("negative_prompt", "height", "width", *IMAGES, "reference_area")
    rows = zip(prompts, request.seeds(), *(request.per_image(name) for name in names), strict=True)
    found = []
    for i, (prompt, seed, *values) in enumerate(rows):
        own = dict(zip(names, values, strict=True)) | {"reference": request.references()[i] or None}
        if own["reference"] is None:
            own["reference_positions"] = "released"
        controls = request.controls_of(i)
        data = replace(shared, prompt=prompt, seed=seed, control=controls or None, **own).to_json()
        # Without these the request alone does not say where noise and images came from.
        whole = request.generator is None and request.latents is None
        whole = whole and all(name in data for name, value in own.items() if value is not None)
        whole = whole and all(one.named for one in controls)
        hashes: dict[str, Any] = dict(plan.canvases[i].hashes) if plan.canvases else {}
        hashes |= branches.hashes(plan.controls, i)
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
