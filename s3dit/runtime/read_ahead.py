"""Reading files of weights into the system's cache before they are needed, in a thread of its own.

While a part computes, the disk would rest; so the files of the part that comes next are asked for as soon as the part's
own are. Nothing is held by it: the pages are the system's, which drops them when memory is short. What would not fit
beside the present part is left alone, because it would push that out.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

from s3dit.weights.checkpoint import Checkpoint

# Of the memory that is available, what may be filled ahead.
SHARE = 0.5


class ReadAhead:
    """Reads checkpoints ahead, the latest wish only."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def read(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Begin to read the files of checkpoints, in this order; what was begun before is left off."""
        self._stop.set()
        self._stop = threading.Event()
        if checkpoints:
            # A daemon: a program ends without waiting for files that nobody needs any more.
            threading.Thread(target=_read, args=(checkpoints, self._stop), daemon=True).start()


def _read(checkpoints: Sequence[Checkpoint], stop: threading.Event) -> None:
    """Ask the system for the files, piece by piece, until `stop` is set or memory is short."""
    room = SHARE * available()
    for checkpoint in checkpoints:
        room -= checkpoint.nbytes
        if room < 0:
            return
        for _ in checkpoint.read_ahead():
            if stop.is_set():
                return


def available() -> float:
    """Bytes of memory that can be had without swapping, as the system estimates; infinite where it does not say."""
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(row.split()[1]) for row in rows if row.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
