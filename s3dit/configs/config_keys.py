"""What each key of a model's JSON files means here, beside those that `part_configs` reads: run as built, or inert.

One table a file. `runs`: a key must have one of these values, which are what this engine computes; another value would
change diffusers' picture and is refused by name. `inert`: the value cannot change a picture, for the reason given. A
key that stands in no table is unknown to diffusers and transformers as well, which ignore it: it is noted.

Values that a key must have are the library's defaults wherever the two differ in nothing (so a missing key is right);
the exceptions, AutoencoderKL's `use_quant_conv` and its kin, are told by the tensors.

Source: the `__init__` of each class in diffusers 0.42 and transformers 5.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from s3dit.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Keys:
    """The meaning of one JSON file's keys: `runs` maps a key to the values that are run, `inert` a reason to keys."""

    runs: Mapping[str, tuple[Any, ...]]
    inert: Mapping[str, tuple[str, ...]]

    def check(self, data: Mapping[str, Any], source: object) -> None:
        """Raise CheckpointError, which names `source`, for a key whose value this engine does not run."""
        for key, values in self.runs.items():
            if key in data and data[key] not in values:
                needed = " or ".join(dict.fromkeys(repr(value) for value in values))
                raise CheckpointError(
                    f"{source}: {key} is {data[key]!r:.80}; this engine runs {needed}; take a model whose file says "
                    "so, or restore the official file"
                )

    def unknown(self, data: Mapping[str, Any], read: Collection[str]) -> list[str]:
        """Return the keys of a file that are neither in these tables nor in `read`, sorted."""
        without_effect = {key for keys in self.inert.values() for key in keys}
        return sorted(set(data) - set(read) - set(self.runs) - without_effect)

    def note_unknown(self, data: Mapping[str, Any], read: Collection[str], source: object) -> list[str]:
        """Return a note on the keys of a file that are `unknown`, as a list; empty where there are none."""
        names = self.unknown(data, read)
        shown = ", ".join(repr(name[:40]) for name in names[:5]) + (", …" if len(names) > 5 else "")
        return [f"{source}: keys without effect here, nor known in diffusers: {shown}"] if names else []


WHO = "says who wrote the file"
FORMATS = "number formats are detected by the tensors, and from this key by `weights.formats`"
OWN_DTYPE = "the dtype of computing is the caller's choice, that of storage the tensors'"
TRAINING = "acts in training only"
BASE = {  # keys of every configuration of transformers
    WHO: ("architectures", "transformers_version", "_name_or_path", "_commit_hash", "auto_map"),
    OWN_DTYPE: ("dtype", "torch_dtype"),
    FORMATS: ("quantization_config", "dfloat11_config"),
    "chooses what a call returns": (
        "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "num_labels",
        "problem_type",
    ),
    "saves memory, the arithmetic is the same": ("chunk_size_feed_forward", "_attn_implementation"),
    TRAINING: ("attention_dropout", "initializer_range"),
}  # fmt: skip

TRANSFORMER = Keys(
    runs={
        "_class_name": ("ZImageTransformer2DModel", "ZImageTransformer2DModelWrapper"), "all_patch_size": ([2],),
        "all_f_patch_size": ([1],), "qk_norm": (True,), "in_channels": (16,),
    },
    inert={
        WHO: ("_diffusers_version", "_name_or_path"),
        "bounds a table of angles; a place beyond it is an error in diffusers": ("axes_lens",),
        FORMATS: ("quantization_config", "dfloat11_config"),
    },
)  # fmt: skip

TEXT_ENCODER = Keys(
    runs={
        "model_type": ("qwen3",), "hidden_act": ("silu", "swish"), "attention_bias": (False,),
        "is_encoder_decoder": (False,), "per_layer_config": (None,),
    },
    inert={
        **BASE,
        "is about generating text": ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
        "is about the head, which is never computed": ("tie_word_embeddings",),
        "bounds nothing in Qwen3's default rotation": ("max_position_embeddings",),
        "is checked for full attention by `TextEncoderConfig`": (
            "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
        ),
        "is read as transformers reads it by `TextEncoderConfig`": ("rope_scaling", "rope_parameters"),
    },
)  # fmt: skip

VAE = Keys(
    runs={
        "_class_name": ("AutoencoderKL",), "act_fn": ("silu", "swish"), "mid_block_add_attention": (True,),
        "use_quant_conv": (False,), "use_post_quant_conv": (False,), "in_channels": (3,), "out_channels": (3,),
    },
    inert={
        WHO: ("_diffusers_version", "_name_or_path"),
        "is read by no pipeline of Z-Image": ("latents_mean", "latents_std", "force_upcast"),
        "is about the tiles of diffusers": ("sample_size",),
        FORMATS: ("quantization_config", "dfloat11_config"),
        "is checked by `VAEConfig`": ("down_block_types", "up_block_types"),
    },
)  # fmt: skip

VISION = Keys(
    runs={
        "model_type": ("siglip2_vision_model",), "hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,),
        "is_encoder_decoder": (False,), "per_layer_config": (None,),
    },
    inert={**BASE, "is about the pooling head, which is never computed": ("vision_use_head",)},
)  # fmt: skip

PROCESSORS = ("Siglip2ImageProcessor", "Siglip2ImageProcessorFast", "Siglip2ImageProcessorPil")
VISION_INPUT = Keys(
    # 2 is Pillow's number for bilinear.
    runs={
        "do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,), "resample": (2,),
        "image_processor_type": PROCESSORS,
    },
    inert={
        WHO: ("processor_class", "_processor_class", "feature_extractor_type"),
        "pictures are RGB before they come here": ("do_convert_rgb",),
        "is not read by Siglip2's own way to resize": (
            "size", "default_to_square", "crop_size", "do_center_crop", "do_pad", "pad_size", "size_divisor",
            "image_seq_length", "data_format", "input_data_format", "device", "disable_grouping", "return_tensors",
        ),
    },
)  # fmt: skip

