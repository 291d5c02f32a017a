"""Standard streams and signals of the command line.

Everything that is printed goes through `say` (standard error), `tell`, `event` (standard output) or `bar`. A line stays
one line whatever it holds: characters that are not printable (control characters, escape sequences, line separators,
marks that change the direction of writing, invisible ones) are shown as escapes such as `\\x1b`, and characters that
a stream's encoding lacks as something near or as an escape. A line has at most LONGEST characters and is cut in its
middle: an error begins with what was found and ends with what to do.

A stream that is closed, full or without a reader does not end the work: pictures are drawn and saved, then the exit
code says it (`finish`). This module knows nothing of models or pictures, and does not import torch.
"""

import codecs
import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from types import FrameType
from typing import Any, TextIO

LONGEST = 600
# Printable to Unicode, though nothing is seen of them: joiners, fillers, variation selectors, an empty braille cell.
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
# Marks over one letter; more, in any writing, only bury the lines around.
MARKS = 4
# What is written here and missing in many an encoding.
NEAR = {"×": "x", "…": "...", "·": "*", "²": "^2", "≥": ">=", "–": "-", "—": "-", "▀": "="}
# Seconds in which further signals do not disturb the cleaning up that the first one began.
QUIET = 3.0
# Seconds after which a signal whose exception got lost (in a finalizer, in a library in C) is raised again.
LOST = 0.5


def line(text: object, encoding: str = "utf-8") -> str:
    """Make one printable line of a text: at most LONGEST characters, all of them in the encoding."""
    whole = str(text)
    # Each character shows as one or more: what is far from both ends is never looked at.
    pieces = [*_shown(whole[:LONGEST], encoding), *_shown(whole[LONGEST:][-LONGEST:], encoding)]
    if len(pieces) == len(whole) and sum(map(len, pieces)) <= LONGEST:
        return "".join(pieces)
    half = LONGEST // 2 - 20
    head, tail = pieces[: _fitting(pieces, half)], pieces[-_fitting(pieces[::-1], half) :]
    return f"{''.join(head)} [{len(whole) - len(head) - len(tail):,} characters left out] {''.join(tail)}"


def _shown(text: str, encoding: str) -> Iterator[str]:
    """Each character as it is shown."""
    marks = 0
    for char in text:
        marks = marks + 1 if unicodedata.category(char) in ("Mn", "Me") else 0
        hidden = not char.isprintable() or marks > MARKS or UNSEEN.match(char)
        yield _escaped(char) if hidden else char.encode(encoding, "s3dit").decode(encoding)


def _escaped(char: str) -> str:
    """A character as an escape such as `\\x1b`."""
    # A byte of a name that is no UTF-8 comes as a lone surrogate; it is shown as the byte.
    return f"\\x{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else ascii(char)[1:-1]


def _fitting(pieces: list[str], room: int) -> int:
    """How many of the pieces fit in the room."""
    for i, piece in enumerate(pieces):
        room -= len(piece)
        if room < 0:
            return i
    return len(pieces)


