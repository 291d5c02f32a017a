"""ComfyUI's meanings of names that mean something else here, for requests with `convention comfyui`.

Schedules: karras, exponential, kl_optimal and beta end at the lowest sigma of the training, near 0, and not at the last
of the official sigmas; beta and simple choose among its 1,000 sigmas. A strength, its denoise, adds steps: the sigmas
are the last ones of a list of int(steps / strength) steps. Solvers: dpmpp_2m steps in -log sigma; dpmpp_2m_sde and
er_sde, which step in the log-SNR, start a little below pure noise. Anything else is the same in both.

Not here: uni_pc and the ancestral form of res_multistep, which ComfyUI has for variance-exploding models only, and the
Brownian tree of torchsde, from which the noise of its dpmpp_2m_sde comes.

Sources: ComfyUI's `comfy/samplers.py` (schedules, `KSampler.set_steps`), `comfy/model_sampling.py`
(`ModelSamplingDiscreteFlow`) and `comfy/k_diffusion/sampling.py`, as of August 2026.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.request import Schedule, Solver
from s3dit.sampling import schedules
from s3dit.sampling.multistep import Past, Rule, er_sde
from s3dit.sampling.spacings import BETWEEN, beta_quantile
from s3dit.sampling.step import Noise

# Solvers whose first step would be infinitely long from pure noise, and the share of the time that they leave out.
IN_LOG_SNR, LEFT_OUT = ("dpmpp_2m_sde", "er_sde"), 1e-4
MOST_SIGMAS = 1000


def sigmas(n: int, shift: float, schedule: Schedule, dynamic: bool = False, strength: float | None = None) -> Tensor:
    """Return ComfyUI's sigmas of n steps: (n + 1,) fp32, from 1, or with a strength from lower, down to 0.

    beta has fewer where steps fall on one sigma of the training. The other arguments are those of `schedules.sigmas`.
    Raises RequestError where so small a strength has more steps than the training sigmas.
    """
    # As its node does: almost 1 is 1.
    whole = n if strength is None or strength > 0.9999 else int(n / strength)
    if whole > MOST_SIGMAS:
        raise RequestError(
            f"strength {strength:g} needs the last {n} of {whole:,} steps (convention comfyui); needed at most "
            f"{MOST_SIGMAS:,}, as there are sigmas; redraw more, or in fewer steps"
        )
    table = schedules.training_sigmas(shift, dynamic)
    if schedule == "simple":
        # Not i * 1000 / whole, which is another integer for 38, 76, 122, … steps.
        spaced = table[[-1 - int(i * (1000 / whole)) for i in range(whole)]]
    elif schedule == "beta":
        places = np.rint(beta_quantile(1 - np.arange(whole) / whole) * (len(table) - 1)).astype(int)
        spaced = table[np.unique(places)[::-1]]
    elif schedule in BETWEEN:
        spaced = BETWEEN[schedule](np.linspace(0, 1, whole), float(table[-1]), float(table[0]))
    else:
        return schedules.sigmas(whole, shift, schedule, dynamic=dynamic)[-n - 1 :]
    return torch.from_numpy(np.append(spaced, 0.0).astype(np.float32))[-n - 1 :]


def below_noise(levels: Tensor, solver: Solver, shift: float, dynamic: bool = False) -> Tensor:
    """Return sigmas (n + 1,) with the first a little lower for solvers that cannot start at 1, the others as they are.

    A start image that is redrawn wholly is noised to the lower one, too, in ComfyUI to 1: 3e-5 more at shift 3.
    """
    if solver not in IN_LOG_SNR or levels[0] < 1:
        return levels
    return torch.cat([levels.new_tensor([schedules.shifted(1 - LEFT_OUT, shift, dynamic)]), levels[1:]])


def dpmpp_2m(x: Tensor, after: Tensor, past: Past, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++ 2M in -log sigma, which has no infinite step from pure noise: second order from the second step."""
    sigma, _, image = past[-1]
    share, blend = after / sigma, image
    if len(past) > 1 and after > 0:
        h, old_h = -math.log(share), math.log(past[-2].sigma / sigma)
        blend = image + (image - past[-2].image) * (h / old_h / 2)
    return share * x + (1 - share) * blend


# Rules that take the place of `multistep.RULES`; the integrals of er_sde are taken at the lower ends of their pieces.
RULES: dict[str, Rule] = {"dpmpp_2m": dpmpp_2m, "er_sde": partial(er_sde, middle=0.0)}
