"""Records what modules and Ops of a model compute, writes and reads records, and finds where two runs differ first.

`trace` puts forward hooks on the modules whose official names match a pattern, inside a `with`; `trace_op` does the
same for an Op through its own `using`, which is how queries and keys after the rotary embedding are seen. What is kept
are copies on the CPU, so the run itself computes the very same bits, and afterwards nothing is left on the model. A
Record is a plain dict in the order of the calls, `name#call` -> tensor, and a result of several tensors takes one entry
each, `name#call.0`. `compare` and `first_difference` then name the first place where two records differ: across two
dtypes, two backends, two machines, or two programs whose modules carry the same names.

    with trace(transformer, "layers.*.attention") as record:
        ...
    save(record, "run.safetensors", {"seed": "7"})

Not here: changing a result (give `op.using` a function that does), pictures of attention, backward passes.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from s3dit.errors import RequestError
from s3dit.kernels.dispatch import Op
from s3dit.model.hooks import why_not
from s3dit.runtime.finite import output_tensors
from s3dit.weights.json_files import parse_json
from s3dit.weights.safetensors_dir import write_safetensors

Record = dict[str, Tensor]

# The safetensors format sorts names; the order of the calls is kept under this key of its metadata.
ORDER = "s3dit.order"


@contextmanager
def trace(
    model: nn.Module, patterns: str | Sequence[str], keep: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Record]:
    """Record the outputs of the modules whose names match, for as long as the `with` lasts.

    patterns: `*` stands for anything inside one part of a name, `**` for anything, "" for the model itself ·
    keep(output) -> what to keep of it, for example a norm or a slice; all of it without.
    Raises RequestError where a pattern matches no module, or none that is ever called; warns where nothing was called.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen = _matching(model, patterns)
    record: Record = {}
    calls = dict.fromkeys(chosen, 0)

    def hook(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            _add(record, f"{name}#{calls[name]}", output, keep)
            calls[name] += 1

        return observe

    with ExitStack() as stack:
        for name, module in chosen.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield record
        silent = [
            pattern
            for pattern in patterns
            if not any(calls[name] for name in chosen if pattern_regex(pattern).fullmatch(name))
        ]
        if silent:
            warnings.warn(f"trace recorded nothing of {', '.join(silent)}: none of it was called", stacklevel=3)


@contextmanager
def trace_op(op: Op, keep: Callable[[Tensor], Tensor] | None = None) -> Iterator[Record]:
    """Record the arguments and results of an Op's calls: `name#call.0`, `.1`, … and `name#call.result`.

    The implementation that serves is the one that would serve unobserved, an outer `using` included.
    """
    record: Record = {}
    name = str(getattr(op.reference, "__name__", "op"))
    calls = 0

    with ExitStack() as stack:

        def observe(*args: Any) -> Any:
            nonlocal calls
            _add(record, f"{name}#{calls}", args, keep)
            # Out of its own override for the moment, so that the Op chooses as if nobody looked.
            stack.close()
            try:
                result = op(*args)
            finally:
                stack.enter_context(op.using(observe))
            _add(record, f"{name}#{calls}.result", result, keep)
            calls += 1
            return result

        stack.enter_context(op.using(observe))
        yield record


def _matching(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that match any pattern, in the model's order; RequestError for a pattern without any."""
    modules = dict(model.named_modules())
    names: set[str] = set()
    for pattern in patterns:
        matched = {name for name in modules if pattern_regex(pattern).fullmatch(name)}
        if not matched:
            near = difflib.get_close_matches(pattern, [*modules], n=3, cutoff=0.0)
            raise RequestError(
                f"pattern {pattern!r} matches none of the {len(modules)} modules of {type(model).__name__}; needed a "
                f"name with * inside one part or ** over several; the nearest names are {', '.join(near)}"
            )
        reasons = {name: why_not(modules[name]) for name in matched}
        if all(reasons.values()):
            name, why = next(iter(reasons.items()))
            raise RequestError(
                f"pattern {pattern!r} matches only modules that are never called ({name or 'the model'}: {why}); "
                "needed a module that computes; put ** behind it, or trace the module around it"
            )
        names |= {name for name, why in reasons.items() if not why}
    return {name: module for name, module in modules.items() if name in names}


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """A regular expression of a pattern: ** is anything, * and ? anything but a dot."""
    pieces = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return re.compile("".join(pieces.get(p, re.escape(p)) for p in re.split(r"(\*\*|\*|\?)", pattern)))


def _add(record: Record, name: str, output: Any, keep: Callable[[Tensor], Tensor] | None) -> None:
    """Add copies of a result's tensors to a record, on the CPU."""
    for path, tensor in output_tensors(name, output):
        kept = tensor.detach() if keep is None else keep(tensor.detach())
        # A copy: the model may go on to write into its output.
        record[path] = kept.detach().to("cpu", copy=True)


def save(record: Record, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a record as safetensors, whole or not at all; metadata is text to text. Raises RequestError."""
    path = Path(path)
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
    notes = {**(metadata or {}), ORDER: json.dumps([*record])}
    try:
        try:
            write_safetensors({name: tensor.contiguous() for name, tensor in record.items()}, partial, notes)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path}: cannot be written ({error}); needed a writable folder with room") from None


def load(path: str | Path) -> tuple[Record, dict[str, str]]:
    """Read a record and its metadata back, in the order of the calls; raises RequestError."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = dict(file.metadata() or {})
            names = parse_json(notes.pop(ORDER, "null"))
            if not isinstance(names, list) or sorted(map(str, names)) != sorted(file.keys()):
                raise RequestError(f"{path}: is no record of a trace; needed a file that `trace.save` wrote")
            return {name: file.get_tensor(name) for name in names}, notes
    except RequestError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read ({error}); needed a file that `trace.save` wrote") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A name of two records: relative error ‖a - b‖ / ‖b‖, largest difference, both shapes (None: not there)."""

    name: str
    error: float
    largest: float
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]

    def __str__(self) -> str:
        """Format it as a line of a table."""
        a, b = ("missing" if shape is None else "x".join(map(str, shape)) for shape in self.shapes)
        sizes = a if a == b else f"{a} against {b}"
        return f"{self.error:9.2e} {self.largest:9.2e}  {self.name}  {sizes}"


def compare(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[Row]:
    """Compare two records name by name, b being the reference, in the order of a; then what only b has.

    In float64. A name on one side only, or of two shapes, has error infinity; so has a value that is finite on one side
    only. The same infinity, or not a number, at the same place on both sides is no difference.
    """
    rows = []
    for name in [*a, *(name for name in b if name not in a)]:
        first, second = a.get(name), b.get(name)
        shapes = (None if first is None else tuple(first.shape), None if second is None else tuple(second.shape))
        error, largest = math.inf, math.inf
        if first is not None and second is not None and first.shape == second.shape:
            error, largest = _difference(first, second)
        rows.append(Row(name, error, largest, shapes))
    return rows


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Relative error and largest absolute difference."""
    if a.is_complex() or b.is_complex():
        a, b = torch.view_as_real(a.to(torch.complex128)), torch.view_as_real(b.to(torch.complex128))
    a, b = a.to("cpu", torch.float64), b.to("cpu", torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())
    # Equal infinities would subtract to NaN.
    difference = (a - b).masked_fill(same, 0.0)
    if not difference.isfinite().all():
        return math.inf, math.inf
    if not difference.any():
        return 0.0, 0.0
    size = b.masked_fill(~b.isfinite(), 0.0).norm().item()
    error = difference.norm().item() / size if size > 0 else math.inf
    return error, difference.abs().max().item()


def first_difference(rows: Sequence[Row], tolerance: float = 0.0) -> Row | None:
    """Return the first row, in the order of the calls, with a relative error above the tolerance; None if none has."""
    return next((compared for compared in rows if not compared.error <= tolerance), None)
