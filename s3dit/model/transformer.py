"""The S3-DiT: one stream of image and caption tokens through blocks that share their weights between both.

The story of a pass: embed patches, refine the image tokens (modulated by the time), join them with the caption tokens
(embedded and refined without the time, so once a request, in `context`), run the main blocks, read the velocity off
the image tokens. A block is a sandwich: RMSNorm before and after each of attention and feed-forward, the first scaled
by (1 + s), the second gated by tanh(g).

Parameter names are the official ones, odd ones included. The modules hold weights and shapes; what runs is in
`s3dit.kernels`. Weights may be of a narrower dtype than the tokens (see `linear.py`).

Source: official `src/zimage/transformer.py` and diffusers' `transformer_z_image.py`. The published models have one
patch size (2 × 2 pixels of latents, 1 frame), which is the only one here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3dit.kernels.attention import Spans, attention
from s3dit.kernels.norm import gated_residual, gated_residual_norm, qk_norm_rope, rms_norm_modulate
from s3dit.kernels.scheme import QuantizedRows
from s3dit.model.config import TransformerConfig
from s3dit.model.hooks import unhookable
from s3dit.model.layers import RMSNorm, rope_table
from s3dit.model.layout import Layout, Pack
from s3dit.model.linear import Linear, swiglu_layers

# The one patch size ever published, as the official names spell it: 2 × 2 latent pixels, 1 frame.
PATCH = "2-1"
FREQUENCIES = 256
# Why hooks on some norms are refused.
FUSED = "it is computed inside of a fused operation ({}, which trace_op can see)"
# Official `Attention` builds its query and key norms with this, whatever `norm_eps` says.
QK_EPS = 1e-5


class TimestepEmbedder(nn.Module):
    """Embeds times: cosines and sines of 128 frequencies, then two linears with SiLU between."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(FREQUENCIES, 1024), nn.SiLU(), Linear(1024, out))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed t (R,) fp32, already scaled by t_scale -> (R, out) of dtype."""
        half = FREQUENCIES // 2
        # parity: everything in fp32 and in this order; one ulp of the argument moves the picture by 1e-6.
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * frequencies[None]
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))


def common_input_dtype(*layers: Linear) -> torch.dtype | None:
    """Return the 8-bit dtype that all of these layers take their common input in, None where one takes floats."""
    first, *rest = (layer.input_dtype for layer in layers)
    return first if all(other == first for other in rest) else None


