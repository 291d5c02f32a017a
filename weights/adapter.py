"""Adapter files (LoRA, LoHa, LoKr, DoRA, differences) of any trainer, read into the same form.

`read_adapter` returns {part: {official layer: Delta}}. Keys are read by `dialects`, the tensors of a layer become a
Delta by `adapter_layer`, and a matrix for q, k and v is cut into three. Alpha is taken from the first of these that is
there: the layer's own `.alpha`; the header (`lora_adapter_metadata`, diffusers) or `adapter_config.json` (PEFT); else
the factor is 1. Layers that belong to no part are counted and kept by name; whether that is an error is for the caller.

All values are checked: a NaN is an error here instead of a black picture. `convert_adapter` writes adapters.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from s3dit.errors import CheckpointError
from s3dit.weights import dialects, few_steps
from s3dit.weights.adapter_layer import check_complete, has_no_rank, kinds_of, layer_delta
from s3dit.weights.adapter_settings import SHOWN_CHARACTERS, SHOWN_KEYS, Settings, read_settings
from s3dit.weights.checkpoint import Checkpoint, open_stored
from s3dit.weights.delta import Delta
from s3dit.weights.few_steps import FewSteps
from s3dit.weights.json_files import parse_json, read_json

ADAPTER_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
METADATA = "lora_adapter_metadata"
CONFIG = "adapter_config.json"
# An alpha that kohya's trainers write into the header for people; it is the tensor `.alpha` that acts.
KOHYA_ALPHA = "ss_network_alpha"

REMEDY = "needed LoRA, LoHa, LoKr or differences; merge it into the model with the program that trained it"
Deltas = dict[str, Delta]


@dataclass(slots=True)
class Adapter:
    """The content of an adapter file: deltas by part and official layer, and what is not used.

    unmatched: stored layers (and keys) of no part · misshapen: layers whose tensors do not fit together, and why ·
    redundant: stored layers that official names in the same file repeat · notes: settings without effect, in words ·
    few_steps: what it was distilled for, if it was.
    """

    path: Path
    deltas: dict[str, Deltas] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    redundant: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    few_steps: FewSteps | None = None

    def digest(self) -> str:
        """Return the sha256 of the file, in hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_adapter(path: str | Path) -> Adapter:
    """Read a .safetensors file, or the folder of PEFT that holds one; no model is needed.

    Raises CheckpointError: not readable, no adapter, an adapter of another model, NaN, rank 0, two tensors for one
    place, half a pair.
    """
    checkpoint = open_stored(path)
    if checkpoint.path.is_dir():
        raise CheckpointError(f"{path}: an adapter in shards; needed one .safetensors file; join the shards first")
    adapter = Adapter(checkpoint.path)
    stored = _layers(checkpoint, adapter.unmatched)
    places = {layer: place for layer in stored if (place := dialects.place(layer)) is not None}
    if not places or dialects.unsupported_kind(adapter.unmatched):
        raise CheckpointError(_foreign_error(checkpoint, bool(stored)))
    adapter.unmatched += [layer for layer in stored if layer not in places]
    settings = _settings(checkpoint)
    official = {layer_name for place in places.values() if place.is_official for layer_name in place.layers}
    for layer, place in places.items():
        if not place.is_official and official.issuperset(place.layers):
            adapter.redundant.append(layer)
            continue
        tensors = _load(checkpoint, layer, stored[layer])
        try:
            delta = layer_delta(tensors, settings.get(place.part), place.layers[0])
            pieces = [delta.row_part(i, len(place.layers)) for i in range(len(place.layers))]
        except ValueError as error:
            adapter.misshapen.append(f"{layer}: {error}")
            continue
        part_deltas = adapter.deltas.setdefault(place.part, {})
        if taken := [layer_name for layer_name in place.layers if layer_name in part_deltas]:
            raise CheckpointError(
                f"{path}: {layer} changes {taken[0]}, which another tensor of the file changes already; needed one "
                "change a layer; train or convert it again"
            )
        part_deltas |= dict(zip(place.layers, pieces, strict=True))
    adapter.notes = _notes(checkpoint, stored, settings, adapter.unmatched)
    adapter.few_steps = _few_steps(checkpoint, adapter.notes)
    read = [delta for deltas in adapter.deltas.values() for delta in deltas.values()]
    if idle := sum(delta.idle for delta in read):
        adapter.notes.append(f"{idle} of {len(read)} layers change nothing (an alpha of 0, or factors of zeros)")
    return adapter


def _layers(checkpoint: Checkpoint, unmatched: list[str]) -> dict[str, dict[str, str]]:
    """Group keys as stored layer -> role -> key; keys that are not an adapter's are appended to `unmatched`."""
    stored: dict[str, dict[str, str]] = {}
    for key in checkpoint:
        parsed = dialects.split_key(key)
        if parsed is None:
            unmatched.append(key)
            continue
        layer, role = parsed
        roles = stored.setdefault(layer, {})
        if role in roles:
            raise CheckpointError(
                f"{checkpoint.path}: {key} and {roles[role]} are for one place; needed one adapter in a file"
            )
        roles[role] = key
    return stored


