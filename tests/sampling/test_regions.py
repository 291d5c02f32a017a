"""The blend of velocities against plain loops in float64."""

import pytest
import torch

from s3dit.sampling.guidance import Guidance, guide
from s3dit.sampling.regions import Copy, RegionBlend

GRIDS = [(2, 3), (4, 2)]


@pytest.fixture
def copies():
    """Three copies of the first picture, one rolled, and one of the second; shares of each sum to 1."""
    raw = torch.rand(3, 6, 64, generator=torch.Generator().manual_seed(0))
    shares = raw / raw.sum(0)
    first = [Copy(0, share, roll) for share, roll in zip(shares, [(0, 0), (1, -1), (0, 5)], strict=True)]
    return [first[0], Copy(1, torch.ones(8, 64)), *first[1:]]


def test_every_copy_is_the_picture_rolled(copies):
    x = torch.arange(14.0)[:, None]
    pieces = RegionBlend(copies, GRIDS, "cpu").spread(x).split([6, 8, 6, 6])
    assert torch.equal(pieces[0], x[:6]) and torch.equal(pieces[1], x[6:])
    # What stands in row r and column c of the picture stands in row r + 1 and column c - 1 of this copy.
    for r in range(2):
        for c in range(3):
            assert pieces[2].view(2, 3)[(r + 1) % 2, (c - 1) % 3] == x[3 * r + c]


def test_the_blend_is_the_weighted_mean_where_tokens_stand_in_the_picture(copies):
    generator = torch.Generator().manual_seed(1)
    velocity = torch.randn(26, 64, generator=generator)
    blended = RegionBlend(copies, GRIDS, "cpu").blend(velocity, torch.zeros(14, 64))
    assert torch.equal(blended[6:], velocity[6:14])
    parts = [(copies[0], velocity[:6]), (copies[2], velocity[14:20]), (copies[3], velocity[20:])]
    for r in range(2):
        for c in range(3):
            want = torch.zeros(64, dtype=torch.float64)
            for copy, v in parts:
                at = (r + copy.roll[0]) % 2 * 3 + (c + copy.roll[1]) % 3
                want += copy.shares[3 * r + c].double() * v[at].double()
            # Three products and two sums in fp32.
            assert (blended[3 * r + c].double() - want).abs().max() < 5 * 2**-24 * velocity.abs().max()


def test_guidance_is_of_the_blend(copies):
    """The negative items are the pictures, once each; a pass without guidance holds the copies alone."""
    blend, seen = RegionBlend(copies, GRIDS, "cpu"), []

    def transformer(x, t, context, control, modulation):
        seen.append((context, len(x)))
        return torch.cat((2 * x[:26], -x[26:]))

    velocity = guide(transformer, lambda guided: guided, Guidance(3.0, 0.0, 0.5), [6, 8], regions=blend)
    x = torch.randn(14, 64, generator=torch.Generator().manual_seed(2))
    # 2 x + 3 (2 x + x), rounded at 11 |x|; shares sum to 1 within a few roundings.
    assert torch.allclose(velocity(x, torch.tensor(0.75)), 11 * x, rtol=1e-5, atol=1e-6)
    assert torch.allclose(velocity(x, torch.tensor(0.25)), 2 * x, rtol=1e-5, atol=1e-6)
    assert seen == [(True, 40), (False, 26)]
