"""Watches the other ranks of a drawing, so that one that fails, dies or hangs ends all, by name.

Every rank has a thread that tells the others each second, through a store that rank 0 serves, that it is there and how
far it came: the number of exchanges that it began. It looks at what the others tell, and names a rank that

  failed        raised an error, an exhausted memory say; known within a second,
  is silent     for SILENT seconds: its process ended, is frozen, or its machine is cut off,
  hangs         in the midst of a model call, and came no further for HANGING seconds, the least far of all; on a CPU,
                whose blocks may take longer, it also took no time of the processor. Or in the midst of a picture,
                between model calls, and for IDLE seconds took no time of the processor and had no page of a file read.

What is named first holds for all (`verdict`). Whoever waits for others then raises it as a BackendError; a rank that
does not come to that within GRACE seconds, because it hangs in a library, is ended with the line on standard error.
Otherwise, while weights are loaded say, a rank may take as long as OUTSIDE.
"""

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from s3dit.errors import BackendError

if sys.platform == "win32":

    def pages_read() -> int:
        """0: this system does not tell."""
        return 0
else:
    import resource

    def pages_read() -> int:
        """Pages of mapped files that this process waited for, and blocks that it read, since its start."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_majflt + used.ru_inblock


BEAT, SILENT, HANGING, IDLE, GRACE = 1.0, 10.0, 15.0, 20.0, 5.0
OUTSIDE = 300.0
VERDICT = "verdict"
GONE = "its process ended, stands still, or is cut off"
# Where a rank is: amid a model call, between two of one picture, or where it may wait.
INSIDE, BETWEEN, ELSEWHERE = "inside", "between", "elsewhere"


@dataclass(slots=True)
class _Seen:
    """What a rank told last, since when it is there, and how far it came since when; times of the own clock."""

    told: str
    at: float
    progress: str
    since: float


class Watch:
    """One rank's look at the others.

    store: a connection that nobody else uses · rank, size: its own, and how many · on_cpu: whether ranks compute there.
    """

    def __init__(self, store: Any, rank: int, size: int, on_cpu: bool) -> None:
        self.rank, self.size, self._store, self._on_cpu = rank, size, store, on_cpu
        self.verdict: tuple[int, str] | None = None
        # Exchanges begun, whether in the midst of a model call, and in how many nested `with` others count on this one.
        self.count, self.inside, self.engaged = 0, False, 0
        # Whether it waits for all to come to one place.
        self.waiting = False
        self._seen: dict[int, _Seen] = {}
        self._ends, self._beats, self._spoken = threading.Event(), 0, False
        # Beats since the store last answered.
        self._unanswered = 0
        self._tell()
        self._thread = threading.Thread(target=self._run, name="s3dit watch", daemon=True)
        self._guard = threading.Thread(target=self._end, name="s3dit guard", daemon=True)

    def start(self) -> None:
        """Begin to watch, once every rank has told that it is there."""
        self._thread.start()
        self._guard.start()

    def close(self) -> None:
        """Tell the others that this rank has left; rank 0, which serves the store, waits for theirs a moment."""
        self._ends.set()
        self._thread.join(2 * BEAT)
        if self._thread.is_alive():
            # It waits for an answer of the store, which then gives none.
            return
        try:
            self._store.set(self._key(self.rank), "left")
            deadline = time.monotonic() + GRACE
            while self.rank == 0 and time.monotonic() < deadline:
                if set(self._store.multi_get([self._key(rank) for rank in range(1, self.size)])) <= {b"left"}:
                    break
                time.sleep(0.02)
        except RuntimeError:
            # The store has left already.
            return

    def fail(self, text: str) -> None:
        """Tell all that this rank failed, unless there is a verdict."""
        try:
            if self.verdict is None:
                self._judge(self.rank, f"failed: {text}")
        except RuntimeError:
            return

    def error(self) -> BackendError | None:
        """The verdict as an error to raise, None where there is none."""
        if self.verdict is None:
            return None
        text = self._text()
        if self._speaks() and self.rank and not self._spoken:
            # Elsewhere rank 0 says what ends it; it is gone.
            self._say(text)
        return BackendError(text)

    def explained(self, error: RuntimeError) -> BackendError:
        """What an exchange that broke off is about: the verdict, which may be some seconds away."""
        deadline = time.monotonic() + SILENT + 3 * BEAT
        while self.verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.error() or BackendError(
            f"the other processes cannot be reached ({str(error).splitlines()[0]:.200}); needed all of them; start the "
            "command again"
        )

    def _run(self) -> None:
        """Tell and look, each second."""
        while self.verdict is None and not self._ends.wait(BEAT):
            try:
                self._tell()
                self._look()
                self._unanswered = 0
            except RuntimeError:
                if not self._ends.is_set():
                    self._lose(f"does not answer: {GONE}")

    def _end(self) -> None:
        """Judge rank 0 if its store, which lets one wait for ever, is silent; after a verdict end this process.

        That is, if it does not end itself. Beats are counted, as a process that stood still itself has seen nothing.
        """
        while self.verdict is None and not self._ends.wait(BEAT):
            self._unanswered += 1
            if self._unanswered * BEAT > SILENT:
                self._lose(f"does not answer for {SILENT:g} s: {GONE}")
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            if self._ends.wait(0.1):
                return
        if self.engaged or self.waiting:
            if self._speaks() and not self._spoken:
                self._say(self._text())
            os._exit(2)

    def _tell(self) -> None:
        self._beats += 1
        place = INSIDE if self.inside else BETWEEN if self.engaged and not self.waiting else ELSEWHERE
        # Without what this thread itself takes.
        seconds = time.process_time() - time.thread_time()
        busy = int(2 * seconds) if self._on_cpu else 0
        if place == BETWEEN:
            busy = int(20 * seconds) + pages_read()
        self._store.set(self._key(self.rank), f"{self._beats} {self.count} {busy} {place}")

    def _look(self) -> None:
        """Read what all have told, and judge."""
        now = time.monotonic()
        if self._store.check([VERDICT]):
            rank, text = json.loads(self._store.get(VERDICT))
            self.verdict = int(rank), str(text)
            return
        told = self._store.multi_get([self._key(rank) for rank in range(self.size)])
        for rank, word in enumerate(each.decode() for each in told):
            progress, seen = word.partition(" ")[2], self._seen.get(rank)
            if seen is None:
                self._seen[rank] = _Seen(word, now, progress, now)
                continue
            if word != seen.told:
                seen.told, seen.at = word, now
            if progress != seen.progress:
                seen.progress, seen.since = progress, now
        gone = [rank for rank, seen in self._seen.items() if seen.told == "left" and now - seen.at > 2 * BEAT]
        if gone and self.waiting:
            self._judge(gone[0], "has left: its program ended before this one's")
        present = {rank: seen for rank, seen in self._seen.items() if seen.told != "left"}
        for rank, seen in present.items():
            if rank != self.rank and now - seen.at > SILENT:
                self._judge(rank, f"does not answer for {SILENT:g} s: {GONE}")
        for rank, seen in present.items():
            if seen.progress.endswith(BETWEEN) and now - seen.since > IDLE:
                self._judge(rank, f"hangs: it did nothing for {IDLE:g} s between model calls")
        inside = [(seen.since, rank) for rank, seen in present.items() if seen.progress.endswith(INSIDE)]
        if inside and now - min(inside)[0] > HANGING:
            # All stand still by now, those that wait for another one exchange further than it.
            still = [rank for since, rank in inside if now - since > HANGING - 3 * BEAT]
            least = min(still, key=lambda rank: int(present[rank].progress.split()[0]))
            self._judge(least, f"hangs: no progress for {HANGING:g} s amid a model call")

    def _judge(self, rank: int, text: str) -> None:
        """Let this be the verdict of all, unless there is one."""
        first = self._store.compare_set(VERDICT, "", json.dumps([rank, text[:400]]))
        held = json.loads(first)
        self.verdict = int(held[0]), str(held[1])

    def _lose(self, text: str) -> None:
        """Let this be the verdict about rank 0, whose store cannot be asked, unless there is one."""
        self.verdict = self.verdict or (0, text)

    def _text(self) -> str:
        assert self.verdict is not None
        rank, text = self.verdict
        return f"rank {rank} of {self.size} {text}; all were stopped, nothing half-written is left; start them again"

    def _speaks(self) -> bool:
        """Whether this rank says the verdict: rank 0, or the next if it is about rank 0."""
        assert self.verdict is not None
        return self.rank == (1 if self.verdict[0] == 0 else 0)

    def _say(self, text: str) -> None:
        """Write a line past everything that may be closed or muted."""
        self._spoken = True
        sys.stderr.flush()
        os.write(2, f"s3dit: {' '.join(text.split())}\n".encode())

    @staticmethod
    def _key(rank: int) -> str:
        return f"rank{rank}"
