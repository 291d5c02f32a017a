"""The value of --lora: a file, its strength, and the strength by block and by step.

`style.safetensors:0.8@layers.0-9=0,steps=0-0.5`: what stands behind the @ is factors of blocks, by names as
`runtime.adapter_strength` has them, and the steps in which the adapter acts, as fractions of them all.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

FORM = "FILE[:SCALE][@BLOCKS=FACTOR,…,steps=START-END]"


@dataclass(frozen=True, slots=True)
class LoraOption:
    """An adapter that the user gives; None where the user does not say it."""

    file: str
    scale: float | None = None
    strength: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the form above; a colon or @ that nothing of it follows belongs to the name. Raises ValueError."""
        name, at, rest = text.rpartition("@")
        if not at or "=" not in rest or Path(text).exists():
            return cls(*_scaled(text))
        return cls(*_scaled(name), _strength(rest))


def _scaled(text: str) -> tuple[str, float | None]:
    """A file and its strength, if one is given; a colon that no number follows belongs to the name."""
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path and not Path(text).exists() else (text, None)
    except ValueError:
        return text, None


def _strength(text: str) -> dict[str, Any]:
    """What `Adapters.attach` takes of strength by block and by step; ValueError."""
    strength: dict[str, Any] = {}
    for piece in text.split(","):
        name, _, value = piece.strip().partition("=")
        span = re.fullmatch(r"([\d.]+)-([\d.]+)", value)
        try:
            if name == "steps":
                if span is None or "steps" in strength:
                    raise ValueError
                strength["steps"] = (float(span[1]), float(span[2]))
            else:
                strength.setdefault("blocks", {})[name] = float(value)
        except ValueError:
            raise ValueError(f"an adapter has {piece.strip()!r} behind its @; needed {FORM}") from None
    return strength
