"""Tuning table: which tile sizes a kernel is launched with, as data, so that a first run never searches.

`tune.json` is a list of rows: device (a GPU's full name, or a class such as "sm90", or "*"), triton ("3.6" or "*"),
op, shape (a class of shapes that the op names), config (keyword arguments of the launch) and source, which is
"measured" or "estimate". The most exact row wins: this device with this Triton, this device, its class, anything.

`search` times candidates on the device at hand and returns a row to be put into the file; `trying` is how it, or a
researcher, launches with another config.
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

# Launches and timings of one candidate; the first few also compile and fill the caches.
WARM, TIMED = 5, 25

_tried: dict[str, Config] = {}


@functools.cache
def table() -> dict[tuple[str, str, str, str], Config]:
    """Read the shipped rows: (op, shape, device, triton) -> config."""
    rows = json.loads(Path(__file__).with_name("tune.json").read_text(encoding="utf-8"))
    return {(row["op"], row["shape"], row["device"], row["triton"]): row["config"] for row in rows}


@functools.cache
def triton_version() -> str:
    """Major and minor version of the installed Triton ("3.6"), or "none"."""
    if find_spec("triton") is None:
        return "none"
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@functools.cache
def config(op: str, shape: str, device: torch.device) -> Config:
    """The config to launch `op` with for a class of shapes on a device; KeyError where not even "*" has one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    # A device newer than every class that is listed takes the newest.
    known = sorted({int(d[2:]) for _, _, d, _ in table() if d.startswith("sm")}, reverse=True)
    major, minor = capability(device)
    classes = [f"sm{number}" for number in known if number <= 10 * major + minor] if device.type == "cuda" else []
    for place in (name, *classes, "*"):
        for triton in (triton_version(), "*"):
            if (op, shape, place, triton) in table():
                return table()[op, shape, place, triton]
    raise KeyError(f"tune.json has no row for op {op!r}, shape {shape!r} on {name}, nor for any device")


def chosen(op: str, shape: str, device: torch.device) -> Config:
    """The config in force: the one being tried, else the table's."""
    return _tried.get(op) or config(op, shape, device)


@contextmanager
def trying(op: str, candidate: Config) -> Iterator[None]:
    """Launch `op` with this config inside the `with`, whatever the table says."""
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
    """Time `call`, which launches `op` on the current CUDA device, with each candidate -> the best one's table row.

    The row also has ms, the median, and refused, how many candidates did not fit the device. Raises BackendError
    without a CUDA device, or where no candidate fits.
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
    best, found = min(times, key=lambda pair: pair[0])
    place = {"device": torch.cuda.get_device_name(), "triton": triton_version(), "op": op, "shape": shape}
    return {**place, "config": found, "source": "measured", "ms": best, "refused": refused}


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the current CUDA device."""
    for _ in range(WARM):
        call()
    times = []
    for _ in range(TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)
