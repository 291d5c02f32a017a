"""Spellings: the names of tensors in files that are not the official directory, as short tables of substitutions.

The official directory's names are the names of our modules. Which spelling a file has is detected by a single key.
`official` returns the same checkpoint under official names, its tensors views of the stored ones: a fused `qkv` becomes
three layers by rows, whether float or quantized, because dim 0 of every part of a layer is the output channel, or the
part is shared by all rows. Two more differences between writers carry no meaning and are undone: pad tokens of one
dimension, and attention of the autoencoder as 1×1 convolutions.

Prefixes of parts in a file of several (`model.diffusion_model.`) are removed by `split_checkpoint`.

Source: key sets of Comfy-Org's and FLUX.1's files, of llama.cpp for qwen3, of transformers 4.51 (`Qwen3ForCausalLM`:
with `model.`) and 5.x (`Qwen3Model`: without), whose `Siglip2VisionModel` lost its `vision_model.` likewise. Adapters
have spellings of their own, see `dialects`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s3dit.errors import CheckpointError
from s3dit.weights.container import Checkpoint, Entry, View

if TYPE_CHECKING:
    from torch import Tensor

# In an official name: one stored tensor is several, cut into equal runs of rows.
FUSED_PATTERN = re.compile(r"\{(.*)\}")
PAD_TOKENS = ("x_pad_token", "cap_pad_token", "siglip_pad_token")
# Linear layers that a writer may store as 1×1 convolutions.
POINTWISE_CONVOLUTION = re.compile(r".*\.attentions\.0\.to_(q|k|v|out\.0)\.weight")


@dataclass(frozen=True, slots=True)
class Spelling:
    """Substitutions (pattern, replacement) that make official names, applied in order.

    name: of the writer · tell: a key that only this spelling has. A replacement with {a,b} makes a name of each: the
    stored tensor is cut into as many equal runs of rows.
    """

    name: str
    tell: str = ""
    table: tuple[tuple[str, str], ...] = ()

    def to_official(self, key: str, keys: Collection[str] = ()) -> list[str]:
        """Return the official names of a stored key, several where it is fused; keys: all of the file's."""
        for pattern, replacement in self.table:
            key = re.sub(pattern, replacement, key)
        if UP.match(key):
            # LDM counts the decoder's levels from the picture, diffusers from the latents.
            levels = 1 + max(int(match[1]) for stored in keys if (match := UP_STORED.match(stored)))
            key = UP.sub(lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", key)
        fused = FUSED_PATTERN.search(key)
        return [key.replace(fused[0], piece) for piece in fused[1].split(",")] if fused else [key]


UP, UP_STORED = re.compile(r"decoder\.up_blocks\.-(\d+)\."), re.compile(r"decoder\.up\.(\d+)\.")
OFFICIAL = Spelling("official")
SPELLINGS = (
    Spelling(
        "ComfyUI",
        "noise_refiner.0.attention.q_norm.weight",
        (
            # Converters that know no second timestep put TwinFlow's there.
            (r"^extended_weights\.", ""),
            (r"^(x_embedder|final_layer)\.", r"all_\1.2-1."),
            (r"\.attention\.qkv\.", r".attention.to_{q,k,v}."),
            (r"\.attention\.out\.", r".attention.to_out.0."),
            (r"\.attention\.([qk])_norm\.", r".attention.norm_\1."),
        ),
    ),
    Spelling(
        "nunchaku",
        "layers.0.feed_forward.net.2.weight",
        (
            (r"\.attention\.to_qkv\.", r".attention.to_{q,k,v}."),
            (r"\.feed_forward\.net\.0\.proj\.", r".feed_forward.{w3,w1}."),
            (r"\.feed_forward\.net\.2\.", r".feed_forward.w2."),
        ),
    ),
    Spelling(
        "LDM",
        "decoder.mid.attn_1.norm.weight",
        (
            (r"^decoder\.up\.(\d+)\.", r"decoder.up_blocks.-\1."),
            (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
            (r"\.block\.(\d+)\.", r".resnets.\1."),
            (r"\.(up|down)sample\.conv\.", r".\1samplers.0.conv."),
            (r"\.nin_shortcut\.", r".conv_shortcut."),
            (r"\.norm_out\.", r".conv_norm_out."),
            (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
            (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
            (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
            (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
            (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        ),
    ),
    Spelling(
        "early diffusers",
        "decoder.mid_block.attentions.0.query.weight",
        (
            (r"\.attentions\.0\.query\.", r".attentions.0.to_q."),
            (r"\.attentions\.0\.key\.", r".attentions.0.to_k."),
            (r"\.attentions\.0\.value\.", r".attentions.0.to_v."),
            (r"\.attentions\.0\.proj_attn\.", r".attentions.0.to_out.0."),
        ),
    ),
    Spelling("bare Qwen3Model", "embed_tokens.weight", ((r"^(?!lm_head\.)", "model."),)),
    Spelling(
        "llama.cpp",
        "blk.0.attn_norm.weight",
        (
            (r"^token_embd\.", "model.embed_tokens."),
            (r"^output_norm\.", "model.norm."),
            (r"^output\.", "lm_head."),
            (r"^blk\.(\d+)\.", r"model.layers.\1."),
            (r"\.attn_norm\.", r".input_layernorm."),
            (r"\.ffn_norm\.", r".post_attention_layernorm."),
            (r"\.attn_([qk])_norm\.", r".self_attn.\1_norm."),
            (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
            (r"\.attn_output\.", r".self_attn.o_proj."),
            (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
        ),
    ),
    Spelling("bare Siglip2VisionModel", "embeddings.patch_embedding.weight", ((r"^", "vision_model."),)),
)


def detect(keys: Collection[str], names: Collection[str] = ()) -> Spelling:
    """Return the spelling whose telling key is there, and belongs to the model's names; else the official spelling."""

    def fits(spelling: Spelling) -> bool:
        return spelling.tell in keys and (not names or spelling.to_official(spelling.tell)[0] in names)

    return next(filter(fits, SPELLINGS), OFFICIAL)


def official(checkpoint: Checkpoint, names: Collection[str] = ()) -> Checkpoint:
    """Return the checkpoint under official names; itself where it has them already.

    names: those of the model that it is for; a checkpoint of another model is left as it is.
    """
    spelling = detect(checkpoint, names)
    renamed = RenamedView(checkpoint, spelling)
    return renamed if renamed.changed else checkpoint


class RenamedView(View):
    """A checkpoint under official names: each is a stored key, or a run of its rows."""

    def __init__(self, checkpoint: Checkpoint, spelling: Spelling) -> None:
        self.path = checkpoint.path
        self.metadata = checkpoint.metadata
        self._checkpoint = checkpoint
        # Official name -> stored key, which run of its rows, of how many.
        self._stored: dict[str, tuple[str, int, int]] = {}
        keys = checkpoint.keys()
        for key in keys:
            names = spelling.to_official(key, keys)
            for i, name in enumerate(names):
                if name in self._stored:
                    raise CheckpointError(
                        f"{self.path}: {key} and {self._stored[name][0]} are two names of {name}; needed one; take the "
                        "file from its official place"
                    )
                self._stored[name] = (key, i, len(names))
        self.formats = {
            name.removesuffix(".weight"): number_format
            for layer, number_format in checkpoint.formats.items()
            for name in spelling.to_official(f"{layer}.weight", keys)
        }

    @property
    def changed(self) -> bool:
        """Return whether any name or shape differs from the checkpoint below."""
        return any(name != key or self._reshaped(name) for name, (key, *_) in self._stored.items())

    def keys(self) -> list[str]:
        """Return all names, in the order of the tensors on disk."""
        return list(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def entry(self, name: str) -> Entry:
        """Return shape, dtype and bytes of a tensor; raises CheckpointError for an unknown name."""
        rows, shape = self._rows(name), self._reshaped(name)
        entry = self._checkpoint.entry(self._key(name))
        if rows is not None:
            return Entry((rows.stop - rows.start, *entry.shape[1:]), entry.dtype, entry.nbytes // self._stored[name][2])
        return entry if shape is None else Entry(shape, entry.dtype, entry.nbytes)

    def is_mapped(self, name: str) -> bool:
        """Return whether the stored tensor is loaded as a view of its file."""
        return self._checkpoint.is_mapped(self._key(name))

    def load(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, a view of the tensor of the checkpoint below."""
        rows, shape = self._rows(name), self._reshaped(name)
        tensor = self._checkpoint.load(self._key(name))
        tensor = tensor if rows is None else tensor[rows]
        return tensor if shape is None else tensor.view(shape)

    def format(self, name: str) -> str:
        """Return the number format of a tensor, from the checkpoint below."""
        return self._checkpoint.format(self._key(name))

    def _key(self, name: str) -> str:
        """Return the stored key of an official name; raises CheckpointError for an unknown name."""
        if name not in self._stored:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r} among {len(self._stored)}; the files are of another model"
            )
        return self._stored[name][0]

    def _rows(self, name: str) -> slice | None:
        """Return the rows of the stored tensor that a name has; None for all, or where they are shared."""
        key = self._key(name)
        _, run, runs = self._stored[name]
        shape = self._checkpoint.entry(key).shape
        weight = f"{key.rpartition('.')[0]}.weight"
        out = self._checkpoint.entry(weight if weight in self._checkpoint else key).shape[:1]
        if runs == 1 or not shape or shape[:1] != out:
            return None
        if shape[0] % runs:
            raise CheckpointError(
                f"{self.path}: {key} has {shape[0]} rows; needed a multiple of the {runs} layers fused in it; the "
                "file is of another model"
            )
        return slice(run * shape[0] // runs, (run + 1) * shape[0] // runs)

    def _reshaped(self, name: str) -> tuple[int, ...] | None:
        """Return the official shape of a tensor whose writer chose another shape, None where it is stored so."""
        shape = self._checkpoint.entry(self._key(name)).shape
        if name in PAD_TOKENS and len(shape) == 1:
            return (1, *shape)
        return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) and POINTWISE_CONVOLUTION.fullmatch(name) else None
