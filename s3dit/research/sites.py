"""Sites: the places of a model whose numbers can be seen and edited, by names that are the same on every checkpoint.

A name is a block and what is computed in it, `layers.12.attention.q`; patterns have `*` inside one part and `**` over
several. Each site says where its tensor is found: the input or output of a module, or a result of an Op inside a block.
Nothing of the model is changed for it; see `instrument`.

Blocks are `noise_refiner.N` (image tokens), `context_refiner.N` (caption), `siglip_refiner.N` (references' features)
and `layers.N` (the joint sequence). In each, in the order of its computation:

| site | what it is |
|---|---|
| `input` | what comes in, the residual stream |
| `modulation` | scale and gate of attention, scale and gate of the feed-forward, before tanh; modulated blocks only |
| `attention.norm` | its normed (and modulated) input |
| `attention.q`, `.k`, `.v` | projections, all heads side by side |
| `attention.q_rope`, `.k_rope` | queries and keys as they are multiplied: normed and rotated |
| `attention.heads` | what each head answers, before `to_out` |
| `attention.output` | after `to_out` |
| `attention.added` | what is added to the residual: after its second norm and gate |
| `between` | the residual between attention and feed-forward |
| `ffn.norm` | the feed-forward's normed (and modulated) input |
| `ffn.gate`, `.up`, `.product` | w1 x and w3 x, and silu(gate) · up, which w2 reads |
| `ffn.output`, `.added` | after w2; what is added to the residual |
| `output` | the residual that leaves the block |

Beside blocks: `velocity` and `x0` (the estimate of the image) of each branch, as patches; `text_encoder.layers.N.input`
and `.output`; `vae.decoder.…output` and `vae.encoder.…output` of conv_in, resnets, attentions and samplers.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from s3dit.errors import RequestError
from s3dit.loaded_model import LoadedModel
from s3dit.model.transformer import PlainBlock, Transformer
from s3dit.research.trace import pattern_regex

# Block lists of the transformer, and the stream that each runs in.
STACKS = {"noise_refiner": "image", "context_refiner": "text", "siglip_refiner": "vision", "layers": "joint"}
# Suffix of a site -> module inside the block, "in" or "out".
MODULES = {
    "input": ("", "in"),
    "modulation": ("adaLN_modulation", "out"),
    "attention.norm": ("attention", "in"),
    "attention.q": ("attention.to_q", "out"),
    "attention.k": ("attention.to_k", "out"),
    "attention.v": ("attention.to_v", "out"),
    "attention.output": ("attention", "out"),
    "ffn.norm": ("feed_forward", "in"),
    "ffn.gate": ("feed_forward.w1", "out"),
    "ffn.up": ("feed_forward.w3", "out"),
    "ffn.product": ("feed_forward.w2", "in"),
    "ffn.output": ("feed_forward", "out"),
    "output": ("", "out"),
}
# Of blocks without modulation, where the second norms are modules of their own.
PLAIN = {"attention.added": ("attention_norm2", "out"), "ffn.added": ("ffn_norm2", "out")}
# In the order of the computation.
SUFFIXES = (
    "input", "modulation", "attention.norm", "attention.q", "attention.k", "attention.v", "attention.q_rope",
    "attention.k_rope", "attention.heads", "attention.output", "attention.added", "between", "ffn.norm", "ffn.gate",
    "ffn.up", "ffn.product", "ffn.output", "ffn.added", "output",
)  # fmt: skip
# Modules of the autoencoder whose outputs are sites.
VAE = re.compile(r"(encoder|decoder)\.(conv_in|conv_out|.*\.(resnets|attentions|upsamplers|downsamplers)\.\d+)")


@dataclass(frozen=True, slots=True)
class Site:
    """A place whose tensor can be seen.

    part: of the model · block: the module that it lies in, "" outside of blocks · suffix: the rest of the name ·
    module, side: the module of the part whose input ("in") or output ("out") it is, or side "op" for a result of an Op
    · stream: what its rows are: those of the image, text, vision or joint stream, image patches, rows of the modulation
    table, tokens of one prompt, or a picture · shape: of one row, and before it the stream.
    """

    name: str
    part: str
    block: str
    suffix: str
    module: str
    side: str
    stream: str
    shape: tuple[int | str, ...]


def sites(pipe: LoadedModel, patterns: str | Sequence[str] = "**") -> dict[str, Site]:
    """Return the sites of a model by name, in order, whose names match any of the patterns.

    Raises RequestError for a pattern that matches none, naming the nearest.
    """
    everything = {site.name: site for site in (*_transformer(pipe), *_text(pipe), *_vae(pipe))}
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in everything if pattern_regex(pattern).fullmatch(name)}
        if not matching:
            near = nearest(pattern, everything)
            raise RequestError(
                f"site {pattern!r} matches none of this model's {len(everything)}; needed a name with * inside one "
                f"part or ** over several; the nearest are {', '.join(near)}; `sites` lists them"
            )
        chosen |= matching
    return {name: site for name, site in everything.items() if name in chosen}


def _transformer(pipe: LoadedModel) -> list[Site]:
    """Sites of the transformer: of every block, then velocity and x0."""
    model = pipe.parts.component("transformer").module
    assert isinstance(model, Transformer)
    config = model.config
    heads, width, hidden = (config.n_heads, config.head_dim), (config.dim,), (config.ffn_dim,)
    widths = {
        "modulation": (4 * config.dim,),
        "ffn.gate": hidden,
        "ffn.up": hidden,
        "ffn.product": hidden,
    } | dict.fromkeys(("attention.q_rope", "attention.k_rope", "attention.heads"), heads)
    found = []
    for stack, stream in STACKS.items():
        for i, block in enumerate(getattr(model, stack, ())):
            name = f"{stack}.{i}"
            for suffix in SUFFIXES:
                plain = isinstance(block, PlainBlock)
                if plain and suffix == "modulation":
                    continue
                # What is no input or output of a module is a result of an Op.
                inside, side = MODULES.get(suffix) or (PLAIN.get(suffix) if plain else None) or ("", "op")
                found.append(
                    Site(
                        f"{name}.{suffix}", "transformer", name, suffix, f"{name}.{inside}".rstrip("."), side,
                        "rows" if suffix == "modulation" else stream, ("tokens", *widths.get(suffix, width)),
                    )
                )  # fmt: skip
    patches = (("tokens", config.patch_dim),)
    return [
        *found,
        *(Site(name, "transformer", "", name, "", "out", "patches", *patches) for name in ("velocity", "x0")),
    ]


def _text(pipe: LoadedModel) -> list[Site]:
    """Sites of the text encoder: what enters and leaves each layer that is run."""
    config = pipe.config.text_encoder
    return [
        Site(f"text_encoder.layers.{i}.{suffix}", "text_encoder", "", suffix, f"model.layers.{i}", side, "prompt",
             ("tokens", config.hidden_size))
        for i in range(config.num_hidden_layers - 1)
        for suffix, side in (("input", "in"), ("output", "out"))
    ]  # fmt: skip


def _vae(pipe: LoadedModel) -> list[Site]:
    """Sites of the autoencoder: outputs of its layers."""
    module: nn.Module = pipe.parts.component("vae").module
    return [
        Site(f"vae.{name}.output", "vae", "", "output", name, "out", "picture", ("channels", "rows", "columns"))
        for name, _ in module.named_modules()
        if VAE.fullmatch(name)
    ]


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the three of the names that are most like a given one, for messages."""
    return difflib.get_close_matches(name, [*names], n=3, cutoff=0.0)
