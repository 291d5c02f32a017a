"""Write a checkpoint that this engine reads in the official layout, which diffusers and other tools read.

Each part becomes a folder of safetensors shards under official names with its config.json; a source that holds all
parts becomes a whole model directory. Tensors are streamed singly, floats as they are stored; layers in a number format
are dequantized, because the official layout has none. The metadata of every shard holds the source's hash, its spelling
of names and the number formats that were decoded. The directory appears complete, or not at all.

A config.json has the values of the source's own; else those that follow from the shapes, and constants of the published
model for the rest, also for keys that only diffusers or transformers read. A tokenizer inside a GGUF file is not
written.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from s3dit.configs import infer_config
from s3dit.configs.model_files import OWN
from s3dit.errors import CheckpointError
from s3dit.kernels.number_format import ITEM_BYTES
from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig
from s3dit.model.meta import on_meta
from s3dit.model.part_specs import SPECS
from s3dit.runtime.sources import SHIFT, OpenedModel, open_model
from s3dit.weights.checkpoint import Checkpoint
from s3dit.weights.container import FLOATS
from s3dit.weights.keymap import detect, official
from s3dit.weights.model_folder import building, copy_file, left_out
from s3dit.weights.quantize import SPARE, STEM, UNKNOWN, Shards, check_room, check_target
from s3dit.weights.split_checkpoint import PARTS

# A dummy of some writers, and the head of a language model that is tied to the embedding anyway.
DROPPED = ("norm_final.weight", "lm_head.weight")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What the official JSON files say besides what is read here.
TRANSFORMER = {"_class_name": "ZImageTransformer2DModel", "axes_lens": [1536, 512, 512]}
TEXT_ENCODER = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 40960, "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": True,
    "use_cache": True, "use_sliding_window": False,
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "force_upcast": True, "latents_mean": None, "latents_std": None,
    "mid_block_add_attention": True, "sample_size": 1024, "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "use_dynamic_shifting": False,
    "shift": SHIFT,
}  # fmt: skip
OMNI = {
    "_class_name": "ZImageOmniPipeline", "siglip": ["transformers", "Siglip2VisionModel"],
    "siglip_processor": ["transformers", "Siglip2ImageProcessorFast"],
}  # fmt: skip
INDEX = {
    "_class_name": "ZImagePipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"], "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


def convert(
    source: Path,
    target: Path,
    *,
    version: str,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[str, ...]:
    """Write the parts of a model that `source` holds into the directory `target`; gives notes on what was guessed.

    version: of s3dit, for the metadata · dtype: "bf16" or "fp32" for all tensors; None keeps floats as they are stored
    and decodes number formats to bf16 · force: replace the model at `target` · progress: called with the bytes of each
    tensor. Raises CheckpointError before anything is written where source or target are unfit or the disk too
    small, and leaves nothing behind when it is interrupted.
    """
    opened, target = check(source, target, dtype, force=force), target.resolve()
    with building(target) as built:
        built.mkdir()
        try:
            for part, checkpoint in opened.parts.items():
                _write(checkpoint, part, built / part, dtype, version, progress or (lambda count: None))
                _write_json(built / part / "config.json", _config(part, checkpoint, opened))
            notes = tuple(_write_rest(opened, built))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{target}: could not be written ({error}); nothing was left there; make room and try again"
            ) from None
    return notes


def check(source: Path, target: Path, dtype: str | None, *, force: bool = False) -> OpenedModel:
    """Raise the CheckpointError that `convert` would raise before it writes; what the source holds."""
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype is {dtype!r}; needed {' or '.join(DTYPES)}, or none to keep what is stored")
    opened = open_model(source)
    check_target(source, target, force=force)
    needed = SPARE
    for part, checkpoint in opened.parts.items():
        config = opened.configs.get(part) or SPECS[part].infer(checkpoint)
        # A file may lack the layer that is never read, a config.json beside it may not leave that open.
        infer_config.check_layers(part, checkpoint, config, "the whole model has")
        needed += sum(_size(part, official(checkpoint), config, dtype))
    needed += sum(file.stat().st_size for folder in _vision_folders(opened) for file in folder.iterdir())
    check_room(target, needed)
    return opened


def _size(part: str, checkpoint: Checkpoint, config: Any, dtype: str | None) -> Iterator[int]:
    """Bytes of each tensor as it will be written; raises CheckpointError for a number format that nobody decodes."""
    with on_meta():
        homes = SPECS[part].module(config).state_dict()
    for name in checkpoint:
        entry, (layer, _, leaf) = checkpoint.entry(name), name.rpartition(".")
        if layer in checkpoint.formats and leaf != "bias":
            # A layer that the model has not is of no size that is known, and small.
            yield homes[name].numel() * (4 if dtype == "fp32" else 2) if name in homes and leaf == "weight" else 0
        elif entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {checkpoint.format(name)}, which is not decoded; needed floats, or a "
                "number format that this engine draws with"
            )
        else:
            yield entry.nbytes if dtype is None else entry.nbytes // ITEM_BYTES[entry.dtype] * DTYPES[dtype].itemsize


def _write(
    checkpoint: Checkpoint, part: str, folder: Path, dtype: str | None, version: str, progress: Callable[[int], None]
) -> None:
    """Stream one part into shards of its folder, and write the index that names them."""
    named = official(checkpoint)
    folder.mkdir()
    decoded = Counter(number_format.name for number_format in named.formats.values())
    metadata = {
        "format": "pt",
        "source": UNKNOWN,
        "spelling": detect(checkpoint).name,
        "decoded": json.dumps(decoded),
        "s3dit": version,
    }
    shards = Shards(folder, STEM.get(part, "diffusion_pytorch_model"), metadata)
    for name, tensor in _tensors(named):
        if name in DROPPED:
            continue
        own = torch.bfloat16 if name.rpartition(".")[0] in named.formats else tensor.dtype
        # A view would hold the whole map of the source.
        shards.add({name: tensor.to(own if dtype is None else DTYPES[dtype], copy=True).contiguous()})
        progress(named.entry(name).nbytes)
    # What was read, and what is hashed, is of one file only if that one is still there.
    checkpoint.check()
    digest = _digest(checkpoint.path)
    checkpoint.check()
    shards.close(f"sha256:{digest}")


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the order on disk, layers in a number format as one weight each, fp32."""
    for name in checkpoint:
        layer, _, leaf = name.rpartition(".")
        scheme = checkpoint.schemes.get(layer)
        if scheme is None or leaf == "bias":
            yield name, checkpoint.load(name)
        elif leaf == "weight":
            parts = {
                key.rpartition(".")[2]: checkpoint.load(key)
                for key in checkpoint
                if key.rpartition(".")[0] == layer and not key.endswith(".bias")
            }
            yield name, scheme.decode(parts)


