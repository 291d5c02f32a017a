"""Describe a file of weights: container, spelling, producer, parts, number formats, what is missing, how to use it.

Only headers are read, so a file of 24 GB takes no longer than a small one. Everything is detected by bytes, names,
shapes and metadata; nothing by the name of the file. `inspect_path` takes any file: adapters, ControlNets and parts of
a model are described here, pictures in `inspect_pictures`, settings and tokenizers in `inspect_files`.
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from s3dit.cli.inspect_files import described, maker
from s3dit.cli.inspect_pictures import is_picture, picture
from s3dit.cli.inspect_report import HOME, Facts, Part, Report, draw, size
from s3dit.cli.record import PLACE
from s3dit.configs import infer_config
from s3dit.configs.layer_shapes import layer_shapes
from s3dit.configs.model_files import read_json
from s3dit.errors import CheckpointError
from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig, variant_of
from s3dit.model.controlnet_config import BASE, EMBEDDER, ControlNetConfig, settings_of
from s3dit.model.part_specs import SPECS
from s3dit.runtime.sources import OpenedModel, missing, open_model
from s3dit.weights.adapter_info import CONFIG, AdapterInfo, describe
from s3dit.weights.checkpoint import Checkpoint, open_checkpoint, open_stored
from s3dit.weights.container import sniff
from s3dit.weights.formats import producer
from s3dit.weights.hub_files import ADAPTERS
from s3dit.weights.keymap import detect, official
from s3dit.weights.split_checkpoint import PARTS

GROUPS = ("layers", "noise_refiner", "context_refiner", "siglip_refiner", "embed_tokens", "encoder", "decoder")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8 e5m2"}
# Layers that a file may lack, because nothing reads them.
NOT_READ = re.compile(r"norm_final|model\.norm|lm_head")
# What says the width of text features, of which all parts of a model have one.
WIDTHS = {"transformer": "cap_feat_dim", "text_encoder": "hidden_size", "vae": ""}
# The model that adapters of few steps are distilled from; Turbo is distilled itself.
DISTILLED = "Tongyi-MAI/Z-Image"
NO_PRODUCER = "a program that does not say so"


def inspect_path(path: Path, name: str | None = None) -> Report | Facts:
    """Describe a file or a folder; raises CheckpointError for what this engine does not use.

    name: what the user calls it, for the command (default: the path). A picture without metadata raises RequestError,
    which says so.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if is_picture(path):
        return picture(path)
    if (small := described(path)) is None:
        return _weights(path, name or str(path))
    facts, home = small
    if home is None or any(note.startswith("not usable") for note in facts.notes):
        return facts
    try:
        return replace(facts, command=_weights(home, str(home)).command)
    except CheckpointError as error:
        return replace(facts, notes=(*facts.notes, f"not used alone, but with its folder: {error}"))


def absent(name: str, folder: Path, lacking: Collection[str]) -> Facts:
    """Describe a repository of the Hub whose weights are not in the cache, by its settings; nothing is downloaded."""
    folder = folder if folder.is_dir() else folder.parent
    parts = [part for part in PARTS if any(file.startswith(f"{part}/") for file in lacking) or (folder / part).is_dir()]
    # One file says less by its name than its weights would.
    parts = [] if name.count("/") > 1 else parts
    facts: dict[str, Any] = {}
    for place in (*parts, "scheduler", "."):
        if (folder / place).is_dir() and (small := described(folder / place)) is not None:
            facts[small[0].kind] = small[0].facts
    facts["not in the cache"] = sorted(lacking)[:12]
    options = ["--model", HOME]
    if len(parts) == len(PARTS):
        kind, options = "a model", ["--model", name]
    elif parts:
        kind = "parts of a model"
        options += [word for part in parts for word in (_option(part), name)]
    elif (folder / CONFIG).is_file() or {*ADAPTERS[:2]} & {*lacking}:
        kind, options = "an adapter", [*options, "--lora", name]
    else:
        kind, options = "a file of weights", []
    note = "described without downloading it; drawing with it does"
    if not options:
        repository, _, revision = "/".join(name.split("/")[:2]).partition("@")
        words = shlex.join([repository, *sorted(lacking), *(["--revision", revision] if revision else [])])
        note = f"only its weights say what it is; get them with `hf download {words}`, then inspect it again"
    return Facts(name, f"{kind} on the Hub", facts, draw(options) if options else "", (note,))


