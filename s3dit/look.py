"""What is in this file? Container, spelling, producer, parts, number formats, what is missing, and how to use it.

Only headers are read, so a file of 24 GB is looked at as quickly as a small one. Everything is told from the bytes,
names, shapes and metadata; nothing from the name of the file. What is no part of a model is told for what it is.
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s3dit import shapes
from s3dit.config import TextEncoderConfig, TransformerConfig, VAEConfig, variant_of
from s3dit.images import read_metadata
from s3dit.sources import Found, look_into, missing
from s3dit.terminal import line
from s3dit.text_encoder import TextEncoder
from s3dit.transformer import Transformer
from s3dit.vae import Autoencoder
from s3dit.weights.adapter import describe
from s3dit.weights.checkpoint import Checkpoint, CheckpointError, open_checkpoint, open_stored
from s3dit.weights.container import sniff
from s3dit.weights.formats import producer
from s3dit.weights.keymap import detect, official

# What the rest of a model is taken from in the command that is proposed.
HOME = "Tongyi-MAI/Z-Image-Turbo"
GROUPS = ("layers", "noise_refiner", "context_refiner", "siglip_refiner", "embed_tokens", "encoder", "decoder")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8 e5m2"}
MODULES: Mapping[str, type[nn.Module]] = {"transformer": Transformer, "text_encoder": TextEncoder, "vae": Autoencoder}
# Layers that a file may lack, because nothing reads them.
NOT_READ = re.compile(r"norm_final|model\.norm|lm_head")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a model in a file: formats are bytes by group of layers and number format, faults what is wrong."""

    part: str
    container: str
    spelling: str
    producer: str
    kind: str
    tensors: int
    nbytes: int
    formats: dict[str, dict[str, int]]
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What `look` found; rest are keys of no part, missing what a picture needs besides, command what would use it."""

    path: str
    parts: tuple[Part, ...]
    rest: tuple[str, ...]
    missing: tuple[str, ...]
    command: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for one in self.parts:
            lines.append(f"{one.part}: {one.kind}")
            lines.append(f"  {one.container}, {one.tensors} tensors, {size(one.nbytes)}; {one.spelling} names")
            lines.append(f"  made by {one.producer or 'a program that does not say so'}")
            for group, formats in one.formats.items():
                lines.append(f"  {group:<16} " + ", ".join(f"{name} {size(count)}" for name, count in formats.items()))
            lines += [f"  fault: {fault}" for fault in one.faults]
        if self.rest:
            few = ", ".join(self.rest[:3])
            lines.append(f"not used: {len(self.rest)} tensors of no part ({few}{', …' if len(self.rest) > 3 else ''})")
        lines.append(f"missing: {', '.join(self.missing) or 'nothing, it is a whole model'}")
        lines += [f"use it: {self.command}"] if self.command else ["not usable as it is, for the faults above"]
        return "\n".join(map(line, lines))


@dataclass(frozen=True, slots=True)
class Facts:
    """What `look` found in a file that is no part of a model: an adapter, or a picture with what made it."""

    path: str
    kind: str
    facts: dict[str, Any]
    command: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}"]
        lines += [f"  {name:<20} {value}" for name, value in self.facts.items() if value not in ("", None, [])]
        return "\n".join(map(line, [*lines, f"use it: {self.command}"]))


# How pictures that carry what made them begin.
PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")


def look(path: Path) -> Report | Facts:
    """Look at a file or a folder; raises CheckpointError for what is no part of a model, no adapter and no picture.

    A picture without metadata of its own raises RequestError, which says so.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(4)
        if head.startswith(PICTURES):
            made = read_metadata(path)
            command = f"s3dit generate --replay {shlex.quote(str(path))} -o again.png"
            return Facts(str(path), "a picture drawn by s3dit", made, command)
        if sniff(path) == "safetensors" and (facts := _adapter(path)) is not None:
            return facts
    found = look_into(path)
    lacking = missing(found.parts, found.tokenizer is not None)
    parts = tuple(_part(part, checkpoint, found) for part, checkpoint in found.parts.items())
    return Report(
        path=str(path),
        parts=parts,
        rest=tuple(found.rest),
        missing=tuple(lacking),
        command="" if any(one.faults for one in parts) else _command(path, found.parts, lacking),
    )


def _adapter(path: Path) -> Facts | None:
    """An adapter in a few words, None where the file is none."""
    info = describe(open_checkpoint(path))
    if info is None:
        return None
    facts = {
        "kind": ", ".join(info.kinds), "rank": ", ".join(map(str, info.ranks)),
        "alpha": ", ".join(f"{alpha:g}" for alpha in info.alphas) or "as large as the rank",
        "producer": info.producer or "a program that does not say so", "layers": info.layers,
        "parts": ", ".join(info.parts), "notes": "; ".join(info.notes),
    }  # fmt: skip
    command = f's3dit generate "a red fox in the snow" --model {HOME} --lora {shlex.quote(str(path))}'
    return Facts(str(path), "an adapter", facts, command)


