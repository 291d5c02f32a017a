"""Pretrain the tiny model's text encoder: linear heads on the last tokens predict a scene's facts from its caption.

The facts are the background, and of each thing its shape, place, colour and size. It takes two minutes, and the S3-DiT
then starts from features in which words are already related to one another.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from tiny_world import ARRANGEMENTS, COLOURS, RELATIONS, SHAPES, Scene, caption_of, draw_scene
from torch import Tensor, nn

from s3dit.kernels.norm import qk_norm_rope
from s3dit.model.text_encoder import Layer, TextEncoder, rope_table
from s3dit.model.tokenizer import Tokenizer

TAIL = 5  # the tokens behind the prompt; being causal, they alone have read all of it
COUNTS = (len(COLOURS), len(ARRANGEMENTS), len(COLOURS), len(SHAPES), len(COLOURS) + 1, len(SHAPES) + 1)


def read(text: TextEncoder, ids: list[list[int]]) -> Tensor:
    """Packed features (n, hidden) as `text(embeddings, lengths)` gives them, with a quick backward pass.

    All captions are padded to the longest one and attended to in one matrix product; padding stands on the right
    of every real token and is cut off again.
    """
    longest = max(map(len, ids))
    real = torch.tensor([[i < len(one) for i in range(longest)] for one in ids])
    padded = torch.tensor([one + [0] * (longest - len(one)) for one in ids])
    x = text.model.embed_tokens(padded.flatten())
    head = text.config.head_dim
    rope = rope_table((longest,) * len(ids), head, text.config.rope_theta, x.device)
    later = torch.ones(longest, longest, dtype=torch.bool).triu(1)
    for layer in text.model.layers[:-1]:
        assert isinstance(layer, Layer)
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        projected = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
        q, k, v = (part.unflatten(-1, (-1, head)) for part in projected)
        norms = attention.q_norm.weight, attention.k_norm.weight
        q, k = qk_norm_rope.reference(q, k, *norms, rope, attention.q_norm.eps, "halves")
        q, k, v = (part.unflatten(0, (len(ids), longest)).transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        weights = (q @ k.transpose(-1, -2) * head**-0.5).masked_fill(later, -torch.inf).softmax(-1)
        x = x + attention.o_proj((weights @ v).transpose(1, 2).flatten(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x[real.flatten()]


def facts(scene: Scene) -> list[int]:
    """A scene as class indices: background, arrangement, then colour and shape of the things from left or top on."""
    colours, things, arrangement = list(COLOURS), list(scene.things), scene.arrangement
    if arrangement in RELATIONS and sum(RELATIONS[arrangement]) > 0:
        things.reverse()
    out = [colours.index(scene.background), ARRANGEMENTS.index(arrangement)]
    for thing in things:
        out += [colours.index(thing.colour), SHAPES.index(thing.shape)]
    return out if len(things) == 2 else [*out, len(COLOURS), len(SHAPES)]


def pretrain(text: TextEncoder, tokenizer: Tokenizer, steps: int, batch: int = 64, seed: int = 5) -> float:
    """Train in place; returns the share of fresh captions (half of them with held-out pairs) read without error."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    heads = nn.Linear(text.config.hidden_size, TAIL * sum(COUNTS))
    norm = nn.RMSNorm(text.config.hidden_size, elementwise_affine=False)
    optimizer = torch.optim.AdamW(
        [*text.parameters(), *heads.parameters()], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)

    def answers(scenes: list[Scene]) -> tuple[list[Tensor], Tensor]:
        """Logits of every fact for each of the last tokens, and the true class of each."""
        ids = [tokenizer.encode(caption_of(scene, rng)) for scene in scenes]
        ends = torch.tensor([len(one) for one in ids]).cumsum(0)
        last = read(text, ids)[ends[:, None] - TAIL + torch.arange(TAIL)]  # (B, TAIL, hidden)
        # Every head has its own weights for each of the last tokens: no token is asked for all that the others say.
        said = torch.einsum("bth,tch->btc", norm(last), heads.weight.view(TAIL, -1, last.shape[-1]))
        said = (said + heads.bias.view(TAIL, -1)).flatten(0, 1)
        truth = torch.tensor([facts(scene) for scene in scenes]).repeat_interleave(TAIL, 0)
        return list(said.split(COUNTS, dim=-1)), truth

    start = time.perf_counter()
    for step in range(1, steps + 1):
        said, truth = answers([draw_scene(rng) for _ in range(batch)])
        loss = torch.stack([F.cross_entropy(logits, truth[:, i]) for i, logits in enumerate(said)]).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(text.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"text {step}/{steps} loss {loss.item():.4f} {step / (time.perf_counter() - start):.2f} steps/s",
                flush=True,
            )
    with torch.no_grad():
        said, truth = answers([draw_scene(rng, held_out=i % 2 == 0) for i in range(400)])
        right = torch.stack([logits.argmax(-1) == truth[:, i] for i, logits in enumerate(said)]).all(0)
    return right.float().mean().item()
