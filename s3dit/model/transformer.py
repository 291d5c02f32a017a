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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from s3dit.kernels.attention import Spans, attention
from s3dit.kernels.norm import gated_residual, gated_residual_norm, qk_norm_rope, rms_norm_modulate
from s3dit.kernels.scheme import QuantizedRows
from s3dit.model.config import TransformerConfig
from s3dit.model.hooks import hooked, unhookable
from s3dit.model.layers import RMSNorm, kept, rope_table
from s3dit.model.layout import Layout, Pack
from s3dit.model.linear import Linear, joint, swiglu_layers
from s3dit.model.timestep import FinalLayer, Modulation, TimestepEmbedder, modulation_tables

# The one patch size ever published, as the official names spell it: 2 × 2 latent pixels, 1 frame.
PATCH = "2-1"
# Why hooks on some norms are refused.
FUSED = "it is computed inside of a fused operation ({}, which trace_op can see)"
# Official `Attention` builds its query and key norms with this, whatever `norm_eps` says.
QK_EPS = 1e-5


def common_input_dtype(*layers: Linear) -> torch.dtype | None:
    """Return the 8-bit dtype that all of these layers take their common input in, None where one takes floats."""
    first, *rest = (layer.input_dtype for layer in layers)
    return first if all(other == first for other in rest) else None


