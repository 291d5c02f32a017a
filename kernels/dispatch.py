"""Op: one meaning and several speeds.

An Op is a plain-torch function, the definition of correct, plus stand-ins that give the same answer faster somewhere.
A call takes the first stand-in registered for the device of its first tensor whose `when(...)` holds, else the
reference. `set_backend` (or the environment variable S3DIT_BACKEND) narrows the choice; a forced backend that cannot
run raises BackendError and names what is missing. Nothing ever falls back in silence from a forced choice.

`op.using(f)` replaces the implementation inside a `with`: tests run both, benchmarks time each, and a researcher looks
at (or edits) the arguments and then calls `op.reference`.

Triton kernels are written with `kernel` and `tl` from here. They run on CUDA, or on the CPU under TRITON_INTERPRET=1,
which is how they are tested without a GPU; anywhere else Triton is not even imported.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernel: Any
tl: Any
if torch.cuda.is_available() or INTERPRETED:
    import triton
    import triton.language as tl

    kernel = triton.jit
else:
    # Enough for a kernel to be defined; nothing here can launch one.
    kernel, tl = (lambda function: function), SimpleNamespace(constexpr=object)

BACKENDS = ("auto", "reference", "torch", "triton")


class BackendError(RuntimeError):
    """A forced backend, device or dtype cannot run what was asked."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """One faster implementation: where it runs, which backend it belongs to, when it may serve."""

    device: str
    backend: str
    function: Callable[..., Any]
    when: Callable[..., bool]


_backend = "auto"
# How many `using` are in force, and the calls that `asked` has noted so far.
_overrides = 0
_questions: list[tuple["Op", tuple[Any, ...]]] | None = None


def set_backend(name: str) -> None:
    """Choose who serves every Op from now on: auto, reference, torch or triton; raises BackendError."""
    global _backend
    if name not in BACKENDS:
        raise BackendError(f"backend is {name!r}; needed one of {', '.join(BACKENDS)}")
    if name == "triton" and not torch.cuda.is_available():
        raise BackendError("backend 'triton' needs a CUDA device, found none; use 'auto', 'torch' or 'reference'")
    _backend = name


def backend() -> str:
    """Return the choice in force."""
    return _backend


@contextmanager
def asked() -> Iterator[list[tuple["Op", tuple[Any, ...]]]]:
    """Note every call of an Op inside the `with` and let its reference serve: for a run on fake tensors."""
    global _questions
    before, _questions = _questions, []
    try:
        yield _questions
    finally:
        _questions = before


def overridden() -> bool:
    """Whether some Op is served by a replacement now (`using`), which a recorded pass would not call."""
    return _overrides > 0


class Op:
    """A callable with a reference and stand-ins; made by the decorator `@op`."""

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.reference = reference
        self.name = reference.__name__
        self.stand_ins: list[StandIn] = []
        self._override: Callable[..., Any] | None = None
        self._node: Callable[..., Any] | None = None
        functools.update_wrapper(self, reference)

    def on(
        self, device: str, backend: str, when: Callable[..., bool] = lambda *args: True
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a stand-in for a device type; `when` gets the call's arguments. First registered, first asked."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.stand_ins.append(StandIn(device, backend, function, when))
            return function

        return register

    def choose(self, *args: Any) -> Callable[..., Any]:
        """Return the implementation that a call with these arguments would run."""
        if self._override is not None:
            return self._override
        if _backend == "reference":
            return self.reference
        device = args[0].device.type
        for stand_in in self.stand_ins:
            if stand_in.device == device and _backend in ("auto", stand_in.backend) and stand_in.when(*args):
                return stand_in.function
        # An Op without any kernel of the forced backend is plain torch by design, not by falling back.
        if _backend == "triton" and any(s.backend == "triton" for s in self.stand_ins):
            raise BackendError(
                f"backend 'triton' is forced but no kernel of {self.name} serves {device} tensors of "
                f"{args[0].dtype} and shape {tuple(args[0].shape)}; use backend 'auto'"
            )
        return self.reference

    def in_graphs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Let `function` stand for every call while torch.compile traces: a custom op that calls this Op when run."""
        self._node = function
        return function

    def __call__(self, *args: Any) -> Any:
        if self._node is not None and torch.compiler.is_compiling():
            return self._node(*args)
        if _questions is not None:
            _questions.append((self, args))
            return self.reference(*args)
        return self.choose(*args)(*args)

    @contextmanager
    def using(self, function: Callable[..., Any]) -> Iterator[None]:
        """Serve every call with `function` inside the `with`."""
        global _overrides
        before, self._override = self._override, function
        _overrides += 1
        try:
            yield
        finally:
            self._override = before
            _overrides -= 1


def op(reference: Callable[..., Any]) -> Op:
    """Make an Op out of its reference."""
    return Op(reference)


if os.environ.get("S3DIT_BACKEND"):
    set_backend(os.environ["S3DIT_BACKEND"])
