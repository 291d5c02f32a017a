"""Opens the files of a model: a directory, one file of everything, or parts mixed from several places.

`open_sources` goes from what a user names to open checkpoints, configurations and a tokenizer; it reads headers only.
The model gives whatever it holds; `transformer`, `text_encoder` and `vae` put another file or folder in the place of
one part. A config is the JSON of the part's folder; else it is inferred from its tensors (`configs.infer_config`), and
what they do not tell is taken from the model or is the official constant, which a note says.

What is missing is named together with the option that gives it, before anything is loaded.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3dit.configs import infer_config, tokenizer_config
from s3dit.configs.model_files import read_index, read_json, read_own, read_vision
from s3dit.errors import CheckpointError
from s3dit.kernels.number_format import DFLOAT11
from s3dit.model.config import ModelConfig, SchedulerConfig, variant_of
from s3dit.model.part_specs import SPECS
from s3dit.runtime.embedded import EMBEDDED, EMBEDDED_BASE, FOLDERS
from s3dit.runtime.model_config import compose
from s3dit.weights import dfloat11
from s3dit.weights.checkpoint import Checkpoint, open_checkpoint
from s3dit.weights.gguf_file import GGUFFile
from s3dit.weights.hub import resolve
from s3dit.weights.hub_files import MODEL_FOLDERS as REPOSITORY_PARTS
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
DFLOAT11_NOTE = (
    "the {} is in DFloat11, a third smaller than bf16 and decoded to its very bits whenever it is computed with: on a "
    "CPU that takes longer than computing; where memory allows, `s3dit convert` writes it as bf16 once and for all"
)
VAE_NOTE = "the VAE's file does not say the scale of its latents: FLUX.1's 0.3611 and 0.1159 are used"


@dataclass(frozen=True, slots=True)
class Sources:
    """The opened files of a model: its configuration, its checkpoints by part, its tokenizer.

    path: what the model is called by · tokenizer: a folder, or a GGUF file that carries one · mixed: parts that were
    given in the place of the model's own · guessed: whether the shift of the schedule is (see SHIFT) · distilled:
    whether an adapter makes it one that is drawn without guidance.
    """

    path: Path
    config: ModelConfig
    checkpoints: Mapping[str, Checkpoint]
    tokenizer: Path | GGUFFile
    mixed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    guessed: bool = False
    distilled: bool = False


@dataclass(slots=True)
class OpenedModel:
    """The contents of a path: parts of a model, the JSON that lies beside them, and a tokenizer."""

    path: Path
    parts: dict[str, Checkpoint] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    scheduler: SchedulerConfig | None = None
    own: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | GGUFFile | None = None
    rest: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_sources(
    model: str | Path | None, given: Mapping[str, str | Path | None], tokenizer: str | Path | None
) -> Sources:
    """Open a model, or the parts that take the place of its own; raises CheckpointError.

    model: one of `embedded.FOLDERS`, a path or a Hub name; None is the embedded model where no part is given, else no
    model. given: the same by part, or None.
    """
    replaced = {part: str(path) for part, path in given.items() if path is not None}
    if model is None and not replaced:
        model = "embedded"
    base = None
    if model is not None:
        skip = [*replaced, *(["tokenizer"] if tokenizer is not None else [])]
        wanted = [part for part in REPOSITORY_PARTS if part not in skip]
        base = open_model(_resolve(str(model), wanted), skip)
    more = ["tokenizer"] if base is None and tokenizer is None else []
    origins = {part: _open_part(part, _resolve(path, [part, *more])) for part, path in replaced.items()}
    opened = [*([] if base is None else [base]), *origins.values()]
    origins = ({} if base is None else dict.fromkeys(base.parts, base)) | origins
    own_tokenizer = next((origin.tokenizer for origin in opened if origin.tokenizer), None)
    if tokenizer is not None:
        own_tokenizer = _tokenizer_folder(_resolve(str(tokenizer), ["tokenizer"]))
    own_tokenizer = _complete(opened[0].path, origins, own_tokenizer)
    notes = _notes(opened, own_tokenizer)
    checkpoints = {part: origins[part].parts[part] for part in PARTS}
    configs = _configs(base, origins, checkpoints, notes)
    if base is not None and VISION_TOWER in configs:
        checkpoints[VISION_TOWER] = open_checkpoint(base.path / VISION_TOWER)
    notes += _assumed(base, origins["vae"], configs["transformer"])
    scheduler, own = (None, {}) if base is None else (base.scheduler, base.own)
    return Sources(
        path=opened[0].path,
        config=compose(configs, scheduler or SchedulerConfig(SHIFT), own, opened[0].path),
        checkpoints=checkpoints,
        tokenizer=own_tokenizer,
        mixed=tuple(replaced),
        notes=tuple(notes),
        guessed=scheduler is None,
    )


def _resolve(name: str, parts: Collection[str]) -> Path:
    """The path of a model by its name: an embedded one's, or as `hub.resolve` finds it."""
    return FOLDERS[name] if name in FOLDERS else resolve(name, parts)


def _notes(opened: Iterable[OpenedModel], tokenizer: Path | GGUFFile) -> list[str]:
    """Notes on the files that were opened, each once, and on the tokenizer's settings; raises CheckpointError."""
    notes = list(dict.fromkeys(note for origin in opened for note in origin.notes))
    return notes + (tokenizer_config.check(tokenizer) if isinstance(tokenizer, Path) else [])