SCHEDULER = Keys(
    runs={
        "_class_name": ("FlowMatchEulerDiscreteScheduler",), "num_train_timesteps": (1000,),
        "invert_sigmas": (False,), "stochastic_sampling": (False,), "shift_terminal": (None, 0),
        # Its quantiles are within 1e-5 here, not the same bits: `--schedule beta` draws with them.
        "use_beta_sigmas": (False,), "time_shift_type": ("exponential", "linear"),
        # Of other schedulers, but the karras spacing of this one reads them.
        "sigma_min": (None,), "sigma_max": (None,),
    },
    inert={WHO: ("_diffusers_version", "_name_or_path", "_use_default_values")},
)  # fmt: skip

CONTROLNET = Keys(
    runs={"_class_name": ("ZImageControlNetModel",), "all_patch_size": ([2],), "all_f_patch_size": ([1],),
          "qk_norm": (True,)},
    inert={WHO: ("_diffusers_version", "_name_or_path"), FORMATS: ("quantization_config", "dfloat11_config")},
)  # fmt: skip

# Of tokenizer_config.json; `tokenizer` reads added_tokens_decoder.
TOKENIZER = Keys(
    runs={
        "tokenizer_class": (
            "Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None,
        ),
        "add_prefix_space": (False, None), "add_bos_token": (False, None), "add_eos_token": (False, None),
        "split_special_tokens": (False, None), "truncation_side": ("right", None), "bos_token": (None,),
    },
    inert={
        WHO: ("_name_or_path", "name_or_path", "transformers_version", "processor_class", "auto_map", "backend",
              "is_local", "local_files_only"),
        "the caller says how many tokens are read": ("model_max_length", "max_length", "truncation", "stride",
                                                     "truncation_strategy"),
        "nothing is padded, and causal features do not depend on it": (
            "padding_side", "pad_token", "pad_to_multiple_of", "pad_token_type_id", "padding",
        ),
        "is about turning ids into text": ("clean_up_tokenization_spaces", "errors"),
        "every character has bytes, which have tokens": ("unk_token",),
        "names a token that stands among the added ones": (
            "eos_token", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens",
        ),
        "chooses what a call returns": ("model_input_names", "return_token_type_ids"),
    },
)  # fmt: skip

# Of model_index.json: the pipeline, and the classes of each component that are what is built here.
PIPELINES = (
    "ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", "ZImageOmniPipeline",
    "ZImageControlNetPipeline", "ZImageControlNetInpaintPipeline",
)  # fmt: skip
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "transformer": ("ZImageTransformer2DModel",),
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "vae": ("AutoencoderKL",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
    "siglip": ("Siglip2VisionModel",),
    "siglip_processor": PROCESSORS,
}


def check_index(index: Mapping[str, Any], source: object, skip: Collection[str] = ()) -> list[str]:
    """Check a `model_index.json` against what is built here; returns notes on components that are not used.

    skip: components that come from elsewhere. Raises CheckpointError for another pipeline, or another class of a part.
    """
    unused = []
    for name, value in index.items():
        if name not in ("_class_name", *COMPONENTS):
            unset = name.startswith("_") or value in (None, [None, None])
            unused += [] if unset else [repr(name[:40])]
            continue
        classes = PIPELINES if name == "_class_name" else COMPONENTS[name]
        kind = value[1] if name in COMPONENTS and isinstance(value, list) and len(value) == 2 else value
        if name not in skip and kind not in (None, *classes):
            raise CheckpointError(
                f"{source}: {name} is {value!r:.80}; this engine runs {' or '.join(classes)}; take a Z-Image model"
            )
    return [f"{source}: components without effect here: {', '.join(unused[:5])}"] if unused else []


def _whole(low: int, high: int, step: int = 1) -> Callable[[Any], bool]:
    """Whether a value is an integer from low to high, and a multiple of step."""
    return lambda value: type(value) is int and low <= value <= high and value % step == 0


def _text(longest: int) -> Callable[[Any], bool]:
    """Whether a value is a text of at most so many characters."""
    return lambda value: isinstance(value, str) and len(value) <= longest


# Of s3dit.json, which a directory says of its own world: whether a value fits, and what is needed.
OWN: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "variant": (lambda value: value in ("turbo", "base", "omni", "tiny"), "turbo, base, omni or tiny"),
    "height": (_whole(16, 8192, 16), "a multiple of 16 up to 8192"),
    "width": (_whole(16, 8192, 16), "a multiple of 16 up to 8192"),
    "num_inference_steps": (_whole(1, 1000), "a whole number from 1 to 1000"),
    "guidance_scale": (lambda value: type(value) in (int, float) and 0 <= value <= 1000, "a number from 0 to 1000"),
    "prompt": (_text(10_000), "a text of at most 10,000 characters"),
    "note": (_text(1000), "a text of at most 1,000 characters"),
    "words": (
        lambda value: isinstance(value, list) and len(value) <= 100_000 and all(map(_text(100), value)),
        "a list of words",
    ),
}


def check_own(own: Mapping[str, Any], source: object) -> None:
    """Raise CheckpointError for a key of a `s3dit.json` that is not known, or a value that does not fit."""
    for key, value in own.items():
        fits, needed = OWN.get(key, (lambda value: False, f"no other keys than {', '.join(OWN)}"))
        if not fits(value):
            raise CheckpointError(
                f"{source}: {key[:40]!r} is {value!r:.80}; needed {needed}; mend the file, or delete it"
            )
