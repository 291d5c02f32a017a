"""The architecture as a test: every import, read with `ast`, goes down the floors, and no imports run in a circle.

A floor is a folder, or a few files of s3dit/ itself; what stands in a folder may import from its own and from every
lower floor. Rooms are found in the tree, so a new file is judged without being listed.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: folders end with a dot, anything else is a file of s3dit/.
FLOORS = (
    ("errors",),
    ("kernels.",),
    ("weights.",),
    ("configs.",),
    (
        "cache", "control", "region", "json_values", "values", "guidance_options", "request", "presets",
        "request_fields", "files", "terminal",
    ),
    ("model.",),
    ("sampling.",),
    ("inputs.",),
    ("runtime.", "parallel."),
    ("few_steps", "notes", "resolve", "stages", "plan"),
    ("result", "dry_run", "loaded_model"),
    ("research.",),
    ("pipeline",),
    ("export.",),
    ("serve.",),
    ("cli.", "parity.", "batch."),
    ("__main__", "__init__"),
)  # fmt: skip

# What pip installs with the engine, by import name.
INSTALLED = {"torch", "triton", "safetensors", "tokenizers", "sentencepiece", "huggingface_hub", "tqdm", "numpy", "PIL"}
# What a reference is drawn with (the last two: the official repository), inside functions of this room alone.
REFERENCE, PARITY = {"diffusers", "transformers", "zimage", "utils"}, "s3dit.parity."
# What a room may import besides, where it is written for it.
RUNS_WITH = {
    "s3dit.export.runner": {"onnxruntime"}, "s3dit.batch.stores": {"pyarrow"}, "s3dit.batch.cluster": {"ray"},
    "s3dit.serve.api": {"starlette"}, "s3dit.serve.drawing": {"starlette"},
    "s3dit.serve.server": {"starlette", "uvicorn"}, "s3dit.serve.metrics": {"prometheus_client"},
    "s3dit.serve.replicas": {"ray", "prometheus_client"}, "s3dit.runtime.ray_cluster": {"ray"},
}  # fmt: skip
# Functions that import what they are given.
IMPORTERS = {"importlib.import_module", "import_module", "__import__"}
ATTICS = {"utils", "util", "common", "helpers", "types", "constants", "base", "registry"}


def sources():
    """Module name -> path, of every file that is installed; the symlinks in s3dit/ are not followed."""
    found = {f"s3dit.{path.stem}": path for path in (ROOT / "s3dit").glob("*.py")}
    folders = {path.parent for path in (ROOT / "s3dit").glob("*/*.py")} | {ROOT / "kernels", ROOT / "weights"}
    return found | {f"s3dit.{folder.name}.{path.stem}": path for folder in folders for path in folder.glob("*.py")}


def programs():
    """Module name -> path, of tools/."""
    return {path.stem: path for path in (ROOT / "tools").glob("*.py")}


def imports(text, rooms):
    """Every (line, imported module or room) of a source, wherever in the file it stands."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                room = f"{module}.{alias.name}"
                if module != "s3dit" or alias.name != "__version__":
                    yield node.lineno, room if room in rooms else module
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            yield node.lineno, ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "?"


def floor(module):
    """The floor of a room; None where it has none."""
    _, first, *rest = module.split(".")
    name = f"{first}." if rest else first
    return next((number for number, names in enumerate(FLOORS) if name in names), None)


def fault(importer, imported, rooms):
    """What is wrong with one arrow, or None."""
    top = imported.split(".")[0]
    if imported.startswith("."):
        return "relative; write the full name"
    if top in ("kernels", "weights"):
        return f"bare; write s3dit.{imported}"
    if importer == "s3dit.__init__" and imported == "?":
        # Its table of names, each of which test_loaded_model.py imports.
        return None
    if top != "s3dit":
        allowed = {"torch", "triton"} if importer.startswith("s3dit.kernels.") else INSTALLED
        allowed = allowed | REFERENCE if importer.startswith(PARITY) else allowed
        allowed = allowed | RUNS_WITH.get(importer, set())
        return None if top in allowed or top in sys.stdlib_module_names else "not among what is installed with it"
    if imported == "s3dit" or f"{imported}.__init__" in rooms:
        return "the door, not a room; import from the room"
    if imported not in rooms:
        return "no such room"
    one, other = floor(importer), floor(imported)
    return None if other is not None and other <= one else f"floor {one} imports floor {other}"


def cycle(arrows):
    """One cycle of importer -> imported rooms as a list, or None."""
    done, path = set(), []

    def visit(room):
        if room in path:
            return [*path[path.index(room) :], room]
        if room in done:
            return None
        path.append(room)
        for other in sorted(arrows.get(room, ())):
            if found := visit(other):
                return found
        done.add(path.pop())
        return None

    return next((found for room in sorted(arrows) if (found := visit(room))), None)


def faults(texts):
    """All that is wrong with the imports of a house: module name -> source text."""
    wrong, arrows = [], {}
    for importer, text in sorted(texts.items()):
        if floor(importer) is None:
            wrong.append(f"{importer}: has no floor; move it into a folder, or give it one in {Path(__file__).name}")
            continue
        for line, imported in imports(text, texts):
            arrows.setdefault(importer, set()).add(imported)
            if reason := fault(importer, imported, texts):
                wrong.append(f"{importer}:{line} -> {imported}: {reason}")
    if found := cycle(arrows):
        wrong.append(f"cycle: {' -> '.join(found)}")
    return wrong


