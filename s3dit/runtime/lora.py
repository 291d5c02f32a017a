"""Adapters on a model, from outside and by official names: attach, rescale, detach, merge.

Beside a linear layer, plain or quantized, stands a branch: y + strength · what the adapter adds, computed from the
unrounded x and in its dtype. The layer's weight is not touched, so a quantized model loses nothing of a small change,
and `detach` puts the very same layer back. Norms and tokens, which are no matrices, are changed in a copy; the original
waits and comes back. Strengths are tensors that branches read at every pass: a new one needs no loading, no compiling
and no recording.

Several adapters stand beside one layer, each measured against the original weight, so their order does not matter.
`merge` is for who wants none of that: it writes the change into float weights, for good.

Order of surgery on a model: swap, assign, stream, then this, then compile. Streamed blocks carry no branches with
them, these stay on the device. Formulas: `weights.delta`; which adapters a pipeline has, and their files: `adapters`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.errors import BackendError
from s3dit.kernels.aligned import aligned
from s3dit.kernels.scheme import QuantizedRows
from s3dit.model.hooks import HOOK_DICTS
from s3dit.model.linear import Linear, QuantLinear
from s3dit.runtime.block_streaming import BlockStreamer, TensorDict
from s3dit.weights.delta import Delta, norms


class Branch:
    """What one adapter adds beside one linear layer; `strength` () fp32 is shared by all branches of the adapter."""

    def __init__(self, delta: Delta, layer: Linear | QuantLinear, strength: Tensor, dtype: torch.dtype) -> None:
        def placed(tensor: Tensor) -> Tensor:
            return aligned(tensor.to(strength.device, dtype).contiguous())

        self.strength, self.layer, self.replaces = strength, layer, delta.replaces
        self.term = None if delta.term is None else delta.term.map(placed)
        self.bias = None if delta.bias is None else placed(delta.bias)
        # How much more than 1 the norms of DoRA make of each row or column.
        self.rows = self.columns = None
        if delta.magnitude is not None:
            whole = Delta(delta.term, replaces=delta.replaces).changed(weight_of(layer))
            gain = (delta.magnitude.to(whole) / norms(whole, rows=delta.by_rows()) - 1).flatten()
            # In fp32: near -1, where the change is far larger than the weight, a rounded gain leaves mostly its error.
            gain = gain.to(strength.device).contiguous()
            self.rows, self.columns = (gain, None) if delta.by_rows() else (None, gain)

    def __call__(self, y: Tensor, x: Tensor, plain: Tensor) -> Tensor:
        """y (…, out), and beside it what the adapter makes of x (…, in); plain: the layer's own answer to x."""
        if self.bias is not None:
            y = y + self.strength * self.bias
        if self.term is None:
            return y
        if self.rows is None and self.columns is None and not self.replaces:
            return self.term.onto(y, x, self.strength)
        # Columns of a weight are grown on the side of x. What cancels is summed in fp32, and rounded once.
        grown = x if self.columns is None else (x * (1 + self.columns)).to(x.dtype)
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        wide = plain.float()
        product = wide if bias is None else wide - bias.float()
        added = self.term.times(grown).float()
        if self.replaces:
            added = added - product
        elif self.columns is not None:
            added = added + (self.layer.forward(grown).float() - wide)
        if self.rows is not None:
            added = added + self.rows * (product + added)
        return (y.float() + self.strength * added).to(y.dtype)


