"""ComfyUI's number formats: scaled fp8 in its old and new form, and the layouts that `comfy_quant` names.

The new form states the format of each layer by name, in the header's metadata or in a small tensor of JSON beside the
weight; the old form has `scale_weight` beside an fp8 weight, and a marker `scaled_fp8` for the whole file. Scales that
serve only to round activations (`input_scale`) are ignored: activations are not rounded here.

Source: ComfyUI's quant_ops.py and ops.py, and the layouts of comfy-kitchen, which the tests write files with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from s3dit.errors import CheckpointError
from s3dit.kernels.number_format import FORMATS, Form, check_rotation, grouped
from s3dit.weights.container import FLOATS, Checkpoint, Entry
from s3dit.weights.json_files import parse_json
from s3dit.weights.lazy_torch import torch
from s3dit.weights.repack import DerivedTensors, Layer, row_scale_shapes, row_scales, swap_nibbles

if TYPE_CHECKING:
    from torch import Tensor

E4M3, E5M2, E8M0 = "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"
QUANTIZATION_METADATA = "_quantization_metadata"
# What only the rounding of activations needs.
ACTIVATIONS = ("input_scale", "scale_input")
# Values of four bits: two's complement, around 8, from 0, and e2m1.
SIGNED = (*range(8), *range(-8, 0))
CENTERED = tuple(range(-8, 8))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def table_part(values: tuple[float, ...]) -> Tensor:
    """Return the part `table`, (1, 16) fp32, of these 16 values."""
    return torch.tensor([values], dtype=torch.float32, device="cpu")


def layers(checkpoint: Checkpoint) -> Iterator[DerivedTensors]:
    """Yield the quantized layers of a file in either form; raises CheckpointError for an unknown format."""
    for name, config in _configs(checkpoint).items():
        layer = Layer(checkpoint, name)
        layer.ignore("comfy_quant")
        kind = config.get("format")
        if not isinstance(kind, str) or kind not in COMFY_FORMATS:
            raise layer.error(f"its format is {kind!r}; needed one of {', '.join(COMFY_FORMATS)}")
        layer.ignore(*ACTIVATIONS)
        made = COMFY_FORMATS[kind](layer, config)
        yield _cropped(layer, made, config["orig_shape"]) if "orig_shape" in config else made
    for key in checkpoint:
        if key.endswith(".scale_weight"):
            yield scaled_layer(Layer(checkpoint, key.removesuffix(".scale_weight")), "scale_weight", ACTIVATIONS)


def markers(checkpoint: Checkpoint) -> list[str]:
    """Return the names of tensors that only mark the whole file as scaled fp8."""
    return [key for key in checkpoint if key.rpartition(".")[2] == "scaled_fp8"]


def _configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Read the configuration of each layer from metadata and tensors; a layer's own tensor comes first."""
    configs: dict[str, dict[str, Any]] = {}
    if QUANTIZATION_METADATA in checkpoint.metadata:
        data = _json(checkpoint, QUANTIZATION_METADATA, checkpoint.metadata[QUANTIZATION_METADATA])
        listed = data.get("layers", {})
        if not isinstance(listed, dict) or not all(isinstance(config, dict) for config in listed.values()):
            raise CheckpointError(
                f"{checkpoint.path}: {QUANTIZATION_METADATA} has no table of layers, which it needs; download the file "
                "again"
            )
        configs |= listed
    for key in checkpoint:
        if key.endswith(".comfy_quant"):
            name = key.removesuffix(".comfy_quant")
            if checkpoint.entry(key).nbytes > 1 << 16:
                raise CheckpointError(f"{checkpoint.path}: {key} is no line of JSON; download the file again")
            configs[name] = _json(checkpoint, key, checkpoint.raw(key))
    return {name: config | _or_empty(config.get("params")) for name, config in configs.items()}


