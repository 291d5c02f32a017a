"""At run time neither diffusers nor transformers is ever imported: the embedded model draws without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "weights" / "tiny"

# In a process of its own: other tests of this run may have imported them.
PROGRAM = """
import sys

BLOCKED = {"diffusers", "transformers", "accelerate", "peft", "gguf", "einops"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise AssertionError(f"{name} was imported at run time")


sys.meta_path.insert(0, Blocker())
for name in BLOCKED:
    try:
        __import__(name)
    except AssertionError:
        continue
    sys.exit(f"the blocker let {name} through")

import s3dit

pipe = s3dit.Pipeline.load("embedded", device="cpu")
result = pipe(prompt="a red circle on a white background", num_inference_steps=1, seed=0)
picture = result.images[0]
assert picture.size == (pipe.config.settings.width, pipe.config.settings.height), picture.size
assert len(picture.getcolors(1 << 24)) > 1, "the picture is one flat color"
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
print("drawn")
"""


@pytest.mark.skipif(not EMBEDDED.is_dir(), reason="weights/tiny is not there; train it with tools/train_tiny.py")
def test_embedded_model_draws_without_diffusers_and_transformers():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip() == "drawn", done.stdout + done.stderr
