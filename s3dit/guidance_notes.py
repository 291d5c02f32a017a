"""What the user should know of a request's guidance: what it takes, what of it has no effect, what works against it."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from s3dit.guidance_options import Method, SkipLayers, Variation
from s3dit.request import Request
from s3dit.runtime.sources import VARIANT_NOTE, Sources
from s3dit.sampling.guidance_methods import extra_calls, guidance_of, times_of_calls
from s3dit.values import as_list


def notes(request: Request, passes: Sequence[Tensor]) -> Iterator[str]:
    """Say how many model calls of all passes are guided, where some are not, and how many skip_layers adds."""
    times = [times_of_calls(request, sigmas) for sigmas in passes]
    calls = sum(map(len, times))
    if request.guidance_scale and request.guidance_interval is not None:
        acting = [guidance_of(request, each[0]).at(t) > 0 for each in zip(passes, times, strict=True) for t in each[1]]
        yield f"guidance acts in {sum(acting)} of {calls} model calls"
    if request.skip_layers is not None:
        extra = sum(extra_calls(request, sigmas) for sigmas in passes)
        yield f"skip_layers adds {extra} model calls without guidance to {calls}"


def without_effect(request: Request, sources: Sources) -> Iterator[str]:
    """One note for each field of a resolved request about guidance that changes nothing, or works against the model."""
    if request.guidance_scale:
        if request.cfg_truncation > 1:
            yield "cfg_truncation above 1 has no effect: t ends at 1"
        if request.image is not None and "zero_init_steps" in (request.guidance_method or ""):
            yield "zero_init_steps has no effect: the flow begins from a picture, and not from noise"
        # Not where Turbo is a guess, which the user may have corrected with this very guidance.
        if sources.config.variant == "turbo" and not sources.guessed and VARIANT_NOTE not in sources.notes:
            scale = ",".join(format(each, "g") for each in as_list(request.guidance_scale))
            yield (
                f"guidance_scale {scale}: Turbo is distilled to draw without guidance, which takes "
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
    if request.variation is not None and not any(Variation.of(each).strength for each in request.per_image("variation")):
        yield "variation has no effect: its strength is 0"
