"""Train the tiny model's autoencoder on latents with noise, so that small errors of the S3-DiT are not visible.

The encoder's means are kept near zero mean and unit variance and the decoder only ever sees them with noise of
NOISE times that deviation added: what it learns to draw from is what survives that noise. The logvar output is
trained to name the noise, so that sampling the posterior means the same thing.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_score import judge
from tiny_world import KINDS, draw_scene, render

from s3dit.model.config import VAEConfig
from s3dit.model.vae import Autoencoder

NOISE = 0.35
CONFIG = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    block_out_channels=(16, 32, 64, 64),
    layers_per_block=1,
    norm_num_groups=2,
    scaling_factor=1.0,
    shift_factor=0.0,
)


def pictures(count: int, seed: int) -> torch.Tensor:
    """Render random training scenes: (count, 3, 128, 128) uint8."""
    rng = np.random.default_rng(seed)
    drawn = np.stack([render(draw_scene(rng)) for _ in range(count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def to_pixels(batch: torch.Tensor) -> torch.Tensor:
    """Turn uint8 into fp32 in [-1, 1]."""
    return batch.float() / 127.5 - 1


def train_vae(work: Path, steps: int, seed: int = 0) -> Autoencoder:
    """Train for `steps`: two thirds on 64 × 64 crops, 16 a batch, then whole pictures, 8 a batch."""
    torch.manual_seed(seed)
    data = pictures(6000, seed)
    vae = Autoencoder(CONFIG)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.5e-3, total_steps=steps, pct_start=0.08)
    start = time.perf_counter()
    for step in range(steps):
        crop = step < steps * 0.67
        batch = to_pixels(data[torch.randint(len(data), (16 if crop else 8,))])
        if crop:
            y, x = torch.randint(0, 65, (2,)).tolist()
            batch = batch[:, :, y : y + 64, x : x + 64]
        mean, logvar = vae.encoder(batch).chunk(2, dim=1)
        drawn = vae.decoder(mean + NOISE * torch.randn_like(mean))
        # Unit second moment a channel, zero mean: the S3-DiT wants data of about the size of the noise.
        size = (mean.square().mean((0, 2, 3)) - 1).square().mean() + mean.mean((0, 2, 3)).square().mean()
        named = (logvar - 2 * np.log(NOISE)).square().mean()
        loss = (drawn - batch).abs().mean() + 2 * F.mse_loss(drawn, batch) + 0.02 * size + 1e-3 * named
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            rate = (step + 1) / (time.perf_counter() - start)
            print(
                f"vae {step + 1}/{steps} loss {loss.item():.4f} size {size.item():.3f} {rate:.2f} steps/s", flush=True
            )
            torch.save(vae.state_dict(), work / "vae.pt")
        if step % 500 == 499:
            print("vae", gate(vae, 60), flush=True)
    return vae


@torch.no_grad()
def gate(vae: Autoencoder, count: int = 300, noise: float = 0.0) -> dict[str, float]:
    """Score reconstructions of unseen pictures: shares right a kind, and the mean PSNR in dB."""
    rng = np.random.default_rng(777)
    scenes = [draw_scene(rng, held_out=i % 5 == 0) for i in range(count)]
    hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    psnr = []
    for scene in scenes:
        picture = torch.from_numpy(render(scene)).permute(2, 0, 1)[None]
        mean = vae.encoder(to_pixels(picture)).chunk(2, dim=1)[0]
        drawn = vae.decoder(mean + noise * torch.randn_like(mean))
        drawn = ((drawn / 2 + 0.5).clamp(0, 1) * 255).round()
        psnr.append(10 * torch.log10(255**2 / F.mse_loss(drawn, picture.float())).item())
        hits[scene.kind].append(judge(drawn[0].permute(1, 2, 0).byte().numpy(), scene).everything)
    return {kind: round(float(np.mean(h)), 3) for kind, h in hits.items()} | {"psnr": round(float(np.mean(psnr)), 2)}


if __name__ == "__main__":
    import sys

    torch.set_num_threads(2)
    folder = Path(sys.argv[1])
    model = train_vae(folder, int(sys.argv[2]))
    torch.save(model.state_dict(), folder / "vae.pt")
    print("clean", gate(model), "noisy", gate(model, noise=NOISE), flush=True)
