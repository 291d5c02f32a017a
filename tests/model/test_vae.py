"""The autoencoder against plain formulas, its tiles against the whole, and its refusals."""

import pytest
import torch
import torch.nn.functional as F

from s3dit.model import vae
from s3dit.model.config import VAEConfig
from s3dit.model.tiles import SMALLEST_TILE, feathers
from s3dit.model.vae import (
    SMALL_POSITIONS,
    Attention,
    Autoencoder,
    Downsample,
    GroupNorm,
    Resnet,
    Upsample,
)

SMALL = VAEConfig(3, 3, 4, (8, 16, 16, 16), 1, 2, 0.3611, 0.1159)


def randomized(config=SMALL, seed=0):
    """A model whose norms and biases do something: the defaults of ones and zeros would hide a missing one."""
    torch.manual_seed(seed)
    model = Autoencoder(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def group_norm(x, norm):
    """GroupNorm from its definition, in float64."""
    groups = x.double().unflatten(1, (norm.num_groups, -1))
    mean, var = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, unbiased=False)
    y = ((groups - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
    return y * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]


def silu(x):
    return x / (1 + torch.exp(-x))


def conv(x, layer, padding):
    return F.conv2d(x, layer.weight.double(), layer.bias.double(), padding=padding)


@pytest.mark.parametrize("out", [8, 12])
def test_resnet_is_its_formula(out):
    torch.manual_seed(0)
    block = Resnet(8, out, 2).requires_grad_(False)
    for norm in (block.norm1, block.norm2):
        norm.weight.copy_(noise(norm.weight.numel()))
        norm.bias.copy_(noise(norm.bias.numel(), seed=2))
    x = noise(2, 8, 5, 7)
    h = conv(silu(group_norm(x, block.norm1)), block.conv1, 1)
    h = conv(silu(group_norm(h, block.norm2)), block.conv2, 1)
    shortcut = x.double() if out == 8 else conv(x.double(), block.conv_shortcut, 0)
    # fp32 against float64: a dozen roundings of 6e-8.
    assert relative(block(x), shortcut + h) < 1e-6


@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
def test_norm_is_accurate_in_channels_last(mean):
    norm = GroupNorm(2, 8, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(noise(8))
    norm.bias.copy_(noise(8, seed=2))
    x = (noise(2, 8, 200, 90) + mean).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = norm(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert SMALL_POSITIONS < 200 * 90
    # One rounding of x at its mean is magnified by mean / deviation; torch's own gives 1e-4 to 1e-3 here at mean 30.
    assert relative(y, group_norm(x, norm)) < 1e-7 * (1 + mean)


def in_float64(model, latents):
    """A decode in float64, whose moments torch takes well enough in any layout."""
    wide = Autoencoder(SMALL).requires_grad_(False)
    wide.load_state_dict(model.state_dict())
    return wide.double().decode(latents.double())


def test_biases_that_are_added_last(monkeypatch):
    """As on a GPU: one bias is in the moments of a norm, the other comes with the shortcut. Seen: 3e-7."""
    model = randomized()
    model.memory_format = torch.channels_last
    monkeypatch.setattr(vae, "SMALL_POSITIONS", 0)
    monkeypatch.setattr(vae, "BIAS_APART", ("cpu",))
    latents = noise(2, 4, 24, 20)
    with torch.no_grad():
        decoded, expected = model.decode(latents), in_float64(model, latents)
        assert relative(decoded, expected) < 2e-6
        kept = []
        handle = model.decoder.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *args: kept.append(args[2]))
        watched = model.decode(latents)
        handle.remove()
    assert len(kept) == 1 and relative(watched, expected) < 2e-6


@pytest.mark.parametrize("strip", [1, 5000, 1 << 23])
@pytest.mark.sampled(1)
def test_strips_are_the_whole_picture(strip, monkeypatch):
    """Rows of a strip are normalized by the moments of the picture and see their neighbours: no seam at any height.

    2e-6: fp32 through 20 convolutions (seen: 5e-7); with moments of a strip it would be 0.1.
    """
    monkeypatch.setattr(vae, "STRIP", strip)
    model = randomized()
    model.memory_format = torch.channels_last
    with torch.no_grad():
        latents = noise(2, 4, 20, 33)
        assert SMALL_POSITIONS < 64 * 20 * 33
        assert relative(model.decode(latents), in_float64(model, latents)) < 2e-6


def test_hooks_see_whole_pictures_not_strips(monkeypatch):
    monkeypatch.setattr(vae, "STRIP", 5000)
    model = randomized()
    model.memory_format = torch.channels_last
    block, seen = model.decoder.up_blocks[-1].resnets[-1], []
    with torch.no_grad():
        latents = noise(1, 4, 20, 33)
        plain = model.decode(latents)
        for module in (block.norm1, block.conv1, block.norm2, block.conv2):
            module.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape[2:])))
        assert relative(model.decode(latents), plain) < 2e-6 and seen == [(160, 264)] * 4


