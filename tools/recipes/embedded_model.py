"""What recipes share: the embedded model, the scenes that it is asked for, and scores of the pictures that it draws."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from s3dit import Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_score import MIN_CONTRAST, judge  # noqa: E402
from tiny_world import Scene, fixed_prompts  # noqa: E402

# A scene, and how it is said.
Prompt = tuple[Scene, str]


def load(model: str | None = None) -> Pipeline:
    """Return a model (default: the embedded one) in fp32, so that nothing depends on a CPU's own number format."""
    return Pipeline.load(model, dtype="fp32", residency="resident")


def prompts(count: int, *kinds: str) -> list[Prompt]:
    """Return the first prompts of the fixed ones whose pairs were trained; kinds: of scenes (default: all)."""
    return [each for each in fixed_prompts() if not each[0].held_out and (not kinds or each[0].kind in kinds)][:count]


def draw(pipe: Pipeline, asked: Sequence[Prompt]) -> list[Image.Image]:
    """Draw every prompt, with its place in the list as the seed."""
    return pipe([text for _, text in asked], seed=list(range(len(asked)))).images


def accuracy(pictures: Sequence[Image.Image], asked: Sequence[Prompt]) -> float:
    """Return the share of pictures that show everything that their scenes demand."""
    judged = [judge(np.asarray(picture), scene) for picture, (scene, _) in zip(pictures, asked, strict=True)]
    return sum(verdict.everything for verdict in judged) / len(judged)


def difference(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Return the root of the mean square by which pictures differ from others, of pixels in [0, 1]."""
    a, b = (np.stack([np.asarray(picture, float) / 255 for picture in each]) for each in (pictures, others))
    return float(np.sqrt(np.square(a - b).mean()))


def thing_mask(picture: Image.Image) -> NDArray[np.bool_]:
    """Return where a picture (H, W) differs from its background, the median color of its frame: the things."""
    pixels = np.asarray(picture, np.float32)
    frame = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)])
    return np.asarray(np.linalg.norm(pixels - np.median(frame, 0), axis=2) > MIN_CONTRAST)


def stack(panels: Sequence[Image.Image]) -> Image.Image:
    """Lay images one below the other."""
    canvas = Image.new("RGB", (max(panel.width for panel in panels), sum(panel.height for panel in panels)), "white")
    top = 0
    for panel in panels:
        canvas.paste(panel, (0, top))
        top += panel.height
    return canvas


def options(description: str | None) -> Path:
    """Read the command line of a recipe -> where its picture goes."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=None, help="file of the picture (default: the recipe's name.png)")
    return parser.parse_args().out or Path(f"{Path(sys.argv[0]).stem}.png")
