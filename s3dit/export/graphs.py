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
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.export import ExportedProgram

from s3dit import __version__
from s3dit.control import Control, shown
from s3dit.errors import BackendError, RequestError
from s3dit.export.layout import batched_attention
from s3dit.export.modules import Features, Latents, Pixels, Velocity
from s3dit.kernels.attention import attention
from s3dit.kernels.dispatch import use_backend
from s3dit.kernels.number_format import DFLOAT11
from s3dit.model.controlnet import ControlNet
from s3dit.model.text_encoder import EMBEDDING
from s3dit.model.tokenizer import TEMPLATE
from s3dit.pipeline import Pipeline
from s3dit.runtime.devices import own_settings
from s3dit.runtime.graphs import check_compiler
from s3dit.weights.assign import schemes
from s3dit.weights.model_folder import building
from s3dit.weights.quantize import named

# What a graph is: of torch.export, compiled by AOTInductor for one kind of machine, or for onnxruntime.
Form = Literal["export", "compiled", "onnx"]
RUNNER = Path(__file__).with_name("runner.py")


def check(pipe: Pipeline, form: Form, control: Control | None = None) -> None:
    """Raise RequestError, BackendError or CheckpointError where a model cannot be written in a form."""
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
    formats = {part: name for part, name in pipe.parts.formats.items() if name}
    if control is not None:
        formats |= _control_format(pipe, control)
    _check_formats(formats, form, pipe.placement.device)
    if form == "compiled":
        check_compiler(pipe.placement.device)
    if form == "onnx":
        _check_onnx(pipe)


def _control_format(pipe: Pipeline, control: Control) -> dict[str, str]:
    """Open a control's ControlNet -> its number format by its name, if any; raises for what only pictures have."""
    if not isinstance(control, Control):
        raise RequestError(f"control is {shown(control)}; needed a Control, as in Control(path)")
    given = [name for name in ("image", "inpaint", "mask") if getattr(control, name) is not None]
    given += ["start and end"] if (control.start, control.end) != (0, 1) else []
    if given:
        raise RequestError(
            f"control has {', '.join(given)}; a graph takes any: needed the file alone, with strength, version or rule "
            "if wanted; give the rest to runner.py"
        )
    try:
        # What remains is checked as with a picture.
        replace(control, image="").check()
    except ValueError as error:
        raise RequestError(str(error)) from None
    part, _ = pipe.parts.controlnet(control)
    name = named(schemes(pipe.parts.component(part).module))
    return {part: name} if name else {}


def _check_formats(formats: dict[str, str], form: Form, device: torch.device) -> None:
    """Raise RequestError for a part in a number format, by name, that a graph of this form cannot hold."""
    listed = ", ".join(f"{part} in {name}" for part, name in formats.items())
    convert = "write floats first: s3dit convert MODEL DIR"
    if formats and form == "onnx":
        raise RequestError(f"found {listed}; onnx takes weights of floats; load without quantize, or {convert}")
    if DFLOAT11 in formats.values():
        raise RequestError(f"found {listed}; torch alone does not decode it; {convert}")
    if "fp8" in formats.values() and device.type == "cuda":
        raise RequestError(
            f"found {listed}; on a GPU products of fp8 are this package's own; take fp8-weights or int8, or {convert}"
        )


def _check_onnx(pipe: Pipeline) -> None:
    """Raise where a model cannot be written for onnxruntime."""
    if importlib.util.find_spec("onnxscript") is None:
        raise BackendError("onnx needs the package onnxscript, found none; pip install onnxscript onnxruntime")
    if pipe.placement.compute != torch.float32:
        raise RequestError(f"onnx takes fp32, found {pipe.placement}; load the model with dtype fp32")


