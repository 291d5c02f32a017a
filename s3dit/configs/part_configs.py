"""The parts of a model: one frozen dataclass a part, filled from the JSON file that lies beside its weights.

The JSON file is the only source of an architecture's constants: a key that is missing there is an error, not a default,
because two defaults that disagree give a different model in silence (the official code has three sources for
`axes_lens`, and they disagree). What the other keys of each file mean stands in `config_keys`.

Source: the official Z-Image configuration files; Qwen3 keys as written by transformers 4.51 and 5.x, both read.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from s3dit.configs import config_keys
from s3dit.configs.config_keys import Keys
from s3dit.errors import CheckpointError

# Above this a number in a config is an accident or an attack: the official model's largest is vocab_size, 151,936.
LARGEST = 1 << 20
# No published model of this family has over 100 layers; modules are built before their weights are looked for.
MOST_LAYERS = 128
MOST = {
    "n_layers": MOST_LAYERS,
    "num_hidden_layers": MOST_LAYERS,
    # Published: 2, of both.
    "n_refiner_layers": 16,
    "layers_per_block": 16,
    # Patches of one picture are made before the tower is there; SigLIP2 was trained for up to 1024.
    "max_num_patches": 1 << 14,
}
# Floats that may be 0 or negative; all others are divisors, epsilons, bases and scales.
SIGNED = ("shift_factor", "image_mean", "base_shift", "max_shift")


class PartConfig:
    """Base of the configurations: reads a part's JSON, every field present, of its type and of a sane size.

    keys: what the other keys of the file mean.
    """

    __slots__ = ()
    keys: ClassVar[Keys]

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path) -> Self:
        """Make the configuration of a parsed JSON object; `source` names the file in errors. Raises CheckpointError."""
        cls.keys.check(data, source)
        values = {}
        for field in fields(cls):  # type: ignore[arg-type]
            if field.name not in data and field.default is not MISSING:
                continue
            if field.name not in data:
                raise CheckpointError(
                    f"{source}: key {field.name!r} is missing; every constant of the model is read from this file, "
                    "so restore it from the official repository"
                )
            values[field.name] = _checked(data[field.name], field.type, field.name, source)
        return cls(**values)

    @classmethod
    def note_unknown(cls, data: Mapping[str, Any], source: str | Path) -> list[str]:
        """Return a note on keys that diffusers does not know either, as a list; empty where there are none."""
        return cls.keys.note_unknown(data, [field.name for field in fields(cls)], source)  # type: ignore[arg-type]


def _checked(value: Any, kind: Any, name: str, source: str | Path) -> Any:
    """Convert one JSON value to the annotated type, or say what was found and what was needed."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (tuple[int, ...], tuple[float, ...]):
        if isinstance(value, list) and 0 < len(value) <= 16:
            return tuple(_checked(item, get_args(kind)[0], name, source) for item in value)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is float:
        if number and abs(value) < 1e12 and (value > 0 or name in SIGNED):
            return float(value)
    elif kind is str:
        if isinstance(value, str):
            return value
    elif value is None and kind == int | None:
        return None
    elif number and isinstance(value, int) and 0 < value <= MOST.get(name, LARGEST):
        return value
    needed = {bool: "true or false", str: "a text", float: "a number"}.get(kind, "a whole number")
    needed = "a list of numbers" if get_args(kind)[1:] == (...,) else needed
    size = "" if kind in (bool, str) else f" of a sane size{'' if name in SIGNED else ', above 0'}"
    raise CheckpointError(f"{source}: {name} is {value!r:.80}; needed {needed}{size}; restore the official file")


def need(holds: bool, source: str | Path, state: str, needed: str) -> None:
    """Raise CheckpointError unless a relation between several values holds; state: what they are, for the message."""
    if not holds:
        raise CheckpointError(f"{source}: {state}; needed {needed}; restore the official file")


