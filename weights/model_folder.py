"""Copying what lies beside the weights in a model folder, and putting a folder that was built in its place.

A folder from elsewhere may hold links to anything and programs of anybody. Copied are plain files of the kinds that a
model is described with, and links to them that stay inside the folder, or lead to `blobs` of the same Hugging Face
cache entry, where its snapshots point.
"""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from s3dit.errors import CheckpointError

# What describes a model; code and what else may lie there is left out.
KINDS = {".json", ".txt", ".model", ".jinja", ".md", ".png", ".safetensors", ""}


def homes(folder: Path) -> list[Path]:
    """Where a file of this folder may really lie."""
    real = folder.resolve()
    caches = [parent.parent for parent in real.parents if parent.name == "snapshots"]
    return [real, *(cache / "blobs" for cache in caches)]


def contained(path: Path, places: list[Path]) -> bool:
    """Whether a path is a plain file or folder that really lies at one of these places."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    plain = target.is_dir() or target.is_file()
    return plain and any(target.is_relative_to(place) for place in places)


def left_out(root: Path) -> Callable[[str, list[str]], list[str]]:
    """For shutil.copytree's `ignore`: what is hidden, leaves the folder, is no plain file, or describes no model.

    Warns of what is left out, but for hidden files.
    """
    places = homes(root)

    def ignore(folder: str, names: list[str]) -> list[str]:
        hidden = [name for name in names if name.startswith(".")]
        paths = [Path(folder) / name for name in names if name not in hidden]
        strange = [
            path.name
            for path in paths
            if not contained(path, places) or (not path.is_dir() and path.suffix.lower() not in KINDS)
        ]
        if strange:
            few = ", ".join(strange[:5]) + (", …" if len(strange) > 5 else "")
            warnings.warn(
                f"{folder}: {few} not copied: needed plain files inside the folder that describe a model, no programs",
                stacklevel=2,
            )
        return hidden + strange

    return ignore


def copy_file(source: Path, target: Path, root: Path) -> None:
    """Copy one file of a model folder; raises CheckpointError for a link that leaves it."""
    if not contained(source, homes(root)):
        raise CheckpointError(f"{source}: a link that leaves the folder, or no plain file; put the file itself there")
    shutil.copyfile(source, target)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Where to build the folder that is put at `target` when all went well; nothing is left beside it in any case."""
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield folder / "model"
        put(folder / "model", target)
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:
            # The end may be asked for while a large folder is being removed.
            shutil.rmtree(folder, ignore_errors=True)
            raise


def put(built: Path, target: Path) -> None:
    """Rename a folder that was built to where it belongs; what is there goes only when the new one is in its place."""
    old = built.with_name("replaced")
    try:
        if target.exists():
            target.rename(old)
        built.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
