"""Number formats of the libraries that diffusers and the servers quantize with.

bitsandbytes (NF4, FP4, double quantized or not, and LLM.int8), torchao's safetensors, block-scaled fp8 as vLLM and
SGLang write it, and a scale a row beside 8-bit weights (LightX2V). SDNQ has a room of its own.

Double quantized scales are made plain once, when a layer is read: 4.5 bits a weight instead of 4.13.

Source: each library's documentation and files; the tests write theirs with bitsandbytes and torchao themselves.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from s3dit.errors import CheckpointError
from s3dit.kernels.fp8 import fp8_weights
from s3dit.kernels.grouped import Form, grouped
from s3dit.kernels.int8 import int8_weights
from s3dit.weights.comfy import scaled, text_of
from s3dit.weights.container import FLOATS, Checkpoint, parse_json
from s3dit.weights.repack import DerivedTensors, Layer, rows, swapped

E4M3 = torch.float8_e4m3fn
BLOCK = 128
STATE = ".quant_state.bitsandbytes__"
# Weights that torchao stores in one matrix of 8-bit numbers.
TORCHAO = {"Float8Tensor": (E4M3, torch.float8_e5m2), "Int8Tensor": (torch.int8,)}


def layers(checkpoint: Checkpoint) -> Iterator[DerivedTensors]:
    """The quantized layers of these libraries in a file; raises CheckpointError for what they cannot mean."""
    for key in checkpoint:
        name, _, leaf = key.rpartition(".")
        if STATE in key and leaf.startswith("bitsandbytes__"):
            yield _four_bits(Layer(checkpoint, key.partition(STATE)[0].removesuffix(".weight")), key)
        elif leaf == "SCB":
            yield _eight_bits(Layer(checkpoint, name))
        elif leaf == "_weight_qdata":
            yield _torchao(Layer(checkpoint, name))
        elif leaf == "weight_scale_inv":
            yield _blocks(Layer(checkpoint, name))


def by_row(checkpoint: Checkpoint, taken: set[str]) -> Iterator[DerivedTensors]:
    """8-bit weights with a scale a row, of which nothing else is said."""
    for key in checkpoint:
        if key.endswith(".weight_scale") and key not in taken:
            yield scaled(Layer(checkpoint, key.removesuffix(".weight_scale")), "weight_scale", ("input_scale",))


def _four_bits(layer: Layer, state: str) -> DerivedTensors:
    """bitsandbytes: high half of a byte first, blocks along the flattened weight."""
    checkpoint, kind = layer.checkpoint, state.rpartition(".")[2]
    if checkpoint.entry(state).nbytes > 1 << 16:
        raise layer.error(f"{kind} is no line of JSON")
    try:
        said = parse_json(text_of(checkpoint, state))
        (out, in_), block = said["shape"], said["blocksize"]
        nested = float(said["nested_offset"]) if "nested_offset" in said else None
        inner = int(said.get("nested_blocksize", 256))
    except (ValueError, TypeError, KeyError) as error:
        raise layer.error(f"its {kind} is not what bitsandbytes writes ({error})") from None
    if not all(isinstance(size, int) and size > 0 for size in (out, in_, block, inner)):
        raise layer.error(f"its {kind} says shape {said['shape']}, blocks of {block} and {inner}")
    if in_ % block:
        raise layer.error(f"blocks of {block} do not end with its rows of {in_}, which is not supported")
    count = out * in_ // block
    layer.need("weight", (torch.uint8,), (out * in_ // 2, 1), (1, out * in_ // 2))
    layer.need("weight.quant_map", (torch.float32,), (16,))
    layer.need("weight.absmax", (torch.float32,) if nested is None else (torch.uint8,), (count,))
    if nested is not None:
        layer.need("weight.nested_absmax", (torch.float32,), (-(-count // inner),))
        layer.need("weight.nested_quant_map", (torch.float32,), (256,))
    layer.drop(f"weight.quant_state.{kind}")

    def make() -> dict[str, Tensor]:
        scale = layer("weight.absmax")
        if nested is not None:
            outer = layer("weight.nested_absmax").repeat_interleave(inner)[:count]
            scale = layer("weight.nested_quant_map")[scale.to(torch.int32)] * outer + nested
        packed = swapped(layer("weight")).view(out, in_ // 2)
        return {"weight": packed, "table": layer("weight.quant_map")[None], "scale": scale.view(out, -1)}

    name = kind.removeprefix("bitsandbytes__")
    return layer.made(grouped(f"bnb-{name}", Form(torch.uint8, block)), out, in_, make)


def _eight_bits(layer: Layer) -> DerivedTensors:
    """LLM.int8: the largest magnitude of a row stands for 127."""
    out, in_ = layer.matrix("weight", (torch.int8,))
    layer.need("SCB", (torch.float32,), (out,))
    layer.drop("weight_format")
    return layer.made(
        int8_weights, out, in_, lambda: {"weight": layer("weight"), "scale": rows(layer("SCB") / 127, out)}
    )


def _blocks(layer: Layer) -> DerivedTensors:
    """A scale a block of 128 x 128, which multiplies, whatever its name says."""
    out, in_ = layer.matrix("weight", (E4M3,))
    layer.need("weight_scale_inv", FLOATS, (-(-out // BLOCK), -(-in_ // BLOCK)))
    layer.drop("input_scale")

    def make() -> dict[str, Tensor]:
        scale = layer("weight_scale_inv").float().repeat_interleave(BLOCK, 0)[:out]
        return {"weight": layer("weight"), "scale": scale}

    return layer.made(grouped("fp8-block128", Form(E4M3, BLOCK)), out, in_, make)


def _torchao(layer: Layer) -> DerivedTensors:
    """A weight that torchao took apart: its class, and the block that shares a scale, stand in the metadata."""
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
    layer.need("_weight_scale", FLOATS, shape)
    zero = layer.maybe("_weight_zero_point", (torch.int8, torch.int32, torch.int64), shape)
    # Symmetric weights store zeros; few bytes, so that the plain format can be told at once.
    offset = zero and bool(layer("_weight_zero_point").any())
    layer.drop("_weight_act_quant_scale")

    def make() -> dict[str, Tensor]:
        scale = layer("_weight_scale").float().repeat_interleave(tall, 0)
        parts = {"weight": layer("_weight_qdata"), "scale": scale}
        if offset:
            parts["offset"] = -scale * layer("_weight_zero_point").float().repeat_interleave(tall, 0)
        return parts

    dtype = layer.checkpoint.entry(layer.key("_weight_qdata")).dtype
    assert isinstance(dtype, torch.dtype)
    plain = {E4M3: fp8_weights, torch.int8: int8_weights}.get(dtype)
    if plain is not None and group == in_ and not offset:
        return layer.made(plain, out, in_, make)
    form = Form(dtype, 0 if group == in_ else group, offset=torch.float32 if offset else None)
    return layer.made(grouped(f"torchao-{str(dtype).removeprefix('torch.')}", form), out, in_, make)


def _described(layer: Layer) -> tuple[str, list[Any]]:
    """The class and the block of a weight, as the metadata says them."""
    key = layer.key("weight")
    try:
        said = parse_json(layer.checkpoint.metadata[key])
        return str(said["_type"]), list(said["_data"]["block_size"] if said["_type"] in TORCHAO else ())
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{layer.checkpoint.path}: the metadata does not describe {key} as torchao does ({error}); needed the file "
            "as torchao saved it"
        ) from None
