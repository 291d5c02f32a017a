"""What a call gives back: files that carry what drew them, by `Result.save` and by each picture's own `save`."""

import copy
import io
import os
import pickle

import pytest
from PIL import Image

from s3dit import Pipeline, Request, RequestError
from s3dit.inputs.image_metadata import read_metadata
from s3dit.inputs.save_image import save_picture

WANTED = {"prompt": "a red star", "seed": 7, "height": 64, "width": 64, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", dtype="fp32", residency="resident")


@pytest.fixture(scope="module")
def result(pipe):
    return pipe(**WANTED, num_images_per_prompt=2)


def test_save_writes_every_picture_with_what_drew_it(result, tmp_path):
    paths = result.save(tmp_path / "new" / "star.webp")
    assert [path.name for path in paths] == ["star-1.webp", "star-2.webp"]
    for path, metadata in zip(paths, result.metadata, strict=True):
        assert read_metadata(path) == metadata
    assert [metadata["seed"] for metadata in result.metadata] == [7, 8]


def test_one_picture_takes_the_name_that_is_given(pipe, tmp_path):
    (path,) = pipe(**WANTED).save(str(tmp_path / "star.png"))
    assert path == tmp_path / "star.png"
    again = pipe(Request.from_json({k: v for k, v in read_metadata(path).items() if k not in ("engine", "model")}))
    assert list(again.images[0].getdata()) == list(Image.open(path).getdata())


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp"])
def test_a_picture_s_own_save_keeps_what_drew_it(result, tmp_path, name):
    result.images[1].save(tmp_path / name)
    assert read_metadata(tmp_path / name) == result.metadata[1]


def test_save_into_memory_and_with_pillow_s_arguments(result, tmp_path):
    file = io.BytesIO()
    result.images[0].save(file, format="PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    assert read_metadata(tmp_path / "a.png") == result.metadata[0]
    with open(tmp_path / "b.jpg", "wb") as out:
        result.images[0].save(out, quality=50)
    assert read_metadata(tmp_path / "b.jpg") == result.metadata[0]
    result.images[0].save(tmp_path / "a.bmp")
    assert list(Image.open(tmp_path / "a.bmp").getdata()) == list(result.images[0].getdata())


def test_no_metadata_where_none_is_wanted(result, tmp_path):
    save_picture(result.images[0], tmp_path / "a.png")
    with pytest.raises(RequestError, match="carries no s3dit metadata"):
        read_metadata(tmp_path / "a.png")
    result.images[0].resize((32, 32)).save(tmp_path / "b.png")
    with pytest.raises(RequestError, match="carries no s3dit metadata"):
        read_metadata(tmp_path / "b.png")


def test_pictures_are_pillow_s(result):
    picture = result.images[0]
    assert isinstance(picture, Image.Image) and picture.size == (64, 64) and picture.copy() == picture.copy()
    assert picture.crop((0, 0, 8, 8)).size == (8, 8) and picture.convert("L").mode == "L"


def test_tensors_are_saved_and_latents_are_not(pipe, tmp_path):
    as_pil, as_tensor, latent = (pipe(**WANTED, output_type=kind) for kind in ("pil", "tensor", "latent"))
    (path,) = as_tensor.save(tmp_path / "a.png")
    assert list(Image.open(path).getdata()) == list(as_pil.images[0].getdata())
    with pytest.raises(RequestError, match="there are latents and no pictures"):
        latent.save(tmp_path / "b.png")
    with pytest.raises(RequestError, match="needed a name that ends in"):
        as_pil.save(tmp_path / "b")


def test_copies_and_pickles_carry_it(result, tmp_path):
    picture = result.images[1]
    copies = [copy.copy(picture), copy.deepcopy(picture), picture.copy(), pickle.loads(pickle.dumps(picture))]
    copies.append(copy.deepcopy(result).images[1])
    for i, again in enumerate(copies):
        again.save(tmp_path / f"{i}.png")
        assert read_metadata(tmp_path / f"{i}.png") == result.metadata[1]
        assert again.tobytes() == picture.tobytes()
    assert picture.metadata is not result.metadata[1]
    copies[0].metadata = None
    copies[0].save(tmp_path / "none.png")
    with pytest.raises(RequestError, match="carries no s3dit metadata"):
        read_metadata(tmp_path / "none.png")


def test_a_name_in_bytes_and_a_place_that_is_no_name(result, tmp_path):
    result.images[0].save(os.fsencode(tmp_path / "a.png"))
    assert read_metadata(tmp_path / "a.png") == result.metadata[0]
    with pytest.raises(RequestError, match="path is a BytesIO; needed a file name"):
        result.save(io.BytesIO())
