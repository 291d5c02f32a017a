"""Where each part of a model comes from: a directory, one file of everything, or parts mixed from anywhere.

`open_sources` goes from what a user names to open checkpoints, configurations and a tokenizer; it reads headers only.
The model gives whatever it holds; `transformer`, `text_encoder` and `vae` put another file or folder in the place of
one part. A config is the JSON of the part's folder; else it is read from the shapes (`shapes`), and what they cannot
say is the model's own or the official constant, which a note tells.

What is missing is named together with the option that gives it, before anything is loaded.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3dit.errors import CheckpointError
from s3dit.model import infer_config, tokenizer_config
from s3dit.model.config import (
    ModelConfig,
    SchedulerConfig,
    compose,
    read_index,
    read_json,
    read_own,
    read_vision,
    variant_of,
)
from s3dit.model.part_specs import SPECS
from s3dit.weights.checkpoint import Checkpoint, open_checkpoint
from s3dit.weights.gguf_file import GGUFFile
from s3dit.weights.hub import MODEL_FOLDERS as REPOSITORY_PARTS
from s3dit.weights.hub import resolve
from s3dit.weights.split_checkpoint import PARTS, split

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
# What a GGUF file says that carries a tokenizer.
VOCABULARY = "tokenizer.ggml.model"
OPTIONS = {part: f"{spec.option} FILE" for part, spec in SPECS.items()} | {"tokenizer": "--tokenizer DIR"}
# The folder of an Omni model's vision tower.
VISION_TOWER = "siglip"
# What a file of weights cannot say, and what is taken for it.
SHIFT = 3.0
SHIFT_NOTE = (
    "no scheduler_config.json says the shift of the schedule: drawing like Turbo, with 3; for Z-Image itself use "
    "--shift 6 --steps 28 --guidance 4"
)
VARIANT_NOTE = (
    "the files do not say whether this is Turbo or Z-Image itself (their shifts are 3 and 6): what is not given is "
    'Turbo\'s, 8 steps without guidance; for Z-Image use --steps 28 --guidance 4, or write {"variant": "base"} into '
    "s3dit.json in its folder"
)
VAE_NOTE = "the VAE's file does not say the scale of its latents: FLUX.1's 0.3611 and 0.1159 are used"


@dataclass(frozen=True, slots=True)
class Sources:
    """One model: `path` is what it is called by, the tokenizer a folder or in a GGUF file, `mixed` parts put in.

    guessed: whether the shift of the schedule is (see SHIFT).
    """

    path: Path
    config: ModelConfig
    checkpoints: Mapping[str, Checkpoint]
    tokenizer: Path | GGUFFile
    mixed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    guessed: bool = False


@dataclass(slots=True)
class OpenedModel:
    """What one path gives: parts of a model, the JSON that lies beside them, and a tokenizer."""

    path: Path
    parts: dict[str, Checkpoint] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    scheduler: SchedulerConfig | None = None
    own: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | GGUFFile | None = None
    rest: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_sources(
    model: str | Path | None, given: Mapping[str, str | Path | None], tokenizer: str | Path | None, embedded: Path
) -> Sources:
    """Open a model, or the parts that take the place of its own; raises CheckpointError.

    model: "embedded" (the folder `embedded`), a path or a Hub name; None is the embedded model where no part is given,
    else no model. given: the same by part, or None.
    """

    def place(name: str, parts: Collection[str]) -> Path:
        return embedded if name == "embedded" else resolve(name, parts)

    wanted = {part: str(path) for part, path in given.items() if path is not None}
    if model is None and not wanted:
        model = "embedded"
    base = None
    if model is not None:
        skip = [*wanted, *(["tokenizer"] if tokenizer is not None else [])]
        read = [part for part in REPOSITORY_PARTS if part not in skip]
        base = open_model(place(str(model), read), skip)
    more = ["tokenizer"] if base is None and tokenizer is None else []
    homes = {part: _one(part, place(path, [part, *more])) for part, path in wanted.items()}
    places = [found for found in (base, *homes.values()) if found is not None]
    if base is not None:
        homes = dict.fromkeys(base.parts, base) | homes
    given_words: list[Path | GGUFFile] = [] if tokenizer is None else [_words(place(str(tokenizer), ["tokenizer"]))]
    words = given_words or [found.tokenizer for found in places if found.tokenizer]
    _check_complete(places[0].path, homes, bool(words))
    known = base.configs if base is not None else {}
    said_of_words = tokenizer_config.check(words[0]) if isinstance(words[0], Path) else []
    notes = list(dict.fromkeys(note for found in places for note in found.notes)) + said_of_words
    checkpoints = {part: homes[part].parts[part] for part in PARTS}
    configs = {
        part: homes[part].configs.get(part) or SPECS[part].infer(checkpoints[part], known.get(part), notes)
        for part in PARTS
    }
    sees = base is not None and configs["transformer"].siglip_feat_dim is not None
    if base is not None and sees and (eyes := read_vision(base.path, notes)):
        configs |= eyes
        checkpoints[VISION_TOWER] = open_checkpoint(base.path / VISION_TOWER)
    scheduler = base.scheduler if base is not None else None
    said = any("vae" in found.configs for found in (homes["vae"], base) if found is not None)
    own = base.own if base is not None else {}
    notes += [] if said else [VAE_NOTE]
    unsaid = scheduler is not None and "variant" not in own and variant_of(configs["transformer"], scheduler) is None
    notes += [VARIANT_NOTE] if unsaid else []
    return Sources(
        path=places[0].path,
        config=compose(configs, scheduler or SchedulerConfig(SHIFT), own, places[0].path),
        checkpoints=checkpoints,
        tokenizer=words[0],
        mixed=tuple(wanted),
        notes=tuple(notes),
        guessed=scheduler is None,
    )


def open_model(path: Path, skip: Collection[str] = ()) -> OpenedModel:
    """What a path holds: a model directory with a folder for each part, or one checkpoint; raises CheckpointError.

    skip: parts that are not opened; their config is still what is known of the model.
    """
    if not path.is_dir() or not any((path / part).is_dir() for part in PARTS):
        return _one_checkpoint(path)
    found = OpenedModel(path, notes=read_index(path, skip))
    for part in PARTS:
        folder = path / part
        if part in skip:
            found.configs |= _beside(part, folder, [])
            continue
        if not folder.is_dir():
            continue
        inside = _one(part, folder)
        found.parts[part], found.rest = inside.parts[part], found.rest + inside.rest
        found.configs |= inside.configs
        found.notes += inside.notes
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.parent.is_dir():
        found.scheduler = SchedulerConfig.from_json(data := read_json(scheduler), scheduler)
        found.notes += SchedulerConfig.strange(data, scheduler)
    if (path / "tokenizer").is_dir():
        found.tokenizer = path / "tokenizer"
    found.own = read_own(path)
    return found


def _one_checkpoint(path: Path) -> OpenedModel:
    """A file, or a folder that holds one checkpoint and perhaps its config.json."""
    if path.is_dir() and not any(file.suffix in WEIGHTS for file in path.iterdir()):
        raise CheckpointError(
            f"{path}: not a Z-Image model directory, it lacks transformer/, text_encoder/, vae/ and holds no weights; "
            "needed the layout of Tongyi-MAI/Z-Image-Turbo"
        )
    checkpoint = open_checkpoint(path)
    if checkpoint.metadata.get("split.count", "0") not in ("0", "1"):
        raise CheckpointError(
            f"{path}: one file of {checkpoint.metadata['split.count'][:20]} that a GGUF was split into; needed it "
            "whole; join them with `llama-gguf-split --merge`"
        )
    inside = split(checkpoint)
    found = OpenedModel(path, inside.parts, rest=inside.rest)
    if path.is_dir() and len(found.parts) == 1:
        part = next(iter(found.parts))
        found.configs = _beside(part, path, found.notes)
        if part in found.configs:
            infer_config.check_layers(part, found.parts[part], found.configs[part])
    if VOCABULARY in checkpoint.metadata:
        found.tokenizer = GGUFFile(checkpoint.path)
    return found


def _beside(part: str, folder: Path, notes: list[str]) -> dict[str, Any]:
    """The config of a part whose folder has one; adds to the notes what it says that nobody knows."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    data = read_json(path)
    notes += SPECS[part].config.strange(data, path)
    return {part: SPECS[part].config.from_json(data, path)}


