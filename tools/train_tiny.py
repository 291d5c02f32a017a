"""Make the embedded model (weights/tiny) from nothing: a little world, an autoencoder, a text encoder, an S3-DiT.

    python tools/train_tiny.py                 all stages, work files under build/tiny, result in weights/tiny
    python tools/train_tiny.py --stage dit     one stage: vae, text, data, dit, distil or export; a cut stage resumes
    python tools/train_tiny.py --score         measure weights/tiny on the 500 fixed prompts
    python tools/train_tiny.py --score-edit    measure how it edits start images, 40 pictures a row

Stages count steps, not minutes, and every random number has a seed. All training is on the CPU, with weights in fp32;
the S3-DiT's products are in bf16 where the CPU has it (six times the pace on a core with AVX512-BF16). The text
encoder first learns to read (tiny_text.py) and is then left alone; the S3-DiT learns from its features with a forward
pass made for training (tiny_fast.py). `distil` teaches the model its own guided velocity, so that the shipped weights
follow Turbo's convention: guidance 0, few steps.
"""

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import tiny_export
import torch
from tiny_edit import as_table, score_edits
from tiny_fast import GRID, Muon, fast_forward
from tiny_score import judge, table
from tiny_text import pretrain, read
from tiny_vae import CONFIG as VAE_CONFIG
from tiny_vae import gate, to_pixels, train_vae
from tiny_world import Scene, caption_of, draw_scene, fixed_prompts, render
from torch import Tensor, nn

from s3dit.model.config import TextEncoderConfig, TransformerConfig
from s3dit.model.layout import patchify, unpatchify
from s3dit.model.text_encoder import TextEncoder
from s3dit.model.tokenizer import Tokenizer
from s3dit.model.transformer import Transformer
from s3dit.model.vae import Autoencoder
from s3dit.runtime.devices import fast_bf16
from s3dit.sampling.schedules import sigmas
from s3dit.sampling.solvers import euler

TRANSFORMER = TransformerConfig(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=192, n_layers=6, n_refiner_layers=1, n_heads=6,
    n_kv_heads=6, norm_eps=1e-5, qk_norm=True, cap_feat_dim=128, siglip_feat_dim=None, rope_theta=256.0,
    t_scale=1000.0, axes_dims=(8, 12, 12),
)  # fmt: skip
TEXT = TextEncoderConfig(
    vocab_size=704, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, rope_theta=1e6,
)  # fmt: skip
CAPTIONS, SCENES, BATCH = 3, 8_000, 32
LR, DISTIL_LR, GUIDANCE = 2e-3, 8e-4, 2.0
MUON = 1.5  # times the rate of AdamW


class Model(nn.Module):
    """Text encoder and S3-DiT as one: captions' features and noisy patches to velocity."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.text = TextEncoder(TEXT)
        self.dit = Transformer(TRANSFORMER)
        for name, parameter in self.named_parameters():
            if "embed_tokens" in name or "pad_token" in name:
                nn.init.normal_(parameter, std=0.02 if "pad" in name else 0.5)
            elif parameter.dim() == 1:
                nn.init.constant_(parameter, 1.0 if "norm" in name or name.endswith("cap_embedder.0.weight") else 0.0)
            elif "adaLN" in name or "all_final_layer" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)
        for block in (*self.dit.noise_refiner, *self.dit.layers):
            # Gates ajar: behind closed ones the blocks would learn nothing at first.
            gates = block.adaLN_modulation[0].bias.detach().view(4, -1)
            gates[1::2] = 0.3

    def forward(self, x: Tensor, t: Tensor, features: list[Tensor]) -> Tensor:
        """Compute the velocity (B, 64, 64) of x (B, 64, 64) patches, t (B,), features (tokens, hidden) each."""
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16(torch.device("cpu"))):
            return fast_forward(self.dit, x, t, torch.cat(features), [len(one) for one in features]).float()

    @torch.no_grad()
    def features(self, tokenizer: Tokenizer, captions: list[str]) -> list[Tensor]:
        """Features of captions, (tokens, hidden) each."""
        out: list[Tensor] = []
        for start in range(0, len(captions), 100):
            ids = [tokenizer.encode(caption) for caption in captions[start : start + 100]]
            out += read(self.text, ids).split([len(one) for one in ids])
        return out


@torch.no_grad()
def encoded(vae: Autoencoder, scenes: list[Scene]) -> list[Tensor]:
    """Render scenes and encode them to patches, (64, 64) each, as the autoencoder's mean gives them."""
    batch = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2)
    return [patchify(one.contiguous()) for one in vae.encoder(to_pixels(batch)).chunk(2, dim=1)[0]]


