"""DFloat11's files: the layers of a block in one stream of codes, shown as the layers they are.

A group `layers.0` holds six tensors: `sign_mantissa` (a byte a number), `encoded_exponent`, `gaps`, `output_positions`
(uint32 as bytes), `luts`, and `split_positions`, where each layer but the first begins. The layers of a group and their
order are said by `dfloat11_config` in the folder's config.json; ComfyUI's single files have none, and are of the blocks
below. Nothing is copied: a layer's parts are views of the blocks of codes that its numbers are in, at most two of which
(of 4,096 bytes) belong to its neighbors too. See `kernels.dfloat11`.

Shapes are not stored. One side of a layer is its bias, or the width of the model, which a norm of the block has.

Source: `compress_model` of DFloat11 0.5, the `pattern_dict` of published Z-Image, ComfyUI and Qwen3 files.
"""

from __future__ import annotations

import math
import re
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from s3dit.kernels.number_format import (
    BLOCK_BYTES,
    FIRST_POINTER,
    GAP_BYTES,
    ITEM_BYTES,
    RUN_BYTES,
    NumberFormat,
    dfloat11,
)
from s3dit.weights.container import FLOATS, Checkpoint, Entry
from s3dit.weights.dialects import FUSED_LAYERS
from s3dit.weights.json_files import read_json
from s3dit.weights.lazy_torch import torch
from s3dit.weights.repack import DerivedTensors, Layer

if TYPE_CHECKING:
    from torch import Tensor

CODES, CONFIG = "encoded_exponent", "dfloat11_config"
BYTES = ("sign_mantissa", CODES, "gaps", "output_positions")
# The layers of a block by a tensor that such a block has; those of a context refiner lack the last.
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
BLOCKS = {
    "attention.norm_q": ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", *FEED_FORWARD),
    "attention.q_norm": ("attention.qkv", "attention.out", *FEED_FORWARD),
    "self_attn.q_norm": (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj",
    ),
}  # fmt: skip
# Norms whose width is that of the model, in a block or at the end; layers whose output, not input, has that width.
NORMS = ("attention_norm1", "input_layernorm")
LAST_NORMS = ("model.norm", "norm")
INWARD = ("attention.out", "attention.to_out.0", "feed_forward.w2", "self_attn.o_proj", "mlp.down_proj")


def layers(checkpoint: Checkpoint) -> Iterator[DerivedTensors]:
    """Yield the groups of a file; raises CheckpointError where their tensors do not fit one another."""
    patterns = _patterns(checkpoint)
    for key in checkpoint:
        if key.endswith(f".{CODES}"):
            yield _group(Layer(checkpoint, key.removesuffix(f".{CODES}")), patterns)


def config_of(path: Path) -> dict[str, Any]:
    """Return the dfloat11_config beside a checkpoint, empty where there is none."""
    try:
        data = read_json((path if path.is_dir() else path.parent) / "config.json")
    except FileNotFoundError:
        return {}
    config = data.get(CONFIG) if isinstance(data, dict) else None
    return config if isinstance(config, dict) else {}


