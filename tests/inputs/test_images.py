"""Pictures: conversions to the value, masks, hashes, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parent))
from image_bytes import back, cut_jpeg, gradient, moving, pixels_of  # noqa: E402

from s3dit.errors import RequestError  # noqa: E402
from s3dit.inputs.images import Picture, to_pil  # noqa: E402


def test_levels_round_half_to_even_and_clamp():
    levels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0])
    pixels = levels[None, None, None].expand(1, 3, 1, 5)
    # 0.0 lies at 127.5, which goes to the even 128.
    assert np.asarray(to_pil(pixels)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_pixels_there_and_back_are_equal():
    image = gradient()
    pixels = pixels_of(image)
    assert pixels.shape == (3, 5, 7) and pixels.dtype == torch.float32
    assert to_pil(pixels[None])[0].tobytes() == image.tobytes()
    assert len(to_pil(pixels.expand(3, -1, -1, -1).bfloat16())) == 3


@pytest.mark.parametrize(
    "pixels", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)]
)
def test_pixels_of_wrong_shape_are_refused(pixels):
    with pytest.raises(RequestError, match="needed"):
        to_pil(pixels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_refused(value):
    with pytest.raises(RequestError, match="not finite"):
        to_pil(torch.full((1, 3, 2, 2), value))


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert back(image).getpixel((0, 0)) == (255, 255, 255)
    assert back(image).getpixel((1, 0)) == (255, 0, 0)
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    palette.info["transparency"] = 0
    assert back(palette).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "HSV", "YCbCr"])
def test_every_usual_mode_becomes_three_channels(mode):
    image = gradient().convert("L") if mode == "LA" else gradient()
    assert pixels_of(image.convert(mode)).shape == (3, 5, 7)


def test_sixteen_bit_gray_is_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert [back(image).getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


def test_floating_point_pixels_are_refused():
    with pytest.raises(RequestError, match="floating-point"):
        Picture.open(Image.new("F", (2, 2)))


def test_rotation_of_a_camera_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    gradient(7, 5).save(tmp_path / "turned.jpg", exif=exif)
    picture = Picture.open(tmp_path / "turned.jpg")
    assert picture.size == (7, 5) and picture.pixels().shape == (3, 7, 5)


def test_resize_is_height_by_width():
    assert Picture.open(gradient()).pixels((16, 32)).shape == (3, 16, 32)
    assert Picture.open(torch.rand(3, 5, 7)).pixels((16, 32)).shape == (3, 16, 32)


def test_mask_is_zeros_and_ones():
    image = Image.new("L", (4, 1))
    image.putdata([0, 127, 128, 255])
    mask = Picture.open(image).mask()
    assert mask.shape == (1, 1, 4) and mask.flatten().tolist() == [0, 0, 1, 1]
    assert set(Picture.open(gradient()).mask((16, 24)).unique().tolist()) <= {0.0, 1.0}
    assert (Picture.open(image).mask(cut=False).flatten() * 255).round().tolist() == [0, 127, 128, 255]


def test_a_hash_is_of_the_pixels(tmp_path):
    gradient().save(tmp_path / "a.png")
    gradient().save(tmp_path / "a.bmp")
    hashes = {Picture.open(source).sha256 for source in (tmp_path / "a.png", tmp_path / "a.bmp", gradient())}
    assert len(hashes) == 1
    assert Picture.open(gradient().transpose(Image.Transpose.TRANSPOSE)).sha256 not in hashes
    assert Picture.open(torch.zeros(3, 2, 3)).sha256 != Picture.open(torch.zeros(3, 3, 2)).sha256


WRONG = {
    "a list": ([1, 2], "image is a list; needed a path"),
    "nothing": (None, "image is a NoneType"),
    "a flat array": (np.zeros(5), "shape"),
    "two channels": (np.zeros((4, 4, 2)), "needed .H, W. or .H, W, C."),
    "planes last": (torch.zeros(5, 4, 3), "needed .H, W. or .C, H, W."),
    "objects": (np.array([["a", "b"]]), "is an array of"),
    "integers": (torch.zeros(4, 4, dtype=torch.int64), "is an array of torch.int64"),
    "complex": (np.zeros((4, 4), np.complex64), "is an array of complex64"),
    "NaN": (torch.full((3, 4, 4), float("nan")), "NaN"),
    "infinity": (np.array([[0.0, np.inf]]), "NaN or infinity"),
    "the other range": (torch.linspace(-1, 1, 12).view(3, 2, 2), "as diffusers takes them"),
    "levels as floats": (np.full((4, 4), 255.0), "from 255 to 255"),
    "empty": (np.zeros((0, 4)), "needed at least one"),
    "an empty image": (Image.new("RGB", (0, 3)), "needed at least one"),
    "four gigapixels": (np.broadcast_to(np.uint8(0), (1 << 16, 1 << 16)), "65536x65536 pixels"),
    "no file": ("none.png", "none.png: not found"),
    "moving": (moving, "2 frames; needed one picture"),
    "cut": (cut_jpeg, "cannot be read .*truncated"),
    "script": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage", "it is no picture"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_picture_is_one_clear_line(tmp_path, name):
    source, message = WRONG[name]
    if callable(source):
        (tmp_path / "bad").write_bytes(source())
        source = tmp_path / "bad"
    with pytest.raises(RequestError, match=message) as caught:
        Picture.open(source)
    assert "\n" not in str(caught.value)
