"""ComfyUI's sigmas and solvers against loops in float64, written from the definitions in its own files.

`comfy/samplers.py` (schedules and `KSampler.set_steps`), `comfy/model_sampling.py` (`ModelSamplingDiscreteFlow`, CONST)
and `comfy/k_diffusion/sampling.py` (loops), as of August 2026. There the model answers with an image, D = x + sigma·v.
"""

import math

import numpy as np
import pytest
import torch

from s3dit.errors import RequestError
from s3dit.sampling import comfyui
from s3dit.sampling.schedules import shifted, sigmas
from s3dit.sampling.solvers import solve

STEPS = [*range(4, 61), 76, 122]
SHIFT = 3.0


def shift64(u, shift=SHIFT):
    return shift * u / (1 + (shift - 1) * u)


def beta_cdf(x, a=0.6):
    """The regularized incomplete beta function I_x(a, a), by its power series below 1/2 and its symmetry above."""
    low, k = np.minimum(x, 1 - x), np.arange(80)
    # x^a/(a·B(a,a)) · Σ (1-a)_k/k! · a/(a+k) · x^k
    rising = np.cumprod(np.append(1.0, (1 - a + k[:-1]) / (k[:-1] + 1)))
    series = (rising * a / (a + k) * low[:, None] ** k).sum(1)
    below = low**a / (a * math.gamma(a) ** 2 / math.gamma(2 * a)) * series
    return np.where(x <= 0.5, below, 1 - below)


def beta_quantile(p):
    low, high = np.zeros_like(p), np.ones_like(p)
    for _ in range(60):
        middle = (low + high) / 2
        short = beta_cdf(middle) < p
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    # In the middle by symmetry; what is rounded there lies between two integers.
    return np.where(p == 0.5, 0.5, (low + high) / 2)


def theirs(n, schedule, denoise=1.0):
    """KSampler's sigmas: of int(n / denoise) steps the last n + 1 levels."""
    if denoise < 1:
        return theirs(int(n / denoise), schedule)[-(n + 1) :]
    table, i = shift64(np.arange(1, 1001) / 1000), np.arange(n)
    low, high = table[0], table[-1]
    between = {
        "karras": lambda r: (high ** (1 / 7) + r * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
        "exponential": lambda r: np.exp(np.log(high) + r * (np.log(low) - np.log(high))),
        "kl_optimal": lambda r: np.tan(r * np.arctan(low) + (1 - r) * np.arctan(high)),
    }
    if schedule == "simple":
        step = 1000 / n
        found = [table[-(1 + int(x * step))] for x in range(n)]
    elif schedule == "sgm_uniform":
        found = shift64(high + i / n * (low - high))
    elif schedule == "beta":
        places = np.rint(beta_quantile(1 - i / n) * 999).astype(int)
        found = [table[place] for j, place in enumerate(places) if j == 0 or place != places[j - 1]]
    elif schedule == "linear_quadratic":
        straight = n // 2
        over = straight - 0.025 * n
        bend = over / (straight * (n - straight) ** 2)
        slope = 0.025 / straight - 2 * over / (n - straight) ** 2
        j = np.arange(straight, n)
        risen = [*(0.025 * np.arange(straight) / straight), *(bend * j**2 + slope * j + bend * straight**2)]
        found = 1 - np.array(risen)
    else:
        found = between[schedule](i / (n - 1))
    return np.append(found, 0.0)


NAMES = ["simple", "sgm_uniform", "karras", "exponential", "kl_optimal", "beta", "linear_quadratic"]


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.sampled(1)
def test_sigmas(schedule):
    """1e-6: the engine's are fp32, as ComfyUI's, whose last bit is 6e-8 (seen: 2.1e-7)."""
    for n in STEPS:
        found = comfyui.sigmas(n, SHIFT, schedule).double().numpy()
        assert len(found) == n + 1 and np.abs(found - theirs(n, schedule)).max() < 1e-6, n


@pytest.mark.parametrize("schedule", ["simple", "beta", "karras"])
@pytest.mark.parametrize("denoise", [0.33, 0.5, 0.9])
def test_sigmas_of_a_denoise(schedule, denoise):
    for n in STEPS[1::6]:
        found = comfyui.sigmas(n, SHIFT, schedule, strength=denoise).double().numpy()
        assert len(found) == n + 1 and np.abs(found - theirs(n, schedule, denoise)).max() < 1e-6, n


def test_names_that_mean_something_else_here():
    """simple differs at some step counts only; karras, 8 steps, ends 100 times as low."""
    differ = [
        n for n in range(1, 130) if not torch.equal(comfyui.sigmas(n, SHIFT, "simple"), sigmas(n, SHIFT, "simple"))
    ]
    assert differ == [38, 76, 122]
    assert comfyui.sigmas(8, SHIFT, "karras")[-2] < 0.0031 and sigmas(8, SHIFT, "karras")[-2] > 0.29
    # Of 5 steps with denoise 0.33 all are taken, the last of 15; here a third of them.
    assert torch.equal(comfyui.sigmas(5, SHIFT, "beta", strength=0.33), comfyui.sigmas(15, SHIFT, "beta")[-6:])


def test_beta_chooses_as_scipy_does():
    stats = pytest.importorskip("scipy.stats", reason="ComfyUI computes the beta schedule with scipy")
    for n in range(1, 330, 9):
        places = np.rint(stats.beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), 0.6, 0.6) * 999).astype(int)
        expected = np.append(shift64(np.arange(1, 1001) / 1000)[np.unique(places)[::-1]], 0.0)
        assert np.abs(comfyui.sigmas(n, SHIFT, "beta").numpy() - expected[-n - 1 :]).max() < 1e-6, n


