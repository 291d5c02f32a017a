"""What a distill LoRA is to be drawn with: few steps, no guidance, its shift and strength.

Such an adapter teaches a model of many steps with guidance to do with few without. Its tensors are those of any LoRA,
so it is the header that says it, the key `few_steps` with a JSON object of the fields of FewSteps; else the file's
name, which says how many steps, as alibaba-pai's do (Z-Image-Fun-Lora-Distill-8-Steps-2603-ComfyUI.safetensors). What a
file says is taken where a request says nothing, and decides about nothing else.

Source: cards and trainer of alibaba-pai/Z-Image-Fun-Lora-Distill; diffusers #13126 (strength).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from s3dit.weights.json_files import parse_json

METADATA = "few_steps"
# Not of adapters that take a distillation back.
NAME = re.compile(r"(?<!de)(?<!de[-_ ])distill.{0,20}?(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])", re.IGNORECASE)
# Above this it is no distillation.
MOST_STEPS = 16
# Bounds of what a header says; those of a request are within.
BOUNDS = {"num_inference_steps": (1, 1000), "guidance_scale": (0, 1000), "shift": (1e-3, 1e3), "strength": (-1e3, 1e3)}


@dataclass(frozen=True, slots=True)
class FewSteps:
    """What an adapter was distilled for. shift: of the schedule, None for the model's · by_name: told by the name."""

    num_inference_steps: int
    guidance_scale: float = 0.0
    shift: float | None = None
    strength: float = 1.0
    by_name: bool = False

    def __str__(self) -> str:
        """Describe it for people."""
        guidance = f"guidance_scale {self.guidance_scale:g}" if self.guidance_scale else "no guidance"
        shift = "" if self.shift is None else f", shift {self.shift:g}"
        where = "by its name" if self.by_name else "by its header"
        return f"{self.num_inference_steps} steps, {guidance}{shift}, strength {self.strength:g} ({where})"


def few_steps(metadata: Mapping[str, str], stem: str) -> FewSteps | None:
    """Return what an adapter is to be drawn with by its header, else by the name of its file; None if neither says so.

    Raises ValueError for a header whose values are of no use.
    """
    if METADATA in metadata:
        return _checked(parse_json(metadata[METADATA]))
    match = NAME.search(stem)
    steps = int(match[1]) if match else 0
    if not 0 < steps <= MOST_STEPS:
        return None
    # The shift of the levels that they were published with, not that of the model; two steps want more strength.
    return FewSteps(steps, shift=3.0, strength=0.9 if steps <= 2 else 0.8, by_name=True)


def _checked(values: Any) -> FewSteps:
    """Make a FewSteps of a header's JSON; raises ValueError."""
    known = {field.name for field in fields(FewSteps)} - {"by_name"}
    if not isinstance(values, dict) or "num_inference_steps" not in values or not values.keys() <= known:
        raise ValueError(f"needed an object with num_inference_steps, and of others only {', '.join(sorted(known))}")
    for name, value in values.items():
        low, high = BOUNDS[name]
        whole = int if name == "num_inference_steps" else int | float
        if not isinstance(value, whole) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} is {str(value)[:40]}, needed a number from {low:g} to {high:g}")
    return FewSteps(**values)
