"""Noise to the bit: of pictures alone, and of batches as other programs draw them."""

import numpy as np
import pytest
import torch

from s3dit.errors import RequestError
from s3dit.inputs import noise
from s3dit.model.layout import patchify
from s3dit.request import Request

GRID = (3, 5)


def first(**fields):
    """The noise that a request's pictures start from, (tokens, 64)."""
    request = Request(prompt="", **fields)
    return noise.draw([GRID] * request.count, noise.sources(request))


def later(rounds, **fields):
    """What stochastic solvers add in so many steps."""
    request = Request(prompt="", **fields)
    sources = noise.of_steps(request, noise.sources(request))
    return [noise.draw([GRID] * request.count, sources) for _ in range(rounds)]


def patches(batch):
    return torch.cat([patchify(latent) for latent in batch])


@pytest.mark.parametrize("convention", ["comfyui", "diffusers"])
@pytest.mark.parametrize("count", [1, 4])
def test_the_first_noise_is_a_batch_of_one_generator(convention, count):
    """`torch.manual_seed(seed)` and one `torch.randn` of (pictures, 16, H/8, W/8), as ComfyUI's `prepare_noise`."""
    expected = torch.randn(count, 16, 6, 10, generator=torch.manual_seed(7), dtype=torch.float32)
    found = first(seed=7, convention=convention, num_images_per_prompt=count)
    assert torch.equal(found, patches(expected))


def test_by_itself_every_picture_has_a_seed():
    found = first(seed=7, num_images_per_prompt=3)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    assert torch.equal(found, patches([torch.randn(16, 6, 10, generator=each) for each in generators]))


def test_the_noise_of_steps_is_comfyui_s_on_a_cpu():
    """Its `default_noise_sampler` takes seed + 1 there, and draws a batch in each step."""
    generator = torch.Generator().manual_seed(8)
    expected = [patches(torch.randn(2, 16, 6, 10, generator=generator)) for _ in range(3)]
    found = later(3, seed=7, convention="comfyui", num_images_per_prompt=2)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_part_of_a_batch(place):
    """In every round what the whole batch draws."""
    options = {"seed": 7, "convention": "diffusers"}
    whole = later(3, num_images_per_prompt=4, **options)
    part = later(3, num_images_per_prompt=2, batch_place=[place, 4], **options)
    tokens = GRID[0] * GRID[1]
    assert all(torch.equal(a[place * tokens : (place + 2) * tokens], b) for a, b in zip(whole, part, strict=True))


def test_a_seed_a_prompt_is_a_batch_a_prompt():
    request = Request(prompt=["a", "b"], seed=[7, 3], num_images_per_prompt=2, convention="comfyui")
    assert request.seeds() == [7, 7, 3, 3] and noise.places(request) == [(0, 2), (1, 2)] * 2
    found = noise.draw([GRID] * 4, noise.sources(request))
    batches = [torch.randn(2, 16, 6, 10, generator=torch.manual_seed(seed)) for seed in (7, 3)]
    assert torch.equal(found, patches(torch.cat(batches)))


def test_a_batch_without_room_is_refused():
    request = Request(prompt="", seed=1, num_images_per_prompt=3, convention="comfyui", batch_place=(2, 4))
    with pytest.raises(RequestError, match="room for 2 of 3 pictures; needed a batch of at least 5, such as 2,5"):
        noise.sources(request)
    assert Request(prompt="", batch_place=np.array([1, 4])).batch_place == [1, 4]
