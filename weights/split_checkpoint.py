"""The parts of a model in a checkpoint: transformer, text encoder and autoencoder, alone or all in a single file.

A part is detected by a tensor that it always has and that no writer quantizes, a norm or a bias; what stands before
that name in the file is the part's prefix. Each part becomes a checkpoint of its own, without the prefix, in the file's
spelling; `keymap` makes the names official. Files of other models and of adapters are recognized and named in the
error, since "521 tensors missing" helps nobody.

Source: prefixes as seen in Comfy-Org's, SeeSee21's, leejet's and diffusers' files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s3dit.errors import CheckpointError
from s3dit.weights.container import Checkpoint, Entry, View
from s3dit.weights.dialects import family

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("transformer", "text_encoder", "vae")
PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
    "text_encoder": (
        "text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_4b.", "text_encoders.llm.", "text_encoder.",
        "qwen3_4b.transformer.", "qwen3_4b.", "",
    ),
    "vae": ("vae.", "first_stage_model.", ""),
}  # fmt: skip
# Of each part: tensors of which every file has one.
MARKER_TENSORS = {
    "transformer": ("cap_embedder.0.weight",),
    "text_encoder": (
        "model.layers.0.input_layernorm.weight", "layers.0.input_layernorm.weight", "blk.0.attn_norm.weight",
    ),
    "vae": ("decoder.conv_in.bias",),
}  # fmt: skip

# What else people hold, by the end of a key that only it has; the first that fits is named in the error.
OTHER_MODELS = (
    ("dec_net.cond_embed.weight", "a pixel-space derivative of Z-Image without a VAE"),
    ("double_blocks.0.img_attn.qkv.weight", "a FLUX model"),
    ("single_transformer_blocks.0.proj_mlp.weight", "a FLUX model"),
    ("distilled_guidance_layer.in_proj.weight", "a Chroma model"),
    ("joint_blocks.0.context_block.attn.qkv.weight", "Stable Diffusion 3"),
    ("label_emb.0.0.weight", "Stable Diffusion XL"),
    ("add_embedding.linear_1.weight", "Stable Diffusion XL"),
    ("input_blocks.0.0.weight", "Stable Diffusion 1 or 2"),
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "Stable Diffusion"),
    ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
    ("blocks.0.cross_attn.norm_k.weight", "a Wan video model"),
    ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "HunyuanVideo"),
    ("adaln_single.linear.weight", "a PixArt or LTX model"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
    ("text_model.encoder.layers.0.self_attn.q_proj.weight", "a CLIP text encoder"),
    ("model.layers.0.self_attn.q_proj.bias", "a Qwen2 language model; Z-Image reads Qwen3"),
    ("decoder.conv1.weight", "the VAE of a Wan or Qwen-Image model"),
)
ADAPTER = re.compile(r"\.(lora_[AB]|lora[_.](down|up)|lokr_\w+|hada_\w+)(\.|$)|\.diff(_b)?$")
CONTROL_KEY = "control_layers.0."


@dataclass(frozen=True, slots=True)
class SplitCheckpoint:
    """The parts of a checkpoint, the prefix of each, and `rest`, the keys that belong to none of them."""

    parts: dict[str, Checkpoint]
    prefixes: dict[str, str]
    rest: list[str]


def split(checkpoint: Checkpoint) -> SplitCheckpoint:
    """Split a checkpoint into its parts; CheckpointError says what it is where it holds no part of a Z-Image model."""
    keys = dict.fromkeys(checkpoint)
    prefixes = {part: prefix for part in PARTS if (prefix := _prefix(part, keys)) is not None}
    if not prefixes:
        raise CheckpointError(f"{checkpoint.path}: {describe_other(keys)}")
    if "transformer" in prefixes:
        _check_transformer(checkpoint, keys, prefixes["transformer"])
    if "vae" in prefixes:
        _check_vae(checkpoint, keys, prefixes["vae"])
    if "text_encoder" in prefixes:
        _check_text(checkpoint, keys, prefixes["text_encoder"])
    # A part without a prefix has all that no other part claims.
    named = tuple(prefix for prefix in prefixes.values() if prefix)
    parts: dict[str, Checkpoint] = {}
    taken: set[str] = set()
    for part, prefix in prefixes.items():
        own = [key for key in keys if (key.startswith(prefix) if prefix else not key.startswith(named))]
        parts[part] = PartView(checkpoint, prefix, own) if len(prefixes) > 1 or prefix else checkpoint
        taken.update(own)
    if len([prefix for prefix in prefixes.values() if not prefix]) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: {' and '.join(prefixes)} lie in it without prefixes that tell them apart; take one "
            "file a part"
        )
    return SplitCheckpoint(parts, prefixes, [key for key in keys if key not in taken])


def part_of(keys: Collection[str]) -> str | None:
    """Return the part that a checkpoint with these keys holds, the first of several; None where it holds none."""
    return next((part for part in PARTS if _prefix(part, keys) is not None), None)


def describe_other(keys: Collection[str]) -> str:
    """Return what a checkpoint is that holds no part of the model, in a clause that says what to do."""
    if any(map(ADAPTER.search, keys)):
        if other := family(keys):
            return f"is an adapter of {other}, not a model; needed a part of Z-Image, or an adapter trained on it"
        return (
            "is an adapter (LoRA or one of its kin), not a model; draw with a model and add --lora FILE, or convert it "
            "to a *.safetensors"
        )
    if any(CONTROL_KEY in key for key in keys):
        return "is a ControlNet of Z-Image, not the model; draw with a model and add --control FILE:IMAGE"
    if other := _other_model(keys):
        return f"is {other}; needed a part of Z-Image: its transformer, a Qwen3 text encoder, or FLUX.1's VAE"
    shown = ", ".join(list(keys)[:3])
    return (
        f"no part of a Z-Image model among its {len(keys)} tensors ({shown or 'none'}); needed a transformer, a Qwen3 "
        "text encoder, or FLUX.1's VAE; take another file"
    )


def _other_model(keys: Collection[str]) -> str | None:
    """Return the other model that keys belong to, if it is known; any prefix may stand before a key."""
    return next((what for marker, what in OTHER_MODELS if any(f".{key}".endswith(f".{marker}") for key in keys)), None)


def _prefix(part: str, keys: Collection[str]) -> str | None:
    """Return the prefix of a part's names; None where the part is not there."""
    return next((p for p in PREFIXES[part] for marker in MARKER_TENSORS[part] if p + marker in keys), None)


