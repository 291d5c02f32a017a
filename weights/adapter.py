"""Adapter files, read into one normal form, whatever their dialect.

`read_adapter` gives {part: {official layer: Delta}}. Keys are told apart by `dialects`; tensors of one layer become one
Delta with its strength folded in; a matrix for q, k and v is cut into three. Where alpha comes from, first that is
there: the layer's own `.alpha`; the header (`lora_adapter_metadata`, diffusers) or `adapter_config.json` (PEFT); else
the factor is 1. What cannot be placed is counted and kept by name: whether that is an error is for the user to say.

Values are looked at: a NaN is found here, and not in a black picture.

`convert_adapter` writes the same in official names for any other tool, or in ComfyUI's.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3dit.weights import dialects
from s3dit.weights.checkpoint import Checkpoint, CheckpointError, open_stored
from s3dit.weights.delta import Delta, Full, Hadamard, Kronecker, LowRank, Term, scaled

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2)
METADATA = "lora_adapter_metadata"
CONFIG = "adapter_config.json"

# The largest alpha / rank that is no accident.
STRONGEST = 1e4
# Patterns of layer names come from strangers. `re` backtracks, so its time grows with the name's length to the power of
# the repetitions in a pattern; a repeated group, a look-around or a back-reference could take for ever.
LONGEST_PATTERN, REPEATS, PATTERN_COST = 200, 3, 1 << 19
# The last form warns: Python may give nested sets a meaning.
UNSAFE = re.compile(r"\)[*+{]|\(\?[^:]|\\[1-9]|[*+}?][*+{]|\{,?\d{3,}|\{\d+,\d{3,}|\[[^\]]*(?:\[|--|&&|~~|\|\|)")
WAY_OUT = "needed LoRA, LoHa, LoKr or differences; merge it into the model with the program that trained it"
# Settings of PEFT by which a change of weights becomes another one, and which are not offered here.
UNSUPPORTED = (
    "alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "target_parameters", "trainable_token_indices",
)  # fmt: skip
# Ways to start that change the base weights; without those weights the adapter gives another picture.
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Deltas = dict[str, Delta]
Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(slots=True)
class Adapter:
    """What a file holds: deltas by part and official layer, and what of it is of no use.

    unmatched: stored layers (and keys) of no part · misshapen: layers whose tensors disagree, and how · redundant:
    stored layers that say again, under another name, what official ones say.
    """

    path: Path
    deltas: dict[str, Deltas] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    redundant: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """The sha256 of the file, in hex."""
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
    if not places or dialects.unread(adapter.unmatched):
        raise CheckpointError(_stranger(checkpoint, bool(stored)))
    adapter.unmatched += [layer for layer in stored if layer not in places]
    settings = _settings(checkpoint)
    official = {one for place in places.values() if place.plain for one in place.layers}
    for layer, place in places.items():
        if not place.plain and official.issuperset(place.layers):
            adapter.redundant.append(layer)
            continue
        tensors = _load(checkpoint, layer, stored[layer])
        try:
            delta = _delta(tensors, settings.get(place.part), place.layers[0])
            pieces = [delta.part(i, len(place.layers)) for i in range(len(place.layers))]
        except ValueError as error:
            adapter.misshapen.append(f"{layer}: {error}")
            continue
        there = adapter.deltas.setdefault(place.part, {})
        if taken := [one for one in place.layers if one in there]:
            raise CheckpointError(
                f"{path}: {layer} changes {taken[0]}, which another tensor of the file changes already; needed one "
                "change a layer; train or convert it again"
            )
        there |= dict(zip(place.layers, pieces, strict=True))
    return adapter


def _layers(checkpoint: Checkpoint, unmatched: list[str]) -> dict[str, dict[str, str]]:
    """Stored layer -> role -> key; keys that are no adapter's go to `unmatched`."""
    stored: dict[str, dict[str, str]] = {}
    for key in checkpoint:
        found = dialects.split(key)
        if found is None:
            unmatched.append(key)
            continue
        layer, role = found
        roles = stored.setdefault(layer, {})
        if role in roles:
            raise CheckpointError(
                f"{checkpoint.path}: {key} and {roles[role]} are for one place; needed one adapter in a file"
            )
        roles[role] = key
    return stored