def modules(pipe: Pipeline, control: Control | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts to export by name, each in memory for as long as it is held.

    control: a ControlNet that becomes a part of the transformer.
    """
    compute = pipe.placement.compute
    yield "text_encoder", Features(pipe.text_encoder, _embedding(pipe), compute)
    transformer = pipe.transformer
    net, rule = None, "authors" if control is None else control.rule or "authors"
    if control is not None:
        with pipe.parts.beside():
            net = cast(ControlNet, pipe.parts.handle(pipe.parts.controlnet(control)[0]))
    yield "transformer", Velocity(transformer, compute, net, rule)
    del transformer, net
    yield "vae", Pixels(pipe.vae)
    yield "vae_encoder", Latents(pipe.vae)


def _embedding(pipe: Pipeline) -> torch.Tensor:
    """Return the text encoder's embedding (vocabulary, hidden), of which the engine itself reads rows only."""
    stored = pipe.parts.checkpoints["text_encoder"]
    rows = stored.rows(EMBEDDING, torch.arange(stored.entry(EMBEDDING).shape[0]))
    stored.release()
    return rows.to(pipe.placement.device, pipe.placement.dtype)


@contextmanager
def traceable(device: torch.device) -> Iterator[None]:
    """Let parts, or modules of them, be traced inside the `with`: by torch's own operations, sizes being symbols."""
    with own_settings(device), torch.device(device), use_backend("torch"), attention.traced_as(batched_attention):
        yield


def program(module: Any, device: torch.device) -> ExportedProgram:
    """Trace one of `modules` on the device that it is on -> a graph that takes any sizes; raises RequestError."""
    with traceable(device):
        example, free = module.sizes()
        example = tuple(each.to(device) for each in example)
        # Not by the bytecode: what the model keeps by size, and its choice of operations, are plain Python.
        graph = torch.export.export(module.eval(), example, dynamic_shapes=free, strict=False)
    check_operations(graph)
    _drop_casts(graph)
    return graph


def _drop_casts(program: ExportedProgram) -> None:
    """Take casts to a tensor's own dtype out of a graph, a third of its nodes in fp32, each of which costs loading."""
    aten = torch.ops.aten
    for node in program.graph.nodes:
        if node.target == aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        elif node.target == aten.to.dtype and not any(user.op == "output" for user in node.users):
            source = node.args[0]
            if source.meta["val"].dtype == node.meta["val"].dtype and len(node.args) == 2 and not node.kwargs:
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
    program.graph_module.recompile()


def check_operations(graph: ExportedProgram) -> None:
    """Raise RequestError where a graph holds operations of this package, without which it could not be loaded."""
    names = {str(node.target) for node in graph.graph.nodes}
    if own := sorted(name for name in names if name.startswith("s3dit.")):
        raise RequestError(
            f"the graph holds {', '.join(own)}, which torch alone does not have (of fp8 on this device, or of "
            "DFloat11); export another number format, or none (`s3dit convert` writes floats)"
        )


def write(
    pipe: Pipeline, folder: str | Path, form: Form = "export", progress: Callable[[str], None] = lambda part: None,
    control: Control | None = None,
) -> list[str]:  # fmt: skip
    """Write a model's graphs to a folder, which must not be there; returns notes.

    progress: called with the name of each part before it is written · control: a ControlNet, without a picture, that
    becomes a part of the transformer. Raises RequestError, BackendError, CheckpointError.
    """
    check(pipe, form, control)
    folder = Path(folder)
    if folder.exists():
        raise RequestError(f"{folder} exists; needed a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with building(folder) as built:
        built.mkdir()
        for part, module in modules(pipe, control):
            progress(part)
            _save(program(module, pipe.placement.device), built / part, form)
            # Not beside the next one.
            del module
        notes = _copy_tokenizer(pipe, built)
        notes += [] if control is None else pipe.parts.controlnet(control)[1].notes
        (built / "settings.json").write_text(
            json.dumps(settings(pipe, form, control), indent=2) + "\n", encoding="utf-8"
        )
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


def settings(pipe: Pipeline, form: Form, control: Control | None = None) -> dict[str, Any]:
    """Return what `runner.py` must know of a model, as JSON values."""
    scheduler, own = pipe.config.scheduler, pipe.config.settings
    # The shift of noise levels for a picture of n tokens is slope · n + offset, or e to the power of that.
    slope, offset = 0.0, scheduler.shift
    if scheduler.use_dynamic_shifting:
        slope = (scheduler.max_shift - scheduler.base_shift) / (
            scheduler.max_image_seq_len - scheduler.base_image_seq_len
        )
        offset = scheduler.base_shift - slope * scheduler.base_image_seq_len
    given = None
    if control is not None:
        _, net = pipe.parts.controlnet(control)
        strength = net.strength if control.strength is None else control.strength
        given = {"net": str(net), "channels": net.channels, "strength": strength}
    exponential = scheduler.use_dynamic_shifting and scheduler.time_shift_type == "exponential"
    return {
        "s3dit": __version__,
        "torch": torch.__version__,
        "form": form,
        "device": pipe.placement.device.type,
        "placement": str(pipe.placement),
        "template": TEMPLATE,
        "longest": 512,
        "vocabulary": pipe.config.text_encoder.vocab_size,
        "steps": own.num_inference_steps,
        "guidance_scale": own.guidance_scale,
        "height": own.height,
        "width": own.width,
        "shift": {"slope": slope, "offset": offset, "exponential": exponential},
        "control": given,
    }
