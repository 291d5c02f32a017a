"""Arrays and tensors as pictures: every layout and dtype that diffusers takes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parent))
from image_bytes import back, gradient, pixels_of  # noqa: E402

from s3dit.inputs.images import Picture  # noqa: E402
from s3dit.values import one_by_one  # noqa: E402

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
