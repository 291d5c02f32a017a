"""The size of the core: what somebody reads to know how the model draws stays below a bound.

The core is, in s3dit/, the files beside the border ones (request, plan, pipeline and what they are split into), in
model/ all but the vision tower and the layout of Omni models, ControlNet, tiles and hooks, sampling/ but for solvers
that no model is published with and TwinFlow's second time, and in kernels/ the reference functions of the Ops, which
are those decorated with `@op`. Counted are lines that hold code or a docstring; blank lines and lines with nothing but
a comment are not. `pytest -s tests/test_core.py` prints the count of every file.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BOUND = 3000

# Files of s3dit/ itself that are border: errors, doors, values and files of users, what a terminal shows, what a
# picture carries, what a budget allows, what a user is told, what other programs draw with, and what TwinFlow
# and distill LoRAs are drawn with; a run that draws nothing.
BORDER = {
    "__init__", "__main__", "cache", "control", "dry_run", "errors", "few_steps", "files", "guidance_options",
    "json_values",
    "notes", "presets", "region", "request_fields", "result", "stages", "terminal", "values",
}  # fmt: skip
# Files of model/ and sampling/ that only some requests need, or those who look on; and how modules are made to be read
# into (meta), which computes nothing.
OPTIONAL = {
    "caches", "comfyui", "controlnet", "controlnet_config", "corrected", "edit_layout", "guidance_methods", "hooks",
    "meta", "multistep", "regions", "skip_layers", "spacings", "target_time", "tiles", "vision_encoder",
}  # fmt: skip
EMPTY = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def core_files():
    """The files that are core as a whole."""
    files = [path for path in (ROOT / "s3dit").glob("*.py") if path.stem not in BORDER]
    rooms = (path for room in ("model", "sampling") for path in (ROOT / "s3dit" / room).glob("*.py"))
    return sorted([*files, *(path for path in rooms if path.stem not in OPTIONAL)])


def count(text):
    """Lines of a source that hold code or a docstring, blank lines inside a docstring left out."""
    held = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in EMPTY:
            held |= set(range(token.start[0], token.end[0] + 1))
    return sum(bool(line.strip()) for number, line in enumerate(text.splitlines(), 1) if number in held)


def references(text):
    """The source of every function that defines an Op, decorators included."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and any(
            ast.unparse(name).startswith("op") for name in node.decorator_list
        ):
            first = min(decorator.lineno for decorator in node.decorator_list)
            indented = "".join(lines[first - 1 : node.end_lineno])
            yield "if True:\n" + indented if indented.startswith(" ") else indented


def core_lines():
    """Counted lines of the core by file; of kernels/ those of its references."""
    lines = {str(path.relative_to(ROOT)): count(path.read_text(encoding="utf-8")) for path in core_files()}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if number := sum(map(count, references(path.read_text(encoding="utf-8")))):
            lines[f"kernels/{path.name} (references)"] = number
    return lines


def test_the_core_is_small():
    lines = core_lines()
    total = sum(lines.values())
    print("", *(f"{number:6,}  {name}" for name, number in lines.items()), f"{total:6,}  in all", sep="\n")
    assert total < BOUND, f"the core has {total:,} lines; needed below {BOUND:,}; shorten it, or move what is border"


def test_the_readme_says_the_number():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (number,) = re.findall(r"less than ([\d,]+) lines", readme)
    assert 0 < int(number.replace(",", "")) - sum(core_lines().values()) <= 100


def test_the_rule_finds_what_it_is_about():
    names = set(core_lines())
    assert {"s3dit/pipeline.py", "s3dit/model/layout.py", "s3dit/sampling/solvers.py"} <= names
    assert {"kernels/norm.py (references)", "kernels/attention.py (references)"} <= names
    assert not any("vision_encoder" in name or "controlnet" in name for name in names)


def test_what_counts():
    assert count('"""Doc.\n\nMore.\n"""\n\n# comment\nx = 1  # beside\n\n\ndef f():\n    return x\n') == 6


@pytest.mark.parametrize("folder", ["configs", "model", "sampling", "inputs", "runtime", "research", "export"])
def test_functions_are_short(folder):
    """At most 40 lines, docstring included, and 8 parameters: what is longer is split, or gets a value with a name."""
    wrong = []
    for path in sorted((ROOT / "s3dit" / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                lines, parameters = node.end_lineno - node.lineno + 1, len(set(names) - {"self", "cls"})
                if lines > 40 or parameters > 8:
                    wrong.append(f"{path.name}, {node.name}: {lines} lines, {parameters} parameters")
    assert not wrong, "\n".join(wrong)
