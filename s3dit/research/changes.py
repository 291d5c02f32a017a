"""Changes of one block or module of the transformer: dropped, repeated, or quantized, for as long as a `with` lasts.

    with changed(pipe, "layers.3.attention", "drop"): …
    with changed(pipe, "layers.3", "int8"): …

| change | of a block | of its attention or feed_forward | of a linear layer |
|---|---|---|---|
| drop | gives what it was given | adds nothing to the stream | gives zeros, but for adapters |
| repeat | runs twice, the second time on its output | acts twice | |
| a number format | its layers as `Pipeline.load(quantize=…)` has them | likewise | in just this format |

A module is given another `forward`, which quantizes a weight when it first runs, as it is in memory then. So residency,
adapters, control and guidance work as ever, and what is loaded stays as it is; a layer that is quantized already is
decoded first. Compiled models are refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.errors import RequestError
from s3dit.kernels.scheme import QuantizedTensors, Scheme
from s3dit.kernels.schemes import SCHEMES, linear
from s3dit.loaded_model import LoadedModel
from s3dit.model.linear import Linear, QuantLinear
from s3dit.model.transformer import Attention, Block, FeedForward
from s3dit.research.instrument import attached
from s3dit.research.sites import STACKS, nearest
from s3dit.research.trace import pattern_regex
from s3dit.runtime.lora import Adapted, weight_of
from s3dit.weights.quantize import quantizable_layers

LINEAR = (Linear, QuantLinear, Adapted)
CHANGES = ("drop", "repeat", *SCHEMES)
Forward = Callable[..., Any]


def modules(pipe: LoadedModel, patterns: str | Sequence[str]) -> list[str]:
    """Return the names of the blocks, their attention, feed_forward and linear layers that match any of the patterns.

    Raises RequestError for a pattern that matches none, naming the nearest.
    """
    root = pipe.parts.component("transformer").module
    kinds = (Block, Attention, FeedForward, *LINEAR)
    names = [
        name for name, module in root.named_modules() if isinstance(module, kinds) and name.split(".")[0] in STACKS
    ]
    chosen = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matching = {name for name in names if pattern_regex(pattern).fullmatch(name)}
        if not matching:
            raise RequestError(
                f"module {pattern!r} matches none of this model's {len(names)}; needed a block, its attention, "
                f"feed_forward or a linear layer; the nearest are {', '.join(nearest(pattern, names))}"
            )
        chosen |= matching
    return [name for name in names if name in chosen]


def why_not(pipe: LoadedModel, name: str, change: str) -> str:
    """Return why a module cannot be changed in this way, as a clause for messages; empty where it can."""
    module = pipe.parts.component("transformer").module.get_submodule(name)
    if change == "repeat":
        return "" if isinstance(module, Block | Attention | FeedForward) else "a linear layer is not repeated"
    if change == "drop":
        return ""
    for layer, scheme in (found := _layers(pipe, name, SCHEMES[change])).items():
        own = _layer(pipe, layer)
        try:
            scheme.spec(own.out_features, own.in_features)
        except ValueError as error:
            return f"{layer}: {error}"
    return "" if found else "no layer of it is quantized by `quantize`"


@contextmanager
def changed(pipe: LoadedModel, name: str, change: str) -> Iterator[None]:
    """Change one block or module of the transformer for as long as the `with` lasts; the module's docstring says how.

    name: an official one, such as "layers.3" or "layers.3.attention.to_q" · change: one of CHANGES. Raises RequestError
    for names and changes that do not exist, and for a module that cannot be changed so.
    """
    if change not in CHANGES:
        near = nearest(str(change), CHANGES)[0]
        raise RequestError(f"change is {change!r}; needed one of {', '.join(CHANGES)}; the nearest is {near}")
    if (found := modules(pipe, name)) != [name]:
        raise RequestError(f"{name!r} is {len(found)} modules; needed one, by its name; the first is {found[0]}")
    if why := why_not(pipe, name, change):
        raise RequestError(f"{name} cannot be changed by {change}: {why}; needed another module or change")
    # Which checks that the model is run module by module.
    with attached(pipe, (), lambda site, tensor: None), ExitStack() as stack:
        for module, forward in _forwards(pipe, name, change):
            stack.enter_context(_instead(pipe, module, forward))
        yield


@contextmanager
def _instead(pipe: LoadedModel, module: nn.Module, forward: Forward) -> Iterator[None]:
    """Let a module run another forward, and take plain floats."""
    held, given = vars(module), {"forward": forward}
    if isinstance(module, QuantLinear):
        given |= {"input_dtype": None}  # type: ignore[dict-item]
    before = {key: held[key] for key in given if key in held}
    with pipe.parts.lock:
        held.update(given)
    try:
        yield
    finally:
        with pipe.parts.lock:
            for key in given:
                held.pop(key, None)
            held.update(before)


def _forwards(pipe: LoadedModel, name: str, change: str) -> Iterator[tuple[nn.Module, Forward]]:
    """The modules that a change touches, and what each is to run."""
    root = pipe.parts.component("transformer").module
    module = root.get_submodule(name)
    if change not in ("drop", "repeat"):
        for layer, scheme in _layers(pipe, name, SCHEMES[change]).items():
            own = _layer(pipe, layer)
            yield own, _quantized(own, scheme)
    elif isinstance(module, Block):
        own_forward = module.forward
        yield module, _twice(own_forward, own_forward) if change == "repeat" else lambda x, *rest: x
    elif change == "drop":
        dropped = _layer(pipe, name) if isinstance(module, LINEAR) else module
        yield dropped, _zeros(dropped)
    else:
        block = root.get_submodule(name.rpartition(".")[0])
        assert isinstance(block, Block)
        attention, feed_forward = (_without(pipe, block, part) for part in (block.feed_forward, block.attention))
        whole = block.forward
        yield block, _twice(attention, whole) if module is block.attention else _twice(whole, feed_forward)


def _twice(first: Forward, second: Forward) -> Forward:
    """Run a block in one way, and on its output in another."""
    return lambda x, *rest: second(first(x, *rest), *rest)


def _without(pipe: LoadedModel, block: Block, part: nn.Module) -> Forward:
    """Run a block of which a part adds nothing."""
    own = block.forward

    def forward(*args: Any) -> Any:
        with _instead(pipe, part, _zeros(part)):
            return own(*args)

    return forward


def _zeros(module: nn.Module) -> Forward:
    """Give zeros in the shape of a module's output: a norm and a gate leave them what they are."""

    def forward(x: Any, *rest: Any) -> Tensor:
        width = getattr(module, "out_features", x.shape[-1])
        return torch.zeros(*x.shape[:-1], width, dtype=x.dtype, device=x.device)

    return forward


def _quantized(layer: Linear | QuantLinear, scheme: Scheme) -> Forward:
    """Multiply by a layer's weight in another number format, encoded when it first runs."""
    parts: QuantizedTensors = {}

    def forward(x: Any) -> Tensor:
        nonlocal parts
        assert scheme.encode is not None
        parts = parts or scheme.encode(weight_of(layer))
        return linear(x, scheme, parts, layer.bias)  # type: ignore[arg-type]

    return forward


def _layers(pipe: LoadedModel, name: str, scheme: Scheme) -> Mapping[str, Scheme]:
    """The linear layers that are quantized with a module, and their formats."""
    root = pipe.parts.component("transformer").module
    if isinstance(root.get_submodule(name), LINEAR):
        return {name: scheme}
    names = (inner for inner, _ in root.named_modules() if inner.startswith(f"{name}."))
    return quantizable_layers("transformer", names, scheme)


def _layer(pipe: LoadedModel, name: str) -> Linear | QuantLinear:
    """A linear layer itself, without what adapters add."""
    module = pipe.parts.component("transformer").module.get_submodule(name)
    layer = module.layer if isinstance(module, Adapted) else module
    assert isinstance(layer, Linear | QuantLinear)
    return layer
