"""Fewer launches for the same arithmetic: compiled blocks, and whole passes recorded once and replayed.

`compile_blocks` gives each kind of repeated block to torch.compile once, not the model: one graph serves all thirty
main blocks. Sizes are symbols in it, and attention is an opaque node (`kernels/attention.py`), so no picture size,
prompt length, batch or guidance compiles anything anew. Hooks of the blocks stay outside of the graph, so streamed
blocks (`block_streaming`) work as before; a block with hooks or a forward of a user inside, or while `op.using` is in
force, runs uncompiled.

`Replay` records a pass as a CUDA graph and replays it: one launch in place of hundreds, which decides the speed of
small pictures. A recording has its own buffers, and serves all calls whose arguments have the same shapes and host
numbers; lengths being multiples of 32, that is one recording a size and bucket of prompt lengths.

Both operate on any module. Not here: compiling the text encoder or the autoencoder, which run once a picture.
"""

import dataclasses
import os
import shutil
import sys
import sysconfig
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.errors import BackendError
from s3dit.kernels.dispatch import backend, numerics, overridden
from s3dit.model.hooks import Own, watched
from s3dit.runtime.block_streaming import repeated, tensors

# Recordings that are kept: two (guided and not) of the last few sizes. Their working memory is one shared pool.
KEPT = 8
# Graphs that one kind of block may have in a process: models of other dtypes and number formats each bring their own.
GRAPHS = 64


