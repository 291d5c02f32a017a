"""The autoencoder between pixels and latents: AutoencoderKL as trained for FLUX.1, which Z-Image uses unchanged.

A convolutional pyramid: the encoder halves the sides three times, the decoder doubles them; both have a single-head
attention over all positions in the middle, where the picture is smallest. Latents that are given and returned are
*model-space* latents, those the transformer reads: `(z - shift) · scale` of the autoencoder's own `z`. Only `moments`
returns `z`.

Large pictures may be done by tiles: overlapping squares of one size, each run alone, feathered together with weights
that sum to one. The peak of memory is then that of one tile. It is an approximation, because every GroupNorm and the
attention are computed of their tile instead of the picture; a picture that fits one tile is exact.

The arithmetic is done in the dtype of the parameters; a bf16 checkpoint on a machine without bf16 arithmetic should be
cast up when it is loaded. Latents are taken and returned in at least fp32, the dtype of the sampler's state.

Source: FLUX.1 `modules/autoencoder.py`; names of parameters are those of diffusers' AutoencoderKL, 244 in the official
file. Not here: quantization convolutions (the file has none), training losses, choice of the tile.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3dit.kernels.group_norm import Moments, group_moments, normalize_rows
from s3dit.kernels.pictures import add_pictures, repeat_pixels
from s3dit.model.config import VAEConfig
from s3dit.model.hooks import watched
from s3dit.model.linear import Linear
from s3dit.model.tiles import by_tiles, check_tile

# Positions up to which torch's GroupNorm is within 1.3e-5 in channels last too; up to there its bits are diffusers'.
SMALL_POSITIONS = 128 * 128
# Numbers of a strip of rows; 16 MiB in 16 bits.
STRIP = 1 << 23
# Kinds of devices whose convolutions add no bias themselves: torch does, in a pass of its own.
BIAS_APART = ("cuda",)


def _in_strips(x: Tensor) -> bool:
    """Return whether x (B, C, H, W) is normalized by moments of the whole: in channels last, without gradients.

    On a CPU only where there are many positions; elsewhere torch's GroupNorm is good enough there. Never in a graph,
    which is of any size.
    """
    if torch.compiler.is_compiling():
        return False
    small = x.device.type == "cpu" and x.shape[2] * x.shape[3] <= SMALL_POSITIONS
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return last and not small and not torch.is_grad_enabled()


def _strips(x: Tensor) -> Iterator[slice]:
    """Yield slices of rows of x (1, C, H, W), on a CPU of at most STRIP numbers each; a GPU takes all at once."""
    rows = max(1, STRIP // (x.shape[1] * x.shape[3])) if x.device.type == "cpu" else x.shape[2]
    yield from (slice(start, min(start + rows, x.shape[2])) for start in range(0, x.shape[2], rows))


class GroupNorm(nn.GroupNorm):
    """GroupNorm that is accurate at every size in either memory layout; see `kernels.group_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (B, C, H, W), any float dtype -> same shape and dtype."""
        if not _in_strips(x):
            return super().forward(x)
        done = [self.applied(each, group_moments(each, self.num_groups), False) for each in x.split(1)]
        return done[0] if len(done) == 1 else torch.cat(done)

    def applied(self, rows: Tensor, moments: Moments, silu: bool) -> Tensor:
        """Normalize rows of a picture (1, C, h, W) by the moments of the whole, then SiLU if asked for."""
        return normalize_rows(rows, *moments, self.weight, self.bias, self.eps, silu)


def _silu(x: Tensor) -> Tensor:
    """SiLU, in place where no gradient needs x."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _convolved(x: Tensor, norm: GroupNorm, conv: nn.Conv2d) -> Tensor:
    """Compute conv(SiLU(norm(x))) of x (B, C, H, W), conv 3 × 3 with a border of zeros -> (B, out, H, W).

    A large picture goes strip by strip of its rows, each with a row of its neighbours on either side and normalized by
    the moments of the whole: the same numbers, and no normalized copy of all of it is ever made. Hooks on either see it
    whole.
    """
    if not _in_strips(x) or watched((norm, conv)):
        return conv(_silu(norm(x)))
    done = [_by_strips(picture, norm, conv) for picture in x.split(1)]
    return done[0] if len(done) == 1 else torch.cat(done)


def _by_strips(picture: Tensor, norm: GroupNorm, conv: nn.Conv2d) -> Tensor:
    """Compute `_convolved` of one picture (1, C, H, W) in channels last -> (1, out, H, W)."""
    moments, height = group_moments(picture, norm.num_groups), picture.shape[2]
    if len(strips := list(_strips(picture))) == 1:
        return conv(norm.applied(picture, moments, True))
    shape = (1, conv.out_channels, *picture.shape[2:])
    out = torch.empty(shape, dtype=picture.dtype, device=picture.device, memory_format=torch.channels_last)
    for strip in strips:
        first, last = max(strip.start - 1, 0), min(strip.stop + 1, height)
        rows = norm.applied(picture[:, :, first:last], moments, True)
        above, below = first - strip.start + 1, strip.stop + 1 - last
        if above or below:
            rows = F.pad(rows, (0, 0, above, below))
        out[:, :, strip] = F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))
    return out


class Resnet(nn.Module):
    """Two normalized 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the width changes."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = GroupNorm(groups, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, width, H, W) -> (B, out, H, W), same dtype."""
        if x.device.type in BIAS_APART and _in_strips(x) and not watched(self.children()):
            done = [self._with_biases_last(picture) for picture in x.split(1)]
            return done[0] if len(done) == 1 else torch.cat(done)
        h = _convolved(x, self.norm1, self.conv1)
        h = _convolved(h, self.norm2, self.conv2)
        beside = x if self.conv_shortcut is None else self.conv_shortcut(x)
        # In the memory of h, which a hook may have kept.
        return h.add_(beside) if _in_strips(h) and not watched((self.conv2,)) else beside + h

    def _with_biases_last(self, x: Tensor) -> Tensor:
        """Apply to x (1, width, H, W): the first bias is added by the moments of the second norm, others at the end."""
        h = self.norm1.applied(x, group_moments(x, self.norm1.num_groups), True)
        h = _without_bias(self.conv1, h)
        h = self.norm2.applied(h, group_moments(h, self.norm2.num_groups, self.conv1.bias), True)
        h, bias = _without_bias(self.conv2, h), self.conv2.bias
        assert bias is not None
        if self.conv_shortcut is not None:
            assert self.conv_shortcut.bias is not None
            x, bias = _without_bias(self.conv_shortcut, x), bias + self.conv_shortcut.bias
        return add_pictures(h, x, bias)


def _without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve x (B, C, H, W) without the bias."""
    return F.conv2d(x, conv.weight, padding=conv.padding)


class Attention(nn.Module):
    """Self-attention over all positions with one head as wide as the features, added to its input."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, width, eps=1e-6)
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, width, H, W) -> same shape and dtype."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, positions, width)
        q, k, v = (project(h).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        h = self.to_out[0](h).transpose(1, 2).unflatten(2, x.shape[2:])
        # parity: a sum has the layout of its first term, and the next norms round by theirs. The layout of h looks like
        # channels last but convolutions do not take it for that, so x that really is must come first.
        return h + x if x.is_contiguous() else x + h


class MidBlock(nn.Module):
    """The bottom of the pyramid: resnet, attention, resnet."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(width, width, groups), Resnet(width, width, groups)])
        self.attentions = nn.ModuleList([Attention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, width, H, W) -> same shape and dtype."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halve both sides; the border is added on the right and below only, as the model was trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, width, H, W), even sides -> (B, width, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides by repeating pixels, then smooth with a 3×3 convolution.

    Where pixels are repeated, nine products fall on four different ones. On a CPU a picture is made as its four phases,
    every second row and column, each a 2×2 convolution of the small picture by sums of the weights: 2.25 times less
    work, and the repeated picture is never made. It rounds in other places than diffusers does (2e-7 in fp32), so small
    pictures in fp32, which are quick anyway, are not.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, width, H, W) -> (B, width, 2H, 2W), same dtype."""
        if torch.compiler.is_compiling():
            return self.conv(repeat_pixels(x))
        small = 4 * x.shape[2] * x.shape[3] <= SMALL_POSITIONS and x.dtype.itemsize > 2
        # A hook on the convolution is called once, and sees the rounding of one.
        simple = torch.is_grad_enabled() or small or watched((self.conv,))
        if simple or x.device.type != "cpu":
            return self.conv(repeat_pixels(x))
        return self._by_phases(x)

    def _by_phases(self, x: Tensor) -> Tensor:
        """Upsample x (B, C, H, W) -> (B, C, 2H, 2W) by phases.

        An even row reads the rows before and at it, an odd one those at and after it; so do columns.
        """
        height, width = x.shape[2:]
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        # Sums of weights are rounded once, to the dtype of the picture.
        weight = self.conv.weight.to(torch.promote_types(x.dtype, torch.float32))
        shape = (len(x), len(weight), 2 * height, 2 * width)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        x = F.pad(x, (1, 1, 1, 1))
        for i, rows in enumerate(_halves(weight, 2)):
            for j, phase in enumerate(_halves(rows, 3)):
                part = x[:, :, i : i + height + 1, j : j + width + 1]
                phase = phase.to(x.dtype).contiguous(memory_format=layout)
                out[:, :, i::2, j::2] = F.conv2d(part, phase, self.conv.bias)
        return out


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sum three taps along `dim` to the two that an even place reads, and the two that an odd one does."""
    before, at, after = weight.split(1, dim)
    return torch.cat((before, at + after), dim), torch.cat((before + at, after), dim)


class DownBlock(nn.Module):
    """A level of the encoder: resnets, then half the size except at the bottom."""

    def __init__(self, width: int, out: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(out if i else width, out, groups) for i in range(layers)])
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out)])

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, width, H, W) -> (B, out, H/2, W/2), or of the same size if it is the last."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """A level of the decoder: resnets, then twice the size except at the top."""

    def __init__(self, width: int, out: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(out if i else width, out, groups) for i in range(layers)])
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out)])

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, width, H, W) -> (B, out, 2H, 2W), or of the same size if it is the last."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """The encoder: pixels (B, 3, H, W) -> mean and log variance, stacked: (B, 2·latent channels, H/8, W/8)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, layers, groups = config.block_out_channels, config.layers_per_block, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(width, out, layers, groups, last=i == len(widths))
                for i, (width, out) in enumerate(pairwise((widths[0], *widths)), 1)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to pixels x (B, 3, H, W) -> moments (B, 2·latent channels, H/8, W/8), same dtype."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return _convolved(self.mid_block(x), self.conv_norm_out, self.conv_out)


class Decoder(nn.Module):
    """The decoder: raw latents (B, latent channels, h, w) -> pixels (B, 3, 8h, 8w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        # One resnet more a level than the encoder has.
        layers = config.layers_per_block + 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(width, out, layers, groups, last=i == len(widths))
                for i, (width, out) in enumerate(pairwise((widths[0], *widths)), 1)
            ]
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to raw latents x (B, latent channels, h, w) -> pixels (B, 3, 8h, 8w), same dtype."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return _convolved(x, self.conv_norm_out, self.conv_out)


class Autoencoder(nn.Module):
    """AutoencoderKL of FLUX.1: `encode` pixels to model-space latents, `decode` them back, both by tiles if asked."""

    # Patterns of official names that `assign` need not read: none.
    unused: tuple[str, ...] = ()

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # None: as `layout` decides. Set it to force one.
        self.memory_format: torch.memory_format | None = None

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent cell (8 in the official model)."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def layout(self) -> torch.memory_format:
        """Memory layout of convolutions: channels last for 16-bit floats on a CPU or an NVIDIA GPU, else contiguous.

        It is 2.1 times as fast on a CPU with AMX, and the layout that a GPU's convolutions compute in. In fp32 it is
        0.8 to 1.4 times as fast on AVX2, not worth a difference: contiguous gives diffusers' bits.
        """
        weight = next(self.parameters())
        if self.memory_format is not None:
            return self.memory_format
        halves = weight.device.type in ("cpu", "cuda") and weight.dtype.itemsize == 2
        return torch.channels_last if halves else torch.contiguous_format

    def moments(self, pixels: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Compute mean and log variance of the raw latents of a picture.

        pixels (B, 3, H, W) float in [-1, 1], sides multiples of `factor` -> two (B, latent channels, H/8, W/8), in the
        parameters' dtype or fp32 if that is wider; log variance within [-30, 20]. `tile` as in `decode`.
        Raises ValueError. Source: diffusers DiagonalGaussianDistribution.
        """
        _check(pixels, "pixels", self.config.in_channels, self.factor)
        encoded = self._tiled(self.encoder, pixels, tile, self.factor, 1)
        mean, logvar = encoded.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None, tile: int | None = None) -> Tensor:
        """Encode a picture to model-space latents: their mode, or with a generator a sample that is drawn from it.

        pixels as in `moments` -> (B, latent channels, H/8, W/8), at least fp32. The noise of the whole batch is one
        draw on the generator's own device, as in diffusers. Raises ValueError.
        """
        z, logvar = self.moments(pixels, tile)
        if generator is not None:
            # parity: drawn in the parameters' dtype; a generator's normal numbers differ between fp32 and fp64.
            dtype = next(self.parameters()).dtype
            noise = torch.randn(z.shape, generator=generator, device=generator.device, dtype=dtype)
            z = z + torch.exp(0.5 * logvar) * noise.to(z)
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Decode model-space latents to pixels.

        latents (B, latent channels, h, w) float -> pixels (B, 3, 8h, 8w), about [-1, 1] but not clamped, at least
        fp32. `tile` is the side of a tile in latent cells: memory is bounded by one tile, the result is approximate
        unless the picture fits one; None runs the picture whole. Raises ValueError.
        """
        _check(latents, "latents", self.config.latent_channels, 1)
        # Before the cast to the parameters' dtype: in bf16 the division would cost a rounding.
        raw = latents / self.config.scaling_factor + self.config.shift_factor
        return self._tiled(self.decoder, raw, tile, 1, self.factor)

    def _tiled(self, run: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, cell: int, out_cell: int) -> Tensor:
        """Run encoder or decoder over x, whole or by tiles.

        A latent cell is `cell` positions a side of x, and `out_cell` of the result, which is at least fp32.
        """
        weight = next(self.parameters())

        def done(part: Tensor) -> Tensor:
            wide = torch.promote_types(weight.dtype, torch.float32)
            return run(part.to(weight, memory_format=self.layout)).to(wide)

        if tile is not None:
            check_tile(tile)
        if tile is None or max(x.shape[2:]) <= tile * cell:
            return done(x).contiguous()
        return by_tiles(done, x, tile, cell, out_cell)


def _check(x: Tensor, name: str, channels: int, factor: int) -> None:
    """ValueError unless x is a floating (B, channels, H, W) with sides that are multiples of `factor`."""
    if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise ValueError(
            f"{name} are {tuple(x.shape)} of {x.dtype}; needed (batch, {channels}, height, width) of a float dtype"
        )
    if x.shape[0] == 0 or any(side < factor or side % factor for side in x.shape[2:]):
        raise ValueError(
            f"{name} are {tuple(x.shape)}; needed at least one picture, with height and width multiples of {factor}"
        )