def make_data(work: Path, vae: Autoencoder) -> dict[str, Any]:
    """Render, caption and encode the training set; latents are scaled to zero mean and unit deviation."""
    if (work / "data.pt").exists():
        return torch.load(work / "data.pt", weights_only=True)
    rng = np.random.default_rng(11)
    captions, patches = [], []
    for start in range(0, SCENES, 50):
        scenes = [draw_scene(rng) for _ in range(50)]
        captions += [[caption_of(scene, rng) for _ in range(CAPTIONS)] for scene in scenes]
        patches += encoded(vae, scenes)
        if start % 2000 == 0:
            print(f"data {start}/{SCENES}", flush=True)
    flat = torch.stack(patches)
    shift, scale = flat.mean().item(), 1 / flat.std().item()
    data = {"patches": (flat - shift) * scale, "captions": captions, "shift": shift, "scale": scale}
    torch.save(data, work / "data.pt")
    return data


def noisy(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw sigma as the 8 steps of the sampler lie (uniform, then shift 3) and noise: (state, t, target velocity)."""
    u = 0.03 + 0.97 * (torch.randperm(len(patches)) + torch.rand(len(patches))) / len(patches)
    sigma = (3 * u / (1 + 2 * u))[:, None, None]
    noise = torch.randn_like(patches)
    return (1 - sigma) * patches + sigma * noise, 1 - sigma.flatten(), patches - noise


def train(
    work: Path, name: str, model: Model, steps: int, lr: float, decay: float, loss_of: Callable[[], Tensor]
) -> Model:
    """Muon on the block matrices and AdamW on the rest: warm-up, constant, linear decay; returns the moving average."""
    ema = deepcopy(model)
    matrices = [p for n, p in model.dit.named_parameters() if ".attention.to" in n or "feed_forward" in n]
    known = {id(p) for p in matrices}
    muon = Muon(matrices)
    rest = [p for p in model.dit.parameters() if id(p) not in known]
    optimizer = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    done, path = 0, work / f"{name}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        muon.load_state_dict(saved["muon"])
        done = saved["step"]
        torch.manual_seed(done)
    warm_up = min(100, steps // 10)
    start, first, mean = time.perf_counter(), done, 0.0
    for step in range(done + 1, steps + 1):
        rate = lr * min(1.0, step / warm_up, max(0.0, (steps - step) / (steps * decay)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of()
        model.dit.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.dit.parameters(), 1.0)
        optimizer.step()
        muon.step(MUON * rate)
        keep = min(0.998, 1 - 10 / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - keep)
        mean = 0.98 * mean + 0.02 * loss.item() if mean else loss.item()
        if step % 50 == 0:
            pace = (step - first) / (time.perf_counter() - start)
            print(f"{name} {step}/{steps} loss {mean:.4f} lr {rate:.2e} {pace:.2f} steps/s", flush=True)
        if step % 250 == 0 or step == steps:
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"muon": muon.state_dict(), "step": step}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    return ema


def train_dit(work: Path, data: dict[str, Any], tokenizer: Tokenizer, model: Model, steps: int) -> Model:
    """Flow matching on the training set; one caption in ten is dropped, for guidance."""
    said = model.features(tokenizer, [caption for captions in data["captions"] for caption in captions])
    (empty,), rng = model.features(tokenizer, [""]), np.random.default_rng(3)

    def loss_of() -> Tensor:
        """Mean squared error of the velocity on a random batch."""
        rows = torch.randint(len(data["patches"]), (BATCH,))
        x, t, target = noisy(data["patches"][rows])
        read_now = [
            empty if rng.random() < 0.1 else said[CAPTIONS * r + int(rng.integers(CAPTIONS))] for r in rows.tolist()
        ]
        return (model(x, t, read_now) - target).square().mean()

    return train(work, "dit", model, steps, LR, 0.45, loss_of)


def distil(work: Path, data: dict[str, Any], tokenizer: Tokenizer, teacher: Model, steps: int) -> Model:
    """Train a copy on, towards data + GUIDANCE·(pos - neg) of the frozen teacher.

    The data stand where pure distillation has the teacher's `pos`: a teacher that is not finished is not the limit.
    """
    scenes = min(len(data["patches"]), BATCH * steps)
    said = teacher.features(tokenizer, [caption for captions in data["captions"][:scenes] for caption in captions])
    (empty,), rng, student = teacher.features(tokenizer, [""]), np.random.default_rng(4), deepcopy(teacher)
    teacher.requires_grad_(False)

    def loss_of() -> Tensor:
        """Mean squared error towards the guided velocity on a random batch."""
        rows = torch.randint(scenes, (BATCH,))
        x, t, target = noisy(data["patches"][rows])
        read_now = [said[CAPTIONS * r + int(rng.integers(CAPTIONS))] for r in rows.tolist()]
        with torch.no_grad():
            positive, negative = teacher(x, t, read_now), teacher(x, t, [empty] * BATCH)
        return (student(x, t, read_now) - (target + GUIDANCE * (positive - negative))).square().mean()

    return train(work, "distil", student, steps, DISTIL_LR, 1.0, loss_of)


@torch.no_grad()
def quick_score(model: Model, vae: Autoencoder, data: dict[str, Any], tokenizer: Tokenizer, n: int = 96) -> None:
    """Score some of the fixed prompts with 8 Euler steps and no guidance, without the pipeline."""
    prompts, verdicts = fixed_prompts(), []
    for start in range(0, n, BATCH):
        chosen = [prompts[i * len(prompts) // n] for i in range(start, min(n, start + BATCH))]
        said = model.features(tokenizer, [caption for _, caption in chosen])

        def velocity(x: Tensor, sigma: Tensor, said: list[Tensor] = said) -> Tensor:
            """The model's velocity at a noise level, as the solver calls it."""
            return model(x, (1 - sigma).expand(len(said)), said)

        x = torch.randn(len(chosen), 64, 64, generator=torch.Generator().manual_seed(start))
        for step in euler(velocity, x, sigmas(8, 3.0)):
            x = step.x
        latents = torch.stack([unpatchify(one, GRID) for one in x / data["scale"] + data["shift"]])
        pictures = ((vae.decoder(latents) / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        verdicts += [(scene, judge(p, scene)) for p, (scene, _) in zip(pictures, chosen, strict=True)]
    print("score", json.dumps(table(verdicts)), flush=True)


def score(folder: Path) -> dict[str, Any]:
    """Measure a folder on the 500 fixed prompts with the engine's defaults; the seed is the prompt's index."""
    from tqdm import tqdm

    from s3dit import Pipeline

    pipe, verdicts, batch = Pipeline.load(folder), [], 20
    prompts = fixed_prompts()
    for start in tqdm(range(0, len(prompts), batch), unit="batch"):
        chosen = prompts[start : start + batch]
        pictures = pipe(prompt=[c for _, c in chosen], seed=start).images
        verdicts += [(scene, judge(np.asarray(p), scene)) for p, (scene, _) in zip(pictures, chosen, strict=True)]
    return table(verdicts) | {"seeds": f"0 to {len(prompts) - 1}", "placement": str(pipe.placement)}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="folder of checkpoints and data")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"), help="the model's folder")
    parser.add_argument("--stage", choices=("vae", "text", "data", "dit", "distil", "export"), help="only this stage")
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--text-steps", type=int, default=800)
    parser.add_argument("--dit-steps", type=int, default=12_000)
    parser.add_argument("--distil-steps", type=int, default=800)
    parser.add_argument("--score", action="store_true", help="score --out on the 500 fixed prompts and stop")
    parser.add_argument("--score-edit", action="store_true", help="score edits of start images by --out and stop")
    args = parser.parse_args()
    if args.score:
        found = score(args.out)
        (args.out / "score.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
        return
    if args.score_edit:
        from s3dit import Pipeline

        print(as_table(score_edits(Pipeline.load(args.out))))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    vae = Autoencoder(VAE_CONFIG)
    if not (args.work / "vae.pt").exists() or args.stage == "vae":
        vae = train_vae(args.work, args.vae_steps)
        torch.save(vae.state_dict(), args.work / "vae.pt")
    vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True))
    if args.stage in (None, "vae"):
        found = gate(vae)
        print("autoencoder", found, flush=True)
        if min(v for k, v in found.items() if k != "psnr") < 0.98:
            print("the autoencoder is below 0.98 in some kind: train it longer before the S3-DiT", flush=True)
    if args.stage == "vae":
        return
    tokenizer = Tokenizer(tiny_export.write_tokenizer(args.work / "tokenizer", TEXT.vocab_size))
    model = Model()
    if not (args.work / "text.pt").exists() or args.stage == "text":
        print("text, captions read without error:", pretrain(model.text, tokenizer, args.text_steps), flush=True)
        torch.save(model.text.state_dict(), args.work / "text.pt")
    model.text.load_state_dict(torch.load(args.work / "text.pt", weights_only=True))
    if args.stage == "text":
        return
    data = make_data(args.work, vae)
    if args.stage == "data":
        return
    if args.stage in (None, "dit"):
        model = train_dit(args.work, data, tokenizer, model, args.dit_steps)
        quick_score(model, vae, data, tokenizer)
    if args.stage in (None, "distil"):
        model.load_state_dict(torch.load(args.work / "dit.pt", weights_only=True)["ema"])
        model = distil(args.work, data, tokenizer, model, args.distil_steps)
        quick_score(model, vae, data, tokenizer)
    last = args.work / ("distil.pt" if (args.work / "distil.pt").exists() else "dit.pt")
    model.load_state_dict(torch.load(last, weights_only=True)["ema"])
    if args.stage == "export":
        quick_score(model, vae, data, tokenizer)
    tiny_export.write(args.out, args.work / "tokenizer", model.text, model.dit, vae, data["scale"], data["shift"])


if __name__ == "__main__":
    main()
