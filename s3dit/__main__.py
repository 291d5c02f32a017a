"""`python -m s3dit`, and the `s3dit` that pip installs: the command line."""

import os
import signal
import sys


def run() -> int:
    """Run the command line, which takes the signals over as soon as it is imported; returns the exit code."""
    ends = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ends = [number for number in ends if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    for number in ends:
        signal.signal(number, _end)
    from s3dit.cli.main import main

    for number in ends:
        signal.signal(number, signal.SIG_DFL)
    return main(early=_end)


def _end(number: int, frame: object) -> None:
    """End at once: there is nothing to clean up yet, and an exception raised in the midst of an import can be lost."""
    try:
        os.write(2, b"s3dit: stopped; nothing half-written is left\n")
    finally:
        os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(run())
