"""The autoencoder has the official file's 244 names and shapes, and so loads it without a rename."""

import hashlib

import torch

from s3dit.config import VAEConfig
from s3dit.vae import Autoencoder

OFFICIAL = VAEConfig(3, 3, 16, (128, 256, 512, 512), 2, 32, 0.3611, 0.1159)

# md5 over "name:shape" and "name" of every tensor, sorted; recorded from the published file by DiffSynth-Studio.
PUBLISHED = "1aafa3cc91716fb6b300cc1cd51b85a3"


def test_names_and_shapes_are_those_of_the_published_file():
    with torch.device("meta"):
        state = Autoencoder(OFFICIAL).state_dict()
    lines = [line for k, v in state.items() for line in (f"{k}:{'_'.join(map(str, v.shape))}", k)]
    assert len(state) == 244
    assert sum(v.numel() for v in state.values()) == 83_819_683
    assert hashlib.md5(",".join(sorted(lines)).encode()).hexdigest() == PUBLISHED
