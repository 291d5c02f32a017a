"""Op: one meaning and several speeds.

An Op is a plain-torch function, the definition of correct, plus implementations that give the same answer faster
somewhere. A call takes the first implementation registered for the device of its first tensor whose `when(...)` holds,
else the reference. `set_backend` (or the environment variable S3DIT_BACKEND) narrows the choice; a forced backend that
cannot run raises BackendError and names what is missing. Nothing ever falls back in silence from a forced choice, and
`op.explain` says of each implementation why it does or does not serve a call.

`use_backend` does the same inside a `with` and for the calling thread only: what a pipeline was loaded with.

`op.using(f)` replaces the implementation inside a `with`, for all threads: tests run both, benchmarks time each, and a
researcher looks at (or edits) the arguments and then calls `op.reference`.

Triton kernels are written with `kernel` and `tl` from here. They run on CUDA, or on the CPU under TRITON_INTERPRET=1,
which is how they are tested without a GPU; anywhere else Triton is not even imported. What launches them is a
`launcher`: one node for torch.compile, a plain call otherwise.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from s3dit.errors import BackendError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernel: Any
tl: Any
if torch.cuda.is_available() or INTERPRETED:
    import triton
    import triton.language

    kernel, tl = triton.jit, triton.language
else:
    # Enough for a kernel to be defined; nothing here can launch one.
    kernel, tl = (lambda function: function), SimpleNamespace(constexpr=lambda value: value)

BACKENDS = ("auto", "reference", "torch", "triton")


@dataclass(frozen=True, slots=True)
class Implementation:
    """One faster implementation: where it runs, which backend it belongs to, when it may serve."""

    device: str
    backend: str
    function: Callable[..., Any]
    when: Callable[..., bool | str]

    def why_not(self, device: str, args: tuple[Any, ...]) -> str:
        """Why it cannot serve these arguments, in a few words; empty where it can."""
        if self.device != device:
            return f"needs {self.device} tensors, found {device}"
        said = self.when(*args)
        return said if isinstance(said, str) else "" if said else "not for these arguments"


_backend = "auto"
# How many `using` are in force.
_overrides = 0
_lock = threading.Lock()


class _Thread(threading.local):
    """What holds for one thread: the backend of `use_backend`, and the calls that `record_calls` has noted so far."""

    # Not a ContextVar, which torch.compile cannot trace.
    backend: str | None = None
    questions: list[tuple["Op", tuple[Any, ...]]] | None = None


_thread = _Thread()


def check_backend(name: str) -> None:
    """Raise the BackendError of a backend that does not exist, or cannot run on this machine."""
    if name not in BACKENDS:
        raise BackendError(f"backend is {name!r}; needed one of {', '.join(BACKENDS)}")
    if name == "triton" and not torch.cuda.is_available() and not INTERPRETED:
        raise BackendError("backend 'triton' needs a CUDA device, found none; use 'auto', 'torch' or 'reference'")


def set_backend(name: str) -> None:
    """Choose who serves every Op of this process from now on: auto, reference, torch or triton; raises BackendError."""
    global _backend
    check_backend(name)
    _backend = name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Choose who serves every Op that this thread calls inside the `with`; None leaves the choice as it is."""
    if name is not None:
        check_backend(name)
    before, _thread.backend = _thread.backend, name or _thread.backend
    try:
        yield
    finally:
        _thread.backend = before


def backend() -> str:
    """Return the choice in force for this thread."""
    return _thread.backend or _backend


@contextmanager
def record_calls() -> Iterator[list[tuple["Op", tuple[Any, ...]]]]:
    """Note every call of an Op by this thread in the `with` and let its reference serve: for a run on fake tensors."""
    before, _thread.questions = _thread.questions, []
    try:
        yield _thread.questions
    finally:
        _thread.questions = before


def overridden() -> bool:
    """Whether some Op is served by a replacement now (`using`), which a recorded pass would not call."""
    return _overrides > 0


class Op:
    """A callable with a reference and implementations; made by the decorator `@op`."""

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.reference = reference
        self.name = reference.__name__
        self.stand_ins: list[Implementation] = []
        self._override: Callable[..., Any] | None = None
        # Every replacement in force, the last of them being `_override`.
        self._replacements: list[tuple[Callable[..., Any]]] = []
        self._node: Callable[..., Any] | None = None
        functools.update_wrapper(self, reference)

    def on(
        self, device: str, backend: str, when: Callable[..., bool | str] = lambda *args: True
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register an implementation for a device type; first registered, first asked.

        `when` gets the call's arguments and returns True, or False or a text that says what is missing.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.stand_ins.append(Implementation(device, backend, function, when))
            return function

        return register

    def choose(self, *args: Any) -> Callable[..., Any]:
        """Return the implementation that a call with these arguments would run."""
        if self._override is not None:
            return self._override
        chosen = backend()
        if chosen == "reference":
            return self.reference
        device = _device(args)
        for stand_in in self.stand_ins:
            if chosen in ("auto", stand_in.backend) and not stand_in.why_not(device, args):
                return stand_in.function
        # An Op without any kernel of the forced backend is plain torch by design, not by falling back.
        kernels = [stand_in for stand_in in self.stand_ins if stand_in.backend == "triton"]
        if chosen == "triton" and kernels:
            why = "; ".join(dict.fromkeys(stand_in.why_not(device, args) for stand_in in kernels))
            raise BackendError(f"backend 'triton' is forced but no kernel of {self.name} may run: {why}; use 'auto'")
        return self.reference

    def explain(self, *args: Any) -> list[tuple[str, str, str]]:
        """What would serve a call: (implementation, backend, "chosen" or why not) in order, the reference last."""
        device, lines, found = _device(args), [], ""
        if self._override is not None:
            return [(self._override.__name__, "override", "chosen")]
        for stand_in in self.stand_ins:
            name = stand_in.function.__name__.strip("_")
            reason = stand_in.why_not(device, args)
            if not reason and backend() not in ("auto", stand_in.backend):
                reason = f"backend {backend()!r} is forced"
            lines.append((name, stand_in.backend, reason or (f"{found} comes first" if found else "chosen")))
            found = found or ("" if reason else name)
        barred = backend() == "triton" and any(stand_in.backend == "triton" for stand_in in self.stand_ins)
        reason = f"{found} comes first" if found else "backend 'triton' is forced" if barred else "chosen"
        return [*lines, ("reference", "reference", reason)]

    def in_graphs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Let `function` stand for every call while torch.compile traces: a custom op that calls this Op when run."""
        self._node = function
        return function

    def __call__(self, *args: Any) -> Any:
        if self._node is not None and torch.compiler.is_compiling():
            return self._node(*args)
        if _thread.questions is not None:
            _thread.questions.append((self, args))
            return self.reference(*args)
        return self.choose(*args)(*args)

    @contextmanager
    def using(self, function: Callable[..., Any]) -> Iterator[None]:
        """Serve every call, of every thread, with `function` inside the `with`."""
        global _overrides
        mine = (function,)
        with _lock:
            self._replacements.append(mine)
            self._override = function
            _overrides += 1
        try:
            yield
        finally:
            with _lock:
                # By identity: threads need not leave in the order in which they came.
                self._replacements = [one for one in self._replacements if one is not mine]
                self._override = self._replacements[-1][0] if self._replacements else None
                _overrides -= 1


def op(reference: Callable[..., Any]) -> Op:
    """Make an Op out of its reference."""
    return Op(reference)


def _device(args: tuple[Any, ...]) -> str:
    """The device type whose implementations are asked: the first argument's; interpreted kernels take CPU tensors."""
    device = args[0].device.type
    return "cuda" if INTERPRETED and backend() == "triton" and device == "cpu" else device


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; of the CPU under the interpreter, which can do everything, (99, 0)."""
    if device.type != "cuda":
        return 99, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def missing(x: Any, dtypes: tuple[torch.dtype, ...], output: torch.dtype | None = None) -> str:
    """What keeps a Triton kernel from taking x (or giving `output`), in a few words; empty where nothing does.

    bf16 needs an Ampere GPU (capability 8.0), e4m3 an Ada or Hopper one (8.9). The interpreter takes fp32 everywhere,
    so that kernels can be tested against exact references, but its bf16 is wrong.
    """
    found = capability(x.device)
    if found < (8, 0):
        return f"needs a GPU of capability 8.0, found {found[0]}.{found[1]}"
    if output == torch.float8_e4m3fn and found < (8, 9):
        return f"e4m3 needs a GPU of capability 8.9, found {found[0]}.{found[1]}"
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return "the interpreter computes bf16 wrongly"
    if x.dtype in dtypes or (x.dtype == torch.float32 and x.device.type == "cpu"):
        return ""
    return f"takes {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, found {x.dtype}"


def launcher(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function that launches kernels one node of a compiled graph; `fake` gives its empty outputs.

    Both take the same annotated arguments, tensors and numbers. An eager call goes past torch's dispatcher, whose
    13 µs are as long as a small kernel.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        node = torch.library.custom_op(f"s3dit::{function.__name__.strip('_')}", function, mutates_args=())
        node.register_fake(fake)

        @functools.wraps(function)
        def launch(*args: Any) -> Any:
            return node(*args) if torch.compiler.is_compiling() else function(*args)

        return launch

    return wrap


if os.environ.get("S3DIT_BACKEND"):
    set_backend(os.environ["S3DIT_BACKEND"])