class Adapted(nn.Module):
    """A linear layer and the branches beside it.

    The layer's parameters and buffers hang here too, on the layer's own shelves: names and state dict of the model are
    what they were, and who moves a weight moves the layer's. So do hooks: one that was put on either runs once, after
    the branches, and is still there when they are gone.
    """

    # A branch wants x unrounded.
    input_dtype: torch.dtype | None = None
    layer: Linear | QuantLinear

    def __init__(self, layer: Linear | QuantLinear) -> None:
        super().__init__()
        # Not as a child, whose name would come between.
        self.__dict__["layer"] = layer
        self._parameters, self._buffers = layer._parameters, layer._buffers
        vars(self).update({shelf: vars(layer)[shelf] for shelf in HOOK_DICTS})
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.branches: dict[str, Branch] = {}

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Apply to x (…, in) of any float dtype, or to its Rows -> (…, out), same dtype."""
        plain = y = self.layer.forward(x)  # type: ignore[arg-type]
        wide = x.dequantize().to(x.dtype) if isinstance(x, QuantizedRows) else x
        for branch in self.branches.values():
            y = branch(y, wide, plain)
        return y


@dataclass(slots=True)
class Attached:
    """One adapter on a model: its strength as branches read it, and what it does to norms and tokens."""

    strength: Tensor
    vectors: dict[str, Delta]


def homes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every layer that an adapter can change, by official name: (out, in) of linear ones, else a parameter's shape."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | QuantLinear | Adapted):
            found[name] = (module.out_features, module.in_features)
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found[f"{name}.{leaf}".removeprefix(".").removesuffix(".weight")] = tuple(parameter.shape)
    return found


def weight_of(layer: Linear | QuantLinear) -> Tensor:
    """The weight of a linear layer, (out, in) of a float dtype, decoded where it is quantized."""
    if isinstance(layer, Linear):
        return layer.weight
    return layer.scheme.decode({name: part for name, part in layer._buffers.items() if part is not None})


class Attachments:
    """The adapters attached to one model: what a part of a pipeline owns beside its module.

    streamer: what carries the model's blocks, if they are streamed. `originals` are the parameters that copies stand
    for.
    """

    def __init__(self, model: nn.Module, streamer: BlockStreamer | None = None) -> None:
        self._model, self._streamer = model, streamer
        self._attached: dict[str, Attached] = {}
        self._originals: dict[str, nn.Parameter] = {}

    def __len__(self) -> int:
        return len(self._attached)

    @torch.no_grad()
    def attach(
        self, name: str, deltas: Mapping[str, Delta], scale: float, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        """Put an adapter that fits beside the model's layers; layers without weights, which never compute, are passed.

        device, dtype: where the model computes, and in what. Raises BackendError where the name is taken.
        """
        if name in self._attached:
            kind = type(self._model).__name__
            raise BackendError(f"{kind} has an adapter {name!r} already; detach it, or give another name")
        strength = torch.tensor(float(scale), dtype=torch.float32, device=device)
        self._attached[name] = attached = Attached(strength, {})
        for layer, delta in deltas.items():
            module = _module(self._model, layer)
            if module is None:
                shelf, leaf = _parameter(self._model, layer)
                if not shelf[leaf].is_meta:
                    attached.vectors[layer] = delta
                    self._revise(layer)
            elif not _blank(module):
                if not isinstance(module, Adapted):
                    module = _replace(self._model, layer, Adapted(module))
                module.branches[name] = Branch(delta, module.layer, strength, dtype)

    @torch.no_grad()
    def detach(self, name: str) -> None:
        """Take an adapter off again: with the last one, every layer and parameter is the object that it was."""
        for layer in self._attached.pop(name).vectors:
            self._revise(layer)
        adapted = [(layer, one) for layer, one in self._model.named_modules() if isinstance(one, Adapted)]
        for layer, module in adapted:
            module.branches.pop(name, None)
            if not module.branches:
                _replace(self._model, layer, module.layer)

    @torch.no_grad()
    def rescale(self, name: str, scale: float) -> None:
        """Give an attached adapter another strength, in force from the next pass on."""
        attached = self._attached[name]
        attached.strength.fill_(scale)
        for layer in attached.vectors:
            self._revise(layer)

    def strip(self) -> None:
        """Take all adapters off."""
        for name in list(self._attached):
            self.detach(name)

    def copies(self) -> list[tuple[TensorDict, str]]:
        """Where copies stand for parameters that adapters have changed."""
        return [_parameter(self._model, layer) for layer in self._originals]

    def _revise(self, layer: str) -> None:
        """Make a norm or token what its original and all attached adapters say."""
        shelf, leaf = _parameter(self._model, layer)
        found = [(one.strength, one.vectors[layer]) for one in self._attached.values() if layer in one.vectors]
        if not found:
            shelf[leaf] = self._originals.pop(layer)
            return
        original = self._originals.setdefault(layer, shelf[leaf])
        value = wide = original.float()
        for strength, delta in found:
            value = value + strength.to(wide.device) * (delta.changed(original) - wide)
        if shelf[leaf] is original:
            dtype = original.dtype if self._streamer is None else self._streamer.compute_dtype(shelf, leaf)
            shelf[leaf] = _parameter_of(original.clone(), dtype)
        # In place, so that what was recorded or compiled reads it.
        shelf[leaf].copy_(value)


def check_merge(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Raise the BackendError that `merge` would raise; a model on the meta device will do."""
    for layer, delta in deltas.items():
        home = _module(model, layer)
        if isinstance(home, QuantLinear):
            raise BackendError(
                f"{layer} is {home.scheme.name}: rounding would eat most of a merged change; leave the adapter beside "
                "it (attach), or merge into the unquantized model"
            )
        if home is not None and home.bias is None and delta.bias is not None:
            raise BackendError(f"{layer} has no bias to merge one into; leave the adapter beside it (attach)")
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise BackendError(f"{type(model).__name__} has adapters attached; merge first, then attach")


