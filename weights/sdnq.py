"""SDNQ: codes of 2 to 8 bits in groups, optionally with a branch of low rank and a Hadamard rotation.

What a layer's codes are stands in the configuration beside the file alone, under `quantization_config` of `config.json`
or in `quantization_config.json`; group size and whether a layer lies transposed (for its own matrix products) follow
from the shapes. Codes of up to 4 bits are kept in 4, of 5 to 8 in 8. Its packed floats of other sizes and its codebooks
are refused.

Source: SDNQ's packed_int and dequantizer, which write the files of the tests.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.fp8 import fp8_weights
from s3dit.kernels.grouped import Form, grouped, hadamard, turned
from s3dit.kernels.int4 import pack
from s3dit.kernels.int8 import int8_weights
from s3dit.weights.comfy import table
from s3dit.weights.container import FLOATS, Checkpoint
from s3dit.weights.repack import DerivedTensors, Layer

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WHOLE = {"int8": torch.int8, "uint8": torch.uint8, "float8_e4m3fn": E4M3, "float8_e5m2": E5M2}
INTEGER = re.compile(r"(u?)int([2-8])")
# Codes whose bits are what the bytes of others leave free, by width: byte, shift to the right, mask.
SPARE = {
    3: ([(0, 6, 3), (2, 4, 4)], [(1, 6, 3), (2, 5, 4)]),
    5: ([(0, 5, 7), (3, 2, 24)], [(1, 5, 7), (4, 2, 24)], [(2, 5, 7), (3, 3, 16), (4, 4, 8)]),
    6: ([(0, 2, 48), (1, 4, 12), (2, 6, 3)],),
    7: ([(byte, byte + 1, 64 >> byte) for byte in range(7)],),
}


def layers(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[DerivedTensors]:
    """The layers of a file that SDNQ wrote, by its configuration; raises CheckpointError for what is not supported."""
    for key in checkpoint:
        name, _, leaf = key.rpartition(".")
        if leaf == "scale" and f"{name}.weight" in checkpoint:
            yield _layer(Layer(checkpoint, name), config)


def _layer(layer: Layer, config: Mapping[str, Any]) -> DerivedTensors:
    kind = _kind(layer.key("weight"), config)
    if any(layer.has(leaf) for leaf in ("scale_2", "zero_point_2", "zero_point_scale")) or config.get("use_codebook"):
        raise layer.error("SDNQ's codebooks and quantized scales are not supported; needed plain scales")
    integer = INTEGER.fullmatch(kind)
    if kind not in WHOLE and integer is None:
        raise layer.error(
            f"SDNQ's weights_dtype is {kind!r}; needed int2 to int8, uint2 to uint8, or {', '.join(WHOLE)}"
        )
    scale = layer.need("scale", FLOATS)
    across = len(scale) == 2 and scale[0] == 1 < scale[1]
    out, groups = (scale[1], 1) if across else (scale[0], scale[1] if len(scale) == 3 else 1)
    in_ = _width(layer, kind, out, across)
    if in_ % groups:
        raise layer.error(f"{groups} groups do not divide its {in_} columns")
    zero = layer.maybe("zero_point", FLOATS, scale)
    branch = layer.has("svd_up")
    rank = _rank(layer, out, in_) if branch else 0
    turn = _turned(layer, in_, config)
    bits = int(integer[2]) if integer else 8
    shifted = kind == "uint8"
    stored = torch.uint8 if bits <= 4 else torch.int8 if integer else WHOLE[kind]
    low = torch.float32 if turn is not None or not branch else _float(layer, "svd_up")
    form = Form(
        stored, in_ // groups if groups > 1 else 0, offset=torch.float32 if zero or shifted else None,
        rotation=0 if turn is None else turn.shape[1], rank=rank, low=low,
    )  # fmt: skip

    def make() -> dict[str, Tensor]:
        parts = {"weight": _codes(layer("weight"), kind, bits, out, in_, across)}
        if bits <= 4:
            least = 0 if kind.startswith("u") else -(1 << bits - 1)
            parts["table"] = table(tuple(range(least, least + 16)))
        parts["scale"] = layer("scale").float().reshape(out, groups)
        if form.offset is not None:
            offset = (
                layer("zero_point").float().reshape(out, groups)
                if zero
                else torch.zeros(out, groups, dtype=torch.float32, device="cpu")
            )
            # Codes from 0 to 255 were moved to -128 … 127.
            parts["offset"] = offset + 128 * parts["scale"] if shifted else offset
        if turn is not None:
            parts["rotation"] = turn
        return parts | (_branch(layer, out, low, turn) if branch else {})

    plain = {E4M3: fp8_weights, torch.int8: int8_weights}.get(stored)
    if plain is not None and form == Form(stored, low=low):
        return layer.made(plain, out, in_, make)
    return layer.made(grouped(f"sdnq-{kind}", form), out, in_, make)


def _kind(name: str, config: Mapping[str, Any]) -> str:
    """The weights_dtype of a parameter."""
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
    """Whether a parameter is among those that patterns of SDNQ's own kind name."""
    for pattern in map(str, patterns):
        if pattern.startswith("."):
            meant = name.startswith(pattern[1:])
        else:
            glob = re.match(".*".join(map(re.escape, pattern.split("*"))), name) if "*" in pattern else None
            meant = pattern == name or pattern in name.split(".") or glob is not None
        if meant:
            return True
    return False