def _weights(path: Path, name: str) -> Report | Facts:
    """Describe weights: an adapter, a ControlNet, or parts of a model."""
    whole = path.is_dir() and any((path / part).is_dir() for part in PARTS)
    stored = not whole and (any(path.glob("*.safetensors")) if path.is_dir() else sniff(path) == "safetensors")
    if stored:
        checkpoint = open_checkpoint(path)
        if (info := describe(checkpoint)) is not None:
            return _adapter(checkpoint, info, name)
        if EMBEDDER in checkpoint:
            return _controlnet(path, checkpoint, name)
    opened = open_model(path)
    lacking = missing(opened.parts, opened.tokenizer is not None)
    parts = tuple(_part(part, checkpoint, opened) for part, checkpoint in opened.parts.items())
    return Report(
        path=name,
        parts=parts,
        rest=tuple(opened.rest),
        missing=tuple(lacking),
        command="" if any(part.faults for part in parts) else _command(name, opened.parts, lacking, _base(opened)),
    )


def _base(opened: OpenedModel) -> str:
    """The model that parts go with: the published one, or one of their own width of text features."""
    widths = set()
    for part, checkpoint in opened.parts.items():
        with suppress(CheckpointError):
            config = opened.configs.get(part) or SPECS[part].infer(checkpoint)
            widths.add(getattr(config, WIDTHS[part], infer_config.TEXT_ENCODER.hidden_size))
    return HOME if widths == {infer_config.TEXT_ENCODER.hidden_size} else f"{PLACE}MODEL"


def _adapter(checkpoint: Checkpoint, info: AdapterInfo, name: str) -> Facts:
    """What an adapter's header says, and which of its layers the published model does not have."""
    settings = checkpoint.path.parent / CONFIG
    who = info.producer
    if who in ("", "PEFT") and settings.is_file():
        who = maker(read_json(settings)) or who
    facts = {
        "kind": ", ".join(info.kinds), "rank": ", ".join(map(str, info.ranks)),
        "alpha": ", ".join(f"{alpha:g}" for alpha in info.alphas) or "as large as the rank",
        "producer": who or NO_PRODUCER, "layers": info.layers, "parts": ", ".join(info.parts),
    }  # fmt: skip
    layers = [(part, layer, shape) for part, layers in info.shapes.items() for layer, shape in layers.items()]
    wrong = [f"{layer} {list(shape)}" for part, layer, shape in layers if _published(part).get(layer, ()) != shape]
    notes, model = [*info.notes], HOME
    if layers and len(wrong) == len(layers):
        model, wrong = f"{PLACE}MODEL", []
        notes.append(
            f"made for a model of other sizes than {HOME}: {_first(f'{name} {list(s)}' for _, name, s in layers)}"
        )
    if lost := [*info.unmatched, *wrong]:
        notes.append(f"{len(lost)} of its layers or tensors fit nothing, and are left out: {_first(lost)}")
    partial, strength = ["--lora-allow-partial"] if lost else [], ""
    if info.few_steps is not None:
        # Its steps, its shift and no guidance are taken by themselves; its strength is the user's.
        facts["distilled for"], strength = str(info.few_steps), f":{info.few_steps.strength:g}"
        model = DISTILLED if model == HOME else model
    command = draw(["--model", model, *partial, "--lora", f"{name}{strength}"])
    return Facts(name, "an adapter", facts, command, tuple(notes))


