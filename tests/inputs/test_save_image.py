"""Files are written whole or not at all, in the format and quality that was asked for."""

import os
import stat
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent))
from image_bytes import gradient  # noqa: E402

from s3dit.errors import RequestError  # noqa: E402
from s3dit.inputs.image_metadata import read_metadata  # noqa: E402
from s3dit.inputs.images import Picture  # noqa: E402
from s3dit.inputs.save_image import save_picture, save_png  # noqa: E402


def test_quality_is_of_jpeg_and_webp(tmp_path):
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    for ending in ("jpg", "webp"):
        sizes = []
        for quality in (10, 60, None):
            save_picture(image, tmp_path / f"a.{ending}", quality=quality)
            sizes.append((tmp_path / f"a.{ending}").stat().st_size)
        assert sizes == sorted(set(sizes))
    for name, quality in (("a.png", 90), ("a.jpg", 0), ("a.webp", 101)):
        with pytest.raises(RequestError, match=f"quality is {quality}"):
            save_picture(image, tmp_path / name, quality=quality)


def test_what_a_form_cannot_hold(tmp_path):
    for name, words in (("a.gif", "says no format"), ("a", "says no format")):
        with pytest.raises(RequestError, match=words):
            save_picture(gradient(), tmp_path / name)
    with pytest.raises(RequestError, match="needed at most 16,383 a side for WEBP"):
        save_picture(Image.new("RGB", (16384, 1)), tmp_path / "a.webp")
    long = {"prompt": "x" * 30_000}
    with pytest.raises(RequestError, match="needed at most 65,533 for JPEG"):
        save_picture(gradient(), tmp_path / "a.jpg", long)
    assert list(tmp_path.iterdir()) == []
    save_picture(gradient(), tmp_path / "a.webp", long)
    assert read_metadata(tmp_path / "a.webp") == long
    save_picture(gradient(), tmp_path / "a.jpg", {"prompt": "x" * 20_000})
    # Transparent pixels become those over white, in forms that have none.
    save_picture(Image.new("RGBA", (8, 8)), tmp_path / "b.jpg")
    assert Image.open(tmp_path / "b.jpg").getpixel((0, 0)) == (255, 255, 255)


def test_saving_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / ("n" * 250 + ".png")
    path.write_bytes(b"old")
    save_png(gradient(), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert Picture.open(path).size == (5, 7)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(self, file, *args, **kwargs):
        file.write(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RequestError):
        save_png(gradient(), path, {"prompt": "x"})
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == b"old"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "a.png", tmp_path / "folder", tmp_path / "folder" / ("n" * 256)):
        with pytest.raises(RequestError, match="cannot be written") as caught:
            save_png(gradient(), place)
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