def test_every_arrow_goes_down():
    wrong = faults({module: path.read_text(encoding="utf-8") for module, path in sources().items()})
    assert not wrong, "\n".join(wrong)


def test_tools_run_in_no_circle():
    texts = {name: path.read_text(encoding="utf-8") for name, path in programs().items()}
    arrows = {name: {other for _, other in imports(text, ()) if other in texts} for name, text in texts.items()}
    assert arrows["bench_files"] == {"bench_machine"}
    assert cycle(arrows) is None


@pytest.mark.parametrize(
    ("importer", "text", "words"),
    [
        ("kernels.norm", "from s3dit.model.layers import RMSNorm", "floor 1 imports floor 5"),
        ("kernels.norm", "from s3dit.weights.hub import resolve", "floor 1 imports floor 2"),
        ("kernels.norm", "import numpy", "not among what is installed"),
        ("weights.hub", "from s3dit.configs.model_files import read_json", "floor 2 imports floor 3"),
        (
            "weights.hub",
            "def f():\n    import s3dit.model.layers",
            "hub:2 -> s3dit.model.layers: floor 2",
        ),
        ("configs.infer_config", "from s3dit.model.transformer import Transformer", "floor 3 imports floor 5"),
        ("model.layers", "from s3dit.sampling.guidance import guide", "floor 5 imports floor 6"),
        ("sampling.solvers", "from s3dit.runtime.residency import Residency", "floor 6 imports floor 8"),
        ("runtime.lora", "from s3dit.plan import Plan", "floor 8 imports floor 9"),
        ("research.trace", "from s3dit.pipeline import Pipeline", "floor 11 imports floor 12"),
        ("pipeline", "from s3dit.cli.main import main", "floor 12 imports floor 15"),
        ("pipeline", "from s3dit import Pipeline", "the door"),
        ("pipeline", "from s3dit.weights import Checkpoint", "the door"),
        ("pipeline", "from .vae import Autoencoder", "relative"),
        ("pipeline", "from weights.hub import resolve", "bare; write s3dit.weights.hub"),
        ("pipeline", "import kernels", "bare; write s3dit.kernels"),
        ("pipeline", "if 0:\n    import diffusers", "pipeline:2 -> diffusers: not among"),
        ("model.tokenizer", "from transformers import AutoTokenizer", "not among"),
        ("runtime.lora", "import peft.tuners", "not among"),
        ("kernels.gguf", "import gguf", "not among"),
        ("pipeline", "import importlib\nimportlib.import_module('diffusers')", "-> diffusers: not among"),
        ("pipeline", "from importlib import import_module\nimport_module('diffusers')", "-> diffusers: not among"),
        ("pipeline", "__import__('di' + 'ffusers')", "-> ?: not among"),
        ("pipeline", "import bench", "not among"),
        ("attic", "", "s3dit.attic: has no floor"),
        ("attics.one", "", "s3dit.attics.one: has no floor"),
        ("pipeline", "import s3dit.attic", "no such room"),
    ],
)
def test_a_wrong_arrow_is_seen(importer, text, words):
    """The test can fail: each of these would be caught, by name."""
    texts = dict.fromkeys(sources(), "") | {f"s3dit.{importer}": text}
    assert any(words in wrong for wrong in faults(texts)), faults(texts)


def test_a_cycle_is_seen():
    texts = {
        "s3dit.weights.hub": "from s3dit.weights.assign import assign",
        "s3dit.weights.assign": "def f():\n    from s3dit.weights import keymap",
        "s3dit.weights.keymap": "import s3dit.weights.hub",
    }
    found = "cycle: s3dit.weights.assign -> s3dit.weights.keymap -> s3dit.weights.hub -> s3dit.weights.assign"
    assert faults(texts)[-1] == found
    assert not any("cycle" in wrong for wrong in faults(texts | {"s3dit.weights.keymap": ""}))


def test_doors_hold_a_docstring_only():
    doors = [path for module, path in sources().items() if module.endswith(".__init__") and module.count(".") == 2]
    assert len(doors) == 14
    for path in doors:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_a_reference_is_imported_where_it_is_drawn():
    """Never by importing a module: records are made and compared without diffusers."""
    for module, path in sources().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not {name.partition(".")[0] for name in names} & REFERENCE, module


def test_no_attics():
    """Things live where they are used, so there is no room for what has no place."""
    folders = ("s3dit", "kernels", "weights", "tools")
    attics = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.stem in ATTICS]
    assert not attics


def test_tools_shadow_nothing():
    """Running a program of tools/ puts that folder first on the path: its names must be no one else's."""
    taken = sys.stdlib_module_names | INSTALLED | {"diffusers", "transformers", "s3dit", "kernels", "weights"}
    assert not [path for path in (ROOT / "tools").glob("*.py") if path.stem in taken]


@pytest.mark.parametrize("module", ["s3dit", "s3dit.cli.main", "s3dit.request"])
def test_import_is_light(module):
    """`--help` and a refused request answer at once: torch comes when there is something to compute."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
