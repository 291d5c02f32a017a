"""The tuning table: configurations of kernel launches that were measured, as data, so that a first run never searches.

`tune.json` is a list of rows: device (a GPU's full name, or a class of compute capability such as "sm90", or "*"),
triton ("3.6" or "*"), op, shape (a class of shapes that the kernel names), config (keyword arguments of the launch), ms
(median time of a call with it) and refused (how many candidates did not fit the device). The most exact row applies:
this device with this Triton, this device, its class, any device. It holds measurements only. Where it has no row, each
kernel computes an estimate of its own (`flash_attention.estimated_config`, `matmul.best_tile`).

`search` times candidates on the CUDA device at hand and returns a row to be added to the file; `trying` launches with a
given configuration inside a `with`.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from s3dit.errors import BackendError
from s3dit.kernels.dispatch import capability

Config = dict[str, int]

# Launches of a candidate that are not timed, which compile and fill the caches, and launches that are.
WARMUP_CALLS, TIMED_CALLS = 5, 25

_tried: dict[str, Config] = {}


@functools.cache
def table() -> dict[tuple[str, str, str, str], Config]:
    """Read the shipped rows: (op, shape, device, triton) -> config."""
    rows = json.loads(Path(__file__).with_name("tune.json").read_text(encoding="utf-8"))
    return {(row["op"], row["shape"], row["device"], row["triton"]): row["config"] for row in rows}


@functools.cache
def triton_version() -> str:
    """Return the major and minor version of the installed Triton, such as "3.6", or "none"."""
    if find_spec("triton") is None:
        return "none"
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@functools.cache
def measured_config(op: str, shape: str, device: torch.device) -> Config | None:
    """Return the table's config of `op` for a class of shapes on a device, None where it has none.

    A device that is newer than every class in the table takes the newest class.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    known = sorted({int(d[2:]) for _, _, d, _ in table() if d.startswith("sm")}, reverse=True)
    major, minor = capability(device)
    classes = [f"sm{number}" for number in known if number <= 10 * major + minor] if device.type == "cuda" else []
    for place in (name, *classes, "*"):
        for triton in (triton_version(), "*"):
            if (op, shape, place, triton) in table():
                return table()[op, shape, place, triton]
    return None


def config_in_force(op: str, shape: str, device: torch.device) -> Config | None:
    """Return the config of `trying` inside such a `with`, else the table's, else None: the kernel's own estimate."""
    return _tried.get(op) or measured_config(op, shape, device)


@contextmanager
def trying(op: str, candidate: Config) -> Iterator[None]:
    """Launch `op` with this config inside the `with`, whatever the table says; for all threads."""
    before = _tried.get(op)
    _tried[op] = candidate
    try:
        yield
    finally:
        if before is None:
            del _tried[op]
        else:
            _tried[op] = before


def search(op: str, shape: str, call: Callable[[], Any], candidates: Iterable[Config]) -> dict[str, Any]:
    """Time `call`, which launches `op` on the current CUDA device, with each candidate; return the best one's row.

    Raises BackendError without a CUDA device, or where no candidate fits.
    """
    if not torch.cuda.is_available():
        raise BackendError("tuning needs a CUDA device, found none; run it on the machine that the table is for")
    from triton.runtime.errors import OutOfResources

    times, refused = [], 0
    for candidate in candidates:
        try:
            with trying(op, candidate):
                times.append((_milliseconds(call), candidate))
        except OutOfResources:
            refused += 1
    if not times:
        raise BackendError(f"no candidate of {op} for shape {shape} fits {torch.cuda.get_device_name()}; give others")
    fastest, config = min(times, key=lambda pair: pair[0])
    place = {"device": torch.cuda.get_device_name(), "triton": triton_version(), "op": op, "shape": shape}
    return {**place, "config": config, "ms": fastest, "refused": refused}


def _milliseconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call on the current CUDA device, in milliseconds."""
    for _ in range(WARMUP_CALLS):
        call()
    times = []
    for _ in range(TIMED_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)
