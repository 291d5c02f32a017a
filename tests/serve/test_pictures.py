"""Pictures that are sent are checked before they are unpacked; masks mean what OpenAI says; files carry no paths."""

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from s3dit.errors import RequestError
from s3dit.serve.bounds import Limits
from s3dit.serve.errors import ApiError
from s3dit.serve.fields import Fields
from s3dit.serve.forms import Part
from s3dit.serve.pictures import Unpacker, file_of, public, zipped
from s3dit.serve.wanted import wanted


def png(image, form="PNG", **options):
    image.save(data := io.BytesIO(), form, **options)
    return data.getvalue()


RED = Image.new("RGB", (64, 48), "red")
HALF = np.zeros((48, 64, 4), np.uint8)
HALF[:, :32, 3] = 255
BLACK_AND_WHITE = Image.fromarray(np.where(np.arange(64)[None] < 32, 255, 0).repeat(48, 0).astype(np.uint8))


def test_masks():
    """Transparent is painted; without transparency white is; of mask_image white is, whatever is transparent."""
    left = np.where(np.arange(64)[None, :, None] < 32, 255, 0).repeat(48, 0).repeat(3, 2)

    def mask(data, name="mask"):
        return np.asarray(Unpacker(1 << 20).mask(name, data))

    assert (mask(png(Image.fromarray(HALF))) == 255 - left).all()
    assert (mask(png(BLACK_AND_WHITE)) == left).all()
    opaque = BLACK_AND_WHITE.convert("RGBA")
    assert (mask(png(opaque)) == left).all()
    opaque.putalpha(Image.new("L", (64, 48), 0))
    assert (mask(png(opaque), "mask_image") == 255).all() and (mask(png(opaque)) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 3
    assert (mask(png(Image.fromarray(HALF), exif=exif)) == left).all()


def bomb(width, height):
    """A PNG that claims so many pixels and holds none."""
    head = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    chunks = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
                      for k, d in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")))  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 400, "no picture"),
        (b"GIF89a" + b"\0" * 100, 400, "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", 400, "no picture"),
        (png(RED)[:60], 400, "cannot be read"),
        (png(RED, "GIF"), 400, "no picture"),
        (png(RED, "TIFF"), 400, "no picture"),
        (png(RED, "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48))]), 400, "2 frames"),
        (bomb(60_000, 60_000), 400, "3600000000 pixels"),
        (bomb(5000, 5000), 413, "5000x5000; needed at most 1,048,576 pixels"),
        (bomb(1000, 1000), 400, "which cannot be"),
        (b"file:///etc/passwd", 400, "no picture"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(data, status, words):
    with pytest.raises(ApiError) as caught:
        Unpacker(1 << 20).picture("image", data)
    assert caught.value.status == status and words in caught.value.message and caught.value.param == "image"


def test_the_bound_is_of_all_pictures_together():
    unpack = Unpacker(64 * 48 * 2)
    unpack.picture("image", png(RED))
    unpack.picture("image", png(RED, "JPEG"))
    with pytest.raises(ApiError):
        unpack.picture("image", png(Image.new("RGB", (1, 1))))


FIELDS = Fields("tiny", Limits(images=4))


@pytest.mark.parametrize(
    ("names", "more", "sees", "found"),
    [
        (["image"], {}, False, ["image"]),
        (["image", "mask"], {}, False, ["image", "mask_image"]),
        (["image[]"], {"strength": 0.5}, True, ["image"]),
        (["image[]", "image[]"], {}, True, ["reference", "reference"]),
        (["image[]", "image[]", "mask"], {}, True, ["image", "mask_image", "reference"]),
        (["image", "reference", "reference_image"], {"strength": 0.5}, True, ["image", "reference", "reference"]),
        (["image", "image"], {}, False, "looks at no references"),
        (["image", "reference"], {}, False, "looks at no references"),
        (["image", "mask", "mask_image"], {}, False, "two masks"),
        (["mask"], {}, False, "mask_image is given without a start image"),
        (["image"] * 5, {}, True, "needed at most 4"),
    ],
)  # fmt: skip
def test_pictures_have_their_places(names, more, sees, found):
    parts = [Part(name, png(BLACK_AND_WHITE if "mask" in name else RED), True) for name in names]
    given = FIELDS.checked({"prompt": "x"} | more, "edits")
    if isinstance(found, str):
        with pytest.raises(ApiError) as caught:
            wanted(FIELDS, given, parts, sees)
        assert found.replace("mask_image", "mask") in caught.value.message
        return
    request = wanted(FIELDS, given, parts, sees).request
    held = {"image": request.image, "mask_image": request.mask_image, "reference": request.reference}
    assert {name: held[name] is not None for name in held} == {name: name in found for name in held}
    assert found.count("reference") == len(request.reference or ())


def test_an_edit_without_a_size_has_that_of_its_picture():
    """So it is refused before anything is planned with it: pixels in all, and sides."""
    fields = Fields("tiny", Limits(pixels=64 * 32))
    given = fields.checked({"prompt": "x"}, "edits")
    with pytest.raises(ApiError, match="3,072 pixels in all; needed at most 2,048"):
        wanted(fields, given, [Part("image", png(RED), True)], False)
    assert wanted(fields, given, [Part("image", png(RED.crop((0, 0, 79, 31))), True)], False)
    with pytest.raises(ApiError, match="a side of 80 pixels; needed at most 64"):
        wanted(Fields("tiny", Limits(side=64)), given, [Part("image", png(Image.new("RGB", (16, 80))), True)], False)


def test_files():
    for form, quality in (("png", None), ("jpeg", None), ("jpeg", 0), ("jpeg", 100), ("webp", 0), ("webp", None)):
        with Image.open(io.BytesIO(file_of(RED, {"prompt": "x"}, form, quality))) as image:
            assert image.format == form.upper() and image.size == RED.size
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    sizes = [len(file_of(noise, None, "jpeg", quality)) for quality in (0, 50, 95, 100)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] and sizes[2] == len(file_of(noise, None, "jpeg", None))
    both = zipped([b"one", b"two"], "png")
    assert both == zipped([b"one", b"two"], "png")
    with zipfile.ZipFile(io.BytesIO(both)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {"1.png": b"one", "2.png": b"two"}
    with pytest.raises(RequestError):
        file_of(RED, {"prompt": "x" * 70_000}, "jpeg", None)


def test_metadata_name_no_folder():
    metadata = {"prompt": "x", "adapters": [{"file": "/srv/secret/style.safetensors", "scale": 1.0}]}
    assert public(metadata)["adapters"] == [{"file": "style.safetensors", "scale": 1.0}]
    assert metadata["adapters"][0]["file"].startswith("/srv") and public({"prompt": "x"}) == {"prompt": "x"}
    error = ApiError(500, "/srv/models/x/config.json: 'C:\\models\\y.bin' not found; see /v1/options, a/b and and/or")
    assert error.body()["error"]["message"] == "config.json: 'y.bin' not found; see /v1/options, a/b and and/or"