def _stranger(checkpoint: Checkpoint, adapter: bool) -> str:
    """What to say of a file without a single layer of ours."""
    names = list(checkpoint)
    if not names:
        return f"{checkpoint.path}: holds no tensors; needed an adapter (LoRA); download it again"
    shown = f"{len(names)} tensors such as {names[0][:120]}"
    if (kind := dialects.unread(names)) is not None:
        return f"{checkpoint.path}: {kind}, which is not supported ({shown}); {WAY_OUT}"
    if not adapter:
        return f"{checkpoint.path}: is no adapter: {shown}; needed keys such as …lora_A.weight; a model goes to --model"
    family = dialects.family(names)
    if family is not None:
        return f"{checkpoint.path}: is an adapter of {family} ({shown}); needed one that was trained on Z-Image"
    return f"{checkpoint.path}: changes no layer of Z-Image ({shown}); needed one that was trained on Z-Image"


def _load(checkpoint: Checkpoint, layer: str, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of one stored layer by role, matrices as matrices; CheckpointError for what no training leaves."""
    tensors = {}
    for role, key in keys.items():
        # Of its own memory: trainers write their file anew, in place, under a running engine.
        tensor = checkpoint.load(key).clone()
        if not tensor.numel():
            raise CheckpointError(
                f"{checkpoint.path}: {key} is {list(tensor.shape)}, of rank 0; needed a trained adapter; download it "
                "again"
            )
        if role not in ("alpha", "shape") and tensor.dtype not in (*FLOATS, *EIGHT_BIT):
            raise CheckpointError(
                f"{checkpoint.path}: {key} is {tensor.dtype}; needed float32, bfloat16, float16 or an 8-bit float; "
                "save it in one of them"
            )
        # 8-bit floats have no arithmetic, and are numbers of bf16 all of them.
        tensor = tensor.bfloat16() if tensor.dtype in EIGHT_BIT else tensor
        if not tensor.isfinite().all() and not (role == "alpha" and _whole_factors(keys)):
            raise CheckpointError(f"{checkpoint.path}: {key} holds NaN or infinity; needed finite ones; take another")
        # Trainers that know convolutions keep linear layers as such, of size 1 × 1.
        tensors[role] = tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor
    _whole(checkpoint, layer, tensors)
    return tensors


def _whole_factors(roles: Mapping[str, Any]) -> bool:
    """Whether a layer has no rank, so that an alpha, which some trainers write as infinity, has no meaning."""
    return not _kinds(roles) or "diff" in roles or "set" in roles or {"lokr_w1", "lokr_w2"} <= set(roles)


# Of each kind: what must be there; "a|b" is either.
KINDS = {
    "lora": ("down", "up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1|lokr_w1_a", "lokr_w1|lokr_w1_b", "lokr_w2|lokr_w2_a", "lokr_w2|lokr_w2_b"),
    "diff": ("diff",),
    "set": ("set",),
}


def _kinds(tensors: Mapping[str, Any]) -> list[str]:
    """The kinds of which something is there."""
    return [kind for kind, roles in KINDS.items() if any(one in tensors for role in roles for one in role.split("|"))]


def _whole(checkpoint: Checkpoint, layer: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a layer has half of a kind, or two kinds."""
    kinds = _kinds(tensors)
    if len(kinds) > 1:
        raise CheckpointError(f"{checkpoint.path}: {layer} is {' and '.join(kinds)} at once; needed one kind a layer")
    lacking = [role for kind in kinds for role in KINDS[kind] if not any(one in tensors for one in role.split("|"))]
    if lacking:
        raise CheckpointError(
            f"{checkpoint.path}: {layer} has {', '.join(sorted(tensors))} but no {lacking[0].replace('|', ' or ')}; "
            "the file was cut short or badly converted, take it from its source"
        )


def _delta(tensors: Mapping[str, Tensor], settings: "Settings | None", layer: str) -> Delta:
    """One layer's tensors in the normal form; ValueError where they do not fit together."""
    if "core" in tensors:
        raise ValueError("a core between its factors (of a convolution), needed a linear layer")
    alpha = None
    if "alpha" in tensors and not _whole_factors(tensors):
        if tensors["alpha"].numel() != 1:
            raise ValueError(f"an alpha of {list(tensors['alpha'].shape)}, needed one number")
        alpha = float(tensors["alpha"].double())
    term = _term(tensors, alpha, settings, layer)
    bias, magnitude = tensors.get("diff_b"), tensors.get("magnitude")
    if "up.bias" in tensors:
        # PEFT's bias stands behind the up factor, so it shares its strength.
        if "down" not in tensors:
            raise ValueError("the bias of an up factor without its factors")
        bias = scaled(tensors["up.bias"], _factor(_rank(tensors["down"]), alpha, settings, layer))
    if magnitude is not None and magnitude.ndim == 1:
        magnitude = magnitude[:, None]
    delta = Delta(term, bias, magnitude, replaces="set" in tensors)
    shape, wanted = delta.shape, tensors.get("shape")
    if wanted is not None and tuple(wanted.flatten().tolist()) != shape:
        raise ValueError(
            f"a weight that is made {wanted.flatten().tolist()} first, needed one of the model's own shape"
        )
    return delta


def _term(tensors: Mapping[str, Tensor], alpha: float | None, settings: "Settings | None", layer: str) -> Term | None:
    """The matrix of a layer, its strength folded in."""
    kind = next(iter(_kinds(tensors)), None)
    if kind == "lora":
        term = LowRank(tensors["up"], tensors["down"])
        return term.scaled(_factor(_rank(term.down), alpha, settings, layer))
    if kind == "loha":
        hada = Hadamard(*(tensors[role] for role in KINDS["loha"]))
        return hada.scaled(_factor(_rank(hada.w1b), alpha, settings, layer))
    if kind == "lokr":
        return _lokr(tensors, alpha, settings, layer)
    return None if kind is None else Full(tensors[kind])


def _lokr(tensors: Mapping[str, Tensor], alpha: float | None, settings: "Settings | None", layer: str) -> Term:
    """A Kronecker product; factors that are products themselves are multiplied out, they are small."""
    factors, dim = [], None
    for name in ("lokr_w1", "lokr_w2"):
        if name in tensors:
            factors.append(tensors[name])
            continue
        pair = LowRank(tensors[f"{name}_a"], tensors[f"{name}_b"])
        _, dim = pair.shape, _rank(pair.down)
        factors.append(pair.dense())
    term = Kronecker(*factors)
    if "alpha" not in tensors and settings is not None:
        return term.scaled(_factor(None, None, settings, layer))
    # Without a rank the alpha that LyCORIS writes means nothing.
    return term if dim is None else term.scaled(_factor(dim, alpha, settings, layer))


def _rank(down: Tensor) -> int:
    """The rank of a pair, which is the height of its down factor."""
    if down.ndim < 2:
        raise ValueError(f"a down factor of {list(down.shape)}, needed [N, r] and [r, K]")
    return down.shape[0]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a trainer wrote down of a part: alpha, the rank where tensors do not tell it, and exceptions by layer."""

    alpha: float
    rank: float | None
    root: bool
    alphas: Patterns
    ranks: Patterns


def _factor(rank: float | None, alpha: float | None, settings: Settings | None, layer: str) -> float:
    """alpha / rank of one layer; 1 where nobody says alpha. rank None: what the trainer wrote down."""
    if alpha is None and settings is None:
        return 1.0
    if alpha is None:
        assert settings is not None
        alpha = _of(settings.alphas, layer, settings.alpha)
    if rank is None:
        declared = None if settings is None else _of(settings.ranks, layer, settings.rank)
        if declared is None:
            raise ValueError("an alpha without a rank")
        rank = declared
    factor = alpha / (math.sqrt(rank) if settings is not None and settings.root else rank)
    if abs(factor) > STRONGEST:
        raise ValueError(f"alpha {alpha:g} at rank {rank:g}, needed a strength alpha / rank of at most {STRONGEST:g}")
    return factor


def _of(exceptions: Patterns, layer: str, default: Any) -> Any:
    """A layer's own value: of the first pattern that matches the end of its name, as PEFT does."""
    return next((value for pattern, value in exceptions if pattern.match(layer)), default)


def _settings(checkpoint: Checkpoint) -> dict[str, Settings]:
    """What the header, or PEFT's file beside, says of each part; raises CheckpointError."""
    config = checkpoint.path.with_name(CONFIG)
    text, source = checkpoint.metadata.get(METADATA), f"{checkpoint.path}: {METADATA}"
    beside = text is None and checkpoint.path.name.startswith("adapter_model.") and config.is_file()
    try:
        if beside:
            text, source = config.read_text(encoding="utf-8"), str(config)
        values = {} if text is None else json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        parts = ("transformer", "text_encoder")
        said = {
            part: {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")}
            for part in parts
        }
        # PEFT's own file, and the header that a model of diffusers writes by itself, have no part in front.
        bare = {key: value for key, value in values.items() if not key.startswith(tuple(f"{part}." for part in parts))}
        if bare.keys() & {"r", "lora_alpha", "alpha", "peft_type"}:
            said = {part: one or bare for part, one in said.items()}
        return {part: _read_settings(one) for part, one in said.items() if one}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not usable ({error}); needed PEFT's settings; take the file anew") from None


def _read_settings(values: Mapping[str, Any]) -> Settings:
    """PEFT's settings of one part; ValueError where one is of another kind."""
    kind = str(values.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise ValueError(f"it is PEFT's {kind[:40]}, needed LORA, LOHA or LOKR; merge it into the model with PEFT")
    if found := [key for key in UNSUPPORTED if values.get(key)]:
        raise ValueError(f"{found[0]} is set, which is not supported; merge the adapter into the model with PEFT")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(OTHER_BASE):
        raise ValueError(
            f"init_lora_weights is {start[:40]!r}, which changes the model's own weights; save it as plain LoRA with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    alphas, ranks = (_patterns(values, name) for name in ("alpha_pattern", "rank_pattern"))
    # PEFT's own values where a file leaves them out.
    alpha = _number(values.get("lora_alpha", values.get("alpha", 8)), "alpha")
    rank = None if values.get("r") is None else _number(values["r"], "r")
    return Settings(alpha, rank, bool(values.get("use_rslora")), alphas, ranks)


def _patterns(values: Mapping[str, Any], name: str) -> Patterns:
    """One table of exceptions, its keys compiled as PEFT matches them; ValueError for one that could take for ever."""
    table = values.get(name) or {}
    if not isinstance(table, dict):
        raise ValueError(f"{name} is {str(table)[:40]}, needed a table")
    cost, found = 0.0, []
    for key, value in table.items():
        if len(key) > LONGEST_PATTERN or (repeats := len(re.findall(r"[*+{]", key))) > REPEATS or UNSAFE.search(key):
            raise ValueError(
                f"{name} has the regular expression {key[:60]!r}; needed at most {LONGEST_PATTERN} characters, "
                f"{REPEATS} repetitions, no repeated group, look-around or back-reference"
            )
        # Ways through: of each repetition as many as a name is long, of `?` two, of groups their alternatives at most.
        groups, choices = key.count("(") + 1, key.count("|")
        cost += 64**repeats * 2 ** key.count("?") * (1 + choices / groups) ** groups
        if cost > PATTERN_COST:
            raise ValueError(f"{name} has too many patterns with repetitions; name the layers instead")
        try:
            found.append((re.compile(rf"(.*\.)?({key})$"), _number(value, name)))
        except (re.error, OverflowError) as error:
            raise ValueError(f"{name} has {key[:60]!r}, which is no regular expression ({error})") from None
    return tuple(found)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(f"{name} is {repr(value)[:40]}, needed a number")
    if value <= 0 and name in ("r", "rank_pattern"):
        raise ValueError(f"{name} is {value!r}, needed one above 0")
    return float(value)


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What a file says an adapter is: kinds such as "lora" or "dora", ranks and alphas found, who made it, layers."""

    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    producer: str
    layers: int
    parts: tuple[str, ...]


# Who writes a key of the header; the first that is there.
PRODUCERS = (
    ("s3dit", "s3dit"), (METADATA, "diffusers"), ("training_info", "ai-toolkit"),
    ("ss_network_module", "kohya, or a trainer in its form"),
)  # fmt: skip


def describe(checkpoint: Checkpoint) -> AdapterInfo | None:
    """Kind, ranks, alphas, producer and layers of an adapter, None where a file is none; only small tensors are read.

    Raises CheckpointError: settings that are not usable, two tensors for one place.
    """
    unmatched: list[str] = []
    stored = _layers(checkpoint, unmatched)
    places = {layer: place for layer in stored if (place := dialects.place(layer)) is not None}
    if not places:
        return None
    kinds, ranks, alphas = set[str](), set[int](), set[float]()
    settings = _settings(checkpoint)
    for layer, place in places.items():
        roles = stored[layer]
        kinds.update("dora" if kind == "lora" and "magnitude" in roles else kind for kind in _kinds(roles))
        for role in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
            if role in roles and len(shape := checkpoint.entry(roles[role]).shape) > 1:
                ranks.add(shape[0])
        if "alpha" in roles and checkpoint.entry(roles["alpha"]).nbytes <= 8:
            if not _whole_factors(roles):
                alphas.update(checkpoint.load(roles["alpha"]).double().flatten().tolist())
        elif (said := settings.get(place.part)) is not None:
            alphas.add(_of(said.alphas, place.layers[0], said.alpha))
    parts = tuple(sorted({place.part for place in places.values()}))
    return AdapterInfo(
        tuple(sorted(kinds)), tuple(sorted(ranks)), tuple(sorted(alphas)), _producer(checkpoint), len(places), parts
    )


def _producer(checkpoint: Checkpoint) -> str:
    """Who wrote an adapter, as its header tells; empty where it does not."""
    software = checkpoint.metadata.get("software", "")
    if "ai-toolkit" in software:
        return "ai-toolkit"
    return next((name for key, name in PRODUCERS if key in checkpoint.metadata), "") or (
        "PEFT" if any(key.startswith("base_model.model.") for key in checkpoint) else ""
    )
