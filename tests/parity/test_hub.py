"""What diffusers leaves in the shared cache loads here without a network, and what is fetched here loads there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from s3dit.runtime.embedded import EMBEDDED

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "weights"))
from hub_server import Hub  # noqa: E402

# The embedded model as the official repository holds it: its own files, and what an engine does not read.
FILES = {file.relative_to(EMBEDDED).as_posix(): file.read_bytes() for file in EMBEDDED.rglob("*") if file.is_file()}
OFFICIAL = {name: data for name, data in FILES.items() if name != "s3dit.json"} | {
    "README.md": b"# x", ".gitattributes": b"", "assets/x.jpg": b"x", "text_encoder/generation_config.json": b"{}",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"x",
}  # fmt: skip
THEIRS = 'from diffusers import ZImagePipeline; ZImagePipeline.download("org/name")'
OURS = """
from s3dit import Pipeline
pipe = Pipeline.load("org/name", dtype="fp32")
pipe(prompt="a red star", height=64, width=64, num_inference_steps=2)
"""


def run(code, **settings):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"} | settings
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.slow
def test_what_diffusers_fetched_loads_here_offline(tmp_path):
    with Hub() as hub:
        hub.repositories["org/name"] = OFFICIAL
        run(THEIRS, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
        hub.asked.clear()
        run(OURS, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
        assert not hub.asked


@pytest.mark.slow
def test_what_was_fetched_here_is_not_fetched_again_by_diffusers(tmp_path):
    """diffusers wants more files than are read here, and asks for those only."""
    with Hub() as hub:
        hub.repositories["org/name"] = OFFICIAL
        run(OURS, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
        ours = set(hub.files())
        assert "vae/diffusion_pytorch_model.safetensors" in ours and "tokenizer/vocab.json" not in ours
        assert not any("fp16" in name or "assets" in name for name in ours)
        hub.asked.clear()
        run(THEIRS, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
        # It reads the small index anew each time, to know the pipeline's class.
        assert not (set(hub.files()) - {"model_index.json"}) & ours
