"""Modules without tensors: made on the meta device, and not initialized, because every tensor of theirs is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Uninitialized(TorchFunctionMode):
    """Leaves out what `torch.nn.init` computes: on the meta device it gives nothing, and takes most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run any other function; of an initialization return its tensor as it is."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """While inside, make modules whose parameters and buffers are on the meta device, without initializing them."""
    with torch.device("meta"), _Uninitialized():
        yield
