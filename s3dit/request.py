"""Request: the one schema behind Python, the command line and replay.

A Request says what is wanted, in the names that diffusers' users know; None means "as this model is meant to be run"
and is replaced by the plan. Everything that can be wrong with a request without looking at weights or files is found
when it is made, and raised as RequestError: first each field by itself, by its kind (`values`), then what does not go
together. What the engine fills in later (`filled`) is not checked again. The command line's options and their help are
made from the same fields. Values are never changed in silence: 0.0 is a value, lists given by the caller are copied
and not written to.

Importing this module does not import torch, so that the command line's `--help` is quick.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self

from s3dit import guidance_options, values
from s3dit.cache import Cache
from s3dit.control import IMAGES as CONTROL_IMAGES
from s3dit.control import Control, shown
from s3dit.errors import RequestError
from s3dit.region import HEAVIEST, Region
from s3dit.values import LARGEST_SIDE, MOST_PICTURES, MOST_PIXELS, MOST_REFERENCES, Kind, one_by_one

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    # Whatever `images.Picture` opens.
    ImageSource = str | PathLike[str] | Image.Image | np.ndarray | torch.Tensor
    # Features of prompts: (tokens, width), a list of them, a batch, or a padded batch and the lengths in it.
    Embeds = torch.Tensor | Sequence[torch.Tensor] | tuple[torch.Tensor, Sequence[int] | torch.Tensor]

Solver = Literal[
    "euler", "heun", "dpmpp_2m", "euler_ancestral", "res_multistep", "res_multistep_ancestral", "res_2s",
    "dpmpp_2m_sde", "er_sde", "unipc", "lcm",
]  # fmt: skip
Schedule = Literal[
    "official", "simple", "beta", "karras", "exponential", "sgm_uniform", "kl_optimal", "linear_quadratic",
    "bong_tangent", "twinflow",
]  # fmt: skip
Convention = Literal["own", "diffusers", "comfyui"]
Preset = Literal["comfyui-turbo", "comfyui-base", "comfyui-2k", "diffusers", "official"]
TargetTimestep = Literal["end", "next", "none"]
OutputType = Literal["pil", "tensor", "latent"]
MaskMode = Literal["inpaint", "differential"]
Posterior = Literal["mode", "sample"]
Positions = Literal["released", "intended"]

LARGEST_SEED = 2**63 - 1
# Fields that hold images; what goes into JSON of them is their paths.
IMAGES = ("image", "mask_image")
# Fields that JSON does not say.
UNNAMED = ("generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type")


# Groups of options, as --help shows them.
PROMPT, SAMPLING, GUIDANCE = "prompt and size", "sampling", "guidance"
START, STEERING = "start image", "control and references"


class Default(str):
    """A default that can be told from the same word given, by its type."""


def _field(
    default: Any,
    kind: Kind,
    *bounds: Any,
    each: bool = False,
    holes: bool = False,
    group: str = "",
    flag: str = "",
    says: str = "",
) -> Any:
    """A field of a Request: its default, which values it takes besides a default of None, its option and help text.

    each: it may hold one value a prompt or picture · holes: of which some may be None · group: of options, under which
    the command line's help shows it; without one it has no option · flag: a shorter spelling of the option, beside the
    field's own name.
    """
    shape = {"kind": kind, "bounds": bounds, "each": each, "holes": holes}
    return field(default=default, metadata=shape | {"group": group, "flag": flag, "help": says})


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to draw. Sequences (prompts, sizes, seeds, images) give one picture an entry; a single value serves all.

    Checked when it is made; raises RequestError. One rule for all lists: they have one entry a prompt, or one a
    picture; where seeds have one a prompt (or one in all), they count up over the pictures that share it. Numbers may
    be numpy's or torch's.

    latents: the noise to start from, (pictures, 16, H/8, W/8) or a list of (16, H/8, W/8), such as a result's; a start
    image is mixed with it · prompt_embeds, negative_prompt_embeds: features instead of a prompt, as `Pipeline.encode`
    gives them: (tokens, 2560), a list of such, or a padded batch with its lengths, (batch, lengths).
    """

    prompt: str | Sequence[str] | None = _field(
        None, values.TEXT, group=PROMPT,
        says="what to draw (default: the model's example)",
    )  # fmt: skip
    negative_prompt: str | Sequence[str] | None = _field(
        None, values.TEXT, group=PROMPT,
        says="what to avoid; used when guidance is on (default: the empty prompt)",
    )  # fmt: skip
    height: int | Sequence[int] | None = _field(
        None, values.SIDE, each=True, holes=True, group=PROMPT,
        says="pixels, a multiple of 16 (default: 1024; 128 for the embedded model)",
    )  # fmt: skip
    width: int | Sequence[int] | None = _field(
        None, values.SIDE, each=True, holes=True, group=PROMPT,
        says="pixels, a multiple of 16 (default: 1024; 128 for the embedded model)",
    )  # fmt: skip
    preset: Preset | None = _field(
        None, values.CHOICE, Preset, group=SAMPLING,
        says="the settings and conventions of another program; whatever you give takes their place",
    )  # fmt: skip
    num_inference_steps: int | None = _field(
        None, values.INTEGER, 1, values.MOST_STEPS, group=SAMPLING, flag="--steps",
        says="steps of the solver (default: Turbo 8, Z-Image 28)",
    )  # fmt: skip
    guidance_scale: float | Sequence[float] | None = _field(
        None, values.SCALES, 0, 1000, group=GUIDANCE, flag="--guidance",
        says="s in pos + s·(pos - neg), Z-Image's form; 0 is off (default: Turbo 0, Z-Image 4); of several, the first "
        "step takes the first, the last the last, and steps between them lie on straight lines",
    )  # fmt: skip
    cfg: float | Sequence[float] | None = _field(
        None, values.SCALES, 1, 1001, group=GUIDANCE,
        says="guidance in the usual form neg + w·(pos - neg); w = guidance_scale + 1",
    )  # fmt: skip
    cfg_normalization: bool | float = _field(
        False, values.LIMIT, 0, 1000, group=GUIDANCE,
        says="limit the guided velocity's norm to this multiple of the unguided one; 0 is off",
    )  # fmt: skip
    cfg_truncation: float = _field(
        1.0, values.NUMBER, 0, 1000, group=GUIDANCE,
        says="no guidance once t (0 noise, 1 image) is above this",
    )  # fmt: skip
    guidance_interval: Sequence[float] | None = _field(
        None, values.INTERVAL, group=GUIDANCE,
        says="guidance only where t (0 noise, 1 image) is from A to B (default: everywhere)",
    )  # fmt: skip
    guidance_method: str | None = _field(
        None, guidance_options.METHOD, group=GUIDANCE,
        says="plain (default), apg[:eta=0,momentum=-0.5,norm_threshold=0] or cfg_zero[:zero_init_steps=1]",
    )  # fmt: skip
    skip_layers: str | None = _field(
        None, guidance_options.SKIPPED, group=GUIDANCE,
        says="also SCALE·(pos - pos without these main layers), where t is from A to B; needs no guidance_scale",
    )  # fmt: skip
    variation: float | str | Sequence[float | str] | None = _field(
        None, guidance_options.VARIED, each=True, group=PROMPT,
        says="noise on the prompt's features, X times their norm, for pictures that differ more (default seed: the "
        "picture's); seeds count up",
    )  # fmt: skip
    num_images_per_prompt: int = _field(
        1, values.INTEGER, 1, MOST_PICTURES, group=PROMPT, flag="--count",
        says="pictures a prompt; seeds count up",
    )  # fmt: skip
    seed: int | Sequence[int] | None = _field(
        None, values.INTEGER, -(2**63), LARGEST_SEED, each=True, group=PROMPT,
        says="seed of the first picture; the next ones take seed + 1, … (default: random)",
    )  # fmt: skip
    generator: "torch.Generator | Sequence[torch.Generator] | None" = _field(
        None, values.GENERATORS,
        says="instead of a seed: one for all pictures in their order, or one a picture",
    )  # fmt: skip
    latents: "torch.Tensor | Sequence[torch.Tensor] | None" = _field(
        None, values.LATENTS,
        says="the noise to start from: (pictures, 16, H/8, W/8), or a list of (16, H/8, W/8)",
    )  # fmt: skip
    prompt_embeds: "Embeds | None" = _field(
        None, values.EMBEDS,
        says="features instead of a prompt: (tokens, width), a list of them, or (padded batch, lengths)",
    )  # fmt: skip
    negative_prompt_embeds: "Embeds | None" = _field(
        None, values.EMBEDS, says="the same instead of a negative prompt"
    )  # fmt: skip
    sigmas: Sequence[float] | None = _field(
        None, values.SIGMAS, group=SAMPLING,
        says="explicit noise levels, such as 1,0.75,0.4, before the shift (use shift 1 for raw)",
    )  # fmt: skip
    shift: float | None = _field(
        None, values.NUMBER, 1e-3, 1e3, group=SAMPLING,
        says="shift of the schedule (default: the model's file)",
    )  # fmt: skip
    schedule: Schedule = _field(
        Default("official"), values.CHOICE, Schedule, group=SAMPLING, says="spacing of the noise levels"
    )
    solver: Solver = _field(
        Default("euler"), values.CHOICE, Solver, group=SAMPLING, says="how the flow is integrated; TwinFlow by lcm"
    )
    target_timestep: TargetTimestep | None = _field(
        None, values.CHOICE, TargetTimestep, group=SAMPLING,
        says="what a step of a TwinFlow model aims at: the end (its few-step style, the default), the next noise "
        "level, or none, which draws as the model that it was made of",
    )  # fmt: skip
    convention: Convention = _field(
        Default("own"), values.CHOICE, Convention, group=SAMPLING,
        says="what names and seeds mean: as documented here, or as there where that is something else",
    )  # fmt: skip
    batch_place: Sequence[int] | None = _field(
        None, values.PLACE, group=SAMPLING,
        says="draw the pictures from this place on, from 0, of a batch of so many (conventions but own)",
    )  # fmt: skip
    cache: Cache | str | None = _field(
        None, values.CACHE, group=SAMPLING,
        says="spare model calls where first-block, modulation, magnitude or taylor says that little changes",
    )  # fmt: skip
    max_sequence_length: int = _field(
        512, values.INTEGER, 1, values.MOST_TOKENS, group=PROMPT,
        says="tokens of the prompt that are read; the rest is cut",
    )  # fmt: skip
    image: "ImageSource | Sequence[ImageSource] | None" = _field(
        None, values.IMAGE, each=True, group=START,
        says="start image, to be redrawn; its size, cut to multiples of 16, is the default",
    )  # fmt: skip
    mask_image: "ImageSource | Sequence[ImageSource | None] | None" = _field(
        None, values.IMAGE, each=True, holes=True, group=START, flag="--mask",
        says="mask of the start image's size: white is painted anew, black is kept",
    )  # fmt: skip
    strength: float | None = _field(
        None, values.NUMBER, 0, 1, group=START,
        says="how much of the start image is redrawn, up to 1 (default: 0.6; 1 with a mask or margins)",
    )  # fmt: skip
    extend: Sequence[int] | None = _field(
        None, values.MARGINS, group=START,
        says="margins in pixels to paint around the start image: left,top,right,bottom",
    )  # fmt: skip
    mask_mode: MaskMode = _field(
        "inpaint", values.CHOICE, MaskMode, group=START,
        says="inpaint cuts the mask at one half; differential reads gray as how much is to change",
    )  # fmt: skip
    mask_blur: float = _field(
        0.0, values.NUMBER, 0, 512, group=START,
        says="soften the mask's edges by this many pixels",
    )  # fmt: skip
    composite: bool | None = _field(
        None, values.SWITCH, group=START,
        says="lay the start image's own pixels over what the mask keeps (default: yes; preset diffusers: no)",
    )  # fmt: skip
    posterior: Posterior = _field(
        Default("mode"), values.CHOICE, Posterior, group=START,
        says="start image in latents: mode is certain, sample is drawn from the seed as diffusers does",
    )  # fmt: skip
    upscale: float | None = _field(
        None, values.NUMBER, 1, 8, group=START,
        says="draw a second pass, this many times as large, over the first one's picture",
    )  # fmt: skip
    upscale_strength: float | None = _field(
        None, values.NUMBER, 0, 1, group=START,
        says="how much the second pass redraws, up to 1 (default: 0.35)",
    )  # fmt: skip
    control: Control | Sequence[Control] | None = _field(
        None, values.CONTROLS, group=STEERING,
        says="steer with a ControlNet and a control image; may be repeated",
    )  # fmt: skip
    reference: "ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]] | None" = _field(
        None, values.REFERENCES, group=STEERING,
        says="picture for an Omni or Edit model to look at, once for each; the last one's size is the default",
    )  # fmt: skip
    reference_area: int | Sequence[int | None] | None = _field(
        None, values.INTEGER, 64 * 64, LARGEST_SIDE**2, each=True, holes=True, group=STEERING,
        says="pixels that references of more than 1024 × 1024 are scaled to (default: height × width where both "
        "are given, else 1024 × 1024)",
    )  # fmt: skip
    reference_positions: Positions = _field(
        "released", values.CHOICE, Positions, group=STEERING,
        says="where captions between references stand: as in the released code, or as it was meant",
    )  # fmt: skip
    region: "Region | Sequence[Region] | Sequence[Sequence[Region] | None] | None" = _field(
        None, values.REGIONS, group=STEERING,
        says="a prompt for a part of the picture, and the mask that says which; once for each",
    )  # fmt: skip
    base_weight: float = _field(
        0.0, values.NUMBER, 0, HEAVIEST, group=STEERING,
        says="weight of the prompt inside regions, against theirs of 1; where none is it holds alone",
    )  # fmt: skip
    output_type: OutputType = _field(
        "pil", Kind(values.choice), OutputType,
        says="pictures as Pillow's, as tensors (3, H, W) in [-1, 1], or latents alone",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Bring values into one form: lists of batches, Python's numbers, features by prompt; and check them."""
        for name in (*IMAGES, "reference"):
            object.__setattr__(self, name, one_by_one(getattr(self, name)))
        object.__setattr__(self, "latents", values.latents_of(self.latents))
        object.__setattr__(self, "cache", values.cache_of(self.cache))
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.metadata["kind"] in (*values.NUMERIC, guidance_options.VARIED):
                object.__setattr__(self, spec.name, values.plain(value))
            elif spec.metadata["kind"] is values.EMBEDS and value is not None:
                object.__setattr__(self, spec.name, values.embeds_of(spec.name, value))
        self.check()

    @classmethod
    def of(cls, request: "Request | str | Sequence[str] | None" = None, **wanted: Any) -> "Request":
        """A request from what a call was given: a request, or a prompt and fields; raises RequestError.

        A field that there is not is named with the nearest one that there is. compat is another word for preset.
        """
        if isinstance(request, Request):
            if wanted:
                raise RequestError(
                    f"a Request and {', '.join(wanted)} are given; needed one of them; change a request with "
                    "dataclasses.replace"
                )
            return request
        if "compat" in wanted and "preset" not in wanted:
            wanted["preset"] = wanted.pop("compat")
        # As the command line calls them, too: steps for num_inference_steps.
        known = {spec.metadata["flag"].strip("-").replace("-", "_"): spec.name for spec in fields(cls)}
        known |= {spec.name: spec.name for spec in fields(cls)} | {"compat": "preset"}
        for name in wanted:
            if name not in cls.__dataclass_fields__:
                near = [name] if name in known else get_close_matches(name, known, 1)
                hint = f"did you mean {known[near[0]]}?" if near else f"there are {', '.join(cls.__dataclass_fields__)}"
                raise RequestError(f"a request has no field {shown(name)}; {hint}")
        if request is not None:
            if "prompt" in wanted:
                raise RequestError("the prompt is given twice; needed it first, or as prompt=")
            wanted["prompt"] = request
        return cls(**wanted)

    def filled(self, **decided: Any) -> Self:
        """A copy with values that are not the user's: what the model or the inputs decide. They are not checked."""
        copy = object.__new__(type(self))
        for spec in fields(self):
            value = decided[spec.name] if spec.name in decided else getattr(self, spec.name)
            object.__setattr__(copy, spec.name, value)
        return copy

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list of their own; empty ones where they are given as features."""
        if self.prompt is None:
            return [""] * max(1, len(self.embeds))
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def embeds(self) -> "list[torch.Tensor]":
        """The features of the prompts, (tokens, width) each; none where the prompts are text."""
        given: Any = self.prompt_embeds
        return [] if given is None else list(given) if isinstance(given, tuple) else [given]

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
        controls = []
        for control in self.controls:
            images = {name: self.spread(f"control {name}", getattr(control, name))[i] for name in CONTROL_IMAGES}
            controls.append(replace(control, **images))
        return controls

    def per_image(self, name: str) -> list[Any]:
        """Spread a field over all pictures: one value for all, or one a prompt, or one a picture."""
        return self.spread(name, getattr(self, name))

    def references(self) -> list[list[Any]]:
        """Reference images of every picture: one list serves all; a list of lists has one a prompt, or one a picture.

        Raises RequestError.
        """
        return self._lists("reference", "images")

    def regions(self) -> list[list[Region]]:
        """Regions of every picture, spread like references. Raises RequestError."""
        return self._lists("region", "Regions")

    def _lists(self, name: str, what: str) -> list[list[Any]]:
        """The values of a field of every picture: one list for all, or a list for each."""
        given = getattr(self, name)
        several = given if isinstance(given, list | tuple) else [] if given is None else [given]
        lists = [entry is None or isinstance(entry, list | tuple) for entry in several]
        if not any(lists):
            return [list(several) for _ in range(self.count)]
        if not all(lists):
            raise RequestError(f"{name} mixes {what} and lists of {what}; needed one list, or a list for each prompt")
        return [list(entry or ()) for entry in self.spread(name, several)]

    def spread(self, name: str, value: Any) -> list[Any]:
        """`per_image` of any value, which messages call `name`."""
        if not values.several(value):
            return [value] * self.count
        if len(value) == self.count:
            return list(value)
        if len(value) == 1:
            return list(value) * self.count
        if len(value) == len(self.prompts):
            return [item for item in value for _ in range(self.num_images_per_prompt)]
        prompts, pictures = len(self.prompts), self.count
        each = [f"{prompts} (a prompt each)"] if prompts > 1 else []
        each += [f"{pictures} (a picture each)"] if pictures > prompts else []
        raise RequestError(f"{name} has {len(value)} entries; needed {' or '.join(['1', *each])}")

    def seeds(self) -> list[int]:
        """One seed a picture: as given, or (convention own) counted up over the pictures that share a seed."""
        given, count = values.as_list(self.seed), self.count
        each = count // len(given) if len(given) in (1, len(self.prompts)) else 1
        if len(given) * each != count:
            self.spread("seed", given)
        return [seed + i * (self.convention == "own") for seed in given for i in range(each)]

    @property
    def from_data(self) -> bool:
        """Whether a seed and files say all: no noise, features or generators that only Python has."""
        return all(getattr(self, name) is None for name in UNNAMED if name != "output_type")

    def check(self) -> None:
        """Find what is wrong without any model; raises RequestError."""
        self._check_count()
        for spec in fields(self):
            value, kind, bounds = getattr(self, spec.name), spec.metadata["kind"], spec.metadata["bounds"]
            if value is None and spec.default is None:
                continue
            for item in self.spread(spec.name, value) if spec.metadata["each"] else [value]:
                if item is not None or not spec.metadata["holes"]:
                    kind.check(spec.name, item, *bounds)
        if self.seed is not None:
            values.integer("seed of the last picture", max(self.seeds()), -(2**63), LARGEST_SEED)
        if self.seed is not None and self.generator is not None:
            raise RequestError("both seed and generator are given; needed one source of noise; leave one of them out")
        if self.cfg is not None and self.guidance_scale is not None:
            raise RequestError(
                "both cfg and guidance_scale are given; they are the same knob (cfg = guidance_scale + 1)"
            )
        if self.latents is not None and len(self.latents) != self.count:
            raise RequestError(f"latents has {len(self.latents)} entries; needed {self.count}, one a picture")
        self._check_embeds()
        self.check_pixels()
        self._check_start()
        self._check_control()
        self._check_references()
        if not any(self.regions()) and self.base_weight:
            raise RequestError("base_weight is given without region; it weighs the prompt against theirs; give both")
        self._check_steps()

    def _check_count(self) -> None:
        """How many pictures there are, before anything is spread over them."""
        if self.prompt is not None:
            values.texts("prompt", self.prompt)
        values.integer("num_images_per_prompt", self.num_images_per_prompt, 1, MOST_PICTURES)
        if self.count > MOST_PICTURES:
            raise RequestError(
                f"{len(self.prompts)} prompts and num_images_per_prompt {self.num_images_per_prompt} are "
                f"{self.count:,} pictures; needed at most {MOST_PICTURES}; draw fewer at once (--count)"
            )

    def _check_embeds(self) -> None:
        for text, features in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
            if getattr(self, features) is not None and getattr(self, text) is not None:
                raise RequestError(f"both {text} and {features} are given; needed one of them")
        for name in ("negative_prompt", "negative_prompt_embeds"):
            self.per_image(name)
        if self.reference is not None and (self.embeds or self.negative_prompt_embeds is not None):
            raise RequestError(
                "reference is given with prompt_embeds; needed prompts as text, which are cut around the references"
            )

    def check_embeds(self, width: int) -> None:
        """Hold features of prompts to the model's width; raises RequestError."""
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            for features in self.per_image(name):
                if features is not None and features.shape[1] != width:
                    raise RequestError(
                        f"{name} has features of {features.shape[1]} numbers; needed {width} for this model, as its "
                        "pipe.encode gives them"
                    )

    def check_pixels(self) -> None:
        """Pixels of all pictures together, as far as their sizes are known."""
        sides = zip(self.per_image("height"), self.per_image("width"), strict=True)
        area = sum((height or 0) * (width or 0) for height, width in sides) * (self.upscale or 1) ** 2
        if area > MOST_PIXELS:
            raise RequestError(
                f"{self.count} pictures have {area:,.0f} pixels in all; needed at most {MOST_PIXELS:,}, since they are "
                "drawn together; draw fewer at once (prompts, or num_images_per_prompt), or smaller ones"
            )

    def _check_start(self) -> None:
        """What belongs to a start image; the images themselves are read later, by `inputs.start_image`."""
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

    def _check_control(self) -> None:
        for control in self.controls:
            for name in CONTROL_IMAGES:
                for image in self.spread(f"control {name}", getattr(control, name)):
                    if image is not None:
                        values.image(f"control {name}", image)

    def _check_references(self) -> None:
        """What belongs to reference images; the images themselves are read later, by `inputs.references`."""
        pictures = self.references()
        if (most := max(map(len, pictures))) > MOST_REFERENCES:
            raise RequestError(f"a picture has {most} references; needed at most {MOST_REFERENCES}; leave some out")
        if not any(pictures) and (self.reference_area is not None or self.reference_positions != "released"):
            raise RequestError(
                "reference_area and reference_positions are about references; give reference, or leave them out"
            )

    def _check_steps(self) -> None:
        steps = len([level for level in self.sigmas or () if level > 0])
        if self.sigmas is not None and self.num_inference_steps not in (None, steps):
            raise RequestError(
                f"{steps} sigmas but num_inference_steps {self.num_inference_steps}; leave one of them out"
            )

    def check_latents(self) -> None:
        """Hold latents to the number and sizes of the pictures; raises RequestError."""
        if self.latents is None:
            return
        sizes = zip(self.per_image("height"), self.per_image("width"), strict=True)
        for latent, (height, width) in zip(self.latents, sizes, strict=True):
            if tuple(latent.shape) != (needed := (16, height // 8, width // 8)):
                raise RequestError(
                    f"latents has shape {tuple(latent.shape)} a picture; needed {needed} for one of {width}×{height}"
                )

    def to_json(self) -> dict[str, Any]:
        """The replayable fields as plain JSON values; tensors and generators are left out, files are named."""
        replayable = (spec for spec in fields(self) if spec.name not in UNNAMED)
        data = {spec.name: spec.metadata["kind"].to_json(getattr(self, spec.name)) for spec in replayable}
        return {name: value for name, value in data.items() if value is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read back `to_json`; RequestError on unknown or missing keys, and where an image is no path.

        Drawing it opens the files that it names: what a stranger wrote goes through `cli.replay`.
        """
        kinds = {spec.name: spec.metadata["kind"] for spec in fields(cls) if spec.name not in UNNAMED}
        if unknown := sorted(set(data) - {*kinds}):
            raise RequestError(f"replay data has unknown keys {shown(unknown[:8])}; it was written by another version")
        if data.get("prompt") is None:
            raise RequestError("replay data has no prompt; needed the JSON that this program writes")
        try:
            return cls(**{name: kinds[name].from_json(name, value) for name, value in data.items()})
        except ValueError as error:
            raise RequestError(str(error)) from None
