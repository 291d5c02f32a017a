"""What an engine counts: Stats for those who ask, and the Counts that they are made from."""

import os
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Of so many requests the seconds are kept one by one.
KEPT = 1000


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of an engine since it began, and what it does now.

    queued, running: now · done, failed, cancelled, timed_out, handed_back, refused: requests by how they ended;
    handed_back: by a stop, refused: the queue was full · passes: model calls that were shared or could have been ·
    batch_sizes: how many of them served how many requests · tokens: of these passes · pixels: of the pictures that are
    done · steps: of all requests · seconds: by stage, of the requests that are done · latencies: seconds from submit to
    the end of the last 1,000 that are done · first_partials: likewise to the first partial picture · memory: bytes that
    are held, of the device or, on a CPU, of the process.
    """

    queued: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    handed_back: int = 0
    refused: int = 0
    passes: int = 0
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    tokens: int = 0
    pixels: int = 0
    steps: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    latencies: Sequence[float] = ()
    first_partials: Sequence[float] = ()
    memory: int = 0


class Counts:
    """Counts that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: Counter[str] = Counter()
        self._batches: Counter[int] = Counter()
        self._seconds: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=KEPT)
        self._partials: deque[float] = deque(maxlen=KEPT)

    def add(self, **numbers: int) -> None:
        """Add to some of the numbers of `Stats`."""
        with self._lock:
            self._numbers.update(numbers)

    def passed(self, requests: int, tokens: int) -> None:
        """Count a pass."""
        with self._lock:
            self._batches[requests] += 1
            self._numbers.update(passes=1, tokens=tokens)

    def partial(self, seconds: float) -> None:
        """Count a first partial picture, so long after submit."""
        with self._lock:
            self._partials.append(seconds)

    def done(self, latency: float, pixels: int, seconds: Mapping[str, float]) -> None:
        """Count a request that is drawn."""
        with self._lock:
            self._numbers.update(done=1, pixels=pixels)
            self._latencies.append(latency)
            for name, spent in seconds.items():
                self._seconds[name] += spent  # type: ignore[assignment]

    def latency(self) -> float:
        """Mean seconds of the last requests that were drawn, 1 where there is none."""
        with self._lock:
            return sum(self._latencies) / len(self._latencies) if self._latencies else 1.0

    def stats(self, queued: int, running: int, device: torch.device) -> Stats:
        """Everything as it is now."""
        memory = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident_bytes()
        with self._lock:
            return Stats(
                queued, running, **self._numbers, batch_sizes=dict(sorted(self._batches.items())),
                seconds=dict(self._seconds), latencies=tuple(self._latencies), first_partials=tuple(self._partials),
                memory=memory,
            )  # fmt: skip


def _resident_bytes() -> int:
    """Bytes of this process in memory, 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
