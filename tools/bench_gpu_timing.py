"""Measure time and memory on a device: CUDA graphs and events on a GPU, the clock of the process on a CPU.

A GPU's kernels are timed by recording many calls in a CUDA graph and replaying it: no launch gaps. The calls read
different inputs, larger together than the L2 cache, so that each starts with a cold one, as in a model.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
# Bytes that the inputs of one measurement have together: four times the L2 cache of an H100 or H200 (50 MB).
ROTATED_BYTES = 200e6
# Calls in one CUDA graph, at least.
GRAPH_CALLS = 12


class Timer:
    """Times calls on one device; on a CPU, where nothing is timed seriously, each method makes one call."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def warm_up(self, seconds: float = 0.5) -> None:
        """Keep a GPU busy until its clocks are those of work."""
        if self.cuda:
            a, end = torch.randn(4096, 4096, device=self.device), time.monotonic() + seconds
            while time.monotonic() < end:
                a @ a
                self.synchronize()

    def input_sets(self, make: Callable[[], Any], nbytes: float) -> list[Any]:
        """Call `make` so often that its results, of `nbytes` each, are larger together than the L2 cache."""
        return [make() for _ in range(max(2, min(32, math.ceil(ROTATED_BYTES / nbytes))) if self.cuda else 1)]

    def wall_ms(self, call: Call) -> float:
        """Milliseconds of a call until the device is done."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def host_us(self, call: Call, count: int = 20) -> float:
        """Microseconds for which a call keeps the host busy, the mean of `count`, without waiting for the device."""
        count = count if self.cuda else 1
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        taken = 1e6 * (time.perf_counter() - start) / count
        self.synchronize()
        return taken

    def eager_ms(self, calls: Sequence[Call], repeats: int = 5) -> float:
        """Milliseconds of one of `calls` when all are launched one by one in a row: the median of `repeats` rounds."""
        if not self.cuda:
            return self.wall_ms(calls[0])
        for call in calls[:2]:
            call()

        def launch_all() -> None:
            """Launch all calls in a row; their results are dropped."""
            for call in calls:
                call()

        return self._event_ms(launch_all, repeats) / len(calls)

    def graph_ms(self, calls: Sequence[Call], repeats: int = 5) -> float:
        """Milliseconds of one of `calls` inside a CUDA graph of all of them: the median of `repeats` replays."""
        if not self.cuda:
            return self.wall_ms(calls[0])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.synchronize()
        rounds = max(1, math.ceil(GRAPH_CALLS / len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    # The result is dropped at once, so that its memory serves the next call.
                    call()
        graph.replay()
        taken = self._event_ms(graph.replay, repeats) / (rounds * len(calls))
        graph.reset()
        return taken

    def _event_ms(self, call: Call, repeats: int) -> float:
        """Median milliseconds between CUDA events around a call."""
        times = []
        self.synchronize()
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return median(times)

    def measure(self, calls: Sequence[Call], repeats: int = 5) -> dict[str, Any]:
        """Measure eager_ms, host_us and graph_ms of one of `calls`; graph_error where it cannot be recorded."""
        row: dict[str, Any] = {"eager_ms": self.eager_ms(calls, repeats), "host_us": self.host_us(calls[0], 5)}
        try:
            row["graph_ms"] = self.graph_ms(calls, repeats)
        except Exception as error:  # An implementation that waits for the device cannot be in a graph: a result.
            row["graph_error"] = f"{type(error).__name__}: {error}"[:300]
        return row

    def release(self) -> None:
        """Free what earlier measurements held, and measure peak memory anew."""
        if self.cuda:
            # Recorded graphs are in reference cycles.
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Largest memory of tensors on the device since `release`, in GB; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0
