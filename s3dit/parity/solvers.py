"""Diffusers' schedulers behind the interface that its Z-Image pipelines know: other solvers on the model's own levels.

Its pipelines are made for FlowMatchEulerDiscreteScheduler. Levels come from that one (the model's file, the request's
shift and spacing) or, where diffusers has no such spacing, from the request; steps from the scheduler of a solver.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.plan import Plan

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# Solver -> class of diffusers and its options.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "lcm": ("FlowMatchLCMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", FLOW | {"solver_order": 2, "solver_type": "bh2"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", FLOW | {"euler_at_final": False}),
    "dpmpp_2m_sde": (
        "DPMSolverMultistepScheduler", FLOW | {"algorithm_type": "sde-dpmsolver++", "euler_at_final": False},
    ),
}  # fmt: skip
SPACINGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
# after(velocity, state at the level, state after the step), of all pictures: (B, 16, H/8, W/8)
After = Callable[[Tensor, Tensor, Tensor], None]


def check_solver(solver: str) -> None:
    """Raise RequestError for a solver that diffusers has not."""
    if solver not in SCHEDULERS:
        raise RequestError(
            f"solver is {solver!r}, which diffusers has not; needed one of {', '.join(SCHEDULERS)}; or compare with a "
            "record (--against)"
        )


def watched_scheduler(
    config: Any, plan: Plan, generators: Sequence[torch.Generator], after: After, blend: Any = None
) -> Any:
    """Return FlowMatchEulerDiscreteScheduler whose steps are those of the plan's solver, and are told to `after`.

    config: of the model's scheduler · generators: of fresh noise, one a picture · blend(i, state) -> the state that the
    pipeline goes on with, after step i (from 1).
    """
    import diffusers
    from diffusers.utils.torch_utils import randn_tensor

    request = plan.request
    spacing = request.schedule
    options = {switch: name == spacing for name, switch in SPACINGS.items()}
    options |= {} if request.shift is None else {"shift": request.shift, "use_dynamic_shifting": False}
    name, more = SCHEDULERS[request.solver]
    own = getattr(diffusers, name)(**more)
    twice = request.solver == "heun"

    class Watched(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        """The model's levels, another scheduler's steps."""

        def set_timesteps(self, *args: Any, **named: Any) -> None:
            """Set the levels, and give them to the scheduler whose steps are taken."""
            super().set_timesteps(*args, **named)
            if spacing not in ("official", *SPACINGS):
                # Not diffusers' own: the whole list that a start image then cuts.
                levels = torch.tensor(every(plan), dtype=torch.float32)
                self.sigmas, self.timesteps = levels, levels[:-1] * self.config.num_train_timesteps
            self.started, self.first, self.taken = False, None, 0

        def step(self, output: Tensor, t: Tensor, x: Tensor, **named: Any) -> Any:
            """Take a step of the plan's solver."""
            if request.solver == "euler":
                done = super().step(output, t, x, **named)[0]
            else:
                done = self._other(output, t, x)
            if self.first is None:
                self.first = (-output, x)
            if not twice or self.second:
                self.taken += 1
                done = done if blend is None else blend(self.taken, done)
                after(*self.first, done)
                self.first = None
            return (done,)

        @property
        def second(self) -> bool:
            """Whether the call that was made ends a step of Heun's; the last step, to 0, has one."""
            return own.state_in_first_order

        def _other(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
            """A step of another scheduler, on the levels from t on."""
            if not self.started:
                begin = int((self.sigmas[:-1] * self.config.num_train_timesteps - t).abs().argmin())
                start_on(own, self.sigmas[begin:], self.config.num_train_timesteps, twice)
                self.started = True
            fresh = {}
            if request.solver == "dpmpp_2m_sde":
                fresh = {"variance_noise": randn_tensor(x.shape, generator=list(generators))}
            elif request.solver == "lcm":
                fresh = {"generator": list(generators)}
            return own.step(output, own.timesteps[own.step_index or 0], x, return_dict=False, **fresh)[0]

    return Watched.from_config(config, **options)


def every(plan: Plan) -> list[float]:
    """All levels of a plan's schedule, those included that a start image leaves out."""
    from s3dit.sampling.schedules import sigmas

    request = plan.request
    return sigmas(request.num_inference_steps or 1, request.shift or 1.0, request.schedule, request.sigmas).tolist()


def start_on(scheduler: Any, levels: Tensor, train: int, twice: bool) -> None:
    """Put a scheduler at the begin of some levels (n + 1,)."""
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas, scheduler.timesteps = levels, levels[:-1] * train
    if twice:
        middle = levels[1:-1].repeat_interleave(2)
        scheduler.sigmas = torch.cat([levels[:1], middle, levels[-1:]])
        scheduler.timesteps = scheduler.sigmas[:-1] * train
    scheduler.set_begin_index(0)
