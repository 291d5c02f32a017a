"""Pictures and files: conversions to the value, files whole or not at all, metadata there and back."""

import contextlib
import io
import json
import os
import random
import stat
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from s3dit.errors import RequestError
from s3dit.inputs import images
from s3dit.inputs.images import Picture, ansi, contact_sheet, read_metadata, save_picture, save_png, to_pil
from s3dit.request import Request
from s3dit.values import one_by_one


def pixels_of(source):
    return Picture.open(source).pixels()


def back(source):
    """The picture that pixels of an input make."""
    return to_pil(pixels_of(source)[None])[0]


def gradient(width=7, height=5):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 30, y * 40, x + y], axis=-1).astype(np.uint8))


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


ARRAYS = {
    "8 bits": lambda levels: levels,
    "16 bits": lambda levels: levels.astype(np.uint16) * 257,
    "half": lambda levels: (levels / 255).astype(np.float16),
    "single": lambda levels: (levels / 255).astype(np.float32),
    "double, read only": lambda levels: np.broadcast_to(levels / 255, levels.shape),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_arrays_and_tensors_are_the_picture_that_they_hold(kind, channels):
    levels = np.asarray(gradient().convert({0: "L", 1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    expected = np.asarray(Image.fromarray(levels).convert("RGB"))
    array = ARRAYS[kind](levels if channels != 1 else levels[..., None])
    # A half has 11 bits: 255 levels come back.
    assert np.array_equal(np.asarray(back(array)), expected)
    if array.dtype != np.uint16:
        tensor = torch.from_numpy(array.copy())
        tensor = tensor.movedim(2, 0) if channels else tensor
        assert np.array_equal(np.asarray(back(tensor)), expected)


def test_transparent_floats_are_laid_over_white():
    pixels = pixels_of(torch.tensor([1.0, 0.0, 0.0, 0.25])[:, None, None])
    assert torch.allclose(pixels.flatten(), torch.tensor([1.0, 0.5, 0.5]))


def test_a_bool_array_is_a_mask():
    assert Picture.open(np.array([[True, False]])).mask().flatten().tolist() == [1, 0]


def test_a_batch_is_several_pictures():
    assert len(one_by_one(np.zeros((3, 4, 4, 3)))) == 3 == len(one_by_one(torch.zeros(3, 3, 4, 4)))
    assert one_by_one("a.png") == "a.png" and one_by_one(np.zeros((4, 4))).shape == (4, 4)


def test_a_hash_is_of_the_pixels(tmp_path):
    gradient().save(tmp_path / "a.png")
    gradient().save(tmp_path / "a.bmp")
    hashes = {Picture.open(source).sha256 for source in (tmp_path / "a.png", tmp_path / "a.bmp", gradient())}
    assert len(hashes) == 1
    assert Picture.open(gradient().transpose(Image.Transpose.TRANSPOSE)).sha256 not in hashes
    assert Picture.open(torch.zeros(3, 2, 3)).sha256 != Picture.open(torch.zeros(3, 3, 2)).sha256


def moving():
    """An animated GIF's bytes."""
    file = io.BytesIO()
    gradient().save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (7, 5))])
    return file.getvalue()


def cut_jpeg():
    file = io.BytesIO()
    gradient(70, 50).save(file, "JPEG")
    return file.getvalue()[:-200]


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


def test_what_a_camera_writes_is_one_picture(tmp_path):
    """An MPO holds more pictures behind the photograph."""
    gradient(16, 16).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    assert Picture.open(tmp_path / "a.jpg").size == (16, 16)


def written(form, image=None, **options):
    file = io.BytesIO()
    (image or gradient(40, 30)).save(file, form, **options)
    return file.getvalue()


def described():
    """Exif as save_picture writes it, and a turn."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 's3dit:{"prompt": "a fox"}'
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0\0a"
    return exif


def kinds():
    """Small files of every form that is read, by name: bytes."""
    image, text = gradient(40, 30), PngInfo()
    gray, clear = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), image.convert("RGBA")
    text.add_text("s3dit", '{"prompt": "a fox"}')
    text.add_text("z", "x" * 300, zip=True)
    exif, icc = described(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rich = {"exif": exif, "icc_profile": icc}
    return {
        "PNG": written("PNG", pnginfo=text, **rich),
        "PNG palette": written("PNG", image.convert("P"), transparency=3),
        "PNG 16": written("PNG", gray),
        "JPEG": written("JPEG", **rich),
        "JPEG progressive": written("JPEG", image.convert("CMYK"), progressive=True),
        "MPO": written("MPO", save_all=True, append_images=[image]),
        "WEBP": written("WEBP", **rich),
        "WEBP lossless": written("WEBP", clear, lossless=True),
        "AVIF": written("AVIF", clear, **rich),
        "GIF": written("GIF"),
        "BMP": written("BMP"),
        "BMP palette": written("BMP", image.convert("P")),
        "TIFF": written("TIFF", exif=exif),
        "TIFF 16": written("TIFF", gray),
        "TIFF LZW": written("TIFF", compression="tiff_lzw"),
        "TIFF fax": written("TIFF", image.convert("1"), compression="group4"),
        "TIFF JPEG": written("TIFF", compression="jpeg"),
        "PPM": written("PPM"),
        "PPM plain": b"P3\n4 3\n255\n" + b" ".join(b"%d" % i for i in range(36)),
        "TGA": written("TGA", rle=True),
        "JPEG2000": written("JPEG2000", tile_size=(16, 16)),
        "JPEG2000 bare": written("JPEG2000", clear, no_jp2=True),
        "ICO": written("ICO", sizes=[(16, 16), (24, 24)], bitmap_format="bmp"),
    }


EXTREMES = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff", b"\0\1\0\0", b"\x80\0\0\0"]


def mutant(good, rng):
    """A file with a few bytes changed, put in, taken out, or cut."""
    data, head = bytearray(good), rng.choice([60, 400, len(good)])
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        i, how = rng.randrange(min(len(data), head)), rng.random()
        if how < 0.6:
            data[i] = rng.randrange(256)
        elif how < 0.8:
            one = rng.choice(EXTREMES)
            data[i : i + len(one)] = one
        elif how < 0.9:
            data[i:i] = data[: rng.randrange(1, 40)]
        else:
            data = data[: rng.randrange(1, len(data) + 1)]
    return sealed(data) if data.startswith(b"\x89PNG") and rng.random() < 0.8 else bytes(data)


def sealed(data):
    """A PNG whose checksums are right again, so that what is in its chunks is read."""
    out, i = bytearray(data[:8]), 8
    while i + 8 <= len(data) and (length := struct.unpack(">I", data[i : i + 4])[0]) < len(data):
        out += chunk(bytes(data[i + 4 : i + 8]), bytes(data[i + 8 : i + 8 + length]))
        i += 12 + length
    return bytes(out)


@pytest.mark.parametrize("name", kinds())
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


@pytest.mark.parametrize("error", images.DAMAGED)
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


METADATA = {
    "prompt": "a red fox, “quoted”\nsecond line, 狐",
    "negative_prompt": "blur",
    "num_inference_steps": 8,
    "guidance_scale": 2.5,
    "seed": 2**63 - 1,
    "solver": "euler",
    "model": "Z-Image-Turbo",
    "sigmas": [1.0, 0.1 + 0.2],
}


def test_metadata_there_and_back(tmp_path):
    path = tmp_path / "fox.png"
    save_png(gradient(), path, METADATA)
    assert read_metadata(path) == METADATA
    with Image.open(path) as image:
        assert image.tobytes() == gradient().tobytes()
        text = image.info["parameters"]
    assert text == (
        f"{METADATA['prompt']}\nNegative prompt: blur\n"
        "Steps: 8, Sampler: euler, CFG scale: 3.5, Seed: 9223372036854775807, Size: 7x5, Model: Z-Image-Turbo"
    )


def test_a_request_comes_back(tmp_path):
    request = Request(prompt="fox", seed=3, num_inference_steps=4, sigmas=[1.0, 0.7, 0.4, 0.1])
    save_png(gradient(), tmp_path / "a.png", request.to_json())
    assert Request.from_json(read_metadata(tmp_path / "a.png")) == request


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp"])
def test_every_form_carries_what_made_it(tmp_path, ending):
    path = tmp_path / "new" / f"fox.{ending}"
    save_picture(gradient(40, 30), path, METADATA)
    assert read_metadata(path) == METADATA
    with Image.open(path) as image:
        form = image.format
        shown = image.info.get("parameters") or image.getexif().get_ifd(0x8769)[0x9286]
        exact = np.array_equal(np.asarray(image), np.asarray(gradient(40, 30)))
    if form != "PNG":
        # As AUTOMATIC1111's own files have it, for galleries.
        assert shown.startswith(b"UNICODE\0")
        shown = shown[8:].decode("utf-16-be")
    assert shown == images.texts(METADATA, (40, 30))["parameters"]
    assert form == {"png": "PNG", "webp": "WEBP"}.get(ending, "JPEG") and exact == (form != "JPEG")
    assert Picture.open(path).size == (30, 40)
    save_picture(gradient(40, 30), path)
    with pytest.raises(RequestError, match="no s3dit metadata"):
        read_metadata(path)


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


def test_descriptions_of_other_programs_are_not_ours(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = '{"prompt": "a fox"}'
    gradient().save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(RequestError, match="no s3dit metadata"):
        read_metadata(tmp_path / "a.jpg")


def test_a_folder_whose_name_is_no_text(tmp_path):
    data = {"prompt": "fox", "model": "Z\udcff"}
    save_picture(gradient(), tmp_path / "a.png", data)
    assert read_metadata(tmp_path / "a.png") == data


def test_without_metadata_there_is_no_text(tmp_path):
    save_png(gradient(), tmp_path / "plain.png")
    with Image.open(tmp_path / "plain.png") as image:
        assert image.info == {}


NOT_JSON = {"NaN": {"x": float("nan")}, "object": {"x": object()}, "long": {"x": "y" * (1 << 21)}, "key": {(1, 2): 1}}


@pytest.mark.parametrize("metadata", NOT_JSON.values(), ids=NOT_JSON)
def test_metadata_that_is_not_json_is_refused_before_writing(tmp_path, metadata):
    with pytest.raises(RequestError, match="metadata"):
        save_png(gradient(), tmp_path / "a.png", metadata)
    assert list(tmp_path.iterdir()) == []


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


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks, width=1, height=1):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(b"\0" * 4))
        + chunk(b"IEND", b"")
    )


BAD = {
    "no PNG": b"hello",
    "empty": b"",
    "plain": png(),
    "not JSON": png(chunk(b"tEXt", b"s3dit\0{")),
    "a list": png(chunk(b"tEXt", b"s3dit\0[1]")),
    "NaN": png(chunk(b"tEXt", b's3dit\0{"seed": NaN}')),
    "deep": png(chunk(b"tEXt", b"s3dit\0" + b"[" * 200_000)),
    "long": png(chunk(b"tEXt", b"s3dit\0" + b" " * (1 << 21))),
    "text bomb": png(chunk(b"zTXt", b"s3dit\0\0" + zlib.compress(b" " * (1 << 27)))),
    "huge": png(chunk(b"tEXt", b"s3dit\0{"), width=1 << 20, height=1 << 20),
    "cut": png(chunk(b"tEXt", b"s3dit\0{}"))[:40],
}


@pytest.mark.parametrize("name", BAD)
def test_files_without_good_metadata_are_refused(tmp_path, name):
    path = tmp_path / "bad.png"
    path.write_bytes(BAD[name])
    with pytest.raises(RequestError, match=r"bad\.png: .*(needed|take)") as caught:
        read_metadata(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for read in (read_metadata, Picture.open):
        with pytest.raises(RequestError, match="not found"):
            read(tmp_path / "none.png")
        with pytest.raises(RequestError, match="cannot be read"):
            read(tmp_path)


def test_a_jpeg_is_no_source_of_metadata(tmp_path):
    gradient().save(tmp_path / "a.png", "JPEG")
    with pytest.raises(RequestError, match="needed a PNG"):
        read_metadata(tmp_path / "a.png")


def test_metadata_of_other_programs_is_not_ours(tmp_path):
    text = PngInfo()
    text.add_text("parameters", "a fox\nSteps: 8")
    gradient().save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(RequestError, match="no s3dit metadata"):
        read_metadata(tmp_path / "a.png")


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


def test_contact_sheet():
    sheet = contact_sheet([gradient(), gradient(3, 9), gradient()], gap=2)
    assert sheet.size == (7 * 2 + 2, 9 * 2 + 2)
    assert sheet.getpixel((0, 0)) == (255, 255, 255) and sheet.getpixel((6, 2)) == gradient().getpixel((6, 0))
    assert contact_sheet([gradient()] * 3, columns=3, gap=0).size == (21, 5)
    assert contact_sheet([gradient()], columns=9).size == (7, 5)
    for images_, columns in (([], None), ([gradient()], 0)):
        with pytest.raises(RequestError):
            contact_sheet(images_, columns)


def test_ansi_draws_two_pixels_a_character():
    image = Image.new("RGB", (2, 2))
    image.putdata([(1, 2, 3), (1, 2, 3), (4, 5, 6), (7, 8, 9)])
    assert ansi(image) == "\x1b[38;2;1;2;3;48;2;4;5;6m▀\x1b[38;2;1;2;3;48;2;7;8;9m▀\x1b[0m\n"
    wide = ansi(gradient(200, 100), 40)
    assert wide.count("▀") == 40 * 10 and wide.count("\n") == 10
    assert ansi(gradient(300, 1)).count("\n") == 1


def test_limits_hold_for_what_is_written(tmp_path):
    # What save_png accepts, read_metadata must take back: Pillow limits text of its own.
    longest = {"prompt": "x" * (images.LARGEST_TEXT - len(json.dumps({"prompt": ""})))}
    save_png(gradient(), tmp_path / "a.png", longest)
    assert read_metadata(tmp_path / "a.png") == longest
