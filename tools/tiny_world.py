"""Render and describe the pictures that the embedded model is trained on: flat shapes on flat backgrounds.

A *scene* is a few facts (what kind of picture, which shapes of which colours, which background); this module renders
a scene as a 128 × 128 picture, says it as an English caption, and - the other way round - measures whether a picture
shows what a scene demands. The scorer looks at pixels only: it never sees how a picture was made.

All pictures are (128, 128, 3) uint8 RGB arrays. Positions and radii are in pixels, y downwards, (0, 0) the top left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 128
SUPERSAMPLE = 4
FIXED_SEED = 20_260_000
FIXED_SEEN, FIXED_HELD_OUT = 400, 100

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (249, 140, 22),
    "yellow": (250, 215, 40),
    "green": (34, 160, 70),
    "cyan": (60, 205, 215),
    "blue": (37, 80, 225),
    "purple": (130, 50, 180),
    "pink": (250, 150, 200),
    "white": (250, 250, 250),
    "black": (20, 20, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
# These (colour, shape) pairs appear in no training caption and no training picture; every colour is missing one shape.
HELD_OUT = frozenset(
    {
        ("red", "heart"),
        ("orange", "cross"),
        ("yellow", "diamond"),
        ("green", "star"),
        ("cyan", "ring"),
        ("blue", "circle"),
        ("purple", "square"),
        ("pink", "triangle"),
        ("white", "star"),
        ("black", "circle"),
    }
)
# An object on a background that nobody could tell from it at a glance is never drawn.
CLASHES = frozenset(
    frozenset(pair) for pair in (("red", "orange"), ("orange", "yellow"), ("blue", "purple"), ("pink", "white"))
)

PLACES: dict[str, tuple[int, int]] = {
    "top": (0, -1),
    "bottom": (0, 1),
    "left": (-1, 0),
    "right": (1, 0),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
ARRANGEMENTS = ("centre", "small", "large", *PLACES, *RELATIONS)
KINDS = ("single", "sized", "placed", "two")
KIND_SHARES = (0.24, 0.14, 0.22, 0.40)

RADIUS = {"single": 34.0, "small": 20.0, "large": 47.0, "placed": 22.0, "two": 22.5}
PLACE_OFFSET, PAIR_OFFSET = 32.0, 31.0
JITTER = 3.0

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
RELATION_WORDS = {
    "left of": ("left of", "left of", "to the left of"),
    "right of": ("right of", "right of", "to the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}


@dataclass(frozen=True)
class Thing:
    """One coloured shape; ``x``, ``y`` is its centre and ``r`` its radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows. In a scene of two, ``arrangement`` says where the first thing is, seen from the second."""

    kind: str
    arrangement: str
    background: str
    things: tuple[Thing, ...]

    @property
    def held_out(self) -> bool:
        """Whether any thing here is of a (colour, shape) pair that training never shows."""
        return any((thing.colour, thing.shape) in HELD_OUT for thing in self.things)


def draw_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """Draw a random scene; with ``held_out`` it has at least one pair never trained on, without it none."""
    while True:
        kind = str(rng.choice(KINDS, p=KIND_SHARES))
        background = str(rng.choice(list(COLOURS)))
        if kind == "single":
            arrangement, centres, radius = "centre", [(0.0, 0.0)], RADIUS["single"]
        elif kind == "sized":
            arrangement = str(rng.choice(["small", "large"]))
            centres, radius = [(0.0, 0.0)], RADIUS[arrangement]
        elif kind == "placed":
            arrangement = str(rng.choice(list(PLACES)))
            dx, dy = PLACES[arrangement]
            centres, radius = [(dx * PLACE_OFFSET, dy * PLACE_OFFSET)], RADIUS["placed"]
        else:
            arrangement = str(rng.choice(list(RELATIONS)))
            dx, dy = RELATIONS[arrangement]
            centres = [(dx * PAIR_OFFSET, dy * PAIR_OFFSET), (-dx * PAIR_OFFSET, -dy * PAIR_OFFSET)]
            radius = RADIUS["two"]
        things = []
        for x, y in centres:
            jx, jy = rng.uniform(-JITTER, JITTER, size=2)
            r = radius * rng.uniform(0.95, 1.05)
            shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
            things.append(Thing(shape, colour, SIDE / 2 + x + jx, SIDE / 2 + y + jy, r))
        scene = Scene(kind, arrangement, background, tuple(things))
        pairs = {(thing.colour, thing.shape) for thing in things}
        clash = any(thing.colour == background or frozenset((thing.colour, background)) in CLASHES for thing in things)
        if not clash and len(pairs) == len(things) and scene.held_out == held_out:
            return scene


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def caption_of(scene: Scene, rng: np.random.Generator) -> str:
    """Say a scene in one of several ways, at most 18 words. A white background may go unsaid."""
    first = scene.things[0]
    subject = f"{first.colour} {first.shape}"
    if scene.kind == "sized":
        subject = f"{rng.choice(SIZE_WORDS[scene.arrangement])} {subject}"
    tail = ""
    if scene.kind == "placed":
        tail = f" {rng.choice(['at', 'in'])} the {scene.arrangement}"
    elif scene.kind == "two":
        second = scene.things[1]
        tail = f" {rng.choice(RELATION_WORDS[scene.arrangement])} {_a(f'{second.colour} {second.shape}')}"
    long, short, back = _a(subject) + tail, subject + tail, f"{scene.background} background"
    if scene.background == "white" and rng.random() < 0.5:
        said = long if rng.random() < 0.6 else f"draw {long}"
    else:
        said = str(
            rng.choice(
                [
                    f"{long} on {_a(back)}",
                    f"{long} on {_a(back)}",
                    f"{short}, {back}",
                    f"{_a(back)} with {long}",
                    f"a picture of {long} on {_a(back)}",
                    f"draw {long} on {_a(back)}",
                ]
            )
        )
    if rng.random() < 0.15:
        said = said[0].upper() + said[1:]
    return said + ("." if rng.random() < 0.15 else "")


def fixed_prompts() -> list[tuple[Scene, str]]:
    """The 500 prompts every score is measured on: 400 of trained pairs, then 100 with a held-out pair."""
    rng = np.random.default_rng(FIXED_SEED)
    scenes = [draw_scene(rng, held_out=index >= FIXED_SEEN) for index in range(FIXED_SEEN + FIXED_HELD_OUT)]
    return [(scene, caption_of(scene, rng)) for scene in scenes]


@lru_cache(maxsize=1)
def _outlines() -> dict[str, NDArray[np.floating]]:
    """Outline of every shape, (points, 2), in units of the radius."""
    turn = np.linspace(0, 2 * np.pi, 97)[:-1]
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)
    tips = -np.pi / 2 + np.arange(10) * np.pi / 5
    star = np.stack([np.cos(tips), np.sin(tips)], 1) * np.where(np.arange(10) % 2, 0.52, 1.2)[:, None]
    heart = np.stack(
        [16 * np.sin(turn) ** 3, -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))],
        1,
    )
    a = 0.36
    cross = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    return {
        "circle": circle,
        "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.86,
        "triangle": np.array([(0, -1.15), (1.1, 0.75), (-1.1, 0.75)]),
        "star": star,
        "heart": heart / 15.5 + [0, -0.05],
        "ring": circle * 1.05,
        "cross": np.array(cross) * 1.05,
        "diamond": np.array([(0, -1.2), (0.92, 0), (0, 1.2), (-0.92, 0)]),
    }


def coverage(shape: str, x: float, y: float, r: float) -> NDArray[np.float32]:
    """How much of every pixel a shape covers: (128, 128) float32 in [0, 1]."""
    canvas = Image.new("L", (SIDE * SUPERSAMPLE, SIDE * SUPERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    points = (_outlines()[shape] * r + [x, y]) * SUPERSAMPLE
    pen.polygon([(float(px), float(py)) for px, py in points], fill=255)
    if shape == "ring":
        hole = (_outlines()["circle"] * (0.5 * r) + [x, y]) * SUPERSAMPLE
        pen.polygon([(float(px), float(py)) for px, py in hole], fill=0)
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32) / np.float32(255)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Paint a scene."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = COLOURS[scene.background]
    for thing in scene.things:
        cover = coverage(thing.shape, thing.x, thing.y, thing.r)[..., None]
        picture += cover * (np.array(COLOURS[thing.colour], np.float32) - picture)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def words() -> list[str]:
    """Every word a caption can have, sorted, lower case."""
    rng = np.random.default_rng(1)
    said = " ".join(caption_of(draw_scene(rng), rng) for _ in range(4000)).lower()
    return sorted(set(said.replace(".", " ").replace(",", " ").split()))


def check_captions(captions: Sequence[str]) -> None:
    """Raise ValueError if a held-out pair is said in any of these captions."""
    for colour, shape in HELD_OUT:
        for caption in captions:
            if f"{colour} {shape}" in caption.lower():
                raise ValueError(
                    f"found the held-out pair '{colour} {shape}' in the training caption {caption!r}; "
                    "needed captions without it; draw training scenes with held_out=False"
                )
