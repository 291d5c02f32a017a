"""What the user should know of a resolved request: how it is read, what it takes, what has no effect."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from s3dit import presets
from s3dit.guidance_options import Method, SkipLayers, Variation
from s3dit.request import Request
from s3dit.runtime import cached_calls
from s3dit.runtime.sources import SHIFT_NOTE, VARIANT_NOTE, Sources
from s3dit.sampling.guidance_methods import extra_calls, guidance_of, times_of_calls
from s3dit.sampling.multistep import STOCHASTIC
from s3dit.sampling.spacings import UNSHIFTED
from s3dit.values import as_list


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


def on_calls(request: Request, passes: Sequence[Tensor]) -> Iterator[str]:
    """Say how many model calls a cache spares, how many are guided, where some are not, and what skip_layers adds."""
    yield from cached_calls.notes(request, passes)
    if request.guidance_interval is None and request.skip_layers is None:
        return
    calls = guided = extra = 0
    for sigmas in passes:
        guidance, times = guidance_of(request, sigmas), times_of_calls(request, sigmas)
        calls, guided = calls + len(times), guided + sum(guidance.at(t) > 0 for t in times)
        extra += extra_calls(request, sigmas)
    if request.guidance_scale and request.guidance_interval is not None:
        yield f"guidance acts in {guided} of {calls} model calls"
    if request.skip_layers is not None:
        yield f"skip_layers adds {extra} model calls without guidance to {calls}"


def without_effect(request: Request, sources: Sources) -> Iterator[str]:
    """One note for each field of a resolved request that was given and changes nothing, or works against the model."""
    config = sources.config
    yield from _guidance_without_effect(request, sources)
    if request.seed == -1:
        yield "seed -1 is a seed like any other; leave seed out for a random one"
    masked = request.mask_image is not None or request.extend is not None
    if request.image is not None and request.strength == 1 and not masked:
        yield "image gives its size and nothing else: strength 1 redraws all of it; give less, such as 0.6"
    if request.image is None and request.upscale is None and request.posterior != "mode":
        yield "posterior has no effect: there is no start image"
    if not request.composite and (not masked or request.output_type == "latent"):
        yield f"composite has no effect: there {'is no mask' if not masked else 'are latents and no pictures'}"
    if request.num_inference_steps == 1 and request.image is None and request.upscale is None:
        if request.solver not in ("euler", config.settings.solver):
            yield f"solver {request.solver} has no effect: a single step is one of euler"
        if request.schedule not in ("official", config.scheduler.schedule, config.settings.schedule):
            yield f"schedule {request.schedule} has no effect: a single step goes from 1 to 0"
    named = () if request.schedule == "official" or request.convention != "comfyui" else (request.schedule,)
    if request.sigmas is not None and request.schedule in ("simple", "sgm_uniform", *UNSHIFTED, *named):
        yield f"the values of sigmas have no effect: schedule {request.schedule} spaces as many steps by itself"
    elif request.sigmas is not None and request.schedule != "official":
        yield f"of sigmas only their number, the first and the last count: schedule {request.schedule} spaces the rest"
    if request.schedule in UNSHIFTED and request.shift not in (None, config.scheduler.shift):
        yield f"shift has no effect: schedule {request.schedule} has sigmas of its own"
    blended = masked and request.convention == "diffusers"
    random = request.solver in STOCHASTIC or (request.image is not None and (blended or request.posterior == "sample"))
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


def _guidance_without_effect(request: Request, sources: Sources) -> Iterator[str]:
    """One note for each field of a resolved request about guidance that changes nothing, or works against the model."""
    if request.guidance_scale:
        if request.cfg_truncation > 1:
            yield "cfg_truncation above 1 has no effect: t ends at 1"
        if request.image is not None and "zero_init_steps" in (request.guidance_method or ""):
            yield "zero_init_steps has no effect: the flow begins from a picture, and not from noise"
        # Not where Turbo is a guess, which the user may have corrected with this very guidance.
        config = sources.config
        turbo = config.variant == "turbo" and not sources.guessed and VARIANT_NOTE not in sources.notes
        if turbo or sources.distilled:
            who = "Turbo" if turbo else "the model, with its adapters,"
            scale = ",".join(format(each, "g") for each in as_list(request.guidance_scale))
            yield (
                f"guidance_scale {scale}: {who} is distilled to draw without guidance, which takes "
                "twice the work here and often makes the picture worse; its own is 0"
            )
    else:
        given = {
            "negative_prompt": request.negative_prompt is not None and any(request.per_image("negative_prompt")),
            "negative_prompt_embeds": request.negative_prompt_embeds is not None,
            "cfg_normalization": bool(request.cfg_normalization) and request.skip_layers is None,
            "cfg_truncation": request.cfg_truncation != 1,
            "guidance_interval": request.guidance_interval is not None,
            "guidance_method": Method.of(request.guidance_method).name != "plain",
        }
        for name in (name for name, is_given in given.items() if is_given):
            yield f"{name} has no effect: guidance is off; give guidance_scale, such as 4, to models that have it"
    if request.skip_layers is not None and SkipLayers.of(request.skip_layers).scale == 0:
        yield "skip_layers has no effect: its scale is 0"
    if request.variation is not None and not any(
        Variation.of(each).strength for each in request.per_image("variation")
    ):
        yield "variation has no effect: its strength is 0"
