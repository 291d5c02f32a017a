"""Descriptions of the programs: tools/README.md and the files agree, and every public function is described."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
README = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
# File name -> how it is run, from the tables.
ROWS = dict(re.findall(r"^\| `(\w+\.py)` \| (.+?) \|", README, re.MULTILINE))
DESCRIBED = [*TOOLS, *(ROOT / "s3dit" / "cli").glob("*.py"), *(ROOT / "s3dit" / f"{name}.py" for name in (
    "files", "terminal", "__main__"))]  # fmt: skip


def test_the_readme_has_a_line_for_each_tool():
    assert list(ROWS) and set(ROWS) == {path.name for path in TOOLS}
    # A line each, besides heads and headings: what else there is to say is said by the files.
    assert README.count("\n") <= len(TOOLS) + 27


@pytest.mark.parametrize("name", ROWS)
def test_a_command_of_the_readme_is_that_of_its_file(name):
    """A program is run by its own name or by another that passes its options on; the rest are imported by the rest."""
    text, row = (ROOT / "tools" / name).read_text(encoding="utf-8"), ROWS[name]
    if row.startswith("imported by"):
        module = re.escape(name.removesuffix(".py"))
        others = [path for path in TOOLS if path.name != name]
        assert any(re.search(rf"^ *(import|from) {module}\b", path.read_text(), re.MULTILINE) for path in others)
        assert "__main__" not in text
        return
    command = row.strip("`").split()
    assert command[0] == "python" and (ROOT / command[1]) in TOOLS
    assert command[1] == f"tools/{name}" or f"{command[1]} {command[2]}" in text, row
    assert "__main__" in (ROOT / command[1]).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["soak", "fuzz"])
@pytest.mark.sampled(1)
def test_a_program_without_other_libraries_answers_help(name):
    done = subprocess.run([sys.executable, ROOT / "tools" / f"{name}.py", "--help"], capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith(b"usage: ")


def test_the_recipes_readme_has_a_line_for_each_in_order():
    folder = ROOT / "tools" / "recipes"
    rows = re.findall(r"^\| `(\w+\.py)` \|", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    recipes = [path for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert len(rows) >= 5 and rows == sorted(path.name for path in recipes)
    # Each is a lesson: its question, method and source, what is found, and how it is run.
    for path in recipes:
        words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert all(f"{part}:" in words for part in ("Question", "Method", "Source")), path.name
        assert "Found on the embedded model:" in words and f"python tools/recipes/{path.name}" in words, path.name


@pytest.mark.parametrize("path", DESCRIBED, ids=lambda path: path.stem)
def test_every_public_function_is_described(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    named = [node for node in ast.walk(tree) if isinstance(node, kinds) and not node.name.startswith("_")]
    assert ast.get_docstring(tree)
    assert not [node.name for node in named if not ast.get_docstring(node)]
