"""From a plan to the call of diffusers' pipeline that draws the same: which pipeline, its options, what it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.inputs.control_hints import PreparedControl
from s3dit.inputs.noise import sources
from s3dit.model.config import ModelConfig
from s3dit.parity.solvers import check_solver
from s3dit.plan import Plan
from s3dit.values import as_list

# Pixels of a reference above which it is scaled.
LARGE = 1024 * 1024
# What to do instead, at the end of refusals.
INSTEAD = "compare with a record of this engine (--record, --against), or leave it out"


@dataclass(frozen=True, slots=True)
class Call:
    """What diffusers is to draw.

    pipeline: its class · control: its only ControlNet · encoded: places, among the pictures that the reference's
    autoencoder encodes, of those that this engine encodes, in order.
    """

    pipeline: str
    plan: Plan
    control: PreparedControl | None
    encoded: tuple[int, ...]

    @property
    def at_once(self) -> bool:
        """Whether one generator draws the noise of all pictures, as in diffusers when it is given one."""
        request = self.plan.request
        return request.convention == "diffusers" and request.count > 1 and request.generator is None

    def options(self, vae: Any) -> dict[str, Any]:
        """The arguments of the call but its generators."""
        request = self.plan.request
        count = request.count
        options: dict[str, Any] = {
            "prompt": [prompt for prompt in request.prompts for _ in range(request.num_images_per_prompt)],
            "negative_prompt": [text or "" for text in request.per_image("negative_prompt")],
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": max(as_list(request.guidance_scale), default=0.0),
            "cfg_normalization": request.cfg_normalization, "cfg_truncation": request.cfg_truncation,
            "max_sequence_length": request.max_sequence_length,
            "height": request.per_image("height")[0], "width": request.per_image("width")[0],
        }  # fmt: skip
        if request.sigmas is not None:
            options["sigmas"] = [float(sigma) for sigma in request.sigmas if sigma > 0]
        if request.latents is not None:
            options["latents"] = torch.stack(list(request.latents)).float()
        if self.pipeline == "ZImageOmniPipeline":
            references = [opened(image) for image in request.references()[0]]
            options["image"] = references or None
            large = any(image.width * image.height > LARGE for image in references)
            if large and request.per_image("reference_area")[0] == LARGE != options["height"] * options["width"]:
                # Where both sides are given, diffusers scales large references to their area.
                del options["height"], options["width"]
        elif self.plan.start_images:
            options |= {"strength": request.strength} | self._start()
        elif self.control is not None:
            options |= self._control(count)
        return options

    def _start(self) -> dict[str, Any]:
        """Start images and masks: the files themselves where diffusers cuts them as this engine does."""
        request, starts = self.plan.request, self.plan.start_images
        sources, masks = request.per_image("image"), request.per_image("mask_image")
        images = [opened(source) for source in sources]
        if not all(map(_fits, images, starts)):
            images = [(start.pixels + 1) / 2 for start in starts]
        if self.at_once and len(set(map(id, starts))) == 1:
            # Encoded once, and sampled once, for all.
            images, masks, starts = images[:1], masks[:1], starts[:1]
        if self.pipeline == "ZImageImg2ImgPipeline":
            return {"image": _batch(images)}
        paint = [opened(mask, "L") if mask is not None and request.extend is None else start.mask
                 for mask, start in zip(masks, starts, strict=True)]  # fmt: skip
        return {"image": _batch(images), "mask_image": _batch(paint)}

    def _control(self, count: int) -> dict[str, Any]:
        """The control image, and for inpainting its picture and mask."""
        assert self.control is not None
        given = [self.plan.request.controls_of(i)[0] for i in range(count)]
        options = {
            "control_image": _batch([opened(each.image) for each in given]),
            "controlnet_conditioning_scale": self.control.control.strength,
        }
        if given[0].inpaint is not None:
            options["image"] = _batch([opened(each.inpaint) for each in given])
            options["mask_image"] = _batch([opened(each.mask, "L") for each in given])
        return options

    def blend(self, vae: Any, scheduler: Any) -> Callable[[int, Tensor], Tensor]:
        """What puts latents back on their course after step i (from 1), in `differential`; elsewhere nothing does.

        The rule of diffusers' community pipeline: at step i of n what is to change in fewer than i of them is put back,
        noised to the level reached, but after the last.
        """
        request, starts, n = self.plan.request, self.plan.start_images, len(self.plan.sigmas) - 1
        if request.mask_mode != "differential" or not starts:
            return lambda i, x: x
        pixels = torch.stack([start.pixels for start in starts]).to(vae.device, vae.dtype)
        posterior = vae.encode(pixels).latent_dist
        latents = (posterior.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        noise = torch.stack([source(tuple(latents.shape[1:])) for source in sources(request)]).to(latents)
        masks = torch.stack([torch.ones(1, *start.pixels.shape[1:]) if start.mask is None else start.mask
                             for start in starts])  # fmt: skip
        white = F.interpolate(1 - masks, size=latents.shape[-2:]).to(latents)

        def blended(i: int, x: Tensor) -> Tensor:
            if i == n:
                return x
            level = scheduler.sigmas[-n - 1 + i]
            kept = (white > (i - 1) / n).to(x)
            return (level * noise + (1 - level) * latents) * kept + x * (1 - kept)

        return blended


def call_of(plan: Plan, config: ModelConfig, notes: list[str]) -> Call:
    """The call that draws a plan; raises RequestError where diffusers has none, and adds notes on what it is given."""
    request, omni = plan.request, config.transformer.siglip_feat_dim is not None
    for reason in refusals(plan, omni):
        raise RequestError(f"{reason}; {INSTEAD}")
    check_solver(request.solver)
    control = plan.controls[0] if plan.controls else None
    encoded: tuple[int, ...] = ()
    if omni:
        pipeline = "ZImageOmniPipeline"
        encoded = _firsts([reference.key for reference in plan.references[0]])
    elif plan.start_images:
        differential = request.mask_mode == "differential"
        masked = any(start.mask is not None for start in plan.start_images) and not differential
        pipeline = "ZImageInpaintPipeline" if masked else "ZImageImg2ImgPipeline"
        apart = request.posterior == "sample" and request.convention == "own"
        keys = range(request.count) if apart else map(id, plan.start_images)
        encoded = _firsts(list(keys))
        notes += ["maps of change: the rule of diffusers' community pipeline, restated here"] if differential else []
        notes += ["posterior mode: the reference's sample of the autoencoder's answer is replaced by its mode"] * (
            request.posterior == "mode"
        )
        notes += ["what composite lays over the picture is left out on both sides"] * masked
    elif control is not None:
        inpaints = control.control.inpaint is not None
        pipeline = "ZImageControlNetInpaintPipeline" if inpaints else "ZImageControlNetPipeline"
        # All control images first, then what is painted into.
        firsts = _firsts([tuple(map(id, pictures.values())) for pictures in control.pictures])
        encoded = tuple(place for i in firsts for place in ((i, request.count + i) if inpaints else (i,)))
        if control.control.rule != "diffusers" and control.config.version != "1.0":
            notes.append(
                "the authors' rule: the refiner's hints are added to diffusers' own stream, which leaves it out"
            )
    else:
        pipeline = "ZImagePipeline"
    return Call(pipeline, plan, control, encoded)


def refusals(plan: Plan, omni: bool) -> list[str]:
    """What of a plan diffusers cannot draw, a reason each."""
    request = plan.request
    one_size = len(set(plan.grids)) == 1
    controls = request.controls
    rows = request.references()
    area = {*request.per_image("reference_area")} - {None, LARGE}
    sides = request.per_image("height")[0] * request.per_image("width")[0]
    ours = ("guidance_interval", "guidance_method", "skip_layers", "variation", "region", "target_timestep", "cache")
    reasons = {
        f"{', '.join(name for name in ours if getattr(request, name) is not None)} given, which diffusers has not": any(
            getattr(request, name) is not None for name in ours
        ),
        "guidance_scale has several values, diffusers has one for all steps": len(as_list(request.guidance_scale)) > 1,
        "convention comfyui, which is not diffusers'": request.convention == "comfyui",
        "batch_place is given, a batch of diffusers is drawn whole": request.batch_place is not None,
        "several seeds in convention diffusers, where a call has one generator": request.convention == "diffusers"
        and len(set(request.seeds())) > 1,
        "upscale is two passes, each of which diffusers draws by itself": plan.then is not None,
        "prompt_embeds are given; needed prompts as text": bool(request.embeds),
        "the pictures have several sizes, a batch of diffusers has one": not one_size,
        "several ControlNets are given, diffusers' pipeline takes one": len(controls) > 1,
        "a control and a start image are given, for which diffusers has no pipeline": bool(
            controls and plan.start_images
        ),
        "a control acts in some steps only, which diffusers' pipeline cannot": any(
            (control.start, control.end) != (0, 1) for control in controls
        ),
        "a control has no image, which diffusers' pipeline needs": any(control.image is None for control in controls),
        "an Omni model with a start image or a ControlNet, for which diffusers has no pipeline": omni
        and bool(plan.start_images or controls),
        "latents are given with a start image, where diffusers leaves the image out": request.latents is not None
        and bool(plan.start_images),
        "mask_blur makes a gray mask, which diffusers cuts at one half": bool(request.mask_blur)
        and request.mask_mode == "inpaint",
        "the pictures have several lists of references, diffusers' pipeline takes one for all": any(
            row != rows[0] for row in rows
        ),
        "reference_area is given, diffusers scales to the picture's area or to 1024 × 1024": bool(area - {sides}),
        "reference_positions intended, where diffusers has the released code's": request.reference_positions
        == "intended",
        "heun with a start image, of whose steps diffusers counts others": request.solver == "heun"
        and bool(plan.start_images),
        "unipc begins at pure noise, where diffusers takes 1 - 1e-6 and corrects that step; needed levels that begin "
        "below 1, such as sigmas 0.99,0.8,0.5,0.2": request.solver == "unipc" and plan.sigmas[0] == 1,
    }
    return [reason for reason, holds in reasons.items() if holds]


def opened(source: Any, mode: str = "RGB") -> Any:
    """An image as a user of diffusers would give it: a path opened, anything else as it is."""
    if not isinstance(source, str) and not hasattr(source, "__fspath__"):
        return source
    with Image.open(source) as image:
        upright: Image.Image = ImageOps.exif_transpose(image)
        return upright.convert(mode)


def _fits(image: Any, start: Any) -> bool:
    """Whether diffusers would cut an image to the size that is drawn, as this engine does."""
    if isinstance(image, Image.Image):
        height, width = image.height, image.width
    else:
        height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    return (height // 16 * 16, width // 16 * 16) == tuple(start.pixels.shape[1:])


def _batch(images: list[Any]) -> Any:
    """Images as diffusers takes several: a list, or one tensor or array."""
    if isinstance(images[0], Tensor):
        return torch.stack(images)
    return np.stack(images) if isinstance(images[0], np.ndarray) else images


def _firsts(keys: list[Any]) -> tuple[int, ...]:
    """The place of the first of every distinct key."""
    return tuple(keys.index(key) for key in dict.fromkeys(keys))