def test_beta_drops_steps_that_fall_on_one_sigma():
    assert len(comfyui.sigmas(200, SHIFT, "beta")) == len(theirs(200, "beta")) < 201


def test_a_strength_so_small_that_there_are_no_sigmas_is_refused():
    with pytest.raises(RequestError, match="strength 0.001 needs the last 5 of 5,000 steps"):
        comfyui.sigmas(5, SHIFT, "simple", strength=0.001)


def velocity(x, sigma):
    """Bent in the state and in sigma, and different for every number."""
    keys = torch.arange(x.numel(), dtype=torch.float64).view(x.shape).sin()
    return (torch.tanh(1.3 * x.double() * keys + sigma.double()) + 0.4 * torch.tanh(x.double()) * sigma.double()).to(x)


def dpmpp_2m(model, x, s, noise):
    old = None
    for i in range(len(s) - 1):
        image = model(x, s[i])
        if s[i + 1] == 0:
            x = image
            continue
        h = -math.log(s[i + 1]) + math.log(s[i])
        blend = image
        if old is not None:
            r = (-math.log(s[i]) + math.log(s[i - 1])) / h
            blend = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * old
        x, old = math.exp(-h) * x - math.expm1(-h) * blend, image
    return x


def half_log_snr(sigma):
    return math.log((1 - sigma) / sigma)


def dpmpp_2m_sde(model, x, s, noise):
    s, old, last = [shift64(1 - 1e-4) if s[0] >= 1 else s[0], *s[1:]], None, None
    for i in range(len(s) - 1):
        image = model(x, s[i])
        if s[i + 1] == 0:
            return image
        h = half_log_snr(s[i + 1]) - half_log_snr(s[i])
        alpha = s[i + 1] * math.exp(half_log_snr(s[i + 1]))
        x = s[i + 1] / s[i] * math.exp(-h) * x - alpha * math.expm1(-2 * h) * image
        if old is not None:
            x = x - 0.5 * alpha * math.expm1(-2 * h) * (h / last) * (image - old)
        x = x + noise[i] * s[i + 1] * math.sqrt(-math.expm1(-2 * h))
        old, last = image, h
    return x


def er_sde(model, x, s, noise):
    def scale(ratio):
        return ratio * (np.exp(ratio**0.3) + 10)

    s = [shift64(1 - 1e-4) if s[0] >= 1 else s[0], *s[1:]]
    ratios, old, old_slope = [sigma / (1 - sigma) for sigma in s], None, None
    for i in range(len(s) - 1):
        image = model(x, s[i])
        if s[i + 1] == 0:
            return image
        begin, end = ratios[i], ratios[i + 1]
        alpha, before, r = s[i + 1] / end, s[i] / begin, scale(end) / scale(begin)
        x = alpha / before * r * x + alpha * (1 - r) * image
        dt = end - begin
        points = end + np.arange(200) * (-dt / 200)
        if i > 0:
            slope = (image - old) / (begin - ratios[i - 1])
            x = x + alpha * (dt + (1 / scale(points)).sum() * (-dt / 200) * scale(end)) * slope
            if i > 1:
                bend = (slope - old_slope) / ((begin - ratios[i - 2]) / 2)
                weight = ((points - begin) / scale(points)).sum() * (-dt / 200)
                x = x + alpha * (dt**2 / 2 + weight * scale(end)) * bend
            old_slope = slope
        x = x + alpha * noise[i] * math.sqrt(end**2 - begin**2 * r**2)
        old = image
    return x


