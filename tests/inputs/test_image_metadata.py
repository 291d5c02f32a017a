"""What a picture says about how it was made: there and back, in every format, and refused where it is broken."""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.append(str(Path(__file__).parent))
from image_bytes import METADATA, chunk, gradient, png  # noqa: E402

from s3dit.errors import RequestError  # noqa: E402
from s3dit.inputs.image_metadata import LARGEST_TEXT, read_metadata, texts  # noqa: E402
from s3dit.inputs.images import Picture  # noqa: E402
from s3dit.inputs.save_image import save_picture, save_png  # noqa: E402
from s3dit.request import Request  # noqa: E402


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
    assert shown == texts(METADATA, (40, 30))["parameters"]
    assert form == {"png": "PNG", "webp": "WEBP"}.get(ending, "JPEG") and exact == (form != "JPEG")
    assert Picture.open(path).size == (30, 40)
    save_picture(gradient(40, 30), path)
    with pytest.raises(RequestError, match="no s3dit metadata"):
        read_metadata(path)


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


def test_limits_hold_for_what_is_written(tmp_path):
    # What save_png accepts, read_metadata must take back: Pillow limits text of its own.
    longest = {"prompt": "x" * (LARGEST_TEXT - len(json.dumps({"prompt": ""})))}
    save_png(gradient(), tmp_path / "a.png", longest)
    assert read_metadata(tmp_path / "a.png") == longest
