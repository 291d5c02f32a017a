"""weights/README.md: its examples run, and what it lists is what the code has."""

import importlib
import re
import tempfile
from pathlib import Path

import torch

from s3dit.weights.checkpoint import READERS
from s3dit.weights.comfy import COMFY_FORMATS
from s3dit.weights.dialects import METHODS, UNREAD_ADAPTERS
from s3dit.weights.formats import UNREAD_FORMATS
from s3dit.weights.keymap import SPELLINGS

FOLDER = Path(__file__).resolve().parents[2] / "weights"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert "to_q" in names["layer"]


def between(start, end):
    return " ".join(TEXT.split(start)[1].split(end)[0].split())


def test_formats_are_those_of_the_code():
    assert re.findall(r"`(\w+)`", between("ComfyUI: scaled fp8, and ", " of `comfy_quant`")) == list(COMFY_FORMATS)
    refused = between("because nothing here decodes them: ", " (`formats.UNREAD_FORMATS`)")
    assert refused.split(", ") == [name for name, _ in UNREAD_FORMATS]
    section = TEXT.split("## Number formats of producers")[1].split("\n## ")[0]
    modules = re.findall(r"^\| `(\w+)\.py`", section, re.MULTILINE)
    others = ("comfy", "dfloat11", "libraries", "nunchaku", "sdnq")
    producers = {name for name in others if hasattr(load(name), "layers")}
    assert {"formats", *producers} == set(modules)


def load(name):
    return importlib.import_module(f"s3dit.weights.{name}")


def test_spellings_are_those_of_the_code():
    listed = between("**Spellings** (`keymap.SPELLINGS`): ", ". A new spelling")
    assert listed.split(", ") == [spelling.name for spelling in SPELLINGS]


def test_adapters_that_are_refused_are_those_of_the_code():
    named = between("`dialects.UNREAD_ADAPTERS` (", " and others of PEFT").split(", ")
    refused = [name for name, _ in UNREAD_ADAPTERS]
    assert set(named) <= set(refused)
    other = {name for name in refused if name not in named and name not in METHODS}
    assert other == {"T-LoRA", "prompt tuning (PEFT)", "textual inversion"}


def test_every_module_and_name_that_it_mentions_exists():
    for name in re.findall(r"`(\w+)\.py`", TEXT):
        assert (FOLDER / f"{name}.py").is_file(), name
    for module, name in re.findall(r"`(\w+)\.(?!py`)(\w+)`", TEXT):
        if (FOLDER / f"{module}.py").is_file():
            assert hasattr(load(module), name), f"{module}.{name}"
    assert set(READERS) == {"safetensors", "gguf"}


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150
