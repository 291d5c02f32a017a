"""Dialects of adapter files: from a stored key to the official layers it changes and the role its tensor plays.

Trainers write the name of a layer in many ways: behind prefixes, with dots or underscores between (and inside) words,
under ComfyUI's names, with q, k and v as one matrix. They are read by one rule and three tables. The rule: dots become
underscores before a path is looked up, so `layers.0.attention.to_q`, `layers_0_attention_to_q` and
`layers.0.attention.to.q` are the same path. The tables: prefixes (`KEY_PREFIXES`), names of layers (`BLOCK_LAYERS`,
`FUSED_LAYERS`, `OUTSIDE_BLOCKS`, `TEXT_LAYERS`) and suffixes (`ROLES`).

No model is needed, so a file can be read and rewritten without one; whether a layer exists, and with which shape, is
checked when the adapter is attached. The autoencoder has no adapters.

Source: the key sets that diffusers 0.42, PEFT, ai-toolkit, musubi-tuner, OneTrainer, LyCORIS, DiffSynth-Studio and
ComfyUI write or read.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Stripped one after another, flat, until what is left is a layer; with the part that the first of them means, if any.
KEY_PREFIXES: dict[str, str | None] = {
    **dict.fromkeys(("base_model_model_", "transformer_", "lycoris_"), None),
    **dict.fromkeys(
        ("model_diffusion_model_", "diffusion_model_", "unet_", "lora_unet_", "lora_transformer_"), "transformer"
    ),
    **dict.fromkeys(("text_encoders_", "text_encoder_", "qwen3_4b_", "lora_te1_", "lora_te_"), "text_encoder"),
}

# As many stand before each other at most.
MAX_PREFIXES = 4

# Layers of a block: official name -> what else it is called.
BLOCK_LAYERS = {
    "attention.to_q": ("attention.processor.to_q",),
    "attention.to_k": ("attention.processor.to_k",),
    "attention.to_v": ("attention.processor.to_v",),
    "attention.to_out.0": ("attention.out", "attention.to_out", "attention.processor.to_out"),
    "attention.norm_q": ("attention.q_norm",),
    "attention.norm_k": ("attention.k_norm",),
    "feed_forward.w1": (),
    "feed_forward.w2": ("feed_forward.net.2",),
    "feed_forward.w3": (),
    "adaLN_modulation.0": (),
    "attention_norm1": (),
    "attention_norm2": (),
    "ffn_norm1": (),
    "ffn_norm2": (),
}
# Several layers of a block as one matrix, whose rows they share equally, in this order.
FUSED_LAYERS = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),
    "feed_forward.w13": ("feed_forward.w3", "feed_forward.w1"),
}
OUTSIDE_BLOCKS = {
    "all_x_embedder.2-1": ("x_embedder",),
    "all_final_layer.2-1.linear": ("final_layer.linear",),
    "all_final_layer.2-1.adaLN_modulation.1": ("final_layer.adaLN_modulation.1",),
    "t_embedder.mlp.0": (),
    "t_embedder.mlp.2": (),
    "cap_embedder.0": (),
    "cap_embedder.1": (),
    "siglip_embedder.0": (),
    "siglip_embedder.1": (),
    "x_pad_token": (),
    "cap_pad_token": (),
    "siglip_pad_token": (),
}
TEXT_LAYERS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    "input_layernorm",
    "post_attention_layernorm",
)

# The role of a tensor in its layer, by the end of its key. "[^.]+" is the name that PEFT gives an adapter.
LORA_WORD = r"[._]lora(?:_linear_layer)?"
LORA = LORA_WORD + r"[._]"
ROLES = tuple(
    (role, re.compile(pattern + "$"))
    for role, pattern in (
        ("up.bias", LORA + r"(?:B|up)(?:\.[^.]+)?\.bias"),
        ("down", LORA + r"(?:A|down)(?:\.[^.]+)?\.weight"),
        ("up", LORA + r"(?:B|up)(?:\.[^.]+)?\.weight"),
        ("magnitude", r"\.dora_scale|[._]lora_magnitude_vector(?:\.[^.]+)?"),
        ("alpha", rf"(?:{LORA_WORD})?\.alpha"),
        *((name, rf"\.{name}") for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        *((name, rf"\.{name}") for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
        ("diff", r"\.(?:diff|w_norm)"),
        ("diff_b", r"\.(?:diff_b|b_norm)"),
        ("set", r"\.set_weight"),
        ("shape", r"\.reshape_weight"),
        ("core", r"\.(?:lora_mid\.weight|hada_t[12]|lokr_t[12])"),
    )
)

# Adapters of other models, by what only their keys hold, read flat.
FOREIGN_MODELS = (
    ("FLUX", r"single_blocks_|double_blocks_|single_transformer_blocks_"),
    ("SDXL", r"lora_te2_|text_encoder_2_|blocks_\d+_(?:\d+_|attentions_\d+_)transformer_blocks_[1-9]"),
    ("Qwen-Image", r"transformer_blocks_\d+_(?:img_mod|txt_mod|img_mlp|txt_mlp|attn_add_)"),
    ("Stable Diffusion 3", r"joint_blocks_|transformer_blocks_\d+_(?:norm1_context|ff_context)"),
    ("Stable Diffusion", r"(?:down|up|input|output|mid|middle)_blocks?_"),
    ("Wan", r"(?:^|_)blocks_\d+_(?:self_attn|cross_attn|ffn)_"),
)

# Methods of PEFT whose tensors are called by the method's own name.
METHODS = (
    "FourierFT", "HRA", "VB-LoRA", "RandLoRA", "BEFT", "C3A", "DEFT", "DeLoRA", "FRoD", "GraLoRA", "HiRA", "Lily",
    "LN_tuning", "MiSS", "OSF", "PEANuT", "Poly", "PSOFT", "PVeRA", "RoAd", "SHiRA", "SuperTuning", "TinyLoRA",
    "trainable_tokens", "Uni-LoRA", "WaveFT",
)  # fmt: skip
# Adapters that are none of ours, by the ends of their keys.
UNREAD_ADAPTERS = (
    ("GLoRA", r"\.(?:a[12]|b[12])(?:\.weight)?$|[._]glora[._]"),
    ("BOFT", r"[._]boft_[RsA]|\.oft_blocks_boft$"),
    ("OFT", r"[._]oft_(?:[RrsQ]|blocks|diag)(?:[._]|$)"),
    ("IA3", r"\.on_input$|[._]ia3_l(?:[._]|$)"),
    ("VeRA", r"[._]vera_(?:lambda_[bd]|[AB])(?:[._]|$)"),
    ("T-LoRA", r"\.(?:lambda_layer|[pq]_layer\.weight)$"),
    ("AdaLoRA", r"\.lora_E(?:\.[^.]+)?$"),
    *((name, rf"\.{name.replace('-', '').lower()}_") for name in METHODS),
    ("prompt tuning (PEFT)", r"(?:^|\.)prompt_embeddings$"),
    ("textual inversion", r"^(?:emb_params|string_to_param|<[^>]*>|qwen3_4b)$"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a stored layer in the model.

    part: such as "transformer" · layers: official names, several where they share the rows equally · is_official:
    whether the stored name is the official spelling.
    """

    part: str
    layers: tuple[str, ...]
    is_official: bool


