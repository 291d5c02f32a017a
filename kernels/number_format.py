"""NumberFormat, a number format as the header of a file shows it; importing this module does not import torch.

A quantized layer consists of several tensors, its parts: `layout` names them, with shapes and dtypes, which are names
as in "bfloat16". `schemes.scheme_of` returns the Scheme that encodes, decodes and multiplies them. The formats that
this engine writes are in FORMATS; `gguf` and `grouped` return those of other producers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

# Name of a part -> its shape and the name of its dtype.
Layout = dict[str, tuple[tuple[int, ...], str]]

ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
# Neighbors of int4 that share a scale.
INT4_GROUP = 64
# Of GGUF's types: numbers of a block, and its bytes.
BLOCK_SIZES = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84),
    "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}  # fmt: skip

# Of DFloat11: bytes of codes that are decoded on their own; those of a block, and of its gaps; the entries of a table
# that name another table.
DFLOAT11 = "dfloat11"
RUN_BYTES, RUNS = 8, 512
BLOCK_BYTES, GAP_BYTES = RUN_BYTES * RUNS, RUNS * 5 // 8
FIRST_POINTER = 240


@dataclass(frozen=True, slots=True)
class Form:
    """The parts of a format in groups; see `grouped`, the module, for what they do.

    codes: "uint8" for half bytes that index a table, else the dtype of a code · group: inputs that share a scale, 0 for
    the whole row · scale, offset, low (up and down): dtypes · rotation: inputs rotated together, 0 for none · column:
    whether there are factors of inputs · rank: of the branch, 0 for none · rounded: value · scale is rounded to an int8
    number before channel is applied.
    """

    codes: str
    group: int = 0
    scale: str = "float32"
    channel: bool = False
    offset: str | None = None
    rounded: bool = False
    rotation: int = 0
    column: bool = False
    rank: int = 0
    low: str = "bfloat16"


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """A number format of linear weights, by header.

    name: in files and options · layout(out, in) -> parts of a weight, raising ValueError for sizes that it cannot take
    · form: of formats in groups
    """

    name: str
    layout: Callable[[int, int], Layout]
    form: Form | None = None


def per_channel_layout(dtype: str, out: int, in_: int) -> Layout:
    """Return the parts of a format with a scale for each output channel; dtype: of a code."""
    return {"weight": ((out, in_), dtype), "scale": ((out, 1), "float32")}


def int4_layout(out: int, in_: int) -> Layout:
    """Return the parts of a weight (out, in): weight (out, in / 2) uint8, scale and zero (out, in / 64) bf16.

    Raises ValueError where `in` is not a multiple of 64.
    """
    if in_ % INT4_GROUP:
        raise ValueError(f"int4 needs an input width that is a multiple of {INT4_GROUP}, found {in_}; use int8 or fp8")
    groups = ((out, in_ // INT4_GROUP), "bfloat16")
    return {"weight": ((out, in_ // 2), "uint8"), "scale": groups, "zero": groups}


_LAYOUTS: dict[str, Callable[[int, int], Layout]] = {
    "fp8": partial(per_channel_layout, "float8_e4m3fn"),
    "fp8-weights": partial(per_channel_layout, "float8_e4m3fn"),
    "int8": partial(per_channel_layout, "int8"),
    "int8-weights": partial(per_channel_layout, "int8"),
    "int4": int4_layout,
}
# The formats that this engine writes, as in `schemes.SCHEMES`.
FORMATS = {name: NumberFormat(name, layout) for name, layout in _LAYOUTS.items()}


def block_layout(kind: str, out: int, in_: int) -> Layout:
    """Return the part of a weight in GGUF's blocks, (out, bytes of a row) uint8; kind: a key of BLOCK_SIZES."""
    elements, size = BLOCK_SIZES[kind]
    if in_ % elements:
        raise ValueError(
            f"{kind} needs an input width that is a multiple of {elements}, found {in_}; take another file"
        )
    return {"weight": ((out, in_ // elements * size), "uint8")}


def coded_layout(codes: int, blocks: int, luts: int, out: int, in_: int) -> Layout:
    """Return the parts of a DFloat11 weight with so many bytes of codes, blocks of them and rows of luts."""
    return {
        "weight": ((out, in_), "uint8"),
        "codes": ((codes,), "uint8"),
        "gaps": ((GAP_BYTES * blocks,), "uint8"),
        "positions": ((blocks + 1,), "int64"),
        "luts": ((luts, 256), "uint8"),
    }


def dfloat11(codes: int, blocks: int, luts: int) -> NumberFormat:
    """Return the format of a DFloat11 layer, whose parts are of sizes of their own; see `coded_layout`."""
    return NumberFormat(DFLOAT11, partial(coded_layout, codes, blocks, luts))


def gguf(kind: str) -> NumberFormat:
    """Return the format of one of GGUF's block types; kind: a key of BLOCK_SIZES."""
    return NumberFormat(kind, partial(block_layout, kind))


def grouped(name: str, form: Form) -> NumberFormat:
    """Return the format of a form under the name that its producer gives it."""
    return NumberFormat(name, partial(form_layout, name, form), form)


def form_layout(name: str, form: Form, out: int, in_: int) -> Layout:
    """Return the parts in the order in which they act; raises ValueError for widths that do not fit."""
    unit = math.lcm(form.rotation or 1, 2 if form.codes == "uint8" else 1)
    if in_ % unit:
        raise ValueError(f"{name} needs an input width that is a multiple of {unit}, found {in_}; take another file")
    groups = -(-in_ // form.group) if form.group else 1
    half = form.codes == "uint8"
    parts: Layout = {"weight": ((out, in_ // 2 if half else in_), form.codes)}
    if half:
        parts["table"] = (1, 16), "float32"
    parts["scale"] = (out, groups), form.scale
    if form.channel:
        parts["channel"] = (out, 1), "float32"
    if form.offset is not None:
        parts["offset"] = (out, groups), form.offset
    if form.rotation:
        parts["rotation"] = (1, form.rotation, form.rotation), rotation_dtype(form.rotation)
    if form.column:
        parts["column"] = (1, in_), "float32"
    if form.rank:
        parts["up"] = (out, form.rank), form.low
        parts["down"] = (1, form.rank, in_), form.low
    return parts


def check_rotation(size: int) -> None:
    """Raise ValueError where there is no Hadamard rotation of so many inputs: it takes a power of two."""
    if size < 2 or size & (size - 1):
        raise ValueError(f"a rotation of {size} inputs at a time; needed a power of two")


def rotation_dtype(size: int) -> str:
    """Return the dtype of a rotation: bf16 for powers of four, whose entries are exact in it, else fp32."""
    return "bfloat16" if size.bit_length() % 2 == 1 else "float32"
