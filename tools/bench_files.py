"""Draw from full-size single files of other producers' formats, with random weights: seconds and peaks of memory.

    python tools/bench_files.py gguf         a Q4_K_M transformer (4.5 GB) and a Q8_0 Qwen3-4B, written by gguf-py
    python tools/bench_files.py int8         a ComfyUI int8 transformer (6.2 GB) with the same text encoder and VAE

Each draws a 256² picture in a process of its own, as a user would: `s3dit generate --transformer FILE --text-encoder
FILE --vae FILE --tokenizer DIR`. One JSON line each; 12 GB of disk under --folder.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from bench_machine import machine, watched
from safetensors.torch import save_file

from s3dit.configs.infer_config import TEXT_ENCODER, TRANSFORMER, VAE
from s3dit.model.text_encoder import TextEncoder
from s3dit.model.transformer import Transformer
from s3dit.model.vae import Autoencoder
from s3dit.runtime.embedded import EMBEDDED

COMFY = (
    ("all_x_embedder.2-1", "x_embedder"), ("all_final_layer.2-1", "final_layer"), ("to_out.0", "out"),
    ("norm_q", "q_norm"), ("norm_k", "k_norm"), ("to_q", "qkv"),
)  # fmt: skip
LLAMA = (
    ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("model.layers", "blk"),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"), ("self_attn.o_proj", "attn_output"),
    ("self_attn.", "attn_"), ("mlp.", "ffn_"), ("_proj", ""),
)  # fmt: skip
# Recipe Q4_K_M of the converter that most Z-Image files come from, by what a name ends in.
RECIPE = {"attention.qkv.weight": "Q5_K", "feed_forward.w2.weight": "Q6_K"}
# Where a block has its fp16 scales, in bytes; random bits there would be NaN now and then.
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,)}


def shapes(module: type[torch.nn.Module], config: Any, table: tuple[tuple[str, str], ...]) -> dict[str, list[int]]:
    """A full-size model's tensors under a producer's names; q, k and v as one where the table says so."""
    with torch.device("meta"):
        found = {name: list(tensor.shape) for name, tensor in module(config).state_dict().items()}
    if module is TextEncoder:
        # Read by rows straight from the file, so not in the module.
        found["model.embed_tokens.weight"] = [config.vocab_size, config.hidden_size]
    named = {}
    for name, shape in found.items():
        if table is COMFY and ("to_k" in name or "to_v" in name):
            continue
        shape = [3 * shape[0], shape[1]] if table is COMFY and "to_q" in name else shape
        for official, theirs in table:
            name = name.replace(official, theirs)
        named[name] = shape
    return named


def values(name: str, shape: list[int]) -> np.ndarray:
    """Plain numbers: norms near 1, matrices small."""
    rng = np.random.default_rng(0)
    spread = 0.02 if len(shape) > 1 else 0.01
    return (rng.standard_normal(shape, np.float32) * spread + (len(shape) == 1 and "norm" in name)).astype(np.float32)


def blocks(kind: str, shape: list[int]) -> np.ndarray:
    """Random blocks of a GGUF type, rows of bytes; the same few over and over."""
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(1)
    some = rng.integers(0, 256, (1 << 14, width), dtype=np.uint8)
    for at in SCALES[kind]:
        some[:, at : at + 2] = np.full((len(some), 1), 1e-4, np.float16).view(np.uint8)
    count = shape[0] * shape[1] // size
    return np.resize(some, (count, width)).reshape(shape[0], -1)


def write_gguf(path: Path, arch: str, tensors: dict[str, list[int]], default: str) -> None:
    """A GGUF file by gguf-py: the block's matrices quantized, everything else as it is."""
    writer = gguf.GGUFWriter(path, arch)
    if arch == "qwen3":
        writer.add_block_count(36)
        writer.add_head_count(32)
        writer.add_head_count_kv(8)
        writer.add_key_length(128)
        writer.add_embedding_length(2560)
        writer.add_feed_forward_length(9728)
        writer.add_rope_freq_base(1e6)
        writer.add_layer_norm_rms_eps(1e-6)
    made: dict[tuple[Any, ...], np.ndarray] = {}
    for name, shape in tensors.items():
        quantized = len(shape) == 2 and name.startswith(("layers.", "blk.", "token_embd"))
        plain = "BF16" if len(shape) == 2 else "F32"
        kind = next((k for end, k in RECIPE.items() if name.endswith(end)), default) if quantized else plain
        # Tensors of one kind and shape are one array, so that writing needs little memory.
        key = (kind, "norm" in name, *shape)
        if key not in made:
            wide = blocks(kind, shape) if quantized else values(name, shape)
            made[key] = wide if quantized else gguf.quantize(wide, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, made[key], raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vae(path: Path) -> None:
    """The full-size autoencoder in bf16, under official names."""
    save_file({n: torch.from_numpy(values(n, s)).bfloat16() for n, s in shapes(Autoencoder, VAE, ()).items()}, path)


def write_int8(path: Path, tensors: dict[str, list[int]]) -> None:
    """A ComfyUI file: int8 rows with a scale each, header and bytes written one after the other."""
    note = np.frombuffer(json.dumps({"format": "int8_tensorwise"}).encode(), np.uint8)
    rng = np.random.default_rng(2)
    header: dict[str, Any] = {}
    data: list[np.ndarray] = []
    codes: dict[tuple[int, ...], np.ndarray] = {}
    names = {np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8", np.dtype(np.float32): "F32"}
    at = 0

    def add(name: str, array: np.ndarray) -> None:
        """Append a tensor to the header and the data."""
        nonlocal at
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        data.append(array)
        at += array.nbytes

    for name, shape in tensors.items():
        if len(shape) < 2 or "_pad_token" in name or not name.startswith(("layers.", "noise_", "context_")):
            add(name, values(name, shape))
            continue
        key = tuple(shape)
        codes[key] = codes[key] if key in codes else rng.integers(-127, 128, shape, dtype=np.int8)
        add(name, codes[key])
        add(f"{name}_scale", np.full((shape[0], 1), 2e-4, np.float32))
        add(f"{name.removesuffix('.weight')}.comfy_quant", note)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in data:
            file.write(array.data)


def bench(what: list[str], folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """A picture from each kind of file."""
    text, vae = folder / "qwen3-q8_0.gguf", folder / "vae.safetensors"
    write_gguf(text, "qwen3", shapes(TextEncoder, TEXT_ENCODER, LLAMA), "Q8_0")
    write_vae(vae)
    for kind in what:
        path = folder / ("transformer.gguf" if kind == "gguf" else "transformer.safetensors")
        tensors = shapes(Transformer, TRANSFORMER, COMFY)
        write_gguf(path, "lumina2", tensors, "Q4_K") if kind == "gguf" else write_int8(path, tensors)
        command = [sys.executable, "-m", "s3dit", "generate", "a red circle", "--transformer", str(path)]
        command += ["--text-encoder", str(text), "--vae", str(vae), "--tokenizer", str(EMBEDDED / "tokenizer")]
        command += ["--height", "256", "--width", "256", "--steps", str(steps), "--json", "-o", str(folder / "a.png")]
        size = round(path.stat().st_size / 1e9, 2)
        yield {"name": f"256² from a full-size {kind} file of {size} GB, {steps} steps"} | watched(command)
        path.unlink()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("gguf", "int8"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for row in bench(args.what, Path(folder), args.steps):
            print(json.dumps(row | {"machine": machine()}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
