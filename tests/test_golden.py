"""The embedded model, one seed, stage by stage, against tensors stored beside this file.

    PYTHONPATH=. python tests/test_golden.py      store the tensors anew, and print how far each moved

Tolerance 1e-4 relative: the stored tensors come from one CPU, and other matrix kernels (AVX2, AVX-512, AMX in fp32)
sum in another order, about 1e-6 a stage, which eight steps of a trained flow may amplify tenfold or more.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

STORED = Path(__file__).with_name("golden.safetensors")
PROMPT = "a red star above a blue ring on a white background"


def stages():
    """Stage tensors by name: text features, every step's latents and velocity, the decoded picture (halved)."""
    from s3dit import Pipeline

    pipe = Pipeline.load("embedded", device="cpu", dtype="fp32", residency="resident")
    found = {"text": pipe.encode([PROMPT])[0]}
    steps = list(pipe.stream(prompt=PROMPT, seed=11, num_inference_steps=4))
    for step in steps:
        found[f"velocity {step.i}"] = step.velocity
        found[f"latents {step.i}"] = step.latents[0]
    found["picture"] = torch.nn.functional.avg_pool2d(pipe.decode(steps[-1].latents)[0], 2)
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def found():
    return stages()


@pytest.mark.parametrize("name", sorted(load_file(STORED)) if STORED.exists() else ["nothing is stored"])
def test_stage(found, name):
    assert STORED.exists(), f"{STORED.name} is missing: run this file as a program"
    assert relative(found[name], load_file(STORED)[name]) < 1e-4


def main():
    """Store anew; say what moved."""
    now, before = stages(), load_file(STORED) if STORED.exists() else {}
    for name, tensor in now.items():
        moved = f"moved by {relative(tensor, before[name]):.2e}" if name in before else "new"
        print(f"{name:<12} {tuple(tensor.shape)} {moved}")
    save_file(now, STORED)


if __name__ == "__main__":
    main()
