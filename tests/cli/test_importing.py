"""The collector rests while a program imports torch, and is left alone in a process that has it."""

import gc
import subprocess
import sys
from pathlib import Path

import torch

from s3dit.cli.importing import importing

ROOT = Path(__file__).resolve().parents[2]


def test_a_process_that_has_torch_is_left_alone():
    assert torch and gc.isenabled()
    before = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_a_program_looks_for_no_garbage_in_what_it_imports():
    code = """
import gc
from s3dit.cli.importing import importing
with importing():
    assert not gc.isenabled()
    kept = [[]]
assert gc.isenabled() and gc.get_freeze_count() > 1000
from s3dit.cli import importing as module
module._thaw()
assert gc.get_freeze_count()
import sys
sys.modules["triton"] = sys
module._thaw()
assert not gc.get_freeze_count()
gc.disable()
with importing():
    pass
assert not gc.isenabled()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
