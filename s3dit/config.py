"""What a model is made of: one frozen dataclass a part, filled from the JSON files that lie beside the weights.

The JSON file is the only source of an architecture's constants: a key that is missing there is an error, not a default,
because two defaults that disagree give a different model in silence (the official code has three sources for
`axes_lens`, and they disagree). Keys that no computation needs (`axes_lens`, `_diffusers_version`) are not read.

`VARIANTS` holds what the files do not say: the settings a variant is meant to be run with. Which variant a directory
holds is told from its files (SigLIP width, scheduler shift), never from its name. A directory may say more in
`s3dit.json` (size, steps, the words it knows); the embedded tiny model does.

Source: the official Z-Image configuration files; Qwen3 keys as written by transformers 4.51 and 5.x, both read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from s3dit.weights.checkpoint import CheckpointError

Variant = Literal["turbo", "base", "omni", "tiny"]

# Above this a number in a config is an accident or an attack: the official model's largest is vocab_size, 151,936.
LARGEST = 1 << 20


class Part:
    """Reading of one part's JSON: every field present, of its type, of a sane size."""

    __slots__ = ()

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path) -> Self:
        """Read the fields of this part out of a parsed JSON object; `source` names the file in errors."""
        values = {}
        for field in fields(cls):  # type: ignore[arg-type]
            if field.name not in data:
                raise CheckpointError(
                    f"{source}: key {field.name!r} is missing; every constant of the model is read from this file, "
                    "so restore it from the official repository"
                )
            values[field.name] = _checked(data[field.name], field.type, field.name, source)
        return cls(**values)


def _checked(value: Any, kind: Any, name: str, source: str | Path) -> Any:
    """Convert one JSON value to the annotated type, or say what was found and what was needed."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == tuple[int, ...]:
        if isinstance(value, list) and 0 < len(value) <= 16:
            return tuple(_checked(item, int, name, source) for item in value)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is float:
        if number and abs(value) < 1e12:
            return float(value)
    elif value is None and kind == int | None:
        return None
    elif number and isinstance(value, int) and 0 < value <= LARGEST:
        return value
    needed = getattr(kind, "__name__", str(kind))
    raise CheckpointError(f"{source}: {name} is {value!r}; needed {needed} of a sane size; restore the official file")


@dataclass(frozen=True, slots=True)
class TransformerConfig(Part):
    """The S3-DiT, `transformer/config.json`. `siglip_feat_dim` is None except for Omni and Edit."""

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

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path) -> Self:
        config = super(TransformerConfig, cls).from_json({"siglip_feat_dim": None} | data, source)
        found = (config.all_patch_size, config.all_f_patch_size, config.n_kv_heads, config.qk_norm)
        needed = ((2,), (1,), config.n_heads, True)
        if found != needed:
            raise CheckpointError(
                f"{source}: (all_patch_size, all_f_patch_size, n_kv_heads, qk_norm) is {found}; this engine runs "
                f"{needed}, the only form ever published"
            )
        if config.dim != config.n_heads * sum(config.axes_dims) or any(d % 2 for d in config.axes_dims):
            raise CheckpointError(
                f"{source}: dim {config.dim} with {config.n_heads} heads needs {config.n_heads} even axes_dims that "
                f"sum to dim / n_heads, found {list(config.axes_dims)}"
            )
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
class TextEncoderConfig(Part):
    """Qwen3, `text_encoder/config.json`."""

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
        # transformers 5 moved the rope base into `rope_parameters`.
        rope = data.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            data = {"rope_theta": rope["rope_theta"]} | data
        return super(TextEncoderConfig, cls).from_json(data, source)


@dataclass(frozen=True, slots=True)
class VAEConfig(Part):
    """AutoencoderKL of FLUX.1, `vae/config.json`."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float


@dataclass(frozen=True, slots=True)
class SchedulerConfig(Part):
    """Flow schedule, `scheduler/scheduler_config.json`: 3.0 is Turbo's shift, 6.0 Z-Image's."""

    shift: float