def flatten_path(path: str) -> str:
    """Return a path with underscores for dots, which is the same for all dialects."""
    return path.replace(".", "_")


def _spellings(table: dict[str, tuple[str, ...]]) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Return flat spelling -> official names, and whether it is the official spelling."""
    official: dict[str, tuple[tuple[str, ...], bool]] = {flatten_path(name): ((name,), True) for name in table}
    return official | {flatten_path(other): ((name,), False) for name, others in table.items() for other in others}


_BLOCK_SPELLINGS = _spellings(BLOCK_LAYERS) | {
    flatten_path(name): (layers, False) for name, layers in FUSED_LAYERS.items()
}
_OUTSIDE_SPELLINGS = _spellings(OUTSIDE_BLOCKS)
_TEXT_SPELLINGS = {flatten_path(name): name for name in TEXT_LAYERS}
_STACK = re.compile(r"(layers|noise_refiner|context_refiner|siglip_refiner)_(\d{1,4})_(.+)")
_TEXT_STACK = re.compile(r"(?:transformer_)?(?:model_)?layers_(\d{1,4})_(.+)")


def split_key(key: str) -> tuple[str, str] | None:
    """Return (stored layer, role) of a key, None where it is not an adapter's."""
    for role, pattern in ROLES:
        if match := pattern.search(key):
            return key[: match.start()], role
    return None


def place(layer: str) -> Place | None:
    """Return the place of a stored layer, None where no part has such a layer."""
    name, part = flatten_path(layer), None
    for _ in range(MAX_PREFIXES + 1):
        if (known := _lookup(name)) is not None:
            return known if part in (None, known.part) else None
        prefix = next((prefix for prefix in KEY_PREFIXES if name.startswith(prefix)), "")
        part = part or KEY_PREFIXES.get(prefix)
        # VideoX-Fun's trainer writes two underscores behind its prefix.
        name = name[len(prefix) :].removeprefix("_")
    return None


def _lookup(name: str) -> Place | None:
    """Return the place of a flat name without prefix, None where there is none."""
    if name in _OUTSIDE_SPELLINGS:
        return Place("transformer", *_OUTSIDE_SPELLINGS[name])
    match = _STACK.fullmatch(name)
    if match and match[3] in _BLOCK_SPELLINGS:
        names, is_official = _BLOCK_SPELLINGS[match[3]]
        return Place("transformer", tuple(f"{match[1]}.{match[2]}.{leaf}" for leaf in names), is_official)
    match = _TEXT_STACK.fullmatch(name)
    if match and match[2] in _TEXT_SPELLINGS:
        return Place("text_encoder", (f"model.layers.{match[1]}.{_TEXT_SPELLINGS[match[2]]}",), True)
    return None


def family(keys: Iterable[str]) -> str | None:
    """Return the model that the keys of a foreign adapter are of, None where they do not show it."""
    names = "\n".join(map(flatten_path, keys))
    return next((name for name, pattern in FOREIGN_MODELS if re.search(pattern, names, re.MULTILINE)), None)


def unsupported_kind(keys: Iterable[str]) -> str | None:
    """Return the kind of an adapter that is not supported, by its keys, None where they do not show it."""
    names = "\n".join(keys)
    return next((name for name, pattern in UNREAD_ADAPTERS if re.search(pattern, names, re.MULTILINE)), None)
