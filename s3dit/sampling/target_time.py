"""The time that a step aims at, which TwinFlow's transformers are told beside their own.

They are trained to jump: from a time to the image (few steps), or to where the next step begins (any number of steps);
told their own time they draw step by step, like the model that they were made of.

Source: Cheng et al. 2025, arXiv 2512.05150; inclusionAI/TwinFlow, `sampling_loop` of
`src/methodes/twinflow/twinflow.py` (there the styles few, any and mul) and `GenTransformer.forward` of
`diffusers_patch/z_image/modeling_z_image.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from s3dit.request import TargetTimestep
from s3dit.sampling.guidance import flow_time


def target_time(target: TargetTimestep | None, sigmas: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function aimed(t) -> times (R, 2) of times t (R,) fp32, with what they aim at; or t itself without.

    target: end (of the flow), next (of the sigmas), or none · sigmas (n + 1,) fp32, falling to 0.
    """
    if target in (None, "none"):
        return lambda t: t
    ends = flow_time(sigmas if target == "next" else sigmas[-1:])

    def aimed(t: Tensor) -> Tensor:
        later = ends.to(t.device).expand(len(t), -1)
        end = torch.where(later > t[:, None], later, 1.0).amin(1)
        # parity: the image is told as 0, since the official code turns levels into times by sign(s) * (1 - s).
        return torch.stack((t, torch.where(end < 1, end, 0.0)), -1)

    return aimed
