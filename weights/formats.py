"""Number formats as files store them: which layers of a checkpoint are quantized, by which Scheme.

`recognize_formats` detects them by a checkpoint's names, dtypes and metadata, and by the configuration beside it, never
by the file's name, and returns the checkpoint with its `formats`. Where a producer stores other tensors than the
format has, a view (`repack.RepackedView`) derives the format's tensors, layer by layer, when they are loaded. Each
producer has a module: `comfy`, `libraries`, `sdnq`, `nunchaku`, `dfloat11`; GGUF's blocks and fp8 without scales are
here.

The names of layers are the file's own here; `keymap` makes them official afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from s3dit.errors import CheckpointError
from s3dit.kernels.number_format import BLOCK_SIZES, FORMATS, NumberFormat, gguf
from s3dit.weights import comfy, dfloat11, libraries, nunchaku, sdnq
from s3dit.weights.container import FLOATS, Checkpoint, Entry
from s3dit.weights.gguf_file import GGUFFile
from s3dit.weights.json_files import read_json
from s3dit.weights.lazy_torch import torch
from s3dit.weights.mapped_file import give_back
from s3dit.weights.repack import DerivedTensors, Layer, RepackedView, upcast_tensor

if TYPE_CHECKING:
    from torch import Tensor

# Layers that are too sensitive for a format are given another one, whose weights are int8.
FINER_SCHEMES = {"int4": "int8-weights"}
# Bytes of a weight whose scales are looked at before its pages are given back.
CHECKED_BYTES = 1 << 24
FP8 = ("float8_e4m3fn", "float8_e5m2")
MLX = (
    "is in the form of Apple's MLX (made by mflux or mlx), which this engine does not read; take the same model as "
    "safetensors or GGUF"
)


def recognize_formats(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the number formats of its layers; raises CheckpointError for unsupported formats."""
    _refuse_mlx(checkpoint)
    _refuse_named(checkpoint)
    if "scheme" in checkpoint.metadata:
        checkpoint.formats = _own_formats(checkpoint)
        return checkpoint
    if isinstance(checkpoint, GGUFFile):
        made = list(_gguf_layers(checkpoint))
        return RepackedView(checkpoint, made) if made else checkpoint
    if all(checkpoint.entry(name).dtype in FLOATS for name in checkpoint):
        return checkpoint
    made = list(_marked_layers(checkpoint))
    taken = {name for derived in made for name in derived.sources} | set(comfy.markers(checkpoint))
    made += libraries.row_scaled_layers(checkpoint, taken)
    taken |= {name for derived in made for name in derived.sources}
    made += _unscaled_fp8(checkpoint, taken)
    _refuse_rest(checkpoint, taken)
    return RepackedView(checkpoint, made, comfy.markers(checkpoint))


