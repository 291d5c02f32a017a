"""The autoencoder against diffusers' AutoencoderKL on small random models, fp32."""

import pytest
import torch

from s3dit.inputs.images import to_pil
from s3dit.model.config import VAEConfig
from s3dit.model.vae import Autoencoder

diffusers = pytest.importorskip("diffusers")

# (widths, layers a level, groups of the norms): equal and uneven widths, so with and without 1×1 shortcuts.
MODELS = [
    ((8, 16, 16, 16), 1, 2),
    ((8, 16, 16, 16), 2, 4),
    ((16, 8, 24, 16), 2, 8),
    ((4, 8), 1, 2),
]


def pair(widths, layers, groups):
    """diffusers' model with every parameter random (ones and zeros in the norms would hide errors), and ours."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=groups,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    ours = Autoencoder(VAEConfig(3, 3, 4, widths, layers, groups, 0.3611, 0.1159)).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    return theirs.requires_grad_(False), ours.requires_grad_(False)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# In the memory layout that fp32 takes, diffusers', the same operations run on the same numbers: equal bits. In channels
# last convolutions sum in another order: 2e-6 was seen over the depth of these models.
LAYOUTS = [(None, 0.0), (torch.channels_last, 5e-6)]


@pytest.mark.parametrize(("layout", "bound"), LAYOUTS, ids=["own layout", "channels last"])
@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("size", [(80, 112), (64, 64)], ids=str)
@torch.no_grad()
@pytest.mark.sampled(3)
def test_encode_and_decode(model, size, layout, bound):
    theirs, ours = pair(*model)
    ours.memory_format = layout
    pixels = torch.rand(2, 3, *size) * 2 - 1
    posterior = theirs.encode(pixels).latent_dist
    mean, logvar = ours.moments(pixels)
    assert relative(mean, posterior.mean) <= bound
    assert relative(logvar, posterior.logvar) <= bound
    assert relative(ours.encode(pixels), (posterior.mode() - 0.1159) * 0.3611) <= bound
    sample = posterior.sample(torch.Generator().manual_seed(7))
    mine = ours.encode(pixels, generator=torch.Generator().manual_seed(7))
    assert relative(mine, (sample - 0.1159) * 0.3611) <= bound
    latents = torch.randn(2, 4, size[0] // ours.factor, size[1] // ours.factor)
    assert relative(ours.decode(latents), theirs.decode(latents / 0.3611 + 0.1159).sample) <= bound


@pytest.mark.parametrize("size", [(768, 512), (1024, 1024)], ids=str)
@torch.no_grad()
@pytest.mark.sampled(1)
def test_real_sizes(size):
    """Large pictures are doubled by phases, which sum the same nine products as four: 6.9e-7 was seen, encoding 0.0."""
    theirs, ours = pair(*MODELS[0])
    latents = torch.randn(1, 4, size[0] // 8, size[1] // 8)
    pixels = theirs.decode(latents / 0.3611 + 0.1159).sample
    assert relative(ours.decode(latents), pixels) < 1e-6
    assert relative(ours.moments(pixels)[0], theirs.encode(pixels).latent_dist.mean) < 1e-6


def test_pictures_are_equal_to_the_byte():
    theirs, ours = pair(*MODELS[0])
    latents = torch.randn(2, 4, 10, 14)
    expected = theirs.decode(latents / 0.3611 + 0.1159).sample
    processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=8)
    for mine, other in zip(to_pil(ours.decode(latents)), processor.postprocess(expected), strict=True):
        assert mine.tobytes() == other.tobytes()


def test_pixels_and_masks_are_equal_to_the_bit():
    from PIL import Image

    from s3dit.inputs.images import Picture

    levels = torch.randint(0, 256, (70, 90, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(levels.numpy())
    processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=8)
    picture = Picture.open(image)
    assert torch.equal(picture.pixels((48, 64))[None], processor.preprocess(image, height=48, width=64))
    # A tensor is not rounded to 8 bits.
    exact = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Picture.open(exact).pixels()[None], processor.preprocess(exact))
    masks = diffusers.image_processor.VaeImageProcessor(
        vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    assert torch.equal(picture.mask((48, 64))[None], masks.preprocess(image, height=48, width=64))
