"""Draws a picture in a terminal of 24-bit color."""

import numpy as np
from PIL import Image

from s3dit.inputs.image_files import to_rgb


def ansi(image: Image.Image, columns: int = 64) -> str:
    """Draw a picture with colored half blocks for a terminal of 24-bit color, at most `columns` characters wide.

    -> lines with their escape codes, each ending in a reset and a newline. A cell is two pixels, one above the other.
    """
    columns = max(1, min(columns, image.width))
    height = 2 * max(1, round(image.height * columns / image.width / 2))
    levels = np.asarray(to_rgb(image).resize((columns, height), Image.Resampling.BOX))
    lines = []
    for upper, lower in zip(levels[::2].tolist(), levels[1::2].tolist(), strict=True):
        line, last = "", None
        for pair in zip(upper, lower, strict=True):
            if pair != last:
                (r, g, b), (s, h, c) = pair
                line += f"\x1b[38;2;{r};{g};{b};48;2;{s};{h};{c}m"
            line, last = line + "▀", pair
        lines.append(line + "\x1b[0m\n")
    return "".join(lines)
