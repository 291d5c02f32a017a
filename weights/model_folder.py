"""Copying the small files of a model folder, and moving a folder that was built into its place.

A folder of unknown origin may hold links to anything, and programs. Copied are plain files of the kinds that describe a
model, and links to them that stay inside the folder, or lead to `blobs` of the same Hugging Face cache entry, where its
snapshots point.
"""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from s3dit.errors import CheckpointError

# What describes a model; code and what else may lie there is left out.
COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md", ".png", ".safetensors", ""}


def allowed_places(folder: Path) -> list[Path]:
    """Return the folders where a file of this folder may really be."""
    real = folder.resolve()
    caches = [parent.parent for parent in real.parents if parent.name == "snapshots"]
    return [real, *(cache / "blobs" for cache in caches)]


def contained(path: Path, places: list[Path]) -> bool:
    """Return whether a path is a plain file or folder that really is inside one of these places."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    plain = target.is_dir() or target.is_file()
    return plain and any(target.is_relative_to(place) for place in places)


def left_out(root: Path) -> Callable[[str, list[str]], list[str]]:
    """Return shutil.copytree's `ignore`: hidden files, links out of the folder, and files that describe no model.

    Warns of what is left out, but for hidden files.
    """
    places = allowed_places(root)

    def ignore(folder: str, names: list[str]) -> list[str]:
        hidden = [name for name in names if name.startswith(".")]
        paths = [Path(folder) / name for name in names if name not in hidden]
        foreign = [
            path.name
            for path in paths
            if not contained(path, places) or (not path.is_dir() and path.suffix.lower() not in COPIED_SUFFIXES)
        ]
        if foreign:
            shown = ", ".join(foreign[:5]) + (", …" if len(foreign) > 5 else "")
            warnings.warn(
                f"{folder}: {shown} not copied: needed plain files inside the folder that describe a model, not "
                "programs",
                stacklevel=2,
            )
        return hidden + foreign

    return ignore


def copy_file(source: Path, target: Path, root: Path) -> None:
    """Copy one file of a model folder; raises CheckpointError for a link that leaves it."""
    if not contained(source, allowed_places(root)):
        raise CheckpointError(f"{source}: a link that leaves the folder, or no plain file; put the file itself there")
    shutil.copyfile(source, target)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yield the path to build a folder at; it is moved to `target` on success, and removed in any case."""
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield folder / "model"
        put_in_place(folder / "model", target)
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:
            # The end may be asked for while a large folder is being removed.
            shutil.rmtree(folder, ignore_errors=True)
            raise


def put_in_place(built: Path, target: Path) -> None:
    """Rename a folder that was built to `target`; a folder there is removed only once the new one is in place."""
    old = built.with_name("replaced")
    try:
        if target.exists():
            target.rename(old)
        built.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
