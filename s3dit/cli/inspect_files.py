"""Describe the small files of a model: settings in JSON, indexes of shards, tokenizers; their kind, writer and use.

They are detected by their keys, except where the engine itself reads a file by its name (merges.txt, tokenizer.model).
None is used alone: each belongs to a folder, which the command names.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s3dit.cli.inspect_report import HOME, PROMPT, Facts, draw, size
from s3dit.cli.record import PLACE
from s3dit.configs import tokenizer_config
from s3dit.configs.model_files import KINDS, OWN, read_json, read_own
from s3dit.errors import CheckpointError
from s3dit.model.config import SchedulerConfig
from s3dit.runtime.sources import WEIGHTS
from s3dit.weights.checkpoint import INDEX
from s3dit.weights.hub_files import BESIDE, TOKENIZERS
from s3dit.weights.split_checkpoint import PARTS, part_of

MODEL_INDEX, ADAPTER = "model_index.json", "adapter_config.json"
# Of a folder without weights, the first file that says what it is.
TELLING = (MODEL_INDEX, ADAPTER, "config.json", "scheduler_config.json", "preprocessor_config.json", OWN)
# The number with which Qwen3's tokenizer begins a turn, <|im_start|>.
TURN = 151644
CLASSES = {
    "ZImageTransformer2DModel": "transformer", "ZImageTransformer2DModelWrapper": "transformer",
    "AutoencoderKL": "vae", "qwen3": "text_encoder",
}  # fmt: skip
# What of a part's settings says how large it is.
SIZES = (
    "n_layers", "dim", "n_heads", "siglip_feat_dim", "num_hidden_layers", "hidden_size", "vocab_size",
    "latent_channels", "block_out_channels", "scaling_factor", "shift_factor",
)  # fmt: skip
# Of a folder that `s3dit export` wrote: its graphs, and what is beside them.
GRAPHS, EXPORT = (".pt2", ".onnx"), ("settings.json", "runner.py")
SHIFTS = ("shift", "use_dynamic_shifting", "base_shift", "max_shift")


def described(path: Path) -> tuple[Facts, Path | None] | None:
    """A small file, or a folder of such, and the folder that uses it, where it has no command of its own.

    None for anything else. Raises CheckpointError for JSON that is broken, or of no kind that is read here.
    """
    if (path.is_dir() or path.suffix in GRAPHS or path.name == EXPORT[0]) and (graphs := _graphs(path)) is not None:
        return graphs, None
    if path.is_dir():
        names = {file.name for file in path.iterdir() if file.suffix in WEIGHTS or file.is_file()}
        if any(Path(name).suffix in WEIGHTS for name in names) or any((path / part).is_dir() for part in PARTS):
            return None
        if any(row[0] in names for row in TOKENIZERS):
            return _tokenizer(path, path), None
        telling = next((name for name in TELLING if name in names), None)
        telling = telling or next((name for name in sorted(names) if name.endswith(INDEX)), None)
        return None if telling is None else described(path / telling)
    if path.name in ("merges.txt", "tokenizer.model"):
        return _tokenizer(path, path.parent), None
    with path.open("rb") as file:
        if not file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return None
    return _json(path, read_json(path))


def maker(settings: Mapping[str, Any]) -> str:
    """The library that wrote settings, as they say; empty where they do not."""
    for key, library in (
        ("_diffusers_version", "diffusers"), ("transformers_version", "transformers"), ("peft_version", "PEFT"),
    ):  # fmt: skip
        if isinstance(settings.get(key), str):
            return f"{library} {settings[key][:40]}"
    return "PEFT" if "peft_type" in settings else ""


def _json(path: Path, settings: Mapping[str, Any]) -> tuple[Facts, Path | None]:
    """What a JSON file is, by its keys, and the folder that uses it."""
    home = path.parent
    if isinstance(settings.get("weight_map"), dict):
        return _index(path, settings), home
    if "peft_type" in settings:
        keys = {"kind": "peft_type", "rank": "r", "alpha": "lora_alpha", "trained on": "base_model_name_or_path"}
        facts = {"producer": maker(settings)} | {name: settings.get(key) for name, key in keys.items()}
        return Facts(str(path), "the settings of an adapter", facts, ""), home
    whole = isinstance(settings.get("model"), dict) and "added_tokens" in settings
    vocabulary = bool(settings) and all(type(number) is int for number in settings.values())
    if whole or vocabulary or "tokenizer_class" in settings:
        return _tokenizer(path, home), None
    if (described := _component(path, settings)) is not None:
        return described
    if path.name == OWN:
        return Facts(str(path), "what a model folder says to s3dit", read_own(home), ""), home
    name = settings.get("_class_name", settings.get("model_type"))
    raise CheckpointError(
        f"{path}: JSON of {name if isinstance(name, str) else 'a kind'} that is not read here (it has "
        f"{', '.join(map(repr, list(settings)[:5])) or 'no keys'}); needed settings, an index or a tokenizer of Z-Image"
    )


def _component(path: Path, settings: Mapping[str, Any]) -> tuple[Facts, Path] | None:
    """Settings of a model or of a part of one, by the class that they name; None for anything else."""
    home, name = path.parent, settings.get("_class_name", settings.get("model_type"))
    facts: dict[str, Any] = {"class": name, "producer": maker(settings)}
    parts = {
        key: f"{value[0]} {value[1]}"
        for key, value in settings.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
    }
    if parts and name is not None:
        return Facts(str(path), "the index of a whole model", facts | {"parts": parts}, ""), home
    if name == "ZImageControlNetModel":
        return Facts(str(path), "the settings of a ControlNet", facts, ""), home
    if isinstance(name, str) and (part := CLASSES.get(name)):
        facts |= {key: settings[key] for key in SIZES if key in settings}
        return Facts(str(path), f"the settings of a {part}", facts, "", _doubts(KINDS[part], settings, path)), home
    if name == "FlowMatchEulerDiscreteScheduler":
        facts |= {key: settings[key] for key in SHIFTS if key in settings}
        notes = _doubts(SchedulerConfig, settings, path)
        return Facts(str(path), "the settings of a schedule", facts, "", notes), home.parent
    for key in ("image_processor_type", "feature_extractor_type"):
        if key in settings:
            facts["class"] = settings[key]
            return Facts(str(path), "how pictures are prepared for a vision encoder", facts, ""), home.parent
    return None


def _doubts(kind: Any, settings: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """What keeps settings from being used, or has no effect."""
    try:
        kind.from_json(settings, path)
    except CheckpointError as error:
        return (f"not usable: {error}",)
    return tuple(kind.note_unknown(settings, path))


def _graphs(path: Path) -> Facts | None:
    """A folder that `s3dit export` wrote, or a file of one; None for anything else."""
    folder = path if path.is_dir() else path.parent
    if not all((folder / name).is_file() for name in EXPORT):
        return None
    settings = read_json(folder / EXPORT[0])
    facts = {key: settings.get(key) for key in ("form", "placement", "s3dit", "torch")}
    if not all(isinstance(value, str) for value in facts.values()):
        return None
    facts["graphs"] = sorted(file.name for file in folder.iterdir() if file.suffix in GRAPHS)
    note = "a program, as graphs are too: take those of others only if you would run their code"
    command = f'python {shlex.quote(str(folder / EXPORT[1]))} "{PROMPT}"'
    return Facts(str(path), "graphs that `s3dit export` wrote", facts, command, (f"{EXPORT[1]} is {note}",))


def _index(path: Path, settings: Mapping[str, Any]) -> Facts:
    """An index of shards, and which of them are there."""
    names = settings["weight_map"]
    shards = sorted({str(name) for name in names.values()})
    lacking = [name for name in shards if Path(name).name != name or not (path.parent / name).is_file()]
    about = settings.get("metadata")
    total = about.get("total_size") if isinstance(about, dict) else None
    facts = {
        "part": part_of(names) or "of no part of Z-Image that is known", "tensors": len(names), "shards": len(shards),
        "size": size(int(total)) if isinstance(total, int | float) and 0 <= total < 1e15 else "",
        "not here": lacking[:8],
    }  # fmt: skip
    return Facts(str(path), "the index of a checkpoint in shards", facts, "")


def _tokenizer(path: Path, folder: Path) -> Facts:
    """A tokenizer by any of its files, tried on a prompt."""
    # Slow to import.
    from s3dit.model.tokenizer import Tokenizer

    form = next((row for row in TOKENIZERS if (folder / row[0]).is_file()), ())
    file = folder / tokenizer_config.FILE
    settings = read_json(file) if file.is_file() else {}
    facts = {"read from": " and ".join(form), "class": settings.get("tokenizer_class"), "producer": maker(settings)}
    model = HOME
    try:
        ids = Tokenizer(folder).encode(PROMPT)
        facts[f'tokens of "{PROMPT}"'] = len(ids)
        notes = tuple(tokenizer_config.check(folder))
    except CheckpointError as error:
        return Facts(str(path), "a tokenizer", facts, "", (f"not usable: {error}",))
    if ids[0] != TURN:
        model = f"{PLACE}MODEL"
        notes += ("its numbers are not those of Qwen3's tokenizer: it goes with the model that it came with",)
    if path.is_file() and path.name not in (*form, *BESIDE):
        notes += (f"{path.name} is not read: {' and '.join(form)} beside it goes first",)
    return Facts(str(path), "a tokenizer", facts, draw(["--model", model, "--tokenizer", str(folder)]), notes)
