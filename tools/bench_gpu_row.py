"""The `Bench` that a stage of the GPU benchmark measures with: device, time, and what becomes of errors."""

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_gpu_timing import Timer

Row = dict[str, Any]
BF16, E4M3, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8


@dataclass
class Bench:
    """Where and how long a stage measures: device, seconds from now, folder of the files, dry run or not."""

    device: torch.device
    seconds: float
    out: Path
    dry: bool
    timer: Timer = field(init=False)
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.timer = Timer(self.device)

    def left(self) -> float:
        """Seconds that the stage may go on."""
        return self.seconds - (time.monotonic() - self.start)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of pictures in pixels, the larger first."""
        return (64,) if self.dry else (1024, 512)

    def attempt(self, needed: float, measure: Callable[[], Iterator[Row]], **fields: Any) -> Iterator[Row]:
        """Yield the rows of `measure`, each with `fields`; or a row with "error", or with "skipped".

        needed: seconds without which it is not begun.
        """
        if self.left() < needed:
            yield fields | {"skipped": f"{self.left():.0f} s left, needed {needed:.0f}"}
            return
        self.timer.release()
        try:
            for row in measure():
                yield fields | row
        except Exception as error:  # Whatever went wrong is a result, and must not lose the other measurements.
            where = traceback.format_exc().splitlines()[-6:]
            yield fields | {"error": f"{type(error).__name__}: {error}"[:500], "trace": where}
