"""Pictures of results, drawn with Pillow: heat maps, strips of images, maps over an image, curves.

Values are nested lists, arrays or tensors on any device; NaN is a missing value, and drawn gray. Everything returns an
RGB `PIL.Image`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from s3dit.errors import RequestError

Array = NDArray[np.float64]
# Colors from low to high, evenly spaced: dark to light for magnitudes, and with white in the middle for signed values.
MAGNITUDE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
SIGNED = ((33, 80, 160), (120, 170, 220), (248, 248, 248), (230, 140, 110), (165, 20, 35))
CURVES = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207), (90, 90, 90))
INK, PAPER, MISSING, RULE = (30, 30, 30), (255, 255, 255), (170, 170, 170), (225, 225, 225)
FONT = ImageFont.load_default(12)
LINE, GAP = 16, 8
NEAREST = Image.Resampling.NEAREST


def array(values: Any) -> Array:
    """Return values as fp64 on the CPU."""
    return np.asarray(values.detach().to("cpu", torch.float64) if isinstance(values, torch.Tensor) else values, float)


def colors(values: Any, low: float, high: float, *, signed: bool = False) -> NDArray[np.uint8]:
    """Return the colors (…, 3) of values; what is outside of [low, high] has the color of its end."""
    data, table = array(values), np.array(SIGNED if signed else MAGNITUDE, float)
    place = np.clip((data - low) / ((high - low) or 1.0), 0, 1) * (len(table) - 1)
    place = np.nan_to_num(place)
    below = np.minimum(place.astype(int), len(table) - 2)
    mixed = table[below] + (place - below)[..., None] * (table[below + 1] - table[below])
    return np.where(np.isnan(data)[..., None], MISSING, mixed + 0.5).astype(np.uint8)


def heatmap(
    values: Any,
    rows: Sequence[Any],
    columns: Sequence[Any],
    title: str = "",
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    form: str = "",
    numbers: bool | None = None,
) -> Image.Image:
    """Draw a table (R, C) of values as colors, with labels of rows and columns and a bar that explains the colors.

    log: colors by the logarithm, values above 0 · limits: of the colors; without, those of the values, and where some
    are negative symmetric about 0 · form: format of numbers (default: two digits) · numbers: write them into the cells
    (default: up to 400 cells).
    """
    data = _table(values, len(rows), len(columns))
    shown = np.log10(np.where(data > 0, data, np.nan)) if log else data
    low, high, signed = _limits(shown, limits and tuple(np.log10(limits) if log else limits), symmetric=not log)
    names, heads = [str(row) for row in rows], [str(column) for column in columns]
    numbers = data.size <= 400 if numbers is None else numbers
    texts = [["" if np.isnan(x) else _cell(x, form) for x in row] for row in data] if numbers else []
    widest = max((FONT.getlength(text) for row in texts for text in row), default=0)
    upright = max(map(FONT.getlength, heads)) > max(widest, 18)
    width, height = int(max(widest + 8, 18 if upright else max(map(FONT.getlength, heads)) + 6)), 18
    left = int(max(map(FONT.getlength, names))) + 2 * GAP
    top = (LINE + GAP if title else GAP) + (int(max(map(FONT.getlength, heads))) + GAP if upright else LINE)
    size = (left + width * len(heads), top + height * len(names))
    bar = int(max(FONT.getlength(_number(end, log)) for end in (low, high))) + 4 * GAP
    canvas, pen = _titled(max(size[0] + bar, _width(title)) + GAP, max(size[1], top + 80) + GAP, title)
    paint = colors(shown, low, high, signed=signed)
    for i, name in enumerate(names):
        pen.text((left - GAP // 2, top + height * i + height // 2), name, INK, FONT, anchor="rm")
        for j in range(len(heads)):
            x, y = left + width * j, top + height * i
            _filled(pen, (x, y, x + width - 2, y + height - 2), paint[i, j], texts[i][j] if numbers else "")
    _heads(canvas, heads, (left, top - GAP // 2), width, upright)
    _bar(canvas, (size[0] + 2 * GAP, top), max(size[1] - top, 72), low, high, signed=signed, log=log)
    return canvas


def _table(values: Any, rows: int, columns: int) -> Array:
    """Return the numbers of a table of this size; RequestError for another."""
    data = array(values)
    if data.shape != (rows, columns) or not data.size:
        raise RequestError(f"values are {data.shape}; needed a row for each of {rows}, {columns} numbers each")
    return data


def _titled(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an empty picture with a title, and what draws on it."""
    canvas = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, GAP // 2), title, INK, FONT)
    return canvas, pen