def _patterns(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Return the layers of each kind of group, by its name with # for numbers; empty without a configuration."""
    config, where = config_of(checkpoint.path), Layer(checkpoint, CONFIG)
    if not config:
        return {}
    runs = config.get("threads_per_block"), config.get("bytes_per_thread")
    if runs != ([512], 8):
        raise where.error(f"threads_per_block and bytes_per_thread are {str(runs)[:60]}; needed [512] and 8")
    patterns = config.get("pattern_dict")
    if not isinstance(patterns, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in patterns.values()
    ):
        raise where.error("its pattern_dict is no object of lists of names")
    # They are regular expressions, of which only this form is in use; none of a file is run.
    return {
        re.sub(r"\\d\+|\[0-9\]\+", "#", pattern).replace("\\.", "."): tuple(names)
        for pattern, names in patterns.items()
    }


class Span(NamedTuple):
    """The numbers of a stream that are a layer (out, in)."""

    first: int
    last: int
    out: int
    in_: int


def _group(group: Layer, patterns: dict[str, tuple[str, ...]]) -> DerivedTensors:
    """Return the layers of a group, checked against one another; reads what says where codes are."""
    for leaf in BYTES:
        if len(shape := group.require(leaf, ("uint8",))) != 1:
            raise group.error(f"{leaf} is {list(shape)}; needed a vector")
    sizes = {leaf: group.checkpoint.entry(group.key(leaf)).nbytes for leaf in BYTES}
    tables, starts, spans = _checked_luts(group), _starts(group, sizes), _spans(group, patterns, sizes["sign_mantissa"])
    formats: dict[str, NumberFormat] = {}
    entries: dict[str, Entry] = {}
    for name, span in spans.items():
        run = _blocks(starts, span)
        end = min(BLOCK_BYTES * run.stop + RUN_BYTES, sizes[CODES])
        formats[name] = dfloat11(end - BLOCK_BYTES * run.start, len(run), tables)
        for part, (shape, dtype) in formats[name].layout(span.out, span.in_).items():
            entries[f"{name}.{part}"] = Entry(shape, dtype, math.prod(shape) * ITEM_BYTES[dtype])

    def make() -> dict[str, Tensor]:
        signs, codes, gaps = (group(leaf) for leaf in BYTES[:3])
        luts = group("luts").clone()
        made: dict[str, Tensor] = {}
        for name, span in spans.items():
            run = _blocks(starts, span)
            parts = {
                "weight": signs[span.first : span.last].view(span.out, span.in_),
                "codes": codes[BLOCK_BYTES * run.start : BLOCK_BYTES * run.stop + RUN_BYTES],
                "gaps": gaps[GAP_BYTES * run.start : GAP_BYTES * run.stop],
                "positions": torch.tensor(starts[run.start : run.stop + 1], device="cpu") - span.first,
                "luts": luts,
            }
            made |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        return made

    taken = [*BYTES, "luts", *(["split_positions"] if group.has("split_positions") else [])]
    return DerivedTensors(entries, tuple(map(group.key, taken)), make, formats)


def _spans(group: Layer, patterns: dict[str, tuple[str, ...]], count: int) -> dict[str, Span]:
    """Return the layers of a group of so many numbers, by full name."""
    bounds = [0, *_splits(group), count]
    if any(a >= b for a, b in pairwise(bounds)):
        raise group.error(f"split_positions are not in order between 0 and {count:,}")
    names = _names(group, patterns)
    if len(names) != len(bounds) - 1:
        raise group.error(f"{len(bounds) - 1} layers by its split_positions; needed {len(names)} ({', '.join(names)})")
    spans: dict[str, Span] = {}
    for name, (first, last) in zip(names, pairwise(bounds), strict=True):
        spans |= _layers_in(group, name, first, last)
    return spans


def _blocks(starts: list[int], span: Span) -> range:
    """Return the blocks of codes that hold the numbers of a span."""
    return range(bisect_right(starts, span.first) - 1, bisect_left(starts, span.last))


def _checked_luts(group: Layer) -> int:
    """Return the rows of luts of a group, checked: a damaged table would send a decoder anywhere."""
    shape = group.require("luts", ("uint8",))
    most = 256 - FIRST_POINTER + 2
    if len(shape) != 2 or shape[1] != 256 or not 2 <= shape[0] <= most:
        raise group.error(f"luts are {list(shape)}; needed 2 to {most} rows of 256")
    luts = group.checkpoint.raw(group.key("luts"))
    tables, lengths = luts[:-256], luts[-256:]
    if (pointed := max((256 - value for value in tables if value >= FIRST_POINTER), default=0)) > shape[0] - 2:
        raise group.error(f"luts name a table {pointed}; needed one below {shape[0] - 1}")
    if max(lengths) > 32:
        raise group.error(f"luts hold a code of {max(lengths)} bits; needed 32 at most")
    return shape[0]


def _starts(group: Layer, sizes: dict[str, int]) -> list[int]:
    """Return the first number of every block of codes, and how many there are in all."""
    count = sizes["sign_mantissa"]
    blocks = -(-sizes[CODES] // BLOCK_BYTES)
    if sizes["output_positions"] % 4 or sizes["gaps"] != GAP_BYTES * blocks or not count:
        raise group.error(f"{sizes['gaps']:,} bytes of gaps for {blocks:,} blocks of codes and {count:,} numbers")
    raw = group.checkpoint.raw(group.key("output_positions"))
    starts = list(struct.unpack(f"<{len(raw) // 4}I", raw))
    # The last block may hold but the end of the stream.
    if len(starts) - 1 not in (blocks, blocks - 1) or len(starts) < 2:
        raise group.error(f"{len(starts):,} output_positions; needed {blocks + 1:,}")
    if starts[0] != 0 or starts[-1] != count or any(a > b for a, b in pairwise(starts)):
        raise group.error(f"output_positions are not in order from 0 to {count:,}")
    return starts


def _splits(group: Layer) -> list[int]:
    """Return where each layer of a group but the first begins."""
    if not group.has("split_positions"):
        return []
    if len(group.require("split_positions", ("int64",))) != 1:
        raise group.error("split_positions are no vector")
    raw = group.checkpoint.raw(group.key("split_positions"))
    return list(struct.unpack(f"<{len(raw) // 8}q", raw))


def _names(group: Layer, patterns: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the layers of a group in the order of its stream, "" for a group that is a layer itself."""
    if patterns:
        kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", group.name)
        if (names := patterns.get(kind, patterns.get(group.name))) is None:
            raise group.error(f"no pattern of dfloat11_config names {kind}")
        return names or ("",)
    if not group.has("split_positions") or not _splits(group):
        return ("",)
    names = next((names for norm, names in BLOCKS.items() if group.has(f"{norm}.weight")), ())
    if not names:
        raise group.error("a group of layers that is no block of Z-Image or Qwen3, without a dfloat11_config")
    return names if group.has(f"{names[-1]}.bias") or "mlp.down_proj" in names else names[:-1]


def _layers_in(group: Layer, name: str, first: int, last: int) -> dict[str, Span]:
    """Return the layer that some numbers of a group are, or the layers that are fused in it, by full name."""
    width = _width(group, name)
    rest = (last - first) // width
    if (last - first) % width:
        raise group.error(f"{name or 'it'} has {last - first:,} numbers; needed a multiple of {width:,}")
    has_bias = group.has(f"{name}.bias".removeprefix("."))
    out, in_ = (width, rest) if name in INWARD or has_bias else (rest, width)
    pieces = FUSED_LAYERS.get(name, (name,))
    if out % len(pieces):
        raise group.error(f"{name} has {out:,} rows; needed a multiple of {len(pieces)}")
    rows = out // len(pieces)
    starts = range(first, last, rows * in_)
    return {
        f"{group.name}.{piece}".removesuffix("."): Span(start, start + rows * in_, rows, in_)
        for piece, start in zip(pieces, starts, strict=True)
    }


def _width(group: Layer, name: str) -> int:
    """Return the side of a layer that is known: of its bias, or the model's."""
    beside = [group.key(f"{name}.bias".removeprefix(".")), *(group.key(f"{norm}.weight") for norm in NORMS)]
    for key in (*beside, *(f"{norm}.weight" for norm in LAST_NORMS)):
        if key in group.checkpoint:
            entry = group.checkpoint.entry(key)
            if len(entry.shape) != 1 or entry.dtype not in FLOATS or not entry.shape[0]:
                raise group.error(f"{key} is {list(entry.shape)}; needed a vector of floats")
            return entry.shape[0]
    raise group.error(f"nothing says the shape of {name or 'it'}; needed its bias, or a norm of the block")