def _digest(path: Path) -> str:
    """SHA-256 of a file, as hubs list it; of all weights of a folder, one after the other by name."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while run := stream.read(1 << 24):
                digest.update(run)
    return digest.hexdigest()


def _config(part: str, checkpoint: Checkpoint, opened: OpenedModel) -> dict[str, Any]:
    """The config.json of a part."""
    config = opened.configs.get(part) or SPECS[part].infer(checkpoint)
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    if isinstance(config, TransformerConfig):
        # Whether it reads a second time is said by its tensors alone.
        del values["target_timestep"]
        return TRANSFORMER | {key: value for key, value in values.items() if value is not None}
    if isinstance(config, TextEncoderConfig):
        return TEXT_ENCODER | values | {"max_window_layers": config.num_hidden_layers}
    assert isinstance(config, VAEConfig)
    levels = len(config.block_out_channels)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return VAE | blocks | values


def _write_rest(opened: OpenedModel, built: Path) -> Iterator[str]:
    """What a whole model has besides its parts: schedule, tokenizer, index; gives notes on what is not the source's."""
    own = opened.path / OWN
    if own.is_file() and opened.own:
        copy_file(own, built / own.name, opened.path)
    if isinstance(opened.tokenizer, Path):
        shutil.copytree(opened.tokenizer, built / "tokenizer", ignore=left_out(opened.tokenizer))
    if set(opened.parts) != set(PARTS):
        return
    scheduler = SCHEDULER if opened.scheduler is None else SCHEDULER | asdict(opened.scheduler)
    (built / "scheduler").mkdir()
    _write_json(built / "scheduler" / "scheduler_config.json", scheduler)
    for folder in _vision_folders(opened):
        shutil.copytree(folder, built / folder.name, ignore=left_out(folder))
    _write_json(built / "model_index.json", INDEX | (OMNI if _vision_folders(opened) else {}))
    if opened.scheduler is None:
        yield f"the source does not say the shift of its schedule: {SHIFT:g}, Turbo's, was written"
    if not isinstance(opened.tokenizer, Path):
        yield "the source has no tokenizer folder: copy the one of Z-Image to tokenizer/ to make it a whole model"


def _vision_folders(opened: OpenedModel) -> list[Path]:
    """The folders of the vision tower, which only a directory has and which are copied as they are."""
    return [folder for name in ("siglip", "siglip_processor") if (folder := opened.path / name).is_dir()]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