# By the folder that holds it.
KINDS: dict[str, type[Any]] = {"transformer": TransformerConfig, "text_encoder": TextEncoderConfig, "vae": VAEConfig}
# What a directory may say of its own world.
OWN = "s3dit.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """How a variant is meant to be run, where neither the request nor the directory says otherwise."""

    num_inference_steps: int
    guidance_scale: float
    height: int = 1024
    width: int = 1024


VARIANTS: dict[Variant, Settings] = {
    "turbo": Settings(num_inference_steps=8, guidance_scale=0.0),
    "base": Settings(num_inference_steps=28, guidance_scale=4.0),
    "omni": Settings(num_inference_steps=28, guidance_scale=4.0),
    "tiny": Settings(num_inference_steps=8, guidance_scale=0.0, height=128, width=128),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole model directory: its parts, its variant and how it wants to be run."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    variant: Variant
    settings: Settings
    # What the directory says of its own world (embedded model): words it knows, one sentence, a prompt that suits it.
    words: frozenset[str] = frozenset()
    note: str = ""
    prompt: str = ""


def read_json(path: Path) -> dict[str, Any]:
    """Parse one small JSON object from disk; CheckpointError when it is missing, huge or not an object."""
    try:
        if path.stat().st_size > 1 << 24:
            raise CheckpointError(
                f"{path}: {path.stat().st_size:,} bytes is too large for a config; needed a small file"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; needed for a model in the official directory layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}; needed a JSON object")
    return data


def read_model(folder: Path) -> ModelConfig:
    """Read every config of a model in the official directory layout; raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: not a folder; needed a model directory with transformer/, text_encoder/, vae/"
        )
    missing = [
        part
        for part in ("transformer", "text_encoder", "vae", "scheduler", "tokenizer")
        if not (folder / part).is_dir()
    ]
    if missing:
        raise CheckpointError(
            f"{folder}: not a Z-Image model directory, it lacks {'/, '.join(missing)}/; "
            "needed the layout of Tongyi-MAI/Z-Image-Turbo"
        )

    def part(kind: type[Any], name: str, file: str = "config.json") -> Any:
        path = folder / name / file
        return kind.from_json(read_json(path), path)

    scheduler = part(SchedulerConfig, "scheduler", "scheduler_config.json")
    configs = {name: part(kind, name) for name, kind in KINDS.items()}
    own = read_json(folder / OWN) if (folder / OWN).is_file() else {}
    return compose(configs, scheduler, own, folder)


def compose(
    configs: Mapping[str, Any], scheduler: SchedulerConfig, own: Mapping[str, Any], source: Path
) -> ModelConfig:
    """One model of the configurations of its parts; own: what its `s3dit.json` says. Raises CheckpointError."""
    transformer: TransformerConfig = configs["transformer"]
    text_encoder: TextEncoderConfig = configs["text_encoder"]
    if transformer.cap_feat_dim != text_encoder.hidden_size:
        raise CheckpointError(
            f"{source}: the transformer takes text of width {transformer.cap_feat_dim}, the text encoder gives "
            f"{text_encoder.hidden_size}; the parts are of different models"
        )
    variant: Variant = own.get("variant") or variant_of(transformer, scheduler)
    if variant not in VARIANTS:
        raise CheckpointError(f"{source / OWN}: variant is {variant!r}; needed one of {', '.join(VARIANTS)}")
    settings = VARIANTS[variant]
    known = {f.name: own.get(f.name, getattr(settings, f.name)) for f in fields(Settings)}
    return ModelConfig(
        transformer=transformer,
        text_encoder=text_encoder,
        vae=configs["vae"],
        scheduler=scheduler,
        variant=variant,
        settings=Settings(**known),
        words=frozenset(own.get("words", ())),
        note=str(own.get("note", "")),
        prompt=str(own.get("prompt", "")),
    )


def variant_of(transformer: TransformerConfig, scheduler: SchedulerConfig) -> Variant:
    """Tell the variant from the files: SigLIP input means Omni or Edit, shift 3 means Turbo, another shift Z-Image."""
    if transformer.siglip_feat_dim is not None:
        return "omni"
    return "turbo" if scheduler.shift == 3.0 else "base"
