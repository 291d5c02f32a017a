"""The modulation of the steps to come, computed before they are taken.

What the time does to the layers depends on nothing else that a step brings, so on a GPU it takes a product a layer for
many steps together, in place of one for each step. A CPU leaves it to each pass: a product of more rows may add up in
another order there, and a step must not depend on how many follow.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from s3dit.model.timestep import Modulation
from s3dit.model.transformer import Context, Transformer
from s3dit.sampling.guidance import flow_time

# Steps that are computed together; 16 are 33 MB of the published models, and for each item of Omni as much again.
STEPS_AHEAD = 16
# Kinds of devices on which each pass computes its own.
EACH_PASS = ("cpu",)


def ahead(
    transformer: Transformer,
    context: Callable[[bool], Context],
    sigmas: Tensor,
    device: torch.device,
    state: Callable[[], object],
    aimed: Callable[[Tensor], Tensor] = lambda t: t,
) -> Callable[[bool, Tensor], Modulation | None]:
    """Return the function modulation(guided, sigma) for `guidance.guide`; None at a noise level that is no step's.

    context: as there · sigmas (n + 1,) fp32, on the CPU, as the solver steps through them · device: of the model ·
    state: a value that is another once the transformer may answer otherwise; what was computed before is dropped then ·
    aimed: of a time, what the transformer is given for it (see `sampling.target_time`).
    """
    steps = () if device.type in EACH_PASS else sigmas[:-1]
    times = {sigma.item(): aimed(flow_time(sigma)[None].to(device)) for sigma in steps}
    kept: dict[bool, dict[float, Modulation]] = {}
    made_of: object = None

    def modulation(guided: bool, sigma: Tensor) -> Modulation | None:
        nonlocal made_of
        level = sigma.item()
        if level not in times:
            return None
        if (now := state()) != made_of:
            kept.clear()
            made_of = now
        if level not in kept.get(guided, {}):
            levels = list(times)
            chosen = levels[levels.index(level) :][:STEPS_AHEAD]
            computed = together(transformer, [times[each] for each in chosen], context(guided))
            kept[guided] = dict(zip(chosen, computed, strict=True))
        return kept[guided][level]

    return modulation


def together(transformer: Transformer, times: Sequence[Tensor], context: Context) -> list[Modulation]:
    """Compute the modulation of each of some times, (1,) or (1, 2) fp32, for `Transformer.forward` at that time."""
    rows = [context.times(time) for time in times]
    every, count = transformer.modulation(torch.cat(rows), context.text.dtype), len(rows[0])
    pieces = (every.time.split(count), every.tables.split(count, dim=2), every.final.split(count))
    return [Modulation(*piece, every.alone) for piece in zip(*pieces, strict=True)]