def _filled(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: NDArray[np.uint8], text: str) -> None:
    """Draw a cell with a text that can be read on its color."""
    pen.rectangle(box, tuple(map(int, color)))
    middle = (box[0] + box[2] + 2) / 2, (box[1] + box[3] + 2) / 2
    pen.text(middle, text, PAPER if color @ (0.3, 0.59, 0.11) < 128 else INK, FONT, anchor="mm")


def _heads(canvas: Image.Image, texts: Sequence[str], at: tuple[int, int], width: int, upright: bool) -> None:
    """Write the names of columns of a width, each over the middle of its own."""
    for j, text in enumerate(texts):
        x = at[0] + width * j + width // 2
        if upright:
            _upright(canvas, text, x, at[1])
        else:
            ImageDraw.Draw(canvas).text((x, at[1]), text, INK, FONT, anchor="mb")


def strip(
    images: Sequence[Image.Image],
    captions: Sequence[Any] = (),
    title: str = "",
    *,
    columns: int | None = None,
    side: int | None = None,
) -> Image.Image:
    """Lay images side by side, each with its caption above it.

    columns: images in a row (default: all) · side: the longer side of each, in pixels (default: as they are).
    """
    if not images or (captions and len(captions) != len(images)):
        raise RequestError(f"{len(images)} images and {len(captions)} captions; needed some, and a caption for each")
    tiles = [image.convert("RGB") for image in images]
    if side is not None:
        way = Image.Resampling.BICUBIC if max(map(max, (tile.size for tile in tiles))) > side else NEAREST
        tiles = [tile.resize(_fitted(tile.size, side), way) for tile in tiles]
    names = [str(caption) for caption in captions]
    per_row = min(columns or len(tiles), len(tiles))
    width = max(*(tile.width for tile in tiles), *(int(FONT.getlength(name)) for name in names), 1)
    height, head = max(tile.height for tile in tiles) + LINE * bool(names), LINE + GAP if title else GAP
    row_count = -(-len(tiles) // per_row)
    across = max(GAP + per_row * (width + GAP), _width(title) + GAP)
    canvas, pen = _titled(across, head + row_count * (height + GAP), title)
    for i, tile in enumerate(tiles):
        x, y = GAP + i % per_row * (width + GAP), head + i // per_row * (height + GAP)
        if names:
            pen.text((x, y), names[i], INK, FONT)
        canvas.paste(tile, (x, y + LINE * bool(names)))
    return canvas


def overlay(
    image: Image.Image,
    values: Any,
    *,
    opacity: float = 0.6,
    limits: tuple[float, float] | None = None,
    smooth: bool = False,
) -> Image.Image:
    """Draw a map (rows, columns) over an image, stretched to its size, in colors of `limits` (default: the map's).

    smooth: interpolate between the cells of the map, which otherwise stay visible.
    """
    data = array(values)
    if data.ndim != 2 or not data.size:
        raise RequestError(f"the map is {data.shape}; needed (rows, columns)")
    low, high, signed = _limits(data, limits)
    paint = Image.fromarray(colors(data, low, high, signed=signed))
    way = Image.Resampling.BICUBIC if smooth else NEAREST
    return Image.blend(image.convert("RGB"), paint.resize(image.size, way), opacity)


def lines(
    curves: Mapping[str, Any],
    x: Sequence[float] | None = None,
    title: str = "",
    *,
    log: bool = False,
    size: tuple[int, int] = (480, 280),
) -> Image.Image:
    """Draw curves by name over one axis x (default: 1, 2, …), with a legend; missing values leave gaps.

    Many curves are colored from dark to light in their order. log: the vertical axis is logarithmic, values above 0 ·
    size: of the picture, in pixels.
    """
    data, at = _curves(curves, x)
    if log:
        data = {name: np.log10(np.where(values > 0, values, np.nan)) for name, values in data.items()}
    low, high, _ = _limits(np.stack(list(data.values())), None, symmetric=False)
    marks = [_number(low + (high - low) * i / 4, log) for i in range(5)]
    legend = int(max(map(FONT.getlength, data))) + 3 * GAP
    left, top = int(max(map(FONT.getlength, marks))) + 2 * GAP, LINE + 2 * GAP
    width, height = max(size[0] - left - legend - 2 * GAP, 60), max(size[1] - top - LINE - 2 * GAP, LINE * len(data))
    total = (max(left + width + legend + 2 * GAP, _width(title)), top + height + LINE + 2 * GAP)
    canvas, pen = _titled(*total, title)
    for i, mark in enumerate(marks):
        y = top + height * (1 - i / 4)
        pen.line((left, y, left + width, y), RULE)
        pen.text((left - GAP // 2, y), mark, INK, FONT, anchor="rm")
    reach = (at.max() - at.min()) or 1.0
    across = left + width * (at - at.min()) / reach
    for i in np.unique(np.linspace(0, len(at) - 1, min(len(at), 9)).astype(int)):
        pen.text((across[i], top + height + GAP), format(at[i], "g"), INK, FONT, anchor="mt")
    for i, (name, values) in enumerate(data.items()):
        color = CURVES[i] if len(data) <= len(CURVES) else _mixed(i, len(data))
        down = top + height * (1 - (values - low) / ((high - low) or 1.0))
        _curve(pen, across, down, color)
        pen.text((left + width + 2 * GAP, top + LINE * i), name, color, FONT)
    return canvas


def _curves(curves: Mapping[str, Any], x: Sequence[float] | None) -> tuple[dict[str, Array], Array]:
    """Return the numbers of curves and of their axis (1, 2, … without one); RequestError where lengths differ."""
    data = {name: array(values) for name, values in curves.items()}
    lengths = {len(values) for values in data.values()} | ({len(x)} if x is not None else set())
    if len(lengths) != 1 or 0 in lengths:
        raise RequestError(
            f"curves of {len(data)} names have lengths {sorted(lengths)}; needed one length for all and x"
        )
    return data, np.arange(1, lengths.pop() + 1, dtype=float) if x is None else array(x)


def _curve(pen: ImageDraw.ImageDraw, across: Array, down: Array, color: tuple[int, ...]) -> None:
    """Draw a curve with its points; missing values leave gaps."""
    for j in range(len(across)):
        if np.isfinite(down[j]):
            pen.ellipse((across[j] - 2, down[j] - 2, across[j] + 2, down[j] + 2), color)
        if j and np.isfinite(down[j - 1 : j + 1]).all():
            pen.line((across[j - 1], down[j - 1], across[j], down[j]), color, 2)


def _mixed(i: int, count: int) -> tuple[int, ...]:
    """The color of one of many curves: from dark to light in their order."""
    return tuple(map(int, colors(i / count, 0.0, 1.0)))


def _limits(data: Array, given: tuple[float, float] | None, *, symmetric: bool = True) -> tuple[float, float, bool]:
    """The ends of a scale of colors, and whether it is one of signed values."""
    finite = data[np.isfinite(data)]
    low, high = given or ((finite.min(), finite.max()) if finite.size else (0.0, 1.0))
    signed = symmetric and low < 0 < high
    if signed and given is None:
        low, high = -max(-low, high), max(-low, high)
    return float(low), float(high), signed


def _cell(value: float, form: str) -> str:
    return format(value, form or (".0f" if 100 <= abs(value) < 10000 else ".2g"))


def _number(value: float, log: bool) -> str:
    return format(10.0**value if log else value, ".3g")


def _width(title: str) -> int:
    return int(FONT.getlength(title)) + 2 * GAP


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A size whose longer side is `side`."""
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _upright(canvas: Image.Image, text: str, x: int, bottom: int) -> None:
    """Write a text upwards, centered at x, ending at the bottom."""
    tile = Image.new("RGB", (int(FONT.getlength(text)) + 2, LINE), PAPER)
    ImageDraw.Draw(tile).text((0, 1), text, INK, FONT)
    tile = tile.rotate(90, expand=True)
    canvas.paste(tile, (x - tile.width // 2, bottom - tile.height))


def _bar(
    canvas: Image.Image, at: tuple[int, int], height: int, low: float, high: float, *, signed: bool, log: bool
) -> None:
    """Draw the scale of colors with the numbers of its ends and middle."""
    values = np.linspace(high, low, height)[:, None].repeat(12, 1)
    canvas.paste(Image.fromarray(colors(values, low, high, signed=signed)), at)
    pen = ImageDraw.Draw(canvas)
    for share, anchor in ((0.0, "la"), (0.5, "lm"), (1.0, "ld")):
        value = high + (low - high) * share
        pen.text((at[0] + 16, at[1] + height * share), _number(value, log), INK, FONT, anchor=anchor)
