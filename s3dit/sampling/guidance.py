"""Classifier-free guidance in Z-Image's form: one velocity of the prompt's and the negative prompt's.

guided = pos + s·(pos - neg), which is the usual neg + w·(pos - neg) with w = s + 1; on when s > 0. `normalization`
keeps the guided velocity of each picture from growing beyond a multiple of the unguided one; `truncation` switches
guidance off late in the flow (t above it), which also halves the work there. Both run in one pass: the same
pictures with two texts, twice the items in one pack. Other ways to combine them are in `guidance_methods.py`.

Source: diffusers `ZImagePipeline.__call__`; the official pipeline is the same but for being on only when s > 1.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s3dit.model.timestep import Modulation
from s3dit.model.transformer import Context, Steering
from s3dit.sampling.regions import RegionBlend
from s3dit.sampling.skip_layers import SkippedLayers
from s3dit.sampling.step import Velocity

# mix(scale, positive, negative, x, sigma) -> the guided velocity; tensors (tokens, 64) fp32, sigma () fp32
Mix = Callable[[float, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(scale: float, positive: Tensor, negative: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Return Z-Image's form of guidance."""
    return positive + scale * (positive - negative)


@dataclass(frozen=True, slots=True)
class Guidance:
    """Settings of guidance: scale s ≥ 0 · normalization: 0 is off, 1 keeps the norm · truncation: off at t > it.

    scale: one, or one a step · times: at which the steps begin, for several scales · interval: off outside of these t ·
    mix: how both velocities are combined · skipped: adds weight · (pos - pos without some layers), which needs no
    negative prompt; interval and truncation do not concern it.
    """

    scale: float | Sequence[float]
    normalization: float
    truncation: float
    interval: tuple[float, float] = (0.0, 1.0)
    times: Sequence[float] = ()
    mix: Mix = plain
    skipped: SkippedLayers | None = None

    def at(self, t: float) -> float:
        """Return the scale at time t (0 noise, 1 image), 0 where guidance is off."""
        # parity: above 1 diffusers does not look at truncation at all, and t never exceeds 1.
        if t > self.truncation or not self.interval[0] <= t <= self.interval[1]:
            return 0.0
        return self.scale if isinstance(self.scale, int | float) else self.scale[bisect_right(self.times, t) - 1]


def flow_time(sigma: Tensor) -> Tensor:
    """Return the model's time of a noise level: 1 - sigma, () fp32."""
    # parity: the official loop goes through a 0…1000 timestep, which moves the last bit.
    return (1000 - sigma * 1000) / 1000


def guide(
    transformer: Callable[..., Tensor],
    context: Callable[[bool], Context],
    guidance: Guidance,
    lengths: Sequence[int],
    control: Callable[[Tensor], Steering | None] = lambda sigma: None,
    modulation: Callable[[bool, Tensor], Modulation | None] = lambda guided, sigma: None,
    regions: RegionBlend | None = None,
    aimed: Callable[[Tensor], Tensor] = lambda t: t,
) -> Velocity:
    """Return the function velocity(x, sigma) that a solver calls.

    transformer: called as `Transformer.forward` · context(guided): of the pictures with their prompts, and when guided
    also, after them, with their negative prompts; called only when needed · lengths: patches of each picture ·
    control(sigma): what adds to the model's streams at a noise level, or None · modulation(guided, sigma): what was
    computed for it before, or None · regions: where pictures have several prompts, whose items come first ·
    aimed(t): of a time (1,) what the transformer is given for it (`target_time`).
    """

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        t = flow_time(sigma)
        scale, time = guidance.at(t.item()), aimed(t[None].to(x.device))

        def call(model: Callable[..., Tensor], guided: bool) -> tuple[Tensor, Tensor]:
            prompts = x if regions is None else regions.spread(x)
            items = torch.cat((prompts, x)) if guided else prompts
            out = model(items, time, context(guided), control(sigma), modulation(guided, sigma)).float()
            positive, negative = out.tensor_split((len(prompts),))
            return positive if regions is None else regions.blend(positive, x), negative

        positive, negative = call(transformer, scale > 0)
        mixed = positive
        if scale > 0:
            mixed = guidance.mix(scale, positive, negative, x, sigma)
        if guidance.skipped is not None and (weight := guidance.skipped.at(t.item())):
            mixed = mixed + weight * (positive - call(guidance.skipped, False)[0])
        return positive if mixed is positive else _limit(mixed, positive, guidance.normalization, lengths)

    return velocity


def _limit(guided: Tensor, positive: Tensor, limit: float, lengths: Sequence[int]) -> Tensor:
    """Scale each picture's guided velocity down to limit · the norm of its unguided one, where it is above."""
    if limit <= 0:
        return guided
    pieces = []
    for g, p in zip(guided.split(list(lengths)), positive.split(list(lengths)), strict=True):
        ratio = torch.linalg.vector_norm(p) * limit / torch.linalg.vector_norm(g)
        pieces.append(g * ratio.clamp(max=1.0))
    return torch.cat(pieces)
