"""What an adapter file is, from its header and small tensors: kinds, ranks, alphas, producer, layers, settings.

`describe` is what `s3dit inspect` prints; the functions below it are those by which `adapter` reads a file. Importing
this module does not import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s3dit.errors import CheckpointError
from s3dit.weights import dialects, few_steps
from s3dit.weights.adapter_settings import SHOWN_CHARACTERS, SHOWN_KEYS, Settings, read_settings
from s3dit.weights.container import Checkpoint
from s3dit.weights.few_steps import FewSteps
from s3dit.weights.json_files import parse_json, read_json

METADATA = "lora_adapter_metadata"
CONFIG = "adapter_config.json"
# An alpha that kohya's trainers write into the header for people; it is the tensor `.alpha` that acts.
KOHYA_ALPHA = "ss_network_alpha"
# Of each kind: what must be there; "a|b" is either.
KIND_ROLES = {
    "lora": ("down", "up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1|lokr_w1_a", "lokr_w1|lokr_w1_b", "lokr_w2|lokr_w2_a", "lokr_w2|lokr_w2_b"),
    "diff": ("diff",),
    "set": ("set",),
}
# Who writes a key of the header; the first that is there.
PRODUCERS = (
    ("s3dit", "s3dit"), (METADATA, "diffusers"), ("training_info", "ai-toolkit"),
    ("ss_network_module", "kohya, or a trainer in its form"),
)  # fmt: skip


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


def describe(checkpoint: Checkpoint) -> AdapterInfo | None:
    """Return kinds, ranks, alphas, producer and layers of an adapter, None where the file is not an adapter.

    Only headers and tensors of at most 8 bytes are read. Raises CheckpointError: settings that are not usable, two
    tensors for the same place.
    """
    unmatched: list[str] = []
    stored = stored_layers(checkpoint, unmatched)
    places = {layer: place for layer in stored if (place := dialects.place(layer)) is not None}
    if not places:
        return None
    kinds, ranks, alphas = set[str](), set[int](), set[float]()
    settings = settings_by_part(checkpoint)
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
                alphas.update(checkpoint.numbers(roles["alpha"]))
        elif (written := settings.get(place.part)) is not None:
            alphas.add(written.alpha_of(place.layers[0]))
    parts = tuple(sorted({place.part for place in places.values()}))
    notes = header_notes(checkpoint, stored, settings, unmatched)
    few = header_few_steps(checkpoint, notes)
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


def has_no_rank(roles: Mapping[str, Any]) -> bool:
    """Return whether a layer with these roles has no rank; its alpha, which may be infinite, then has no meaning."""
    return not kinds_of(roles) or "diff" in roles or "set" in roles or {"lokr_w1", "lokr_w2"} <= set(roles)


def kinds_of(tensors: Mapping[str, Any]) -> list[str]:
    """Return the kinds of which a layer with these roles has a tensor, in the order of KIND_ROLES."""
    return [
        kind for kind, roles in KIND_ROLES.items() if any(name in tensors for role in roles for name in role.split("|"))
    ]


def stored_layers(checkpoint: Checkpoint, unmatched: list[str]) -> dict[str, dict[str, str]]:
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


def header_notes(
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


def header_few_steps(checkpoint: Checkpoint, notes: list[str]) -> FewSteps | None:
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


def settings_by_part(checkpoint: Checkpoint) -> dict[str, Settings]:
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
