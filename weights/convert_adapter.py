"""Writing adapters: an adapter of any trainer under official names, for any other tool, or under ComfyUI's names.

The official form is what diffusers writes and reads: `transformer.<layer>.lora_A.weight` and `lora_B`, with no
alpha beside. Kinds that diffusers does not know keep LyCORIS's suffixes.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from torch import Tensor

from s3dit.errors import CheckpointError
from s3dit.weights.adapter import Adapter, Deltas, read_adapter
from s3dit.weights.adapter_info import METADATA
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.delta import Delta, Full, Hadamard, Kronecker, LowRank, fuse
from s3dit.weights.safetensors_dir import write_safetensors

# Layers that an error names.
SHOWN_LAYERS = 10
OutputNames = Literal["official", "comfyui"]
# In front of the layers of a part, by spelling.
PART_PREFIXES = {
    "official": {"transformer": "transformer.", "text_encoder": "text_encoder."},
    "comfyui": {"transformer": "diffusion_model.", "text_encoder": "text_encoders.qwen3_4b.transformer."},
}
# Of ComfyUI's names, the ends that differ; q, k and v, where they can be one matrix, are one.
COMFYUI = {
    "attention.to_out.0": "attention.out",
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}
QKV = ("to_q", "to_k", "to_v")


def convert_adapter(
    source: str | Path, target: str | Path, *, version: str, spelling: OutputNames = "official", force: bool = False
) -> Adapter:
    """Write any readable adapter as a .safetensors file in official names (as diffusers reads LoRA), or ComfyUI's.

    version: of s3dit, for the metadata · force: replace a target that exists. The strength is folded into the factors,
    which become fp32 where their dtype would lose bits. The header keeps the source's metadata and names the source by
    hash. The file appears whole or not at all. Returns the adapter that was read. Raises CheckpointError, also for a
    source that could only be converted in part.
    """
    target = Path(target)
    if target.suffix != ".safetensors" or not target.parent.is_dir() or target.is_dir():
        raise CheckpointError(f"{target}: needed the name of a .safetensors file in a folder that exists")
    if target.exists() and not force:
        raise CheckpointError(f"{target}: exists already; remove it, choose another name, or force it")
    adapter = read_adapter(source)
    lost = [*adapter.unmatched, *adapter.misshapen]
    if lost:
        raise CheckpointError(
            f"{source}: {len(lost)} of its layers cannot be converted ({'; '.join(lost[:SHOWN_LAYERS])}); needed all "
            "of them"
        )
    tensors: dict[str, Tensor] = {}
    for part, deltas in adapter.deltas.items():
        for layer, delta in (_comfyui_deltas(deltas) if spelling == "comfyui" else deltas).items():
            stored = _stored_tensors(delta, peft=spelling == "official")
            tensors |= {f"{PART_PREFIXES[spelling][part]}{layer}.{leaf}": tensor for leaf, tensor in stored.items()}
    # Its alphas are folded in already; written as well, they would act twice.
    metadata = {key: value for key, value in open_checkpoint(source).metadata.items() if key != METADATA}
    metadata |= {"format": "pt", "source": f"sha256:{adapter.digest()}", "s3dit": version}
    _save(tensors, target, metadata)
    return adapter


def _save(tensors: Mapping[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
    """Write a file under a hidden name beside its target, then rename it."""
    partial = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Of its own memory each: layers that share a factor must not share bytes of the file.
        write_safetensors({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be written ({error}); needed a writable folder with room") from None
    finally:
        partial.unlink(missing_ok=True)


def _stored_tensors(delta: Delta, *, peft: bool) -> dict[str, Tensor]:
    """Return the tensors that a Delta is stored as, by key suffix."""
    term, stored = delta.term, {}
    if isinstance(term, LowRank):
        stored = {"lora_A.weight": term.down, "lora_B.weight": term.up}
    elif isinstance(term, Hadamard):
        stored = {"hada_w1_a": term.w1a, "hada_w1_b": term.w1b, "hada_w2_a": term.w2a, "hada_w2_b": term.w2b}
    elif isinstance(term, Kronecker):
        stored = {"lokr_w1": term.w1, "lokr_w2": term.w2}
    elif isinstance(term, Full):
        stored = {"set_weight" if delta.replaces else "diff": term.weight}
    if delta.bias is not None:
        stored["diff_b"] = delta.bias
    if delta.magnitude is not None:
        # PEFT knows the norms of rows only.
        rows = peft and delta.by_rows() and isinstance(term, LowRank)
        stored |= {"lora_magnitude_vector": delta.magnitude[:, 0]} if rows else {"dora_scale": delta.magnitude}
    return stored


def _comfyui_deltas(deltas: Deltas) -> Deltas:
    """Return deltas under ComfyUI's names; q, k and v are fused where a single matrix can hold them."""
    left, renamed = dict(deltas), {}
    for stem in dict.fromkeys(name.rpartition(".")[0] for name in deltas if name.endswith(QKV)):
        pieces = [left.get(f"{stem}.{leaf}") for leaf in QKV]
        try:
            rows = next(piece for piece in pieces if piece is not None).shape[0]
            renamed[f"{stem}.qkv"] = fuse(pieces, rows)
        except ValueError:
            continue
        for leaf in QKV:
            left.pop(f"{stem}.{leaf}", None)
    for name, delta in left.items():
        end = next((end for end in COMFYUI if f".{name}".endswith(f".{end}")), None)
        renamed[name if end is None else name.removesuffix(end) + COMFYUI[end]] = delta
    return renamed