def _check_transformer(checkpoint: Checkpoint, keys: Collection[str], prefix: str) -> None:
    """Raise CheckpointError for relatives of Z-Image: Lumina 2 and its derivatives lack the padding tokens."""
    marker, what = OTHER_MODELS[0]
    if prefix + marker in keys:
        raise CheckpointError(f"{checkpoint.path}: is {what}; needed Z-Image itself")
    if f"{prefix}cap_pad_token" not in keys:
        width = checkpoint.entry(f"{prefix}cap_embedder.0.weight").shape[-1:]
        what = "Lumina 2" if width == (2304,) else "a relative of Z-Image such as Ming-Image, or a part of it"
        raise CheckpointError(f"{checkpoint.path}: has no cap_pad_token, so it is {what}; needed all of Z-Image")


def _check_text(checkpoint: Checkpoint, keys: Collection[str], prefix: str) -> None:
    """Raise CheckpointError for other language models: of those with these names, Qwen3 normalizes queries."""
    markers = ("model.layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight")
    if not any(prefix + marker in keys for marker in markers):
        raise CheckpointError(
            f"{checkpoint.path}: its text encoder has no q_norm, so it is "
            f"{_other_model(keys) or 'another language model'}; needed Qwen3-4B"
        )


def _check_vae(checkpoint: Checkpoint, keys: Collection[str], prefix: str) -> None:
    """Raise CheckpointError for other autoencoders: FLUX.1's has 16 channels and no quant_conv."""
    channels = checkpoint.entry(f"{prefix}decoder.conv_in.weight").shape
    if len(channels) != 4 or channels[1] != 16 or f"{prefix}post_quant_conv.weight" in checkpoint:
        other = f"is {_other_model(keys)}: " if _other_model(keys) else ""
        raise CheckpointError(
            f"{checkpoint.path}: {other}its VAE has latents of {channels[1] if len(channels) > 1 else '?'} channels; "
            "needed FLUX.1's, of 16 and without quant_conv; take ae.safetensors or the model's own vae/"
        )


class PartView(View):
    """The tensors of a part of a checkpoint, without the prefix of their names."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, keys: Iterable[str]) -> None:
        self.path, self.metadata = checkpoint.path, checkpoint.metadata
        self._checkpoint, self._prefix = checkpoint, prefix
        self._keys = dict.fromkeys(key.removeprefix(prefix) for key in keys)
        start = len(prefix)
        # A layer whose name begins with the prefix of another part has none of its tensors here.
        layers = {key.rpartition(".")[0] for key in self._keys}
        self.formats = {
            layer[start:]: number_format
            for layer, number_format in checkpoint.formats.items()
            if layer.startswith(prefix) and layer[start:] in layers
        }

    def keys(self) -> list[str]:
        """Return all names, in the order of the tensors on disk."""
        return list(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def entry(self, name: str) -> Entry:
        """Return shape, dtype and bytes of a tensor; raises CheckpointError for an unknown name."""
        return self._checkpoint.entry(self._key(name))

    def is_mapped(self, name: str) -> bool:
        """Return whether a tensor is loaded as a view of its file."""
        return self._checkpoint.is_mapped(self._key(name))

    def load(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, from the whole checkpoint."""
        return self._checkpoint.load(self._key(name))

    def format(self, name: str) -> str:
        """Return the number format of a tensor, from the whole checkpoint."""
        return self._checkpoint.format(self._key(name))

    def _key(self, name: str) -> str:
        if name not in self._keys:
            raise CheckpointError(f"{self.path}: no tensor {name!r} in this part of it; the file is of another model")
        return self._prefix + name
