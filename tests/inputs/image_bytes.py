"""Image files as bytes for tests: small ones of every format, damaged ones, and PNGs chunk by chunk."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from s3dit.inputs.images import Picture, to_pil


def gradient(width=7, height=5):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 30, y * 40, x + y], axis=-1).astype(np.uint8))


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


def moving():
    """An animated GIF's bytes."""
    file = io.BytesIO()
    gradient().save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (7, 5))])
    return file.getvalue()


def cut_jpeg():
    file = io.BytesIO()
    gradient(70, 50).save(file, "JPEG")
    return file.getvalue()[:-200]


def pixels_of(source):
    return Picture.open(source).pixels()


def back(source):
    """The picture that pixels of an input make."""
    return to_pil(pixels_of(source)[None])[0]
