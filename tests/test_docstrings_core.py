"""Every public function, method and class of s3dit/ has a docstring: what it does, literally, in its first line.

Public is what has no underscore in front, in a module or a class; functions inside of functions are not. Of classes
that have an __init__ with arguments of its own, the class's docstring counts for both.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / "s3dit").rglob("*.py") if not {"kernels", "weights"} & set(path.parts))


def public(node, prefix=""):
    """(name, node) of every public function, method and class below a module or class."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")


def missing(path):
    """What lacks a docstring in a file, or has one whose first line ends in the middle of a sentence."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, node in [("", tree), *public(tree)]:
        lines = (ast.get_docstring(node) or "").splitlines()
        if not lines:
            yield f"{name or 'the module'} has no docstring"
        elif not lines[0].endswith((".", ":", "`")):
            yield f"{name or 'the module'}: its first line is no sentence: {lines[0]!r}"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_everything_public_is_described(path):
    lacking = list(missing(path))
    assert not lacking, "\n".join([str(path), *lacking])
