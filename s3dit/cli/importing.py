"""Importing torch and the engine at once, without looking for garbage meanwhile."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """While inside, the garbage collector rests; afterwards it never looks at what is there.

    What modules are made of lives as long as the process: looking for garbage in it, again and again while it grows
    and once more at the exit, takes as long as a fifth of the imports. Nothing is changed in a process that has torch
    already: it is somebody else's.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(_thaw)


def _thaw() -> None:
    """Let the last look, at the exit, find Triton's objects: its binding prints what is left of them as a leak."""
    if "triton" in sys.modules:
        gc.unfreeze()
