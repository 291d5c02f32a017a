"""kernels/README.md: its examples run, and its tables are those of the code."""

import importlib
import re
from pathlib import Path

import torch

from s3dit.kernels.dispatch import INTERPRETED, Op
from s3dit.kernels.gguf import BLOCKS, GGUF
from s3dit.kernels.grouped import Form, grouped
from s3dit.kernels.schemes import SCHEMES

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


def rows(heading):
    """The rows of the table under a heading, without its head."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


def test_examples_run(capsys):
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert INTERPRETED or "reference reference chosen" in capsys.readouterr().out


def test_the_table_of_ops_is_that_of_the_code():
    ops = {"gguf_linear": ("gguf.py", GGUF["Q4_K"].linear), "grouped_linear": ("grouped.py", FORM.linear)}
    for path in FOLDER.glob("*.py"):
        module = importlib.import_module(f"s3dit.kernels.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, Op) and value.__module__ == module.__name__:
                ops[value.name] = path.name, value

    def cell(op, device):
        names = (f"{i.function.__name__.strip('_')} ({i.backend})" for i in op.implementations if i.device == device)
        return ", ".join(dict.fromkeys(names)) or "reference"

    expected = {f"| `{name}` | {file} | {cell(op, 'cpu')} | {cell(op, 'cuda')} |" for name, (file, op) in ops.items()}
    assert set(rows("Ops")) == expected


FORM = grouped("readme", Form("int8"))


def test_the_table_of_formats_is_that_of_the_code():
    expected = []
    for name, scheme in SCHEMES.items():
        spec = scheme.spec(3840, 3840)
        bits = sum(torch.Size(shape).numel() * dtype.itemsize * 8 for shape, dtype in spec.values()) / 3840**2
        parts = ", ".join(f"{part} {str(dtype).removeprefix('torch.')}" for part, (_, dtype) in spec.items())
        rounded = str(scheme.activation).removeprefix("torch.") if scheme.activation else "not rounded"
        expected.append(f"| `{name}` | {parts} | {bits:.2f} | {rounded} |")
    assert rows("Number formats") == expected
    listed = TEXT.split("Read only: GGUF's ")[1].split("(`gguf.py`)")[0]
    assert re.findall(r"`(\w+)`", listed) == list(BLOCKS)


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 140
