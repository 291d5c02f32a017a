"""`python -m s3dit`, and the `s3dit` that pip installs: the command line."""

import signal
import sys


def run() -> int:
    """Run the command line, which takes the signals over as soon as it is imported; returns the exit code."""
    # Until then, and again on the way out, Ctrl-C ends the process as SIGTERM does: there is nothing to clean up, and
    # an exception could be raised in the midst of an import, where it is printed and lost.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from s3dit.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
