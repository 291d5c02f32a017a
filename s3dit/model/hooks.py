"""Forward hooks: whether anybody looks into a module, and modules that refuse hooks because they are never called.

A hook that never runs says nothing, and looks like one that found nothing. Some modules only hold weights: lists, norms
that one fused operation computes together with their neighbours, layers that a file has and nobody reads. They refuse.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NoReturn, TypeVar

from torch import nn
from torch.nn.modules import module as every

from s3dit.errors import RequestError

M = TypeVar("M", bound=nn.Module)
REGISTERS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
# Where a module keeps its hooks; modules that stand for one another share these.
SHELVES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Own:
    """A hook of the engine itself, which `watched` does not count."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def __call__(self, *args: Any) -> None:
        """Run with the module, its inputs and its output; these stay what they are."""
        self._run(*args)


def watched(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody has put forward hooks on any of these modules, or on all modules of the process."""
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return True
    hooks = (hook for one in modules for kind in (one._forward_hooks, one._forward_pre_hooks) for hook in kind.values())
    return any(not isinstance(hook, Own) for hook in hooks)


def unhookable(module: M, why: str) -> M:
    """Let a module refuse hooks with a RequestError that says why; returns it."""
    vars(module).update({name: partial(_refuse, type(module).__name__, why) for name in REGISTERS})
    return module


def why_not(module: nn.Module) -> str:
    """Why a hook on a module would never run, in a few words; empty where it would."""
    if REGISTERS[0] in vars(module):
        return str(vars(module)[REGISTERS[0]].args[1])
    return "it has no forward of its own" if type(module).forward is nn.Module.forward else ""


def _refuse(name: str, why: str, *args: Any, **options: Any) -> NoReturn:
    raise RequestError(f"a hook on this {name} would never run: {why}; put it on a module around or inside it")
