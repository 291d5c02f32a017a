"""What a server draws, for its page and for programs: GET /v1/options."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from s3dit import __version__, values
from s3dit.pipeline import Pipeline
from s3dit.request import Schedule, Solver
from s3dit.serve.fields import DOORS, Fields

# Width over height of the sizes that are offered, whose area is the model's own.
RATIOS = (1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)


def sees(pipe: Pipeline) -> bool:
    """Whether the model looks at reference pictures."""
    return pipe.config.transformer.siglip_feat_dim is not None


def sizes(height: int, width: int) -> list[str]:
    """Sizes WIDTHxHEIGHT of about one area in the usual proportions, the model's own first."""
    area = height * width
    pairs = [(width, height), *((math.sqrt(area * ratio), math.sqrt(area / ratio)) for ratio in RATIOS)]
    return list(dict.fromkeys("x".join(str(max(16, round(side / 16) * 16)) for side in pair) for pair in pairs))


def options(pipe: Pipeline, fields: Fields, scales: Mapping[str, float]) -> dict[str, Any]:
    """The JSON of GET /v1/options; scales: of the adapters that act where a request names none."""
    settings, limits = pipe.config.settings, fields.limits
    return {
        "model": fields.model, "variant": pipe.config.variant, "version": __version__,
        "sizes": sizes(settings.height, settings.width),
        "defaults": {
            "size": f"{settings.width}x{settings.height}", "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale, "solver": settings.solver, "schedule": settings.schedule,
            "n": 1, "output_format": "png", "strength": 0.6, "max_sequence_length": 512,
        },
        "solvers": list(get_args(Solver)), "schedules": list(get_args(Schedule)),
        "loras": [{"name": name, "scale": scales.get(name, 1.0), "on": name in scales} for name in fields.loras],
        "references": values.MOST_REFERENCES if sees(pipe) else 0,
        "limits": {
            "n": limits.pictures, "steps": limits.steps, "pixels": limits.pixels, "side": limits.side, "multiple": 16,
            "prompt": limits.prompt, "partial_images": limits.partial_images, "body": limits.body,
            "image_pixels": limits.image_pixels,
        },
        "example": pipe.config.prompt,
        "note": pipe.config.note,
        "fields": {door: {name: each.schema for name, each in fields.of(door).items()} for door in DOORS},
    }  # fmt: skip
