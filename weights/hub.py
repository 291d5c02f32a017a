"""Local files of a model by its name: a path, or "org/name" through the Hugging Face cache.

The cache is shared with diffusers and other tools, so a model that they have fetched is not fetched again. Where it
holds every file that is read, nobody is asked: neither whether there is a newer revision, nor anything else.
"org/name@main" asks for the newest, "org/name@COMMIT" takes that one. Else a single request asks for the list of a
repository's files, `hub_files` chooses from it which are read, and exactly these are downloaded. Where the Hub is not
reached, the same choice is made from the cache. `HF_HUB_OFFLINE`, `HF_HOME` and tokens work as they do everywhere.

Names come from users only, never from a file. The embedded model has no name here; the pipeline knows it.
"""

import errno
import glob
import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from s3dit.errors import CheckpointError
from s3dit.weights.checkpoint import INDEX, STEMS
from s3dit.weights.hub_files import (
    ADAPTERS,
    ENDINGS,
    MODEL_FOLDERS,
    TOKENIZER_FILES,
    WEIGHTS,
    Files,
    adapter_files,
    chooser,
    one_file,
    wanted,
)
from s3dit.weights.json_files import read_json
from s3dit.weights.safetensors_dir import SUFFIX, read_index

# Of an official repository, by model_index.json.
FOLDERS = (*MODEL_FOLDERS, "scheduler", "siglip_processor")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# What may follow a repository, as in huggingface_hub's own paths: a branch, a tag or a commit, which never changes.
REVISION = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
# Characters of a name at most; the Hub's own bound for a repository is 96.
MAX_NAME_LENGTH = 400


def resolve(name: str, parts: Collection[str] = MODEL_FOLDERS) -> Path:
    """Return the local path of a model: an existing file or folder as it is, a Hub repository, or a file of it.

    name: as in the module's docstring · parts: folders of the official layout that will be read; of others only the
    configuration is fetched. Raises CheckpointError when it is none of these, or when the Hub does not give it; the
    message is a single line.
    """
    if (path := _local(name)) is not None:
        return path
    repository, revision, inner = _split_name(name, "a path, or a Hub repository such as Tongyi-MAI/Z-Image-Turbo")
    if inner:
        return _file(repository, revision, inner)
    return _fetch(repository, revision, lambda files: wanted(files, parts, repository))[0]


def resolve_file(name: str) -> Path:
    """Return the local path of a file of weights: a path, or "org/name/file.safetensors" or "org/name" of the Hub.

    A bare repository gives the file that PEFT or diffusers would have written, or the only one. Raises CheckpointError.
    """
    if (path := _local(name)) is not None:
        return path
    needed = f"the path of a file of weights ({SUFFIX}), or one of the Hub as in org/name/file{SUFFIX}"
    repository, revision, inner = _split_name(name, needed)
    # A file that is not here is far likelier than a repository of such a name.
    if not inner and repository.endswith(ENDINGS):
        raise _not_found_error(name, needed)
    if inner:
        return _file(repository, revision, inner)
    folder, files = _fetch(repository, revision, lambda files: adapter_files(files, repository))
    file = folder / files[0]
    # A folder's config.json says more than the file; the folder is opened by the same rule that chose the file.
    return file.parent if file.stem in STEMS and (file.parent / "config.json").is_file() else file


def peek(name: str) -> tuple[Path, list[str] | None]:
    """Return the local path that `resolve` would, without fetching weights, and the files that are not in the cache.

    None instead of those files: it is a path, not a name of the Hub. The cache is used as it is, at its revision; else
    the list of files is asked for, and only settings and indexes are downloaded. Raises CheckpointError.
    """
    if (path := _local(name)) is not None:
        return path, None
    repository, revision, inner = _split_name(name, "a path, or a Hub repository such as Tongyi-MAI/Z-Image-Turbo")
    choose = chooser(repository, inner)
    _check_client(repository)
    from huggingface_hub import HfApi, constants, snapshot_download

    chosen, snapshot = None, _cached(repository, revision)
    if snapshot is not None:
        with suppress(CheckpointError):
            chosen = choose(_known_files(repository, snapshot))
    if snapshot is None or chosen is None or _missing_files(snapshot, chosen) or _may_change(revision):
        # Of the revision that is there, so that the cache goes on standing for that one.
        revision = revision if snapshot is None or _may_change(revision) else snapshot.name
        try:
            info = HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            chosen = choose({file.rfilename for file in info.siblings or ()})
            small = [
                glob.escape(file)
                for file in chosen
                if file.endswith(".json") and Path(file).name not in TOKENIZER_FILES
            ]
            if small:
                snapshot = Path(snapshot_download(repository, revision=revision, allow_patterns=small))
        except CheckpointError:
            raise
        except _errors() as error:
            if chosen is None:
                raise CheckpointError(f"{repository}: {_explain_error(error)}") from None
    folder = snapshot or Path(constants.HF_HUB_CACHE) / repository
    file = inner or (chosen[0] if Path(chosen[0]).name in ADAPTERS[:2] else "")
    return folder / file, _missing_files(folder, chosen)