def _one(part: str, path: Path) -> OpenedModel:
    """A path that must give a part, perhaps out of another model's directory; raises CheckpointError.

    Of such a directory nothing else is read but its tokenizer, so it may be of any kind (FLUX.1's, for its VAE).
    """
    folder = path / part if (path / part).is_dir() else path
    has = next((other for other in PARTS if folder == path and (path / other).is_dir()), None)
    found = OpenedModel(path) if has else _one_checkpoint(folder)
    if part not in found.parts:
        has = has or next(iter(found.parts), None)
        remedy = f"give it with {OPTIONS[has]}" if has else "give another path"
        raise CheckpointError(f"{path}: holds {has or 'no part of a model'}, where {part} was needed; {remedy}")
    found.path = path
    if found.tokenizer is None and (path / "tokenizer").is_dir():
        found.tokenizer = path / "tokenizer"
    return found


def _words(path: Path) -> Path:
    """The folder of a tokenizer, which may be given by the model it belongs to."""
    return path / "tokenizer" if (path / "tokenizer").is_dir() else path


def missing(parts: Iterable[str], tokenizer: bool) -> list[str]:
    """What is wanting to draw a picture."""
    parts = set(parts)
    return [part for part in PARTS if part not in parts] + ([] if tokenizer else ["tokenizer"])


def _check_complete(path: Path, parts: Iterable[str], tokenizer: bool) -> None:
    """Raise the CheckpointError of a model that lacks something, with the options that give it."""
    parts = list(parts)
    if lacking := missing(parts, tokenizer):
        options = " ".join(OPTIONS[part] for part in lacking)
        raise CheckpointError(
            f"{path}: not a whole model, it holds {', '.join(parts)}, not {', '.join(lacking)}; add {options}, "
            "or give a model directory as --model and this for a part of it"
        )