@dataclass(frozen=True, slots=True)
class TransformerConfig(PartConfig):
    """The S3-DiT, `transformer/config.json`. `siglip_feat_dim` is None except for Omni and Edit.

    target_timestep: whether it also reads the time that a step aims at (TwinFlow), which only its tensors tell.
    """

    keys: ClassVar[Keys] = config_keys.TRANSFORMER
    all_patch_size: tuple[int, ...]
    all_f_patch_size: tuple[int, ...]
    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    qk_norm: bool
    cap_feat_dim: int
    siglip_feat_dim: int | None
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, ...]
    target_timestep: bool = False

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path) -> Self:
        """Read `transformer/config.json`, with siglip_feat_dim None where it is missing; see `PartConfig.from_json`.

        Raises CheckpointError too where heads and axes do not make the width.
        """
        config = super(TransformerConfig, cls).from_json({"siglip_feat_dim": None} | data, source)
        need(
            config.n_kv_heads == config.n_heads, source, f"n_heads {config.n_heads}, n_kv_heads {config.n_kv_heads}",
            "as many of both, the only form ever published",
        )  # fmt: skip
        axes = list(config.axes_dims)
        need(
            len(axes) == 3 and config.dim == config.n_heads * sum(axes) and not any(d % 2 for d in axes), source,
            f"dim {config.dim}, n_heads {config.n_heads}, axes_dims {axes}",
            "three even axes_dims (time, rows, columns) that sum to dim / n_heads",
        )  # fmt: skip
        return config

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the SwiGLU; the official code truncates a float product (10240 for 3840)."""
        return int(self.dim / 3 * 8)

    @property
    def adaln_dim(self) -> int:
        """Width of the timestep embedding that feeds every modulation."""
        return min(self.dim, 256)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: (1 frame, 2 rows, 2 columns, channels)."""
        return 4 * self.in_channels


@dataclass(frozen=True, slots=True)
class TextEncoderConfig(PartConfig):
    """Qwen3, `text_encoder/config.json`."""

    keys: ClassVar[Keys] = config_keys.TEXT_ENCODER
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path) -> Self:
        """Read `text_encoder/config.json`, its rope_theta from where transformers takes it; see `PartConfig.from_json`.

        Raises CheckpointError too for another rotation, windowed attention, or heads that do not divide.
        """
        config = super(TextEncoderConfig, cls).from_json(data | _rotation(data, source), source)
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        need(
            heads % shared == 0 and config.head_dim % 2 == 0, source,
            f"{heads} heads of {config.head_dim} share {shared}", "a divisor of the heads, and an even head_dim",
        )  # fmt: skip
        _check_attention(data, config.num_hidden_layers, source)
        return config


def _rotation(data: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """The base of the rotation where transformers takes it from a dict; CheckpointError for another kind than Qwen3's.

    parity: `rope_scaling` before `rope_parameters`, and what stands in them before the key beside them.
    """
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    name = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    is_default = kind == "default" and not any(isinstance(value, dict) for value in rope.values())
    need(is_default, source, f"{name} is {rope!r:.80}", "the rope_type 'default', which is what this engine runs")
    return {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}


def _check_attention(data: Mapping[str, Any], layers: int, source: str | Path) -> None:
    """Raise CheckpointError where a layer below the features has windowed attention; defaults are transformers'."""
    kinds = data.get("layer_types")
    if kinds is None:
        window = data.get("use_sliding_window", False) and data.get("sliding_window", 4096)
        first = data.get("max_window_layers", 28) if window else layers
        need(type(first) is int, source, f"max_window_layers is {first!r:.40}", "a number of layers")
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    full = isinstance(kinds, list) and len(kinds) == layers and all(kind == "full_attention" for kind in kinds[:-1])
    need(
        full, source, f"its attention (layer_types, use_sliding_window) is {kinds!r:.80}",
        f"full_attention in {layers} layers, which is what this engine runs",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class VAEConfig(PartConfig):
    """AutoencoderKL of FLUX.1, `vae/config.json`."""

    keys: ClassVar[Keys] = config_keys.VAE
    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path) -> Self:
        """Read `vae/config.json`; see `PartConfig.from_json`.

        Raises CheckpointError too for other kinds of blocks, or groups that do not divide the widths.
        """
        config = super(VAEConfig, cls).from_json(data, source)
        widths, groups = config.block_out_channels, config.norm_num_groups
        need(
            not any(width % groups for width in widths), source,
            f"norm_num_groups {groups}, block_out_channels {list(widths)}", "groups that divide every width",
        )  # fmt: skip
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            kinds, needed = data.get(key), [kind] * len(widths)
            need(kinds in (None, needed), source, f"{key} is {kinds!r:.80}", f"{needed}, which this engine runs")
        return config


@dataclass(frozen=True, slots=True)
class VisionConfig(PartConfig):
    """SigLIP2 (NaFlex), `siglip/config.json`; only Omni and Edit have one."""

    keys: ClassVar[Keys] = config_keys.VISION
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    patch_size: int
    num_patches: int
    layer_norm_eps: float

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path) -> Self:
        """Read `siglip/config.json`; see `PartConfig.from_json`.

        Raises CheckpointError too where heads do not divide the width, or positions are no square.
        """
        config = super(VisionConfig, cls).from_json(data, source)
        square = math.isqrt(config.num_patches) ** 2 == config.num_patches
        need(
            config.hidden_size % config.num_attention_heads == 0 and square, source,
            f"hidden_size {config.hidden_size}, {config.num_attention_heads} heads, num_patches {config.num_patches}",
            "a width that the heads divide and a square of positions",
        )  # fmt: skip
        return config


