"""A small random model in the exact official layout, written by diffusers' and transformers' own savers."""

import sys
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install 's3dit[test]'")
transformers = pytest.importorskip("transformers", reason="parity needs transformers: pip install 's3dit[test]'")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import tiny_export  # noqa: E402


def randomize(module, seed):
    """Weights that hide nothing: norms around 1, biases and pad tokens not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            is_norm = "norm" in name or name.endswith(("cap_embedder.0.weight",))
            parameter.data.copy_(0.1 * noise + (1.0 if is_norm and name.endswith("weight") else 0.0))
        else:
            fan = parameter[0].numel()
            parameter.data.copy_(noise * (1.0 if "pad_token" in name or "embed_tokens" in name else fan**-0.5))
    return module.eval()


@pytest.fixture(scope="session")
def official_dir(tmp_path_factory):
    """Path of a model that ZImagePipeline.from_pretrained loads."""
    folder = tmp_path_factory.mktemp("official")
    transformer = diffusers.ZImageTransformer2DModel(
        dim=192, n_heads=6, n_kv_heads=6, n_layers=3, n_refiner_layers=2, cap_feat_dim=128,
        axes_dims=[8, 12, 12], axes_lens=[1536, 512, 512],
    )  # fmt: skip
    text = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=704, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 64, 64), layers_per_block=1, latent_channels=16, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_export.write_tokenizer(folder / "words", 704))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = [randomize(module, seed) for seed, module in enumerate((transformer, text, vae))]
    pipe = diffusers.ZImagePipeline(
        transformer=parts[0], text_encoder=parts[1], vae=parts[2], tokenizer=tokenizer, scheduler=scheduler
    )
    pipe.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def reference(official_dir):
    """diffusers' pipeline on that model, fp32."""
    pipe = diffusers.ZImagePipeline.from_pretrained(official_dir, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def ours(official_dir):
    """This engine on that model, fp32."""
    from s3dit import Pipeline

    return Pipeline.load(official_dir, device="cpu", dtype="fp32", residency="resident")


@pytest.fixture(scope="session")
def randomized():
    """`randomize`, for tests that build models of their own."""
    return randomize
