"""Checks that what a model computes is finite, and finds the module where it is not for the first time.

`check_finite` is called after every stage of a picture and costs one reduction if all is finite; else it looks for the
weight at fault, or runs the stage again with a hook on every module to name the first that answers NaN or infinity.
`FiniteChecks` does so for the steps of a loop, which need not wait for a GPU to learn the outcome.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.errors import BackendError, CheckpointError
from s3dit.model.hooks import why_not


def output_tensors(name: str, output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a result with its path: indices of a tuple, keys of a dict, fields of a dataclass."""
    if isinstance(output, Tensor):
        yield name, output
        return
    inside: list[tuple[Any, Any]] = []
    if isinstance(output, list | tuple):
        inside = list(enumerate(output))
    elif isinstance(output, Mapping):
        inside = list(output.items())
    elif dataclasses.is_dataclass(output):
        inside = [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    for key, value in inside:
        yield from output_tensors(f"{name}.{key}", value)


@dataclasses.dataclass(slots=True)
class Nonfinite:
    """The first module whose output was not finite: its name ("" is the model itself, None: there was none), its kind.

    count, size: values that are not finite, and all values of its output · largest_input: in magnitude.
    """

    name: str | None = None
    kind: str = ""
    count: int = 0
    size: int = 0
    largest_input: float = 0.0

    def __str__(self) -> str:
        """Describe it in a sentence for messages."""
        if self.name is None:
            return "every output was finite"
        return (
            f"{self.name or 'the model'} ({self.kind}): {self.count:,} of {self.size:,} values of its output are "
            f"NaN or infinite; its largest input is {self.largest_input:.3g}"
        )


@contextmanager
def first_nonfinite(model: nn.Module) -> Iterator[Nonfinite]:
    """Find the first module, in the order of finishing, whose output holds NaN or infinity, inside the `with`.

    Checks every module, which waits for the device each time: for a second run after something went wrong.
    """
    first = Nonfinite()

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            for _, tensor in output_tensors("", output):
                if first.name is None and (bad := _not_finite(tensor)):
                    first.name, first.kind, first.count, first.size = name, type(module).__name__, bad, tensor.numel()
                    inputs = [t.detach().float().abs() for _, t in output_tensors("", args) if t.is_floating_point()]
                    first.largest_input = max((float(t.max()) for t in inputs if t.numel()), default=0.0)

        return look

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not why_not(module):
                stack.callback(module.register_forward_hook(hook(name)).remove)
        yield first


def _not_finite(tensor: Tensor) -> int:
    """How many values of a tensor are NaN or infinite."""
    # Eight-bit floats know no isfinite; every one of them is a float32.
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return int((~values.isfinite()).sum())


def check_finite(
    x: Tensor, what: str, again: Callable[[], object], model: tuple[nn.Module, Path], *beside: tuple[nn.Module, Path]
) -> None:
    """Raise an error if x holds NaN or infinity, which names the weight at fault or the module where it arose.

    what: x in words · again: runs the computation again, to find the module · model, beside: the module that computed x
    and others that took part, each with the path of its weights. Raises CheckpointError (a weight) or BackendError.
    """
    if x.isfinite().all():
        return
    _blame(what, again, model, *beside)


class FiniteChecks:
    """Calls of `check_finite` in a loop: each at once on a CPU, elsewhere some together, in their order.

    A device that is asked at every step waits for the next one to be given to it meanwhile.
    """

    # Checks that wait together: what they would run again is held for so long, 2 MB a step at 1024 × 1024 pixels.
    WAITING = 16

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[], None]]] = []

    def add(self, x: Tensor, what: str, again: Callable[[], object], *models: tuple[nn.Module, Path]) -> None:
        """Check a tensor, now or later; arguments and errors as of `check_finite`."""
        if x.device.type == "cpu":
            check_finite(x, what, again, *models)
            return
        self._waiting.append((x.isfinite().all(), partial(_blame, what, again, *models)))
        if len(self._waiting) == self.WAITING:
            self.finish()

    def finish(self) -> None:
        """Learn the outcome of the checks that wait; raises the error of the first that failed."""
        waiting, self._waiting = self._waiting, []
        outcomes = torch.stack([finite for finite, _ in waiting]).tolist() if waiting else []
        for finite, (_, blame) in zip(outcomes, waiting, strict=True):
            if not finite:
                blame()


def _blame(
    what: str, again: Callable[[], object], model: tuple[nn.Module, Path], *beside: tuple[nn.Module, Path]
) -> None:
    """Raise the error of `check_finite` for something that is not finite."""
    for suspect, path in (*beside, model):
        for name, tensor in (*suspect.named_parameters(), *suspect.named_buffers()):
            # Codes of 8 bits and less are finite; their scales may not be.
            if not tensor.is_meta and tensor.itemsize > 1 and not tensor.isfinite().all():
                raise CheckpointError(
                    f"{what} is not finite because {name} in {path} holds NaN or infinity; "
                    "needed finite weights; download the file again"
                )
    with first_nonfinite(model[0]) as first:
        again()
    raise BackendError(
        f"{what} is not finite although every weight of {type(model[0]).__name__} is; first seen in {first}; "
        "use dtype fp32, and less guidance if it is high"
    )