@torch.no_grad()
def merge(model: nn.Module, deltas: Mapping[str, Delta], scale: float, dtype: torch.dtype | None = None) -> None:
    """Write an adapter into the float weights of a model; BackendError where one is quantized, before any change.

    dtype: of the weights that were changed, None keeps theirs.
    """
    check_merge(model, deltas)
    for layer, delta in deltas.items():
        home = _module(model, layer)
        shelf, leaf = _parameter(model, layer) if home is None else (home._parameters, "weight")
        weight = shelf[leaf]
        if weight.is_meta:
            continue
        wide = weight.float()
        changed = torch.lerp(wide, delta.changed(weight), scale)
        shelf[leaf] = _parameter_of(changed, dtype or weight.dtype)
        if delta.bias is not None and home is not None and home.bias is not None:
            added = home.bias.float() + scale * delta.bias.to(home.bias.device, torch.float32)
            shelf["bias"] = _parameter_of(added, dtype or home.bias.dtype)


def _parameter_of(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.to(dtype), requires_grad=False)


def _module(model: nn.Module, layer: str) -> Any:
    """The linear layer of a name, None where that is something else's."""
    parent, _, leaf = layer.rpartition(".")
    found = model.get_submodule(parent)._modules.get(leaf)
    return found if isinstance(found, Linear | QuantLinear | Adapted) else None


def _parameter(model: nn.Module, layer: str) -> tuple[TensorDict, str]:
    """Where the parameter of a norm or a token hangs."""
    parent, _, leaf = layer.rpartition(".")
    home = model.get_submodule(parent)
    return (home._parameters, leaf) if leaf in home._parameters else (home._modules[leaf]._parameters, "weight")  # type: ignore[union-attr]


def _blank(home: nn.Module) -> bool:
    return any(
        tensor is not None and tensor.is_meta for tensor in (*home._parameters.values(), *home._buffers.values())
    )


def _replace(model: nn.Module, layer: str, module: Any) -> Any:
    """Let another module stand in a layer's place, hooks included; returns it."""
    parent, _, leaf = layer.rpartition(".")
    siblings = model.get_submodule(parent)._modules
    module._is_full_backward_hook = siblings[leaf]._is_full_backward_hook  # type: ignore[union-attr]
    siblings[leaf] = module
    return module