def compile_blocks(model: nn.Module, compiler: str | Callable[..., Any] = "inductor") -> None:
    """Compile the repeated blocks of a model in place: the members of its outermost ModuleLists.

    compiler: a backend of torch.compile. Compiling happens in the first passes, once a kind of block. Raises
    BackendError where there is nothing to compile, it is done already, or the machine has no C++ compiler.
    """
    blocks = [block for blocks in repeated(model) for block in blocks]
    name = type(model).__name__
    if not blocks:
        raise BackendError(f"{name} has no repeated blocks to compile; load it without compile")
    if any("forward" in vars(block) for block in blocks):
        raise BackendError(f"the blocks of {name} are compiled already; compile a model once, after all other surgery")
    if compiler == "inductor":
        check_compiler(next(blocks[0].parameters()).device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    kinds = {kind: _compiled(kind, compiler) for kind in {type(block) for block in blocks}}
    for block in blocks:
        block.forward = _bound(kinds[type(block)], type(block).forward, block)


def _compiled(kind: type[nn.Module], compiler: str | Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a kind of block, compiled for every size at once."""
    from torch.fx.experimental import _config as symbols

    compiled = torch.compile(kind.forward, dynamic=True, fullgraph=True, backend=compiler)

    def forward(block: nn.Module, *args: Any) -> Any:
        # Else two sizes that are equal by accident (items + 1 and the 2 of a cosine and sine) become one symbol.
        # What is set here holds for this thread.
        before, symbols.use_duck_shape = symbols.use_duck_shape, False
        try:
            return compiled(block, *args)
        finally:
            symbols.use_duck_shape = before

    return forward


def _bound(compiled: Callable[..., Any], uncompiled: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    """The forward as a method that does not keep its block alive."""
    itself = weakref.ref(block)

    def forward(*args: Any) -> Any:
        block = itself()
        assert block is not None
        _, *inside = block.modules()
        # A graph does not run hooks that came after it.
        observed = overridden() or watched(inside) or any("forward" in vars(module) for module in inside)
        return (uncompiled if observed else compiled)(block, *args)

    return forward


def check_launches(device: torch.device, compile: bool, graphs: bool) -> None:
    """Raise BackendError where a device cannot compile blocks, or record passes, and that is asked for."""
    if graphs and device.type != "cuda":
        raise BackendError(f"graphs need a CUDA device, found {device}; load the model without graphs")
    if compile:
        check_compiler(device)


def check_compiler(device: torch.device) -> None:
    """Raise BackendError where torch.compile lacks something on this machine, before it fails in the middle."""
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"compile serves cpu and cuda, found {device.type}; load the model without compile")
    if device.type == "cuda":
        return
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    lacking = [
        *([] if shutil.which(wanted) else [f"a C++ compiler ({wanted}, or the one that CXX names)"]),
        *([] if header.is_file() else [f"Python's own headers ({header})"]),
    ]
    if lacking:
        raise BackendError(
            f"compile on a CPU needs {' and '.join(lacking)}, found none; install it or load the model without compile"
        )


# record(run) -> (replay, output): whatever `run` did is done again by replay(), into the same output.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]


class CudaGraphs:
    """Records CUDA graphs that share a pool of memory, which is safe because none runs beside another."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """Run once unrecorded, so that kernels are compiled and workspaces made, then record -> (replay, output)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = run()
        return graph.replay, output


@dataclasses.dataclass(slots=True)
class Recording:
    """A recorded pass: its own arguments and their tensors, what they were last filled from, and its output."""

    inputs: list[list[Tensor]]
    filled: list[Any]
    replay: Callable[[], Any]
    output: Tensor


class Replay:
    """Calls a module by recording it once for each signature of its arguments, and replaying the recording.

    Tensors among the arguments are copied in at every call. Dataclasses and tuples are taken for values that are never
    written to: they are copied when another object is given. The result is a copy of its own.
    """

    def __init__(self, model: nn.Module, record: Recorder | None = None, keep: int = KEPT) -> None:
        """record: None records CUDA graphs; raises BackendError without CUDA, or for streamed blocks."""
        if record is None and not torch.cuda.is_available():
            raise BackendError("graphs need a CUDA device, found none; load the model without graphs")
        if any(isinstance(hook, Own) for module in model.modules() for hook in module._forward_hooks.values()):
            raise BackendError(
                f"{type(model).__name__} has hooks of streamed blocks, which a recorded pass would not run; needed "
                "residency staged or resident; load the model without graphs"
            )
        # Weak, as it is the model that keeps its recordings.
        self._model, self._record, self._keep = weakref.ref(model), record or CudaGraphs(), keep
        self._recordings: OrderedDict[Any, Recording] = OrderedDict()
        self._made_of = _made_of(model)

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def stale(self) -> bool:
        """Whether the model has other modules or tensors now than those that were recorded."""
        return self._made_of != _made_of(self._itself())

    @torch.no_grad()
    def __call__(self, *args: Any) -> Tensor:
        """Return what `model(*args)` returns, a tensor; with hooks or `op.using` in force the model runs unrecorded."""
        model = self._itself()
        if watched(model.modules()) or overridden():
            return model(*args)
        parts = [flatten(arg) for arg in args]
        signature = (backend(), numerics(), *(shape for shape, _ in parts))
        if signature not in self._recordings:
            self._recordings[signature] = self._recorded(args, parts)
            while len(self._recordings) > self._keep:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(signature)
        recording = self._recordings[signature]
        for i, (arg, (_, inside)) in enumerate(zip(args, parts, strict=True)):
            if isinstance(arg, Tensor) or arg is not recording.filled[i]:
                for own, given in zip(recording.inputs[i], inside, strict=True):
                    own.copy_(given)
                recording.filled[i] = arg
        recording.replay()
        return recording.output.clone()

    def _recorded(self, args: tuple[Any, ...], parts: list[tuple[Any, list[Tensor]]]) -> Recording:
        """Record a pass with copies of the arguments' tensors; parts: the arguments, as `flatten` splits them."""
        inputs = [[tensor.clone() for tensor in tensors] for _, tensors in parts]
        own = [rebuild(arg, iter(tensors)) for arg, tensors in zip(args, inputs, strict=True)]
        model = self._itself()
        replay, output = self._record(lambda: model(*own))
        return Recording(inputs, list(args), replay, output)

    def _itself(self) -> nn.Module:
        """The model, which is alive as long as its recordings are."""
        model = self._model()
        assert model is not None
        return model


def _made_of(model: nn.Module) -> list[int]:
    """The modules of a model, their own forwards, and its tensors, as numbers."""
    forwards = [id(held) for module in model.modules() for held in (module, vars(module).get("forward"))]
    return [*forwards, *(id(tensor) for *_, tensor in tensors(model))]


def flatten(value: Any) -> tuple[Any, list[Tensor]]:
    """Split an argument into what is fixed (types, shapes, numbers; hashable) and its tensors in order."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device), [value]
    inside = list(_inside(value))
    if not inside:
        return value, []
    parts = [flatten(item) for item in inside]
    return (type(value), *(fixed for fixed, _ in parts)), [tensor for _, tensors in parts for tensor in tensors]


def rebuild(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Make the same argument with other tensors in place of its own, in the order of `flatten`."""
    if isinstance(value, Tensor):
        return next(tensors)
    inside = [rebuild(item, tensors) for item in _inside(value)]
    if isinstance(value, tuple):
        return tuple(inside)
    return type(value)(*inside) if inside else value


def _inside(value: Any) -> Iterator[Any]:
    """Yield the items of a tuple, or the fields of a dataclass."""
    if isinstance(value, tuple):
        yield from value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))
