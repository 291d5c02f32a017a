"""Score how the embedded model edits start images, from pixels (tiny_score.py), on pictures that are rendered.

A row is a few tens of pictures of one kind of edit: img2img (weak, strong), inpainting the second of two things,
outpainting a picture that lost its margins. Each is judged against the scene that its words demand, or the one that it
started from; and pixels that must not change are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tiny_score import Verdict, judge
from tiny_world import COLOURS, SIDE, Scene, caption_of, draw_scene, render

if TYPE_CHECKING:
    from s3dit import Pipeline

BATCH = 20
MARGIN = 16  # pixels on each side that outpainting has to find again
NEAR = 60.0  # RGB distance within which a pixel has the background's colour
Row = dict[str, float]


def _share(hits: Sequence[bool]) -> float:
    return round(float(np.mean(hits)), 3)


def _judged(pictures: Sequence[Any], scenes: Sequence[Scene]) -> Row:
    verdicts: list[Verdict] = [judge(np.asarray(p), scene) for p, scene in zip(pictures, scenes, strict=True)]
    demands = ("background", "colour", "arrangement", "shape", "everything")
    return {name: _share([bool(getattr(verdict, name)) for verdict in verdicts]) for name in demands}


def _near(pictures: Sequence[Any], starts: Sequence[Any]) -> Row:
    """How much of a picture has still its start's colour, pixel by pixel."""
    pairs = zip(pictures, starts, strict=True)
    off = [np.linalg.norm(np.asarray(p, float) - np.asarray(start, float), axis=2) for p, start in pairs]
    return {"as the start": round(float(np.mean([(one < NEAR).mean() for one in off])), 3)}


def _drawn(pipe: Pipeline, captions: list[str], **inputs: Any) -> list[Any]:
    """Pictures in batches; lists among the inputs are one entry a picture. The seed is the picture's index."""
    found: list[Any] = []
    for start in range(0, len(captions), BATCH):
        part = slice(start, start + BATCH)
        chosen: dict[str, Any] = {
            name: given[part] if isinstance(given, list) else given for name, given in inputs.items()
        }
        found += pipe(prompt=captions[part], seed=start, **chosen).images
    return found


def _scenes(rng: np.random.Generator, n: int, kinds: tuple[str, ...]) -> list[Scene]:
    found: list[Scene] = []
    while len(found) < n:
        scene = draw_scene(rng)
        if scene.kind in kinds:
            found.append(scene)
    return found


def img2img(pipe: Pipeline, rng: np.random.Generator, n: int) -> dict[str, Row]:
    """Weak edits keep the start's colours and place, strong ones follow the words.

    The embedded model has its guidance distilled in, so that other words win early: those rows are judged by the words.
    """
    starts, wanted = (_scenes(rng, n, ("single", "placed", "sized")) for _ in range(2))
    images = [Image.fromarray(render(scene)) for scene in starts]
    own, other = ([caption_of(scene, rng) for scene in scenes] for scenes in (starts, wanted))
    rows = {}
    for title, captions, scenes, inputs in (
        ("img2img 0.3, its words", own, starts, {"strength": 0.3}),
        ("img2img 0.3, no words", [""] * n, starts, {"strength": 0.3}),
        ("img2img 0.3, other words", other, wanted, {"strength": 0.3}),
        ("img2img 0.9, other words", other, wanted, {"strength": 0.9}),
    ):
        pictures = _drawn(pipe, captions, image=images, **inputs)
        rows[title] = _judged(pictures, scenes) | _near(pictures, images)
    for title, captions, scenes in (("its words alone", own, starts), ("other words alone", other, wanted)):
        pictures = _drawn(pipe, captions)
        rows[title] = _judged(pictures, scenes) | _near(pictures, images)
    return rows


def _around(scene: Scene, index: int) -> NDArray[np.uint8]:
    """A mask of the half of the picture that holds one of two things."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    mine, other = scene.things[index], scene.things[1 - index]
    nearer = np.hypot(columns - mine.x, rows - mine.y) < np.hypot(columns - other.x, rows - other.y) - 8
    return nearer.astype(np.uint8) * 255


def inpaint(pipe: Pipeline, rng: np.random.Generator, n: int) -> dict[str, Row]:
    """The second of two things becomes another; the rest of the picture stays, to the bit."""
    starts, wanted = _scenes(rng, n, ("two",)), []
    for scene in starts:
        while True:
            new, (first, old) = draw_scene(rng).things[0], scene.things
            changed = replace(scene, things=(first, replace(old, shape=new.shape, colour=new.colour)))
            if _clear(changed) and (new.shape, new.colour) != (old.shape, old.colour):
                break
        wanted.append(changed)
    images, masks = [render(scene) for scene in starts], [_around(scene, 1) for scene in starts]
    captions = [caption_of(scene, rng) for scene in wanted]
    pictures = _drawn(pipe, captions, image=images, mask_image=masks)
    kept = [
        np.array_equal(np.asarray(p)[mask == 0], image[mask == 0])
        for p, image, mask in zip(pictures, images, masks, strict=True)
    ]
    return {"inpaint": _judged(pictures, wanted) | {"kept to the bit": _share(kept)}}


def _clear(scene: Scene) -> bool:
    """Whether the colours of both things and of the background can be told apart at a glance."""
    used = [scene.background, *(thing.colour for thing in scene.things)]
    apart = [float(np.linalg.norm(np.subtract(COLOURS[a], COLOURS[b]))) for a in used for b in used if a < b]
    return len(set(used)) == 3 and min(apart) > 2 * NEAR and not scene.held_out


def outpaint(pipe: Pipeline, rng: np.random.Generator, n: int) -> dict[str, Row]:
    """A picture without its margins gets them back: the background goes on, and what is there stays."""
    scenes = _scenes(rng, n, ("single",))
    inside = slice(MARGIN, SIDE - MARGIN)
    images = [render(scene)[inside, inside] for scene in scenes]
    captions = [caption_of(scene, rng) for scene in scenes]
    pictures = [np.asarray(p) for p in _drawn(pipe, captions, image=images, extend=(MARGIN,) * 4)]
    around = np.ones((SIDE, SIDE), bool)
    around[inside, inside] = False
    goes_on = [
        float((np.linalg.norm(p[around] - np.array(COLOURS[scene.background], float), axis=1) < NEAR).mean())
        for p, scene in zip(pictures, scenes, strict=True)
    ]
    kept = [np.array_equal(p[inside, inside], image) for p, image in zip(pictures, images, strict=True)]
    row = {"margins of the background": round(float(np.mean(goes_on)), 3), "kept to the bit": _share(kept)}
    return {"outpaint": _judged(pictures, scenes) | row}


def score_edits(pipe: Pipeline, n: int = 40) -> dict[str, Row]:
    """Every row, n pictures each, with one fixed seed."""
    rng = np.random.default_rng(20_260_001)
    return img2img(pipe, rng, n) | inpaint(pipe, rng, n) | outpaint(pipe, rng, n)


def as_table(rows: dict[str, Row]) -> str:
    """Rows as lines of text, one column a measure."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    widths = [max(len(name), 5) + 2 for name in names]
    lines = [f"{'':26}" + "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))]
    for title, row in rows.items():
        cells = (f"{row[name]:.3f}" if name in row else "" for name in names)
        lines.append(f"{title:26}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)
