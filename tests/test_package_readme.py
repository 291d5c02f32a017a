"""s3dit/README.md: its examples run on the embedded model, its drawing is what the command prints, its files exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "s3dit" / "README.md").read_text(encoding="utf-8")


def test_examples_run(tmp_path, monkeypatch):
    """In one namespace and in order, as somebody who tries them one after the other."""
    monkeypatch.chdir(tmp_path)
    names = {}
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(examples) == 7
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"s3dit/README.md, example {number}", "exec"), names)
    assert (tmp_path / "star.png").exists() and names["step"].i == 3
    # The change of the weights was taken back.
    assert names["pipe"]("a red star", seed=7, height=64, width=80).images[0] == names["result"].images[0]


def test_the_drawing_is_what_the_command_prints():
    (drawing,) = re.findall(r"<!-- python tools/draw_layout.py -->\n```text\n(.*?)```\n<!-- end -->", TEXT, re.S)
    command = [sys.executable, ROOT / "tools" / "draw_layout.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    assert drawing == printed, "run python tools/draw_layout.py and paste what it prints into s3dit/README.md"
    assert max(map(len, printed.splitlines())) <= 100


def test_every_file_and_function_is_there():
    """What the page names in backquotes behind a path is defined, or assigned, in that file."""
    named = re.findall(
        r"`((?:model|inputs|sampling|kernels|weights|cli)/\w+\.py|request\.py)`((?:[,:]? `\w+(?:\.\w+)?`)*)", TEXT
    )
    assert len(named) > 15
    for path, words in named:
        folder = ROOT if path.startswith(("kernels/", "weights/")) else ROOT / "s3dit"
        text = (folder / path).read_text(encoding="utf-8")
        for word in re.findall(r"`(?:\w+\.)?(\w+)`", words):
            assert re.search(rf"(def|class) {word}\b|^{word}\b.*=", text, re.M), f"{path} has no {word}"


def test_the_page_is_short():
    assert len(TEXT.splitlines()) <= 200
    (glossary,) = re.findall(r"## Words\n(.*?)\n## ", TEXT, re.S)
    assert glossary.count("\n|") - 2 <= 25
