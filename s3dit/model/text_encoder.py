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

from s3dit.kernels.swiglu import swiglu
from s3dit.model.config import TextEncoderConfig
from s3dit.model.layers import RMSNorm
from s3dit.model.linear import Linear

EMBEDDING = "model.embed_tokens.weight"


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

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Compute the features of several prompts, laid end to end.

        x (n, hidden) token embeddings of any float dtype, lengths: tokens of each prompt, summing to n -> (n, hidden),
        dtype of x: the output of the last layer but one. Raises ValueError where lengths and x do not agree.
        """
        if x.dim() != 2 or sum(lengths) != x.shape[0] or min(lengths, default=0) < 1:
            raise ValueError(
                f"x is {tuple(x.shape)} with lengths {list(lengths)}; needed (n, hidden) and positive lengths of sum n"
            )
        lengths = list(lengths)
        rope = rope_table(lengths, self.config.head_dim, self.config.rope_theta, x)
        for layer in self.model.layers[:-1]:
            x = layer(x, rope, lengths)
        return x


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """Apply to x (n, hidden) of any float dtype -> (n, hidden), same dtype."""
        x = x + self.self_attn(self.input_layernorm(x), rope, lengths)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention within each prompt; several query heads share one key and value head."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, inner, bias=False)
        self.k_proj = Linear(config.hidden_size, shared, bias=False)
        self.v_proj = Linear(config.hidden_size, shared, bias=False)
        self.o_proj = Linear(inner, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """Apply to x (n, hidden) of any float dtype -> (n, hidden), same dtype."""
        heads = (-1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, heads)), rope)  # (n, H, D)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, heads)), rope)  # (n, KV, D)
        v = self.v_proj(x).unflatten(-1, heads)
        prompts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return self.o_proj(torch.cat([_causal(*prompt) for prompt in prompts]).flatten(1))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One prompt: q (n, H, D), k and v (n, KV, D) -> (n, H, D)."""
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))  # (1, H, n, D)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) · up)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (n, hidden) of any float dtype -> (n, hidden), same dtype."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def rope_table(lengths: Sequence[int], dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every token's angles, each prompt counting from 0: two (n, 1, dim), dtype of `like`.

    Both halves of the last dimension hold the same angles: Qwen pairs element i with i + dim/2.
    """
    # parity: angles in fp32, as the reference takes them; in float64 position 1000 parts from it by 3e-5.
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    positions = torch.cat([torch.arange(length) for length in lengths])
    angles = (positions.float()[:, None] * frequencies).repeat(1, 2)[:, None, :].to(like.device)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + D/2) of x (n, H, D) by its token's angle; rope: two (n, 1, D) -> (n, H, D)."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
