"""The S3-DiT's forward pass for training: a batch of equal lengths, one compiled block, fast gradients.

The parameters are those of the engine's own `Transformer`; only the order of the arithmetic differs. `fast_forward`
agrees with the engine to fp32 rounding. Also here: Muon, the optimizer of the block matrices.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3dit.model.layers import rope_table
from s3dit.model.layout import text_to_image
from s3dit.model.timestep import FinalLayer
from s3dit.model.transformer import Block, Transformer
from s3dit.runtime.devices import fast_bf16

GRID = (8, 8)
CAPTION = 32  # tokens of every caption, padding included


def _rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _block(
    x: Tensor, qkv: Tensor, out: Tensor, q_norm: Tensor, k_norm: Tensor, w13: Tensor, w2: Tensor,
    norms: Tensor, scale1: Tensor, gate1: Tensor, scale2: Tensor, gate2: Tensor, cos: Tensor, sin: Tensor,
) -> Tensor:  # fmt: skip
    """x (B, T, D); scales and gates (B or 1, 1, D); cos, sin (T, 1, D/2): pairs stand half a head apart."""
    b, t, d = x.shape
    half = cos.shape[-1]
    q, k, v = F.linear(_rms(x, norms[0] * scale1), qkv).view(b, t, 3, -1, 2 * half).unbind(2)

    def turn(y: Tensor, weight: Tensor) -> Tensor:
        """Normalize queries or keys and rotate them: (B, T, H, d) -> (B, H, T, d)."""
        y = _rms(y, weight)
        first, second = y[..., :half], y[..., half:]
        return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).transpose(1, 2)

    weights = (turn(q, q_norm) @ turn(k, k_norm).transpose(-1, -2) * (2 * half) ** -0.5).softmax(-1)
    mixed = (weights @ v.transpose(1, 2)).transpose(1, 2).reshape(b, t, d)
    x = x + _rms(F.linear(mixed, out), norms[1] * gate1)
    up, side = F.linear(_rms(x, norms[2] * scale2), w13).chunk(2, -1)
    return x + _rms(F.linear(F.silu(up) * side, w2), norms[3] * gate2)


_compiled = torch.compile(_block, dynamic=False)
# Three lengths, with and without modulation, and the distillation's teacher beside its student: more than the usual 8.
torch._dynamo.config.recompile_limit = 32


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows from adjacent pairs to pairs half a head apart; attention does not see the difference."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _run(block: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], time: Tensor | None) -> Tensor:
    assert isinstance(block, Block)
    attention, feed = block.attention, block.feed_forward
    heads = attention.heads
    qkv = torch.cat(
        (_halves(attention.to_q.weight, heads), _halves(attention.to_k.weight, heads), attention.to_v.weight)
    )
    norms = torch.stack(
        (block.attention_norm1.weight, block.attention_norm2.weight, block.ffn_norm1.weight, block.ffn_norm2.weight)
    )
    scale1 = gate1 = scale2 = gate2 = torch.ones(1, 1, x.shape[-1])
    if time is not None:
        scale1, gate1, scale2, gate2 = block.adaLN_modulation(time)[:, None].chunk(4, -1)
        scale1, gate1, scale2, gate2 = 1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh()
    return _compiled(
        x, qkv, attention.to_out[0].get_parameter("weight"),
        _halves(attention.norm_q.weight, 1), _halves(attention.norm_k.weight, 1),
        torch.cat((feed.w1.weight, feed.w3.weight)), feed.w2.weight, norms, scale1, gate1, scale2, gate2, *rope,
    )  # fmt: skip


@lru_cache(maxsize=4)
def _ropes(axes: tuple[int, ...], theta: float) -> tuple[tuple[Tensor, Tensor], ...]:
    layout = text_to_image([GRID], [CAPTION])
    ropes = (rope_table(pack.positions, axes, theta) for pack in (layout.image, layout.text, layout.joint))
    return tuple((rope[:, None, :, 0].contiguous(), rope[:, None, :, 1].contiguous()) for rope in ropes)


def fast_forward(dit: Transformer, x: Tensor, t: Tensor, features: Tensor, lengths: list[int]) -> Tensor:
    """Compute the velocity (B, 64, 64) of x (B, 64, 64) patches, t (B,), packed features (n, cap) and lengths."""
    if max(lengths) > CAPTION:
        raise ValueError(f"found a caption of {max(lengths)} tokens; needed at most {CAPTION}; shorten it")
    image_rope, text_rope, rope = _ropes(tuple(dit.config.axes_dims), dit.config.rope_theta)
    time = dit.t_embedder(t * dit.config.t_scale, x.dtype)
    real = torch.tensor([[i < n for i in range(CAPTION)] for n in lengths])
    text = dit.cap_pad_token.expand(real.numel(), -1).index_copy(
        0, real.flatten().nonzero()[:, 0], dit.cap_embedder(features)
    )
    text = text.view(len(x), CAPTION, -1)
    for plain in dit.context_refiner:
        text = _run(plain, text, text_rope, None)
    image = dit.all_x_embedder["2-1"](x)
    for block in dit.noise_refiner:
        image = _run(block, image, image_rope, time)
    whole = torch.cat((image, text), 1)
    for block in dit.layers:
        whole = _run(block, whole, rope, time)
    final = dit.all_final_layer["2-1"]
    assert isinstance(final, FinalLayer)
    scale = 1 + final.adaLN_modulation(time)[:, None]
    return final.linear(F.layer_norm(whole[:, : image.shape[1]], whole.shape[-1:], eps=1e-6) * scale)


class Muon:
    """Momentum, then the nearest orthogonal matrix, for all block matrices; equal shapes are handled together."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(parameter.shape, []).append(parameter)
        self.state = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every matrix from its gradient; the size of an update is like AdamW's at the same rate."""
        # Orthogonal to three digits is all that is wanted, which bf16 gives where it is quick.
        product = torch.bfloat16 if fast_bf16(torch.device("cpu")) else torch.float32
        for shape, group in self.groups.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            state = self.state[shape].lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp(state, self.momentum)
            tall = shape[0] > shape[1]
            x = x.mT if tall else x
            x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(product)
            for _ in range(5):
                square = x @ x.mT
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            x = x.mT if tall else x
            size = 0.2 * max(shape) ** 0.5
            for p, update in zip(group, x.unbind(0), strict=True):
                p.mul_(1 - 0.01 * lr).add_(update, alpha=-lr * size)

    def state_dict(self) -> dict[str, Any]:
        """Momentum buffers by shape."""
        return {"x".join(map(str, shape)): state for shape, state in self.state.items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take momentum buffers back."""
        for shape in self.state:
            self.state[shape] = saved["x".join(map(str, shape))]
