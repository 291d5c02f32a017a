"""Makes graphs of a model's parts, and writes them to a folder with all that drawing takes.

A folder holds a graph a part (*.pt2 or *.onnx), `tokenizer.json`, `settings.json` and `runner.py`, which draws with
them and needs nothing of this package. Sizes are free in every graph: one serves any picture, prompt and batch.
"""

import importlib.util
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.export import ExportedProgram

from s3dit import __version__
from s3dit.errors import BackendError, RequestError
from s3dit.export.layout import batched_attention
from s3dit.export.modules import Features, Pixels, Velocity
from s3dit.kernels.attention import attention
from s3dit.kernels.dispatch import use_backend
from s3dit.model.text_encoder import EMBEDDING
from s3dit.model.tokenizer import TEMPLATE
from s3dit.pipeline import Pipeline
from s3dit.runtime.devices import own_settings
from s3dit.runtime.graphs import check_compiler
from s3dit.weights.model_folder import building

# What a graph is: of torch.export, compiled by AOTInductor for one kind of machine, or for onnxruntime.
Form = Literal["export", "compiled", "onnx"]
RUNNER = Path(__file__).with_name("runner.py")


def check(pipe: Pipeline, form: Form) -> None:
    """Raise RequestError or BackendError where a model cannot be written in a form."""
    if form not in get_args(Form):
        raise RequestError(f"form is {form!r}; needed {', '.join(get_args(Form))}")
    if pipe.config.transformer.siglip_feat_dim is not None:
        raise RequestError("this is an Omni model, which reads references; needed a text-to-image model to export")
    if pipe.config.scheduler.schedule != "official":
        raise RequestError(
            f"the model's schedule is {pipe.config.scheduler.schedule}; runner.py has the official one; needed a "
            "scheduler_config.json without it"
        )
    if pipe.parts.mode == "streamed" or pipe.parts.compiled:
        found = "compile" if pipe.parts.compiled else "residency streamed"
        raise RequestError(f"the model was loaded with {found}, so its blocks cannot be traced; load it without")
    if form == "compiled":
        check_compiler(pipe.placement.device)
    if form == "onnx":
        _check_onnx(pipe)


def _check_onnx(pipe: Pipeline) -> None:
    """Raise where a model cannot be written for onnxruntime."""
    if importlib.util.find_spec("onnxscript") is None:
        raise BackendError("onnx needs the package onnxscript, found none; pip install onnxscript onnxruntime")
    if quantized := {part: name for part, name in pipe.parts.formats.items() if name}:
        listed = ", ".join(f"{part} in {name}" for part, name in quantized.items())
        raise RequestError(f"found {listed}; onnx takes weights of floats: needed a model without number formats")
    if pipe.placement.compute != torch.float32:
        raise RequestError(f"onnx takes fp32, found {pipe.placement}; load the model with dtype fp32")


def modules(pipe: Pipeline) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts to export by name, each in memory for as long as it is held."""
    compute = pipe.placement.compute
    yield "text_encoder", Features(pipe.text_encoder, _embedding(pipe), compute)
    yield "transformer", Velocity(pipe.transformer, compute)
    yield "vae", Pixels(pipe.vae)


def _embedding(pipe: Pipeline) -> torch.Tensor:
    """Return the text encoder's embedding (vocabulary, hidden), of which the engine itself reads rows only."""
    stored = pipe.parts.checkpoints["text_encoder"]
    rows = stored.rows(EMBEDDING, torch.arange(stored.entry(EMBEDDING).shape[0]))
    stored.release()
    return rows.to(pipe.placement.device, pipe.placement.dtype)


