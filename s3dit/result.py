"""What a call gives back: pictures that remember what drew them, latents, and a record of each.

A record is a request that draws its picture again alone, and what drew it; `save` writes it into the file, and so does
the `save` of each picture.
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from s3dit import __version__
from s3dit.errors import RequestError
from s3dit.files import ENDINGS
from s3dit.inputs import control_hints, region_masks
from s3dit.inputs.image_metadata import carried
from s3dit.inputs.images import to_pil
from s3dit.inputs.noise import places
from s3dit.inputs.save_image import save_picture
from s3dit.inputs.variation import variations
from s3dit.kernels.dispatch import backend
from s3dit.loaded_model import LoadedModel
from s3dit.plan import Plan
from s3dit.request import IMAGES


class DrawnImage(Image.Image):
    """A Pillow image whose `save` writes what drew it into a PNG, JPEG or WebP file, as `s3dit generate` does.

    metadata: what is written; a copy of its own, which goes along when the picture is copied or pickled. What `resize`,
    `crop` and the like give back is another picture, without it. Pillow's other formats have no place for it. Whoever
    paints over the picture should drop it: `metadata = None`.
    """

    metadata: Mapping[str, Any] | None = None

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Pillow's `save`, with the metadata where the caller gives none; RequestError where it does not fit."""
        place = getattr(fp, "name", fp)
        name = os.fsdecode(place) if isinstance(place, str | bytes | os.PathLike) else ""
        form = (format or ENDINGS.get(Path(name).suffix.lower(), "")).upper()
        form = {"JPG": "JPEG"}.get(form, form)
        if form in ENDINGS.values() and not {"pnginfo", "exif"} & set(params):
            params |= carried(self.metadata, self.size, form)
        super().save(fp, format, **params)

    def copy(self) -> "DrawnImage":
        """A copy that carries the same metadata."""
        return with_metadata(super().copy(), self.metadata)

    __copy__ = copy

    def __getstate__(self) -> list[Any]:
        return [*super().__getstate__(), self.metadata]

    def __setstate__(self, state: list[Any]) -> None:
        *image, self.metadata = state
        super().__setstate__(image)


def with_metadata(image: Image.Image, metadata: Mapping[str, Any] | None) -> DrawnImage:
    """The same image as a DrawnImage, with a copy of the metadata."""
    drawn = DrawnImage()
    vars(drawn).update(vars(image))
    drawn.metadata = deepcopy(metadata)
    return drawn


@dataclass(frozen=True, slots=True)
class Result:
    """What came out: pictures (PIL, or a list of tensors (3, H, W) in [-1, 1]), latents, and how to repeat each.

    latents: a list of fp32 (16, H/8, W/8), as the VAE takes them · metadata: one dict a picture, JSON values only ·
    seconds: of each stage, the loading of parts apart ("load transformer"). They stand here and not in the metadata,
    which are the same, and so are the files, whenever the same is drawn.
    """

    images: list[Any]
    latents: list[torch.Tensor]
    metadata: list[dict[str, Any]]
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> list[Path]:
        """Write every picture with its metadata and return the files; those that exist are replaced.

        path: of a .png, .jpg or .webp; several pictures get -1, -2, … before the suffix. Raises RequestError where
        there are latents alone, and where the place cannot be written.
        """
        if not self.images:
            raise RequestError("there are latents and no pictures; needed output_type pil or tensor; see pipe.decode")
        if not isinstance(path, str | Path):
            raise RequestError(f"path is a {type(path).__name__}; needed a file name; images[0].save takes more")
        path, n = Path(path), len(self.images)
        paths = [path] if n == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(1, n + 1)]
        for image, where, metadata in zip(self.images, paths, self.metadata, strict=True):
            picture = to_pil(image[None])[0] if isinstance(image, torch.Tensor) else image
            save_picture(picture, where, metadata)
        return paths


def engine_of(model: LoadedModel) -> dict[str, Any]:
    """What is true of whatever a model draws: versions, machine, number formats."""
    return {
        "s3dit": __version__,
        "torch": torch.__version__,
        "variant": model.config.variant,
        "placement": str(model.placement),
        "numerics": model.numerics,
        "backend": model.backend or backend(),
        "compiled": model.parts.compiled,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "mixed": {part: model.parts.checkpoints[part].path.name for part in model.sources.mixed},
        "quantized": {part: name for part, name in model.parts.formats.items() if name},
        **({} if model.parts.ranks.size == 1 else {"parallel": str(model.parts.ranks.form)}),
    }


def records(plan: Plan, engine: dict[str, Any], beside: dict[str, Any]) -> list[dict[str, Any]]:
    """For each picture of a plan, a request that draws it alone, and what drew it.

    engine: what is true of the pipeline · beside: what stands beside the request in each record.
    """
    request = plan.request
    engine = {**engine, "levels": list(plan.sigmas), "model_calls": plan.calls}
    shared = request.filled(
        num_images_per_prompt=1, generator=None, latents=None, prompt_embeds=None, negative_prompt_embeds=None
    )
    names = ("prompt", "negative_prompt", "height", "width", *IMAGES, "reference_area")
    columns = [request.per_image(name) for name in names]
    varied = variations(request)
    made = []
    for i, (seed, place, *values) in enumerate(zip(request.seeds(), places(request), *columns, strict=True)):
        own = dict(zip(names, values, strict=True)) | {"reference": request.references()[i] or None}
        own["variation"] = str(varied[i]) if varied[i].strength else None
        if own["reference"] is None:
            own["reference_positions"] = "released"
        controls, regions = request.controls_of(i), request.regions()[i]
        own |= {"control": controls or None, "region": regions or None}
        if not regions:
            own["base_weight"] = 0.0
        own["batch_place"] = None if place == (0, 1) else place
        data = shared.filled(seed=seed, **own).to_json()
        # Without these the request alone does not say where noise, prompts and images came from.
        whole = request.from_data
        whole = whole and all(name in data for name, value in own.items() if value is not None)
        whole = whole and all(control.named for control in controls) and all(region.named for region in regions)
        inputs = {"inputs": hashes} if (hashes := _hashes(plan, i)) else {}
        made.append(data | {"engine": engine | {"replayable": whole} | inputs} | beside)
    return made


def _hashes(plan: Plan, i: int) -> dict[str, Any]:
    """Hashes of what picture i was drawn from, by the name of the request's field."""
    hashes: dict[str, Any] = dict(plan.start_images[i].hashes) if plan.start_images else {}
    hashes |= control_hints.hashes(plan.controls, i) | region_masks.hashes(plan.shares, i)
    if plan.references[i]:
        hashes["reference"] = [reference.sha256 for reference in plan.references[i]]
    return hashes