class Attention(nn.Module):
    """Self-attention of packed tokens, with per-head RMSNorm and rotation of queries and keys."""

    joinable = (("to_q", "to_k", "to_v"),)

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
        # In no list that would hold them any longer than they are read.
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in joint(x, (self.to_q, self.to_k, self.to_v)))  # (N, H, D)
        q, k = qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, rope, QK_EPS)
        return self.to_out[0](attention(q, k, v, spans, spans).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    joinable = (("w1", "w3"),)

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The 8-bit dtype that x may be handed over in (QuantizedRows), None for floats only."""
        return common_input_dtype(self.w1, self.w3)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Apply to x (N, dim), or to its QuantizedRows -> (N, dim)."""
        return self.w2(swiglu_layers(self.w1, self.w3, x, self.w2.input_dtype))


# What the end of a block needs to norm the tokens for the next one: its first factor (R, dim), and its input dtype.
Following = tuple[Tensor, torch.dtype | None]


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
            unhookable(self.attention_norm1, FUSED.format("rms_norm_modulate or gated_residual_norm"))
            unhookable(self.attention_norm2, FUSED.format("gated_residual_norm"))
            unhookable(self.ffn_norm1, FUSED.format("gated_residual_norm"))
            unhookable(self.ffn_norm2, FUSED.format("gated_residual or gated_residual_norm"))

    def norms(self) -> Tensor:
        """Return the weights of the norms in the order in which they act, (4, dim)."""
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        return torch.stack([norm.weight for norm in norms])

    def forward(
        self, x: Tensor, rope: Tensor, spans: Spans, time: Tensor, modulation_row: Tensor, tables: Tensor | None = None,
        normed: Tensor | QuantizedRows | None = None, following: Following | None = None,
    ) -> Any:  # fmt: skip
        """Apply to x (N, dim) with rope (N, head_dim / 2, 2) fp32 -> (N, dim), with `following` also its norm.

        time (R, adaln_dim): one row an item, or one for all · modulation_row (N,) int64: which of them a token reads ·
        tables (4, R, dim): `modulation_tables` of this time, computed here where there are none · normed: x as the
        block before has normed it for this one · following: as the next block wants it.
        """
        if tables is None:
            tables = modulation_tables(self.adaLN_modulation(time), self.norms())
        factor, gate, ffn_factor, ffn_gate = tables
        if normed is None:
            normed = rms_norm_modulate(x, factor, modulation_row, self.eps, self.attention.input_dtype)
        mixed, ffn_dtype = self.attention(normed, rope, spans), self.feed_forward.input_dtype
        x, normed = gated_residual_norm(x, mixed, gate, ffn_factor, modulation_row, self.eps, ffn_dtype)
        mixed = self.feed_forward(normed)
        if following is None:
            return gated_residual(x, mixed, ffn_gate, modulation_row, self.eps)
        factor, input_dtype = following
        return gated_residual_norm(x, mixed, ffn_gate, factor, modulation_row, self.eps, input_dtype)


def alone(block: Block) -> bool:
    """Return whether a block is called with its own arguments only, and computes its tables and norms itself.

    So are blocks that have hooks, which may replace what it is given and answers, and before which the weights of a
    streamed block are not there; and those with a forward of their own, compiled ones say.
    """
    return "forward" in vars(block) or hooked(block, *block.adaLN_modulation.modules())


class PlainBlock(Block):
    """The same block without modulation: of the caption and vision refiners, which do not depend on the time."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, modulated=False)

    def forward(self, x: Tensor, rope: Tensor, spans: Spans) -> Tensor:  # type: ignore[override]
        """Apply to x (N, dim), rope (N, head_dim / 2, 2) fp32 -> (N, dim)."""
        mixed = self.attention_norm2(self.attention(self.attention_norm1(x), rope, spans))
        x, normed = self.ffn_norm1.of_sum(x, mixed)
        return x + self.ffn_norm2(self.feed_forward(normed))


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

    def times(self, t: Tensor) -> Tensor:
        """Return the times of all rows of the modulation: t, or with clean tokens one an item and then theirs."""
        if self.clean is None:
            return t
        return torch.cat((t.expand(len(self.joint.spans.lengths), *t.shape[1:]), self.clean.expand(1, *t.shape[1:])))


# Three of a layout, and of two where guidance is on in some steps.
@kept(8)
def pack_rope(pack: Pack, axes_dims: tuple[int, ...], theta: float) -> Tensor:
    """Return the `rope_table` of a pack's tokens, on the device of the pack."""
    return rope_table(pack.positions, axes_dims, theta).to(pack.token_index.device)


class Steering(Protocol):
    """The interface of what adds to the streams of a pass; `controlnet.Controls` implements it."""

    def __call__(
        self, model: "Transformer", image: Tensor, modulation: Modulation, context: Context
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
        if config.target_timestep:
            self.t_embedder_2 = TimestepEmbedder(config.adaln_dim)
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
            image_rope=pack_rope(layout.image, config.axes_dims, config.rope_theta),
            joint_rope=pack_rope(layout.joint, config.axes_dims, config.rope_theta),
            rest=rest,
            clean=clean,
        )

    def _refined(self, tokens: Tensor, pack: Pack, refiner: nn.ModuleList) -> Tensor:
        """Run a stream (N, dim) through a refiner that does not depend on the time -> (N, dim)."""
        rope = pack_rope(pack, self.config.axes_dims, self.config.rope_theta)
        for block in refiner:
            tokens = block(tokens, rope, pack.spans)
        return tokens

    def embed_time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed times (R,), or of TwinFlow's models (R, 2) with the times aimed at -> (R, adaln_dim) of dtype.

        Source: `ZImageTransformer2DModelWrapper` of inclusionAI/TwinFlow, where that is `target_timestep`.
        """
        scaled = t * self.config.t_scale
        if t.ndim == 1:
            return self.t_embedder(scaled, dtype)
        way = self.t_embedder_2(scaled[:, 1] - scaled[:, 0], dtype) * (t[:, 0] - t[:, 1]).abs()[:, None]
        return (self.t_embedder(scaled[:, 0], dtype) + way).to(dtype)

    def modulation(self, t: Tensor, dtype: torch.dtype) -> Modulation:
        """Compute what the layers read of the times t (R,) or (R, 2) fp32, in the dtype of the tokens.

        A product a layer, for all rows: one for all layers would need their weights, 2 % of the model, a second time.
        """
        time, dim = self.embed_time(t, dtype), self.config.dim
        # Of a block that is alone the weights may be elsewhere, and nobody reads its rows.
        blocks = self._modulated
        answers, norms = [time.new_zeros(t.shape[0], 4 * dim)] * len(blocks), [time.new_zeros(4, dim)] * len(blocks)
        for i, block in enumerate(blocks):
            if not alone(block):
                answers[i], norms[i] = block.adaLN_modulation(time), block.norms()
        tables = modulation_tables(torch.stack(answers), torch.stack(norms))
        final: Any = self.all_final_layer[PATCH]
        return Modulation(time, tables, 1.0 + final.adaLN_modulation(time), tuple(map(alone, blocks)))

    @property
    def _modulated(self) -> list[Block]:
        """The blocks that read the time, in the order in which they run."""
        return [*self.noise_refiner, *self.layers]

    def forward(
        self, x: Tensor, t: Tensor, context: Context, control: Steering | None = None,
        modulation: Modulation | None = None,
    ) -> Tensor:  # fmt: skip
        """Predict the velocity at x: x + (sigma - sigma_next) · velocity is the next, less noisy state.

        x (n, patch_dim): noisy patches of all items · t (items,) or (1,) fp32, 0 noise to 1 image (1 - sigma); of
        TwinFlow's models also (items, 2) or (1, 2), with the time that the step aims at (see `embed_time`) · control:
        what adds to the streams on their way · modulation: of `context.times(t)`, computed here where it was not, or
        where hooks came or went since -> (n, patch_dim), dtype of the context's tokens.
        """
        pack, joint, dtype = context.image, context.joint, context.text.dtype
        final: Any = self.all_final_layer[PATCH]
        embedders = (self.t_embedder, self.t_embedder_2) if self.config.target_timestep else (self.t_embedder,)
        timed = (module for part in (*embedders, final.adaLN_modulation) for module in part.modules())
        if modulation is None or hooked(*timed) or modulation.alone != tuple(map(alone, self._modulated)):
            modulation = self.modulation(context.times(t), dtype)
        image = pack.fill(self.all_x_embedder[PATCH](x.to(dtype)), context.rest)
        hints: Iterable[Tensor | None] = (None,) * len(self.layers)
        if control is None:
            tokens = self.joined(image, modulation, context)
        else:
            tokens, hints = control(self, image, modulation, context)
        main = slice(len(self.noise_refiner), None)
        tokens = self._through(main, tokens, context.joint_rope, joint, modulation, hints)
        scale = modulation.final
        scale = scale if scale.shape[0] == 1 else scale[joint.modulation_row[joint.token_index]]
        return final(tokens[joint.token_index], scale)

    def joined(
        self, image: Tensor, modulation: Modulation, context: Context, hints: Sequence[Tensor | None] = ()
    ) -> Tensor:
        """Refine embedded image tokens (N_image, dim), after each block plus its hint, and join them with the caption.

        hints: none, or one (N_image, dim) a block of the refiner -> (N, dim) in joint order.
        """
        hints, first = hints or (None,) * len(self.noise_refiner), slice(len(self.noise_refiner))
        image = self._through(first, image, context.image_rope, context.image, modulation, hints)
        return torch.cat((image, context.text))[context.gather]

    def _through(
        self, which: slice, x: Tensor, rope: Tensor, pack: Pack, modulation: Modulation, hints: Iterable[Tensor | None]
    ) -> Tensor:
        """Run a stream x (N, dim) through some of the modulated blocks, after each plus its hint, if any -> (N, dim).

        The end of a block norms the tokens for the next one, where nothing comes between them.
        """
        blocks, by_itself, tables = self._modulated[which], modulation.alone[which], modulation.tables[which]
        own, normed = (rope, pack.spans, modulation.time, pack.modulation_row), None
        for i, (block, hint) in enumerate(zip(blocks, hints, strict=True)):
            following = None
            if hint is None and not any(by_itself[i : i + 2]) and i + 1 < len(blocks):
                following = tables[i + 1, 0], blocks[i + 1].attention.input_dtype
            answer = block(x, *own) if by_itself[i] else block(x, *own, tables[i], normed, following)
            x, normed = (answer, None) if following is None else answer
            x = x if hint is None else x + hint
        return x
