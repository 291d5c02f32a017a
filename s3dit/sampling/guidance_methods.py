"""Guidance as a request has it: in which steps, how strong, and by which method both velocities are combined.

apg, adaptive projected guidance: what guidance adds to the estimate of the image, σ·(pos - neg), is averaged over the
model calls with a `momentum` below 0, which weakens what comes again and again; its norm is cut to `norm_threshold` (of
a whole picture in latents, so twice the side is twice the norm; 0 is off); and its part parallel to the prompt's
estimate of the image, which saturates colors, is multiplied by `eta`. As in the paper and ComfyUI this is done to
images; diffusers does it to whatever the model predicts.

cfg_zero, CFG-Zero*: the negative velocity is multiplied by what fits it best to the positive one, <pos, neg> / |neg|²;
and the first `zero_init_steps` have no velocity, so that the flow begins, with the noise as it is, at the level behind
them, without a model call (`inputs.start_image.remaining_sigmas`). A flow that begins from a picture has all its steps.

All is done for each picture by itself. Sources: Sadat et al. 2024, arXiv 2410.02416 (apg); Fan et al. 2025, arXiv
2503.18886 (cfg_zero); Kynkäänniemi et al. 2024, arXiv 2404.07724 (intervals).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from s3dit import values
from s3dit.errors import RequestError
from s3dit.guidance_options import Method, SkipLayers
from s3dit.request import Request
from s3dit.sampling.guidance import Guidance, Mix, flow_time, plain
from s3dit.sampling.skip_layers import SkippedLayers
from s3dit.sampling.solvers import solve


def guidance_of(
    request: Request, sigmas: Tensor, lengths: Sequence[int] = (), skipped: SkippedLayers | None = None
) -> Guidance:
    """Return the guidance of a resolved request in a pass over sigmas (n + 1,); lengths: patches of each picture."""
    method, given = Method.of(request.guidance_method), request.guidance_scale or 0.0
    start, end = request.guidance_interval or (0.0, 1.0)
    mixes: dict[str, Mix] = {
        "plain": plain, "apg": apg(method, lengths), "cfg_zero": partial(cfg_zero, lengths=lengths)
    }  # fmt: skip
    return Guidance(
        scale=given if isinstance(given, float) else scales(given, request.num_inference_steps or 1, len(sigmas) - 1),
        normalization=float(request.cfg_normalization),
        truncation=float(request.cfg_truncation),
        interval=(start, end),
        times=[flow_time(sigma).item() for sigma in sigmas[:-1]],
        mix=mixes[method.name],
        skipped=skipped,
    )


def guidance_scale(request: Request, default: float) -> float | list[float]:
    """The scale or scales of a request in Z-Image's form: 0.0 where all are 0."""
    given = request.guidance_scale if request.cfg is None else [weight - 1.0 for weight in values.as_list(request.cfg)]
    several = [float(scale) for scale in ([default] if given is None else values.as_list(given))]
    return several[0] if len(several) == 1 else several if any(several) else 0.0


def check_guidance(request: Request, layers: int) -> None:
    """Hold a resolved request's guidance to its steps and to the model's main layers; raises RequestError."""
    steps = request.num_inference_steps or 1
    if (given := len(values.as_list(request.guidance_scale))) > steps:
        raise RequestError(f"guidance_scale has {given} numbers; needed at most one a step, of which there are {steps}")
    if request.strength is None and (left_out := zero_init_steps(request)) >= steps:
        raise RequestError(f"zero_init_steps of guidance_method is {left_out}; needed fewer than the {steps} steps")
    if request.skip_layers is not None and (last := SkipLayers.of(request.skip_layers).layers[-1]) >= layers:
        raise RequestError(f"skip_layers has layer {last}; needed layers from 0 to {layers - 1} of this model")


def zero_init_steps(request: Request) -> int:
    """The first steps of a resolved request that have no velocity, by its method of guidance."""
    method = Method.of(request.guidance_method)
    return method.zero_init_steps if method.name == "cfg_zero" and request.guidance_scale else 0


def scales(given: Sequence[float], steps: int, left: int) -> list[float]:
    """Spread given scales over steps, on straight lines between them, and return those of the `left` last steps."""
    places = [i * (len(given) - 1) / max(steps - 1, 1) for i in range(steps - left, steps)]
    pairs = [(given[int(place)], given[min(int(place) + 1, len(given) - 1)], place % 1) for place in places]
    return [a if share == 0 else a + share * (b - a) for a, b, share in pairs]


def apg(method: Method, lengths: Sequence[int]) -> Mix:
    """Return the mix of adaptive projected guidance, which remembers the calls of one pass."""
    average: Tensor | float = 0.0

    def mix(scale: float, positive: Tensor, negative: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal average
        average = sigma * (positive - negative) + method.momentum * average
        images = (x + sigma * positive).split(list(lengths))
        updates = [_projected(*pair, method) for pair in zip(average.split(list(lengths)), images, strict=True)]
        return positive + scale / sigma * torch.cat(updates)

    return mix


def _projected(update: Tensor, image: Tensor, method: Method) -> Tensor:
    """One picture's update (tokens, 64) with its norm cut, and its part parallel to the image multiplied by eta."""
    if method.norm_threshold > 0:
        update = update * (method.norm_threshold / torch.linalg.vector_norm(update)).clamp(max=1.0)
    parallel = (update * image).sum() / (image * image).sum() * image
    return update + (method.eta - 1) * parallel


def cfg_zero(
    scale: float, positive: Tensor, negative: Tensor, x: Tensor, sigma: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Guide with each picture's negative velocity scaled to fit its positive one best."""
    pairs = zip(positive.split(list(lengths)), negative.split(list(lengths)), strict=True)
    fitted = [(pos * neg).sum() / ((neg * neg).sum() + 1e-8) * neg for pos, neg in pairs]
    return plain(scale, positive, torch.cat(fitted), x, sigma)


def times_of_calls(request: Request, sigmas: Tensor) -> list[float]:
    """Return the time t of every call of the velocity that a solver makes, found on a flow that stands still."""
    times: list[float] = []
    still = torch.zeros(1, 64)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        times.append(flow_time(sigma).item())
        return still

    for _ in solve(request.solver, velocity, still, sigmas, lambda: still, None, request.convention):
        pass
    return times


def extra_calls(request: Request, sigmas: Tensor) -> int:
    """Return how often a resolved request calls the model without skip_layers, beside the solver's own calls."""
    if request.skip_layers is None:
        return 0
    skip = SkipLayers.of(request.skip_layers)
    return sum(skip.at(t) > 0 for t in times_of_calls(request, sigmas))
