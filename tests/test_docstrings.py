"""Every public class, function and method of the listed packages has a docstring whose first line is a sentence."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = ("s3dit", "kernels", "weights", "tools")


def public(tree):
    """Every (name, node) of a module that others may use: not private, and not inside a function."""
    yield "module", tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if not isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) or inner.name.startswith("_"):
                    continue
                # The types of an @overload are described where the body is.
                if not any(ast.unparse(decorator) == "overload" for decorator in inner.decorator_list):
                    yield f"{node.name}.{inner.name}", inner


def faults(text):
    """What is wrong with the docstrings of a source, by name."""
    for name, node in public(ast.parse(text)):
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        if not first:
            yield f"{name}: has no docstring"
        elif not first[0].isupper() and not first.startswith("`") and name != "module":
            yield f"{name}: {first!r} is no sentence"
        elif first[-1] not in ".:":
            yield f"{name}: the first line does not end: {first!r}"


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.sampled(1)
def test_everything_public_is_described(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    wrong = [f"{path.relative_to(ROOT)}: {fault}" for path in paths for fault in faults(path.read_text("utf-8"))]
    assert not wrong, "\n".join(wrong)


def test_what_is_missing_is_seen():
    text = (
        '"""Module."""\nclass A:\n    """A class"""\n    def f(self): pass\n    def _g(self): pass\n'
        'def h():\n    """x times."""'
    )
    assert list(faults(text)) == [
        "A: the first line does not end: 'A class'", "A.f: has no docstring", "h: 'x times.' is no sentence",
    ]  # fmt: skip
