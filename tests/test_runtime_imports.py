"""The embedded model draws with what is needed alone: every other package is refused, as if it were not installed.

And in a checkout whose links are files, as Git makes them on Windows. A start imports nothing that it can do without.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What pyproject.toml says is needed, and what torch says that it needs.
NEEDED = """
import sys
from importlib.metadata import packages_distributions

NEEDED = {"torch", "torchgen", "functorch", "safetensors", "tokenizers", "numpy", "PIL"}
OF_TORCH = {"filelock", "typing_extensions", "setuptools", "_distutils_hack", "sympy", "mpmath", "networkx", "jinja2",
            "markupsafe", "fsspec", "isympy", "pkg_resources"}
refused = {name for name in packages_distributions() if name not in NEEDED | OF_TORCH | {"s3dit"}}
refused |= {"tqdm", "huggingface_hub", "sentencepiece", "triton", "diffusers", "transformers"}
# So `import` raises ModuleNotFoundError, and find_spec finds nothing.
sys.modules |= dict.fromkeys(refused)
sys.argv = ["s3dit", *sys.argv[1:]]
"""
DRAW = (
    NEEDED
    + """
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise AssertionError(f"the network was asked: {event} {args}")
sys.addaudithook(watch)
from s3dit.__main__ import run
code = run()
assert not [name for name in refused if sys.modules.get(name)], refused
sys.exit(code)
"""
)


def python(code, *words, folder=ROOT, cwd=None, **more):
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"} | more
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=cwd or ROOT, env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_the_needed_packages_draw(tmp_path):
    """Without a network; and standard error says once that there is no bar."""
    picture = tmp_path / "star.png"
    done = python(DRAW, "generate", "a red star", "--steps", "1", "--seed", "1", "-o", picture)
    assert done.returncode == 0 and picture.is_file(), done.stderr
    assert done.stderr.count("no progress bars without the package tqdm; pip install 's3dit[bars]'") == 1


@pytest.mark.slow
def test_what_is_missing_is_named_where_it_is_used(tmp_path):
    """One process: a name of the Hub, a SentencePiece model, the Triton backend."""
    code = (
        NEEDED
        + """
import pathlib
from s3dit import Pipeline, BackendError, CheckpointError
from s3dit.configs.tokenizer_files import open_tokenizer
folder = pathlib.Path(sys.argv[1])
(folder / "tokenizer.model").write_bytes(b"x")
for ask in (
    lambda: Pipeline.load("org/name"), lambda: open_tokenizer(folder),
    lambda: Pipeline.load(device="cpu", backend="triton"),
):
    try:
        ask()
    except (BackendError, CheckpointError) as error:
        print(error)
"""
    )
    done = python(code, tmp_path)
    hub, pieces, triton = done.stdout.splitlines()
    assert "pip install 's3dit[hub]'" in hub and hub.startswith("org/name: no such file or folder here")
    assert "pip install 's3dit[sentencepiece]'" in pieces
    assert "triton" in triton and ("needs a CUDA device" in triton or "pip install 's3dit[gpu]'" in triton)


@pytest.mark.slow
def test_a_checkout_without_links_draws(tmp_path):
    """Git without links writes the target of one into a file."""
    skip = shutil.ignore_patterns("__pycache__")
    for room in ("kernels", "weights"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=skip)
    links = [name for name in ("kernels", "weights") if (ROOT / "s3dit" / name).is_symlink()]
    shutil.copytree(ROOT / "s3dit", tmp_path / "s3dit", ignore=lambda *found: skip(*found) | {*links})
    for name in links:
        (tmp_path / "s3dit" / name).write_text(f"../{name}")
    code = """
import s3dit, s3dit.kernels.rows
pipe = s3dit.Pipeline.load(device="cpu")
size = pipe("a red star", seed=1, num_inference_steps=1).images[0].size
print(*size, s3dit.kernels.rows.__file__, pipe.folder)
"""
    done = python(code, folder=tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows, model = tmp_path / "kernels" / "rows.py", tmp_path / "weights" / "tiny"
    assert done.stdout.split() == ["128", "128", str(rows), str(model.resolve())]


def test_a_start_imports_little():
    """What drawing imports beside torch's own start: a list that grows only on purpose."""
    code = """
import sys, torch
before = set(sys.modules)
import s3dit
pipe = s3dit.Pipeline.load(device="cpu")
pipe("a red star", seed=1, num_inference_steps=1)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
print(*sorted(name for name in set(sys.modules) - before if name.startswith(("torch.", "sympy"))))
"""
    done = python(code)
    packages, of_torch = done.stdout.splitlines()
    assert set(packages.split()) <= {"PIL", "s3dit", "safetensors", "tokenizers", "numpy", "torch"}, packages
    assert not {"torch._dynamo", "torch._inductor", "sympy", "torch._export"} & set(of_torch.split())


def test_a_picture_is_inspected_without_torch(tmp_path):
    from s3dit import Pipeline

    path = tmp_path / "star.png"
    Pipeline.load(device="cpu")("a red star", seed=1, num_inference_steps=1).save(path)
    code = f"""
import sys
from s3dit.__main__ import run
sys.argv = ["s3dit", "inspect", {str(path)!r}]
code = run()
sys.exit(code or "torch" in sys.modules)
"""
    done = python(code)
    assert done.returncode == 0 and "a red star" in done.stdout, done.stderr + done.stdout
