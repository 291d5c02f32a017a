"""Modules that are made to be read into: the same parameters as any, on the meta device, and nothing is computed."""

import torch
from torch import nn

from s3dit.model.meta import on_meta


def make():
    return nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 6, 3), nn.LayerNorm(5), nn.Embedding(7, 2), nn.GroupNorm(2, 4))


def test_parameters_are_those_of_any_module():
    with on_meta():
        module = make()
    for name, tensor in make().state_dict().items():
        made = module.state_dict()[name]
        assert made.is_meta and made.shape == tensor.shape and made.dtype == tensor.dtype
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_nothing_is_initialized_inside_and_everything_after(monkeypatch):
    calls = []
    kept = torch.Tensor.uniform_
    monkeypatch.setattr(
        torch.Tensor, "uniform_", lambda self, *args, **more: calls.append(1) or kept(self, *args, **more)
    )
    with on_meta():
        make()
    assert not calls
    torch.manual_seed(0)
    assert make()[0].weight.std() > 0 and calls
