"""Opening the checkpoint at a path: a file, or a folder with a file or with an index and its shards.

The container is detected by the first bytes (`container.sniff`), the file of a folder by the names that the official
repositories use; DFloat11 writes a file a block, without an index. A new container is a module with a `Checkpoint` and
a line in `READERS`.
"""

from collections.abc import Callable
from pathlib import Path

from s3dit.errors import CheckpointError
from s3dit.weights import dfloat11
from s3dit.weights.container import REFUSED, Checkpoint, Container, sniff
from s3dit.weights.formats import recognize_formats
from s3dit.weights.gguf_file import GGUFFile
from s3dit.weights.safetensors_dir import SUFFIX, open_file, open_files, open_index

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]

# The stems of the official repositories, in a folder that holds more than one checkpoint (fp16 variants, say).
STEMS = ("diffusion_pytorch_model", "model")
INDEX = ".safetensors.index.json"
READERS: dict[Container, Callable[[Path], Checkpoint]] = {"safetensors": open_file, "gguf": GGUFFile}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a safetensors or GGUF file, or a folder with such a file or with the shards of an index.

    Layers in a number format have a Scheme in `schemes`. Raises CheckpointError for anything else, and for a format
    that is not supported.
    """
    return recognize_formats(open_stored(path))


def open_stored(path: str | Path) -> Checkpoint:
    """Open as `open_checkpoint` does, with every tensor as it is stored, whatever its number format."""
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        exists = path.exists()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror}); needed a path that can be read") from None
    if not exists:
        raise CheckpointError(f"{path}: not found; needed a .safetensors or .gguf file, or a folder with one")
    container = sniff(path)
    if container not in READERS:
        raise CheckpointError(f"{path}: {REFUSED[container]}")
    return READERS[container](path)


def _open_folder(folder: Path) -> Checkpoint:
    """Open the checkpoint of a folder, sharded or not; raises CheckpointError where there is none, or several."""
    index = _one(folder, INDEX)
    if index is not None:
        return open_index(index)
    files = _visible(folder, SUFFIX)
    if files and all("-of-" in path.stem for path in files):
        raise CheckpointError(
            f"{folder}: shards ({files[0].name}) without the *{INDEX} that names them; download the whole folder"
        )
    if len(files) > 1 and dfloat11.config_of(folder):
        return open_files(folder, [path.name for path in files])
    file = _one(folder, SUFFIX) or _one(folder, ".gguf")
    if file is None:
        raise CheckpointError(f"{folder}: no *{SUFFIX} in it; {_instead(folder)}")
    return open_stored(file)


def _visible(folder: Path, suffix: str) -> list[Path]:
    """Return the files with a suffix, without those that macOS and downloaders hide behind a leading dot."""
    return sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith("."))


def _one(folder: Path, suffix: str) -> Path | None:
    """Return the only file with this suffix, preferring an official stem; None where there is none."""
    files = _visible(folder, suffix)
    official = [path for path in files if path.name.removesuffix(suffix) in STEMS]
    files = official if len(files) > 1 and len(official) == 1 else files
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:10])
        raise CheckpointError(
            f"{folder}: {len(files)} files *{suffix} ({names}); needed one; give the path of the file"
        )
    return files[0] if files else None


def _instead(folder: Path) -> str:
    """Return what to do with a folder without safetensors, by its content."""
    if (folder / "model_index.json").is_file():
        return "it is a whole model; give the folder of one part, such as transformer/"
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if name.endswith((".bin", ".pt", ".pth", ".ckpt")):
            return f"{name} {REFUSED['pickle']}"
    return f"found {', '.join(names[:10]) or 'nothing'}; download the folder again"
