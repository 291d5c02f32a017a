"""Write the trained parts as a model directory in the official layout, in bf16, as diffusers would save it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_world import words
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from s3dit.model.text_encoder import TextEncoder
from s3dit.model.transformer import Transformer
from s3dit.model.vae import Autoencoder

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PLAIN = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
# The pre-tokenizer of Qwen2: contractions, words, single digits, punctuation, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
PROMPT = "a yellow star above a white heart on a purple background"
NOTE = (
    "The embedded model was trained on 128×128 pictures of one or two flat shapes (circle, square, triangle, star, "
    "heart, ring, cross, diamond) in ten colors on a flat background, for example 'a red circle left of a blue star on "
    "a white background'"
)
OWN = {
    "variant": "tiny", "height": 128, "width": 128, "num_inference_steps": 8, "guidance_scale": 0.0,
    "prompt": PROMPT, "words": words(), "note": NOTE,
}  # fmt: skip


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Train the byte-level BPE on the world's words, so that every word is one token; returns the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    known = [*words(), "user", "assistant"]
    corpus = [form for word in known for form in (word, f" {word}", word.capitalize())] * 10
    base = vocab_size - len(SPECIAL) - len(PLAIN)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=base, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries; needed at most {vocab_size}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    added = {
        str(tokenizer.token_to_id(text)): {
            "content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": text in SPECIAL,
        }
        for text in (*SPECIAL, *PLAIN)
    }  # fmt: skip
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": SPECIAL[1:],
            "bos_token": None,
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    return folder


def _save(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})


def write(
    out: Path, tokenizer: Path, text: TextEncoder, dit: Transformer, vae: Autoencoder, scale: float, shift: float
) -> None:
    """Write the whole directory; scale and shift take raw latents to zero mean and unit deviation."""
    _write_json(
        out / "model_index.json",
        {
            "_class_name": "ZImagePipeline",
            "_diffusers_version": "0.36.0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3Model"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    _write_json(out / "text_encoder" / "config.json", _qwen3(asdict(text.config)))
    down = len(vae.config.block_out_channels)
    _write_json(
        out / "vae" / "config.json",
        {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.36.0",
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * down,
            "up_block_types": ["UpDecoderBlock2D"] * down,
            "force_upcast": True,
            "mid_block_add_attention": True,
            "sample_size": 128,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "latents_mean": None,
            "latents_std": None,
        }
        | asdict(vae.config)
        | {"scaling_factor": round(scale, 5), "shift_factor": round(shift, 5)},
    )
    _write_json(out / "s3dit.json", OWN)
    write_transformer(out, dit)
    _save(text, out / "text_encoder" / "model.safetensors")
    _save(vae, out / "vae" / "diffusion_pytorch_model.safetensors")
    shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)


def write_transformer(out: Path, dit: Transformer) -> None:
    """Write the transformer and the schedule that it is sampled with."""
    _write_json(
        out / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.36.0",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": False,
            "shift": 3.0,
        },
    )
    _write_json(
        out / "transformer" / "config.json",
        {"_class_name": "ZImageTransformer2DModel", "_diffusers_version": "0.36.0", "axes_lens": [1536, 512, 512]}
        | {k: v for k, v in asdict(dit.config).items() if v is not None},
    )
    _save(dit, out / "transformer" / "diffusion_pytorch_model.safetensors")


def write_base(out: Path, dit: Transformer) -> None:
    """Write the base model's own files; all else is the embedded model's."""
    write_transformer(out, dit)
    _write_json(out / "s3dit.json", OWN | {"num_inference_steps": 28, "guidance_scale": 4.0})


def _qwen3(config: dict[str, Any]) -> dict[str, Any]:
    """The text encoder's config with the keys of the official file."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 40960,
        "max_window_layers": config["num_hidden_layers"],
        "model_type": "qwen3",
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
    } | config
