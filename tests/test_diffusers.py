"""Every sampler beside its counterpart in diffusers of Hugging Face: the same network, noise and times, at every step.

Their timestep k is our t = k + 1. Given our ᾱ in float64 they agree to the rounding of float32; their own tables are
float32 throughout.
"""

import numpy as np
import pytest
import tensorflow as tf
from conftest import generate

import ddpm
from diffusion import sampling
from diffusion.options import Sampling

diffusers = pytest.importorskip("diffusers", reason="needs diffusers, see requirements-optional.txt")
torch = pytest.importorskip("torch")

SHAPE, COUNT, SEED, T = (4, 4, 1), 3, 5, 1000
SLIDES = ddpm.ddpm_schedule(T=T)
BETAS = {"num_train_timesteps": T, "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}


def network(x, fraction, sin):
    """ε̂ of a network that nobody trained: x and t/T mixed."""
    return 0.9 * x + 0.2 * sin(5 * x + fraction)


def ours(**how):
    """x_t at every time."""
    clip = how.pop("clip")
    plan = sampling.make_plan(SLIDES, Sampling(spacing="uniform", **how))

    def predict(inputs):
        return network(inputs[0], inputs[1][:, :, None, None], tf.sin)

    states = generate(predict, SLIDES, SHAPE, COUNT, SEED, clip=clip, plan=plan, every=True)
    return plan.times, [x_t for _, x_t in states]


def theirs(scheduler, x, times, monkeypatch, own_tables, **step_options):
    """x_t after each of their steps, in float64."""
    if not own_tables:
        scheduler.alphas_cumprod = torch.tensor(SLIDES.alphabar[1:])
    scheduler.set_timesteps(len(times) - 1)
    assert [int(k) + 1 for k in scheduler.timesteps] == list(times[:-1])
    if not own_tables and hasattr(scheduler, "sigmas"):
        ab = SLIDES.alphabar[times]
        scheduler.sigmas = torch.tensor(((1 - ab) / ab) ** 0.5)
    x, states = torch.tensor(np.asarray(x, np.float64)), []
    for k, s in zip(scheduler.timesteps, times[1:], strict=True):
        z = sampling.standard_normal(SEED, int(k) + 1, range(COUNT), SHAPE).numpy().astype(np.float64)
        z = torch.tensor(z if s > 0 else 0 * z)  # with strides their DDPM adds noise to x_0
        for module in diffusers.schedulers.scheduling_ddpm, diffusers.schedulers.scheduling_ddim:
            monkeypatch.setattr(module, "randn_tensor", lambda *shape, z=z, **more: z)
        predicted = network(x, (int(k) + 1) / T, torch.sin)
        x = scheduler.step(predicted, k, x, **step_options).prev_sample
        states.append(x.numpy())
    return states


def check(scheduler, monkeypatch, own_tables, steps, step_options=None, **how):
    times, mine = ours(steps=steps, **how)
    peers = theirs(scheduler, mine[0], times, monkeypatch, own_tables, **(step_options or {}))
    for one, other in zip(mine[1:], peers, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=(3e-4 if own_tables else 1e-5) * max(1, np.abs(one).max()))


@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("steps", [10, 50, 1000])
@pytest.mark.parametrize("variance, theirs", [("beta", "fixed_large"), ("posterior", "fixed_small")])
def test_ddpm(monkeypatch, variance, theirs, steps, own_tables):
    scheduler = diffusers.DDPMScheduler(**BETAS, variance_type=theirs, clip_sample=True)
    check(scheduler, monkeypatch, own_tables, steps, variance=variance, clip=True)


@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("eta, clip", [(0.0, True), (0.0, False), (0.5, True), (1.0, True)])
def test_ddim(monkeypatch, eta, clip, own_tables):
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=clip, set_alpha_to_one=True)
    step_options = {"eta": eta, "use_clipped_model_output": clip}
    check(scheduler, monkeypatch, own_tables, 50, step_options, sampler="ddim", eta=eta, clip=clip)


@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_dpm_solver(monkeypatch, steps, own_tables):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )
    check(scheduler, monkeypatch, own_tables, steps, sampler="dpm++", clip=False)
