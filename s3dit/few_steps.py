"""Settings that a request takes from a TwinFlow model or a distill LoRA, where it gives none itself.

Both are drawn in a few steps without guidance, and badly with the settings of the model that they are for. The settings
are put into the model's configuration before the request is resolved, so that they are defaults like any other.

Source: inclusionAI/TwinFlow's README (styles few and any); `weights.few_steps` says how an adapter is recognized.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from s3dit import presets
from s3dit.errors import RequestError
from s3dit.model.config import VARIANTS, ModelConfig, Settings
from s3dit.request import Request, TargetTimestep
from s3dit.runtime.adapters import Loaded
from s3dit.runtime.sources import Sources
from s3dit.sampling.guidance_methods import guidance_scale
from s3dit.values import as_list
from s3dit.weights.few_steps import FewSteps


def own_settings(request: Request, config: ModelConfig) -> tuple[Settings, TargetTimestep | None]:
    """What a model is drawn with, and what a TwinFlow model's steps aim at; raises RequestError for another model."""
    if not config.transformer.target_timestep:
        if request.target_timestep is not None:
            raise RequestError(
                f"target_timestep is {request.target_timestep}, which this model does not read (it has no "
                "t_embedder_2); needed a TwinFlow checkpoint; leave target_timestep out"
            )
        return config.settings, None
    if request.target_timestep == "none":
        plain = VARIANTS[config.variant]
        return replace(plain, height=config.settings.height, width=config.settings.width), "none"
    if request.target_timestep == "next":
        return replace(config.settings, solver="euler"), "next"
    return config.settings, "end"


def with_adapters(request: Request, sources: Sources, adapters: Mapping[str, Loaded]) -> Sources:
    """A model as the last of its distill LoRAs wants it, with a note on what is taken and what the request gives.

    adapters: the attached ones by name; those of strength 0 do nothing.
    """
    request = presets.applied(request)
    acting = [(name, each.few_steps) for name, each in adapters.items() if each.few_steps is not None and each.scale]
    if not acting:
        return sources
    name, few = acting[-1]
    config, shift = sources.config, few.shift
    settings = replace(
        config.settings, num_inference_steps=few.num_inference_steps, guidance_scale=float(few.guidance_scale)
    )
    scheduler = config.scheduler
    if shift is not None:
        scheduler = replace(scheduler, shift=float(shift), use_dynamic_shifting=False)
    notes = [*sources.notes, *_notes(name, few, request)]
    if len(acting) > 1:
        notes.append(f"{len(acting)} distill LoRAs act at once; the settings are those of {name}, the last")
    return replace(
        sources, config=replace(config, settings=settings, scheduler=scheduler), notes=tuple(notes),
        guessed=sources.guessed and shift is None, distilled=few.guidance_scale == 0,
    )  # fmt: skip


def _notes(name: str, few: FewSteps, request: Request) -> Iterator[str]:
    """What a request takes of a distill LoRA's settings, and what it gives against them."""
    told: dict[str, Any] = {"num_inference_steps": few.num_inference_steps, "guidance_scale": few.guidance_scale}
    told |= {} if few.shift is None else {"shift": few.shift}
    given: dict[str, Any] = {field: getattr(request, field) for field in told}
    if request.cfg is not None or request.guidance_scale is not None:
        given["guidance_scale"] = guidance_scale(request, 0.0)
    if request.sigmas is not None:
        given["num_inference_steps"] = sum(sigma > 0 for sigma in request.sigmas)
    taken = ", ".join(f"{field} {_shown(value)}" for field, value in told.items() if given[field] is None)
    against = ", ".join(f"{field} {_shown(given[field])}" for field in told if given[field] not in (None, told[field]))
    yield (
        f"{name} is a distill LoRA"
        + (f"; taken from it, as the request does not give it: {taken}" if taken else "")
        + (f"; given otherwise: {against}" if against else "")
    )


def _shown(value: Any) -> str:
    """A number, or several, for people."""
    return ",".join(format(each, "g") for each in as_list(value))
