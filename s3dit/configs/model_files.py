"""Reads the JSON files of a model folder: `model_index.json`, `s3dit.json`, those of the vision tower.

`s3dit.json` is this engine's own: a directory may say in it its variant, size, steps and the words it knows; the
embedded tiny model does. All reading is of small JSON objects; weights are not touched.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from s3dit.configs import config_keys
from s3dit.configs.part_configs import (
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    VisionConfig,
    VisionInputConfig,
)
from s3dit.errors import CheckpointError
from s3dit.weights import json_files

# The dataclass of each part's config.json, by the folder that holds it.
KINDS: dict[str, type[Any]] = {"transformer": TransformerConfig, "text_encoder": TextEncoderConfig, "vae": VAEConfig}
# What a directory may say of its own world.
OWN = "s3dit.json"


def read_json(path: Path) -> dict[str, Any]:
    """Parse a small JSON object from disk; raises CheckpointError when it is missing, huge or not an object."""
    try:
        data = json_files.read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; needed for a model in the official directory layout") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}; needed a JSON object")
    return data


def read_own(folder: Path) -> dict[str, Any]:
    """Read and check a directory's `s3dit.json`; an empty dict where it has none. Raises CheckpointError."""
    path = folder / OWN
    own = read_json(path) if path.is_file() else {}
    config_keys.check_own(own, path)
    return own


def read_index(folder: Path, skip: Collection[str] = ()) -> list[str]:
    """Check a directory's `model_index.json`, where it has one, against what is built here; returns notes.

    skip: components that come from elsewhere. Raises CheckpointError, see `config_keys.check_index`.
    """
    path = folder / "model_index.json"
    return config_keys.check_index(read_json(path), path, skip) if path.is_file() else []


def read_vision(folder: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """Read the configs of a directory's vision tower and of its input: by folder, empty where there is no siglip/.

    notes: gets a note on keys that are unknown. Raises CheckpointError.
    """
    if not (folder / "siglip").is_dir():
        return {}
    configs = {}
    for kind, path in (
        (VisionConfig, folder / "siglip" / "config.json"),
        (VisionInputConfig, folder / "siglip_processor" / "preprocessor_config.json"),
    ):
        configs[path.parent.name] = kind.from_json(data := read_json(path), path)
        if notes is not None:
            notes += kind.note_unknown(data, path)
    return configs
