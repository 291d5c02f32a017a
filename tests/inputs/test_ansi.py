"""A picture in a terminal: half blocks in color."""

import sys
from pathlib import Path

from PIL import Image

sys.path.append(str(Path(__file__).parent))
from image_bytes import gradient  # noqa: E402

from s3dit.inputs.ansi import ansi  # noqa: E402


def test_ansi_draws_two_pixels_a_character():
    image = Image.new("RGB", (2, 2))
    image.putdata([(1, 2, 3), (1, 2, 3), (4, 5, 6), (7, 8, 9)])
    assert ansi(image) == "\x1b[38;2;1;2;3;48;2;4;5;6m▀\x1b[38;2;1;2;3;48;2;7;8;9m▀\x1b[0m\n"
    wide = ansi(gradient(200, 100), 40)
    assert wide.count("▀") == 40 * 10 and wide.count("\n") == 10
    assert ansi(gradient(300, 1)).count("\n") == 1
