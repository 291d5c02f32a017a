"""The linear layer of every model here: computes in the dtype of its input, whatever dtype its weight is kept in.

On one machine, with one version of torch and one number of threads, the same numbers give the same bits from any file
and in any residency (`kernels.float_linear`); compiled blocks keep that only where weights are aligned anyway.

`swap` lets layers of a model on the meta device be of a number format (`kernels.scheme`); `weights.assign` then fills
them from a quantized file as it lies, or from float weights, which it encodes on the way in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3dit.errors import BackendError
from s3dit.kernels.float_linear import float_linear
from s3dit.kernels.scheme import QuantizedRows, Scheme
from s3dit.kernels.schemes import linear
from s3dit.kernels.swiglu import swiglu
from s3dit.kernels.swiglu_linear import FUSED, swiglu_linear
from s3dit.model.hooks import hooked
from s3dit.model.meta import on_meta

# Kinds of devices on which layers whose weights lie end to end are one product. Not a CPU: weights in a mapped file may
# do so by chance, and a wider product may round in another way.
JOINED_ON = ("cuda",)


class Linear(nn.Linear):
    """Linear layer `x (…, in) @ weight (out, in).T + bias` in the dtype of x; the weight may be of a narrower one."""

    # What a quantized layer takes its input in, where its maker rounds it (`QuantLinear.input_dtype`).
    input_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (…, in) of any float dtype -> (…, out), same dtype."""
        return float_linear(x, self.weight, self.bias)


class QuantLinear(nn.Module):
    """A linear layer whose weight is kept in a number format: buffers named as the scheme's `spec` names its tensors.

    `input_dtype` is the 8-bit dtype that x may be handed over in (`QuantizedRows`), None where it must be of floats.
    """

    def __init__(self, scheme: Scheme, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.scheme, self.input_dtype = scheme, scheme.activation
        self.in_features, self.out_features = in_features, out_features
        for name, (shape, dtype) in scheme.spec(out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Apply to x (…, in) of any float dtype, or to its QuantizedRows -> (…, out), same dtype."""
        # The dictionary of buffers is in the order of spec, and the live one: a buffer that was moved is the one used.
        return linear(x, self.scheme, self._buffers, self.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Return the sizes and the format, for `repr` of the module."""
        return f"{self.in_features}, {self.out_features}, {self.scheme.name}, bias={self.bias is not None}"


def joint(x: Tensor | QuantizedRows, layers: Sequence[Any]) -> list[Tensor]:
    """Apply layers to one x (…, in) -> their outputs (…, out): of one product where their weights lie end to end.

    Those are then views of its result. Weights are put end to end on a GPU by `runtime.joining`; what has a bias, hooks
    or adapters is applied by itself.
    """
    for count in range(len(layers), 1, -1):
        if (parts := _joined(x, layers[:count])) is not None:
            scheme = getattr(layers[0], "scheme", None)
            product = F.linear(x, *parts.values()) if scheme is None else linear(x, scheme, parts)  # type: ignore[arg-type]
            widths = [layer.out_features for layer in layers[:count]]
            return [*product.split(widths, dim=-1), *joint(x, layers[count:])]
    return [layers[0](x), *joint(x, layers[1:])] if layers else []


def _joined(x: Tensor | QuantizedRows, layers: Sequence[Any]) -> dict[str, Tensor] | None:
    """The tensors of some layers with the rows of all, by name; None where they cannot be multiplied by together."""
    kind = kind_of(layers[0])
    if x.device.type not in JOINED_ON or torch.compiler.is_compiling() or kind is None or hooked(*layers):
        return None
    if any(kind_of(layer) != kind for layer in layers):
        return None
    held = [tensors_of(layer) for layer in layers]
    if isinstance(layers[0], Linear) and layers[0].weight.dtype != x.dtype:
        return None
    whole = {name: end_to_end([tensors[name] for tensors in held]) for name in held[0]}
    return None if any(rows is None for rows in whole.values()) else whole  # type: ignore[return-value]


def kind_of(layer: Any) -> object:
    """Return what must be equal of layers that are multiplied by together; None of one that is applied by itself."""
    plain = type(layer) in (Linear, QuantLinear) and layer.bias is None and "forward" not in vars(layer)
    return (getattr(layer, "scheme", Linear), layer.in_features) if plain else None


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a layer by name."""
    held = (*layer._parameters.items(), *layer._buffers.items())
    return {name: tensor for name, tensor in held if tensor is not None}


def end_to_end(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the rows of tensors that lie end to end in one memory as a view of it, without gradient; else None."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage()._cdata == first.untyped_storage()._cdata and tensor.storage_offset() == end
        if not same or tensor.requires_grad or not tensor.is_contiguous() or tensor.dtype != first.dtype:
            return None
        end += tensor.numel()
    if any(tensor.shape[1:] != first.shape[1:] for tensor in tensors):
        return None
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def swiglu_layers(
    gate: nn.Module, up: nn.Module, x: Tensor | QuantizedRows, input_dtype: torch.dtype | None
) -> Tensor | QuantizedRows:
    """Compute silu(gate(x)) · up(x), in one Op for two layers of a format that has it, which have no hooks.

    x (…, in) · input_dtype: None, or int8 or e4m3 to round the rows for the next layer -> (…, out), as `swiglu`.
    """
    alike = kind_of(gate) is not None and kind_of(gate) == kind_of(up) and not hooked(gate, up)
    if alike and isinstance(gate, QuantLinear) and gate.scheme in FUSED:
        return swiglu_linear(x, gate.scheme, gate._buffers, up._buffers, input_dtype)  # type: ignore[arg-type]
    first, second = joint(x, (gate, up))
    return swiglu(first, second, input_dtype)


def swap(model: nn.Module, scheme: Scheme, where: Callable[[str], bool]) -> None:
    """Replace every Linear of a model on the meta device whose official name satisfies `where` by a QuantLinear.

    Raises BackendError, with names, for widths that the scheme cannot take, for layers that hold weights already, and
    where no name satisfies `where`: a typing error would otherwise leave the model as it was.
    """
    names = [name for name, module in model.named_modules() if type(module) is Linear and where(name)]
    if not names:
        raise BackendError(f"{scheme.name}: no linear layer of {type(model).__name__} is meant to be quantized")
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear)
        if not layer.weight.is_meta:
            raise BackendError(f"{name} is filled already; needed a model without weights: swap first, then assign")
        try:
            with on_meta():
                quantized = QuantLinear(scheme, layer.in_features, layer.out_features, layer.bias is not None)
        except ValueError as error:
            raise BackendError(f"{name}: {error}") from None
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantized)
