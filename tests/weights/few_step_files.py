"""Writers of what few-step models are published as, from their documented names and not by this project's own code.

Distill LoRAs as VideoX-Fun's trainer saves them (kohya's names behind `lora_unet__`), and their ComfyUI editions; both
have an alpha a layer, and change q, k, v and the feed-forward of every block. TwinFlow as its authors save it: the
official folder and the tensors of a second `t_embedder`.
"""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

LAYERS = ("attention.to_q", "attention.to_k", "attention.to_v", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
STACKS = ("noise_refiner", "context_refiner", "layers")


def distill_lora(path, weights, comfyui=False, rank=4, alpha=2.0, seed=0, metadata=None):
    """Write a distill LoRA for a transformer whose official tensors are given -> by layer, what it adds in float64."""
    generator, stored, added = torch.Generator().manual_seed(seed), {}, {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if not (name.startswith(STACKS) and layer.split(".", 2)[2] in LAYERS):
            continue
        out, width = weight.shape
        down, up = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
        down, up = down * 0.1 / width**0.5, up * 0.5
        stem = f"diffusion_model.{layer}" if comfyui else f"lora_unet__{layer.replace('.', '_')}"
        stored |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
        added[layer] = alpha / rank * up.double() @ down.double()
    save_file(stored, path, metadata)
    return added


def transformer_of(folder):
    """The tensors of a model's transformer."""
    return {k: v for file in sorted((folder / "transformer").glob("*.safetensors")) for k, v in load_file(file).items()}


def twinflow(source, target, seed=0):
    """Write a model folder that is `source` with a second timestep embedder -> the tensors of its transformer."""
    shutil.copytree(source, target)
    tensors, generator = transformer_of(source), torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if name.startswith("t_embedder.")]:
        like = tensors[name]
        size = 0.1 if like.ndim == 1 else like.shape[1] ** -0.5
        tensors[name.replace("t_embedder.", "t_embedder_2.")] = size * torch.randn(like.shape, generator=generator)
    for file in (target / "transformer").glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, target / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = target / "transformer" / "config.json"
    said = json.loads(config.read_text()) | {"_class_name": "ZImageTransformer2DModelWrapper"}
    config.write_text(json.dumps(said))
    return tensors