def _refuse_mlx(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for MLX's files, whose packed weights are uint32, under names of their own."""
    quantized = any(key.endswith(".biases") and f"{key[:-7]}.scales" in checkpoint for key in checkpoint)
    if quantized or "mflux_version" in checkpoint.metadata:
        raise CheckpointError(f"{checkpoint.path}: {MLX}")


# Formats that are known and not read, by ends of keys that no other format has.
UNREAD_FORMATS = (
    ("GPTQ", r"\.g_idx$"),
    ("AWQ", r"\.qzeros$"),
    ("compressed-tensors", r"\.weight_packed$"),
    ("ModelOpt", r"\._?(?:input|weight)_quantizer\."),
    # Before DFloat11, which is one of its methods.
    ("EntroPack", r"\.weight\._entropack\."),
    ("quanto", r"\.weight\._(?:data|scale)$"),
    ("HQQ", r"\.W_q$"),
    ("AQLM", r"\.codebooks$"),
)
# What stands beside the halves of bytes of NVFP4, in the forms that are not ComfyUI's.
NVFP4 = ("weight_scale_2", "weight_global_scale", "input_global_scale")


def _refuse_named(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a number format that is known by its keys and not supported."""
    names = "\n".join(checkpoint)
    name = next((name for name, pattern in UNREAD_FORMATS if re.search(pattern, names, re.MULTILINE)), None)
    if name is None and comfy.QUANTIZATION_METADATA not in checkpoint.metadata:
        packed = (key[:-7] for key in checkpoint if key.endswith(".weight") and f"{key}_scale" in checkpoint)
        if any(
            checkpoint.entry(f"{layer}.weight").dtype == "uint8"
            and f"{layer}.comfy_quant" not in checkpoint
            and any(f"{layer}.{leaf}" in checkpoint for leaf in NVFP4)
            for layer in packed
        ):
            name = "NVFP4 in the form of ModelOpt or LightX2V"
    if name is not None:
        raise CheckpointError(_unsupported_error(checkpoint, name))


def _unsupported_error(checkpoint: Checkpoint, name: str) -> str:
    return (
        f"{checkpoint.path}: {name} is a number format that this engine does not read; needed bf16, or a format of "
        "ComfyUI, nunchaku, bitsandbytes, torchao, SDNQ or GGUF; take the bf16 files and --quantize int4 or fp8"
    )


# Who writes tensors of these names, by the ends of their keys.
PRODUCER_MARKS = (
    ("bitsandbytes", r"\.quant_state\.bitsandbytes__\w+$|\.SCB$"),
    ("torchao", r"\._weight_qdata$"),
    ("ComfyUI (comfy_quant)", r"\.comfy_quant$"),
    ("ComfyUI (scaled fp8)", r"\.scale_weight$|(?:^|\.)scaled_fp8$"),
    ("nunchaku", r"\.wscales$"),
    ("DFloat11", r"\.encoded_exponent$"),
    ("SDNQ", r"\.(?:svd_up|zero_point)$"),
    ("vLLM or SGLang (fp8 in blocks)", r"\.weight_scale_inv$"),
    ("a quantizer that keeps a scale a row", r"\.weight_scale$"),
)


def producer(checkpoint: Checkpoint) -> str:
    """Return the program that quantized a checkpoint, given as stored, by its metadata and keys; "" if unknown.

    Formats that are only refused have a producer too.
    """
    if "scheme" in checkpoint.metadata:
        return "s3dit"
    if comfy.QUANTIZATION_METADATA in checkpoint.metadata:
        return "ComfyUI (comfy_quant)"
    if isinstance(checkpoint, GGUFFile):
        return checkpoint.metadata.get("general.quantized_by", "") or "GGUF"
    names = "\n".join(checkpoint)
    marked = (name for name, pattern in (*UNREAD_FORMATS, *PRODUCER_MARKS) if re.search(pattern, names, re.MULTILINE))
    method = _quantization_config(checkpoint).get("quant_method")
    return "SDNQ" if method in ("sdnq", "sdnq_training") else next(marked, "")


def _own_formats(checkpoint: Checkpoint) -> dict[str, NumberFormat]:
    """Return the formats of a file of `s3dit quantize`: metadata names the format, dtypes show its layers."""
    name = checkpoint.metadata["scheme"]
    if name not in FORMATS:
        raise CheckpointError(
            f"{checkpoint.path}: its metadata says scheme {name!r}; needed {', '.join(FORMATS)} or plain floats; take "
            "the unquantized files, or a newer s3dit"
        )
    finer = FORMATS[FINER_SCHEMES.get(name, name)]
    dtypes = {key.removesuffix(".weight"): checkpoint.entry(key).dtype for key in checkpoint if key.endswith(".weight")}
    return {
        layer: finer if dtype == "int8" else FORMATS[name] for layer, dtype in dtypes.items() if dtype not in FLOATS
    }


def _marked_layers(checkpoint: Checkpoint) -> Iterator[DerivedTensors]:
    """Yield the layers of every producer that marks its layers."""
    yield from comfy.layers(checkpoint)
    yield from libraries.layers(checkpoint)
    yield from nunchaku.layers(checkpoint)
    yield from dfloat11.layers(checkpoint)
    config = _quantization_config(checkpoint)
    if config.get("quant_method") in ("sdnq", "sdnq_training"):
        yield from sdnq.layers(checkpoint, config)


def _quantization_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the quantization_config in the folder of a checkpoint, empty where there is none."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for name, key in (("config.json", "quantization_config"), ("quantization_config.json", None)):
        try:
            data = read_json(folder / name)
        except FileNotFoundError:
            continue
        config = data.get(key) if key is not None and isinstance(data, dict) else data
        if isinstance(config, dict):
            return config
    return {}


def _unscaled_fp8(checkpoint: Checkpoint, taken: set[str]) -> Iterator[DerivedTensors]:
    """Yield tensors in fp8 without a scale: matrices with the scale 1; others are small and become bf16."""
    for name in checkpoint:
        dtype, shape = checkpoint.entry(name).dtype, checkpoint.entry(name).shape
        if name in taken or dtype not in FP8:
            continue
        layer = Layer(checkpoint, name.removesuffix(".weight"))
        if not name.endswith(".weight") or len(shape) != 2 or 0 in shape:
            yield upcast_tensor(checkpoint, name, "bfloat16")
            continue
        layer.require("weight", FP8)
        number_format = FORMATS["fp8-weights"] if dtype == FP8[0] else comfy.e5m2
        yield layer.derive(number_format, *shape, make=_with_unit_scale(layer, shape[0]), views=["weight"])


def _with_unit_scale(layer: Layer, out: int) -> Callable[[], dict[str, Tensor]]:
    """Return how to load a stored weight with the scale 1."""
    return lambda: {"weight": layer("weight"), "scale": torch.ones(out, 1, dtype=torch.float32, device="cpu")}


def _refuse_rest(checkpoint: Checkpoint, taken: set[str]) -> None:
    """Raise CheckpointError for weights that are neither floats nor in a format that is known."""
    known = (*FLOATS, *FP8, "float64")
    rest = [
        name
        for name in checkpoint
        if name not in taken and name.endswith(("weight", "bias")) and checkpoint.entry(name).dtype not in known
    ]
    if rest:
        what = checkpoint.entry(rest[0]).dtype
        raise CheckpointError(
            f"{checkpoint.path}: {len(rest)} weights are in no number format that is known, the first is {rest[0]} "
            f"({what}); needed floats, or a format of ComfyUI, nunchaku, bitsandbytes, torchao, SDNQ or s3dit, with "
            "its config.json beside it; take other files of the model"
        )


def _gguf_layers(checkpoint: GGUFFile) -> Iterator[DerivedTensors]:
    """Yield GGUF's tensors in blocks: matrices of layers as they are stored, others decoded to fp32."""
    for name, kind in checkpoint.ggml_types.items():
        if kind not in BLOCK_SIZES:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is in GGUF's {kind}; needed one of {', '.join(BLOCK_SIZES)} or floats; "
                "take a file of another type"
            )
        shape, layer = checkpoint.shapes[name], Layer(checkpoint, name.removesuffix(".weight"))
        if name.endswith(".weight") and len(shape) == 2 and 0 not in shape:
            layer.require("weight", ("uint8",))
            yield layer.derive(gguf(kind), *shape, make=_checked_blocks(layer, kind), views=["weight"])
        else:
            entry = Entry(shape, "float32", 4 * math.prod(shape))
            yield DerivedTensors({name: entry}, (name,), _decoded_tensor(checkpoint, name, kind))


def _checked_blocks(layer: Layer, kind: str) -> Callable[[], dict[str, Tensor]]:
    """Return how to load blocks as they are stored, once their scales were checked."""

    checked = False

    def make() -> dict[str, Tensor]:
        from s3dit.kernels.gguf import block_scales

        nonlocal checked
        weight = layer("weight")
        if not checked:
            # A vocabulary is large: it is not in memory as a whole, here neither.
            for rows in weight.split(max(1, CHECKED_BYTES // weight.shape[1])):
                layer.check_finite("weight", block_scales(kind, rows))
                give_back(rows)
        checked = True
        return {"weight": weight}

    return make


def _decoded_tensor(checkpoint: GGUFFile, name: str, kind: str) -> Callable[[], dict[str, Tensor]]:
    """Return how to load a tensor in blocks that is not a layer, decoded."""

    def make() -> dict[str, Tensor]:
        from s3dit.kernels.gguf import GGUF

        blocks, shape = checkpoint.load(name), checkpoint.shapes[name]
        if not blocks.numel():
            return {name: torch.empty(shape, dtype=torch.float32, device="cpu")}
        decoded = GGUF[kind].decode({"weight": blocks.reshape(-1, blocks.shape[-1])})
        Layer(checkpoint, name).check_finite("", decoded)
        return {name: decoded.view(shape)}

    return make
