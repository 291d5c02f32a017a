"""The READMEs of the packages: their examples run, their tables name what there is, and their links lead somewhere."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = [
    ROOT / "s3dit" / "API.md",
    ROOT / "s3dit" / "EMBED.md",
    ROOT / "s3dit" / "RECIPES.md",
    ROOT / "s3dit" / "DIFFERENCES.md",
    ROOT / "s3dit" / "EXPORT.md",
    ROOT / "s3dit" / "PARALLEL.md",
    ROOT / "s3dit" / "cli" / "README.md",
    ROOT / "s3dit" / "serve" / "README.md",
    ROOT / "s3dit" / "research" / "README.md",
    ROOT / "tools" / "recipes" / "README.md",
    ROOT / "README.md",
    *(
        path
        for folder in ("s3dit", "kernels", "weights", "tools")
        for path in [ROOT / folder / "README.md"]
        if path.exists()
    ),
]
IDS = [str(path.relative_to(ROOT)) for path in READMES]


def text(page):
    path = ROOT / page
    return (path if path.is_file() else path / "README.md").read_text(encoding="utf-8")


PAGES = ["s3dit/API.md", "s3dit/EMBED.md", "s3dit/RECIPES.md", "s3dit/DIFFERENCES.md", "s3dit/research"]


@pytest.mark.parametrize("folder", PAGES)
@pytest.mark.sampled(1)
def test_examples_run(folder, tmp_path, monkeypatch, capsys):
    """One after another in one program, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    # What an example says of logs is said for itself.
    log = logging.getLogger("s3dit")
    monkeypatch.setattr(log, "handlers", list(log.handlers))
    monkeypatch.setattr(log, "level", log.level)
    examples = re.findall(r"```python\n(.*?)```", text(folder), re.S)
    assert len(examples) >= (1 if folder.endswith("DIFFERENCES.md") else 2)
    exec(compile("\n".join(examples), f"{folder}/README.md", "exec"), {})


@pytest.mark.parametrize("readme", READMES, ids=IDS)
def test_files_that_are_named_are_there(readme):
    """Links, and names of files and folders in backticks, seen from the README's folder or from the root."""
    written = readme.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", written)
    names = re.findall(r"`([\w/]+(?:\.py|\.json|/))`", written)
    own = {"adapter_config.json", "s3dit.json", "scheduler_config.json", "config.json", "cache.json"}
    folders = [readme.parent, ROOT, *(path for path in readme.parent.iterdir() if path.is_dir())]
    missing = [name for name in {*links, *names} - own if not any((folder / name).exists() for folder in folders)]
    assert not missing


def test_the_table_of_fields_is_made_from_the_fields():
    command = [sys.executable, ROOT / "tools" / "api_table.py"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert made in text("s3dit/API.md"), "run tools/api_table.py and paste what it prints into s3dit/API.md"


@pytest.mark.slow
def test_the_drawing_is_what_the_command_prints():
    page = text("s3dit")
    (drawing,) = re.findall(r"<!-- python tools/draw_layout.py -->\n```text\n(.*?)```\n<!-- end -->", page, re.S)
    command = [sys.executable, ROOT / "tools" / "draw_layout.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    assert drawing == printed, "run python tools/draw_layout.py and paste what it prints into s3dit/README.md"
    assert max(map(len, printed.splitlines())) <= 100


def test_every_file_and_function_is_there():
    """What the page names in backquotes behind a path is defined, or assigned, in that file."""
    page = text("s3dit")
    named = re.findall(
        r"`((?:model|inputs|sampling|kernels|weights|cli)/\w+\.py|request\.py)`((?:[,:]? `\w+(?:\.\w+)?`)*)",
        page,
    )
    assert len(named) > 15
    for path, words in named:
        folder = ROOT if path.startswith(("kernels/", "weights/")) else ROOT / "s3dit"
        source = (folder / path).read_text(encoding="utf-8")
        for word in re.findall(r"`(?:\w+\.)?(\w+)`", words):
            assert re.search(rf"(def|class) {word}\b|^{word}\b.*=", source, re.M), f"{path} has no {word}"


def test_the_page_is_short():
    page = text("s3dit")
    assert len(page.splitlines()) <= 200
    (glossary,) = re.findall(r"## Words\n(.*?)\n## ", page, re.S)
    assert glossary.count("\n|") - 2 <= 25
