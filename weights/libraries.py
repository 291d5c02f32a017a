"""Number formats of bitsandbytes, torchao, vLLM, SGLang and LightX2V.

bitsandbytes (NF4, FP4, double quantized or not, and LLM.int8), torchao's safetensors, block-scaled fp8 as vLLM and
SGLang write it, and a scale a row beside 8-bit weights (LightX2V). SDNQ has a module of its own.

Double quantized scales are decoded once, when a layer is read: 4.5 bits a weight instead of 4.13.

Source: each library's documentation and files; the tests write theirs with bitsandbytes and torchao themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from s3dit.errors import CheckpointError
from s3dit.kernels.number_format import FORMATS, Form, grouped
from s3dit.weights.comfy import scaled_layer
from s3dit.weights.container import FLOATS, Checkpoint
from s3dit.weights.json_files import parse_json
from s3dit.weights.lazy_torch import torch
from s3dit.weights.repack import DerivedTensors, Layer, row_scales, swap_nibbles

if TYPE_CHECKING:
    from torch import Tensor

E4M3 = "float8_e4m3fn"
FP8_BLOCK = 128
BNB_STATE = ".quant_state.bitsandbytes__"
# Weights that torchao stores in one matrix of 8-bit numbers.
TORCHAO = {"Float8Tensor": (E4M3, "float8_e5m2"), "Int8Tensor": ("int8",)}


def layers(checkpoint: Checkpoint) -> Iterator[DerivedTensors]:
    """Yield the quantized layers of these libraries in a file; raises CheckpointError where they are inconsistent."""
    for key in checkpoint:
        name, _, leaf = key.rpartition(".")
        if BNB_STATE in key and leaf.startswith("bitsandbytes__"):
            yield _four_bits(Layer(checkpoint, key.partition(BNB_STATE)[0].removesuffix(".weight")), key)
        elif leaf == "SCB":
            yield _eight_bits(Layer(checkpoint, name))
        elif leaf == "_weight_qdata":
            yield _torchao(Layer(checkpoint, name))
        elif leaf == "weight_scale_inv":
            yield _block_fp8(Layer(checkpoint, name))


def row_scaled_layers(checkpoint: Checkpoint, taken: set[str]) -> Iterator[DerivedTensors]:
    """Yield 8-bit layers with a scale a row in `weight_scale`, which no other format has taken."""
    for key in checkpoint:
        if key.endswith(".weight_scale") and key not in taken:
            yield scaled_layer(Layer(checkpoint, key.removesuffix(".weight_scale")), "weight_scale", ("input_scale",))


def _four_bits(layer: Layer, state: str) -> DerivedTensors:
    """Return a bitsandbytes layer: high half of a byte first, blocks along the flattened weight."""
    checkpoint, kind = layer.checkpoint, state.rpartition(".")[2]
    if checkpoint.entry(state).nbytes > 1 << 16:
        raise layer.error(f"{kind} is no line of JSON")
    try:
        state_values = parse_json(checkpoint.raw(state))
        (out, in_), block = state_values["shape"], state_values["blocksize"]
        nested = float(state_values["nested_offset"]) if "nested_offset" in state_values else None
        inner = int(state_values.get("nested_blocksize", 256))
    except (ValueError, TypeError, KeyError) as error:
        raise layer.error(f"its {kind} is not what bitsandbytes writes ({error})") from None
    if not all(isinstance(size, int) and size > 0 for size in (out, in_, block, inner)):
        raise layer.error(f"its {kind} says shape {state_values['shape']}, blocks of {block} and {inner}")
    if in_ % block:
        raise layer.error(f"blocks of {block} do not end with its rows of {in_}, which is not supported")
    count = out * in_ // block
    layer.require("weight", ("uint8",), (out * in_ // 2, 1), (1, out * in_ // 2))
    layer.require("weight.quant_map", ("float32",), (16,))
    layer.require("weight.absmax", ("float32",) if nested is None else ("uint8",), (count,))
    if nested is not None:
        layer.require("weight.nested_absmax", ("float32",), (-(-count // inner),))
        layer.require("weight.nested_quant_map", ("float32",), (256,))
    layer.ignore(f"weight.quant_state.{kind}")

    def make() -> dict[str, Tensor]:
        scale = layer("weight.absmax")
        if nested is not None:
            outer = layer("weight.nested_absmax").repeat_interleave(inner)[:count]
            scale = layer("weight.nested_quant_map")[scale.to(torch.int32)] * outer + nested
        packed = swap_nibbles(layer("weight")).view(out, in_ // 2)
        return {"weight": packed, "table": layer("weight.quant_map")[None], "scale": scale.view(out, -1)}

    name = kind.removeprefix("bitsandbytes__")
    return layer.derive(grouped(f"bnb-{name}", Form("uint8", block)), out, in_, make)


def _eight_bits(layer: Layer) -> DerivedTensors:
    """Return a layer of LLM.int8, where the largest magnitude of a row stands for 127."""
    out, in_ = layer.matrix("weight", ("int8",))
    layer.require("SCB", ("float32",), (out,))
    layer.ignore("weight_format")
    return layer.derive(
        FORMATS["int8-weights"],
        out,
        in_,
        lambda: {"weight": layer("weight"), "scale": row_scales(layer("SCB") / 127, out)},
        ["weight"],
    )


def _block_fp8(layer: Layer) -> DerivedTensors:
    """Return a layer with a scale for each block of 128 x 128, which is multiplied, in spite of its name."""
    out, in_ = layer.matrix("weight", (E4M3,))
    layer.require("weight_scale_inv", FLOATS, (-(-out // FP8_BLOCK), -(-in_ // FP8_BLOCK)))
    layer.ignore("input_scale")

    def make() -> dict[str, Tensor]:
        scale = layer("weight_scale_inv").float().repeat_interleave(FP8_BLOCK, 0)[:out]
        return {"weight": layer("weight"), "scale": scale}

    return layer.derive(grouped("fp8-block128", Form(E4M3, FP8_BLOCK)), out, in_, make)


def _torchao(layer: Layer) -> DerivedTensors:
    """Return a torchao layer: the class of its tensor, and the block that shares a scale, are in the metadata."""
    kind, block = _described(layer)
    if kind not in TORCHAO:
        raise layer.error(f"torchao's {kind}; needed {' or '.join(TORCHAO)}")
    out, in_ = layer.matrix("_weight_qdata", TORCHAO[kind])
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise layer.error(f"its block_size is {block}; needed rows and columns")
    tall, group = min(block[0], out), min(block[1], in_)
    if out % tall or in_ % group:
        raise layer.error(f"blocks of {block} do not fit {out} x {in_}")
    shape = (out // tall, in_ // group)
    layer.require("_weight_scale", FLOATS, shape)
    zero = layer.optional("_weight_zero_point", ("int8", "int32", "int64"), shape)
    # Symmetric weights store zeros; they are small, and read at once to detect the format without zeros.
    offset = zero and not layer.checkpoint.is_zero(layer.key("_weight_zero_point"))
    layer.ignore("_weight_act_quant_scale")

    def make() -> dict[str, Tensor]:
        scale = layer("_weight_scale").float().repeat_interleave(tall, 0)
        parts = {"weight": layer("_weight_qdata"), "scale": scale}
        if offset:
            parts["offset"] = -scale * layer("_weight_zero_point").float().repeat_interleave(tall, 0)
        return parts

    dtype = layer.checkpoint.entry(layer.key("_weight_qdata")).dtype
    plain = {E4M3: FORMATS["fp8-weights"], "int8": FORMATS["int8-weights"]}.get(dtype)
    if plain is not None and group == in_ and not offset:
        return layer.derive(plain, out, in_, make)
    form = Form(dtype, 0 if group == in_ else group, offset="float32" if offset else None)
    return layer.derive(grouped(f"torchao-{dtype}", form), out, in_, make)


def _described(layer: Layer) -> tuple[str, list[Any]]:
    """Return the class and the block of a weight from the metadata; raises CheckpointError."""
    key = layer.key("weight")
    try:
        description = parse_json(layer.checkpoint.metadata[key])
        return str(description["_type"]), list(
            description["_data"]["block_size"] if description["_type"] in TORCHAO else ()
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{layer.checkpoint.path}: the metadata does not describe {key} as torchao does ({error}); needed the file "
            "as torchao saved it"
        ) from None