@cache
def _published(part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of the published model."""
    return layer_shapes(SPECS[part].published)


def _first(names: Iterable[str]) -> str:
    """The first four names, separated by commas."""
    first = [name[:80] for name in names]
    return ", ".join(first[:4]) + (", …" if len(first) > 4 else "")


def _controlnet(path: Path, checkpoint: Checkpoint, name: str) -> Facts:
    """What a ControlNet is, with a model of its own sizes."""
    folder = settings_of(path)
    settings = read_json(folder / "config.json") if folder and (folder / "config.json").is_file() else {}
    rows = (checkpoint.entry(EMBEDDER).shape or (0,))[0]
    sizes = {"dim": rows} | {key: settings[key] for key in BASE[1:] if type(settings.get(key)) in (int, float)}
    base = replace(infer_config.TRANSFORMER, **sizes)
    facts: dict[str, Any] = {"producer": maker(settings) or _producer(checkpoint) or NO_PRODUCER, "width": rows}
    try:
        config = ControlNetConfig.of(checkpoint, base, None, folder)
    except CheckpointError as error:
        return Facts(name, "a ControlNet", facts, "", (f"not usable: {error}",))
    layers = len({key.split(".")[1] for key in checkpoint if key.startswith("control_layers.")})
    facts |= {
        "version": config.version, "channels": config.channels, "layers": layers, "strength": config.strength,
        "inpaints": config.inpaints, "size": size(checkpoint.nbytes),
    }  # fmt: skip
    model = HOME if rows == infer_config.TRANSFORMER.dim else f"{PLACE}MODEL"
    return Facts(name, "a ControlNet", facts, draw(["--model", model, "--control", f"{name}:{PLACE}pose.png"]))


def _option(part: str) -> str:
    return f"--{part.replace('_', '-')}"


def _part(part: str, checkpoint: Checkpoint, opened: OpenedModel) -> Part:
    faults: tuple[str, ...] = ()
    notes: list[str] = []
    config = opened.configs.get(part)
    try:
        config = config or SPECS[part].infer(checkpoint, None, notes)
        faults = tuple(_lacks(config, checkpoint))
        kind = _kind(config, opened)
    except CheckpointError as error:
        kind, faults = "of a shape that this engine does not know", (str(error),)
    return Part(
        part=part,
        container=_container(checkpoint.path),
        spelling=detect(checkpoint).name,
        producer=_producer(checkpoint) or _settled(checkpoint.path),
        kind=kind,
        tensors=len(checkpoint),
        nbytes=checkpoint.nbytes,
        formats=_formats(official(checkpoint)),
        faults=faults,
        notes=tuple(notes),
    )


def _settled(path: Path) -> str:
    """The library that wrote the settings beside a part's weights; "" if they do not say."""
    settings = (path if path.is_dir() else path.parent) / "config.json"
    return maker(read_json(settings)) if settings.is_file() else ""


def _container(path: Path) -> str:
    if path.is_dir():
        return "safetensors in shards"
    return {"gguf": "GGUF"}.get(kind := sniff(path), kind)


def _producer(checkpoint: Checkpoint) -> str:
    """The program that wrote a file, by its metadata or its keys; "" if neither says."""
    metadata = checkpoint.metadata
    for key, words in (
        ("s3dit", "s3dit {}"), ("general.quantized_by", "{}"), ("modelspec.author", "{}"),
        ("_quantization_metadata", "ComfyUI, in its quantized form"), ("prompt", "ComfyUI"), ("workflow", "ComfyUI"),
        ("model_class", "nunchaku ({})"),
    ):  # fmt: skip
        if metadata.get(key):
            return words.format(metadata[key][:60])
    architecture = metadata.get("general.architecture")
    if architecture is not None:
        return {
            "lumina2": "a converter for ComfyUI (architecture lumina2)", "qwen3": "llama.cpp (architecture qwen3)",
        }.get(architecture, f"architecture {architecture[:40]}")  # fmt: skip
    if not checkpoint.path.is_dir() and sniff(checkpoint.path) == "gguf":
        return "stable-diffusion.cpp, as far as can be told (no architecture)"
    # The keys of a quantized format tell who writes it.
    return producer(open_stored(checkpoint.path))


def _kind(config: Any, opened: OpenedModel) -> str:
    """A part of a model in a phrase."""
    if isinstance(config, TextEncoderConfig):
        base = f"rotation base {config.rope_theta:,.0f}"
        return f"Qwen3, {config.num_hidden_layers} layers of width {config.hidden_size}, {base}"
    if isinstance(config, VAEConfig):
        return f"the autoencoder of FLUX.1, {config.latent_channels} channels"
    assert isinstance(config, TransformerConfig)
    variant = "Turbo or Z-Image, which the file does not say"
    if config.siglip_feat_dim is not None or opened.scheduler is not None:
        # Without SigLIP only the schedule tells.
        shift = opened.scheduler
        variant = (
            "omni" if config.siglip_feat_dim is not None or shift is None else variant_of(config, shift) or variant
        )
    twin = ", with the second timestep of TwinFlow" if config.target_timestep else ""
    return f"Z-Image ({opened.own.get('variant') or variant}), {config.n_layers} layers of width {config.dim}{twin}"


def _lacks(config: Any, checkpoint: Checkpoint) -> Iterable[str]:
    """Layers that the model has and the file has not, or the other way round."""
    known = set(layer_shapes(config))
    # The features are the output of the last layer but one.
    last = f"model.layers.{config.num_hidden_layers - 1}." if isinstance(config, TextEncoderConfig) else None
    needed = {name for name in known if last is None or not name.startswith(last)}
    stored = {name.rpartition(".")[0] or name for name in official(checkpoint)}
    for names, what in ((needed - stored, "lacks"), (stored - known, "has besides")):
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


def _command(name: str | Path, parts: Iterable[str], lacking: list[str], base: str = HOME) -> str:
    """The command that draws with it."""
    if not lacking:
        return draw(["--model", str(name)])
    return draw(["--model", base, *(word for part in parts for word in (_option(part), str(name)))])
