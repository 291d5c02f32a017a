"""Number formats as files store them: which layers of a checkpoint are quantized, how, and their parts as Schemes say.

`recognized` looks at a checkpoint's names, dtypes and metadata, and at the configuration beside it, never at the file's
name, and gives it back with its `schemes`. A producer whose tensors are not the parts that a Scheme names is shown
through a view (`stored.RepackedView`) that makes them so, one layer at a time, when they are asked for. A room each
knows the producers: `comfy`, `libraries`, `sdnq`, `nunchaku`; GGUF's blocks and plain fp8 are here.

The names of layers are the file's own here; `keymap` turns them into official ones afterwards.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from s3dit.errors import CheckpointError
from s3dit.kernels.fp8 import fp8_weights
from s3dit.kernels.gguf import GGUF, scales_of
from s3dit.kernels.scheme import Scheme
from s3dit.kernels.schemes import SCHEMES
from s3dit.weights import comfy, libraries, nunchaku, sdnq
from s3dit.weights.container import FLOATS, Checkpoint, Entry, read_json
from s3dit.weights.gguf_file import GGUFFile
from s3dit.weights.repack import DerivedTensors, Layer, RepackedView, widened

# Layers that are too sensitive for a format are given another one, whose weights are int8.
FINER = {"int4": "int8-weights"}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MLX = (
    "is in the form of Apple's MLX (made by mflux or mlx), which this engine does not read; take the same model as "
    "safetensors or GGUF"
)


def recognized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the number formats of its layers; raises CheckpointError for a format that is not known."""
    _refuse_mlx(checkpoint)
    _refuse_named(checkpoint)
    if "scheme" in checkpoint.metadata:
        checkpoint.schemes = _own(checkpoint)
        return checkpoint
    if isinstance(checkpoint, GGUFFile):
        made = list(_blocks(checkpoint))
        return RepackedView(checkpoint, made) if made else checkpoint
    if all(checkpoint.entry(name).dtype in FLOATS for name in checkpoint):
        return checkpoint
    made = list(_foreign(checkpoint))
    taken = {name for one in made for name in one.sources} | set(comfy.markers(checkpoint))
    made += libraries.by_row(checkpoint, taken)
    taken |= {name for one in made for name in one.sources}
    made += _cast(checkpoint, taken)
    _refuse_rest(checkpoint, taken)
    return RepackedView(checkpoint, made, comfy.markers(checkpoint))