def _foreign_error(checkpoint: Checkpoint, adapter: bool) -> str:
    """Return the error message for a file without a single layer of Z-Image."""
    names = list(checkpoint)
    if not names:
        return f"{checkpoint.path}: holds no tensors; needed an adapter (LoRA); download it again"
    shown = f"{len(names)} tensors such as {names[0][:120]}"
    if (kind := dialects.unsupported_kind(names)) is not None:
        return f"{checkpoint.path}: {kind}, which is not supported ({shown}); {REMEDY}"
    if not adapter:
        return f"{checkpoint.path}: is no adapter: {shown}; needed keys such as …lora_A.weight; a model goes to --model"
    family = dialects.family(names)
    if family is not None:
        return f"{checkpoint.path}: is an adapter of {family} ({shown}); needed one that was trained on Z-Image"
    return f"{checkpoint.path}: changes no layer of Z-Image ({shown}); needed one that was trained on Z-Image"


def _load(checkpoint: Checkpoint, layer: str, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Load the tensors of a stored layer by role, 1 × 1 convolutions as matrices; CheckpointError for bad values."""
    tensors = {}
    for role, key in keys.items():
        # Of its own memory: trainers write their file anew, in place, under a running engine.
        tensor = checkpoint.load(key).clone()
        if not tensor.numel():
            raise CheckpointError(
                f"{checkpoint.path}: {key} is {list(tensor.shape)}, of rank 0; needed a trained adapter; download it "
                "again"
            )
        if role not in ("alpha", "shape") and tensor.dtype not in (*ADAPTER_FLOATS, *FP8_DTYPES):
            raise CheckpointError(
                f"{checkpoint.path}: {key} is {tensor.dtype}; needed float32, bfloat16, float16 or an 8-bit float; "
                "save it in one of them"
            )
        # 8-bit floats have no arithmetic, and are numbers of bf16 all of them.
        tensor = tensor.bfloat16() if tensor.dtype in FP8_DTYPES else tensor
        if not tensor.isfinite().all() and not (role == "alpha" and has_no_rank(keys)):
            raise CheckpointError(f"{checkpoint.path}: {key} holds NaN or infinity; needed finite ones; take another")
        # Trainers that know convolutions keep linear layers as such, of size 1 × 1.
        tensors[role] = tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor
    check_complete(checkpoint, layer, tensors)
    return tensors


def _notes(
    checkpoint: Checkpoint,
    stored: Mapping[str, Mapping[str, str]],
    settings: Mapping[str, Settings],
    unmatched: Sequence[str],
) -> list[str]:
    """Return what the header, or PEFT's file beside it, states without effect."""
    notes = [note for part_settings in settings.values() for note in part_settings.notes]
    whole = {module: None for part_settings in settings.values() for module in part_settings.whole}
    if absent := [module for module in whole if not any(f".{module}." in f".{key}" for key in unmatched)]:
        shown = ", ".join(module[:SHOWN_CHARACTERS] for module in absent[:SHOWN_KEYS])
        notes.append(f"modules_to_save names {shown}, of which the file holds nothing")
    ranks = {
        checkpoint.entry(roles["down"]).shape[:1]
        for roles in stored.values()
        if "down" in roles and "alpha" not in roles
    }
    stated = checkpoint.metadata.get(KOHYA_ALPHA)
    if stated is not None and not settings and not {(_parse_float(stated),)} >= ranks:
        notes.append(
            f"{KOHYA_ALPHA} is {stated[:SHOWN_CHARACTERS]} in the header, but layers without an alpha of their own "
            "have strength 1, as in ComfyUI and diffusers"
        )
    return list(dict.fromkeys(notes))


def _few_steps(checkpoint: Checkpoint, notes: list[str]) -> FewSteps | None:
    """Return what an adapter was distilled for, if it was; adds a note on a header that does not say it rightly."""
    try:
        return few_steps.few_steps(checkpoint.metadata, checkpoint.path.stem)
    except (ValueError, RecursionError) as error:
        notes.append(f"{few_steps.METADATA} in the header is not usable: {error}")
        return None


def _parse_float(text: str) -> float | None:
    """Return the number of a text, None where it is not a number."""
    try:
        return float(text)
    except ValueError:
        return None


def _settings(checkpoint: Checkpoint) -> dict[str, Settings]:
    """Read PEFT's settings of each part from the header, or from the file beside it; raises CheckpointError."""
    config = checkpoint.path.with_name(CONFIG)
    text, source = checkpoint.metadata.get(METADATA), f"{checkpoint.path}: {METADATA}"
    beside = text is None and checkpoint.path.name.startswith("adapter_model.") and config.is_file()
    try:
        if beside:
            source = str(config)
        values = read_json(config) if beside else {} if text is None else parse_json(text)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        parts = ("transformer", "text_encoder")
        by_part = {
            part: {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")}
            for part in parts
        }
        # PEFT's own file, and the header that a model of diffusers writes by itself, have no part in front.
        bare = {key: value for key, value in values.items() if not key.startswith(tuple(f"{part}." for part in parts))}
        if bare.keys() & {"r", "lora_alpha", "alpha", "peft_type"}:
            by_part = {part: own or bare for part, own in by_part.items()}
        return {part: read_settings(own) for part, own in by_part.items() if own}
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not usable ({error}); needed PEFT's settings; take the file anew") from None


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A description of an adapter file, from its header and small tensors.

    kinds: such as "lora" or "dora" · ranks, alphas: all that occur · producer: the program that wrote it, "" if unknown
    · layers: their number · notes: settings without effect · unmatched: stored layers and keys of no part · shapes:
    (out, in) of official layers, by part, where the file has them · few_steps: what it was distilled for, if it was.
    """

    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    producer: str
    layers: int
    parts: tuple[str, ...]
    notes: tuple[str, ...]
    unmatched: tuple[str, ...]
    shapes: dict[str, dict[str, tuple[int, ...]]]
    few_steps: FewSteps | None = None


# Who writes a key of the header; the first that is there.
PRODUCERS = (
    ("s3dit", "s3dit"), (METADATA, "diffusers"), ("training_info", "ai-toolkit"),
    ("ss_network_module", "kohya, or a trainer in its form"),
)  # fmt: skip


def describe(checkpoint: Checkpoint) -> AdapterInfo | None:
    """Return kinds, ranks, alphas, producer and layers of an adapter, None where the file is not an adapter.

    Only headers and tensors of at most 8 bytes are read. Raises CheckpointError: settings that are not usable, two
    tensors for the same place.
    """
    unmatched: list[str] = []
    stored = _layers(checkpoint, unmatched)
    places = {layer: place for layer in stored if (place := dialects.place(layer)) is not None}
    if not places:
        return None
    kinds, ranks, alphas = set[str](), set[int](), set[float]()
    settings = _settings(checkpoint)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for layer, place in places.items():
        roles = stored[layer]
        if shape := _weight_shape(checkpoint, roles):
            rows = shape[0] // len(place.layers)
            shapes.setdefault(place.part, {}).update(dict.fromkeys(place.layers, (rows, *shape[1:])))
        kinds.update("dora" if kind == "lora" and "magnitude" in roles else kind for kind in kinds_of(roles))
        for role in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
            if role in roles and len(shape := checkpoint.entry(roles[role]).shape) > 1:
                ranks.add(shape[0])
        if "alpha" in roles and checkpoint.entry(roles["alpha"]).nbytes <= 8:
            if not has_no_rank(roles):
                alphas.update(checkpoint.load(roles["alpha"]).double().flatten().tolist())
        elif (written := settings.get(place.part)) is not None:
            alphas.add(written.alpha_of(place.layers[0]))
    parts = tuple(sorted({place.part for place in places.values()}))
    notes = _notes(checkpoint, stored, settings, unmatched)
    few = _few_steps(checkpoint, notes)
    return AdapterInfo(
        kinds=tuple(sorted(kinds)),
        ranks=tuple(sorted(ranks)),
        alphas=tuple(sorted(alphas)),
        producer=_producer(checkpoint),
        layers=len(places),
        parts=parts,
        notes=tuple(notes),
        unmatched=(*unmatched, *(layer for layer in stored if layer not in places)),
        shapes=shapes,
        few_steps=few,
    )


def _weight_shape(checkpoint: Checkpoint, roles: Mapping[str, str]) -> tuple[int, ...]:
    """Return the shape of the weight that a stored layer changes, from headers; () where they do not hold it."""
    shapes = {role: checkpoint.entry(key).shape for role, key in roles.items()}
    up, down = shapes.get("up", ()), shapes.get("down", ())
    if len(up) >= 2 and len(down) >= 2:
        return up[0], down[1]
    return next((shapes[role] for role in ("diff", "set") if len(shapes.get(role, ())) >= 2), ())


def _producer(checkpoint: Checkpoint) -> str:
    """Return the program that wrote an adapter, by its header; empty where it is unknown."""
    software = checkpoint.metadata.get("software", "")
    if "ai-toolkit" in software:
        return "ai-toolkit"
    return next((name for key, name in PRODUCERS if key in checkpoint.metadata), "") or (
        "PEFT" if any(key.startswith("base_model.model.") for key in checkpoint) else ""
    )
