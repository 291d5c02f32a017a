"""SDNQ: codes of 2 to 8 bits in groups, optionally with a branch of low rank and a Hadamard rotation.

The type of a layer's codes is in the configuration beside the file alone, under `quantization_config` of `config.json`
or in `quantization_config.json`; group size, and whether a layer is transposed (for SDNQ's own matrix products), follow
from the shapes (`_Layout`). Codes of up to 4 bits are kept in 4, of 5 to 8 in 8. Packed floats of other sizes and
codebooks are refused.

Source: SDNQ's packed_int and dequantizer, which write the files of the tests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s3dit.kernels.number_format import FORMATS, Form, grouped
from s3dit.weights.comfy import rotation_part, table_part
from s3dit.weights.container import FLOATS, Checkpoint
from s3dit.weights.lazy_torch import torch
from s3dit.weights.repack import DerivedTensors, Layer

if TYPE_CHECKING:
    from torch import Tensor

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
# Types of codes that fill a byte.
BYTE_DTYPES = {"int8": "int8", "uint8": "uint8", "float8_e4m3fn": E4M3, "float8_e5m2": E5M2}
INTEGER = re.compile(r"(u?)int([2-8])")
# Codes whose bits are in the parts of bytes that other codes leave free, by width: byte, shift to the right, mask.
SPREAD_BITS = {
    3: ([(0, 6, 3), (2, 4, 4)], [(1, 6, 3), (2, 5, 4)]),
    5: ([(0, 5, 7), (3, 2, 24)], [(1, 5, 7), (4, 2, 24)], [(2, 5, 7), (3, 3, 16), (4, 4, 8)]),
    6: ([(0, 2, 48), (1, 4, 12), (2, 6, 3)],),
    7: ([(byte, byte + 1, 64 >> byte) for byte in range(7)],),
}


def layers(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[DerivedTensors]:
    """Yield the layers of a file that SDNQ wrote; raises CheckpointError for what is not supported.

    config: the quantization_config beside the file.
    """
    for key in checkpoint:
        name, _, leaf = key.rpartition(".")
        if leaf == "scale" and f"{name}.weight" in checkpoint:
            layer = Layer(checkpoint, name)
            yield _derived(layer, _read_layout(layer, config))


@dataclass(frozen=True, slots=True)
class _Layout:
    """How SDNQ stored a layer, from its configuration and the shapes of its tensors.

    kind: its weights_dtype · bits: of a code · out, in_, groups: of the weight · transposed: whether weight and scale
    are · has_zero: whether groups have a zero point · rank: of the low-rank branch, 0 for none · rotation: inputs that
    are rotated together, 0 for none · low: the dtype that the branch is kept in.
    """

    kind: str
    bits: int
    out: int
    in_: int
    groups: int
    transposed: bool
    has_zero: bool
    rank: int
    rotation: int
    low: str

    @property
    def stored(self) -> str:
        """Return the dtype of the part `weight`: half bytes for up to 4 bits, else int8 or a float."""
        if self.bits <= 4:
            return "uint8"
        return BYTE_DTYPES[self.kind] if self.kind.startswith("float") else "int8"

    @property
    def form(self) -> Form:
        """Return the form of the layer's parts; codes from 0 to 255 become -128 … 127 with an offset."""
        return Form(
            self.stored,
            self.in_ // self.groups if self.groups > 1 else 0,
            offset="float32" if self.has_zero or self.kind == "uint8" else None,
            rotation=self.rotation,
            rank=self.rank,
            low=self.low,
        )


