"""Diffusers' schedulers behind the interface that its Z-Image pipelines know: other solvers on the model's own levels.

Its pipelines are made for FlowMatchEulerDiscreteScheduler. Levels come from that one (the model's file, the request's
shift and spacing) or, where diffusers has no such spacing, from the request; steps from the scheduler of a solver.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.plan import Plan
from s3dit.sampling.schedules import sigmas

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


def check_solver(solver: str) -> None:
    """Raise RequestError for a solver that diffusers has not."""
    if solver not in SCHEDULERS:
        raise RequestError(
            f"solver is {solver!r}, which diffusers has not; needed one of {', '.join(SCHEDULERS)}; or compare with a "
            "record (--against)"
        )


def scheduler_of(config: Any, plan: Plan, generators: Sequence[torch.Generator]) -> Any:
    """Return a FlowMatchEulerDiscreteScheduler whose steps are those of the plan's solver.

    config: of the model's scheduler · generators: of fresh noise, one a picture. After every call of `step` it has
    `called`, (velocity, state) of the call that began the step, and `whole`: whether the step is done.
    """
    import diffusers

    request = plan.request
    options: dict[str, Any] = {switch: name == request.schedule for name, switch in SPACINGS.items()}
    options |= {} if request.shift is None else {"shift": request.shift, "use_dynamic_shifting": False}
    name, more = SCHEDULERS[request.solver]
    own = getattr(diffusers, name)(**more)

    class Steps(diffusers.FlowMatchEulerDiscreteScheduler):
        """The model's levels, another scheduler's steps."""

        whole, started = True, False
        called: tuple[Tensor, Tensor]
        sigmas: Tensor

        # Its pipelines look for this name among the parameters.
        def set_timesteps(self, *args: Any, sigmas: Any = None, **named: Any) -> None:
            """Set the levels."""
            super().set_timesteps(*args, sigmas=sigmas, **named)
            if request.schedule not in ("official", *SPACINGS):
                # A spacing that diffusers has not; all levels, of which a start image leaves some out.
                self.sigmas = _levels(plan).to(self.sigmas)
                self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
            if request.solver == "heun":
                self.timesteps = _twice(self.sigmas)[:-1] * self.config.num_train_timesteps

        def step(self, output: Tensor, t: Tensor, x: Tensor, **named: Any) -> Any:
            """Take a step, or half of one."""
            if self.whole:
                self.called = (-output, x)
            if request.solver == "euler":
                return super().step(output, t, x, **named)
            if not self.started:
                level = int((self.sigmas[:-1] * self.config.num_train_timesteps - t).abs().argmin())
                _start(own, self.sigmas[level:], request.solver)
                self.started, self._step_index = True, level
            self._step_index += 1
            done = own.step(output, own.timesteps[own.step_index or 0], x, **self._fresh(x), return_dict=False)
            self.whole = request.solver != "heun" or own.state_in_first_order
            # Heun's last step, to the image, has one call.
            self.whole |= own.step_index == len(own.timesteps)
            return done

        def _fresh(self, x: Tensor) -> dict[str, Any]:
            """What a stochastic step draws from: the generators that drew the first noise."""
            if request.solver == "lcm":
                return {"generator": list(generators)}
            if request.solver == "dpmpp_2m_sde":
                drawn = [torch.randn(one.shape, generator=g) for one, g in zip(x, generators, strict=True)]
                return {"variance_noise": torch.stack(drawn).to(x)}
            return {}

    return Steps.from_config(config, **options)


def _levels(plan: Plan) -> Tensor:
    """All levels of a plan's schedule, those included that a start image leaves out."""
    request = plan.request
    return sigmas(request.num_inference_steps or 1, request.shift or 1.0, request.schedule, request.sigmas)


def _twice(levels: Tensor) -> Tensor:
    """Every level but the ends twice, as Heun's calls come."""
    return torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])


def _start(scheduler: Any, levels: Tensor, solver: str) -> None:
    """Put a scheduler at the begin of some levels (n + 1,)."""
    scheduler.set_timesteps(len(levels) - 1)
    levels = _twice(levels) if solver == "heun" else levels.clone()
    scheduler.sigmas, scheduler.timesteps = levels, levels[:-1] * scheduler.config.num_train_timesteps
    scheduler.set_begin_index(0)
