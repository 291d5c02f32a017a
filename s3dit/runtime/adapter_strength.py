"""The strength of an adapter: one for all, by block, and the steps in which it acts.

By block `{"layers.0-9": 0, "noise_refiner": 0.5}`, of its layers' official names. A name stands for every layer that
begins with it, part by part between dots, where `0-9` is a range of numbers and `*` anything. Names are the
transformer's, others begin with their part (`text_encoder.model.layers.0-5`). Of several that fit a layer the last
counts. The factor multiplies the adapter's strength there; at 0 the layer is left alone.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.weights.adapter import Deltas

PARTS = ("transformer", "text_encoder")
# The largest strength that is no accident, and the steps of an adapter that acts in all.
STRONGEST, ALL_STEPS = 1000.0, (0.0, 1.0)


def check_scale(value: Any) -> None:
    """Raise RequestError for a strength that is no finite number within ±STRONGEST."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or abs(value) > STRONGEST:
        raise RequestError(
            f"the scale of an adapter is {value!r}; needed a number within ±{STRONGEST:g}, 1 for full strength"
        )


def check_steps(steps: Any, parts: Collection[str]) -> tuple[float, float]:
    """Return the two ends of a stretch of steps; raises RequestError unless 0 <= start < end <= 1.

    parts: that the adapter changes; of these only the transformer computes in steps.
    """
    given = [*steps] if isinstance(steps, Sequence) and not isinstance(steps, str) else []
    numbers = len(given) == 2 and all(isinstance(each, int | float) and not isinstance(each, bool) for each in given)
    if not numbers or not 0 <= given[0] < given[1] <= 1:
        raise RequestError(
            f"the steps of an adapter are {shown(steps)}; needed (start, end), fractions of the steps from 0 to 1, "
            "start below end"
        )
    if tuple(given) != ALL_STEPS and {*parts} != {PARTS[0]}:
        raise RequestError(
            "the adapter changes the text encoder, which runs once before the steps, and is to act in some of them; "
            "needed an adapter of the transformer, or blocks of text_encoder=0"
        )
    return float(given[0]), float(given[1])


def check_blocks(blocks: Any) -> dict[str, float]:
    """Return names and factors as a dict of Python's own; raises RequestError where they are none."""
    if not isinstance(blocks, Mapping):
        raise RequestError(f"blocks are {shown(blocks)}; needed names with factors, such as {{'layers.0-9': 0}}")
    for name, factor in blocks.items():
        number = isinstance(factor, int | float) and not isinstance(factor, bool) and abs(factor) <= STRONGEST
        if not isinstance(name, str) or not name or not number:
            raise RequestError(
                f"blocks have {shown(name)} with {shown(factor)}; needed a name such as layers.0-9, and a number "
                f"within ±{STRONGEST:g}"
            )
    return {name: float(factor) for name, factor in blocks.items()}


def by_block(deltas: Mapping[str, Deltas], blocks: Mapping[str, float]) -> dict[str, Deltas]:
    """Multiply the strengths of layers, by part and official name; those of factor 0 are left out.

    Raises RequestError for a name that fits no layer of the adapter, and where nothing is left.
    """
    used: set[str] = set()
    left: dict[str, Deltas] = {}
    for part, of_part in deltas.items():
        for layer, delta in of_part.items():
            fitting = [name for name in blocks if _fits(name, part, layer)]
            used.update(fitting)
            factor = blocks[fitting[-1]] if fitting else 1.0
            if factor:
                left.setdefault(part, {})[layer] = replace(delta, factor=factor)
    there = sorted(
        {f"{'' if part == PARTS[0] else part + '.'}{_block(layer)}" for part in deltas for layer in deltas[part]}
    )
    if unused := [name for name in blocks if name not in used]:
        raise RequestError(
            f"blocks name {', '.join(map(shown, unused))}, where the adapter changes nothing; it changes "
            f"{', '.join(there[:40])}{', …' if len(there) > 40 else ''}"
        )
    if not left:
        raise RequestError("blocks leave nothing of the adapter: every layer has 0; needed one that has more")
    return left


def _block(layer: str) -> str:
    """The block of a layer: its name up to the first number, or its first part."""
    match = re.match(r"(?:model\.)?\w+\.\d+(?=\.|$)", layer)
    return match[0] if match else layer.partition(".")[0]


def _fits(name: str, part: str, layer: str) -> bool:
    """Whether a name of blocks stands for a layer."""
    pieces = name.split(".")
    of_part, pieces = (pieces[0], pieces[1:]) if pieces[0] in PARTS else (PARTS[0], pieces)
    words = layer.split(".")
    return of_part == part and len(pieces) <= len(words) and all(map(_is, pieces, words))


def _is(piece: str, word: str) -> bool:
    """Whether a piece of a name between dots stands for a word."""
    if (span := re.fullmatch(r"(\d{1,6})-(\d{1,6})", piece)) and re.fullmatch(r"\d{1,6}", word):
        return int(span[1]) <= int(word) <= int(span[2])
    return fnmatchcase(word, piece)
