"""SRC and DST of the commands `inspect`, `convert` and `quantize`, checked before torch is imported."""

from pathlib import Path

from s3dit import files
from s3dit.errors import RequestError
from s3dit.runtime.embedded import FOLDERS

# Endings of single files of weights; models are written as folders.
SINGLE = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")


def check_source(name: str) -> None:
    """Raise RequestError where a name can only be a path and leads to nothing."""
    if name not in FOLDERS:
        files.check_models([("", name)])


def check_directory(target: Path) -> None:
    """Raise RequestError where the name of a new model directory is that of a single file."""
    if target.suffix.lower() in SINGLE:
        raise RequestError(f"{target}: a model is written as a folder; needed a name without {target.suffix}")


def located(name: str) -> Path:
    """The local path of a model, downloaded where it is a name of the Hub; raises CheckpointError."""
    from s3dit.weights.hub import resolve

    return FOLDERS[name] if name in FOLDERS else resolve(name)
