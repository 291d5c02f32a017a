"""The layers that are known by a configuration alone are those of the modules."""

from dataclasses import replace

import pytest

from s3dit.configs.infer_config import TEXT_ENCODER, TRANSFORMER, VAE
from s3dit.configs.layer_shapes import layer_shapes
from s3dit.model.meta import on_meta
from s3dit.model.part_specs import SPECS
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model

TINY = read_model(EMBEDDED)
CONFIGS = [
    *(("transformer", config) for config in (TRANSFORMER, TINY.transformer)),
    ("transformer", replace(TINY.transformer, siglip_feat_dim=48, target_timestep=True, n_refiner_layers=1)),
    *(("text_encoder", config) for config in (TEXT_ENCODER, TINY.text_encoder)),
    *(("vae", config) for config in (VAE, TINY.vae, replace(TINY.vae, layers_per_block=1))),
]


@pytest.mark.parametrize(("part", "config"), CONFIGS)
def test_layers_are_those_of_the_module(part, config):
    with on_meta():
        module = SPECS[part].module(config)
    shapes = {}
    for name, parameter in module.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "bias":
            shapes[layer or leaf] = tuple(parameter.shape)
    assert layer_shapes(config) == shapes
