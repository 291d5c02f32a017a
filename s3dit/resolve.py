"""What a request means on one model: its defaults filled in."""

from collections.abc import Sequence

from s3dit import presets
from s3dit.errors import RequestError
from s3dit.few_steps import own_settings
from s3dit.inputs.noise import places
from s3dit.model.config import ModelConfig
from s3dit.request import Default, Request
from s3dit.sampling.guidance_methods import check_guidance, guidance_scale

# How much is redrawn where the request does not say it: of a start image, of its masked part, of a first pass.
REDRAWN, REPAINTED, UPSCALED = 0.6, 1.0, 0.35


def resolve(request: Request, config: ModelConfig) -> Request:
    """Put a preset's settings where a request says nothing, then the model's own; raises RequestError."""
    request, scheduler = presets.applied(request), config.scheduler
    settings, target = own_settings(request, config)
    example = [config.prompt] if config.prompt and not any(request.regions()) else []
    if request.prompt is None and not (request.embeds or example or any(request.regions())):
        raise RequestError('no prompt; needed one, as in: s3dit generate "a red fox in the snow" --model …')
    guidance = guidance_scale(request, settings.guidance_scale)
    steps = request.num_inference_steps or settings.num_inference_steps
    if request.sigmas is not None:
        steps = len([sigma for sigma in request.sigmas if sigma > 0])
    masked = request.mask_image is not None or request.extend is not None
    strength = None if request.image is None else REPAINTED if masked else REDRAWN
    # TwinFlow's spacing only where none is given: official, if it is, means the scheduler's.
    given = not isinstance(request.schedule, Default) or request.sigmas is not None
    schedule = request.schedule if given else settings.schedule
    resolved = request.filled(
        strength=strength if request.strength is None else float(request.strength),
        upscale_strength=UPSCALED if request.upscale and request.upscale_strength is None else request.upscale_strength,
        prompt=None if request.embeds else example if request.prompt is None and example else request.prompts,
        height=_side(request, "height", settings.height),
        width=_side(request, "width", settings.width),
        num_inference_steps=steps,
        guidance_scale=guidance,
        cfg=None,
        composite=request.composite is not False,
        solver=settings.solver if isinstance(request.solver, Default) else request.solver,
        target_timestep=target,
        schedule=scheduler.schedule if schedule == "official" else schedule,
        # A shift that follows from the size stays None, so that a second pass and a replay find their own.
        shift=(None if scheduler.use_dynamic_shifting else scheduler.shift)
        if request.shift is None
        else float(request.shift),
    )
    check_guidance(resolved, config.transformer.n_layers)
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