def _read_layout(layer: Layer, config: Mapping[str, Any]) -> _Layout:
    """Read and check how a layer is stored; raises CheckpointError."""
    kind = _kind(layer.key("weight"), config)
    if any(layer.has(leaf) for leaf in ("scale_2", "zero_point_2", "zero_point_scale")) or config.get("use_codebook"):
        raise layer.error("SDNQ's codebooks and quantized scales are not supported; needed plain scales")
    integer = INTEGER.fullmatch(kind)
    if kind not in BYTE_DTYPES and integer is None:
        raise layer.error(
            f"SDNQ's weights_dtype is {kind!r}; needed int2 to int8, uint2 to uint8, or {', '.join(BYTE_DTYPES)}"
        )
    scale = layer.require("scale", FLOATS)
    transposed = len(scale) == 2 and scale[0] == 1 < scale[1]
    out, groups = (scale[1], 1) if transposed else (scale[0], scale[1] if len(scale) == 3 else 1)
    in_ = _width(layer, kind, out, transposed)
    if in_ % groups:
        raise layer.error(f"{groups} groups do not divide its {in_} columns")
    has_zero = layer.optional("zero_point", FLOATS, scale)
    branch = layer.has("svd_up")
    rank = _rank(layer, out, in_) if branch else 0
    rotation = _rotated(layer, in_, config)
    low = "float32" if rotation or not branch else _dtype(layer, "svd_up")
    bits = int(integer[2]) if integer else 8
    return _Layout(kind, bits, out, in_, groups, transposed, has_zero, rank, rotation, low)


def _derived(layer: Layer, layout: _Layout) -> DerivedTensors:
    """Return the parts of a layer: of a per-channel Scheme where its codes and scales are those, else of its form."""
    form = layout.form
    per_channel = {E4M3: FORMATS["fp8-weights"], "int8": FORMATS["int8-weights"]}.get(layout.stored)
    if per_channel is not None and form == Form(layout.stored, low=layout.low):
        return layer.derive(per_channel, layout.out, layout.in_, lambda: _parts(layer, layout))
    return layer.derive(grouped(f"sdnq-{layout.kind}", form), layout.out, layout.in_, lambda: _parts(layer, layout))


def _parts(layer: Layer, layout: _Layout) -> dict[str, Tensor]:
    """Load a layer and return its parts."""
    shape = layout.out, layout.groups
    parts = {"weight": _codes(layer("weight"), layout)}
    if layout.bits <= 4:
        least = 0 if layout.kind.startswith("u") else -(1 << layout.bits - 1)
        parts["table"] = table_part(tuple(range(least, least + 16)))
    parts["scale"] = layer("scale").float().reshape(shape)
    if layout.has_zero:
        parts["offset"] = layer("zero_point").float().reshape(shape)
    if layout.kind == "uint8":
        # Codes from 0 to 255 were moved to -128 … 127.
        zero = parts.get("offset", torch.zeros(shape, dtype=torch.float32, device="cpu"))
        parts["offset"] = zero + 128 * parts["scale"]
    if layout.rotation:
        parts["rotation"] = rotation_part(layout.rotation)
    return parts | (_branch(layer, layout) if layout.rank else {})


def _kind(name: str, config: Mapping[str, Any]) -> str:
    """Return the weights_dtype of a parameter."""
    kind = str(config.get("weights_dtype", "int8"))
    for pattern, own in _table(config, "modules_quant_config").items():
        if _meant(name, [pattern]) and isinstance(own, dict):
            kind = str(own.get("weights_dtype", kind))
    for key, patterns in _table(config, "modules_dtype_dict").items():
        if not _meant(name, patterns if isinstance(patterns, list) else [patterns]):
            continue
        least = re.fullmatch(r"(?:minimum[-_]?)?(u?)(?:int)?(\d+)[-_]?(?:bits?)?", key.lower())
        if least is None or re.fullmatch(r"u?int\d+", key.lower()):
            return key.lower()
        width, now = int(least[2]), re.search(r"\d+", kind)
        if now is not None and int(now[0]) < width:
            return f"{'u' if least[1] or width <= 4 else ''}int{width}"
        return kind
    return kind


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _meant(name: str, patterns: list[Any]) -> bool:
    """Return whether a parameter is among those that patterns of SDNQ's own kind name."""
    for pattern in map(str, patterns):
        if pattern.startswith("."):
            meant = name.startswith(pattern[1:])
        else:
            glob = re.match(".*".join(map(re.escape, pattern.split("*"))), name) if "*" in pattern else None
            meant = pattern == name or pattern in name.split(".") or glob is not None
        if meant:
            return True
    return False