def _refuse_mlx(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for MLX's files, whose packed weights are uint32, and names a dialect of their own."""
    quantized = any(key.endswith(".biases") and f"{key[:-7]}.scales" in checkpoint for key in checkpoint)
    if quantized or "mflux_version" in checkpoint.metadata:
        raise CheckpointError(f"{checkpoint.path}: {MLX}")


# Formats that are known and not read, by ends of keys that no other format has.
UNREAD = (
    ("GPTQ", r"\.g_idx$"),
    ("AWQ", r"\.qzeros$"),
    ("compressed-tensors", r"\.weight_packed$"),
    ("ModelOpt", r"\._?(?:input|weight)_quantizer\."),
    # Before DFloat11, which is one of its methods.
    ("EntroPack", r"\.weight\._entropack\."),
    ("DFloat11", r"\.encoded_exponent$|\.sign_mantissa$"),
    ("quanto", r"\.weight\._(?:data|scale)$"),
    ("HQQ", r"\.W_q$"),
    ("AQLM", r"\.codebooks$"),
)
# What stands beside the halves of bytes of NVFP4, in the forms that are not ComfyUI's.
NVFP4 = ("weight_scale_2", "weight_global_scale", "input_global_scale")


def _refuse_named(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a number format that can be told, and that nobody here reads."""
    names = "\n".join(checkpoint)
    name = next((name for name, pattern in UNREAD if re.search(pattern, names, re.MULTILINE)), None)
    if name is None and comfy.METADATA not in checkpoint.metadata:
        packed = (key[:-7] for key in checkpoint if key.endswith(".weight") and f"{key}_scale" in checkpoint)
        if any(
            checkpoint.entry(f"{layer}.weight").dtype == torch.uint8
            and f"{layer}.comfy_quant" not in checkpoint
            and any(f"{layer}.{leaf}" in checkpoint for leaf in NVFP4)
            for layer in packed
        ):
            name = "NVFP4 in the form of ModelOpt or LightX2V"
    if name is not None:
        raise CheckpointError(_unread(checkpoint, name))


def _unread(checkpoint: Checkpoint, name: str) -> str:
    return (
        f"{checkpoint.path}: {name} is a number format that this engine does not read; needed bf16, or a format of "
        "ComfyUI, nunchaku, bitsandbytes, torchao, SDNQ or GGUF; take the bf16 files and --quantize int4 or fp8"
    )


# Who writes tensors of these names, by the ends of their keys.
MARKS = (
    ("bitsandbytes", r"\.quant_state\.bitsandbytes__\w+$|\.SCB$"),
    ("torchao", r"\._weight_qdata$"),
    ("ComfyUI (comfy_quant)", r"\.comfy_quant$"),
    ("ComfyUI (scaled fp8)", r"\.scale_weight$|(?:^|\.)scaled_fp8$"),
    ("nunchaku", r"\.wscales$"),
    ("SDNQ", r"\.(?:svd_up|zero_point)$"),
    ("vLLM or SGLang (fp8 in blocks)", r"\.weight_scale_inv$"),
    ("a quantizer that keeps a scale a row", r"\.weight_scale$"),
)


def producer(checkpoint: Checkpoint) -> str:
    """Who quantized a checkpoint, given as stored, as its metadata and keys tell; empty where they do not.

    Formats that are named only to be refused are told too.
    """
    if "scheme" in checkpoint.metadata:
        return "s3dit"
    if comfy.METADATA in checkpoint.metadata:
        return "ComfyUI (comfy_quant)"
    if isinstance(checkpoint, GGUFFile):
        return checkpoint.metadata.get("general.quantized_by", "") or "GGUF"
    names = "\n".join(checkpoint)
    found = (name for name, pattern in (*UNREAD, *MARKS) if re.search(pattern, names, re.MULTILINE))
    method = _beside(checkpoint).get("quant_method")
    return "SDNQ" if method in ("sdnq", "sdnq_training") else next(found, "")


def _own(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """The layers of a file that `s3dit quantize` wrote: metadata says the format, dtypes which layers are in it."""
    name = checkpoint.metadata["scheme"]
    if name not in SCHEMES:
        raise CheckpointError(
            f"{checkpoint.path}: its metadata says scheme {name!r}; needed {', '.join(SCHEMES)} or plain floats; take "
            "the unquantized files, or a newer s3dit"
        )
    finer = SCHEMES[FINER.get(name, name)]
    dtypes = {key.removesuffix(".weight"): checkpoint.entry(key).dtype for key in checkpoint if key.endswith(".weight")}
    return {
        layer: finer if dtype == torch.int8 else SCHEMES[name] for layer, dtype in dtypes.items() if dtype not in FLOATS
    }


def _foreign(checkpoint: Checkpoint) -> Iterator[DerivedTensors]:
    """The layers of every producer that marks what it does."""
    yield from comfy.layers(checkpoint)
    yield from libraries.layers(checkpoint)
    yield from nunchaku.layers(checkpoint)
    config = _beside(checkpoint)
    if config.get("quant_method") in ("sdnq", "sdnq_training"):
        yield from sdnq.layers(checkpoint, config)


def _beside(checkpoint: Checkpoint) -> dict[str, Any]:
    """The quantization_config in the folder of a checkpoint, empty where there is none."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for name, key in (("config.json", "quantization_config"), ("quantization_config.json", None)):
        try:
            data = read_json(folder / name)
        except FileNotFoundError:
            continue
        found = data.get(key) if key is not None and isinstance(data, dict) else data
        if isinstance(found, dict):
            return found
    return {}


def _cast(checkpoint: Checkpoint, taken: set[str]) -> Iterator[DerivedTensors]:
    """Plain fp8, without a scale: matrices stay so, with the scale 1; anything else is small and becomes bf16."""
    for name in checkpoint:
        dtype, shape = checkpoint.entry(name).dtype, checkpoint.entry(name).shape
        if name in taken or dtype not in FP8:
            continue
        layer = Layer(checkpoint, name.removesuffix(".weight"))
        if not name.endswith(".weight") or len(shape) != 2 or 0 in shape:
            yield widened(checkpoint, name, torch.bfloat16)
            continue
        layer.need("weight", FP8)
        scheme = fp8_weights if dtype == FP8[0] else comfy.e5m2
        yield layer.made(scheme, *shape, make=_ones(layer, shape[0]))


def _ones(layer: Layer, out: int) -> Callable[[], dict[str, Tensor]]:
    """The weight as it lies, with the scale 1."""
    return lambda: {"weight": layer("weight"), "scale": torch.ones(out, 1, dtype=torch.float32, device="cpu")}


def _refuse_rest(checkpoint: Checkpoint, taken: set[str]) -> None:
    """Raise CheckpointError for weights that are no floats and that nobody knows."""
    known = (*FLOATS, *FP8, torch.float64)
    rest = [
        name
        for name in checkpoint
        if name not in taken and name.endswith(("weight", "bias")) and checkpoint.entry(name).dtype not in known
    ]
    if rest:
        what = str(checkpoint.entry(rest[0]).dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{checkpoint.path}: {len(rest)} weights are in no number format that is known, the first is {rest[0]} "
            f"({what}); needed floats, or a format of ComfyUI, nunchaku, bitsandbytes, torchao, SDNQ or s3dit, with "
            "its config.json beside it; take other files of the model"
        )


def _blocks(checkpoint: GGUFFile) -> Iterator[DerivedTensors]:
    """GGUF's tensors in blocks: matrices of layers as they lie, others decoded to fp32."""
    for name, kind in checkpoint.ggml_types.items():
        if kind not in GGUF:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is in GGUF's {kind}; needed one of {', '.join(GGUF)} or floats; take a "
                "file of another type"
            )
        shape, layer = checkpoint.shapes[name], Layer(checkpoint, name.removesuffix(".weight"))
        if name.endswith(".weight") and len(shape) == 2 and 0 not in shape:
            layer.need("weight", (torch.uint8,))
            yield layer.made(GGUF[kind], *shape, make=_stored(layer, kind))
        else:
            entry = Entry(shape, torch.float32, 4 * math.prod(shape))
            yield DerivedTensors({name: entry}, (name,), _plain(checkpoint, name, kind))


def _stored(layer: Layer, kind: str) -> Callable[[], dict[str, Tensor]]:
    """The blocks as they lie in the file, once their scales were looked at."""

    good = False

    def make() -> dict[str, Tensor]:
        nonlocal good
        weight = layer("weight")
        if not good:
            layer.numbers("weight", scales_of(kind, weight))
        good = True
        return {"weight": weight}

    return make


def _plain(checkpoint: GGUFFile, name: str, kind: str) -> Callable[[], dict[str, Tensor]]:
    """A tensor in blocks that is no layer, decoded."""

    def make() -> dict[str, Tensor]:
        blocks, shape = checkpoint.load(name), checkpoint.shapes[name]
        if not blocks.numel():
            return {name: torch.empty(shape, dtype=torch.float32, device="cpu")}
        decoded = GGUF[kind].decode({"weight": blocks.reshape(-1, blocks.shape[-1])})
        Layer(checkpoint, name).numbers("", decoded)
        return {name: decoded.view(shape)}

    return make
