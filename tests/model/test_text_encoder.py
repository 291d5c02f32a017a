"""Qwen3 against its formula written out with loops in fp64, and the properties of packing."""

import math

import pytest
import torch
from torch import nn

from s3dit.model.config import TextEncoderConfig
from s3dit.model.text_encoder import EMBEDDING, TextEncoder

# Grouped heads, a head width that is not hidden / heads, a feed-forward wider than hidden.
CONFIG = TextEncoderConfig(
    vocab_size=11, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4,
)  # fmt: skip
# fp32 arithmetic of two layers against fp64: rounding of 2^-24 a step, a few dozen steps. Seen: 1e-7.
ROUNDING = 1e-6


def build(config=CONFIG, seed=0):
    """An encoder whose norms are not 1 and whose attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    encoder = TextEncoder(config)
    for name, parameter in encoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.data = scale * noise + (1.0 if "norm" in name else 0.0)
        parameter.requires_grad_(False)
    return encoder


def embeddings(n, seed=1, width=CONFIG.hidden_size):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def distance(found, needed):
    return ((found.double() - needed.double()).norm() / needed.double().norm()).item()


def by_formula(encoder, x):
    """One prompt in fp64, head by head and token by token; reads weights by their official names only."""
    c, w = encoder.config, {name: p.double() for name, p in encoder.state_dict().items()}

    def norm(v, weight):
        return v / torch.sqrt((v * v).mean() + c.rms_norm_eps) * weight

    def turned(v, position):
        half, out = c.head_dim // 2, v.clone()
        for i in range(half):
            angle = position / c.rope_theta ** (2 * i / c.head_dim)
            a, b = v[i].item(), v[i + half].item()
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = x.double()
    for layer in range(c.num_hidden_layers - 1):
        at = f"model.layers.{layer}."
        normed = torch.stack([norm(v, w[at + "input_layernorm.weight"]) for v in x])
        q, k, v = ((normed @ w[at + f"self_attn.{n}_proj.weight"].T).unflatten(1, (-1, c.head_dim)) for n in "qkv")
        mixed = torch.zeros(len(x), c.num_attention_heads, c.head_dim, dtype=torch.float64)
        for head in range(c.num_attention_heads):
            shared = head // (c.num_attention_heads // c.num_key_value_heads)
            keys = [turned(norm(t, w[at + "self_attn.k_norm.weight"]), i) for i, t in enumerate(k[:, shared])]
            for i in range(len(x)):
                query = turned(norm(q[i, head], w[at + "self_attn.q_norm.weight"]), i)
                scores = torch.stack([query @ key for key in keys[: i + 1]]) / math.sqrt(c.head_dim)
                mixed[i, head] = scores.softmax(0) @ v[: i + 1, shared]
        x = x + mixed.flatten(1) @ w[at + "self_attn.o_proj.weight"].T
        normed = torch.stack([norm(v, w[at + "post_attention_layernorm.weight"]) for v in x])
        gate, up = (normed @ w[at + f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T
    return x


@pytest.mark.parametrize("n", [1, 2, 9])
def test_formula(n):
    encoder, x = build(), embeddings(n)
    assert distance(encoder(x, [n]), by_formula(encoder, x)) < ROUNDING


def test_packed_is_one_by_one():
    """Ragged prompts end to end have the features they have alone; matrix products may round apart."""
    encoder, lengths = build(), [1, 7, 33, 2]
    x = embeddings(sum(lengths))
    packed = encoder(x, lengths)
    for one, features in zip(x.split(lengths), packed.split(lengths), strict=True):
        assert distance(features, encoder(one, [len(one)])) < ROUNDING


def test_order_of_prompts_does_not_matter():
    encoder, first, second = build(), embeddings(5, 2), embeddings(3, 3)
    one = encoder(torch.cat((first, second)), [5, 3]).split([5, 3])
    other = encoder(torch.cat((second, first)), [3, 5]).split([3, 5])
    assert distance(one[0], other[1]) < ROUNDING and distance(one[1], other[0]) < ROUNDING


def test_causal():
    """What comes later changes nothing before it: 0.0, the rows take the same path."""
    encoder, x = build(), embeddings(8)
    changed = torch.cat((x[:5], embeddings(3, 7)))
    one, other = encoder(x, [8]), encoder(changed, [8])
    assert torch.equal(one[:5], other[:5]) and not torch.equal(one[5:], other[5:])


def test_position_matters():
    encoder, x = build(), embeddings(1).expand(4, -1).clone()
    assert distance(encoder(x, [4])[3], encoder(x, [4])[0]) < ROUNDING, "equal tokens attend to equal values"
    x[0] += 1
    features = encoder(x, [4])
    assert distance(features[3], features[2]) > 1e-3


def test_what_is_unused_is_not_computed():
    """Last layer, final norm and embedding hold NaN or nothing, and the features are the same bits."""
    encoder, x = build(), embeddings(6)
    needed = encoder(x, [6])
    for name, parameter in encoder.named_parameters():
        if name.startswith("model.layers.2.") or name in ("model.norm.weight", EMBEDDING):
            parameter.fill_(float("nan"))
    encoder.model.layers[2].to("meta")
    assert torch.equal(encoder(x, [6]), needed)


def test_unused_names_are_real_names():
    from fnmatch import fnmatchcase

    names = list(build().state_dict())
    unused = [name for name in names if any(fnmatchcase(name, pattern) for pattern in build().unused)]
    assert len(names) == 3 * 11 + 2 and EMBEDDING in unused and "model.norm.weight" in unused
    assert sorted(unused) == sorted(n for n in names if n.startswith("model.layers.2.") or "layers" not in n)


def test_eleven_layers_leave_layer_one_alone():
    """`model.layers.10.*` must not swallow `model.layers.1.`, nor `model.layers.1.*` a layer above nine."""
    with torch.device("meta"):
        encoder = TextEncoder(TextEncoderConfig(11, 8, 8, 2, 1, 1, 8, 1e-6, 1e4))
        twelve = TextEncoder(TextEncoderConfig(11, 8, 8, 12, 1, 1, 8, 1e-6, 1e4))
    from fnmatch import fnmatchcase

    assert "model.layers.1.*" in encoder.unused and "model.layers.11.*" in twelve.unused
    assert not any(fnmatchcase("model.layers.1.mlp.up_proj.weight", pattern) for pattern in twelve.unused)
    assert not any(fnmatchcase("model.layers.11.mlp.up_proj.weight", pattern) for pattern in encoder.unused)


def test_one_layer_gives_the_embeddings():
    config = TextEncoderConfig(11, 24, 40, 1, 4, 2, 8, 1e-6, 1e4)
    x = embeddings(3)
    assert torch.equal(build(config)(x, [3]), x)


def test_narrow_weights_wide_activations():
    """bf16 weights with fp32 activations are the rounded weights in fp32: 0.0, widening is exact."""
    narrow, wide = build().bfloat16(), build().bfloat16().float()
    x = embeddings(9)
    features = narrow(x, [9])
    assert features.dtype == torch.float32 and torch.equal(features, wide(x, [9]))


def test_bf16_stays_near():
    """bf16 has 8 bits: 2^-9 a rounding, some thirty of them; seen 1.1e-2."""
    encoder, x = build(), embeddings(9)
    features = encoder.bfloat16()(x.bfloat16(), [9])
    assert features.dtype == torch.bfloat16
    assert distance(features, by_formula(build(), x)) < 3e-2


def test_input_is_left_alone():
    x = embeddings(4)
    before = x.clone()
    build()(x, [4])
    assert torch.equal(x, before)


@pytest.mark.parametrize("lengths", [[], [3], [5], [4, 0], [-1, 5], [2, 2, 0]])
@pytest.mark.sampled(1)
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match="positive lengths of sum n"):
        build()(embeddings(4), lengths)


def test_no_prompts():
    with pytest.raises(ValueError, match="positive lengths of sum n"):
        build()(embeddings(0), [])


def test_shape_that_does_not_fit():
    with pytest.raises(ValueError, match=r"needed \(n, hidden\)"):
        build()(embeddings(4)[None], [4])


def test_fresh_embedding_can_be_trained():
    assert isinstance(TextEncoder(CONFIG).model.embed_tokens, nn.Embedding)
    assert TextEncoder(CONFIG).model.embed_tokens.weight.requires_grad
