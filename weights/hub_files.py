"""Which files of a Hub repository are read: of a model, of one file of it, of an adapter.

Each function takes the names of all files of a repository, however they were listed, and returns those that this
engine reads, so that exactly these are downloaded; CheckpointError where the layout is another one.
"""

import re
from collections.abc import Callable, Collection, Iterable

from s3dit.errors import CheckpointError
from s3dit.weights.checkpoint import INDEX, STEMS
from s3dit.weights.safetensors_dir import SUFFIX

OFFICIAL_REPOSITORY = "Tongyi-MAI/Z-Image-Turbo"
# Folders of the official layout that hold weights; siglip is an Omni model's.
WEIGHTS = ("transformer", "text_encoder", "vae", "siglip")
MODEL_FOLDERS = (*WEIGHTS, "tokenizer")
ENDINGS = (SUFFIX, ".gguf")
# DFloat11 writes a file a block beside the rest, and no index.
BLOCK_FILE = re.compile(r"(?:.*_)?layers_0\.safetensors")
# What is read of a folder besides its weights, and of the whole.
CONFIGS = ("config.json", "quantization_config.json")
ROOT_FILES = (
    "model_index.json", "s3dit.json", "scheduler/scheduler_config.json", "siglip_processor/preprocessor_config.json",
)  # fmt: skip
# Generations of a tokenizer, of which the first is read, and what is read with any.
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
TOKENIZER_FILES = tuple(name for row in TOKENIZERS for name in row)
BESIDE = ("tokenizer_config.json", "chat_template.jinja")
# What a repository of one adapter calls it, and what is read beside a file that is named.
ADAPTERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", *(f"{stem}{SUFFIX}" for stem in STEMS))
SETTINGS_FILES = (*CONFIGS, "adapter_config.json")

Files = Collection[str]


def chooser(repository: str, inner: str) -> Callable[[Files], list[str]]:
    """Return the function that chooses which of a repository's files are read: of a file, a model, or an adapter."""

    def choose(files: Files) -> list[str]:
        if inner:
            return one_file(repository, inner, files)
        try:
            return wanted(files, MODEL_FOLDERS, repository)
        except CheckpointError:
            if not any(name in files for name in ADAPTERS[:2]):
                raise
            return adapter_files(files, repository)

    return choose


def wanted(files: Files, parts: Collection[str], repository: str) -> list[str]:
    """Return the files of a repository that will be read for these parts; raises CheckpointError for other layouts."""
    homes = [part for part in WEIGHTS if any(file.startswith(f"{part}/") for file in files)]
    if set(parts) == {"tokenizer"}:
        if not (tokenizer_files := _tokenizer(files, "tokenizer/") or _tokenizer(files, "")):
            raise CheckpointError(f"{repository}: holds no tokenizer; needed tokenizer.json in it or in tokenizer/")
        return tokenizer_files
    if not homes and not any(_prefer(_visible_names(files, ""), ending) for ending in ENDINGS):
        raise _layout_error(repository, files)
    asked = {part for part in parts if part in WEIGHTS[:3]}
    if homes and asked and not asked & set(homes):
        raise _layout_error(repository, files, sorted(asked)[0])
    chosen = [file for file in ROOT_FILES if file in files]
    for part in homes or [""]:
        prefix = f"{part}/" if part else ""
        # At the root may lie an adapter as well, whose settings say its strength.
        chosen += [prefix + name for name in (CONFIGS if part else SETTINGS_FILES) if prefix + name in files]
        if part not in parts and part:
            continue
        weights = _weights(files, prefix)
        if not weights:
            raise _layout_error(repository, files, part)
        chosen += weights
    return chosen + (_tokenizer(files, "tokenizer/") if "tokenizer" in parts else [])


def adapter_files(files: Files, repository: str) -> list[str]:
    """Return a repository's only file of weights, and files read beside it; CheckpointError where it has several."""
    usual = [name for name in ADAPTERS if name in files]
    every = sorted(file for file in files if file.endswith(SUFFIX))
    if not usual and len(every) != 1:
        shown = ", ".join(every[:6]) + (", …" if len(every) > 6 else "")
        raise CheckpointError(
            f"{repository}: holds {len(every)} files *{SUFFIX}{f' ({shown})' if every else ''} and none under the "
            f"usual names; needed one; name it, as in {repository}/{every[0] if every else f'file{SUFFIX}'}"
        )
    return _with_sides(usual[0] if usual else every[0], files)


def _with_sides(file: str, files: Files) -> list[str]:
    folder = file[: file.rfind("/") + 1]
    return [file, *(folder + name for name in SETTINGS_FILES if folder + name in files)]


def _visible_names(files: Files, prefix: str) -> list[str]:
    """Return the names in a folder of a repository, without those that are hidden."""
    names = (file.removeprefix(prefix) for file in files if file.startswith(prefix))
    return sorted(name for name in names if "/" not in name and not name.startswith("."))


def _prefer(names: Iterable[str], ending: str) -> list[str]:
    """Return names with that ending: the official name alone where there is one (as `checkpoint` opens a folder)."""
    matching = [name for name in names if name.endswith(ending)]
    official = [name for name in matching if name.removesuffix(ending) in STEMS]
    return official if len(official) == 1 else matching


def _weights(files: Files, prefix: str) -> list[str]:
    """Return the weights of a folder: an index and its shards, or a file; nothing where it has none, or several."""
    names = _visible_names(files, prefix)
    if len(index := _prefer(names, INDEX)) == 1:
        shard = re.compile(re.escape(index[0].removesuffix(INDEX)) + r"-\d+-of-\d+\.safetensors")
        every = [name for name in names if name.endswith(SUFFIX)]
        return [prefix + name for name in index + ([name for name in every if shard.fullmatch(name)] or every)]
    if any(map(BLOCK_FILE.fullmatch, names)):
        return [prefix + name for name in names if name.endswith(SUFFIX)]
    for ending in ENDINGS:
        if candidates := _prefer(names, ending):
            return [prefix + candidates[0]] if len(candidates) == 1 else []
    return []


def _tokenizer(files: Files, prefix: str) -> list[str]:
    there = next((names for names in TOKENIZERS if prefix + names[0] in files), ())
    return [prefix + name for name in (*there, *(BESIDE if there else ())) if prefix + name in files]


def _layout_error(repository: str, files: Files, part: str = "") -> CheckpointError:
    """Return the error of a repository, or of a part's folder, that does not hold exactly one checkpoint."""
    weights = sorted(file for file in files if file.endswith(ENDINGS) and file.startswith(f"{part}/" if part else ""))
    shown = ", ".join(weights[:6]) + (", …" if len(weights) > 6 else "")
    where = (
        f"{part}/ holds"
        if part
        else f"is not in the layout of {OFFICIAL_REPOSITORY}, with a folder for each part; it holds"
    )
    way = f"name one file for its part, as in --transformer {repository}/{weights[0]}" if weights else "take another"
    return CheckpointError(
        f"{repository}: {where} {len(weights)} files *{SUFFIX} or *.gguf{f' ({shown})' if weights else ''}; needed one "
        f"checkpoint; {way}"
    )


def one_file(repository: str, inner: str, files: Files) -> list[str]:
    """Return a file of a repository, and those read beside it; CheckpointError where it has none of that name."""
    if inner in files:
        return _with_sides(inner, files)
    others = sorted(file for file in files if file.endswith(ENDINGS))
    shown = ", ".join(others[:6]) + (", …" if len(others) > 6 else "")
    raise CheckpointError(f"{repository}: the repository holds no {inner}; needed one of its files: {shown or 'none'}")
