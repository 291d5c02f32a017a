"""SigLIP2's tower and its patches against transformers, fp32: one picture and several, of every shape.

Tolerance 1e-5 relative: the same fp32 operations over packed pictures where transformers masks the padding of each to
256 patches; seen: below 5e-7.
"""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from s3dit.model.config import VisionConfig, VisionInputConfig
from s3dit.model.vision_encoder import VisionEncoder, grid_of, patches_of
from s3dit.weights.assign import assign
from s3dit.weights.checkpoint import open_checkpoint

SIZES = [(64, 64), (64, 512), (512, 64), (333, 500), (1024, 1024), (720, 1296), (65, 97), (2000, 70)]


def picture(height, width, seed=0):
    """Smooth and noisy at once, so that a resize has something to do."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random tower and its processor, as transformers saves them."""
    folder = tmp_path_factory.mktemp("vision")
    config = transformers.Siglip2VisionConfig(
        hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=3, num_patches=49
    )
    model = transformers.Siglip2VisionModel(config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if parameter.dim() == 1 else 1.0 if "position" in name else parameter[0].numel() ** -0.5
        parameter.data.copy_(scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    model.save_pretrained(folder / "siglip")
    Siglip2ImageProcessorPil().save_pretrained(folder / "siglip_processor")
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.Siglip2VisionModel.from_pretrained(folder / "siglip").eval()


def read(folder):
    """Our tower and how its pictures come in, from the files."""
    path = folder / "siglip" / "config.json"
    config = VisionConfig.from_json(json.loads(path.read_text()), path)
    path = folder / "siglip_processor" / "preprocessor_config.json"
    with torch.device("meta"):
        model = VisionEncoder(config)
    assign(model, open_checkpoint(folder / "siglip"), dtype=torch.float32, unused=model.unused)
    return model, VisionInputConfig.from_json(json.loads(path.read_text()), path)


@pytest.mark.parametrize("size", SIZES)
def test_patches(folder, size):
    _, config = read(folder)
    image = picture(*size)
    found = Siglip2ImageProcessorPil()(images=[image], return_tensors="pt")
    patches, grid = patches_of(image, config)
    assert grid == tuple(found.spatial_shapes[0].tolist()) and grid[0] * grid[1] <= 256
    # the same rounding: not a bit differs
    assert torch.equal(patches, found.pixel_values[0, : len(patches)])


def test_every_size_has_their_grid(folder):
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    _, config = read(folder)
    sides = torch.randint(64, 3000, (200, 2), generator=torch.Generator().manual_seed(1)).tolist()
    for height, width in sides:
        h, w = get_image_size_for_max_num_patches(height, width, 16, 256)
        assert grid_of(height, width, config) == (h // 16, w // 16)


@torch.inference_mode()
def test_features(folder, theirs):
    model, config = read(folder)
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    cut = [patches_of(image, config) for image in images]
    grids = [grid for _, grid in cut]
    packed = model(torch.cat([patches for patches, _ in cut]), grids)
    runs = packed.split([rows * columns for rows, columns in grids])
    for image, (patches, grid), ours in zip(images, cut, runs, strict=True):
        given = Siglip2ImageProcessorPil()(images=[image], return_tensors="pt")
        expected = theirs(**given).last_hidden_state[0, : len(patches)]
        assert relative(ours, expected) < 1e-5
        assert relative(model(patches, [grid]), expected) < 1e-5


@torch.inference_mode()
def test_the_spelling_of_transformers_4(folder, tmp_path):
    """Published towers of that age begin their names with `vision_model.`."""
    tensors = load_file(folder / "siglip" / "model.safetensors")
    (tmp_path / "siglip").mkdir()
    save_file({f"vision_model.{name}": t for name, t in tensors.items()}, tmp_path / "siglip" / "model.safetensors")
    for name in ("siglip/config.json", "siglip_processor"):
        (tmp_path / name).symlink_to(folder / name)
    patches, grid = patches_of(picture(200, 300), read(folder)[1])
    assert torch.equal(read(folder)[0](patches, [grid]), read(tmp_path)[0](patches, [grid]))


def test_narrow_weights_under_wide_arithmetic(folder):
    """bf16 weights, fp32 pictures: as if the weights had been widened first."""
    model, config = read(folder)
    narrow = model.bfloat16()
    patches, grid = patches_of(picture(200, 300), config)
    with torch.inference_mode():
        mixed = narrow(patches, [grid])
        places = narrow.vision_model.embeddings.position_embedding.weight.clone()
        wide = narrow.float()
        # only the stretched places are rounded on the way, as they are by transformers
        assert mixed.dtype == torch.float32 and places.dtype == torch.bfloat16
        assert relative(mixed, wide(patches, [grid])) < 2e-3


def test_what_does_not_fit(folder):
    model, _ = read(folder)
    with pytest.raises(ValueError, match=r"needed \(n, patch\) of n cells"):
        model(torch.zeros(5, 768), [(2, 2)])
