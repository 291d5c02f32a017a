"""The table of sizes: a fresh environment with what is needed, and nothing else, draws."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from sizes import fresh  # noqa: E402


@pytest.mark.slow
def test_a_new_environment_draws_and_is_as_large_as_the_pages_say():
    """Installs by pip, from wherever it finds packages: minutes."""
    rows = fresh("", sys.executable)
    used = {name for name, row in rows.items() if row["imported"]}
    # torch imports the last three where they are.
    needed = {"s3dit", "torch", "numpy", "pillow", "tokenizers", "safetensors"}
    assert needed <= used <= needed | {"setuptools", "typing_extensions", "tqdm"}
    for page, pattern in (("README.md", r"of which s3dit (\d+) MB"), ("s3dit/EMBED.md", r"^\| s3dit, .* \| (\d+) \|")):
        said = re.search(pattern, (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)[1]
        assert abs(rows["s3dit"]["bytes"] / 1e6 - int(said)) < 1, page
