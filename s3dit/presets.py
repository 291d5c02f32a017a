"""Presets: what other programs draw a Z-Image picture with, as fields of a request.

A preset stands for fields; any that the request gives itself take its place. What names mean there is a field like any
other, `convention`: comfyui (schedules, dpmpp_2m, er_sde, strength, noise of a batch) or diffusers (noise of a batch,
`latents` beside a start image, masks of another size, references in bf16). The record of a picture has all of these
fields, so it is drawn again as it was whatever a preset says later.

Sources: ComfyUI's templates image_z_image_turbo, image_z_image and its 2K upscaler (October 2026); diffusers'
`ZImagePipeline` and `ZImageImg2ImgPipeline`; official `src/zimage/pipeline.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from operator import eq, is_
from typing import Any

from s3dit.errors import RequestError
from s3dit.request import Default, Preset, Request, Solver
from s3dit.values import as_list

COMFYUI = {"convention": "comfyui", "schedule": "simple", "shift": 3.0}
DIFFUSERS = {"convention": "diffusers", "solver": "euler", "schedule": "official"}
PRESETS: dict[Preset, dict[str, Any]] = {
    "comfyui-turbo": COMFYUI | {"num_inference_steps": 8, "cfg": 1.0, "solver": "res_multistep"},
    "comfyui-base": COMFYUI | {"num_inference_steps": 25, "cfg": 4.0, "solver": "res_multistep"},
    "comfyui-2k": COMFYUI
    | {"num_inference_steps": 5, "cfg": 1.0, "solver": "dpmpp_2m_sde", "schedule": "beta", "strength": 0.33},
    # Steps, guidance and shift are the model's own: both programs' defaults are one model's.
    "diffusers": DIFFUSERS | {"posterior": "sample", "composite": False},
    "official": DIFFUSERS,
}
# Fields that say the same, and fields without which another means nothing.
RIVALS = {"cfg": "guidance_scale", "num_inference_steps": "sigmas", "schedule": "sigmas"}
NEEDS: dict[str, Callable[[Request], bool]] = {
    "strength": lambda request: request.image is not None,
    "posterior": lambda request: request.image is not None,
    "composite": lambda request: masked(request) and request.output_type != "latent",
}
# What preset diffusers says of a control that does not say it itself.
CONTROL: dict[str, Any] = {"rule": "diffusers", "strength": 0.75}
# Solvers of whose names ComfyUI has no form for flows.
ABSENT: tuple[Solver, ...] = ("unipc", "res_multistep_ancestral")
# Solvers that draw noise, and have the same from ComfyUI's generator.
RANDOM: tuple[Solver, ...] = ("euler_ancestral", "er_sde", "lcm")


def applied(request: Request) -> Request:
    """Return a request with the fields of its preset, but those that it gives itself; RequestError without an image."""
    if request.preset is None:
        return request
    if request.preset == "comfyui-2k" and request.image is None:
        raise RequestError(
            "preset is comfyui-2k, which redraws a picture; give image too, and height and width, such as twice its own"
        )
    values = {spec.name: getattr(request, spec.name) for spec in fields(request)}
    given = {name for name, value in values.items() if value is not None and not isinstance(value, Default)}
    said = {
        name: value
        for name, value in PRESETS[request.preset].items()
        if name not in given and RIVALS.get(name) not in given and (name not in NEEDS or NEEDS[name](request))
    }
    if request.preset == "diffusers" and request.controls:
        said["control"] = [
            replace(control, **{name: value for name, value in CONTROL.items() if getattr(control, name) is None})
            for control in request.controls
        ]
    return request.filled(**said)


def masked(request: Request) -> bool:
    """Whether a part of the start image is kept."""
    return request.mask_image is not None or request.extend is not None


def check(request: Request) -> None:
    """Find what has no meaning in a resolved request's convention; raises RequestError."""
    whose, several = request.convention, as_list(request.seed)
    if request.batch_place is not None and (whose == "own" or request.generator is not None):
        raise RequestError(
            "batch_place is about a batch whose noise is drawn at once from one seed; give convention too, diffusers "
            "or comfyui, and no generator, or leave batch_place out"
        )
    if whose == "comfyui" and request.solver in ABSENT:
        raise RequestError(
            f"convention comfyui has no solver {request.solver} for flows: ComfyUI's is for variance-exploding models, "
            "and spoils a flow's pictures; needed another solver, or convention own"
        )
    if whose == "own" or request.generator is not None:
        return
    each = request.count // max(1, len(several))
    for name, same in (("height", eq), ("width", eq), ("image", is_)):
        values = request.per_image(name) if name != "image" or request.posterior == "sample" else []
        if not all(same(value, values[i - i % each]) for i, value in enumerate(values)):
            raise RequestError(
                f"{name} has several values, and convention {whose} draws the noise of the pictures of one seed at "
                "once; needed one value for all of them; give a seed for each picture"
            )
    if each > 1 and request.upscale is not None and request.posterior == "sample":
        # What the second pass begins from is another picture each.
        raise RequestError(
            f"upscale is given with posterior sample, and convention {whose} draws the noise of the pictures of one "
            "seed at once; needed posterior mode, or a seed for each picture"
        )


def notes(request: Request) -> Iterator[str]:
    """What the program that a resolved request follows draws otherwise, all the same."""
    solver, scale = request.solver, max(as_list(request.guidance_scale or 0))
    if request.convention == "comfyui" and solver == "dpmpp_2m_sde":
        yield (
            "the noise that dpmpp_2m_sde adds is this engine's own: ComfyUI takes it from torchsde's Brownian tree, "
            "so its pictures differ in detail"
        )
    elif request.convention == "comfyui" and solver in RANDOM:
        yield f"the noise that {solver} adds is that of ComfyUI on a CPU; on a GPU it draws other numbers"
    if request.convention == "diffusers" and request.generator is None:
        yield "the first noise is that of a generator on the CPU; one on a GPU draws other numbers from the same seed"
    if request.convention == "diffusers" and request.image is not None:
        if request.latents is not None and not masked(request):
            yield "image gives its size and, by strength, the steps, and no more: latents are the state to start from"
        elif request.posterior == "sample" and len(as_list(request.image)) < len(as_list(request.seed)):
            yield (
                "each picture samples the posterior of the start image by its own seed; diffusers samples an image of "
                "several generators by the first of them; give both an image a picture"
            )
    if request.preset == "official" and 0 < scale <= 1:
        yield f"guidance_scale {scale:g} acts here; the official code takes 1 and less for none"
