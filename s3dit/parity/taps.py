"""Looks inside the models of either side while they draw: modules, rotary tables, what attention is made of.

Both sides carry the official names, so the same taps serve both; what differs is the form of the tensors, which
`packing` and the two sides themselves bring together.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from s3dit.errors import RequestError
from s3dit.research.trace import Record, pattern_regex, trace

# What is looked at inside the transformer in the first step, and in the later ones.
FINAL = "all_final_layer.2-1"
FIRST = ["cap_embedder", "context_refiner.*", "t_embedder", "all_x_embedder.2-1", "noise_refiner.*", "layers.*", FINAL]
OMNI = ["siglip_embedder", "siglip_refiner.*"]
LATER = ["t_embedder", FINAL]
# The streams, and the blocks that each runs through.
STREAMS = {"text": "context_refiner", "vision": "siglip_refiner", "image": "noise_refiner", "whole": "layers"}
# The block whose queries, keys, values and mixture are always kept: the checks by name need them.
SAMPLE = "context_refiner.0"
# Modules of the autoencoder that are stages.
VAE = {
    part: [f"{part}.conv_in", f"{part}.mid_block", f"{part}.{blocks}.*", f"{part}.conv_out"]
    for part, blocks in (("encoder", "down_blocks"), ("decoder", "up_blocks"))
}
# Stages finer than a block: of these, what one side has not is left out, as one program fuses what another runs apart.
FINE = re.compile(
    r"(negative )?(text\.beyond|(text\.)?(layers|\w+_refiner)\.\d+\..+|vae\.\w+\.\w+_blocks?\.(\d+\.)?[a-z].*)"
)
# show(q, k) after norm and rope -> a context in which every attention does so
Rotated = Callable[[Callable[[Tensor, Tensor], None]], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Inside:
    """Modules whose own modules are looked at too, by part: text and vae with their prefix, the rest the transformer's.

    names: patterns such as "layers.3", "text.layers.*", "vae.decoder.mid_block".
    """

    names: tuple[str, ...] = ()

    def of(self, part: str) -> list[str]:
        """The patterns of a part (transformer, text, vae), as that part's own modules are called."""
        first = {name: name.partition(".")[0] for name in self.names}
        chosen = [name for name in self.names if (first[name] if first[name] in ("text", "vae") else "") == part]
        return [name.removeprefix(f"{part}.") if part else name for name in chosen]


NOWHERE = Inside()


class Calls:
    """What modules of a model compute, call by call of the model: `done`, each a Record of `name#k`.

    fresh: forget what ran outside of the model's calls; else it counts to the next call.
    """

    def __init__(self, stack: ExitStack, model: nn.Module, patterns: Sequence[str], fresh: bool = False) -> None:
        self.seen = stack.enter_context(trace(model, patterns))
        self.done: list[Record] = []
        if fresh:
            stack.callback(model.register_forward_pre_hook(lambda *_: self.seen.clear()).remove)
        stack.callback(model.register_forward_hook(self._finished).remove)

    def _finished(self, *_: Any) -> None:
        self.done.append(dict(self.seen))
        self.seen.clear()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a copy of a tensor under the next free `name#k`."""
        k = sum(key.rpartition("#")[0] == name for key in self.seen)
        self.seen[f"{name}#{k}"] = tensor.detach().to("cpu", copy=True)


def by_name(seen: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The calls of every module, in order."""
    calls: dict[str, list[Tensor]] = {}
    for key, tensor in seen.items():
        calls.setdefault(key.rpartition("#")[0], []).append(tensor)
    return calls


def tap_streams(stack: ExitStack, model: nn.Module, calls: Calls, rope: Callable[[Any], Tensor]) -> None:
    """Keep what enters the first block of every stream: tokens with their padding, and the rotary table.

    rope(arguments of the block) -> the table (…, D/2, 2).
    """
    for stream, blocks in STREAMS.items():
        if getattr(model, blocks, None) is None:
            continue

        def look(module: nn.Module, args: Any, stream: str = stream) -> None:
            """A forward pre-hook of the stream's first block."""
            calls.add(f"rope of {stream}", rope(args))
            calls.add(f"tokens of {stream}", args[0])

        stack.callback(model.get_submodule(f"{blocks}.0").register_forward_pre_hook(look).remove)


def tap_attention(
    stack: ExitStack, model: nn.Module, calls: Calls, inside: Iterable[str], rotated: Rotated, out: str = "to_out.0"
) -> None:
    """Keep queries and keys after norm and rope, and the mixture before the last projection, of attentions.

    inside: patterns of blocks · out: the last projection's name inside an attention.
    """
    chosen = [pattern_regex(pattern + "**") for pattern in inside]
    running: list[str] = []
    for name, module in model.named_modules():
        if not name.endswith(("attention", "self_attn")) or not any(regex.fullmatch(name) for regex in chosen):
            continue
        stack.callback(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)).remove)
        stack.callback(module.register_forward_hook(lambda *_: running.clear(), always_call=True).remove)
        last = module.get_submodule(out)
        look = lambda _, args, name=name: calls.add(f"{name}.mixed", args[0])  # noqa: E731
        stack.callback(last.register_forward_pre_hook(look).remove)

    def show(q: Tensor, k: Tensor) -> None:
        if running:
            calls.add(f"{running[-1]}.q", q)
            calls.add(f"{running[-1]}.k", k)

    stack.enter_context(rotated(show))


def check_inside(inside: Inside, names: Mapping[str, Iterable[str]]) -> None:
    """Raise RequestError for a pattern that matches no module; names: of every part's modules."""
    for part, known in names.items():
        for pattern in inside.of(part):
            regex = pattern_regex(pattern)
            if not any(regex.fullmatch(name) for name in known):
                raise RequestError(
                    f"inside is {pattern!r}, which no module of it is called; needed one such as layers.3"
                )
