"""Style and types, as pyproject.toml says them, in the run that everybody makes: ruff and mypy with their own words."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", pytest.param("mypy", marks=pytest.mark.slow)])
def test_the_tree_is_clean(command):
    tool, *words = command.split()
    pytest.importorskip(tool)
    found = subprocess.run([sys.executable, "-m", tool, *words], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stdout + found.stderr
