"""What the tests of the server share; without its packages they are skipped."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
sys.path.insert(0, str(Path(__file__).parent))

from running import running  # noqa: E402


@pytest.fixture(scope="session")
def served():
    with running() as server:
        yield server
