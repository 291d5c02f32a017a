"""What a server grants one request: bounds that its operator sets, checked before anything of their size is made."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request.

    pictures: n · steps: of a solver · pixels: of all its pictures together, enlarged · prompt: characters of a prompt ·
    body: bytes · images: files in it · image_pixels: of all of these · body_seconds: in which a body must have come ·
    side: pixels · partial_images: of each picture.
    """

    pictures: int = 10
    steps: int = 200
    pixels: int = 1 << 23
    prompt: int = 32_000
    body: int = 1 << 25
    images: int = 17
    image_pixels: int = 1 << 24
    body_seconds: float = 60.0
    side: int = 4096
    partial_images: int = 3
