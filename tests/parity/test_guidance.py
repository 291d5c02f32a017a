"""Methods of guidance against diffusers' guiders, in their original formulation, which is Z-Image's form."""

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance, SkipLayerGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

from s3dit.request import Request
from s3dit.sampling.guidance import guide
from s3dit.sampling.guidance_methods import guidance_of

SCALE, SIGMAS, LENGTHS = 3.5, torch.tensor([1.0, 0.9, 0.6, 0.25, 0.0]), [24, 40]
GENERATOR = torch.Generator().manual_seed(0)
# What a model would say in every step: of the prompts, of the negative ones, and of the prompts without some layers.
PREDICTIONS = [torch.randn(3, sum(LENGTHS), 64, generator=GENERATOR) for _ in SIGMAS[:-1]]
STATES = [torch.randn(sum(LENGTHS), 64, generator=GENERATOR) for _ in SIGMAS[:-1]]


class Worse:
    """The pass without some layers, as `guide` calls it."""

    def at(self, t):
        return 1.7

    def __call__(self, *args):
        return PREDICTIONS[self.i][2]


def ours(**fields):
    """The guided velocities of all steps, in a packed batch of two sizes."""
    worse = Worse() if fields.pop("worse", False) else None
    request = Request(prompt="a", num_inference_steps=4, **fields)
    guidance = guidance_of(request, SIGMAS, LENGTHS, worse)

    def run(x, *rest):
        return PREDICTIONS[i][:2].flatten(0, 1) if len(x) > sum(LENGTHS) else PREDICTIONS[i][0]

    velocity, made = guide(run, lambda guided: None, guidance, LENGTHS), []
    for i, sigma in enumerate(SIGMAS[:-1]):
        if worse is not None:
            worse.i = i
        made.append(velocity(STATES[i], sigma))
    return made


def check(velocities, guider, image=False, worse=False):
    """Each picture by itself, in latents' order of axes; image: the guider is given estimates of the image."""
    for picture in range(2):
        rows = slice(sum(LENGTHS[:picture]), sum(LENGTHS[: picture + 1]))
        if image:
            guider.momentum_buffer = MomentumBuffer(guider.adaptive_projected_guidance_momentum)
        for i, sigma in enumerate(SIGMAS[:-1]):
            guider.set_state(i, 4, sigma)
            x = STATES[i][rows].double()
            given = [each[rows].double()[None] for each in PREDICTIONS[i][: 3 if worse else 2]]
            expected = guider.forward(*((x + sigma.double() * v if image else v) for v in given)).pred[0]
            expected = (expected - x) / sigma.double() if image else expected
            # Sums of 2,560 products in fp32, against those of diffusers in fp64.
            assert ((velocities[i][rows] - expected).norm() / expected.norm()).item() < 2e-6


@pytest.mark.parametrize("eta, momentum, threshold", [(0.0, -0.5, 0.0), (0.3, -0.75, 20.0), (1.0, 0.0, 5.0)])
def test_adaptive_projected_guidance(eta, momentum, threshold):
    method = f"apg:eta={eta},momentum={momentum},norm_threshold={threshold}"
    guider = AdaptiveProjectedGuidance(
        guidance_scale=SCALE, adaptive_projected_guidance_momentum=momentum, eta=eta,
        adaptive_projected_guidance_rescale=threshold, use_original_formulation=True,
    )  # fmt: skip
    check(ours(guidance_scale=SCALE, guidance_method=method), guider, image=True)


def test_classifier_free_zero_star():
    guider = ClassifierFreeZeroStarGuidance(SCALE, zero_init_steps=0, use_original_formulation=True)
    check(ours(guidance_scale=SCALE, guidance_method="cfg_zero"), guider)


@pytest.mark.parametrize("scale", [0.0, SCALE])
def test_skip_layer_guidance(scale):
    guider = SkipLayerGuidance(scale, 1.7, 0.0, 1.0, [2], use_original_formulation=True)
    # diffusers' interval leaves out its first step.
    guider._is_slg_enabled = lambda: True
    if scale == 0:
        forward = guider.forward
        guider.forward = lambda pos, neg, worse: forward(pos, None, worse)
    check(ours(guidance_scale=scale, worse=True), guider, worse=True)