def res_multistep(model, x, s, noise):
    old = None
    for i in range(len(s) - 1):
        image = model(x, s[i])
        if s[i + 1] == 0 or old is None:
            x = x + (x - image) / s[i] * (s[i + 1] - s[i])
        else:
            h = -math.log(s[i + 1]) + math.log(s[i])
            c2 = (math.log(s[i]) - math.log(s[i - 1])) / h
            phi1 = math.expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * image + phi2 / c2 * old)
        old = image
    return x


def euler_ancestral(model, x, s, noise):
    """On flows `sample_euler_ancestral_RF`, eta 1."""
    for i in range(len(s) - 1):
        image = model(x, s[i])
        if s[i + 1] == 0:
            return image
        down = s[i + 1] * s[i + 1] / s[i]
        share = (1 - s[i + 1]) / (1 - down)
        x = down / s[i] * x + (1 - down / s[i]) * image
        x = share * x + noise[i] * math.sqrt(s[i + 1] ** 2 - down**2 * share**2)
    return x


def lcm(model, x, s, noise):
    for i in range(len(s) - 1):
        x = model(x, s[i])
        x = s[i + 1] * noise[i] + (1 - s[i + 1]) * x if s[i + 1] > 0 else x
    return x


def euler(model, x, s, noise):
    for i in range(len(s) - 1):
        x = x + (x - model(x, s[i])) / s[i] * (s[i + 1] - s[i])
    return x


def heun(model, x, s, noise):
    for i in range(len(s) - 1):
        d, step = (x - model(x, s[i])) / s[i], s[i + 1] - s[i]
        if s[i + 1] > 0:
            ahead = x + d * step
            d = (d + (ahead - model(ahead, s[i + 1])) / s[i + 1]) / 2
        x = x + d * step
    return x


LOOPS = {
    loop.__name__: loop for loop in (dpmpp_2m, dpmpp_2m_sde, er_sde, res_multistep, euler_ancestral, lcm, euler, heun)
}


def ours(solver, x, levels, noise, convention="comfyui"):
    draws = iter(noise.float())
    *_, last = solve(solver, velocity, x.float(), levels, lambda: next(draws), None, convention)
    return last.x.double()


@pytest.mark.parametrize("strength", [None, 0.33])
@pytest.mark.parametrize("schedule", ["simple", "beta", "karras"])
@pytest.mark.parametrize("solver", LOOPS)
@pytest.mark.sampled(7)
def test_solvers(solver, schedule, strength):
    """1e-5: the state is fp32 here, and dpmpp_2m_sde takes differences of nearly equal numbers (seen: 2.7e-6)."""
    generator = torch.Generator().manual_seed(0)
    for n in (2, 5, 25):
        x, *noise = torch.randn(n + 1, 30, 64, generator=generator, dtype=torch.float64)
        levels = comfyui.sigmas(n, SHIFT, schedule, strength=strength)
        found = ours(solver, x, comfyui.below_noise(levels, solver, SHIFT), torch.stack(noise))
        s = levels.double().tolist()
        expected = LOOPS[solver](lambda x, s: x + s * velocity(x, torch.tensor(s, dtype=torch.float64)), x, s, noise)
        assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_2m_sde", "er_sde"])
def test_solvers_that_mean_something_else_here(solver):
    x, *noise = torch.randn(9, 30, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels, noise = sigmas(8, SHIFT), torch.stack(noise)
    found = ours(solver, x, comfyui.below_noise(levels, solver, SHIFT), noise)
    own = ours(solver, x, levels, noise, "own")
    # er_sde's integrals are of the same points, half a piece apart.
    assert ((found - own).norm() / own.norm()).item() > (1e-4 if solver == "er_sde" else 1e-3)


def test_only_two_solvers_start_below_noise():
    levels = sigmas(8, SHIFT)
    assert comfyui.below_noise(levels, "dpmpp_2m", SHIFT) is levels
    assert comfyui.below_noise(levels[1:], "er_sde", SHIFT).equal(levels[1:])
    assert comfyui.below_noise(levels, "er_sde", SHIFT)[0] == torch.tensor(shifted(1 - 1e-4, SHIFT)).float() < 1
