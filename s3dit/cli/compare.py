"""`s3dit compare`: say what differs between two pictures: what drew them, and their pixels."""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3dit.errors import RequestError
from s3dit.terminal import event, line, say, tell

if TYPE_CHECKING:
    from s3dit.cli.picture_settings import Row, Settings
    from s3dit.inputs.picture_difference import PictureDifference

SUMMARY = "say what differs between two pictures: setting, model or input, then pixels"
EXAMPLES = (
    ("s3dit compare a.png b.png", "which setting makes them differ, and by how much"),
    ("s3dit compare ours.png comfyui.png -o difference.png", "both, and their difference made brighter, side by side"),
    ("s3dit compare new.png expected.png --tolerance 40dB", "for a script: 0 if they are as near, else 1"),
)
# From this PSNR on two pictures are the same but for rounding.
ROUNDING = 30.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    parser.add_argument("a", metavar="A", type=Path, help="a picture, of whatever program")
    parser.add_argument("b", metavar="B", type=Path, help="another one")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="a picture of both and their difference")
    parser.add_argument(
        "--tolerance", type=_tolerance, metavar="N", default=("levels", 0.0),
        help="what still counts as equal: so many of 255 levels at most (2), or a PSNR of at least (40dB)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def _tolerance(text: str) -> tuple[str, float]:
    """Levels at most, or decibels at least; argparse shows the message of what is raised."""
    unit = "dB" if text.lower().endswith("db") else "levels"
    try:
        value = float(text[:-2] if unit == "dB" else text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of levels such as 2 nor a PSNR such as 40dB")
    return unit, value


def run(args: argparse.Namespace) -> int:
    """Print what differs; returns 0 for equal pixels (or within --tolerance), 1 for others. Raises RequestError."""
    from s3dit.cli.picture_settings import differences, machines, read_settings
    from s3dit.inputs.images import Picture
    from s3dit.inputs.picture_difference import PictureDifference

    paths = args.a, args.b
    pictures = [Picture.open(str(path)).content for path in paths]
    settings = [read_settings(path) for path in paths]
    rows, engines = differences(*settings), sorted(machines(*settings), key=lambda row: row.name)
    one, other = pictures
    pixels = PictureDifference.of(one, other) if one.size == other.size else None  # type: ignore[arg-type]
    if args.output is not None:
        _draw(args.output, paths, pictures)
    summary = cause(rows, engines, pixels, settings, [each.size for each in pictures])
    if args.json:
        event(**_json(args, summary, rows, engines, pixels, settings))
    else:
        tell("\n".join(map(line, _text(summary, rows, engines, pixels, settings))))
    return 0 if pixels is not None and _within(pixels, *args.tolerance) else 1


def _within(pixels: "PictureDifference", unit: str, most: float) -> bool:
    return pixels.psnr >= most if unit == "dB" else pixels.largest <= most


def cause(
    rows: "Sequence[Row]",
    engines: "Sequence[Row]",
    pixels: "PictureDifference | None",
    settings: "Sequence[Settings]",
    sizes: Sequence[Any],
) -> str:
    """The likely cause in one line."""
    differing = [row for row in rows if row.differs]
    names = [row.name for row in differing]
    equal = pixels is not None and pixels.psnr == math.inf
    if equal:
        return "equal pixels" + (f", although {_listed(names)} differ{'s' * (len(names) == 1)}" if names else "")
    if pixels is None:
        (width, height), (w, h) = sizes
        start = f"size differs ({width}×{height} | {w}×{h})"
        return start + (f", and {_listed(names)}" if names else "")
    if len(names) == 1:
        (row,) = differing
        return f"{row.name} differs ({row.note or f'{_short(row.a)} | {_short(row.b)}'})"
    if names:
        return f"{_listed(names)} differ"
    if None in [each.by for each in settings]:
        return "only pixels are compared: not both say how they were drawn"
    if settings[0].by != settings[1].by:
        return "the settings that both tell are the same: another program, which rounds otherwise or draws other noise"
    if engines:
        others = _listed([row.name for row in engines])
        return f"same settings, other {others}: {'rounding' if pixels.psnr >= ROUNDING else 'more than rounding'}"
    return "same settings, same kind of machine: other weights by the same name, or a picture that was changed"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _short(value: Any) -> str:
    """A value of a setting for a line; of a long one its beginning."""
    text = "not told" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _text(
    summary: str,
    rows: "Sequence[Row]",
    engines: "Sequence[Row]",
    pixels: "PictureDifference | None",
    settings: "Sequence[Settings]",
) -> Iterator[str]:
    yield summary
    for row in (*rows, *engines):
        mark = {True: "differs", False: "same", None: "?"}[row.differs]
        values = _short(row.a) if row.a == row.b else f"{_short(row.a)} | {_short(row.b)}"
        yield f"  {row.name:<16} {mark:<8} {values}" + (f": {row.note}" if row.note else "")
    if pixels is not None:
        ssim = "" if pixels.ssim is None else f", SSIM {pixels.ssim:.5f}"
        yield (
            f"pixels: largest {pixels.largest}, mean {pixels.mean:.3g} of 255, {pixels.unequal:.1%} unequal, "
            f"PSNR {pixels.psnr:.2f} dB{ssim}"
        )
    yield from (f"note: {note}" for each in settings for note in each.notes)


def _json(
    args: argparse.Namespace,
    summary: str,
    rows: "Sequence[Row]",
    engines: "Sequence[Row]",
    pixels: "PictureDifference | None",
    settings: "Sequence[Settings]",
) -> dict[str, Any]:
    """JSON values; an infinite PSNR is null."""
    from dataclasses import asdict

    measured = None if pixels is None else asdict(pixels)
    if measured is not None and measured["psnr"] == math.inf:
        measured["psnr"] = None
    return {
        "a": str(args.a), "b": str(args.b), "cause": summary, "settings": [asdict(row) for row in rows],
        "machine": [asdict(row) for row in engines], "pixels": measured,
        "within": pixels is not None and _within(pixels, *args.tolerance),
        "notes": [note for each in settings for note in each.notes],
    }  # fmt: skip


def _draw(path: Path, inputs: Sequence[Path], pictures: Sequence[Any]) -> None:
    """Write the picture of a difference; RequestError where it would replace one of the two."""
    from s3dit.inputs.picture_difference import drawn
    from s3dit.inputs.save_image import save_picture

    if path.resolve() in [each.resolve() for each in inputs]:
        raise RequestError(f"{path} is one of the two pictures; needed another name; give output")
    image, factor = drawn(*pictures)
    save_picture(image, path)
    say(f"{path}: both" + (f", and their difference {factor:.3g} times as bright" if factor > 1 else ""))
