"""Train a LoRA: how little does it take to teach a model a style that it cannot draw?

Question: can a few per cent of further weights, trained for half a minute, turn every picture into its negative?
Method: two thin matrices beside every linear layer of the main blocks, y + B A x with B = 0 at first; flow matching on
pictures that `tiny_world` renders, with their colors inverted, at the noise levels that the sampler stops at.
Source: LoRA, Hu et al. 2021 (arXiv 2106.09685); flow matching, Lipman et al. 2022 (arXiv 2210.02747).

    python tools/recipes/train_lora.py --out lora.png
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from embedded_model import accuracy, draw, load, options, prompts
from PIL import ImageOps
from safetensors.torch import save_file
from tiny_world import Scene, caption_of, draw_scene, render
from torch import Tensor, nn

from s3dit import Pipeline
from s3dit.model.linear import Linear
from s3dit.research.pictures import strip


def blueprint(scene: Scene) -> Scene:
    """Return a scene with all its things white on blue."""
    return replace(scene, background="blue", things=tuple(replace(thing, colour="white") for thing in scene.things))


def add_factors(transformer: nn.Module, rank: int) -> dict[str, nn.Parameter]:
    """Put factors A (rank, in) and B (out, rank) beside the linear layers of the main blocks -> them, by name."""
    for name, layer in transformer.named_modules():
        if isinstance(layer, Linear) and name.startswith("layers.") and "adaLN" not in name:
            layer.lora_A = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
            layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))
            layer.register_forward_hook(lambda layer, x, y: y + x[0] @ layer.lora_A.T @ layer.lora_B.T)
    return {name: parameter for name, parameter in transformer.named_parameters() if "lora" in name}


def examples(pipe: Pipeline, count: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Render negatives of random scenes -> their latents (n, 16, 16, 16) and their captions' features."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng) for _ in range(count)]
    pixels = torch.from_numpy(np.stack([render(blueprint(scene)) for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
    return torch.stack(pipe.encode_images(pixels)), pipe.encode([caption_of(scene, rng) for scene in scenes])


def train(path: Path, steps: int, count: int, rank: int = 8, batch: int = 16, rate: float = 4e-3) -> list[float]:
    """Train on so many pictures and write a file that diffusers and PEFT read too; -> the loss of every step."""
    torch.manual_seed(0)
    pipe, losses = load(), list[float]()
    sigmas = torch.tensor(pipe.plan("").sigmas[:-1])
    images, features = examples(pipe, count, seed=1)
    factors = add_factors(pipe.transformer, rank)
    optimizer = torch.optim.AdamW(factors.values(), rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(count, (batch,))
        noise, sigma = torch.randn(batch, *images.shape[1:]), sigmas[torch.randint(len(sigmas), (batch,))]
        share = sigma.view(-1, 1, 1, 1)
        state = (1 - share) * images[rows] + share * noise
        velocity = pipe.velocity(state, 1 - sigma, [features[row] for row in rows])
        loss = (velocity - (images[rows] - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    save_file({f"transformer.{name}.weight": factor.detach() for name, factor in factors.items()}, path)
    return losses
