"""Forward hooks: detects those of users on a module, and lets modules refuse hooks that would never run.

Some modules only hold weights: lists, norms that a fused operation computes together with their neighbours, layers that
a file has and nobody reads. A hook on one of them would be silent, which looks like one that saw nothing; they refuse.

torch has public ways to register hooks, but none to ask which there are, so their dictionaries are read by their
private names. These have been stable since torch 2.0, and a test would see one that is gone.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NoReturn, TypeVar

from torch import nn
from torch.nn.modules import module as every_module

from s3dit.errors import RequestError

M = TypeVar("M", bound=nn.Module)
REGISTERS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
# The attributes in which a module keeps its hooks; modules that stand for one another share these.
HOOK_DICTS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Own:
    """A forward hook of the engine itself, which `watched` does not count."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def __call__(self, *args: Any) -> None:
        """Call `run` with what torch gives a hook: the module, its inputs, its output; these stay what they are."""
        self._run(*args)


def watched(modules: Iterable[nn.Module]) -> bool:
    """Return whether a user has put forward hooks on any of these modules, or on all modules of the process."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return True
    hooks = (
        hook
        for module in modules
        for registered in (module._forward_hooks, module._forward_pre_hooks)
        for hook in registered.values()
    )
    return any(not isinstance(hook, Own) for hook in hooks)


def hooked(*modules: nn.Module) -> bool:
    """Return whether any of these modules has forward hooks, of a user or the engine, or all modules of the process."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def unhookable(module: M, why: str) -> M:
    """Let a module refuse to register hooks, with a RequestError that says why; returns the module."""
    vars(module).update({name: partial(_refuse, type(module).__name__, why) for name in REGISTERS})
    return module


def why_not(module: nn.Module) -> str:
    """Return why a hook on a module would never run, as a clause for messages; empty where it would run."""
    if REGISTERS[0] in vars(module):
        return str(vars(module)[REGISTERS[0]].args[1])
    return "it has no forward of its own" if type(module).forward is nn.Module.forward else ""


def _refuse(name: str, why: str, *args: Any, **options: Any) -> NoReturn:
    raise RequestError(f"a hook on this {name} would never run: {why}; put it on a module around or inside it")
