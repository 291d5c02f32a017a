"""GroupNorm of pictures in channels last, against float64: on a CPU, and by the kernels."""

import pytest
import torch
import torch.nn.functional as F

from s3dit.kernels.group_norm import group_moments, normalize_rows


def picture(channels, height, width, mean=0.0, dtype=torch.float32):
    drawn = torch.randn(1, channels, height, width) + mean
    return drawn.to(dtype).contiguous(memory_format=torch.channels_last)


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def exact(x, groups):
    """Mean and variance of every channel's group, in float64."""
    grouped = x.double().unflatten(1, (groups, -1))
    size = x.shape[1] // groups
    moments = grouped.mean((0, 2, 3, 4)), grouped.var((0, 2, 3, 4), correction=0)
    return tuple(moment.repeat_interleave(size) for moment in moments)


@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_moments(backend, mean, device, kernel_of):
    """fp32 sums around a near mean: 1e-6 of the variance; plain squares would be off by 1e-4 at 30 deviations."""
    x = picture(32, 37, 41, mean).to(device)
    run = {
        "reference": group_moments.reference, "triton": kernel_of(group_moments),
        "torch": next(each.function for each in group_moments.implementations if each.backend == "torch"),
    }[backend]  # fmt: skip
    if backend == "torch" and device.type != "cpu":
        pytest.skip("of a CPU")
    (got_mean, got_variance), (true_mean, true_variance) = run(x, 8), exact(x, 8)
    assert got_mean.dtype == torch.float32
    assert ((got_mean.double() - true_mean).abs() < 3e-6 * max(1.0, mean)).all()
    assert ((got_variance.double() / true_variance - 1).abs() < 4e-6).all()


@pytest.mark.parametrize(("height", "width"), [(3, 512), (5, 256)])
def test_chunks_of_a_single_row(height, width):
    """All of them, and the last one; of 32 channels in 2 groups a chunk has 8192 / 16 positions."""
    run = next(each.function for each in group_moments.implementations if each.backend == "torch")
    x = picture(32, height, width)
    (got_mean, got_variance), (true_mean, true_variance) = run(x, 2), exact(x, 2)
    assert ((got_mean.double() - true_mean).abs() < 3e-6).all()
    assert ((got_variance.double() / true_variance - 1).abs() < 4e-6).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_bias_that_is_still_missing(backend, device, kernel_of):
    """Moments with an offset normalize the picture as those of picture + offset normalize that."""
    x, offset = picture(32, 13, 9).to(device), 3 * torch.randn(32, device=device)
    weight, bias = torch.randn(2, 32, device=device)
    run = {"reference": group_moments.reference, "triton": kernel_of(group_moments)}[backend]
    got = normalize_rows(x, *run(x, 4, offset), weight, bias, 1e-6, False)
    whole = x.double() + offset.double()[:, None, None]
    expected = F.group_norm(whole, 4, weight.double(), bias.double(), 1e-6)
    assert relative(got, expected) < 1e-6


@pytest.mark.parametrize("mean, bound", [(0.0, 5e-6), (1.8, 5e-5), (3.0, 5e-6), (30.0, 5e-6)])
def test_moments_of_16_bits_on_a_cpu(mean, bound):
    """From 2 deviations off 0 on around a mean, as in fp32; below that plain squares, of 8,192 numbers a sum."""
    x = picture(32, 130, 131, mean, torch.bfloat16)
    run = next(each.function for each in group_moments.implementations if each.backend == "torch")
    (got_mean, got_variance), (true_mean, true_variance) = run(x, 8), exact(x, 8)
    assert ((got_mean.double() - true_mean).abs() < 3e-6 * max(1.0, mean)).all()
    assert ((got_variance.double() / true_variance - 1).abs() < bound).all()


@pytest.mark.parametrize("positions", [(1, 1), (1, 7), (64, 65), (13, 9)])
@pytest.mark.parametrize("channels", [16, 64, 512])
@pytest.mark.sampled(2)
def test_kernels_at_every_size(channels, positions, device, kernel_of, poison, assert_close):
    """Programs that are not full, and one position alone, whose variance is that of its channels."""
    x = picture(channels, *positions, 2.0).to(device)
    groups = channels // 16
    moments, true = kernel_of(group_moments)(x, groups), exact(x, groups)
    for got, expected in zip(moments, true, strict=True):
        assert_close(got, expected.float())
    weight, bias = torch.randn(channels, device=device), torch.randn(channels, device=device)
    for silu in (False, True):
        got = kernel_of(normalize_rows)(x, *moments, weight, bias, 1e-6, silu)
        assert got.is_contiguous(memory_format=torch.channels_last)
        expected = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-6)
        assert_close(got, (F.silu(expected) if silu else expected).float())


def test_a_picture_of_one_color(device, kernel_of):
    x = torch.full((1, 32, 9, 9), 5.0, device=device).contiguous(memory_format=torch.channels_last)
    mean, variance = kernel_of(group_moments)(x, 4)
    assert (mean == 5).all() and (variance == 0).all()


def test_what_is_not_finite_stays(device, kernel_of):
    x = picture(32, 9, 9).to(device)
    x[0, 3, 4, 4] = float("nan")
    moments = kernel_of(group_moments)(x, 4)
    weight, bias = torch.ones(32, device=device), torch.zeros(32, device=device)
    out = kernel_of(normalize_rows)(x, *moments, weight, bias, 1e-6, True)
    assert out[:, :8].isnan().all() and out[:, 8:].isfinite().all()
