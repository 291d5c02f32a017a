"""Image files of strangers: every format is read, and whatever is wrong with one is a RequestError."""

import contextlib
import os
import random
import struct
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent))
from image_bytes import METADATA, chunk, gradient, kinds, mutant, png, written  # noqa: E402

from s3dit.errors import RequestError  # noqa: E402
from s3dit.inputs.image_files import DAMAGED  # noqa: E402
from s3dit.inputs.image_metadata import read_metadata  # noqa: E402
from s3dit.inputs.images import Picture  # noqa: E402
from s3dit.inputs.save_image import save_png  # noqa: E402


def test_what_a_camera_writes_is_one_picture(tmp_path):
    """An MPO holds more pictures behind the photograph."""
    gradient(16, 16).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    assert Picture.open(tmp_path / "a.jpg").size == (16, 16)


@pytest.mark.parametrize("name", kinds())
@pytest.mark.sampled(4)
def test_every_form_is_read_and_its_damage_raises_nothing_but_request_errors(tmp_path, name, capfd):
    path, rng, good = tmp_path / "a", random.Random(0), kinds()[name]
    path.write_bytes(good)
    assert Picture.open(path).size in ((30, 40), (40, 30), (3, 4), (18, 24))
    for _ in range(40):
        path.write_bytes(mutant(good, rng))
        for read in (Picture.open, read_metadata):
            with contextlib.suppress(RequestError):
                read(path)
    # libtiff would print what it minds.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", DAMAGED)
def test_whatever_a_decoder_raises_is_a_request_error(tmp_path, monkeypatch, error):
    gradient().save(tmp_path / "a.png")

    def fail(*args, **options):
        raise error("deep inside\nof it") if error is not UnicodeDecodeError else error

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(RequestError, match="a.png"):
        Picture.open(tmp_path / "a.png")


def test_a_header_that_claims_more_than_there_is(tmp_path):
    """Else black rows would be taken for a picture, and hundreds of megabytes."""
    path, data = tmp_path / "a", bytearray(written("TIFF", Image.new("L", (40, 30)).convert("I;16")))
    for at in range(len(data) - 12):
        # The tag of the height, and its value.
        if data[at : at + 2] == b"\x01\x01" and data[at + 8] == 30:
            data[at + 8 : at + 12] = struct.pack("<I", 9000)
    path.write_bytes(data)
    with pytest.raises(RequestError, match="holds less than its 40x9000 pixels"):
        Picture.open(path)
    path.write_bytes(png(width=4000, height=4000))
    with pytest.raises(RequestError, match="4000x4000 pixels in [0-9]+ bytes"):
        Picture.open(path)
    # The flattest that there is.
    for mode in ("1", "P", "L", "RGB", "LA"):
        Image.new(mode, (4000, 4000)).save(path, "PNG")
        assert Picture.open(path).size == (4000, 4000)


def test_texts_that_would_fill_the_memory(tmp_path):
    """Pillow takes 60 of these, 64 KB on disk, for 244 MB."""
    text = zlib.compress(("x" * ((1 << 20) - 4) + "\U0001f600").encode(), 9)
    for count in (15, 16):
        (tmp_path / "a.png").write_bytes(png(*(chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + text) for i in range(count))))
        for read, words in ((Picture.open, None), (read_metadata, "no s3dit metadata")):
            with (
                pytest.raises(RequestError, match="16 compressed texts")
                if count > 15
                else (pytest.raises(RequestError, match=words) if words else contextlib.nullcontext())
            ):
                read(tmp_path / "a.png")


def test_special_files_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        for read in (Picture.open, read_metadata):
            with pytest.raises(RequestError, match="cannot be read .it is a"):
                read(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for read in (read_metadata, Picture.open):
        with pytest.raises(RequestError, match="not found"):
            read(tmp_path / "none.png")
        with pytest.raises(RequestError, match="cannot be read"):
            read(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_pictures_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width=1 << 14, height=1 << 13))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    with pytest.raises(RequestError, match="16384x8192"):
        Picture.open(path)
    path.write_bytes(png(width=1 << 20, height=1 << 20))
    with pytest.raises(RequestError, match="1099511627776 pixels; needed at most 67,108,864"):
        Picture.open(path)


def test_broken_files_raise_nothing_but_request_errors(tmp_path):
    path = tmp_path / "a.png"
    save_png(gradient(40, 30), path, METADATA)
    good, rng = path.read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        for read in (read_metadata, Picture.open):
            with contextlib.suppress(RequestError):
                read(path)