def _or_empty(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(checkpoint: Checkpoint, where: str, text: str | bytes) -> dict[str, Any]:
    """Parse JSON of a file that must be an object; raises CheckpointError."""
    try:
        data = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {where} is not JSON ({error}); download the file again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{checkpoint.path}: {where} is no JSON object; download the file again")
    return data


def _number(layer: Layer, config: dict[str, Any], key: str, default: int) -> int:
    """Return an integer of a layer's configuration, at least 2; raises CheckpointError."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise layer.error(f"{key} is {value!r}; needed a number of inputs")
    return value


def _rotated(layer: Layer, config: dict[str, Any]) -> int:
    """Return how many inputs of a layer were rotated together; raises CheckpointError."""
    size = _number(layer, config, "convrot_groupsize", 256)
    try:
        check_rotation(size)
    except ValueError as error:
        raise layer.error(str(error)) from None
    return size


def rotation_part(size: int) -> Tensor:
    """Return the part `rotation` of so many inputs, (1, size, size)."""
    from s3dit.kernels.grouped import hadamard

    return hadamard(size)


def scaled_layer(layer: Layer, scale: str, unused: tuple[str, ...] = ()) -> DerivedTensors:
    """Return an 8-bit layer with a scale, or a scale a row, in the tensor `scale`.

    unused: tensors of the layer to ignore. Raises CheckpointError where shapes or dtypes do not fit.
    """
    out, in_ = layer.matrix("weight", (E4M3, E5M2, "int8"))
    layer.require(scale, FLOATS, *row_scale_shapes(out))
    layer.ignore(*unused)
    dtype = layer.checkpoint.entry(layer.key("weight")).dtype
    number_format = {E4M3: FORMATS["fp8-weights"], "int8": FORMATS["int8-weights"]}.get(dtype, e5m2)

    def make() -> dict[str, Tensor]:
        return {"weight": layer("weight"), "scale": row_scales(layer(scale), out)}

    return layer.derive(number_format, out, in_, make, ["weight"])


e5m2 = grouped("fp8-e5m2", Form(E5M2))


def _float8(layer: Layer, config: dict[str, Any]) -> DerivedTensors:
    dtype = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}[config["format"]]
    layer.matrix("weight", (dtype,))
    return scaled_layer(layer, "weight_scale")


def _int8(layer: Layer, config: dict[str, Any]) -> DerivedTensors:
    if not config.get("convrot"):
        layer.matrix("weight", ("int8",))
        return scaled_layer(layer, "weight_scale")
    out, in_ = layer.matrix("weight", ("int8",))
    layer.require("weight_scale", FLOATS, *row_scale_shapes(out))
    rotation = _rotated(layer, config)
    return layer.derive(
        grouped("int8-convrot", Form("int8", rotation=rotation)),
        out,
        in_,
        lambda: {
            "weight": layer("weight"),
            "scale": row_scales(layer("weight_scale"), out),
            "rotation": rotation_part(rotation),
        },
        ["weight"],
    )


def unswizzle(scale: Tensor, out: int, groups: int) -> Tensor:
    """Reorder block scales from the tiles of 128 x 4 that tensor cores read -> (out, groups)."""
    tiles = scale.view(-1, -(-groups // 4), 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1, 4 * -(-groups // 4))[:out, :groups]


def _block_scales(layer: Layer, out: int, in_: int, group: int, dtype: str) -> Callable[[], Tensor]:
    """Return how to load scales of blocks, in tiles or, where the shape shows it, in rows -> (out, in / group).

    Where both have one shape, as in all of Z-Image, ComfyUI's are tiles.
    """
    if in_ % group:
        raise layer.error(f"weight has {in_} columns; needed a multiple of {group}")
    groups = in_ // group
    tiled, flat = (-(-out // 128) * 128, -(-groups // 4) * 4), (out, groups)
    shape = layer.require("weight_scale", (dtype, "uint8"), tiled, flat)

    def make() -> Tensor:
        scale = layer("weight_scale")
        bits = scale.contiguous().view(torch.uint8)
        return (unswizzle(bits, out, groups).contiguous() if shape == tiled else bits).view(getattr(torch, dtype))

    return make


def _cropped(layer: Layer, made: DerivedTensors, shape: Any) -> DerivedTensors:
    """Return a layer without the padding that `orig_shape` states, as a float weight."""
    number_format, key = made.formats[layer.name], layer.key("weight")
    stored = layer.checkpoint.entry(key).shape
    stored = (stored[0], stored[1] * (1 if number_format.name == "mxfp8" else 2))
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)
    if number_format.name not in ("mxfp8", "nvfp4"):
        return made
    if not is_shape or not all(0 <= full - size < 128 and size > 0 for size, full in zip(shape, stored, strict=True)):
        raise layer.error(f"orig_shape is {str(shape)[:40]} and the weight {list(stored)}; needed one a little smaller")
    out, in_ = shape
    if (out, in_) == stored:
        return made

    def make() -> dict[str, Tensor]:
        from s3dit.kernels.schemes import scheme_of

        parts = {name.removeprefix(f"{layer.name}."): part for name, part in made.make().items()}
        return {key: scheme_of(number_format).decode(parts)[:out, :in_].contiguous()}

    return DerivedTensors({key: Entry((out, in_), "float32", 4 * out * in_)}, made.sources, make)


def _mxfp8(layer: Layer, config: dict[str, Any]) -> DerivedTensors:
    out, in_ = layer.matrix("weight", (E4M3,))
    scale = _block_scales(layer, out, in_, 32, E8M0)
    form = Form(E4M3, 32, E8M0)
    return layer.derive(
        grouped("mxfp8", form), out, in_, lambda: {"weight": layer("weight"), "scale": scale()}, ["weight"]
    )


def _nvfp4(layer: Layer, config: dict[str, Any]) -> DerivedTensors:
    out, half = layer.matrix("weight", ("uint8",))
    scale = _block_scales(layer, out, 2 * half, 16, E4M3)
    layer.require("weight_scale_2", FLOATS, (), (1,))
    column = layer.optional("pre_quant_scale", FLOATS, (2 * half,))

    def make() -> dict[str, Tensor]:
        parts = {
            "weight": swap_nibbles(layer("weight")),
            "table": table_part(E2M1),
            "scale": scale(),
            "channel": row_scales(layer("weight_scale_2"), out),
        }
        return parts | ({"column": layer("pre_quant_scale").float()[None]} if column else {})

    form = Form("uint8", 16, E4M3, channel=True, column=column)
    return layer.derive(grouped("nvfp4", form), out, 2 * half, make)


def _convrot4(layer: Layer, config: dict[str, Any]) -> DerivedTensors:
    out, half = layer.matrix("weight", ("int8",))
    layer.require("weight_scale", FLOATS, (out,), (out, 1))
    rotation = _rotated(layer, config)

    def make() -> dict[str, Tensor]:
        packed, scale = layer("weight").view(torch.uint8), row_scales(layer("weight_scale"), out)
        return {"weight": packed, "table": table_part(SIGNED), "scale": scale, "rotation": rotation_part(rotation)}

    form = Form("uint8", rotation=rotation)
    return layer.derive(grouped("convrot-w4a4", form), out, 2 * half, make)


def _asymmetric(layer: Layer, config: dict[str, Any]) -> DerivedTensors:
    """Return a layer of 4-bit codes that become int8 numbers before a row's scale is applied."""
    out, half = layer.matrix("weight", ("int8",))
    groups = layer.require("weight_s_rel", (E4M3, "float32"))[-1]
    group = _number(layer, config, "group_size", 16)
    if 2 * half != group * groups:
        raise layer.error(
            f"weight holds {2 * half} columns of 4 bits, weight_s_rel says {group * groups}; needed 4 bits"
        )
    layer.require("weight_s_rel", (E4M3, "float32"), (out, groups))
    layer.require("weight_s_channel", FLOATS, (out,), (out, 1))
    codebook = layer.optional("weight_codebook", FLOATS, (16,))
    offset = layer.optional("weight_correction", FLOATS, (groups, out))
    rotation = _rotated(layer, config)
    scale_dtype = layer.checkpoint.entry(layer.key("weight_s_rel")).dtype

    def make() -> dict[str, Tensor]:
        parts = {
            "weight": layer("weight").view(torch.uint8),
            "table": layer("weight_codebook").float()[None] if codebook else table_part(CENTERED),
            "scale": layer("weight_s_rel"),
            "channel": row_scales(layer("weight_s_channel"), out),
        }
        if offset:
            parts["offset"] = layer("weight_correction").float().T.contiguous()
        return parts | {"rotation": rotation_part(rotation)}

    form = Form(
        "uint8", group, scale_dtype, channel=True, offset="float32" if offset else None, rounded=True,
        rotation=rotation,
    )  # fmt: skip
    return layer.derive(grouped("asym-w4a8", form), out, 2 * half, make)


def _awq(layer: Layer, config: dict[str, Any]) -> DerivedTensors:
    out, half = layer.matrix("weight", ("int8", "uint8"))
    group = _number(layer, config, "group_size", 64)
    if 2 * half % group:
        raise layer.error(f"weight has {2 * half} columns; needed a multiple of {group}")
    shape = (2 * half // group, out)
    layer.require("weight_scale", FLOATS, shape)
    layer.require("weight_zeros", FLOATS, shape)
    scale, zeros = (layer.checkpoint.entry(layer.key(leaf)).dtype for leaf in ("weight_scale", "weight_zeros"))

    def make() -> dict[str, Tensor]:
        return {
            "weight": layer("weight").view(torch.uint8),
            "table": table_part(CENTERED),
            "scale": layer("weight_scale").T.contiguous(),
            "offset": layer("weight_zeros").T.contiguous(),
        }

    return layer.derive(grouped("awq-w4a16", Form("uint8", group, scale, offset=zeros)), out, 2 * half, make)


COMFY_FORMATS: dict[str, Callable[[Layer, dict[str, Any]], DerivedTensors]] = {
    "float8_e4m3fn": _float8,
    "float8_e5m2": _float8,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "int8_tensorwise": _int8,
    "convrot_w4a4": _convrot4,
    "asym_w4a8_int8": _asymmetric,
    "awq_w4a16": _awq,
}