def _part(part: str, checkpoint: Checkpoint, found: Found) -> Part:
    faults: tuple[str, ...] = ()
    config = found.configs.get(part)
    try:
        config = config or shapes.READERS[part](checkpoint)
        faults = tuple(_lacks(part, config, checkpoint))
        kind = _kind(config, found)
    except CheckpointError as error:
        kind, faults = "of a shape that this engine does not know", (str(error),)
    return Part(
        part=part,
        container=_container(checkpoint.path),
        spelling=detect(checkpoint).name,
        producer=_producer(checkpoint),
        kind=kind,
        tensors=len(checkpoint),
        nbytes=checkpoint.nbytes,
        formats=_formats(official(checkpoint)),
        faults=faults,
    )


def _container(path: Path) -> str:
    if path.is_dir():
        return "safetensors in shards"
    return {"gguf": "GGUF"}.get(kind := sniff(path), kind)


def _producer(checkpoint: Checkpoint) -> str:
    """Who wrote a file, as far as its metadata says; empty where it does not."""
    said = checkpoint.metadata
    for key, words in (
        ("s3dit", "s3dit {}"), ("general.quantized_by", "{}"), ("modelspec.author", "{}"),
        ("_quantization_metadata", "ComfyUI, in its quantized form"), ("prompt", "ComfyUI"), ("workflow", "ComfyUI"),
        ("model_class", "nunchaku ({})"),
    ):  # fmt: skip
        if said.get(key):
            return words.format(said[key][:60])
    architecture = said.get("general.architecture")
    if architecture is not None:
        return {
            "lumina2": "a converter for ComfyUI (architecture lumina2)", "qwen3": "llama.cpp (architecture qwen3)",
        }.get(architecture, f"architecture {architecture[:40]}")  # fmt: skip
    if not checkpoint.path.is_dir() and sniff(checkpoint.path) == "gguf":
        return "stable-diffusion.cpp, as far as one can tell (no architecture)"
    # The keys of a quantized format tell who writes it.
    return producer(open_stored(checkpoint.path))


def _kind(config: Any, found: Found) -> str:
    """A part in a few words."""
    if isinstance(config, TextEncoderConfig):
        base = f"rotation base {config.rope_theta:,.0f}"
        return f"Qwen3, {config.num_hidden_layers} layers of width {config.hidden_size}, {base}"
    if isinstance(config, VAEConfig):
        return f"the autoencoder of FLUX.1, {config.latent_channels} channels"
    assert isinstance(config, TransformerConfig)
    variant = "Turbo or Z-Image, which the file does not say"
    if config.siglip_feat_dim is not None or found.scheduler is not None:
        # Without SigLIP only the schedule tells.
        shift = found.scheduler
        variant = (
            "omni" if config.siglip_feat_dim is not None or shift is None else variant_of(config, shift) or variant
        )
    return f"Z-Image ({found.own.get('variant') or variant}), {config.n_layers} layers of width {config.dim}"


def _lacks(part: str, config: Any, checkpoint: Checkpoint) -> Iterable[str]:
    """Layers that the model has and the file has not, or the other way round."""
    with torch.device("meta"):
        needed = {name.rpartition(".")[0] or name for name in MODULES[part](config).state_dict()}
    stored = {name.rpartition(".")[0] or name for name in official(checkpoint)}
    for names, what in ((needed - stored, "lacks"), (stored - needed, "has besides")):
        names = {name for name in names if not NOT_READ.match(name)}
        if names:
            yield f"{what} {len(names)} layers ({', '.join(sorted(names)[:5])}{', …' if len(names) > 5 else ''})"


def _formats(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Bytes by group of layers and number format, largest first."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name in checkpoint:
        head = name.removeprefix("model.").split(".")[0]
        stored = checkpoint.format(name)
        counts[head if head in GROUPS else "other"][SHORT.get(stored, stored)] += checkpoint.entry(name).nbytes
    order = sorted(counts, key=lambda group: (*GROUPS, "other").index(group))
    return {group: dict(sorted(counts[group].items(), key=lambda item: -item[1])) for group in order}


def _command(path: Path, parts: Iterable[str], lacking: list[str]) -> str:
    """The command that draws with it."""
    file = shlex.quote(str(path))
    if not lacking:
        options = f"--model {file}"
    else:
        options = f"--model {HOME} " + " ".join(f"--{part.replace('_', '-')} {file}" for part in parts)
    return f's3dit generate "a red fox in the snow" {options}'


def size(count: int) -> str:
    """Bytes for people."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e8
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )
