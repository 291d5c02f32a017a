"""Op: a function with a reference in plain torch and faster implementations of the same function.

The reference is the definition of correct. A call runs the first implementation that is registered for the device of
its first tensor and whose condition (`when`) holds, else the reference. `set_backend` (or the environment variable
S3DIT_BACKEND) restricts the choice for the process, `use_backend` for a thread inside a `with`: what a pipeline was
loaded with. A forced backend that cannot run raises BackendError and names what is missing; nothing falls back in
silence from a forced choice. `Op.explain` lists for a call why each implementation would or would not run.

`Op.using(f)` replaces the implementation inside a `with`, for all threads: tests run both, benchmarks time each, and a
researcher looks at (or edits) the arguments and then calls `op.reference`.

Triton kernels are written with `kernel` and `tl` from here. They run on CUDA, or on the CPU under TRITON_INTERPRET=1,
which is how they are tested without a GPU; anywhere else Triton is not even imported. The function that launches them
is made by `launcher`: a custom operator of torch under torch.compile, a plain call otherwise.
"""

import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from s3dit.errors import BackendError

P = ParamSpec("P")
R = TypeVar("R")
Implemented = TypeVar("Implemented", bound=Callable[..., Any])

NO_TRITON = "the package triton, which is not installed; pip install 's3dit[gpu]'"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernel: Any
tl: Any
# Whether kernels can be launched here. A CUDA build of torch brings Triton, but not on Windows.
LAUNCHES = (torch.cuda.is_available() or INTERPRETED) and find_spec("triton") is not None
if LAUNCHES:
    import triton
    import triton.language

    kernel, tl = triton.jit, triton.language
else:
    if torch.cuda.is_available():
        logging.getLogger(__name__).warning("no kernels of Triton run: they need %s", NO_TRITON)
    # Enough for a kernel to be defined; nothing here can launch it.
    kernel, tl = (lambda function: function), SimpleNamespace(constexpr=lambda value: value)

BACKENDS = ("auto", "reference", "torch", "triton")
# How near an implementation is to its reference, each kind including those before it.
NUMERICS = ("exact", "lossless", "approximate")
# What a lossless implementation is within unless it says otherwise: roundings of the result's dtype (its epsilon).
ROUNDINGS = 4.0


@dataclass(frozen=True, slots=True)
class Implementation:
    """A faster implementation of an Op.

    device: type of the device that it runs on, such as "cuda" · backend: "torch" or "triton" · function: takes the Op's
    arguments · when: takes them too, and returns True, or False or a text that says what is missing · numerics: "exact"
    gives the reference's bits, "lossless" the same arithmetic with sums in another order, "approximate" less · bound of
    ‖result - reference‖ / ‖reference‖: 0 if exact, in epsilons of the result's dtype if lossless, else as a number.
    """

    device: str
    backend: str
    function: Callable[..., Any]
    when: Callable[..., bool | str]
    numerics: str = "lossless"
    bound: float = ROUNDINGS

    def why_not(self, device: str, args: tuple[Any, ...]) -> str:
        """Return the reason why it cannot run with these arguments on this device type, "" where it can."""
        if self.device != device:
            return f"needs {self.device} tensors, found {device}"
        if self.backend == "triton" and not LAUNCHES:
            return f"needs {NO_TRITON}"
        tracked = torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
        if tracked and self.backend == "triton":
            return "a kernel gives no gradient"
        answer = self.when(*args)
        return answer if isinstance(answer, str) else "" if answer else "not for these arguments"


_backend = "auto"
# How many `using` are in force.
_overrides = 0
_lock = threading.Lock()

# An Op, and the arguments that it was called with.
Call = tuple["Op[..., Any]", tuple[Any, ...]]


class _Thread(threading.local):
    """The state of a thread: the backend of `use_backend`, and the calls that `record_calls` has recorded so far."""

    # Not a ContextVar, which torch.compile cannot trace.
    backend: str | None = None
    numerics: str = "lossless"
    calls: list[Call] | None = None


_thread = _Thread()


def check_backend(name: str) -> None:
    """Raise BackendError for a backend that does not exist, or cannot run on this machine."""
    if name not in BACKENDS:
        raise BackendError(f"backend is {name!r}; needed one of {', '.join(BACKENDS)}")
    if name == "triton" and not torch.cuda.is_available() and not INTERPRETED:
        raise BackendError("backend 'triton' needs a CUDA device, found none; use 'auto', 'torch' or 'reference'")
    if name == "triton" and not LAUNCHES:
        raise BackendError(f"backend 'triton' needs {NO_TRITON}")


def set_backend(name: str) -> None:
    """Choose the backend of every Op of this process from now on: auto, reference, torch or triton.

    Raises BackendError where it does not exist or cannot run here.
    """
    global _backend
    check_backend(name)
    _backend = name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Choose the backend of every Op that this thread calls inside the `with`; None leaves the choice as it is.

    Raises BackendError where it does not exist or cannot run here.
    """
    if name is not None:
        check_backend(name)
    before, _thread.backend = _thread.backend, name or _thread.backend
    try:
        yield
    finally:
        _thread.backend = before


def backend() -> str:
    """Return the backend in force for this thread: auto, reference, torch or triton."""
    return _thread.backend or _backend


def check_numerics(name: str) -> None:
    """Raise BackendError for a kind of numerics that does not exist."""
    if name not in NUMERICS:
        raise BackendError(f"numerics is {name!r}; needed one of {', '.join(NUMERICS)}")


@contextmanager
def use_numerics(name: str) -> Iterator[None]:
    """Let this thread's Ops run only implementations that are at least so near to their references, inside the `with`.

    name: exact, lossless (what holds outside) or approximate. Raises BackendError where it does not exist.
    """
    check_numerics(name)
    before, _thread.numerics = _thread.numerics, name
    try:
        yield
    finally:
        _thread.numerics = before


def numerics() -> str:
    """Return the numerics in force for this thread: exact, lossless or approximate."""
    return _thread.numerics


@contextmanager
def record_calls() -> Iterator[list[Call]]:
    """Record every call of an Op by this thread inside the `with`, and run its reference: for fake tensors."""
    before, _thread.calls = _thread.calls, []
    try:
        yield _thread.calls
    finally:
        _thread.calls = before


def overridden() -> bool:
    """Return whether any Op is replaced now (`using`); a captured CUDA graph would not call the replacement."""
    return _overrides > 0


class Op(Generic[P, R]):
    """A callable with a reference and implementations; made by the decorator `@op`, with the reference's signature.

    reference: the definition · name: the reference's · implementations: in the order in which a call tries them.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        """Make an Op without implementations from its reference, whose first argument is or has a tensor's `device`."""
        self.reference = reference
        self.name = reference.__name__
        self.implementations: list[Implementation] = []
        self._override: Callable[..., R] | None = None
        # Every replacement in force, the last of them being `_override`; each in a tuple, an object of its own.
        self._replacements: list[tuple[Callable[..., R]]] = []
        self._node: Callable[..., R] | None = None
        functools.update_wrapper(self, reference)

    def on(
        self,
        device: str,
        backend: str,
        when: Callable[..., bool | str] = lambda *args: True,
        numerics: str = "lossless",
        bound: float | None = None,
    ) -> Callable[[Implemented], Implemented]:
        """Register an implementation for a device type; those registered first are tried first.

        device: such as "cpu" · backend: "torch" or "triton" · when: gets the call's arguments and returns True, or
        False or a text that says what is missing · numerics, bound: as in `Implementation`. Returns a decorator that
        gives the function back as it is.
        """
        check_numerics(numerics)
        limit = bound if bound is not None else 0.0 if numerics == "exact" else ROUNDINGS

        def register(function: Implemented) -> Implemented:
            self.implementations.append(Implementation(device, backend, function, when, numerics, limit))
            return function

        return register

    def choose(self, *args: Any) -> Callable[P, R]:
        """Return the function that a call with these arguments would run.

        Raises BackendError where the backend 'triton' is forced, the Op has kernels, and none of them can run.
        """
        if self._override is not None:
            return self._override
        in_force = backend()
        if in_force == "reference":
            return self.reference
        device = _device(args)
        for candidate in self.implementations:
            if in_force in ("auto", candidate.backend) and not self._why_not(candidate, device, args):
                return candidate.function
        # An Op without any kernel of the forced backend is plain torch by design, not by falling back.
        kernels = [candidate for candidate in self.implementations if candidate.backend == "triton"]
        if in_force == "triton" and kernels:
            why = "; ".join(dict.fromkeys(self._why_not(candidate, device, args) for candidate in kernels))
            raise BackendError(f"backend 'triton' is forced but no kernel of {self.name} may run: {why}; use 'auto'")
        return self.reference

    @staticmethod
    def _why_not(candidate: Implementation, device: str, args: tuple[Any, ...]) -> str:
        """Return the reason why an implementation cannot run, or may not by the numerics in force; "" where it may."""
        if NUMERICS.index(candidate.numerics) > NUMERICS.index(_thread.numerics):
            return f"is {candidate.numerics}, where numerics {_thread.numerics!r} is asked for"
        return candidate.why_not(device, args)

    def explain(self, *args: Any) -> list[tuple[str, str, str]]:
        """List what a call could run: (implementation, backend, "chosen" or why not) in order, the reference last."""
        device, lines, chosen = _device(args), [], ""
        if self._override is not None:
            return [(self._override.__name__, "override", "chosen")]
        for candidate in self.implementations:
            name = candidate.function.__name__.strip("_")
            reason = self._why_not(candidate, device, args)
            if not reason and backend() not in ("auto", candidate.backend):
                reason = f"backend {backend()!r} is forced"
            lines.append((name, candidate.backend, reason or (f"{chosen} comes first" if chosen else "chosen")))
            chosen = chosen or ("" if reason else name)
        barred = backend() == "triton" and any(candidate.backend == "triton" for candidate in self.implementations)
        reason = f"{chosen} comes first" if chosen else "backend 'triton' is forced" if barred else "chosen"
        return [*lines, ("reference", "reference", reason)]

    def in_graphs(self, function: Implemented) -> Implemented:
        """Let `function` run instead while torch.compile traces: a custom operator that calls this Op when it runs."""
        self._node = function
        return function

    @contextmanager
    def traced_as(self, function: Callable[..., R]) -> Iterator[None]:
        """Let `function` stand in every graph that is traced inside the `with` (torch.export, torch.compile)."""
        before, self._node = self._node, function
        try:
            yield
        finally:
            self._node = before

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the chosen implementation; keyword arguments are put into their places first."""
        if kwargs:
            bound: tuple[Any, ...] = inspect.signature(self.reference).bind(*args, **kwargs).args
            return self._run(bound)
        return self._run(args)

    def _run(self, args: tuple[Any, ...]) -> R:
        if self._node is not None and torch.compiler.is_compiling():
            return self._node(*args)
        if _thread.calls is not None:
            _thread.calls.append((self, args))
        recorded = _thread.calls is not None
        function: Callable[..., R] = self.reference if recorded else self.choose(*args)
        return function(*args)

    @contextmanager
    def using(self, function: Callable[..., R]) -> Iterator[None]:
        """Run `function` in every call, of every thread, inside the `with`."""
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
                self._replacements = [replacement for replacement in self._replacements if replacement is not mine]
                self._override = self._replacements[-1][0] if self._replacements else None
                _overrides -= 1


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Make an Op from its reference; used as a decorator."""
    return Op(reference)


def _device(args: tuple[Any, ...]) -> str:
    """Return the device type that implementations are looked up for: the first argument's.

    Interpreted kernels take CPU tensors, so under a forced 'triton' those count as "cuda".
    """
    device: str = args[0].device.type
    return "cuda" if INTERPRETED and backend() == "triton" and device == "cpu" else device


# Asking costs some microseconds, and every launch asks.
@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, (major, minor); (99, 0) of a CPU, whose interpreter has all."""
    if device.type != "cuda":
        return 99, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def why_unsupported(x: Any, dtypes: tuple[torch.dtype, ...], output: torch.dtype | None = None) -> str:
    """Return the reason why a Triton kernel for these dtypes cannot take x, or give `output`; "" where it can.

    x: anything with `device` and `dtype`. bf16 needs an Ampere GPU (capability 8.0), e4m3 an Ada or Hopper GPU (8.9).
    The interpreter takes fp32 everywhere, so that kernels can be tested against exact references, but its bf16 is
    wrong.
    """
    actual = capability(x.device)
    if actual < (8, 0):
        return f"needs a GPU of capability 8.0, found {actual[0]}.{actual[1]}"
    if output == torch.float8_e4m3fn and actual < (8, 9):
        return f"e4m3 needs a GPU of capability 8.9, found {actual[0]}.{actual[1]}"
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return "the interpreter computes bf16 wrongly"
    if x.dtype in dtypes or (x.dtype == torch.float32 and x.device.type == "cpu"):
        return ""
    return f"takes {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, found {x.dtype}"


def launcher(fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a function that launches kernels: under torch.compile it is a single custom operator.

    fake: takes the same arguments and returns empty outputs of the right shapes and dtypes. Both have annotated
    positional arguments, tensors and numbers. An eager call goes past torch's dispatcher, whose 13 µs are as long as a
    small kernel.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        if not LAUNCHES:
            # An operator takes a millisecond to define.
            return function
        node: Any = torch.library.custom_op(f"s3dit::{function.__name__.strip('_')}", function, mutates_args=())
        node.register_fake(fake)

        @functools.wraps(function)
        def launch(*args: P.args, **kwargs: P.kwargs) -> R:
            outputs: R = (node if torch.compiler.is_compiling() else function)(*args, **kwargs)
            return outputs

        return launch

    return wrap


if os.environ.get("S3DIT_BACKEND"):
    set_backend(os.environ["S3DIT_BACKEND"])