def _configs(
    base: OpenedModel | None, origins: Mapping[str, OpenedModel], checkpoints: Mapping[str, Checkpoint],
    notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The configuration of every part: of its JSON, else inferred from its tensors and the model that it is put into.

    base: that model, whose vision tower is used if the transformer reads one · origins: where each part is from. Adds
    notes; raises CheckpointError.
    """
    known = base.configs if base is not None else {}
    configs = {
        part: origins[part].configs.get(part) or SPECS[part].infer(checkpoints[part], known.get(part), notes)
        for part in PARTS
    }
    stored = {part: {kind.name for kind in checkpoints[part].formats.values()} for part in PARTS}
    notes += [DFLOAT11_NOTE.format(part) for part in PARTS if DFLOAT11 in stored[part]]
    if base is not None and configs["transformer"].siglip_feat_dim is not None:
        configs |= read_vision(base.path, notes)
    return configs


def _assumed(base: OpenedModel | None, vae: OpenedModel, transformer: Any) -> list[str]:
    """Notes on what the files do not say and is assumed: the scale of latents, the variant.

    vae: where the VAE is from · transformer: its configuration.
    """
    notes = []
    if not any("vae" in origin.configs for origin in (vae, base) if origin is not None):
        notes.append(VAE_NOTE)
    if base is not None and base.scheduler is not None and "variant" not in base.own:
        notes += [VARIANT_NOTE] if variant_of(transformer, base.scheduler) is None else []
    return notes


def open_model(path: Path, skip: Collection[str] = ()) -> OpenedModel:
    """Open a path: a model directory with a folder for each part, or one checkpoint; raises CheckpointError.

    skip: parts that are not opened; their config is still what is known of the model.
    """
    if not path.is_dir() or not any((path / part).is_dir() for part in PARTS):
        return _one_checkpoint(path)
    opened = OpenedModel(path, notes=read_index(path, skip))
    for part in PARTS:
        folder = path / part
        if part in skip:
            opened.configs |= _beside(part, folder, [])
            continue
        if not folder.is_dir():
            continue
        inside = _open_part(part, folder)
        opened.parts[part], opened.rest = inside.parts[part], opened.rest + inside.rest
        opened.configs |= inside.configs
        opened.notes += inside.notes
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.parent.is_dir():
        opened.scheduler = SchedulerConfig.from_json(data := read_json(scheduler), scheduler)
        opened.notes += SchedulerConfig.note_unknown(data, scheduler)
    if (path / "tokenizer").is_dir():
        opened.tokenizer = path / "tokenizer"
    opened.own = read_own(path)
    if path == EMBEDDED_BASE:
        shared = open_model(EMBEDDED, [*skip, "transformer"])
        opened.parts |= shared.parts
        opened.configs = shared.configs | opened.configs
        opened.tokenizer = shared.tokenizer
    return opened


def _one_checkpoint(path: Path) -> OpenedModel:
    """Open a file, or a folder that holds one checkpoint and perhaps its config.json; raises CheckpointError."""
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
    opened = OpenedModel(path, inside.parts, rest=inside.rest)
    if path.is_dir() and len(opened.parts) == 1:
        part = next(iter(opened.parts))
        opened.configs = _beside(part, path, opened.notes)
        if part in opened.configs:
            infer_config.check_layers(part, opened.parts[part], opened.configs[part])
            opened.configs[part] = infer_config.told_by_tensors(opened.configs[part], opened.parts[part])
    if VOCABULARY in checkpoint.metadata:
        opened.tokenizer = GGUFFile(checkpoint.path)
    return opened


def _beside(part: str, folder: Path, notes: list[str]) -> dict[str, Any]:
    """Read the config of a part, if its folder has one; adds a note on its unknown keys."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    data = read_json(path)
    # DFloat11 writes its own settings over a config.json that it cannot add them to.
    if set(data) == {dfloat11.CONFIG}:
        return {}
    notes += SPECS[part].config.note_unknown(data, path)
    return {part: SPECS[part].config.from_json(data, path)}


def _open_part(part: str, path: Path) -> OpenedModel:
    """Open a path that must give a part, perhaps out of another model's directory; raises CheckpointError.

    Of such a directory nothing else is read but its tokenizer, so it may be of any kind (FLUX.1's, for its VAE).
    """
    folder = path / part if (path / part).is_dir() else path
    has = next((other for other in PARTS if folder == path and (path / other).is_dir()), None)
    opened = OpenedModel(path) if has else _one_checkpoint(folder)
    if part not in opened.parts:
        has = has or next(iter(opened.parts), None)
        remedy = f"give it with {OPTIONS[has]}" if has else "give another path"
        raise CheckpointError(f"{path}: holds {has or 'no part of a model'}, where {part} was needed; {remedy}")
    opened.path = path
    if opened.tokenizer is None and (path / "tokenizer").is_dir():
        opened.tokenizer = path / "tokenizer"
    return opened


def _tokenizer_folder(path: Path) -> Path:
    """The folder of a tokenizer, which may be given by the model it belongs to."""
    return path / "tokenizer" if (path / "tokenizer").is_dir() else path


def missing(parts: Iterable[str], tokenizer: bool) -> list[str]:
    """Return what is lacking for drawing a picture: names of parts, and "tokenizer"."""
    parts = set(parts)
    return [part for part in PARTS if part not in parts] + ([] if tokenizer else ["tokenizer"])


def _complete(path: Path, parts: Iterable[str], tokenizer: Path | GGUFFile | None) -> Path | GGUFFile:
    """The tokenizer of a model that lacks nothing; else raises CheckpointError, with the options that give the rest."""
    parts = list(parts)
    if (lacking := missing(parts, tokenizer is not None)) or tokenizer is None:
        options = " ".join(OPTIONS[part] for part in lacking)
        raise CheckpointError(
            f"{path}: not a whole model, it holds {', '.join(parts)}, not {', '.join(lacking)}; add {options}, "
            "or give a model directory as --model and this for a part of it"
        )
    return tokenizer