def _missing_files(snapshot: Path, chosen: list[str]) -> list[str]:
    return [name for name in chosen if not (snapshot / name).is_file()]


def _file(repository: str, revision: str | None, inner: str) -> Path:
    """Fetch a file of a repository, with the small files that are read beside it."""
    folder, _ = _fetch(repository, revision, partial(one_file, repository, inner))
    return folder / inner


def _local(name: str) -> Path | None:
    """Return the path of that name, None where nothing is there; raises CheckpointError for what cannot be a path."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    # A home that is not there; a name too long for the file system, or below a folder that may not be read; NUL.
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name[:80]!r}: not usable as a path ({_first_line(error)}); needed a path or a Hub name"
        ) from None


def _split_name(name: str, needed: str) -> tuple[str, str | None, str]:
    """Return repository, revision and file of a Hub name, which is never a path out of it; raises CheckpointError."""
    repository, inner = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    repository, at, revision = repository.partition("@")
    steps = inner.split("/") if inner else []
    plain = all(step not in ("", ".", "..") and step.isprintable() and "\\" not in step for step in steps)
    bare = name.count("/") == 1 or inner.endswith(ENDINGS)
    # The Hub's own rules for a repository, so that nobody is asked for what cannot be.
    if len(name) > MAX_NAME_LENGTH or not REPOSITORY.fullmatch(repository) or "--" in repository or ".." in repository:
        raise _not_found_error(name, needed)
    if not plain or not bare or len(repository) > 96 or repository.endswith((".git", "-", ".")):
        raise _not_found_error(name, needed)
    if at and not REVISION.fullmatch(revision):
        raise CheckpointError(f"{name[:80]!r}: {revision[:40]!r} is no revision; needed a branch, a tag or a commit")
    return repository, revision or None, inner


def _may_change(revision: str | None) -> bool:
    """Return whether a revision was asked for that may be another one by now: a branch or a tag, not a commit."""
    return revision is not None and not COMMIT.fullmatch(revision)


def _not_found_error(name: str, needed: str) -> CheckpointError:
    return CheckpointError(f"{name[:80]!r}: no such file or folder; needed {needed}")


def _fetch(repository: str, revision: str | None, choose: Callable[[Files], list[str]]) -> tuple[Path, list[str]]:
    """Return the folder of a repository in the cache, with the files that `choose` takes; raises CheckpointError.

    The Hub is asked where one of these files is not in the cache, or where the revision may have changed.
    """
    _check_client(repository)
    # Slow to import, and needed by few runs.
    from huggingface_hub import HfApi, constants, snapshot_download

    snapshot = _cached(repository, revision)
    chosen = None if snapshot is None or _may_change(revision) else _complete(repository, snapshot, choose)
    if snapshot is not None and chosen is not None:
        return snapshot, chosen
    errors = _errors()
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        chosen = choose({sibling.rfilename for sibling in info.siblings or ()})
        patterns = [glob.escape(name) for name in chosen]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)), chosen
    except CheckpointError:
        raise
    except errors as error:
        fault, snapshot = _explain_error(error), _cached(repository, revision)
    if snapshot is None:
        raise CheckpointError(f"{repository}: {fault}")
    chosen = choose(_known_files(repository, snapshot)) if chosen is None else chosen
    if missing := _missing_files(snapshot, chosen):
        shown = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
        raise CheckpointError(
            f"{repository}: download incomplete: missing {shown} ({len(missing)} of {len(chosen)} files); {fault}"
        )
    return snapshot, chosen


def _complete(repository: str, snapshot: Path, choose: Callable[[Files], list[str]]) -> list[str] | None:
    """Return the files that `choose` takes, where all are in the cache and it is known that there are no others."""
    try:
        if not _cached_list(repository, snapshot.name) and not _whole_model(snapshot):
            return None
        chosen = choose(_known_files(repository, snapshot))
    except CheckpointError:
        return None
    return None if _missing_files(snapshot, chosen) else chosen


def _whole_model(snapshot: Path) -> bool:
    """Return whether each folder that model_index.json names is there, with its settings; raises CheckpointError."""
    path = snapshot / "model_index.json"
    index = read_json(path) if path.is_file() else None
    if not isinstance(index, dict):
        return False
    named = [part for part in FOLDERS if isinstance(index.get(part), list) and index[part][:1] != [None]]
    return bool(named) and all(any((snapshot / part).glob("*.json")) for part in named)


def _check_client(repository: str) -> None:
    """Raise CheckpointError where the client of the Hub is not installed."""
    if find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{repository}: no such file or folder here, and a name of the Hub needs the package huggingface_hub, "
            "which is not installed; pip install 's3dit[hub]', or give the path of a folder"
        )


def _cached(repository: str, revision: str | None = None) -> Path | None:
    """Return the snapshot of a revision in the cache, complete or not; None where there is none."""
    from huggingface_hub import errors, snapshot_download

    try:
        one = ["model_index.json"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=one, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        path = getattr(error, "snapshot_path", None)
        return None if path is None else Path(path)


def _known_files(repository: str, snapshot: Path) -> set[str]:
    """Return the files that a repository is known to have: by the cached list, by what is there, and by indexes.

    Links whose file is gone count as known. So do the shards of an index that is there, and where no list was cached,
    the folders that model_index.json names.
    """
    known = {
        (Path(folder) / name).relative_to(snapshot).as_posix()
        for folder, _, names in os.walk(snapshot)
        for name in names
    }
    listed = _cached_list(repository, snapshot.name)
    for index in [name for name in known if name.endswith(INDEX) and (snapshot / name).is_file()]:
        shards = set(read_index(snapshot / index).values())
        known |= {f"{index.rpartition('/')[0]}/{name}".lstrip("/") for name in shards if Path(name).name == name}
    if not listed and (snapshot / "model_index.json").exists():
        for part in WEIGHTS[:3]:
            if not any(name.startswith(f"{part}/") and name.endswith(ENDINGS) for name in known):
                known.add(f"{part}/{STEMS[part == 'text_encoder']}{SUFFIX}")
    return known | listed


def _cached_list(repository: str, commit: str) -> set[str]:
    """Return the list of files that huggingface_hub keeps beside a snapshot since 1.22; empty without one."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return set()
    try:
        return {file.path for file in get_cached_repo_tree(repository, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return set()


def _errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the client of the Hub raises when it cannot give something."""
    from huggingface_hub import errors

    # HTTPError is the root of the HTTP client in use, which is another one in each major version of the library;
    # ValueError is a name or an answer that is none of the Hub's, and so are KeyError and TypeError; RuntimeError is
    # the transfer's.
    more = (getattr(errors, name, OSError) for name in ("EntryNotFoundError", "XetDownloadError"))
    return (errors.HTTPError, OSError, ValueError, KeyError, TypeError, RuntimeError, *more)  # type: ignore[attr-defined]


def _explain_error(error: Exception) -> str:
    """Return what happened, and what to do, in a single line."""
    from huggingface_hub import errors

    # A file that is not in the cache, because it was not given.
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, _errors()):
        return _explain_error(error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    remedy = "try again, or give the path of a folder"
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated; accept its terms on huggingface.co and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such folder here, and no such repository of a model on the Hub (or it is private); check the "
            "spelling, or log in with `hf auth login`"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            "not whole in the Hugging Face cache, no such folder here, and the Hub was not reached (offline, or "
            "HF_HUB_OFFLINE is set); run again online, or give the path of a folder"
        )
    if status in (401, 403):
        return f"the Hub refuses access ({status}); log in with `hf auth login`, or give the path of a folder"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no room is left on the disk of the Hugging Face cache; free some, or set HF_HOME to another place"
    if isinstance(error, errors.HfHubHTTPError) or status is not None:
        return f"the Hub did not give it ({_first_line(error)}); {remedy}"
    kinds = (errors.HTTPError, ConnectionError, TimeoutError)  # type: ignore[attr-defined]
    verb = "was not reached" if isinstance(error, kinds) else "did not give it"
    return f"the Hub {verb} ({_first_line(error)}); run again online, or give the path of a folder"


def _first_line(error: Any) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