@dataclass(frozen=True, slots=True)
class VisionInputConfig(PartConfig):
    """How a picture becomes SigLIP2's patches, `siglip_processor/preprocessor_config.json`."""

    keys: ClassVar[Keys] = config_keys.VISION_INPUT
    patch_size: int
    max_num_patches: int
    rescale_factor: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path) -> Self:
        """Read `siglip_processor/preprocessor_config.json`; see `PartConfig.from_json`.

        Raises CheckpointError too unless mean and deviation have three numbers.
        """
        config = super(VisionInputConfig, cls).from_json(data, source)
        mean, deviation = config.image_mean, config.image_std
        need(
            len(mean) == 3 and len(deviation) == 3, source,
            f"image_mean {list(mean)}, image_std {list(deviation)}", "three numbers each",
        )  # fmt: skip
        return config


@dataclass(frozen=True, slots=True)
class SchedulerConfig(PartConfig):
    """Flow schedule, `scheduler/scheduler_config.json`: shift 3.0 is Turbo's, 6.0 Z-Image's.

    With `use_dynamic_shifting` the shift follows from the size of the picture (`shift_at`), and `shift` is not used;
    what is missing then is diffusers' default.
    """

    keys: ClassVar[Keys] = config_keys.SCHEDULER
    shift: float
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path) -> Self:
        """Read `scheduler/scheduler_config.json`; a missing shift is allowed with use_dynamic_shifting.

        Raises CheckpointError too where two settings exclude each other; see `PartConfig.from_json`.
        """
        unused = {"shift": 1.0} if data.get("use_dynamic_shifting") is True else {}
        config = super(SchedulerConfig, cls).from_json(unused | data, source)
        need(
            config.base_image_seq_len != config.max_image_seq_len, source,
            f"base_image_seq_len and max_image_seq_len are both {config.max_image_seq_len}", "two sizes",
        )  # fmt: skip
        need(
            not (config.use_karras_sigmas and config.use_exponential_sigmas), source,
            "use_karras_sigmas and use_exponential_sigmas are both true", "at most one of them",
        )  # fmt: skip
        return config

    @property
    def schedule(self) -> Literal["official", "karras", "exponential"]:
        """The spacing of the sigmas, in the words of a request."""
        return "karras" if self.use_karras_sigmas else "exponential" if self.use_exponential_sigmas else "official"

    def shift_at(self, tokens: int) -> float:
        """Return the dynamic shift of a picture of so many tokens; raises ValueError where it is not 1e-6 to 1e6.

        parity: the arithmetic of diffusers' `calculate_shift`, in its order.
        """
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = tokens * slope + (self.base_shift - slope * self.base_image_seq_len)
        if self.time_shift_type == "exponential":
            mu = math.exp(mu) if abs(mu) < 700 else math.inf
        if not 1e-6 <= mu <= 1e6:
            raise ValueError(
                f"scheduler_config.json (use_dynamic_shifting) gives the shift {mu:.3g} for a picture of {tokens} "
                "tokens; needed 1e-6 to 1e6; draw another size, or give --shift"
            )
        return mu
