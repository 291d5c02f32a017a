"""The README's examples run, on the embedded model in place of the official one, and are typed under --strict."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s3dit.inputs.image_metadata import read_metadata

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
# What a test cannot have, or does not wait for.
INSTEAD = {"Tongyi-MAI/Z-Image-Turbo": "embedded", "4GiB": "64MiB", "height=768, width=1024": "height=64, width=80"}


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layer = "transformer.layers.0.attention.to_q"
    factors = {"lora_A": torch.ones(2, 192), "lora_B": torch.full((192, 2), 0.01)}
    save_file({f"{layer}.{name}.weight": factor for name, factor in factors.items()}, "style.safetensors")
    assert len(EXAMPLES) == 4
    for example in EXAMPLES:
        for official, small in INSTEAD.items():
            example = example.replace(official, small)
        exec(compile(example, "README.md", "exec"), {})
    assert [read_metadata(name)["seed"] for name in ("fox.png", "styled.png")] == [7, 7]
    assert "48 tensors; torch.Size([8, 8])" in capsys.readouterr().out


@pytest.mark.slow
def test_examples_are_typed(tmp_path):
    """Under --strict, by the flags that pyproject.toml gives to this name; the packages say that they are typed."""
    pytest.importorskip("mypy")
    (tmp_path / "readme_examples.py").write_text("\n".join(EXAMPLES))
    command = [sys.executable, "-m", "mypy", tmp_path / "readme_examples.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stdout + found.stderr
    (tmp_path / "readme_examples.py").write_text(EXAMPLES[0].replace("seed=7", "sede=7"))
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert 'Unexpected keyword argument "sede"' in found.stdout
    assert (ROOT / "s3dit" / "py.typed").exists()
