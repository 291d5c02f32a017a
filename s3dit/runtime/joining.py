"""Puts the weights that are multiplied with one input end to end in memory, so that a GPU takes one launch for them.

A module says which of its layers read the same input (`joinable`), such as the projections to queries, keys and values.
Names and shapes stay what they are: each layer has tensors of its own, which are rows of a larger one, with a version
counter of their own. So whoever reads, changes or replaces one does so as ever; `model.linear.joint`, which multiplies,
looks where they lie. A state dict that is saved with `torch.save` holds the larger tensors.
"""

from itertools import groupby

import torch
from torch import Tensor, nn

from s3dit.model.linear import QuantLinear, kind_of, tensors_of


def join(model: nn.Module) -> None:
    """Put the weights of a model's joinable layers end to end, in place.

    Layers that stand beside each other and have one number format are joined, if all its tensors are made of rows, one
    or more for an output channel. Takes memory for a second copy of one group at a time.
    """
    for module in model.modules():
        for names in getattr(module, "joinable", ()):
            for kind, group in groupby((module.get_submodule(name) for name in names), kind_of):
                layers = list(group)
                if kind is not None and len(layers) > 1 and _of_rows(layers):
                    _join(layers)


def _of_rows(layers: list[nn.Module]) -> bool:
    """Whether the tensors of layers, one below another, are those of a single layer with the outputs of all."""
    held = [tensors_of(layer) for layer in layers]
    if any(tensor.is_meta or not tensor.is_contiguous() for tensors in held for tensor in tensors.values()):
        return False
    first = layers[0]
    if not isinstance(first, QuantLinear):
        return len({tensors["weight"].dtype for tensors in held}) == 1
    spec = first.scheme.spec(sum(layer.out_features for layer in layers), first.in_features)  # type: ignore[misc]
    shapes = {name: [tensors[name].shape for tensors in held] for name in held[0]}
    below = {name: (sum(shape[0] for shape in of), *of[0][1:]) for name, of in shapes.items() if of[0]}
    return below == {name: shape for name, (shape, _) in spec.items()}


def _join(layers: list[nn.Module]) -> None:
    """Let the tensors of some layers be rows of larger ones."""
    for name in tensors_of(layers[0]):
        parts = [tensors_of(layer)[name] for layer in layers]
        rows = torch.cat([part.detach() for part in parts]).split([len(part) for part in parts])
        for layer, part, own in zip(layers, parts, rows, strict=True):
            _place(layer, name, part, own.data)


def _place(layer: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
    """Put a tensor in the place of another of a layer, a parameter for a parameter."""
    parameter = isinstance(old, nn.Parameter)
    setattr(layer, name, nn.Parameter(new, old.requires_grad) if parameter else new)
