"""Infers a part's configuration from the names and shapes of its tensors, where no JSON lies beside them.

What shapes cannot say comes from `known`, the same part of the model that the file is mixed into, else from the one
form that was ever published. Of what is guessed so, two things may be wrong in a file of somebody's own, the base of a
text encoder's rotation and the scale of the autoencoder; a GGUF file says the first.

Rows of a matrix are read off dim 0, which quantized layers keep; widths off norms and biases, which nobody quantizes.
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

# A tensor that only TwinFlow's transformers have.
TARGET_EMBEDDER = "t_embedder_2.mlp.0.weight"


def transformer(
    checkpoint: Checkpoint, known: TransformerConfig | None = None, notes: list[str] | None = None
) -> TransformerConfig:
    """Infer the configuration of a transformer in any spelling of its names.

    known: gives what shapes do not tell (default: the published one) · notes: gets what is unusual. Raises
    CheckpointError where a tensor that is needed for it is missing.
    """
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
        target_timestep=TARGET_EMBEDDER in stored,
    )


def told_by_tensors(config: Any, checkpoint: Checkpoint) -> Any:
    """Return a part's configuration with what its JSON does not say, and its tensors do: TwinFlow's second time."""
    if isinstance(config, TransformerConfig):
        return replace(config, target_timestep=TARGET_EMBEDDER in _Shapes(checkpoint))
    return config


def text_encoder(
    checkpoint: Checkpoint, known: TextEncoderConfig | None = None, notes: list[str] | None = None
) -> TextEncoderConfig:
    """Infer the configuration of a Qwen3 in any spelling; rotation and epsilon are those of GGUF metadata if any.

    The features are the output of the last layer but one, so the number of layers must not be guessed from a file that
    was cut: it is the one of the metadata, else of the model with these widths. known: gives what shapes do not tell ·
    notes: gets what was assumed. Raises CheckpointError.
    """
    known, stored, notes = known or TEXT_ENCODER, _Shapes(checkpoint), [] if notes is None else notes
    config = _text_encoder_of(stored, known)
    layers = config.num_hidden_layers
    if "qwen3.block_count" in checkpoint.metadata:
        needed = int(stored.metadata_number("qwen3.block_count", 0))
        _check_count(stored, "model.layers", needed, "its metadata says")
        return config
    needed = next((other.num_hidden_layers for other in (known, TEXT_ENCODER) if _widths(other) == _widths(config)), 0)
    if not needed:
        notes.append(f"{checkpoint.path}: is taken for a text encoder of {layers} layers, as many as are in the file")
        return config
    if layers != needed - 1:
        _check_count(stored, "model.layers", needed, "the model of its widths has")
        return config
    # The last layer is never read, so a file may leave it out.
    notes.append(f"{checkpoint.path}: has {layers} layers, read as the first of {needed}; the last is not needed")
    return replace(config, num_hidden_layers=needed)


def _text_encoder_of(stored: "_Shapes", known: TextEncoderConfig) -> TextEncoderConfig:
    """The configuration of a Qwen3 with as many layers as are in the file; raises CheckpointError."""
    layer = "model.layers.0"
    head_dim = stored.size(f"{layer}.self_attn.q_norm.weight")
    heads = stored.size(f"{layer}.self_attn.q_proj.weight") // head_dim
    shared = stored.size(f"{layer}.self_attn.k_proj.weight") // head_dim
    if not shared or heads % shared or head_dim % 2:
        raise stored.error(f"its {heads} heads of {head_dim} do not share {shared}")
    return replace(
        known,
        vocab_size=stored.size("model.embed_tokens.weight"),
        hidden_size=stored.size(f"{layer}.input_layernorm.weight"),
        intermediate_size=stored.size(f"{layer}.mlp.gate_proj.weight"),
        num_hidden_layers=stored.count("model.layers"),
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=head_dim,
        rms_norm_eps=stored.metadata_number("qwen3.attention.layer_norm_rms_epsilon", known.rms_norm_eps),
        rope_theta=stored.metadata_number("qwen3.rope.freq_base", known.rope_theta),
    )


def _widths(config: TextEncoderConfig) -> tuple[int, ...]:
    """The sizes by which one Qwen3 is distinguished from another, besides its number of layers."""
    return config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads


def check_layers(part: str, checkpoint: Checkpoint, config: Any, who: str = "its config.json says") -> None:
    """Raise CheckpointError where a text encoder has another number of layers than its config, or `who` else, says.

    Its last layer is never read, so `assign` does not ask for it; of other parts every layer is.
    """
    if part == "text_encoder":
        _check_count(_Shapes(checkpoint), "model.layers", config.num_hidden_layers, who)


def _check_count(stored: "_Shapes", stem: str, needed: int, who: str) -> None:
    """Raise CheckpointError unless there are as many layers as `who` says."""
    if (layers := stored.count(stem)) != needed:
        raise stored.error(f"it has {layers} layers, {who} {needed}; perhaps it is one file of several")


def vae(checkpoint: Checkpoint, known: VAEConfig | None = None, notes: list[str] | None = None) -> VAEConfig:
    """Infer the configuration of a FLUX.1 autoencoder in any spelling of its names.

    known: gives what shapes do not tell (default: the published one) · notes: is not used. Raises CheckpointError.
    """
    known, stored = known or VAE, _Shapes(checkpoint)
    depth = stored.count("encoder.down_blocks")
    widths = tuple(stored.size(f"encoder.down_blocks.{i}.resnets.0.conv1.bias") for i in range(depth))
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
    """The sizes of a checkpoint's tensors, by official names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = official(checkpoint)
        self._keys = dict.fromkeys(self._checkpoint)

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def error(self, problem: str) -> CheckpointError:
        """Return the error to raise for shapes that no model has."""
        return CheckpointError(
            f"{self._checkpoint.path}: {problem}; needed a complete part of Z-Image, or a folder with its config.json"
        )

    def size(self, name: str) -> int:
        """Return the length of a vector, or the rows of a matrix; raises CheckpointError."""
        if name not in self._keys:
            raise self.error(f"{name} is missing")
        shape = self._checkpoint.entry(name).shape
        if not shape or not 0 < shape[0] <= LARGEST:
            raise self.error(f"{name} is {list(shape)}")
        return shape[0]

    def count(self, stem: str) -> int:
        """Return how many modules a numbered list has; raises CheckpointError where a number is missing."""
        pattern = re.compile(rf"{re.escape(stem)}\.(\d{{1,4}})\.")
        numbers = {int(match[1]) for key in self._keys if (match := pattern.match(key))}
        if not numbers or numbers != set(range(len(numbers))):
            raise self.error(f"{stem} has the numbers {_listed(numbers)}")
        if len(numbers) > MOST_LAYERS:
            raise self.error(f"{stem} are {len(numbers)}, of which no model has over {MOST_LAYERS}")
        return len(numbers)

    def metadata_number(self, key: str, otherwise: float) -> float:
        """Return a number of the metadata, with the decimals that were meant: it is stored in single precision.

        otherwise: where the key is missing. Raises CheckpointError for what is no positive number.
        """
        text = self._checkpoint.metadata.get(key)
        try:
            value = otherwise if text is None else float(f"{float(text):.7g}")
        except ValueError:
            value = 0.0
        if not 0 < value < 1e12:
            raise self.error(f"its metadata says {key} {text!r:.40}")
        return value


def _listed(numbers: Iterable[int]) -> str:
    """The first ten numbers, for messages."""
    return ", ".join(map(str, sorted(numbers)[:10])) or "of none"