def _dtype(layer: Layer, leaf: str) -> str:
    return layer.checkpoint.entry(layer.key(leaf)).dtype


def _width(layer: Layer, kind: str, out: int, across: bool) -> int:
    """Return the columns of a layer, from the size of its codes."""
    whole = kind in BYTE_DTYPES
    shape = layer.require("weight", (BYTE_DTYPES.get(kind, "uint8"),))
    bits = 8 if whole else int(kind[-1])
    count = math.prod(shape) * 8 // bits
    if not count or count % out or (across and (not whole or shape[-1] != out)):
        raise layer.error(f"weight is {list(shape)} of {kind}, which are not {out} rows")
    return count // out


def _rank(layer: Layer, out: int, in_: int) -> int:
    """Return the rank of the branch, whose matrices may be transposed."""
    shape = layer.require("svd_up", FLOATS)
    if len(shape) != 2 or out not in shape:
        raise layer.error(f"svd_up is {list(shape)}; needed a matrix with {out} rows")
    rank = shape[1] if shape[0] == out else shape[0]
    layer.require("svd_down", (_dtype(layer, "svd_up"),), (rank, in_) if shape[0] == out else (in_, rank))
    return rank


def _rotated(layer: Layer, in_: int, config: Mapping[str, Any]) -> int:
    """Return how many inputs of a layer were rotated together: as divide its width, at most the configured number."""
    if not config.get("use_hadamard"):
        return 0
    most = config.get("hadamard_group_size", 256)
    if not isinstance(most, int) or most < 1:
        raise layer.error(f"hadamard_group_size is {most!r}; needed a power of two")
    size = 1 << (min(in_, most) - 1).bit_length()
    while in_ % size:
        size //= 2
    return size if size >= 4 else 0


def _codes(stored: Tensor, layout: _Layout) -> Tensor:
    """Return the part `weight` of stored codes."""
    from s3dit.kernels.int4 import pack

    shape = layout.out, layout.in_
    if layout.transposed:
        stored = stored.T
    if layout.kind == "uint8":
        return (stored.reshape(shape) ^ 128).view(torch.int8)
    if layout.kind in BYTE_DTYPES:
        return stored.reshape(shape)
    if layout.bits == 4:
        return stored.reshape(layout.out, layout.in_ // 2)
    codes = _unpacked(stored, layout.bits).reshape(shape)
    if layout.bits < 4:
        return pack(codes)
    least = 0 if layout.kind.startswith("u") else 1 << layout.bits - 1
    return codes.to(torch.int8) - least


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unpack codes of 2, 3, 5, 6 or 7 bits -> uint8, in the order of the weight."""
    if bits == 2:
        return (packed.reshape(-1, 1) >> torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device="cpu")) & 3
    packed = packed.reshape(-1, bits if bits != 6 else 3)
    mask = (1 << bits) - 1
    # Three bits: two codes of a byte, and a third whose bits are spread.
    codes = [packed & mask] if bits != 3 else [packed & mask, packed >> 3 & mask]
    for sources in SPREAD_BITS[bits]:
        pieces = [packed[:, byte] >> shift & kept for byte, shift, kept in sources]
        codes.append(torch.stack(pieces).sum(0, dtype=torch.uint8)[:, None])
    return torch.cat(codes, 1)


def _branch(layer: Layer, layout: _Layout) -> dict[str, Tensor]:
    """Load the parts up and down; SDNQ rotates the sum of codes and branch, so down is rotated here."""
    from s3dit.kernels.grouped import rotate

    up, down = (layer(leaf).to(getattr(torch, layout.low)) for leaf in ("svd_up", "svd_down"))
    if up.shape[0] != layout.out:
        up, down = up.T, down.T
    if layout.rotation:
        down = rotate(down, {"rotation": rotation_part(layout.rotation)})
    return {"up": up, "down": down[None]}
