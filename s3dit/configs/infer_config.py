"""A part's configuration read from its tensors, where no JSON lies beside them: names and shapes are the config.

What shapes cannot say comes from `known`, the same part of the model that the file is mixed into, else from the one
form that was ever published. Of what is guessed so, two things may be wrong in a file of somebody's own, the base of a
text encoder's rotation and the scale of the autoencoder; a GGUF file says the first.

Rows of a matrix are told by dim 0, which quantized layers keep; widths by norms and biases, which nobody quantizes.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from s3dit.configs.part_configs import LARGEST, MOST_LAYERS, TextEncoderConfig, TransformerConfig, VAEConfig
from s3dit.errors import CheckpointError
from s3dit.weights.container import Checkpoint
from s3dit.weights.keymap import official

# The published forms, for what shapes do not tell.
TRANSFORMER = TransformerConfig(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30,
    n_kv_heads=30, norm_eps=1e-5, qk_norm=True, cap_feat_dim=2560, siglip_feat_dim=None, rope_theta=256.0,
    t_scale=1000.0, axes_dims=(32, 48, 48),
)  # fmt: skip
TEXT_ENCODER = TextEncoderConfig(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6,
)  # fmt: skip
VAE = VAEConfig(
    in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    norm_num_groups=32, scaling_factor=0.3611, shift_factor=0.1159,
)  # fmt: skip


def transformer(
    checkpoint: Checkpoint, known: TransformerConfig | None = None, notes: list[str] | None = None
) -> TransformerConfig:
    """The configuration of a transformer in any spelling; raises CheckpointError where a telling tensor is missing."""
    known, stored = known or TRANSFORMER, _Shapes(checkpoint)
    dim, head_dim = stored.size("layers.0.attention_norm1.weight"), stored.size("layers.0.attention.norm_q.weight")
    axes = known.axes_dims
    if head_dim != sum(axes):
        # The same shares of a head: a quarter for time, three eighths for rows and for columns.
        axes = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    if dim % head_dim or head_dim % 16:
        raise stored.error(f"its width {dim} and the width of a head {head_dim} do not go together")
    vision = "siglip_embedder.0.weight"
    layers = stored.count("layers")
    if notes is not None and (dim, head_dim) == (known.dim, known.head_dim) and layers != known.n_layers:
        notes.append(f"{checkpoint.path}: has {layers} layers, other models of its width {known.n_layers}")
    return replace(
        known,
        in_channels=stored.size("all_final_layer.2-1.linear.bias") // 4,
        dim=dim,
        n_layers=layers,
        n_refiner_layers=stored.count("noise_refiner"),
        n_heads=dim // head_dim,
        n_kv_heads=dim // head_dim,
        cap_feat_dim=stored.size("cap_embedder.0.weight"),
        siglip_feat_dim=stored.size(vision) if vision in stored else None,
        axes_dims=axes,
    )


def text_encoder(
    checkpoint: Checkpoint, known: TextEncoderConfig | None = None, notes: list[str] | None = None
) -> TextEncoderConfig:
    """The configuration of a Qwen3 in any spelling; rotation and epsilon from GGUF metadata where there is some.

    The features are the output of the last layer but one, so the number of layers must not be guessed from a file that
    was cut: it is the one of the metadata, else of the model with these widths. notes: gets what was taken on trust.
    """
    known, stored = known or TEXT_ENCODER, _Shapes(checkpoint)
    layer = "model.layers.0"
    head_dim = stored.size(f"{layer}.self_attn.q_norm.weight")
    found = replace(
        known,
        vocab_size=stored.size("model.embed_tokens.weight"),
        hidden_size=stored.size(f"{layer}.input_layernorm.weight"),
        intermediate_size=stored.size(f"{layer}.mlp.gate_proj.weight"),
        num_hidden_layers=stored.count("model.layers"),
        num_attention_heads=stored.size(f"{layer}.self_attn.q_proj.weight") // head_dim,
        num_key_value_heads=stored.size(f"{layer}.self_attn.k_proj.weight") // head_dim,
        head_dim=head_dim,
        rms_norm_eps=stored.said("qwen3.attention.layer_norm_rms_epsilon", known.rms_norm_eps),
        rope_theta=stored.said("qwen3.rope.freq_base", known.rope_theta),
    )
    heads, shared = found.num_attention_heads, found.num_key_value_heads
    if not shared or heads % shared or head_dim % 2:
        raise stored.error(f"its {heads} heads of {head_dim} do not share {shared}")
    layers, notes = found.num_hidden_layers, [] if notes is None else notes
    if "qwen3.block_count" in checkpoint.metadata:
        _check_count(stored, "model.layers", int(stored.said("qwen3.block_count", 0)), "its metadata says")
        return found
    same = [one for one in (known, TEXT_ENCODER) if _widths(one) == _widths(found)]
    if not same:
        notes.append(f"{checkpoint.path}: is taken for a text encoder of {layers} layers, as many as are in the file")
        return found
    needed = same[0].num_hidden_layers
    if layers != needed - 1:
        _check_count(stored, "model.layers", needed, "the model of its widths has")
        return found
    # The last layer is never read, so a file may leave it out.
    notes.append(f"{checkpoint.path}: has {layers} layers, read as the first of {needed}; the last is not needed")
    return replace(found, num_hidden_layers=needed)


def _widths(config: TextEncoderConfig) -> tuple[int, ...]:
    """What tells one Qwen3 from another besides its number of layers."""
    return config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads


def check_layers(part: str, checkpoint: Checkpoint, config: Any, who: str = "its config.json says") -> None:
    """Raise CheckpointError where a text encoder has another number of layers than its config, or `who` else, says.

    Its last layer is never read, so `assign` does not ask for it; of other parts every layer is.
    """
    if part == "text_encoder":
        _check_count(_Shapes(checkpoint), "model.layers", config.num_hidden_layers, who)


def _check_count(stored: "_Shapes", stem: str, needed: int, who: str) -> None:
    """CheckpointError unless there are as many layers as somebody says."""
    if (found := stored.count(stem)) != needed:
        raise stored.error(f"it has {found} layers, {who} {needed}; perhaps it is one file of several")


def vae(checkpoint: Checkpoint, known: VAEConfig | None = None, notes: list[str] | None = None) -> VAEConfig:
    """The configuration of a FLUX.1 autoencoder in any spelling."""
    known, stored = known or VAE, _Shapes(checkpoint)
    levels = stored.count("encoder.down_blocks")
    widths = tuple(stored.size(f"encoder.down_blocks.{i}.resnets.0.conv1.bias") for i in range(levels))
    if any(width % known.norm_num_groups for width in widths):
        raise stored.error(f"its widths {list(widths)} do not divide into {known.norm_num_groups} groups of its norms")
    return replace(
        known,
        out_channels=stored.size("decoder.conv_out.bias"),
        latent_channels=stored.size("encoder.conv_out.bias") // 2,
        block_out_channels=widths,
        layers_per_block=stored.count("encoder.down_blocks.0.resnets"),
    )


class _Shapes:
    """Sizes by official names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = official(checkpoint)
        self._keys = dict.fromkeys(self._checkpoint)

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def error(self, found: str) -> CheckpointError:
        """What to raise for shapes that are no model's."""
        return CheckpointError(
            f"{self._checkpoint.path}: {found}; needed a complete part of Z-Image, or a folder with its config.json"
        )

    def size(self, name: str) -> int:
        """Length of a vector, or rows of a matrix."""
        if name not in self._keys:
            raise self.error(f"{name} is missing")
        shape = self._checkpoint.entry(name).shape
        if not shape or not 0 < shape[0] <= LARGEST:
            raise self.error(f"{name} is {list(shape)}")
        return shape[0]

    def count(self, stem: str) -> int:
        """How many there are of a numbered list, which must have no holes."""
        pattern = re.compile(rf"{re.escape(stem)}\.(\d{{1,4}})\.")
        numbers = {int(found[1]) for key in self._keys if (found := pattern.match(key))}
        if not numbers or numbers != set(range(len(numbers))):
            raise self.error(f"{stem} has the numbers {_few(numbers)}")
        if len(numbers) > MOST_LAYERS:
            raise self.error(f"{stem} are {len(numbers)}, of which no model has over {MOST_LAYERS}")
        return len(numbers)

    def said(self, key: str, otherwise: float) -> float:
        """A number of the metadata; single precision is given back the decimals that were meant."""
        text = self._checkpoint.metadata.get(key)
        try:
            value = otherwise if text is None else float(f"{float(text):.7g}")
        except ValueError:
            value = 0.0
        if not 0 < value < 1e12:
            raise self.error(f"its metadata says {key} {text!r:.40}")
        return value


def _few(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)[:10])) or "of none"