class Attention(nn.Module):
    """Self-attention of packed tokens, with per-head RMSNorm and rotation of queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.n_heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(dim, dim, bias=False)
        self.to_v = Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([Linear(dim, dim, bias=False)])
        self.norm_q = unhookable(RMSNorm(config.head_dim, QK_EPS), FUSED.format("qk_norm_rope"))
        self.norm_k = unhookable(RMSNorm(config.head_dim, QK_EPS), FUSED.format("qk_norm_rope"))

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The 8-bit dtype that x may be handed over in (QuantizedRows), None for floats only."""
        return common_input_dtype(self.to_q, self.to_k, self.to_v)

    def forward(self, x: Tensor | QuantizedRows, rope: Tensor, spans: Spans) -> Tensor:
        """Attend within each item: x (N, dim) or its QuantizedRows, rope (N, head_dim / 2, 2) fp32 -> (N, dim)."""
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))  # (N, H, D)
        q, k = qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, rope, QK_EPS)
        return self.to_out[0](attention(q, k, v, spans, spans).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The 8-bit dtype that x may be handed over in (QuantizedRows), None for floats only."""
        return common_input_dtype(self.w1, self.w3)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Apply to x (N, dim), or to its QuantizedRows -> (N, dim)."""
        return self.w2(swiglu_layers(self.w1, self.w3, x, self.w2.input_dtype))


class Block(nn.Module):
    """Sandwich-normed attention and feed-forward; `modulated` blocks read scale and gate from the time embedding."""

    def __init__(self, config: TransformerConfig, *, modulated: bool) -> None:
        super().__init__()
        dim, self.eps = config.dim, config.norm_eps
        self.attention = Attention(config)
        self.feed_forward = FeedForward(dim, config.ffn_dim)
        self.attention_norm1 = RMSNorm(dim, self.eps)
        self.ffn_norm1 = RMSNorm(dim, self.eps)
        self.attention_norm2 = RMSNorm(dim, self.eps)
        self.ffn_norm2 = RMSNorm(dim, self.eps)
        if modulated:
            self.adaLN_modulation = nn.Sequential(Linear(config.adaln_dim, 4 * dim))
            unhookable(self.attention_norm1, FUSED.format("rms_norm_modulate"))
            unhookable(self.attention_norm2, FUSED.format("gated_residual_norm"))
            unhookable(self.ffn_norm1, FUSED.format("gated_residual_norm"))
            unhookable(self.ffn_norm2, FUSED.format("gated_residual"))

    def forward(self, x: Tensor, rope: Tensor, spans: Spans, time: Tensor, modulation_row: Tensor) -> Tensor:
        """Apply to x (N, dim) with rope (N, head_dim / 2, 2) fp32 -> (N, dim).

        time (R, adaln_dim): one row an item, or one for all · modulation_row (N,) int64: which of them a token reads.
        """
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.adaLN_modulation(time).float().chunk(4, dim=-1)  # (R, dim) each
        factor = self.attention_norm1.weight.float() * (1.0 + scale_msa)
        normed = rms_norm_modulate(x, factor, modulation_row, self.eps, self.attention.input_dtype)
        mixed = self.attention(normed, rope, spans)
        gate = self.attention_norm2.weight.float() * gate_msa.tanh()
        factor = self.ffn_norm1.weight.float() * (1.0 + scale_mlp)
        x, normed = gated_residual_norm(x, mixed, gate, factor, modulation_row, self.eps, self.feed_forward.input_dtype)
        gate = self.ffn_norm2.weight.float() * gate_mlp.tanh()
        return gated_residual(x, self.feed_forward(normed), gate, modulation_row, self.eps)


class PlainBlock(Block):
    """The same block without modulation: of the caption and vision refiners, which do not depend on the time."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, modulated=False)

    def forward(self, x: Tensor, rope: Tensor, spans: Spans) -> Tensor:  # type: ignore[override]
        """Apply to x (N, dim), rope (N, head_dim / 2, 2) fp32 -> (N, dim)."""
        x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rope, spans))
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class FinalLayer(nn.Module):
    """LayerNorm without weights, scaled by (1 + s) of the time, then a linear to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = Linear(config.dim, config.patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.adaln_dim, config.dim))

    def forward(self, x: Tensor, time: Tensor, modulation_row: Tensor) -> Tensor:
        """Apply to x (n, dim), time (R, adaln_dim), modulation_row (n,) -> patches (n, patch_dim)."""
        scale = 1.0 + self.adaLN_modulation(time)
        scale = scale if len(scale) == 1 else scale[modulation_row]
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale)


@dataclass(frozen=True, slots=True)
class Context:
    """The inputs of a pass that no step changes: token places, refined caption tokens (N_text, dim), rotary tables.

    It holds what `forward` reads and no more, so that requests of one size have contexts of one shape. rest: what the
    image stream holds besides the tokens that are denoised, (1, dim) padding or (N_image, dim) with embedded
    references. Where there are references, `text` goes on with the refined vision tokens, and clean (1,) is their time.
    """

    image: Pack
    joint: Pack
    gather: Tensor
    text: Tensor
    image_rope: Tensor
    joint_rope: Tensor
    rest: Tensor
    clean: Tensor | None = None


class Steering(Protocol):
    """The interface of what adds to the streams of a pass; `controlnet.Controls` implements it."""

    def __call__(
        self, model: "Transformer", image: Tensor, time: Tensor, context: Context
    ) -> tuple[Tensor, Iterable[Tensor | None]]:
        """Join embedded image tokens (N_image, dim) with the caption -> (N, dim), and what to add after each layer."""