@pytest.mark.parametrize("strip", [5000, 1 << 23])
def test_what_a_hook_keeps_is_not_written_over(strip, monkeypatch):
    """The shortcut is added in the memory of the last convolution's output, unless somebody may have kept that."""
    monkeypatch.setattr(vae, "STRIP", strip)
    model, kept = randomized(), []
    model.memory_format = torch.channels_last
    convolution = model.decoder.up_blocks[-1].resnets[-1].conv2
    convolution.register_forward_hook(lambda _, args, out: kept.append((out, out.clone())))
    with torch.no_grad():
        model.decode(noise(1, 4, 20, 33))
    assert torch.equal(*kept[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_channels_last_lasts_to_the_end(batch):
    model, lost = randomized(), []
    model.memory_format = torch.channels_last
    last = torch.channels_last
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _, args, out, name=name: lost.extend([name] * (not out.is_contiguous(memory_format=last)))
            )
    with torch.no_grad():
        model.decode(model.encode(noise(batch, 3, 32, 48)))
    assert lost == []


def test_attention_is_its_formula():
    torch.manual_seed(0)
    block = Attention(8, 2).requires_grad_(False)
    block.group_norm.bias.copy_(noise(8))
    x = noise(2, 8, 3, 5)
    h = group_norm(x, block.group_norm).flatten(2).mT
    q, k, v, out = (
        lambda y, layer=layer: y @ layer.weight.double().T + layer.bias.double()
        for layer in (block.to_q, block.to_k, block.to_v, block.to_out[0])
    )
    weights = torch.softmax(q(h) @ k(h).mT / 8**0.5, dim=-1)
    expected = x.double() + out(weights @ v(h)).mT.reshape(2, 8, 3, 5)
    assert relative(block(x), expected) < 1e-6


def test_downsample_pads_right_and_below_only():
    block = Downsample(1).requires_grad_(False)
    block.conv.weight.zero_()
    block.conv.bias.zero_()
    block.conv.weight[0, 0, 0, 0] = 1
    x = noise(1, 1, 6, 4)
    assert torch.equal(block(x), x[:, :, ::2, ::2])


def test_upsample_repeats():
    block = Upsample(1).requires_grad_(False)
    block.conv.weight.zero_()
    block.conv.bias.zero_()
    block.conv.weight[0, 0, 1, 1] = 1
    x = noise(1, 1, 3, 2)
    assert torch.equal(block(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@torch.inference_mode()
@pytest.mark.parametrize("size", [(70, 90), (65, 64), (1, 4200)])
def test_a_large_picture_is_doubled_by_phases(size):
    """Against float64, which takes nine products a pixel: rounding only, and no more of it than torch's own has."""
    double, x = Upsample(5), noise(2, 5, *size)
    assert 4 * size[0] * size[1] > SMALL_POSITIONS
    found = double(x)
    plain = double.conv(F.interpolate(x, scale_factor=2.0))
    exact = double.double().conv(F.interpolate(x.double(), scale_factor=2.0))
    error, usual = ((one - exact).norm() / exact.norm() for one in (found, plain))
    assert 0 < error < 3e-7 and error < 2 * usual
    assert not torch.equal(found, plain), "the phases were not taken"


def test_shapes_and_scaling():
    model = randomized()
    pixels = noise(2, 3, 40, 24).clamp(-1, 1)
    mean, logvar = model.moments(pixels)
    assert mean.shape == logvar.shape == (2, 4, 5, 3)
    assert logvar.min() >= -30 and logvar.max() <= 20
    latents = model.encode(pixels)
    assert torch.equal(latents, (mean - 0.1159) * 0.3611)
    assert model.decode(latents).shape == (2, 3, 40, 24)
    assert model.factor == 8


def test_two_levels_have_factor_two():
    model = randomized(VAEConfig(3, 3, 4, (8, 16), 1, 2, 1.0, 0.0))
    assert model.factor == 2
    assert model.decode(model.encode(noise(1, 3, 6, 10))).shape == (1, 3, 6, 10)


def test_sample_is_mean_plus_deviation_times_noise():
    model = randomized()
    pixels = noise(2, 3, 16, 16)
    mean, logvar = model.moments(pixels)
    expected = (mean + torch.exp(logvar / 2) * noise(2, 4, 2, 2, seed=9) - 0.1159) * 0.3611
    sample = model.encode(pixels, generator=torch.Generator().manual_seed(9))
    assert relative(sample, expected) < 1e-7


def test_logvar_is_clamped():
    model = randomized()
    model.encoder.conv_out.bias[4:] = torch.tensor([-1e3, 1e3, 0.0, 0.0])
    logvar = model.moments(noise(1, 3, 8, 8))[1]
    assert (logvar[:, 0] == -30).all() and (logvar[:, 1] == 20).all()


def test_items_of_a_batch_do_not_touch():
    model = randomized()
    latents = noise(3, 4, 5, 3)
    alone = torch.cat([model.decode(one[None]) for one in latents])
    # Other blocking of the same sums: rounding only.
    assert relative(model.decode(latents), alone) < 2e-6


@pytest.mark.parametrize("batch", [1, 2])
def test_memory_format_changes_rounding_only(batch):
    model = randomized()
    latents, pixels = noise(batch, 4, 5, 3), noise(batch, 3, 40, 24)
    decoded, encoded = model.decode(latents), model.encode(pixels)
    model.memory_format = torch.channels_last
    # Convolutions in another order of sums, 1e-6 over the depth of the model.
    assert relative(decoded, model.decode(latents)) < 5e-6
    assert relative(encoded, model.encode(pixels)) < 5e-6


def test_dtypes():
    latents, pixels = noise(1, 4, 4, 4), noise(1, 3, 32, 32)
    model = randomized()
    reference = model.decode(latents), model.encode(pixels)
    double = randomized().double()
    assert double.decode(latents.double()).dtype == double.encode(pixels).dtype == torch.float64
    # fp32 against float64 over the whole depth.
    assert relative(reference[0], double.decode(latents)) < 5e-6
    half = randomized().bfloat16()
    for got, exact in zip((half.decode(latents.bfloat16()), half.encode(pixels)), reference, strict=True):
        assert got.dtype == torch.float32
        # bf16 keeps 8 bits: 4e-3 a rounding, over some twenty layers.
        assert relative(got, exact) < 5e-2


def test_gradients_reach_every_parameter():
    model = randomized().requires_grad_(True)
    mean, logvar = model.moments(noise(2, 3, 16, 16))
    model.decode((mean - 0.1159) * 0.3611 + 0 * logvar).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


@pytest.mark.parametrize(("cells", "tile"), [(8, 8), (9, 8), (15, 8), (16, 8), (33, 8), (47, 13), (100, 32)])
def test_feathers_cover_and_sum_to_one(cells, tile):
    cuts = feathers(cells, tile, 4)
    total = torch.zeros(cells * 4, dtype=torch.float64)
    for start, length, weight in cuts:
        assert length == min(tile, cells) and 0 <= start <= cells - length and weight.shape == (length * 4,)
        assert (weight > 0).all()
        total[start * 4 : (start + length) * 4] += weight
    assert (total - 1).abs().max() < 1e-6
    overlaps = [a + n - b for (a, n, _), (b, _, _) in zip(cuts, cuts[1:], strict=False)]
    assert all(overlap >= tile // 4 for overlap in overlaps)


def test_one_tile_is_exact():
    model = randomized()
    latents, pixels = noise(1, 4, 8, 6), noise(1, 3, 64, 48)
    assert torch.equal(model.decode(latents, tile=8), model.decode(latents))
    assert torch.equal(model.encode(pixels, tile=8), model.encode(pixels))


def smooth(*shape):
    """A picture without detail, where a seam would show."""
    return F.interpolate(noise(*shape[:2], 3, 3), shape[2:], mode="bicubic", align_corners=True)


def test_tiles_stay_near_the_whole():
    model = randomized()
    latents = smooth(1, 4, 12, 40)
    whole, tiled = model.decode(latents), model.decode(latents, tile=16)
    assert tiled.shape == whole.shape
    # What a tile cannot know is the statistics outside of it. For contrast: 1.4 would be an unrelated picture.
    assert relative(tiled, whole) < 0.25


@pytest.mark.parametrize("size", [(12, 40), (40, 12), (37, 61)])
def test_tiles_show_no_seam(size):
    model, count = randomized(), 0

    def tile_of_one_level(x):
        # The worst that statistics can do: every tile has a brightness of its own.
        nonlocal count
        count += 1
        return x.new_full((1, 3, 8 * x.shape[2], 8 * x.shape[3]), float(count % 2))

    result = model._tiled(tile_of_one_level, noise(1, 4, *size), 16, 1, 8)
    assert count > 2 and result.min() >= -1e-6 and result.max() <= 1 + 1e-6
    # From one tile to the next over at least a quarter of a tile, 32 pixels; a hard cut would be a step of 1.
    assert max(result.diff(dim=d).abs().max() for d in (2, 3)) < 1.001 / 32


def test_tiles_of_the_encoder():
    model = randomized()
    pixels = smooth(1, 3, 96, 200)
    whole, tiled = model.encode(pixels), model.encode(pixels, tile=12)
    assert tiled.shape == whole.shape
    assert relative(tiled, whole) < 0.25
    sample = model.encode(pixels, generator=torch.Generator().manual_seed(0), tile=12)
    assert sample.shape == whole.shape and not torch.equal(sample, tiled)


def test_tiles_bound_the_size_of_a_run():
    model, seen = randomized(), []
    model.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    model.decode(noise(1, 4, 20, 9), tile=8)
    assert set(seen) == {(1, 4, 8, 8)}


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (torch.zeros(1, 3, 4, 4), "batch, 4, height"),
        (torch.zeros(4, 4, 4), "batch, 4, height"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.int32), "float dtype"),
        (torch.zeros(0, 4, 4, 4), "at least one picture"),
        (torch.zeros(1, 4, 0, 4), "at least one picture"),
    ],
)
def test_decode_refuses(latents, words):
    with pytest.raises(ValueError, match=words):
        randomized().decode(latents)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(1, 4, 16, 16), "batch, 3, height"),
        (torch.zeros(1, 3, 16, 20), "multiples of 8"),
        (torch.zeros(1, 3, 4, 16), "multiples of 8"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "float dtype"),
    ],
)
def test_encode_refuses(pixels, words):
    with pytest.raises(ValueError, match=words):
        randomized().encode(pixels)


@pytest.mark.parametrize("tile", [0, -3, SMALLEST_TILE - 1])
def test_tiny_tiles_are_refused(tile):
    with pytest.raises(ValueError, match="or None"):
        randomized().decode(noise(1, 4, 20, 20), tile=tile)
