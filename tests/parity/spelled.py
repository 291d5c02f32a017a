"""Writers of the spellings that people hold, restated from the documented names: the tests' side of the border."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")


def part(folder, name):
    """All tensors of one part of an official directory."""
    tensors = {}
    for file in sorted(Path(folder, name).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def comfy(official):
    """Official transformer -> ComfyUI's names: q, k and v stacked, the one patch size not said, a dummy norm."""
    fused = {}
    for key, tensor in official.items():
        if key.endswith("attention.to_q.weight"):
            stem = key.removesuffix("to_q.weight")
            rows = [official[f"{stem}to_{letter}.weight"] for letter in "qkv"]
            fused[f"{stem}qkv.weight"] = torch.cat(rows)
        elif not key.endswith(("attention.to_k.weight", "attention.to_v.weight")):
            key = key.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
            key = key.replace("attention.to_out.0", "attention.out")
            key = key.replace("attention.norm_q", "attention.q_norm").replace("attention.norm_k", "attention.k_norm")
            fused[key] = tensor
    return fused | {"norm_final.weight": torch.ones_like(official["x_pad_token"][0])}


def ldm_name(key, levels=4):
    """The LDM name of an official VAE tensor."""
    found = re.match(r"decoder\.up_blocks\.(\d+)\.(.*)", key)
    if found:
        key = f"decoder.up.{levels - 1 - int(found[1])}.{found[2]}"
    for a, b in (
        ("encoder.down_blocks.", "encoder.down."), ("upsamplers.0.", "upsample."), ("downsamplers.0.", "downsample."),
        ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("mid_block.resnets.0.", "mid.block_1."),
        ("mid_block.resnets.1.", "mid.block_2."), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("resnets.", "block."),
    ):  # fmt: skip
        key = key.replace(a, b)
    return key


def ldm(official):
    """Official VAE -> LDM names, attention as 1×1 convolutions."""
    renamed = {ldm_name(key): tensor for key, tensor in official.items()}
    return {
        key: tensor[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key) else tensor
        for key, tensor in renamed.items()
    }


def bare(text):
    """Qwen3 without `model.`."""
    return {key.removeprefix("model."): tensor for key, tensor in text.items()}


def llama(text):
    """Qwen3 as llama.cpp names it."""
    renamed = {}
    for key, tensor in bare(text).items():
        key = re.sub(r"^layers\.(\d+)\.", r"blk.\1.", key)
        for a, b in (
            ("embed_tokens", "token_embd"), ("post_attention_layernorm", "ffn_norm"), ("input_layernorm", "attn_norm"),
            ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"), ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
        ):  # fmt: skip
            key = key.replace(a, b)
        renamed["output_norm.weight" if key == "norm.weight" else key] = tensor
    return renamed


def prefixed(prefix, tensors):
    return {prefix + key: tensor.contiguous() for key, tensor in tensors.items()}


def save(path, tensors, **metadata):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def save_gguf(path, tensors, arch="lumina2", **fields):
    """Through gguf-py, in the dtype of each tensor; arch None leaves the architecture out, as stable-diffusion.cpp."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def add_architecture(self):
            if arch is not None:
                super().add_architecture()

    writer = Writer(path, arch or "none")
    for key, (method, value) in fields.items():
        getattr(writer, method)(key.replace("__", "."), value)
    for key, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            data = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(key, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(key, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
