"""From what a user calls a model to a folder on this machine: a path, or "org/name" through the Hugging Face cache.

The cache is the one that every tool of the family shares, so a model that diffusers has fetched is not fetched again.
Only what an engine reads is asked for. `HF_HUB_OFFLINE`, `HF_HOME` and tokens work as they do everywhere.

The embedded model is not a name for this room; the pipeline knows it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from s3dit.weights.container import CheckpointError

FILES = (
    "model_index.json",
    "s3dit.json",
    "*/*.json",
    "*/*.safetensors",
    "*/merges.txt",
    "*/tokenizer.model",
)
NOT_READ = ("assets/*", "*/assets/*")
SUFFIX = ".safetensors"
# What a repository of one adapter calls it.
ADAPTERS = ("adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors")

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(name: str) -> Path:
    """The local path of a model: an existing file or folder as it is, a Hub repository from the cache or the Hub.

    Raises CheckpointError when it is neither, or when the Hub does not give it; the message is one line.
    """
    if (path := _local(name)) is not None:
        return path
    if not REPOSITORY.fullmatch(name):
        raise CheckpointError(
            f"{name!r}: no such file or folder; needed a path, or a Hub repository such as Tongyi-MAI/Z-Image-Turbo"
        )
    return _snapshot(name)


def resolve_file(name: str) -> Path:
    """The local path of one file of weights: as it is, or "org/name/file.safetensors" or "org/name" of the Hub.

    Of a bare repository only the names that PEFT and diffusers give an adapter are asked for. Raises CheckpointError.
    """
    if (path := _local(name)) is not None:
        return path
    repository, inner = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    named = inner.endswith(SUFFIX) or (not inner and not repository.endswith(SUFFIX))
    if not REPOSITORY.fullmatch(repository) or ".." in inner.split("/") or not named:
        raise CheckpointError(
            f"{name!r}: no such file or folder; needed the path of a file of weights ({SUFFIX}), or one of the "
            f"Hub as in org/name/file{SUFFIX}"
        )
    folder = _snapshot(repository, (inner,) if inner else ADAPTERS)
    if not (folder / inner).exists() or not (inner or any(folder.glob(f"*{SUFFIX}"))):
        raise CheckpointError(
            f"{name}: the repository holds no {inner or 'file of weights under the usual names'}; needed its file, "
            f"as in {repository}/file{SUFFIX}; look them up on huggingface.co"
        )
    return folder / inner


def _local(name: str) -> Path | None:
    """The path of that name, None where nothing lies there; raises CheckpointError for what can be no path."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    # A home that is not there; a name too long for the file system, or below a folder that may not be read.
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{name!r}: not usable as a path ({_first_line(error)}); needed a path or a Hub name"
        ) from None


def _snapshot(name: str, files: Sequence[str] = FILES) -> Path:
    """Let huggingface_hub bring a repository into its cache; its errors become one line each."""
    # Slow to import, and needed by few runs.
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(NOT_READ)))
    except errors.GatedRepoError:
        fault = "the repository is gated; accept its terms on huggingface.co and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        fault = (
            "no such folder here, and no such repository on the Hub (or it is private); check the spelling, "
            "or log in with `hf auth login`"
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        fault = (
            "no such folder here, not in the Hugging Face cache, and the Hub was not reached (offline, or "
            "HF_HUB_OFFLINE is set); go online once, or give the path of a folder"
        )
    # HTTPError is the root of the HTTP client in use, which is another one in each major version of the library.
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        fault = f"the Hub did not give it ({_first_line(error)}); try again, or give the path of a folder"
    raise CheckpointError(f"{name}: {fault}") from None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
