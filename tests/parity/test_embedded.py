"""diffusers' own pipeline loads the embedded model and draws the same pictures."""

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install 's3dit[test]'")

from s3dit.pipeline import Pipeline  # noqa: E402
from s3dit.runtime.embedded import EMBEDDED  # noqa: E402

PROMPTS = [
    "a red circle on a white background",
    "a blue square left of a green triangle on a yellow background",
    "",
]


@pytest.fixture(scope="module")
def theirs():
    pipe = diffusers.ZImagePipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.sampled(1)
def test_the_same_picture(theirs, prompt):
    """8-bit pixels of fp32 runs: rounding may fall to either side, so 1 of 255 and no more."""
    options = {"height": 128, "width": 128, "num_inference_steps": 8, "guidance_scale": 0.0}
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    expected = theirs(prompt, latents=noise.clone(), output_type="np", **options).images[0]
    found = Pipeline.load(dtype="fp32")(prompt=prompt, latents=noise, **options).images[0]
    difference = np.abs(np.asarray(found, dtype=np.int16) - np.round(expected * 255).astype(np.int16))
    assert difference.max() <= 1
