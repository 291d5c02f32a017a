"""ControlNetConfig: what a ControlNet's tensors and its config.json say; importing this module does not import torch.

Three published forms, see `controlnet`: they are detected by the tensors, from the header and, where 2.0 and 2.1 have
the same names, one matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from s3dit.configs import config_keys
from s3dit.configs.model_files import read_json
from s3dit.configs.part_configs import TransformerConfig
from s3dit.control import Version
from s3dit.errors import CheckpointError
from s3dit.weights.container import Checkpoint

EMBEDDER = "control_all_x_embedder.2-1.weight"
REFINER = "control_noise_refiner."
# What tells 2.1 from 2.0, whose refiner was never trained: there it is missing, or as it was initialized, zero.
BEFORE = f"{REFINER}0.before_proj.weight"
# How diffusers' config.json says the version, under `add_control_noise_refiner`.
SPOKEN: Mapping[str | None, Version] = {None: "1.0", "control_layers": "2.0", "control_noise_refiner": "2.1"}
# What else of it is read.
PLACES = ("control_layers_places", "control_refiner_layers_places", "add_control_noise_refiner", "control_in_dim")
# What a ControlNet's config.json repeats of its base.
BASE = ("dim", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps")
# Strengths of the authors' own examples.
STRENGTHS: Mapping[Version, float] = {"1.0": 0.75, "2.0": 0.75, "2.1": 0.9}


@dataclass(frozen=True, slots=True)
class ControlNetConfig:
    """What a ControlNet is made of besides the widths of its base.

    channels: of the control latents, 16 or 33 · places: the main layers of the base after which a hint is added ·
    notes: on what its config.json says without effect.
    """

    version: Version
    channels: int
    places: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def strength(self) -> float:
        """The strength that its authors use."""
        return STRENGTHS[self.version]

    @property
    def inpaints(self) -> bool:
        """Whether it takes a mask and a picture to inpaint."""
        return self.version != "1.0"

    def __str__(self) -> str:
        """Describe it for messages: version, channels, where its hints go."""
        return f"ControlNet {self.version}, {self.channels} channels, hints after layers {_listed(self.places)}"

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, base: TransformerConfig, version: Version | None = None, folder: Path | None = None
    ) -> Self:
        """Detect the configuration of a file by its tensors, and by a diffusers `config.json` in its folder.

        base: of the transformer that it is for · version: what the caller knows better · folder: of the config.json.
        Reads headers and, where both are possible, one matrix. Raises CheckpointError for what is no ControlNet of
        this family, of another width or not of the version asked for.
        """
        rows, columns = _embedder(checkpoint)
        if rows != base.dim:
            raise CheckpointError(
                f"{checkpoint.path}: a ControlNet for a model of width {rows}, this one is {base.dim} wide; take the "
                "ControlNet that was made for it"
            )
        if base.siglip_feat_dim is not None:
            raise CheckpointError(
                f"{checkpoint.path}: for Z-Image and Turbo; no Omni or Edit model has one; take another model"
            )
        settings = read_json(folder / "config.json") if folder and (folder / "config.json").is_file() else {}
        detected = _version(checkpoint, settings)
        channels = columns // 4
        config_keys.CONTROLNET.check(settings, f"{checkpoint.path}: its config.json")
        _check_base(checkpoint, settings, {name: getattr(base, name) for name in BASE} | {"control_in_dim": channels})
        if (columns % 4, channels) != (0, base.in_channels if detected == "1.0" else 2 * base.in_channels + 1):
            raise CheckpointError(
                f"{checkpoint.path}: {EMBEDDER} has {columns} columns, not those of a ControlNet {detected} (4 · "
                f"{base.in_channels} in 1.0, 4 · {2 * base.in_channels + 1} in 2.x); download it again"
            )
        if version not in (None, detected) and ("1.0" in (version, detected) or BEFORE not in checkpoint):
            raise CheckpointError(
                f"{checkpoint.path}: its tensors are those of version {detected}, asked for is {version}; only 2.0 and "
                "2.1 have the same tensors; leave the version out"
            )
        notes = config_keys.CONTROLNET.note_unknown(settings, (*BASE, *PLACES), f"{checkpoint.path}: its config.json")
        return cls(version or detected, channels, _places(checkpoint, base, settings), tuple(notes))

    def unused(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Return the names in a file that are never read: 2.0's untrained refiner, a base that was saved with it."""
        prefixes = ("control_layers.", "control_all_x_embedder.", *(() if self.version == "2.0" else (REFINER,)))
        return tuple(name for name in checkpoint if not name.startswith(prefixes))


