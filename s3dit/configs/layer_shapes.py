"""The layers of each part of a model, by its configuration: their names and the shapes of their weights.

What a file lacks is known by these without building a module, so without torch; tests/configs/test_layer_shapes.py
compares them with the modules. Biases are not listed.
"""

from collections.abc import Iterator
from typing import Any

from s3dit.configs.part_configs import TextEncoderConfig, TransformerConfig, VAEConfig

Shapes = Iterator[tuple[str, tuple[int, ...]]]
# Of a timestep embedder: frequencies in, and rows of its first layer.
FREQUENCIES, TIMESTEP_WIDTH = 256, 1024


def layer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of the weight of each layer; a parameter that is no layer's stands for itself.

    config: of a transformer, a text encoder or an autoencoder.
    """
    kinds = {TransformerConfig: _transformer, TextEncoderConfig: _text_encoder, VAEConfig: _vae}
    return dict(kinds[type(config)](config))  # type: ignore[operator]


def _transformer(config: TransformerConfig) -> Shapes:
    dim, time = config.dim, config.adaln_dim
    names = ["x_pad_token", "cap_pad_token"]
    lists = {"noise_refiner": config.n_refiner_layers, "context_refiner": config.n_refiner_layers}
    lists["layers"] = config.n_layers
    embedders = {"cap_embedder": config.cap_feat_dim}
    if config.siglip_feat_dim is not None:
        names.append("siglip_pad_token")
        lists["siglip_refiner"] = config.n_refiner_layers
        embedders["siglip_embedder"] = config.siglip_feat_dim
    yield from ((name, (1, dim)) for name in names)
    yield "all_x_embedder.2-1", (dim, config.patch_dim)
    yield "all_final_layer.2-1.linear", (config.patch_dim, dim)
    yield "all_final_layer.2-1.adaLN_modulation.1", (dim, time)
    for stem, width in embedders.items():
        yield from ((f"{stem}.0", (width,)), (f"{stem}.1", (dim, width)))
    for stem in ("t_embedder", *(["t_embedder_2"] if config.target_timestep else [])):
        yield from ((f"{stem}.mlp.0", (TIMESTEP_WIDTH, FREQUENCIES)), (f"{stem}.mlp.2", (time, TIMESTEP_WIDTH)))
    for stem, count in lists.items():
        for i in range(count):
            yield from _block(config, f"{stem}.{i}", modulated=stem in ("layers", "noise_refiner"))


def _block(config: TransformerConfig, stem: str, modulated: bool) -> Shapes:
    dim, hidden = config.dim, config.ffn_dim
    yield from ((f"{stem}.attention.{name}", (dim, dim)) for name in ("to_q", "to_k", "to_v", "to_out.0"))
    if config.qk_norm:
        yield from ((f"{stem}.attention.{name}", (config.head_dim,)) for name in ("norm_q", "norm_k"))
    yield from ((f"{stem}.feed_forward.{name}", (hidden, dim)) for name in ("w1", "w3"))
    yield f"{stem}.feed_forward.w2", (dim, hidden)
    yield from ((f"{stem}.{name}{i}", (dim,)) for name in ("attention_norm", "ffn_norm") for i in (1, 2))
    if modulated:
        yield f"{stem}.adaLN_modulation.0", (4 * dim, config.adaln_dim)


def _text_encoder(config: TextEncoderConfig) -> Shapes:
    width, hidden, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, shared = config.num_attention_heads * head, config.num_key_value_heads * head
    yield from (("model.embed_tokens", (config.vocab_size, width)), ("model.norm", (width,)))
    for i in range(config.num_hidden_layers):
        stem = f"model.layers.{i}"
        yield from ((f"{stem}.self_attn.{name}_proj", (rows, width)) for name, rows in (("q", queries), ("k", shared)))
        yield from ((f"{stem}.self_attn.v_proj", (shared, width)), (f"{stem}.self_attn.o_proj", (width, queries)))
        yield from ((f"{stem}.self_attn.{name}_norm", (head,)) for name in ("q", "k"))
        yield from ((f"{stem}.mlp.{name}_proj", (hidden, width)) for name in ("gate", "up"))
        yield f"{stem}.mlp.down_proj", (width, hidden)
        yield from ((f"{stem}.{name}_layernorm", (width,)) for name in ("input", "post_attention"))


def _vae(config: VAEConfig) -> Shapes:
    widths = config.block_out_channels
    yield from _coder("encoder", config, "down", widths, config.layers_per_block)
    yield "encoder.conv_in", (widths[0], config.in_channels, 3, 3)
    yield "encoder.conv_out", (2 * config.latent_channels, widths[-1], 3, 3)
    yield from _coder("decoder", config, "up", widths[::-1], config.layers_per_block + 1)
    yield "decoder.conv_in", (widths[-1], config.latent_channels, 3, 3)
    yield "decoder.conv_out", (config.out_channels, widths[0], 3, 3)


def _coder(stem: str, config: VAEConfig, way: str, widths: tuple[int, ...], resnets: int) -> Shapes:
    """An encoder ("down") or a decoder ("up"), its first and last convolution apart; widths: in its own order."""
    before = widths[0]
    for level, width in enumerate(widths):
        block = f"{stem}.{way}_blocks.{level}"
        for i in range(resnets):
            yield from _resnet(f"{block}.resnets.{i}", before, width)
            before = width
        if level < len(widths) - 1:
            yield f"{block}.{way}samplers.0.conv", (width, width, 3, 3)
    middle = config.block_out_channels[-1]
    for i in range(2):
        yield from _resnet(f"{stem}.mid_block.resnets.{i}", middle, middle)
    yield f"{stem}.mid_block.attentions.0.group_norm", (middle,)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{stem}.mid_block.attentions.0.{name}", (middle, middle)
    yield f"{stem}.conv_norm_out", (widths[-1],)


def _resnet(stem: str, width: int, out: int) -> Shapes:
    yield from ((f"{stem}.norm1", (width,)), (f"{stem}.conv1", (out, width, 3, 3)))
    yield from ((f"{stem}.norm2", (out,)), (f"{stem}.conv2", (out, out, 3, 3)))
    if width != out:
        yield f"{stem}.conv_shortcut", (out, width, 1, 1)
