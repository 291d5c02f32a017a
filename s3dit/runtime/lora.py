"""Attaches adapters to the layers of a model, by official names; rescales, detaches and merges them.

A branch beside a linear layer, plain or quantized, adds strength · the adapter's change, computed from the unrounded x
and in its dtype. The layer's weight is not touched, so a quantized model loses nothing of a small change,
and `detach` puts the very same layer back. Norms and tokens, which are no matrices, are changed in a copy; the original
is kept and put back. Strengths are tensors that branches read at every pass: a new one needs no loading, no compiling
and no recording.

Several adapters stand beside one layer, each measured against the original weight, so their order does not matter.
`merge` writes the change into float weights instead, which cannot be undone.

Order of surgery on a model: swap, assign, stream, then this, then compile. Streamed blocks carry no branches with
them, these stay on the device. Formulas: `weights.delta`; which adapters a pipeline has, and their files: `adapters`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.errors import BackendError
from s3dit.kernels.aligned import aligned
from s3dit.kernels.scheme import QuantizedRows
from s3dit.model.hooks import HOOK_DICTS
from s3dit.model.linear import Linear, QuantLinear
from s3dit.runtime.block_streaming import BlockStreamer, TensorDict, tensors
from s3dit.runtime.file_streaming import FileStreamer
from s3dit.weights.delta import Delta, norms
from s3dit.weights.mapped_file import give_back

# Strengths of every token, (N, 1) fp32, by the number N of tokens that a layer is called with.
TokenStrengths = dict[int, Tensor]


class Branch:
    """The change of one adapter beside one linear layer; `strength` () fp32 is that of its branches of one factor.

    While there are `token_strengths`, which these branches share as well, those are read instead.

    The layer's weight W becomes W' = (1 + rows) · (W + Δ) · (1 + columns), or with `replaces` Δ in the place of W + Δ:
    rows (out,) and columns (in,) are DoRA's gains, one of them or neither. The branch adds strength · (W' - W) x, and
    strength · the adapter's bias.
    """

    def __init__(
        self, delta: Delta, layer: Linear | QuantLinear, strength: Tensor, token_strengths: TokenStrengths,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """dtype: that the model computes in, which the adapter's tensors are cast to."""

        def placed(tensor: Tensor) -> Tensor:
            return aligned(tensor.to(strength.device, dtype).contiguous())

        self.strength, self.token_strengths = strength, token_strengths
        self.layer, self.replaces = layer, delta.replaces
        self.term = None if delta.term is None else delta.term.map(placed)
        self.bias = None if delta.bias is None else placed(delta.bias)
        self.rows = self.columns = None
        if delta.magnitude is not None:
            changed = Delta(delta.term, replaces=delta.replaces).changed(weight_of(layer))
            gain = (delta.magnitude.to(changed) / norms(changed, rows=delta.by_rows()) - 1).flatten()
            # In fp32: near -1, where the change is far larger than the weight, a rounded gain leaves mostly its error.
            gain = gain.to(strength.device).contiguous()
            self.rows, self.columns = (gain, None) if delta.by_rows() else (None, gain)
            # All of the weight was read.
            give_back(*(tensor for *_, tensor in tensors(layer)))

    def __call__(self, y: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """Add the adapter's change to y (…, out), for the layer's input x (…, in) and its own output (…, out)."""
        strength = self.token_strengths[len(x)] if self.token_strengths else self.strength
        if self.bias is not None:
            y = y + (strength * self.bias).to(self.bias.dtype)
        if self.term is None:
            return y
        if self.rows is None and self.columns is None and not self.replaces:
            return self.term.onto(y, x, strength)
        return (y.float() + strength * self._change(x, output.float())).to(y.dtype)

    def _change(self, x: Tensor, output: Tensor) -> Tensor:
        """(W' - W) x in fp32, where it is more than Δ x; what cancels is summed in fp32, and rounded once."""
        assert self.term is not None
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        product = output if bias is None else output - bias.float()  # W x
        # Gains of columns are those of the input's features.
        scaled = x if self.columns is None else (x * (1 + self.columns)).to(x.dtype)
        change = self.term.times(scaled).float()
        if self.replaces:
            change = change - product
        elif self.columns is not None:
            change = change + (self.layer.forward(scaled).float() - output)
        if self.rows is not None:
            change = change + self.rows * (product + change)
        return change


class Adapted(nn.Module):
    """A linear layer with branches of adapters.

    It shares the layer's own dicts of parameters and buffers: names and state dict of the model are what they were, and
    a weight that is moved here is moved there. It shares the dicts of hooks too: a hook that is registered on either
    runs once, after the branches, and remains when they are gone.
    """

    # A branch wants x unrounded.
    input_dtype: torch.dtype | None = None
    layer: Linear | QuantLinear

    def __init__(self, layer: Linear | QuantLinear) -> None:
        super().__init__()
        # Not as a child, whose name would come between.
        self.__dict__["layer"] = layer
        self._parameters, self._buffers = layer._parameters, layer._buffers
        vars(self).update({name: vars(layer)[name] for name in HOOK_DICTS})
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.branches: dict[str, Branch] = {}

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Apply to x (…, in) of any float dtype, or to its QuantizedRows -> (…, out), same dtype."""
        output = y = self.layer.forward(x)  # type: ignore[arg-type]
        unrounded = x.dequantize().to(x.dtype) if isinstance(x, QuantizedRows) else x
        for branch in self.branches.values():
            y = branch(y, unrounded, output)
        return y


@dataclass(slots=True)
class Attached:
    """An adapter that is attached to a model: its strengths () fp32, and its changes of norms and tokens by layer.

    strengths: by the factors of its Deltas, each the adapter's strength times the factor · token_strengths: likewise,
    where tokens have their own.
    """

    strengths: dict[float, Tensor]
    vectors: dict[str, Delta]
    token_strengths: dict[float, TokenStrengths]

    def strength(self, delta: Delta) -> Tensor:
        """The strength of one of its Deltas."""
        return self.strengths[delta.factor]


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the layers that an adapter can change, by official name: (out, in) of a linear one, else its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | QuantLinear | Adapted):
            shapes[name] = (module.out_features, module.in_features)
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                shapes[f"{name}.{leaf}".removeprefix(".").removesuffix(".weight")] = tuple(parameter.shape)
    return shapes


def weight_of(layer: Linear | QuantLinear) -> Tensor:
    """Return the weight of a linear layer, (out, in) of a float dtype, decoded where it is quantized."""
    if isinstance(layer, Linear):
        return layer.weight
    return layer.scheme.decode({name: tensor for name, tensor in layer._buffers.items() if tensor is not None})


class Attachments:
    """The adapters that are attached to one model; a part of a pipeline owns them beside its module."""

    def __init__(self, model: nn.Module, streamer: BlockStreamer | FileStreamer | None = None) -> None:
        """streamer: that of the model's blocks, if they are streamed."""
        self._model, self._streamer = model, streamer
        self._attached: dict[str, Attached] = {}
        # Norms and tokens by layer, of which the model has changed copies meanwhile.
        self._originals: dict[str, nn.Parameter] = {}

    def __len__(self) -> int:
        return len(self._attached)

    @torch.no_grad()
    def attach(
        self, name: str, deltas: Mapping[str, Delta], scale: float, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        """Attach an adapter that fits the model's layers; layers without weights, which never compute, are left out.

        name: to speak of it later · scale: its strength · device, dtype: those that the model computes on and in.
        Raises BackendError where the name is taken.
        """
        if name in self._attached:
            kind = type(self._model).__name__
            raise BackendError(f"{kind} has an adapter {name!r} already; detach it, or give another name")
        factors = {delta.factor for delta in deltas.values()}
        strengths = {
            factor: torch.tensor(scale * factor, dtype=torch.float32, device=device) for factor in sorted(factors)
        }
        self._attached[name] = attached = Attached(strengths, {}, {factor: {} for factor in strengths})
        for layer, delta in deltas.items():
            module = _module(self._model, layer)
            if module is None:
                owner, leaf = _parameter(self._model, layer)
                if not owner[leaf].is_meta:
                    attached.vectors[layer] = delta
                    self._revise(layer)
            elif not _blank(module):
                if not isinstance(module, Adapted):
                    module = _replace(self._model, layer, Adapted(module))
                module.branches[name] = Branch(
                    delta, module.layer, attached.strength(delta), attached.token_strengths[delta.factor], dtype
                )  # fmt: skip

    @torch.no_grad()
    def detach(self, name: str) -> None:
        """Remove an adapter; with the last one, every layer and parameter is the object that it was."""
        for layer in self._attached.pop(name).vectors:
            self._revise(layer)
        adapted = {name: module for name, module in self._model.named_modules() if isinstance(module, Adapted)}
        for layer, module in adapted.items():
            module.branches.pop(name, None)
            if not module.branches:
                _replace(self._model, layer, module.layer)

    @torch.no_grad()
    def rescale(self, name: str, scale: float) -> None:
        """Set the strength of an attached adapter, from the next pass on."""
        attached = self._attached[name]
        for factor, strength in attached.strengths.items():
            strength.fill_(scale * factor)
        for layer in attached.vectors:
            self._revise(layer)

    def has_vectors(self, name: str) -> bool:
        """Whether an attached adapter changes norms or tokens, which have one strength for all that is computed."""
        return bool(self._attached[name].vectors)

    @contextmanager
    def by_token(self, scales: Mapping[str, Sequence[float]], lengths: Sequence[Sequence[int]]) -> Iterator[None]:
        """Inside the `with` runs of tokens have strengths of their own.

        scales: by adapter, one a run · lengths: of all runs, for every number of tokens that layers are called with;
        a call with another number raises KeyError.
        """
        try:
            for name, runs in scales.items():
                for factor, tokens in self._attached[name].token_strengths.items():
                    strength = self._attached[name].strengths[factor]
                    own = torch.tensor([scale * factor for scale in runs], dtype=torch.float32)
                    for counts in lengths:
                        each = own.repeat_interleave(torch.tensor(counts))[:, None]
                        tokens[len(each)] = each.to(strength.device)
            yield
        finally:
            for name in scales:
                for tokens in self._attached[name].token_strengths.values():
                    tokens.clear()

    def strip(self) -> None:
        """Remove all adapters."""
        for name in list(self._attached):
            self.detach(name)

    def copies(self) -> list[tuple[TensorDict, str]]:
        """Return the places of parameters that are changed copies: the dict of each, and its name there."""
        return [_parameter(self._model, layer) for layer in self._originals]

    def _revise(self, layer: str) -> None:
        """Compute a norm or token of its original and the changes of all attached adapters."""
        owner, leaf = _parameter(self._model, layer)
        changes = [(adapter, delta) for adapter in self._attached.values() if (delta := adapter.vectors.get(layer))]
        if not changes:
            owner[leaf] = self._originals.pop(layer)
            return
        original = self._originals.setdefault(layer, owner[leaf])
        value = upcast = original.float()
        for adapter, delta in changes:
            value = value + adapter.strength(delta).to(upcast.device) * (delta.changed(original) - upcast)
        if owner[leaf] is original:
            dtype = original.dtype if self._streamer is None else self._streamer.compute_dtype(owner, leaf)
            owner[leaf] = _parameter_of(original.clone(), dtype)
        # In place, so that what was recorded or compiled reads it.
        owner[leaf].copy_(value)


def check_merge(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Raise the BackendError that `merge` would raise; the model may be on the meta device."""
    for layer, delta in deltas.items():
        module = _module(model, layer)
        if isinstance(module, QuantLinear):
            raise BackendError(
                f"{layer} is {module.scheme.name}: rounding would eat most of a merged change; leave the adapter "
                "beside it (attach), or merge into the unquantized model"
            )
        if module is not None and module.bias is None and delta.bias is not None:
            raise BackendError(f"{layer} has no bias to merge one into; leave the adapter beside it (attach)")
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise BackendError(f"{type(model).__name__} has adapters attached; merge first, then attach")


@torch.no_grad()
def merge(model: nn.Module, deltas: Mapping[str, Delta], scale: float, dtype: torch.dtype | None = None) -> None:
    """Write an adapter's changes into the float weights of a model, for good.

    Raises BackendError where a layer is quantized, before any change. scale: its strength · dtype: of the weights that
    are changed, None keeps theirs.
    """
    check_merge(model, deltas)
    for layer, delta in deltas.items():
        module = _module(model, layer)
        owner, leaf = _parameter(model, layer) if module is None else (module._parameters, "weight")
        weight = owner[leaf]
        if weight.is_meta:
            continue
        strength = scale * delta.factor
        changed = torch.lerp(weight.float(), delta.changed(weight), strength)
        owner[leaf] = _parameter_of(changed, dtype or weight.dtype)
        if delta.bias is not None and module is not None and module.bias is not None:
            added = module.bias.float() + strength * delta.bias.to(module.bias.device, torch.float32)
            owner["bias"] = _parameter_of(added, dtype or module.bias.dtype)


def _parameter_of(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without gradient of a tensor's values, in a dtype."""
    return nn.Parameter(tensor.to(dtype), requires_grad=False)


def _module(model: nn.Module, layer: str) -> Any:
    """The linear layer of a name, None where the name is another module's or a parameter's."""
    parent, _, leaf = layer.rpartition(".")
    module = model.get_submodule(parent)._modules.get(leaf)
    return module if isinstance(module, Linear | QuantLinear | Adapted) else None


def _parameter(model: nn.Module, layer: str) -> tuple[TensorDict, str]:
    """The dict that holds the parameter of a norm or a token, and its name there."""
    parent, _, leaf = layer.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        return module._parameters, leaf
    return module._modules[leaf]._parameters, "weight"  # type: ignore[union-attr]


def _blank(module: nn.Module) -> bool:
    """Whether a module has tensors on the meta device."""
    held = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and tensor.is_meta for tensor in held)


def _replace(model: nn.Module, layer: str, module: Any) -> Any:
    """Let another module stand in a layer's place, hooks included; returns it."""
    parent, _, leaf = layer.rpartition(".")
    siblings = model.get_submodule(parent)._modules
    module._is_full_backward_hook = siblings[leaf]._is_full_backward_hook  # type: ignore[union-attr]
    siblings[leaf] = module
    return module
