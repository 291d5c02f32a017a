"""Qwen3 as a text encoder: run to the layer whose output is used, and no further.

The transformer reads the output of the last layer but one, before the final norm. So the last layer, the final norm
and the head are never computed nor read, and the token embedding, a fifth of the weights, is read by rows straight
from the checkpoint: what comes in are embeddings, not ids.

Prompts are packed end to end without padding. Attention is causal and stays inside its prompt, so a packed prompt has
the features it has alone, and those it has padded to 512 in the official pipeline.

Modules carry the official names, `model.layers.0.self_attn.q_proj.weight`. Source: the Qwen3 technical report
(grouped-query attention with normalized q and k, no biases) and the key set of transformers 4.51. Generation, caches
and sliding windows are not here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3dit.kernels.norm import qk_norm_rope
from s3dit.kernels.swiglu import swiglu
from s3dit.model.config import TextEncoderConfig
from s3dit.model.hooks import unhookable
from s3dit.model.layers import RMSNorm, kept
from s3dit.model.linear import Linear, joint

EMBEDDING = "model.embed_tokens.weight"
FUSED = "it is computed inside of a fused operation (qk_norm_rope, which trace_op can see)"


class TextEncoder(nn.Module):
    """Qwen3 from token embeddings of packed prompts to the features that the transformer reads."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)

    @property
    def unused(self) -> tuple[str, ...]:
        """Patterns of official names that are not read: the layers above the features, the embedding, the head."""
        return (
            "model.embed_tokens.*",
            f"model.layers.{self.config.num_hidden_layers - 1}.*",
            "model.norm.weight",
            "lm_head.weight",
        )

    def forward(self, x: Tensor, lengths: Sequence[int], rope: Tensor | None = None) -> Tensor:
        """Compute the features of several prompts, laid end to end.

        x (n, hidden) token embeddings of any float dtype, lengths: tokens of each prompt, summing to n, rope: their
        `rope_of`, or None -> (n, hidden), dtype of x: the output of the last layer but one. Raises ValueError where
        lengths and x do not agree.
        """
        if x.dim() != 2 or sum(lengths) != x.shape[0] or min(lengths, default=0) < 1:
            raise ValueError(
                f"x is {tuple(x.shape)} with lengths {list(lengths)}; needed (n, hidden) and positive lengths of sum n"
            )
        rope = self.rope_of(lengths, x.device) if rope is None else rope
        for layer in self.model.layers[:-1]:
            x = layer(x, rope, list(lengths))
        return x

    def rope_of(self, lengths: Sequence[int], device: torch.device) -> Tensor:
        """Return the `rope_table` of prompts of these lengths, on a device; the last few are kept."""
        return rope_table(tuple(lengths), self.config.head_dim, self.config.rope_theta, device)


class Stack(nn.Module):
    """The container named `model.` in the official files; it has no forward of its own."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        # Drawing its random start on the meta device would import two seconds of compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Layer(nn.Module):
    """One decoder layer: attention and SwiGLU, each behind a norm and beside a shortcut."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Tensor, lengths: list[int] | int) -> Tensor:
        """Apply to x (n, hidden) of any float dtype -> (n, hidden), same dtype; lengths: of each prompt, or of all."""
        mixed = self.self_attn(self.input_layernorm(x), rope, lengths)
        x, normed = self.post_attention_layernorm.of_sum(x, mixed)
        return x + self.mlp(normed)


class Attention(nn.Module):
    """Causal attention within each prompt; several query heads share one key and value head."""

    joinable = (("q_proj", "k_proj", "v_proj"),)

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, inner, bias=False)
        self.k_proj = Linear(config.hidden_size, shared, bias=False)
        self.v_proj = Linear(config.hidden_size, shared, bias=False)
        self.o_proj = Linear(inner, config.hidden_size, bias=False)
        self.q_norm = unhookable(RMSNorm(config.head_dim, config.rms_norm_eps), FUSED)
        self.k_norm = unhookable(RMSNorm(config.head_dim, config.rms_norm_eps), FUSED)

    def forward(self, x: Tensor, rope: Tensor, lengths: list[int] | int) -> Tensor:
        """Apply to x (n, hidden) of any float dtype -> (n, hidden), same dtype; lengths: of each prompt, or of all."""
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in joint(x, layers))  # (n, H, D), (n, KV, D) twice
        turned = qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, rope, self.q_norm.eps, "halves")
        if not isinstance(lengths, list):
            # A graph's number of prompts is an input: no loop over them.
            return self.o_proj(_causal(*(y.unflatten(0, (-1, lengths)) for y in (*turned, v))).flatten(0, 1).flatten(1))
        pieces = (y.split(lengths) for y in (*turned, v))
        prompts = [_causal(*(y[None] for y in prompt))[0] for prompt in zip(*pieces, strict=True)]
        mixed = prompts[0] if len(prompts) == 1 else torch.cat(prompts)
        return self.o_proj(mixed.flatten(1))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Prompts of one length: q (B, n, H, D), k and v (B, n, KV, D) -> (B, n, H, D)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, n, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) · up)."""

    joinable = (("gate_proj", "up_proj"),)

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (n, hidden) of any float dtype -> (n, hidden), same dtype."""
        gate, up = joint(x, (self.gate_proj, self.up_proj))
        return self.down_proj(swiglu(gate, up, self.down_proj.input_dtype))


@kept(16)
def rope_table(lengths: tuple[int, ...], dim: int, theta: float, device: torch.device) -> Tensor:
    """Return the `rotations` of prompts of these lengths, each counting from 0, on a device: (n, dim / 2, 2) fp32."""
    return rotations(torch.cat([torch.arange(length) for length in lengths]), dim, theta).to(device)


def rotations(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Return (cos, sin) of the angles of tokens at positions (n,) integers: (n, dim / 2, 2) fp32.

    Qwen pairs element i with i + dim/2: the "halves" of `qk_norm_rope`.
    """
    # parity: angles in fp32, as the reference takes them; in float64 position 1000 parts from it by 3e-5.
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    angles = positions.float()[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1)