def _near(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(NEAR.get(c) or _escaped(c) for c in error.object[error.start : error.end]), error.end


codecs.register_error("s3dit", _near)


class _Stream:
    """A standard stream that takes every character, and whose loss ends nothing; `lost` is what was raised first."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.lost: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @property
    def encoding(self) -> str:
        """The stream's encoding, UTF-8 where it has none."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal that still takes what is written."""
        return self.stream is not None and self.lost is None and self.stream.isatty()

    def write(self, text: str) -> int:
        """Write a text, characters that the encoding lacks as something near; a stream that is lost takes nothing."""
        _stop_again()
        with self._losing():
            if self.stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self.stream.write(text.encode(self.encoding, "s3dit").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, unless it is lost."""
        with self._losing():
            if self.stream is not None:
                self.stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            # ValueError is what a closed file of Python's raises.
            first, self.lost = self.lost is None, self.lost or error
            if first and self.stream is not None:
                self._forget(self.stream)

    @staticmethod
    def _forget(stream: TextIO) -> None:
        """What is left in the buffer is not to be tried again, at the exit of all times."""
        with suppress(OSError, ValueError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), stream.fileno())


def follows() -> bool:
    """Return whether this is one of torchrun's processes, but not the first, which speaks and writes for all."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def streams(quiet: bool = False) -> Iterator[None]:
    """While inside, standard output, errors, warnings and logs go through here; afterwards they are the caller's.

    quiet: let nothing of it be seen.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened gets this number, and what libraries print ends in a picture.
            os.open(os.devnull, os.O_RDWR)
    out, err = sys.stdout, sys.stderr
    null = open(os.devnull, "w") if quiet else None  # noqa: SIM115
    sys.stdout, sys.stderr = _Stream(null or out), _Stream(null or err)
    handler = _Said(logging.WARNING)
    logging.getLogger("s3dit").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest, **more: say(message)
            yield
    finally:
        sys.stdout.flush()
        logging.getLogger("s3dit").removeHandler(handler)
        sys.stdout, sys.stderr = out, err
        if null is not None:
            null.close()


class _Said(logging.Handler):
    """Says what the engine logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say one record."""
        say(record.getMessage())


def finish(code: int) -> int:
    """The exit code, when all is done: another one if standard output took less than all; 141 if its reader left."""
    sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    if lost is None or code:
        return code
    if isinstance(lost, BrokenPipeError):
        return 141
    say(
        f"standard output cannot be written ({getattr(lost, 'strerror', None) or lost}); needed a file, pipe or "
        "terminal that takes what is printed; pictures and models that were asked for are written"
    )
    return 2


def say(text: object) -> None:
    """Print one line to people, on standard error."""
    shown = line(f"s3dit: {text}", _encoding(sys.stderr))
    if (tqdm := sys.modules.get("tqdm")) is not None:
        # Bars make room for it. In one write, as other processes may write between two.
        tqdm.tqdm.write(shown + "\n", file=sys.stderr, end="")
    else:
        sys.stderr.write(shown + "\n")
    sys.stderr.flush()


def tell(text: object) -> None:
    """Print what was asked for on standard output: one line, or several with line feeds between them."""
    for row in str(text).split("\n"):
        sys.stdout.write(line(row, _encoding(sys.stdout)) + "\n")
    sys.stdout.flush()


def event(**values: Any) -> None:
    """Print one JSON object as a line of ASCII on standard output, whole however long it is."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def paint(text: str) -> None:
    """Write colors and all, as they are, where standard error is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class _NoBar(AbstractContextManager["_NoBar"]):
    """What counts as a tqdm bar does, and shows nothing."""

    n = 0.0

    def update(self, count: float) -> None:
        """Count on."""
        self.n += count

    def close(self) -> None:
        """Nothing is to be closed."""

    def __exit__(self, *error: object) -> None:
        self.close()


def bar(desc: str, **options: Any) -> Any:
    """A tqdm bar on standard error; where tqdm is not installed, a line that says so, once, and no bar."""
    global _bars_missed
    if find_spec("tqdm") is None:
        if not _bars_missed and not options.get("disable"):
            say("no progress bars without the package tqdm; pip install 's3dit[bars]' for them")
            _bars_missed = True
        return _NoBar()
    from tqdm import tqdm

    return tqdm(desc=line(desc, _encoding(sys.stderr)), file=sys.stderr, **options)


_bars_missed = False


@contextmanager
def hushed() -> Iterator[None]:
    """Keep a library in C from printing by itself, past Python, while inside: libtiff says what it minds line by line.

    What other threads print meanwhile is lost too, so keep it short.
    """
    try:
        kept = os.dup(2)
    except OSError:
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _encoding(stream: Any) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; what is half-written is removed on its way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


# The signal that asked for the end, and when it last raised.
_asked: tuple[int, float] | None = None


def _stop(number: int) -> None:
    global _asked
    now = time.monotonic()
    if _asked is None or now - _asked[1] >= QUIET:
        _asked = number, now
        raise Stopped(number)


def _stop_again() -> None:
    """Where the command line comes by, often: end now if the end was asked for and work goes on all the same."""
    global _asked
    if _asked is not None and time.monotonic() - _asked[1] >= LOST:
        _asked = _asked[0], time.monotonic()
        raise Stopped(_asked[0])


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and "<frozen importlib" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def _send(number: int) -> None:
    """To the main thread, so that it wakes from what it waits for; on Windows there is no such thing."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


@contextmanager
def stoppable(early: Callable[[int, object], None] | None = None) -> Iterator[None]:
    """While inside, SIGINT, SIGTERM and SIGHUP raise Stopped in the main thread; elsewhere nothing is changed.

    A handler of the caller's own, or one that ignores (nohup), stays. early: given by a program that ends after
    this; called while torch is still being imported, when nothing is made yet, to end it at once.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        """The handler of a signal."""
        if not _importing(frame):
            _stop(number)
            return
        # NumPy's import swallows an exception and leaves half of a library: wait until no import is under way.
        torch = getattr(sys.modules.get("torch"), "__spec__", None)
        if early is not None and getattr(torch, "_initializing", False):
            early(number, frame)
        timer = threading.Timer(0.05, _send, (number,))
        timer.daemon = True
        timer.start()

    # The handlers of before.
    handlers: dict[int, Any] = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                handlers[number] = signal.getsignal(number)
                signal.signal(number, stop)
        yield
    finally:
        for number, before in handlers.items():
            # What comes after a program's last line is its end, which takes a moment, and is not to be disturbed.
            signal.signal(number, before if early is None else signal.SIG_IGN)
        _asked = None