class Transformer(nn.Module):
    """The S3-DiT: predicts the velocity of the flow; see the module's docstring."""

    # Patterns of official names that `assign` need not read.
    unused = ("norm_final.weight",)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.all_x_embedder = nn.ModuleDict({PATCH: Linear(config.patch_dim, dim)})
        self.all_final_layer = nn.ModuleDict({PATCH: FinalLayer(config)})
        self.noise_refiner = nn.ModuleList(Block(config, modulated=True) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(PlainBlock(config) for _ in range(config.n_refiner_layers))
        self.t_embedder = TimestepEmbedder(config.adaln_dim)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps), Linear(config.cap_feat_dim, dim)
        )
        self.x_pad_token = nn.Parameter(torch.empty(1, dim))
        self.cap_pad_token = nn.Parameter(torch.empty(1, dim))
        if config.siglip_feat_dim is not None:
            vision = config.siglip_feat_dim
            self.siglip_embedder = nn.Sequential(RMSNorm(vision, config.norm_eps), Linear(vision, dim))
            self.siglip_refiner = nn.ModuleList(PlainBlock(config) for _ in range(config.n_refiner_layers))
            self.siglip_pad_token = nn.Parameter(torch.empty(1, dim))
        self.layers = nn.ModuleList(Block(config, modulated=True) for _ in range(config.n_layers))

    def context(
        self, layout: Layout, text: Tensor, references: Tensor | None = None, vision: Tensor | None = None
    ) -> Context:
        """Embed and refine what no step changes: caption, vision features, references; and make the rotary tables.

        text (n, cap_feat_dim): features of the real caption tokens of all items, end to end, in the dtype that the
        pass is to compute in · where the layout has references: their latents' patches (n_clean, patch_dim) and the
        vision tower's features of them (n_vision, siglip_feat_dim), end to end like the text.
        """
        config, dtype = self.config, text.dtype
        tokens = layout.text.fill(self.cap_embedder(text), self.cap_pad_token)
        tokens = self._refined(tokens, layout.text, self.context_refiner)
        if layout.vision is not None and vision is not None:
            seen = layout.vision.fill(self.siglip_embedder(vision.to(dtype)), self.siglip_pad_token)
            tokens = torch.cat((tokens, self._refined(seen, layout.vision, self.siglip_refiner)))
        rest: Tensor = self.x_pad_token
        clean = None
        if layout.clean is not None and references is not None:
            embedded = self.all_x_embedder[PATCH](references.to(dtype))
            rest = rest.to(dtype).repeat(len(layout.image.positions), 1).index_copy_(0, layout.clean, embedded)
            clean = torch.ones(1, dtype=torch.float32, device=rest.device)
        return Context(
            image=layout.image,
            joint=layout.joint,
            gather=layout.gather,
            text=tokens,
            image_rope=rope_table(layout.image.positions, config.axes_dims, config.rope_theta),
            joint_rope=rope_table(layout.joint.positions, config.axes_dims, config.rope_theta),
            rest=rest,
            clean=clean,
        )

    def _refined(self, tokens: Tensor, pack: Pack, refiner: nn.ModuleList) -> Tensor:
        """Run a stream (N, dim) through a refiner that does not depend on the time -> (N, dim)."""
        rope = rope_table(pack.positions, self.config.axes_dims, self.config.rope_theta)
        for block in refiner:
            tokens = block(tokens, rope, pack.spans)
        return tokens

    def forward(self, x: Tensor, t: Tensor, context: Context, control: Steering | None = None) -> Tensor:
        """Predict the velocity at x: x + (sigma - sigma_next) · velocity is the next, less noisy state.

        x (n, patch_dim): noisy patches of all items · t (items,) or (1,) fp32, 0 noise to 1 image (1 - sigma) ·
        control: what adds to the streams on their way -> (n, patch_dim), dtype of the context's tokens.
        """
        pack, joint, dtype = context.image, context.joint, context.text.dtype
        if context.clean is not None:
            # One row an item, and after them the one that all clean tokens read.
            t = torch.cat((t.expand(len(joint.spans.lengths)), context.clean))
        time = self.t_embedder(t * self.config.t_scale, dtype)  # (R, adaln_dim)
        image = pack.fill(self.all_x_embedder[PATCH](x.to(dtype)), context.rest)
        hints: Iterable[Tensor | None] = (None,) * len(self.layers)
        if control is None:
            tokens = self.joined(image, time, context)
        else:
            tokens, hints = control(self, image, time, context)
        for block, hint in zip(self.layers, hints, strict=True):
            tokens = block(tokens, context.joint_rope, joint.spans, time, joint.modulation_row)
            tokens = tokens if hint is None else tokens + hint
        return self.all_final_layer[PATCH](tokens[joint.token_index], time, joint.modulation_row[joint.token_index])

    def joined(self, image: Tensor, time: Tensor, context: Context, hints: Sequence[Tensor] = ()) -> Tensor:
        """Refine embedded image tokens (N_image, dim), after each block plus its hint, and join them with the caption.

        time (R, adaln_dim) · hints: none, or one (N_image, dim) a block of the refiner -> (N, dim) in joint order.
        """
        pack = context.image
        for i, block in enumerate(self.noise_refiner):
            image = block(image, context.image_rope, pack.spans, time, pack.modulation_row)
            image = image + hints[i] if hints else image
        return torch.cat((image, context.text))[context.gather]
