"""Adapter files (LoRA, LoHa, LoKr, DoRA, differences) of any trainer, read into the same form.

`read_adapter` returns {part: {official layer: Delta}}. Keys are read by `dialects`, the tensors of a layer become a
Delta by `adapter_layer`, and a matrix for q, k and v is cut into three. Alpha is taken from the first of these that is
there: the layer's own `.alpha`; the header (`lora_adapter_metadata`, diffusers) or `adapter_config.json` (PEFT); else
the factor is 1. Layers that belong to no part are counted and kept by name; whether that is an error is for the caller.

All values are checked: a NaN is an error here instead of a black picture. `convert_adapter` writes adapters.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from s3dit.errors import CheckpointError
from s3dit.weights import dialects
from s3dit.weights.adapter_info import (
    has_no_rank,
    header_few_steps,
    header_notes,
    settings_by_part,
    stored_layers,
)
from s3dit.weights.adapter_layer import check_complete, layer_delta
from s3dit.weights.checkpoint import Checkpoint, open_stored
from s3dit.weights.delta import Delta
from s3dit.weights.few_steps import FewSteps

ADAPTER_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

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
    stored = stored_layers(checkpoint, adapter.unmatched)
    places = {layer: place for layer in stored if (place := dialects.place(layer)) is not None}
    if not places or dialects.unsupported_kind(adapter.unmatched):
        raise CheckpointError(_foreign_error(checkpoint, bool(stored)))
    adapter.unmatched += [layer for layer in stored if layer not in places]
    settings = settings_by_part(checkpoint)
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
    adapter.notes = header_notes(checkpoint, stored, settings, adapter.unmatched)
    adapter.few_steps = header_few_steps(checkpoint, adapter.notes)
    read = [delta for deltas in adapter.deltas.values() for delta in deltas.values()]
    if idle := sum(delta.idle for delta in read):
        adapter.notes.append(f"{idle} of {len(read)} layers change nothing (an alpha of 0, or factors of zeros)")
    return adapter


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
