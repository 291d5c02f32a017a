"""The architecture as a test: every import of the engine, read with `ast`, goes down the floors.

Each room has a floor and imports from lower ones; arrows on one floor are listed one by one. A new room is given its
floor here, in the commit that adds it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The rooms of s3dit/, floor by floor; kernels/ is floor 0, weights/ floor 1 like config.
FLOORS = {
    1: ("config", "config_keys", "config_parts"),
    2: (
        "layout",
        "layers",
        "linear",
        "images",
        "request",
        "values",
        "devices",
        "control",
        "shapes",
        "files",
        "terminal",
        "hooks",
        "tokenizer_config",
        "tokenizer_json",
    ),
    3: (
        "record",
        "report",
        "sources",
        "tokenizer",
        "text_encoder",
        "vision_encoder",
        "vae",
        "transformer",
        "controlnet",
    ),
    # They operate on any module, so they know none of floor 3.
    4: ("lora", "adapters", "offload", "residency", "graphs", "budget", "trace"),
    5: (
        "sampler",
        "guidance",
        "conditioning",
        "branches",
        "references",
        "look",
        "look_files",
        "look_pictures",
        "convert",
    ),
    6: ("parts",),
    7: ("plan",),
    8: ("pipeline",),
    9: ("cli", "cli_files", "cli_replay", "cli_show"),
    10: ("__main__", "__init__"),
}
# The highest floor that a floor may look down on, where it is not the one below.
BELOW = {4: 2, 5: 3}
# Arrows on one floor.
SIDEWAYS = {
    ("s3dit.config", "s3dit.config_keys"),
    ("s3dit.config", "s3dit.config_parts"),
    ("s3dit.config_parts", "s3dit.config_keys"),
    ("s3dit.config_parts", "s3dit.weights.container"),
    ("s3dit.config", "s3dit.weights.container"),
    ("s3dit.config_keys", "s3dit.weights.container"),
    ("s3dit.images", "s3dit.request"),
    ("s3dit.images", "s3dit.files"),
    ("s3dit.images", "s3dit.terminal"),
    ("s3dit.files", "s3dit.request"),
    ("s3dit.request", "s3dit.control"),
    ("s3dit.request", "s3dit.values"),
    ("s3dit.values", "s3dit.control"),
    ("s3dit.hooks", "s3dit.request"),
    ("s3dit.controlnet", "s3dit.transformer"),
    ("s3dit.lora", "s3dit.offload"),
    ("s3dit.adapters", "s3dit.lora"),
    ("s3dit.residency", "s3dit.offload"),
    ("s3dit.budget", "s3dit.offload"),
    ("s3dit.graphs", "s3dit.offload"),
    ("s3dit.guidance", "s3dit.sampler"),
    ("s3dit.conditioning", "s3dit.sampler"),
    ("s3dit.report", "s3dit.record"),
    ("s3dit.look", "s3dit.look_files"),
    ("s3dit.look", "s3dit.look_pictures"),
    ("s3dit.convert", "s3dit.look"),
    ("s3dit.cli", "s3dit.cli_files"),
    ("s3dit.cli", "s3dit.cli_replay"),
    ("s3dit.cli", "s3dit.cli_show"),
}
# From the ground up; rooms of one rank do not know each other.
KERNELS = (
    {"dispatch", "aligned"},
    {"scheme", "tune"},
    {"rows"},
    {"matmul"},
    {"gguf_matmul"},
    {"attention", "norm", "swiglu", "fp8", "int8", "int4", "gguf", "grouped"},
    {"linear"},
)
WEIGHTS = (
    {"container", "delta", "dialects", "adapter_settings"},
    {"keymap", "mapped_file", "model_folder", "parts", "stored"},
    {"gguf_file", "safetensors_dir"},
    {"assign", "comfy"},
    {"libraries", "nunchaku", "sdnq"},
    {"formats"},
    {"checkpoint"},
    {"adapter", "hub", "quantize"},
    {"convert_adapter"},
)
RANKS = {"kernels": KERNELS, "weights": WEIGHTS}

# What pip installs with the engine, by import name.
INSTALLED = {"torch", "triton", "safetensors", "tokenizers", "sentencepiece", "huggingface_hub", "tqdm", "numpy", "PIL"}
ATTICS = {"utils", "util", "common", "helpers", "types", "constants", "base", "registry"}


def sources():
    """Module name -> path, of every file that is installed; the symlinks in s3dit/ are not followed."""
    found = {f"s3dit.{path.stem}": path for path in (ROOT / "s3dit").glob("*.py")}
    for folder in ("kernels", "weights"):
        found |= {f"s3dit.{folder}.{path.stem}": path for path in (ROOT / folder).glob("*.py")}
    return found


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
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield node.lineno, ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "?"


def floor(module):
    """The floor of a room, None when it has none yet."""
    parts = module.split(".")
    if parts[1] in ("kernels", "weights"):
        return {"kernels": 0, "weights": 1}[parts[1]]
    return next((number for number, names in FLOORS.items() if parts[1] in names), None)


def rank(module):
    """The place of a room of kernels/ or weights/ among the others, None when it has none yet."""
    _, folder, room = module.split(".")
    return next((i for i, names in enumerate(RANKS[folder]) if room in names), None)


def fault(importer, imported):
    """What is wrong with one arrow, or None."""
    top = imported.split(".")[0]
    if imported.startswith("."):
        return "relative; write the full name"
    if top in ("kernels", "weights"):
        return f"bare; write s3dit.{imported}"
    if top != "s3dit":
        allowed = {"torch", "triton"} if importer.startswith("s3dit.kernels.") else INSTALLED
        return None if top in allowed or top in sys.stdlib_module_names else "not among what is installed with it"
    if imported in ("s3dit", "s3dit.kernels", "s3dit.weights"):
        return "the door, not a room; import from the room"
    for folder in RANKS:
        if importer.startswith(f"s3dit.{folder}.") and imported.startswith(f"s3dit.{folder}."):
            one, other = rank(importer), rank(imported)
            said = f"not a lower room of {folder}"
            return f"has no rank in {folder}" if None in (one, other) else None if other < one else said
    if (importer, imported) in SIDEWAYS:
        return None
    one, other = floor(importer), floor(imported)
    if other is None:
        return "has no floor"
    return None if other <= BELOW.get(one, one - 1) else f"floor {one} imports floor {other}"


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
            wrong.append(f"{importer}: a new room; give it a floor in {Path(__file__).name}")
            continue
        for line, imported in imports(text, texts):
            arrows.setdefault(importer, set()).add(imported)
            if reason := fault(importer, imported):
                wrong.append(f"{importer}:{line} -> {imported}: {reason}")
    if found := cycle(arrows):
        wrong.append(f"cycle: {' -> '.join(found)}")
    return wrong


def test_every_arrow_goes_down():
    wrong = faults({module: path.read_text(encoding="utf-8") for module, path in sources().items()})
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "text", "words"),
    [
        ("kernels.norm", "from s3dit.layers import RMSNorm", "floor 0 imports floor 2"),
        ("kernels.norm", "from s3dit.weights.hub import resolve", "floor 0 imports floor 1"),
        ("kernels.norm", "import numpy", "not among what is installed"),
        ("kernels.norm", "from s3dit.kernels.attention import attention", "not a lower room of kernels"),
        ("kernels.dispatch", "from s3dit.kernels import norm", "not a lower room of kernels"),
        ("weights.hub", "from s3dit.weights.adapter import Adapter", "not a lower room of weights"),
        ("weights.hub", "from s3dit.config import read_json", "floor 1 imports floor 1"),
        ("weights.hub", "def f():\n    import s3dit.layers", "hub:2 -> s3dit.layers: floor 1 imports floor 2"),
        ("config", "from s3dit.weights.hub import resolve", "floor 1 imports floor 1"),
        ("layers", "from s3dit.linear import Linear", "floor 2 imports floor 2"),
        ("vae", "from s3dit import transformer", "floor 3 imports floor 3"),
        ("offload", "from s3dit.vae import Autoencoder", "floor 4 imports floor 3"),
        ("sampler", "from s3dit.residency import Residency", "floor 5 imports floor 4"),
        ("sampler", "from s3dit.guidance import guide", "floor 5 imports floor 5"),
        ("pipeline", "from s3dit.cli import main", "floor 8 imports floor 9"),
        ("pipeline", "from s3dit import Pipeline", "the door"),
        ("pipeline", "from s3dit.weights import Checkpoint", "the door"),
        ("pipeline", "from .vae import Autoencoder", "relative"),
        ("pipeline", "from weights.hub import resolve", "bare; write s3dit.weights.hub"),
        ("pipeline", "import kernels", "bare; write s3dit.kernels"),
        ("pipeline", "if 0:\n    import diffusers", "pipeline:2 -> diffusers: not among"),
        ("tokenizer", "from transformers import AutoTokenizer", "not among"),
        ("lora", "import peft.tuners", "not among"),
        ("kernels.gguf", "import gguf", "not among"),
        ("pipeline", "import importlib\nimportlib.import_module('diffusers')", "-> diffusers: not among"),
        ("pipeline", "__import__('di' + 'ffusers')", "-> ?: not among"),
        ("pipeline", "import bench", "not among"),
        ("attic", "", "s3dit.attic: a new room"),
        ("pipeline", "import s3dit.attic", "has no floor"),
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


@pytest.mark.parametrize("folder", ["kernels", "weights"])
def test_doors_hold_a_docstring_only(folder):
    body = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_every_room_of_the_lists_is_there():
    """A room that is gone is taken off."""
    listed = {f"s3dit.{name}" for names in FLOORS.values() for name in names}
    listed |= {f"s3dit.{folder}.{name}" for folder, ranks in RANKS.items() for names in ranks for name in names}
    doors = {"s3dit.kernels.__init__", "s3dit.weights.__init__"}
    assert listed == set(sources()) - doors


def test_no_attics():
    """Things live where they are used, so there is no room for what has no place."""
    folders = ("s3dit", "kernels", "weights", "tools")
    attics = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.stem in ATTICS]
    assert not attics


def test_tools_shadow_nothing():
    """Running a program of tools/ puts that folder first on the path: its names must be no one else's."""
    taken = sys.stdlib_module_names | INSTALLED | {"diffusers", "transformers", "s3dit", "kernels", "weights"}
    assert not [path for path in (ROOT / "tools").glob("*.py") if path.stem in taken]


@pytest.mark.parametrize("module", ["s3dit", "s3dit.cli", "s3dit.request"])
def test_import_is_light(module):
    """`--help` and a refused request answer at once: torch comes when there is something to compute."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
