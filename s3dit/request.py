"""Request and Result: the one schema behind Python, the command line and replay.

A Request says what is wanted, in the names that diffusers' users know; None means "as this model is meant to be run"
and is replaced by `resolve`. Everything that can be wrong with a request without looking at weights is found by
`check`, before any heavy work, and raised as RequestError. Values are never changed in silence: 0.0 is a value, lists
given by the caller are copied and not written to.

Importing this module does not import torch, so that the command line's `--help` is quick.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from s3dit.control import IMAGES as CONTROL_IMAGES
from s3dit.control import Control

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from s3dit.config import ModelConfig

    # Whatever `images.Picture` opens.
    ImageSource = str | PathLike[str] | Image.Image | np.ndarray | torch.Tensor

Solver = Literal["euler", "heun", "dpmpp_2m", "euler_ancestral"]
Schedule = Literal["official", "simple", "beta", "karras", "exponential"]
OutputType = Literal["pil", "tensor", "latent"]
MaskMode = Literal["inpaint", "differential"]
Posterior = Literal["mode", "sample"]
Positions = Literal["released", "intended"]

# 512 patches of 16 pixels a side: what the published rotary tables were made for.
LARGEST_SIDE = 8192
# Fields that hold images; what goes into JSON of them is their paths.
IMAGES = ("image", "mask_image")


class RequestError(ValueError):
    """A request that cannot be served; the message says what was found, what was needed and what to do."""


def _says(text: str) -> Any:
    """Help text of a field, shown by the command line."""
    return {"help": text}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to draw. Sequences (prompts, sizes, seeds, images) give one picture an entry; a single value serves all.

    latents: the noise to start from; a start image is mixed with it. composite: lay the start image's own pixels over
    what a mask keeps.
    """

    prompt: str | Sequence[str] = field(metadata=_says("what to draw"))
    negative_prompt: str | Sequence[str] | None = field(
        default=None, metadata=_says("what to avoid; used when guidance is on (default: the empty prompt)")
    )
    height: int | Sequence[int] | None = field(
        default=None, metadata=_says("pixels, a multiple of 16 (default: 1024; 128 for the embedded model)")
    )
    width: int | Sequence[int] | None = field(
        default=None, metadata=_says("pixels, a multiple of 16 (default: 1024; 128 for the embedded model)")
    )
    num_inference_steps: int | None = field(
        default=None, metadata=_says("steps of the solver (default: Turbo 8, Z-Image 28)")
    )
    guidance_scale: float | None = field(
        default=None,
        metadata=_says("s in pos + s·(pos - neg), Z-Image's form; 0 is off (default: Turbo 0, Z-Image 4)"),
    )
    cfg: float | None = field(
        default=None, metadata=_says("guidance in the usual form neg + w·(pos - neg); w = guidance_scale + 1")
    )
    cfg_normalization: bool | float = field(
        default=False, metadata=_says("limit the guided velocity's norm to this multiple of the unguided one; 0 is off")
    )
    cfg_truncation: float = field(default=1.0, metadata=_says("no guidance once t (0 noise, 1 image) is above this"))
    num_images_per_prompt: int = field(default=1, metadata=_says("pictures a prompt; seeds count up"))
    seed: int | Sequence[int] | None = field(
        default=None, metadata=_says("seed of the first picture; the next ones take seed + 1, … (default: random)")
    )
    generator: "torch.Generator | Sequence[torch.Generator] | None" = None
    latents: "torch.Tensor | None" = None
    sigmas: Sequence[float] | None = field(
        default=None, metadata=_says("explicit noise levels, descending from 1, before the shift (use shift 1 for raw)")
    )
    shift: float | None = field(default=None, metadata=_says("shift of the schedule (default: the model's file)"))
    schedule: Schedule = field(default="official", metadata=_says("spacing of the noise levels"))
    solver: Solver = field(default="euler", metadata=_says("how the flow is integrated"))
    max_sequence_length: int = field(default=512, metadata=_says("tokens of the prompt that are read; the rest is cut"))
    image: "ImageSource | Sequence[ImageSource] | None" = field(
        default=None,
        metadata=_says("start image, to be redrawn; its size, cut to multiples of 16, is the default"),
    )
    mask_image: "ImageSource | Sequence[ImageSource | None] | None" = field(
        default=None, metadata=_says("mask of the start image's size: white is painted anew, black is kept")
    )
    strength: float | None = field(
        default=None,
        metadata=_says("how much of the start image is redrawn, up to 1 (default: 0.6; 1 with a mask or margins)"),
    )
    extend: Sequence[int] | None = field(
        default=None, metadata=_says("margins in pixels to paint around the start image: left,top,right,bottom")
    )
    mask_mode: MaskMode = field(
        default="inpaint",
        metadata=_says("inpaint cuts the mask at one half; differential reads gray as how much is to change"),
    )
    mask_blur: float = field(default=0.0, metadata=_says("soften the mask's edges by this many pixels"))
    composite: bool = True
    posterior: Posterior = field(
        default="mode",
        metadata=_says("start image in latents: mode is certain, sample is drawn from the seed as diffusers does"),
    )
    upscale: float | None = field(
        default=None, metadata=_says("draw a second pass, this many times as large, over the first one's picture")
    )
    upscale_strength: float | None = field(
        default=None, metadata=_says("how much the second pass redraws, up to 1 (default: 0.35)")
    )
    control: Control | Sequence[Control] | None = None
    reference: "ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]] | None" = field(
        default=None,
        metadata=_says(
            "picture for an Omni or Edit model to look at, once for each; the last one's size is the default"
        ),
    )
    reference_area: int | Sequence[int | None] | None = field(
        default=None,
        metadata=_says(
            "pixels that references of more than 1024 × 1024 are scaled to (default: height × width where both are "
            "given, else 1024 × 1024)"
        ),
    )
    reference_positions: Positions = field(
        default="released",
        metadata=_says("where captions between references stand: as in the released code, or as it was meant"),
    )
    output_type: OutputType = "pil"

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list of their own."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def count(self) -> int:
        """Pictures in all."""
        return len(self.prompts) * self.num_images_per_prompt

    @property
    def controls(self) -> list[Control]:
        """The controls as a list of their own."""
        return [] if self.control is None else [self.control] if isinstance(self.control, Control) else [*self.control]

    def controls_of(self, i: int) -> list[Control]:
        """The controls of picture i alone."""
        return [
            replace(one, **{name: self.spread(f"control {name}", getattr(one, name))[i] for name in CONTROL_IMAGES})
            for one in self.controls
        ]

    def per_image(self, name: str) -> list[Any]:
        """Spread a field over all pictures: one value for all, or one a prompt, or one a picture."""
        return self.spread(name, getattr(self, name))

    def references(self) -> list[list[Any]]:
        """Reference images of every picture: one list serves all; a list of lists has one a prompt, or one a picture.

        Raises RequestError.
        """
        given = self.reference
        several = given if isinstance(given, list | tuple) else [] if given is None else [given]
        lists = [one is None or isinstance(one, list | tuple) for one in several]
        if not any(lists):
            return [list(several) for _ in range(self.count)]
        if not all(lists):
            raise RequestError("reference mixes images and lists of images; needed one list, or a list for each prompt")
        return [list(one or ()) for one in self.spread("reference", several)]

    def spread(self, name: str, value: Any) -> list[Any]:
        """`per_image` of any value, which messages call `name`."""
        if value is None or isinstance(value, str) or not isinstance(value, Sequence):
            return [value] * self.count
        if len(value) == self.count:
            return list(value)
        if len(value) == len(self.prompts):
            return [item for item in value for _ in range(self.num_images_per_prompt)]
        raise RequestError(
            f"{name} has {len(value)} entries; needed 1, {len(self.prompts)} (a prompt each) or {self.count} "
            "(a picture each)"
        )

    def seeds(self) -> list[int]:
        """One seed a picture: seed, seed + 1, …"""
        if isinstance(self.seed, int):
            return [self.seed + i for i in range(self.count)]
        return self.per_image("seed")

    def resolve(self, config: "ModelConfig") -> Self:
        """Check, then put the model's own settings where the request says None; raises RequestError."""
        self.check()
        settings = config.settings
        guidance = self.cfg - 1.0 if self.cfg is not None else self.guidance_scale

        def size(name: str) -> int | Sequence[int]:
            value = getattr(self, name)
            if value is None and self.latents is not None:
                return int(self.latents.shape[-2 if name == "height" else -1]) * 8
            return getattr(settings, name) if value is None else value

        steps = self.num_inference_steps or settings.num_inference_steps
        if self.sigmas is not None:
            steps = len([s for s in self.sigmas if s > 0])
        masked = self.mask_image is not None or self.extend is not None
        dynamic_or_own = None if config.scheduler.use_dynamic_shifting else config.scheduler.shift
        strength = None if self.image is None else 1.0 if masked else 0.6
        resolved = replace(
            self,
            strength=strength if self.strength is None else float(self.strength),
            upscale_strength=0.35 if self.upscale and self.upscale_strength is None else self.upscale_strength,
            prompt=self.prompts,
            height=size("height"),
            width=size("width"),
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale if guidance is None else float(guidance),
            cfg=None,
            schedule=config.scheduler.schedule if self.schedule == "official" else self.schedule,
            # A shift that follows from the size stays None, so that a second pass and a replay find their own.
            shift=dynamic_or_own if self.shift is None else float(self.shift),
        )
        resolved._check_latents()
        return resolved

    def check(self) -> None:
        """Find what is wrong without any model; raises RequestError."""
        self._check_prompts()
        for name in ("height", "width"):
            for value in self.per_image(name):
                if value is not None:
                    _check_side(name, value)
        _check_int("num_inference_steps", self.num_inference_steps, 1, 1000)
        _check_int("num_images_per_prompt", self.num_images_per_prompt, 1, 1024)
        _check_int("max_sequence_length", self.max_sequence_length, 1, 32768)
        for seed in self.per_image("seed"):
            _check_int("seed", seed, -(2**63), 2**63 - 1)
        for name, low, high in (
            ("guidance_scale", 0.0, 1000.0), ("cfg", 1.0, 1001.0), ("cfg_normalization", 0.0, 1000.0),
            ("cfg_truncation", 0.0, 1000.0), ("shift", 1e-3, 1e3), ("strength", 0.0, 1.0),
            ("upscale_strength", 0.0, 1.0), ("upscale", 1.0, 8.0), ("mask_blur", 0.0, 512.0),
        ):  # fmt: skip
            _check_float(name, getattr(self, name), low, high)
        if self.cfg is not None and self.guidance_scale is not None:
            raise RequestError(
                "both cfg and guidance_scale are given; they are the same knob (cfg = guidance_scale + 1)"
            )
        for name, kind in (
            ("solver", Solver), ("schedule", Schedule), ("output_type", OutputType), ("mask_mode", MaskMode),
            ("posterior", Posterior), ("reference_positions", Positions),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(kind):
                raise RequestError(f"{name} is {getattr(self, name)!r}; needed one of {', '.join(get_args(kind))}")
        self._check_start()
        self._check_control()
        self._check_references()
        self._check_sigmas()

    def _check_prompts(self) -> None:
        given = self.prompt
        if isinstance(given, bytes) or not isinstance(given, str | Sequence):
            raise RequestError(f"prompt is a {type(given).__name__}; needed a string or a list of strings")
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            texts = [] if value is None else [value] if isinstance(value, str) else list(value)
            for text in texts:
                if not isinstance(text, str):
                    raise RequestError(f"{name} holds a {type(text).__name__}; needed strings")
        if not self.prompts:
            raise RequestError("prompt is an empty list; needed at least one prompt (an empty string is a prompt)")
        negatives = self.negative_prompt
        if not isinstance(negatives, str | None) and len(negatives) != len(self.prompts):
            raise RequestError(
                f"{len(negatives)} negative prompts for {len(self.prompts)} prompts; needed one, or one each"
            )

    def _check_start(self) -> None:
        """What belongs to a start image; the images themselves are read later, by `conditioning`."""
        if self.image is None:
            for name in ("strength", "mask_image", "extend"):
                if getattr(self, name) is not None:
                    raise RequestError(f"{name} is given without a start image; give image too, or leave {name} out")
        if self.mask_image is None and self.extend is None and (self.mask_blur or self.mask_mode != "inpaint"):
            raise RequestError("mask_blur and mask_mode are about a mask; give mask_image or extend, or leave them out")
        if self.upscale is None and self.upscale_strength is not None:
            raise RequestError("upscale_strength is given without upscale; needed both, such as 0.35 and 2")
        for name in ("strength", "upscale_strength"):
            if getattr(self, name) == 0:
                raise RequestError(f"{name} is 0, which would redraw nothing; needed more than 0, up to 1")
        if self.upscale == 1:
            raise RequestError("upscale is 1; needed more, such as 2, or none")
        for name in IMAGES:
            self.per_image(name)
        if self.extend is not None:
            margins = list(self.extend) if isinstance(self.extend, Sequence) else [self.extend]
            whole = all(isinstance(m, int) and not isinstance(m, bool) and 0 <= m < LARGEST_SIDE for m in margins)
            if len(margins) != 4 or not whole or not any(margins):
                raise RequestError(
                    f"extend is {self.extend!r}; needed four margins in pixels: left, top, right, bottom"
                )

    def _check_control(self) -> None:
        given = self.control
        known = isinstance(given, Control | list | tuple | None)
        if not known or not all(isinstance(one, Control) for one in self.controls):
            raise RequestError(f"control is {given!r:.80}; needed a Control, or a list of them")
        try:
            for one in self.controls:
                one.check()
        except ValueError as error:
            raise RequestError(str(error)) from None
        self.controls_of(0)

    def _check_references(self) -> None:
        """What belongs to reference images; the images themselves are read later, by `references`."""
        for area in self.per_image("reference_area"):
            _check_int("reference_area", area, 64 * 64, LARGEST_SIDE**2)
        if any(self.references()):
            return
        if self.reference_area is not None or self.reference_positions != "released":
            raise RequestError(
                "reference_area and reference_positions are about references; give reference, or leave them out"
            )

    def _check_sigmas(self) -> None:
        if self.sigmas is None:
            return
        values = list(self.sigmas)
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise RequestError("sigmas holds something else than numbers; needed floats between 0 and 1")
        descending = all(a > b for a, b in zip(values, values[1:], strict=False))
        if not values or not descending or not 0 < values[0] <= 1 or values[-1] < 0:
            raise RequestError(
                f"sigmas is {values[:8]}; needed a descending list that starts at 1 or below and stays at 0 or above"
            )
        steps = len([v for v in values if v > 0])
        if self.num_inference_steps not in (None, steps):
            raise RequestError(
                f"{steps} sigmas but num_inference_steps {self.num_inference_steps}; leave one of them out"
            )

    def _check_latents(self) -> None:
        if self.latents is None:
            return
        sizes = set(zip(self.per_image("height"), self.per_image("width"), strict=True))
        if len(sizes) > 1:
            raise RequestError("latents is one tensor but the pictures have several sizes; needed one size")
        height, width = sizes.pop()
        found, needed = tuple(self.latents.shape), (self.count, 16, height // 8, width // 8)
        if found != needed:
            raise RequestError(
                f"latents has shape {found}; needed {needed} for {self.count} pictures of {width}×{height}"
            )
        if not self.latents.isfinite().all():
            raise RequestError("latents holds NaN or infinity; needed the starting noise, finite numbers")

    def to_json(self) -> dict[str, Any]:
        """The replayable fields as plain JSON values; tensors and generators are left out, files are named."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {k: v for k, v in values.items() if k not in ("generator", "latents", "output_type") and v is not None}
        values = {k: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in values.items()}
        values |= {"control": [one.to_json() for one in self.controls]} if self.controls else {}
        for name in {*IMAGES, "reference"} & set(values):
            values[name] = _paths(values[name])
            if values[name] is None:
                del values[name]
        return values

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read back `to_json`; RequestError on unknown or missing keys."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise RequestError(f"replay data has unknown keys {', '.join(unknown)}; it was written by another version")
        if "prompt" not in data:
            raise RequestError("replay data has no prompt; needed the JSON that this program writes")
        try:
            controls = {"control": [Control.from_json(one) for one in data["control"]]} if data.get("control") else {}
        except (ValueError, TypeError) as error:
            raise RequestError(str(error)) from None
        return cls(**data | controls)


def _paths(given: Any) -> Any:
    """Paths of image files as JSON has them, in lists like theirs; None where one is no file."""
    if isinstance(given, str | PathLike):
        return str(given)
    if not isinstance(given, list | tuple):
        return None
    paths = [_paths(one) for one in given]
    return None if None in paths else paths


def _check_side(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {value!r}; needed an integer, a multiple of 16")
    if not 0 < value <= LARGEST_SIDE:
        raise RequestError(
            f"{name} is {value}; needed 16 to {LARGEST_SIDE} pixels (the model is at home in 512 to 2048)"
        )
    if value % 16:
        low = max(16, value // 16 * 16)
        near = f"{low} or {low + 16}" if low < value else f"{low}"
        raise RequestError(f"{name} is {value}, not a multiple of 16; the nearest that work are {near}")


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; needed an integer from {low} to {high}")


def _check_float(name: str, value: Any, low: float, high: float) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or math.isnan(value) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; needed a number from {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class Result:
    """What came out: pictures (PIL, or a list of tensors (3, H, W) in [-1, 1]), latents, and how to repeat each.

    latents: a list of fp32 (16, H/8, W/8), as the VAE takes them · metadata: one dict a picture, JSON values only.
    """

    images: "list[Image.Image] | list[torch.Tensor]"
    latents: "list[torch.Tensor]"
    metadata: list[dict[str, Any]]
