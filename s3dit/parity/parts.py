"""The parts of a model as diffusers and transformers read them, each by their own loader where they have one.

A folder in the official layout is loaded by `from_pretrained`, which knows the quantizers of diffusers' friends, a
single file or GGUF by `from_single_file`. What they cannot read, or would misread in silence (this engine's own number
formats, scaled 8-bit files, a text encoder in a file), is first written in the official layout, dequantized, by
`s3dit convert`: of that only names and decoding are not compared, and a note says so.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s3dit import __version__
from s3dit.cli.convert_model import TRANSFORMER, VAE, convert
from s3dit.errors import RequestError
from s3dit.kernels.schemes import SCHEMES
from s3dit.pipeline import Pipeline
from s3dit.runtime.sources import VISION_TOWER
from s3dit.weights.adapter import read_adapter
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.hub import resolve_file

# Stems of files that lie beside the config.json that is about them.
OFFICIAL = ("diffusion_pytorch_model", "model")


class ReferenceParts(ExitStack):
    """Loads the parts that a pipeline has, in a dtype onto a device, as the reference reads them.

    streamed: the blocks of transformer and text encoder come from their files one by one, whenever they compute, so
    that the whole fits beside anything. notes: what is not compared. Converted copies go when the stack is left.
    """

    def __init__(self, pipe: Pipeline, dtype: torch.dtype, device: str, streamed: bool = False) -> None:
        super().__init__()
        self.pipe, self.dtype, self.device, self.streamed = pipe, dtype, torch.device(device), streamed
        self.notes: list[str] = []
        self._converted: dict[Path, Path] = {}

    @property
    def reads_gguf(self) -> bool:
        """Whether diffusers' own reader of GGUF takes part."""
        return self._found("transformer")[0] == "gguf"

    def load(self, part: str) -> Any:
        """Load a part: text_encoder, transformer, vae or siglip."""
        model = getattr(self, f"_{part}")()
        return (model if self.streamed and part in ("text_encoder", "transformer") else model.to(self.device)).eval()

    def tokenizer(self) -> Any:
        """The tokenizer; raises RequestError for one inside of a GGUF file."""
        import transformers

        folder = self.pipe.sources.tokenizer
        if not isinstance(folder, Path):
            raise RequestError(
                f"tokenizer is inside of {folder.path.name}, which the reference cannot read; give it with --tokenizer"
            )
        return transformers.AutoTokenizer.from_pretrained(folder)

    def siglip_processor(self) -> Any:
        """What prepares references for the vision tower, in the form that needs no torchvision."""
        from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

        return Siglip2ImageProcessorPil.from_pretrained(self.pipe.folder / "siglip_processor")

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler_config.json of the model, or what this engine took where there is none."""
        path = self.pipe.folder / "scheduler" / "scheduler_config.json"
        if path.is_file():
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return config
        return {"shift": self.pipe.config.scheduler.shift}

    def controlnet(self, part: str) -> Any:
        """A ControlNet: a folder by diffusers' loader, an official file by its tensors."""
        import diffusers

        config, path = self.pipe.parts.controlnets[part], self.pipe.parts.checkpoints[part].path
        if (path.parent / "config.json").is_file() and path.stem == OFFICIAL[0]:
            return diffusers.ZImageControlNetModel.from_pretrained(path.parent, torch_dtype=self.dtype).to(self.device)
        base = self.pipe.config.transformer
        own = {"1.0": None, "2.0": "control_layers", "2.1": "control_noise_refiner"}[config.version]
        model = diffusers.ZImageControlNetModel(
            control_layers_places=list(config.places), control_in_dim=config.channels, add_control_noise_refiner=own,
            control_refiner_layers_places=list(range(base.n_refiner_layers)), dim=base.dim, n_heads=base.n_heads,
            n_refiner_layers=base.n_refiner_layers, n_kv_heads=base.n_kv_heads, norm_eps=base.norm_eps,
        )  # fmt: skip
        checkpoint = self.pipe.parts.checkpoints[part]
        model.load_state_dict({name: checkpoint.load(name) for name in model.state_dict()})
        self.notes.append(f"{path.name}: the names in it are read by this engine on both sides")
        return model.to(self.device, self.dtype).eval()

    def _transformer(self) -> Any:
        import diffusers

        kind, (how, path) = diffusers.ZImageTransformer2DModel, self._found("transformer")
        if self.streamed:
            return self._stream(kind, path, "")
        if how == "folder":
            model = kind.from_pretrained(path, torch_dtype=self.dtype)
        else:
            options: dict[str, Any] = {"config": str(self._config("transformer")), "subfolder": "transformer"}
            if how == "gguf":
                self.notes += [f"{path.name}: decoded in fp32, where diffusers by itself takes fp16"] * (
                    self.dtype == torch.float32
                )
                options["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=self.dtype)
            model = kind.from_single_file(str(path), torch_dtype=self.dtype, **options)
        return self._adapted(model)

    def _vae(self) -> Any:
        import diffusers

        how, path = self._found("vae")
        if how == "folder":
            return diffusers.AutoencoderKL.from_pretrained(path, torch_dtype=self.dtype)
        config = str(self._config("vae"))
        return diffusers.AutoencoderKL.from_single_file(
            str(path), torch_dtype=self.dtype, config=config, subfolder="vae"
        )

    def _text_encoder(self) -> Any:
        import transformers

        how, path = self._found("text_encoder")
        path = path if how == "folder" else self._official("text_encoder", path)
        if self.streamed:
            return self._stream(transformers.Qwen3Model, path, "model.")
        return transformers.Qwen3Model.from_pretrained(path, dtype=self.dtype)

    def _siglip(self) -> Any:
        import transformers

        folder = self.pipe.folder / VISION_TOWER
        return transformers.Siglip2VisionModel.from_pretrained(folder, dtype=self.dtype)

    def _found(self, part: str) -> tuple[str, Path]:
        """How a part is loaded, "folder", "file" or "gguf", and from where."""
        path = self.pipe.sources.checkpoints[part].path
        folder = path if path.is_dir() else path.parent
        schemes = {stored.name for stored in self.pipe.parts.checkpoints[part].formats.values()}
        beside = (folder / "config.json").is_file() and (path.is_dir() or path.name.split(".")[0] in OFFICIAL)
        if path.suffix == ".gguf" and part == "transformer":
            return "gguf", path
        if schemes & set(SCHEMES) or (schemes and not beside) or path.suffix == ".gguf":
            return "folder", self._official(part, folder if beside else path)
        return ("folder", folder) if beside else ("file", path)

    def _official(self, part: str, path: Path) -> Path:
        """A part in the official layout, written anew from what this engine reads of it."""
        if path not in self._converted:
            target = Path(self.enter_context(tempfile.TemporaryDirectory())) / "model"
            convert(path, target, version=__version__, dtype="fp32" if self.dtype == torch.float32 else "bf16")
            self._converted[path] = target
            self.notes.append(f"{path.name}: names and decoding of its {part} are this engine's on both sides")
        return self._converted[path] / part

    def _config(self, part: str) -> Path:
        """A folder whose `part`/config.json is the configuration that this engine found for a single file."""
        folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        constants: Any = {"transformer": TRANSFORMER, "vae": VAE}[part]
        config = constants | _levels(asdict(getattr(self.pipe.config, part)))
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    def _adapted(self, transformer: Any) -> Any:
        """The transformer with the pipeline's adapters, by diffusers' own loader."""
        import diffusers

        loaded = self.pipe.parts.adapters
        if loaded:
            pipe = diffusers.ZImagePipeline(None, None, None, None, transformer)
            names = [f"adapter{i}" for i in range(len(loaded))]
            for name, each, said in zip(names, loaded.values(), self.pipe.lora.records(), strict=True):
                if own := {"blocks", "steps"} & set(said):
                    raise RequestError(
                        f"{each.source} has {' and '.join(sorted(own))}, which diffusers' loader has not"
                    )
                if "text_encoder" in each.deltas:
                    raise RequestError(f"{each.source} changes the text encoder, which diffusers' loader does not do")
                path = read_adapter(resolve_file(each.source)).path
                pipe.load_lora_weights(path if path.is_dir() else path.parent, weight_name=path.name, adapter_name=name)
            pipe.set_adapters(names, [each.scale for each in loaded.values()])
        return transformer

    def _stream(self, kind: Any, folder: Path, prefix: str) -> Any:
        """A model on the meta device whose blocks read their weights when they compute, and drop them after."""
        if self.pipe.parts.adapters:
            raise RequestError("adapters cannot be streamed into the reference; compute the truth on the same device")
        checkpoint = open_checkpoint(folder)
        names = {name.removeprefix(prefix): name for name in checkpoint}
        config = kind.config_class.from_pretrained(folder) if hasattr(kind, "config_class") else None
        with torch.device("meta"):
            model = kind(config) if config is not None else kind.from_config(kind.load_config(folder))
        if hasattr(model, "rotary_emb"):
            # What is computed, not stored, was made on the meta device, too.
            model.rotary_emb = type(model.rotary_emb)(config)

        def read(module: nn.Module, prefix: str) -> None:
            for name, _ in [*module.named_parameters()]:
                tensor = checkpoint.load(names[prefix + name]).to(self.dtype, copy=True)
                owner = module.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor.to(self.device), requires_grad=False))

        return stream_blocks(model, read)


def stream_blocks(model: nn.Module, read: Callable[[nn.Module, str], None]) -> nn.Module:
    """Let a model on the meta device read every block of its lists before it computes, and drop it after.

    read(module, prefix): put the weights of a module, whose names begin with prefix, in their place.
    """
    lists = [(name, child) for name, child in model.named_children() if isinstance(child, nn.ModuleList)]
    for name, child in model.named_children():
        if not isinstance(child, nn.ModuleList):
            read(child, f"{name}.")
    for name, blocks in lists:
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda module, _, at=f"{name}.{i}.": read(module, at))
            block.register_forward_hook(lambda module, *_: module.to("meta") and None)
    own = nn.Module()
    for name, parameter in [*model.named_parameters(recurse=False)]:
        own.register_parameter(name, parameter)
    read(own, "")
    for name, parameter in own.named_parameters():
        setattr(model, name, parameter)
    return model


def _levels(config: dict[str, Any]) -> dict[str, Any]:
    """A VAE's configuration with the kinds of its levels, which diffusers wants spelled out; others as they are."""
    if "block_out_channels" in config:
        levels = len(config["block_out_channels"])
        config |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return config
