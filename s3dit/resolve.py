"""What a request means on one model: its defaults filled in, and what the user should know about the two together."""

from collections.abc import Iterator, Sequence

from s3dit import presets
from s3dit.errors import RequestError
from s3dit.inputs.noise import places
from s3dit.model.config import ModelConfig
from s3dit.request import Request
from s3dit.runtime.sources import SHIFT_NOTE, VARIANT_NOTE, Sources
from s3dit.sampling.multistep import STOCHASTIC
from s3dit.sampling.spacings import UNSHIFTED

# How much is redrawn where the request does not say it: of a start image, of its masked part, of a first pass.
REDRAWN, REPAINTED, UPSCALED = 0.6, 1.0, 0.35


def resolve(request: Request, config: ModelConfig) -> Request:
    """Put a preset's settings where a request says nothing, then the model's own; raises RequestError."""
    request, settings, scheduler = presets.applied(request), config.settings, config.scheduler
    if request.prompt is None and not request.embeds and not config.prompt:
        raise RequestError('no prompt; needed one, as in: s3dit generate "a red fox in the snow" --model …')
    guidance = request.cfg - 1.0 if request.cfg is not None else request.guidance_scale
    steps = request.num_inference_steps or settings.num_inference_steps
    if request.sigmas is not None:
        steps = len([sigma for sigma in request.sigmas if sigma > 0])
    masked = request.mask_image is not None or request.extend is not None
    strength = None if request.image is None else REPAINTED if masked else REDRAWN
    resolved = request.filled(
        strength=strength if request.strength is None else float(request.strength),
        upscale_strength=UPSCALED if request.upscale and request.upscale_strength is None else request.upscale_strength,
        prompt=None if request.embeds else [config.prompt] if request.prompt is None else request.prompts,
        height=_side(request, "height", settings.height),
        width=_side(request, "width", settings.width),
        num_inference_steps=steps,
        guidance_scale=settings.guidance_scale if guidance is None else float(guidance),
        cfg=None,
        schedule=scheduler.schedule if request.schedule == "official" else request.schedule,
        # A shift that follows from the size stays None, so that a second pass and a replay find their own.
        shift=(None if scheduler.use_dynamic_shifting else scheduler.shift)
        if request.shift is None
        else float(request.shift),
    )
    presets.check(resolved)
    places(resolved)
    resolved.check_pixels()
    resolved.check_latents()
    resolved.check_embeds(config.transformer.cap_feat_dim)
    return resolved


def _side(request: Request, name: str, default: int) -> int | Sequence[int]:
    """The height or width of a request's pictures: as given, else that of its latents, else the model's."""
    value = getattr(request, name)
    if value is None and request.latents is not None:
        return [8 * latent.shape[-2 if name == "height" else -1] for latent in request.latents]
    return default if value is None else value


def texts_of(request: Request) -> list[str]:
    """The text of every item of a pass: prompts, and after them the negative ones when guidance is on."""
    negatives = [text or "" for text in request.per_image("negative_prompt")] if request.guidance_scale else []
    return [*(prompt for prompt in request.prompts for _ in range(request.num_images_per_prompt)), *negatives]


def notes(request: Request, sources: Sources) -> Iterator[str]:
    """What the user should know of a resolved request: how its model was read, unknown words, sizes far from home."""
    config, settings = sources.config, sources.config.settings
    yield from sources.notes
    yield from presets.notes(request)
    if sources.guessed and request.shift == config.scheduler.shift:
        yield SHIFT_NOTE
    if config.words:
        text = " ".join(texts_of(request)).lower()
        unknown = sorted({w for w in (w.strip(".,;:!?\"'()") for w in text.split()) if w} - config.words)
        sizes = set(request.per_image("height")) | set(request.per_image("width"))
        if unknown or sizes != {settings.height}:
            odd = f"unknown words: {', '.join(unknown[:8])}" if unknown else f"its size is {settings.height}"
            yield f"{config.note} ({odd})"
    elif any(not 512 <= side <= 2048 for name in ("height", "width") for side in request.per_image(name)):
        yield "the model was trained for sides of 512 to 2048 pixels; other sizes draw, but less well"


def without_effect(request: Request, sources: Sources) -> Iterator[str]:
    """One note for each field of a resolved request that was given and changes nothing, or works against the model."""
    config = sources.config
    if request.guidance_scale:
        if request.cfg_truncation > 1:
            yield "cfg_truncation above 1 has no effect: t ends at 1"
        # Not where Turbo is a guess, which the user may have corrected with this very guidance.
        if config.variant == "turbo" and not sources.guessed and VARIANT_NOTE not in sources.notes:
            yield (
                f"guidance_scale {request.guidance_scale:g}: Turbo is distilled to draw without guidance, which takes "
                "twice the work here and often makes the picture worse; its own is 0"
            )
    else:
        given = {
            "negative_prompt": request.negative_prompt is not None and any(request.per_image("negative_prompt")),
            "negative_prompt_embeds": request.negative_prompt_embeds is not None,
            "cfg_normalization": bool(request.cfg_normalization),
            "cfg_truncation": request.cfg_truncation != 1,
        }
        for name in (name for name, is_given in given.items() if is_given):
            yield f"{name} has no effect: guidance is off; give guidance_scale, such as 4, to models that have it"
    if request.seed == -1:
        yield "seed -1 is a seed like any other; leave seed out for a random one"
    masked = request.mask_image is not None or request.extend is not None
    if request.image is not None and request.strength == 1 and not masked:
        yield "image gives its size and nothing else: strength 1 redraws all of it; give less, such as 0.6"
    if request.image is None and request.posterior != "mode":
        yield "posterior has no effect: there is no start image"
    if not request.composite and (not masked or request.output_type == "latent"):
        yield f"composite has no effect: there {'is no mask' if not masked else 'are latents and no pictures'}"
    if request.num_inference_steps == 1 and request.image is None and request.upscale is None:
        if request.solver != "euler":
            yield f"solver {request.solver} has no effect: a single step is one of euler"
        if request.schedule not in ("official", config.scheduler.schedule):
            yield f"schedule {request.schedule} has no effect: a single step goes from 1 to 0"
    named = () if request.schedule == "official" or request.convention != "comfyui" else (request.schedule,)
    if request.sigmas is not None and request.schedule in ("simple", "sgm_uniform", *UNSHIFTED, *named):
        yield f"the values of sigmas have no effect: schedule {request.schedule} spaces as many steps by itself"
    elif request.sigmas is not None and request.schedule != "official":
        yield f"of sigmas only their number, the first and the last count: schedule {request.schedule} spaces the rest"
    if request.schedule in UNSHIFTED and request.shift not in (None, config.scheduler.shift):
        yield f"shift has no effect: schedule {request.schedule} has sigmas of its own"
    random = request.solver in STOCHASTIC or (request.image is not None and request.posterior == "sample")
    if request.latents is not None and request.upscale is None and not random:
        for name in ("seed", "generator", "batch_place"):
            if getattr(request, name) is not None:
                yield f"{name} has no effect: latents are the noise, and nothing else is drawn at random"
    if (
        request.embeds
        and request.max_sequence_length != 512
        and (request.negative_prompt_embeds is not None or not request.guidance_scale)
    ):
        yield "max_sequence_length has no effect: prompt_embeds are taken as they are"