def _listed(places: Sequence[int]) -> str:
    step = places[1] - places[0] if len(places) > 1 else 0
    even = len(places) > 4 and all(b - a == step for a, b in pairwise(places))
    shown = f"{places[0]}, {places[1]}, … {places[-1]}" if even else ", ".join(map(str, places))
    return f"{shown} ({len(places)})"


def _embedder(checkpoint: Checkpoint) -> tuple[int, int]:
    """Rows and columns of the control embedder; CheckpointError where there is none."""
    if EMBEDDER in checkpoint and len(shape := checkpoint.entry(EMBEDDER).shape) == 2:
        return shape[0], shape[1]
    kind = "the model itself, not a ControlNet" if "x_pad_token" in checkpoint else "no ControlNet for Z-Image"
    raise CheckpointError(
        f"{checkpoint.path}: {kind} (it has no {EMBEDDER}); needed a file such as "
        "Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors"
    )


def _check_base(checkpoint: Checkpoint, settings: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a config.json says other sizes or epsilons than the base and the tensors have."""
    for key, value in needed.items():
        if key in settings and settings[key] != value:
            raise CheckpointError(
                f"{checkpoint.path}: {key} is {settings[key]!r:.80} in its config.json; this model needs {value}; take "
                "the ControlNet that was made for it, or restore the file"
            )


def _version(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Version:
    """The version that a config.json says, else the one that the tensors are of; raises CheckpointError."""
    if (word := settings.get("add_control_noise_refiner", "")) != "":
        if not isinstance(word, str | None) or word not in SPOKEN:
            raise CheckpointError(
                f"{checkpoint.path}: add_control_noise_refiner is {word!r} in its config.json; needed null, "
                "control_layers or control_noise_refiner; restore the file"
            )
        return SPOKEN[word]
    if any(name.startswith(REFINER) for name in checkpoint):
        if f"{REFINER}0.after_proj.weight" not in checkpoint:
            return "1.0"
        if BEFORE in checkpoint and not checkpoint.is_zero(BEFORE):
            return "2.1"
    return "2.0"


def _places(checkpoint: Checkpoint, base: TransformerConfig, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that get a hint: what a config.json says, else spread evenly, as in every published file."""
    count = len({name.split(".")[1] for name in checkpoint if name.startswith("control_layers.")})
    refiner = settings.get("control_refiner_layers_places") or list(range(base.n_refiner_layers))
    places = settings.get("control_layers_places")
    if places is None:
        if count == 0 or base.n_layers % count:
            raise CheckpointError(
                f"{checkpoint.path}: {count} control layers cannot be spread evenly over the {base.n_layers} layers of "
                "this model; needed a ControlNet that was made for it, or diffusers' config.json beside it"
            )
        places = list(range(0, base.n_layers, base.n_layers // count))
    whole = isinstance(places, list) and all(type(place) is int for place in places)
    ascends = whole and places == sorted(set(places)) and len(places) == count
    if not ascends or places[0] != 0 or places[-1] >= base.n_layers or refiner != list(range(base.n_refiner_layers)):
        raise CheckpointError(
            f"{checkpoint.path}: control_layers_places {places} and control_refiner_layers_places {refiner} in its "
            f"config.json do not fit {count} control layers and a model of {base.n_layers} and {base.n_refiner_layers} "
            "layers; restore the file"
        )
    return tuple(places)


def settings_of(path: Path) -> Path | None:
    """Return the folder whose config.json, if it has one, is about the ControlNet at a path; None where there is none.

    Official files of several versions lie side by side; a config.json there is about none of them.
    """
    return path if path.is_dir() else path.parent if path.stem == "diffusion_pytorch_model" else None