@contextmanager
def traceable(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a part, or a module of one, be traced inside the `with`: by torch's own operations, sizes being symbols."""
    vae = module.vae if isinstance(module, Pixels) else None
    if vae is not None:
        # What is faster is the compiler's to say.
        before, vae.memory_format = vae.memory_format, torch.contiguous_format
    try:
        with own_settings(device), torch.device(device), use_backend("torch"), attention.traced_as(batched_attention):
            yield
    finally:
        if vae is not None:
            vae.memory_format = before


def program(module: Any, device: torch.device) -> ExportedProgram:
    """Trace one of `modules` on the device that it is on -> a graph that takes any sizes; raises RequestError."""
    with traceable(module, device):
        example, free = module.sizes()
        example = tuple(each.to(device) for each in example)
        # Not by the bytecode: what the model keeps by size, and its choice of operations, are plain Python.
        graph = torch.export.export(module.eval(), example, dynamic_shapes=free, strict=False)
    check_operations(graph)
    return graph


def check_operations(graph: ExportedProgram) -> None:
    """Raise RequestError where a graph holds operations of this package, without which it could not be loaded."""
    names = {str(node.target) for node in graph.graph.nodes}
    if own := sorted(name for name in names if name.startswith("s3dit.")):
        raise RequestError(
            f"the graph holds {', '.join(own)}, which torch alone does not have (of fp8 on this device, or of "
            "DFloat11); export another number format, or none (`s3dit convert` writes floats)"
        )


def write(
    pipe: Pipeline, folder: str | Path, form: Form = "export", progress: Callable[[str], None] = lambda part: None
) -> list[str]:
    """Write a model's graphs to a folder, which must not be there; returns notes.

    progress: called with the name of each part before it is written. Raises RequestError, BackendError.
    """
    check(pipe, form)
    folder = Path(folder)
    if folder.exists():
        raise RequestError(f"{folder} exists; needed a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with building(folder) as built:
        built.mkdir()
        for part, module in modules(pipe):
            progress(part)
            _save(program(module, pipe.placement.device), built / part, form)
            # Not beside the next one.
            del module
        notes = _copy_tokenizer(pipe, built)
        (built / "settings.json").write_text(json.dumps(settings(pipe, form), indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(RUNNER, built / RUNNER.name)
    return notes


def _save(graph: ExportedProgram, path: Path, form: Form) -> None:
    """Write a graph to path.pt2 or path.onnx."""
    with warnings.catch_warnings():
        # torch warns of its own use of itself.
        warnings.simplefilter("ignore", FutureWarning)
        if form == "export":
            torch.export.save(graph, path.with_suffix(".pt2"))
        elif form == "compiled":
            torch._inductor.aoti_compile_and_package(graph, package_path=str(path.with_suffix(".pt2")))
        else:
            # It says of each operation of torchvision that torchvision is not there.
            logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
            exported = torch.onnx.export(graph, dynamo=True, verbose=False)
            assert exported is not None
            # Above 2 GB a file of this kind must keep its weights beside it.
            exported.save(path.with_suffix(".onnx"), external_data=True)


def _copy_tokenizer(pipe: Pipeline, built: Path) -> list[str]:
    """Copy tokenizer.json; without one, gives a note."""
    source = pipe.sources.tokenizer
    if isinstance(source, Path) and (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", built / "tokenizer.json")
        return []
    return ["the model has no tokenizer.json: runner.py takes token ids only, until one is put beside it"]


def settings(pipe: Pipeline, form: Form) -> dict[str, Any]:
    """Return what `runner.py` must know of a model, as JSON values."""
    scheduler, own = pipe.config.scheduler, pipe.config.settings
    # The shift of noise levels for a picture of n tokens is slope · n + offset, or e to the power of that.
    slope, offset = 0.0, scheduler.shift
    if scheduler.use_dynamic_shifting:
        slope = (scheduler.max_shift - scheduler.base_shift) / (
            scheduler.max_image_seq_len - scheduler.base_image_seq_len
        )
        offset = scheduler.base_shift - slope * scheduler.base_image_seq_len
    exponential = scheduler.use_dynamic_shifting and scheduler.time_shift_type == "exponential"
    return {
        "s3dit": __version__,
        "torch": torch.__version__,
        "form": form,
        "device": pipe.placement.device.type,
        "placement": str(pipe.placement),
        "template": TEMPLATE,
        "longest": 512,
        "steps": own.num_inference_steps,
        "guidance_scale": own.guidance_scale,
        "height": own.height,
        "width": own.width,
        "shift": {"slope": slope, "offset": offset, "exponential": exponential},
    }