def _float(layer: Layer, leaf: str) -> torch.dtype:
    dtype = layer.checkpoint.entry(layer.key(leaf)).dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _width(layer: Layer, kind: str, out: int, across: bool) -> int:
    """Columns of a layer, from what its codes take."""
    whole = kind in WHOLE
    shape = layer.need("weight", (WHOLE.get(kind, torch.uint8),))
    bits = 8 if whole else int(kind[-1])
    count = torch.Size(shape).numel() * 8 // bits
    if not count or count % out or (across and (not whole or shape[-1] != out)):
        raise layer.error(f"weight is {list(shape)} of {kind}, which are not {out} rows")
    return count // out


def _rank(layer: Layer, out: int, in_: int) -> int:
    """The rank of the branch, whose matrices may lie transposed."""
    shape = layer.need("svd_up", FLOATS)
    if len(shape) != 2 or out not in shape:
        raise layer.error(f"svd_up is {list(shape)}; needed a matrix with {out} rows")
    rank = shape[1] if shape[0] == out else shape[0]
    layer.need("svd_down", (_float(layer, "svd_up"),), (rank, in_) if shape[0] == out else (in_, rank))
    return rank


def _turned(layer: Layer, in_: int, config: Mapping[str, Any]) -> Tensor | None:
    """The rotation of a layer: of as many inputs as divide its width, at most the configured number."""
    if not config.get("use_hadamard"):
        return None
    most = config.get("hadamard_group_size", 256)
    if not isinstance(most, int) or most < 1:
        raise layer.error(f"hadamard_group_size is {most!r}; needed a power of two")
    size = 1 << (min(in_, most) - 1).bit_length()
    while in_ % size:
        size //= 2
    return hadamard(size) if size >= 4 else None


def _codes(stored: Tensor, kind: str, bits: int, out: int, in_: int, across: bool) -> Tensor:
    """The part `weight` of stored codes."""
    if across:
        stored = stored.T
    if kind == "uint8":
        return (stored.reshape(out, in_) ^ 128).view(torch.int8)
    if kind in WHOLE:
        return stored.reshape(out, in_)
    if bits == 4:
        return stored.reshape(out, in_ // 2)
    codes = _unpacked(stored, bits).reshape(out, in_)
    if bits < 4:
        return pack(codes)
    least = 0 if kind.startswith("u") else 1 << bits - 1
    return codes.to(torch.int8) - least


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Codes of 2, 3, 5, 6 or 7 bits, uint8, in the order of the weight."""
    if bits == 2:
        return (packed.reshape(-1, 1) >> torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device="cpu")) & 3
    packed = packed.reshape(-1, bits if bits != 6 else 3)
    mask = (1 << bits) - 1
    # Three bits: two codes of a byte, and a third whose bits are spread.
    codes = [packed & mask] if bits != 3 else [packed & mask, packed >> 3 & mask]
    for sources in SPARE[bits]:
        pieces = [packed[:, byte] >> shift & kept for byte, shift, kept in sources]
        codes.append(torch.stack(pieces).sum(0, dtype=torch.uint8)[:, None])
    return torch.cat(codes, 1)


def _branch(layer: Layer, out: int, low: torch.dtype, turn: Tensor | None) -> dict[str, Tensor]:
    """up and down; SDNQ turns the sum of codes and branch, so down is turned here."""
    up, down = layer("svd_up").to(low), layer("svd_down").to(low)
    if up.shape[0] != out:
        up, down = up.T, down.T
    if turn is not None:
        down = turned(down, {"rotation": turn})
    return {"up": up, "down": down[None]}
