"""Samplers against closed forms: on Gaussian data every step is linear, and its mean and variance are known."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import Oracle, generate, wanted_output
from test_guidance import unconditional

import ddpm
import reverse_diffusion as rd
from diffusion import denoiser, samplers, sampling
from diffusion.layers import Logbook
from diffusion.model_file import TrainedModel
from diffusion.options import Sampling
from diffusion.reverse import ReverseSteps
from diffusion.schedules import SCHEDULES, make_schedule
from diffusion.targets import TARGETS
from training import checkpoint

MEAN, DEVIATION = 0.2, 0.25
SLIDES = ddpm.ddpm_schedule()


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("schedule, zero_snr", [("linear", False), ("cosine", False), ("cosine", True)])
def test_times_fall_strictly_from_T_to_0(spacing, schedule, zero_snr):
    for T in 1, 2, 20:
        sched = make_schedule(schedule, 0.01, 0.01 if T == 1 else 0.3, T, zero_snr)
        for steps in range(1, T + 1):
            times = samplers.choose_times(sched, steps, spacing)
            assert len(times) == steps + 1 and times[0] == T and times[-1] == 0 and np.all(np.diff(times) < 0)
        assert list(times) == list(range(T, -1, -1))


def test_spacings_are_what_they_are_called():
    np.testing.assert_array_equal(samplers.choose_times(SLIDES, 5), [1000, 800, 600, 400, 200, 0])
    np.testing.assert_array_equal(samplers.choose_times(SLIDES, 5, "quadratic"), [1000, 640, 360, 160, 40, 0])
    times = samplers.choose_times(SLIDES, 8, "logsnr")
    ab = SLIDES.alphabar[times[:-1]]
    log_snr = np.log(ab / (1 - ab))
    assert times[-2] == 1
    np.testing.assert_allclose(np.diff(log_snr), (log_snr[-1] - log_snr[0]) / 7, atol=0.35)  # times are integers
    zero = make_schedule(schedule="cosine", zero_snr=True)  # where log-SNR is finite until T - 1
    times = samplers.choose_times(zero, 8, "logsnr")
    ab = zero.alphabar[[999, *times[1:-1]]]
    log_snr = np.log(ab / (1 - ab))
    assert times[0] == 1000 and times[-2] == 1
    np.testing.assert_allclose(np.diff(log_snr), (log_snr[-1] - log_snr[0]) / 7, atol=0.5)
    assert list(samplers.choose_times(SLIDES, 8, repeats=5)) == [1000] + [667] * 5 + [333] * 2 + [0]


def test_samplers_have_their_own_spacing_unless_asked():
    own = {"ddpm": "uniform", "ddim": "uniform", "dpm++": "logsnr", "langevin": "logsnr"}
    for (sampler, suits), asked in itertools.product(own.items(), (None, *samplers.SPACINGS)):
        expected = samplers.choose_times(SLIDES, 12, asked or suits, repeats=5 if sampler == "langevin" else 1)
        np.testing.assert_array_equal(sampling.make_plan(SLIDES, Sampling(sampler, 12, asked)).times, expected)


def test_langevin_steps_are_refused_where_noise_would_repeat():
    """Of T = 2²⁰ - 1 the noise of x_T, drawn at T + 1, would be the first further draw at t = 0."""
    for T, allowed in (2**20 - 2, True), (2**20 - 1, False):
        sched = ddpm.ddpm_schedule(1e-9, 1e-5, T)
        for how in {"sampler": "langevin"}, {"corrector": 1}:
            if allowed:
                sampling.make_plan(sched, Sampling(steps=3, **how))
            else:
                with pytest.raises(ValueError, match=f"need a T below {2**20 - 1}, got {2**20 - 1}"):
                    sampling.make_plan(sched, Sampling(steps=3, **how))


# --- a Gaussian's exact predictor -------------------------------------------------------------------------------------


def gaussian_predictor(sched, mean=MEAN, deviation=DEVIATION):
    """The best noise predictor for data N(mean, deviation²)."""
    alphabar = tf.constant(sched.alphabar, tf.float32)

    def predict(inputs):
        x_t, t_input = inputs
        t = tf.cast(tf.round(t_input * ddpm.n_steps(sched)), tf.int32)
        ab = tf.reshape(tf.gather(alphabar, t), (-1, 1, 1, 1))
        return (1 - ab) ** 0.5 * (x_t - ab**0.5 * mean) / (ab * deviation**2 + 1 - ab)

    return predict


@pytest.fixture(scope="module")
def steps():
    """One compiled step, for all samplers, numbers of steps and spacings."""
    return ReverseSteps(TrainedModel(Oracle(gaussian_predictor(SLIDES), (32, 32, 1)), SLIDES), 64, False, xla=False)


def moments_by_hand(times, sampler, variance, eta):
    """Mean and variance at the end, each sampler as its paper writes it; x_t and x̂_0 are jointly Gaussian."""
    ab, m, s = SLIDES.alphabar, MEAN, DEVIATION

    def estimate(t):  # x̂_0 = p x_t + q
        gain = ab[t] ** 0.5 * s**2 / (ab[t] * s**2 + 1 - ab[t])
        return gain, m - gain * ab[t] ** 0.5 * m

    # The state (x_t, x̂_0 of the step before): its mean, and its covariance.
    mean, covariance, h_before = np.zeros(2), np.diag([1.0, 0.0]), None
    step_sizes = langevin_step_sizes(times[1:-2]) if sampler == "langevin" else None
    for t, s_ in itertools.pairwise(times):
        p, q = estimate(t)
        a_t, s_t, a_s, s_s = ab[t] ** 0.5, (1 - ab[t]) ** 0.5, ab[s_] ** 0.5, (1 - ab[s_]) ** 0.5
        beta = 1 - ab[t] / ab[s_]
        tilde = beta * (1 - ab[s_]) / (1 - ab[t])
        noise = 0.0
        if sampler == "ddpm":  # the posterior of x_s given x_t and x_0
            x_0_factor, x_t_factor = a_s * beta / (1 - ab[t]), (1 - beta) ** 0.5 * (1 - ab[s_]) / (1 - ab[t])
            row, shift = [x_t_factor + x_0_factor * p, 0.0], x_0_factor * q
            noise = (beta if variance == "beta" else tilde) if s_ else 0.0
        elif sampler == "ddim" or (sampler == "langevin" and t == times[0]):
            square = eta**2 * tilde
            along = (1 - ab[s_] - square) ** 0.5 / s_t  # of x_t - √ᾱ_t x̂_0
            row, shift = [along + (a_s - along * a_t) * p, 0.0], (a_s - along * a_t) * q
            noise = square if s_ else 0.0
        elif s_ == 0:
            row, shift = [p, 0.0], q
        elif sampler == "langevin":  # of y = x_t / √ᾱ_t: a step of κσ² along the score -ε̂ / σ, and noise
            kappa, sigma = next(step_sizes), s_t / a_t
            row, shift = (
                [a_s * (1 / a_t - kappa * sigma * (1 - a_t * p) / s_t), 0.0],
                a_s * kappa * sigma * a_t * q / s_t,
            )
            noise = a_s**2 * 2 * kappa * sigma**2
        else:
            h = np.log(a_s / s_s) - np.log(a_t / s_t)
            extra = 0.0 if h_before is None else h / (2 * h_before)
            d_factor = a_s * -np.expm1(-h)  # D = (1 + extra) x̂_0 - extra x̂_0 before
            row, shift = [s_s / s_t + d_factor * (1 + extra) * p, -d_factor * extra], d_factor * (1 + extra) * q
            h_before = h
        matrix = np.array([row, [p, 0.0]])
        mean = matrix @ mean + [shift, q]
        covariance = matrix @ covariance @ matrix.T + np.diag([noise, 0.0])
    return mean[0], covariance[0, 0]


def langevin_step_sizes(times):
    """κ of each step: what brings n repetitions of v ← (1 - κ)² v + 2κ nearest from the level before to v = 1."""
    variances = {t: (1 - SLIDES.alphabar[t]) / SLIDES.alphabar[t] for t in times}
    levels = list(variances)
    for k, t in enumerate(levels):
        first = min(max(k, 1), len(levels) - 1)  # the first level, before which there is none, takes κ of the second
        kappa = np.linspace(0, 1, 1001) ** 2
        v = variances[levels[first - 1]] / variances[levels[first]] if first else 1.0
        for _ in range(times.count(t)):
            v = (1 - kappa) ** 2 * v + 2 * kappa
        yield from [kappa[np.argmin(np.abs(v - 1))]] * times.count(t)


SAMPLERS = [
    ("ddpm", "beta", 0.0),
    ("ddpm", "posterior", 0.0),
    ("ddim", None, 0.0),
    ("ddim", None, 0.6),
    ("ddim", None, 1.0),
    ("dpm++", None, 0.0),
    ("langevin", None, 0.0),
]


@pytest.mark.parametrize("count, spacing", [(5, None), (10, "logsnr"), (50, "uniform"), (250, "quadratic")])
@pytest.mark.parametrize("sampler, variance, eta", SAMPLERS)
def test_mean_and_variance_match_the_formulas_of_the_papers(steps, sampler, variance, eta, count, spacing):
    plan = sampling.make_plan(SLIDES, Sampling(sampler, count, spacing, eta, variance))
    *_, (t, x_0) = sampling.sample(steps, plan, 3, range(64))
    mean, square = moments_by_hand([int(t) for t in plan.times], sampler, variance, eta)
    x_0 = x_0.numpy()
    assert t == 0 and x_0.mean() == pytest.approx(mean, abs=5 * (square / x_0.size) ** 0.5 + 1e-4)
    assert x_0.var() == pytest.approx(square, rel=5 * (2 / x_0.size) ** 0.5)


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance():
    for count in 7, 1000:
        times = samplers.choose_times(SLIDES, count)
        one = samplers.coefficients(SLIDES, times, "ddim", eta=1.0)
        np.testing.assert_allclose(one, samplers.coefficients(SLIDES, times, "ddpm", "posterior"), atol=1e-7)


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm++", 2)])
def test_samplers_without_noise_converge_with_their_order(sampler, order):
    """From x_T to t = 1 in steps that are equal in log-SNR; the flow scales x_t - √ᾱ_t m with its deviation."""
    ab_1, ab_T = SLIDES.alphabar[1], SLIDES.alphabar[-1]
    ends, x_T, errors = np.log([ab_T / (1 - ab_T), ab_1 / (1 - ab_1)]), np.array([-1.5, 0.3, 2.0]), []
    for count in 40, 80, 160:
        sched = ddpm.Schedule()
        sched.alphabar = 1 / (1 + np.exp(-np.linspace(*ends, count + 1)))[::-1]  # its own times, count … 0
        times, x, before = np.arange(count, -1, -1), x_T.copy(), 0.0
        coefficients = samplers.coefficients(sched, times, sampler).astype(np.float64)
        for t, (a, b, sigma, c, *_) in zip(times, coefficients, strict=False):
            ab = sched.alphabar[t]
            eps = (1 - ab) ** 0.5 * (x - ab**0.5 * MEAN) / (ab * DEVIATION**2 + 1 - ab)
            x_0 = (x - (1 - ab) ** 0.5 * eps) / ab**0.5
            x, before = a * x_0 + b * eps + c * (x_0 - before), x_0
            assert sigma == 0
        scale = [(ab * DEVIATION**2 + 1 - ab) ** 0.5 for ab in (ab_T, ab_1)]
        exact = ab_1**0.5 * MEAN + (x_T - ab_T**0.5 * MEAN) * scale[1] / scale[0]
        errors.append(np.abs(x - exact).max())
    for larger, smaller in itertools.pairwise(errors):
        assert np.log2(larger / smaller) == pytest.approx(order, abs=0.25)


def test_dpm_solver_is_first_order_in_its_first_and_last_step():
    coefficients = samplers.coefficients(SLIDES, samplers.choose_times(SLIDES, 6), "dpm++")
    assert np.all(coefficients[[0, -1], 3] == 0) and np.all(coefficients[1:-1, 3] > 0)


@pytest.mark.parametrize("target, asked, s", [("eps", 1, 100), ("v", 1, 100), ("x0", 14, 100)])
def test_an_inversion_begins_with_the_image_itself(target, asked, s):
    """x_s = √ᾱ_s x_0 + √(1 - ᾱ_s) ε̂, although x̂_0 is estimated from x_0 in the place of x_t."""
    plan = sampling.make_inversion(SLIDES, 10, target)
    (a, b, *rest), ab_asked, ab_s = plan.coefficients[0], *SLIDES.alphabar[[asked, s]]
    assert plan.lowest == asked and list(plan.times[:2]) == [0, s]
    x_0, eps = 0.7, -1.3
    estimate = (x_0 - (1 - ab_asked) ** 0.5 * eps) / ab_asked**0.5
    assert a * estimate + b * eps == pytest.approx(ab_s**0.5 * x_0 + (1 - ab_s) ** 0.5 * eps, rel=1e-6)
    assert not any(rest)


def test_each_step_is_one_network_call_without_a_new_trace(steps):
    calls = []

    def counting(inputs):
        tf.numpy_function(lambda t: calls.append(float(t[0, 0])) or np.int64(0), [inputs[1]], tf.int64)
        return inputs[0]

    sched = ddpm.ddpm_schedule(0.01, 0.3, 20)
    counting_steps = ReverseSteps(TrainedModel(Oracle(counting, (2, 2, 1)), sched), 1, xla=False)
    for count, sampler, eta in (5, "ddim", 0.5), (7, "dpm++", 0.0), (20, "ddpm", 0.0), (12, "langevin", 0.0):
        for corrector in (0,) if sampler == "langevin" else (0, 2):
            calls.clear()
            plan = sampling.make_plan(sched, Sampling(sampler, count, eta=eta, corrector=corrector))
            list(sampling.sample(counting_steps, plan, 0, [0]))
            np.testing.assert_allclose(calls, plan.times[:-1] / 20, rtol=1e-6)
            assert len(calls) == count + corrector * (count - 1)  # no correction of x_0
    assert counting_steps._take.experimental_get_tracing_count() == 1


# --- the score view ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_score_is_the_slope_of_the_log_density_for_every_target(target):
    t, x_t = 300, np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    ab = SLIDES.alphabar[t]
    variance = ab * DEVIATION**2 + 1 - ab

    def predict(inputs):
        eps = gaussian_predictor(SLIDES)(inputs)
        times = tf.constant([t, t])
        x_0 = ddpm.predict_x0(inputs[0], times, eps, SLIDES)
        return wanted_output(x_0, times, eps, SLIDES, target)

    score = denoiser.score(denoiser.denoiser(predict, SLIDES, target), SLIDES)
    slope = -(x_t.astype(np.float64) - ab**0.5 * MEAN) / variance
    np.testing.assert_allclose(score(x_t, tf.constant([t, t])), slope, rtol=1e-4, atol=1e-5)


def test_a_correction_is_a_langevin_step_along_the_score():
    """Song et al. 2021, algorithm 5, in float64; each image has its own step size."""
    rng, snr, t = np.random.default_rng(1), 0.2, 400
    x_t, z, before = rng.standard_normal((3, 2, 4, 4, 1)) * np.array([1.0, 3.0])[:, None, None, None]
    times, coefficients = samplers.with_corrector(
        SLIDES, np.array([1000, t, 0]), np.zeros((2, samplers.COLUMNS), np.float32), 1, snr
    )
    assert list(times) == [1000, t, t, 0] and not coefficients[[0, 2]].any()
    denoise = denoiser.denoiser(gaussian_predictor(SLIDES), SLIDES)
    tensors = [tf.constant(array, tf.float32) for array in (x_t, z, before)]
    x_s, memory = samplers.step(denoise, tensors[0], tf.constant([t, t]), coefficients[1], *tensors[1:])

    ab, alpha = SLIDES.alphabar[t], SLIDES.alphabar[t] / SLIDES.alphabar[t - 1]
    g = -(x_t - ab**0.5 * MEAN) / (ab * DEVIATION**2 + 1 - ab)
    for k in range(2):
        epsilon = 2 * alpha * (snr * np.linalg.norm(z[k]) / np.linalg.norm(g[k])) ** 2
        expected = x_t[k] + epsilon * g[k] + (2 * epsilon) ** 0.5 * z[k]
        np.testing.assert_allclose(x_s[k], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(memory, tensors[2])  # DPM-Solver++ goes on from the estimate of its own last step
    plans = [
        sampling.make_plan(SLIDES, Sampling(steps=4, corrector=1, **how)) for how in ({}, {"snr": 0.16})
    ]  # as in the paper
    np.testing.assert_array_equal(*(plan.coefficients for plan in plans))


@pytest.mark.parametrize("snr", [0.16, 0.5])
def test_corrections_of_a_gaussian_reach_stationary_variance(steps, snr):
    """v / (1 - ε/2v), with ε = 2α(snr ‖z‖ / ‖score‖)² for the norms that such images have."""
    t = 300
    start = samplers.coefficients(SLIDES, np.array([1000, t, 0]))
    plan = sampling.Plan(*samplers.with_corrector(SLIDES, np.array([1000, t, 0]), start, 400, snr))
    found = [x_t.numpy() for time, x_t in sampling.sample(steps, plan, 0, range(64)) if time == t][20:]
    ab, alpha = SLIDES.alphabar[t], SLIDES.alphabar[t] / SLIDES.alphabar[t - 1]
    v = ab * DEVIATION**2 + 1 - ab
    measured = np.mean([(x - ab**0.5 * MEAN) ** 2 for x in found])
    epsilon = 2 * alpha * snr**2 * v**2 / measured
    assert measured == pytest.approx(v / (1 - epsilon / (2 * v)), rel=0.01)
    assert measured == pytest.approx(v * (1 + alpha * snr**2), rel=0.01)  # solved for the variance


def test_corrections_that_move_nothing_change_no_sampler(steps):
    """Also not the noise of ddpm: at each t draw 0 belongs to the step that leaves it."""
    for sampler in "ddpm", "ddim", "dpm++":
        ends = []
        for how in {}, {"corrector": 2, "snr": 1e-6}:
            plan = sampling.make_plan(SLIDES, Sampling(sampler, 8, **how))
            ends.append(list(sampling.sample(steps, plan, 0, range(64)))[-1][1].numpy())
        np.testing.assert_allclose(*ends, atol=2e-5)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_langevin_adds_noise_in_all_but_first_and_last_steps(schedule, zero_snr):
    plan = sampling.make_plan(make_schedule(schedule=schedule, zero_snr=zero_snr), Sampling("langevin", 31))
    assert len(plan.coefficients) == 31 and np.all(np.isfinite(plan.coefficients))
    np.testing.assert_array_equal(plan.coefficients[:, 2] > 0, [0] + 29 * [1] + [0])


def test_a_single_langevin_step_at_a_level_has_the_closed_form():
    """(1 - κ)² γ² + 2κ is least at κ = 1 - 1/γ²."""
    t = np.array([900, 600, 500])
    variances = (1 - SLIDES.alphabar[t]) / SLIDES.alphabar[t]
    kappa = samplers.langevin_step_sizes(SLIDES, t)
    np.testing.assert_allclose(kappa[1:], 1 - variances[1:] / variances[:-1], atol=1.5e-3)


# --- what every sampler keeps to --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, schedule, zero_snr, clip",
    [
        *itertools.product(["eps", "x0", "v"], ["linear", "cosine", "sigmoid"], [False], [True]),
        *itertools.product(["x0", "v"], ["linear", "cosine"], [True], [True]),
        *[("flow", "cosine", False, True), ("flow", "flow", True, True)],
        *[("eps", "cosine", False, False), ("x0", "linear", True, False), ("v", "sigmoid", False, False)],
        ("flow", "flow", True, False),
    ],
)
def test_every_sampler_keeps_to_the_contract(target, schedule, zero_snr, clip):
    """For grey images that are not square."""
    sched = make_schedule(schedule, 0.01, 0.3, 20, zero_snr)
    oracle = Oracle(lambda inputs: tf.sin(3 * inputs[0] + inputs[1][:, None, None]), (8, 4, 1))
    steps = ReverseSteps(TrainedModel(oracle, sched, target), 3, clip, xla=False)

    def end(index=(0, 1, 2), seed=1, **how):
        *_, (t, x_0) = sampling.sample(steps, sampling.make_plan(sched, Sampling(**how)), seed, index)
        assert t == 0 and x_0.dtype == tf.float32
        return x_0.numpy()

    ways = [{"sampler": sampler, "variance": variance, "eta": eta} for sampler, variance, eta in SAMPLERS]
    for way in [*ways, {"corrector": 2}, {"sampler": "dpm++", "corrector": 1, "snr": 0.05}]:
        how = {**way, "steps": 6}
        images = end(**how)
        assert images.shape == (3, 8, 4, 1) and np.all(np.isfinite(images))
        np.testing.assert_array_equal(images, end(**how))
        assert np.any(images != end(seed=2, **how))
        np.testing.assert_allclose(images[[2, 0, 1]], end((2, 0, 1), **how), rtol=1e-3, atol=1e-3)
        if clip:
            assert np.abs(images).max() <= 1  # the last step is the estimate of x_0

    start = tf.random.stateless_normal((3, 8, 4, 1), (0, 1))
    for sampler in "ddim", "dpm++":  # without noise only x_T matters
        plan = sampling.make_plan(sched, Sampling(sampler, 6))
        ends = [list(sampling.sample(steps, plan, seed, range(3), start))[-1][1].numpy() for seed in (1, 2)]
        np.testing.assert_array_equal(*ends)
    posterior = end(variance="posterior")
    np.testing.assert_allclose(posterior, end(sampler="ddim", eta=1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clipping_bounds_the_image_and_adapts_the_noise(schedule):
    sched = make_schedule(schedule, 0.01, 0.3, 20)
    target = "eps" if sched.alphabar[-1] > 0 else "v"
    denoise = denoiser.clipped(denoiser.denoiser(lambda inputs: 8 * inputs[0], sched, target), sched)
    x_t = tf.random.stateless_normal((20, 8, 8, 1), (0, 1))
    x_0, eps = (values.numpy().astype(np.float64) for values in denoise(x_t, tf.range(1, 21))[:2])
    ab = sched.alphabar[1:, None, None, None]
    assert np.abs(x_0).max() <= 1 and np.mean(np.abs(x_0) == 1) > 0.4
    np.testing.assert_allclose(ab**0.5 * x_0 + (1 - ab) ** 0.5 * eps, x_t, atol=1e-5)


def test_bfloat16_samples_are_near_float32_samples():
    image, t = keras.Input((8, 8, 3)), keras.Input((1,))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="tanh")(image)
    x = keras.layers.Add()([x, keras.layers.Reshape((1, 1, 8))(keras.layers.Dense(8)(t))])
    model = keras.Model([image, t], keras.layers.Conv2D(3, 3, padding="same", dtype="float32")(x))
    sched, target, ends = ddpm.ddpm_schedule(0.01, 0.3, 20), "eps", {}
    for precision in "float32", "bfloat16":
        checkpoint.set_precision(model, precision)
        model_steps = ReverseSteps(TrainedModel(model, sched, target), 2)
        for sampler in "ddpm", "ddim", "dpm++":
            *_, (_, x_0) = sampling.sample(model_steps, sampling.make_plan(sched, Sampling(sampler, 5)), 0, range(2))
            assert x_0.dtype == tf.float32
            ends[precision, sampler] = x_0.numpy()
    for sampler in "ddpm", "ddim", "dpm++":
        difference = np.abs(ends["float32", sampler] - ends["bfloat16", sampler])
        assert 0 < difference.mean() < 0.1


def test_an_inversion_leads_to_the_noise_that_leads_back():
    x_0 = np.clip(MEAN + DEVIATION * np.random.default_rng(0).standard_normal((1, 16, 16, 1)), -1, 1).astype(np.float32)
    predictor, asked = gaussian_predictor(SLIDES), []

    def recording(inputs):
        tf.numpy_function(lambda t: asked.append(round(1000 * float(t[0, 0]))) or np.int64(0), [inputs[1]], tf.int64)
        return predictor(inputs)

    errors = []
    for count in 50, 400:
        asked.clear()
        plan, back = sampling.make_inversion(SLIDES, count), sampling.make_plan(SLIDES, Sampling("ddim", count))
        *_, (t, x_T) = generate(recording, SLIDES, (16, 16, 1), 1, clip=False, plan=plan, start=tf.constant(x_0))
        assert t == 1000 and asked[0] == 1 and asked[1:] == list(plan.times[1:-1])
        *_, (_, again) = generate(predictor, SLIDES, (16, 16, 1), 1, clip=False, plan=back, start=tf.constant(x_T))
        errors.append(np.abs(again - x_0).max())
    assert errors[1] < 0.2 * errors[0] and errors[1] < 0.03
    assert abs(x_T.mean()) < 0.3 and x_T.std() == pytest.approx(1, abs=0.15)


def test_an_inversion_of_estimated_images_is_noise():
    """The x̂_0 of a Gaussian, but off by 2 % of the range: at t = 1 that alone would be noise of deviation 4."""
    off = 0.04 * np.sign(np.random.default_rng(1).standard_normal((1, 16, 16, 1))).astype(np.float32)
    exact = gaussian_predictor(SLIDES)

    def predict(inputs):
        ab = tf.gather(tf.constant(SLIDES.alphabar, tf.float32), tf.cast(tf.round(1000 * inputs[1]), tf.int32))
        ab = ab[:, :, None, None]
        x_0 = (inputs[0] - tf.sqrt(1 - ab) * exact(inputs)) / tf.sqrt(ab) + off
        return (inputs[0] - tf.sqrt(ab) * x_0) / tf.sqrt(1 - ab)

    x_0 = np.clip(MEAN + DEVIATION * np.random.default_rng(0).standard_normal((1, 16, 16, 1)), -1, 1).astype(np.float32)
    deviation = {}
    for target in "x0", "eps":
        plan = sampling.make_inversion(SLIDES, 20, target)
        *_, (_, x_T) = generate(predict, SLIDES, (16, 16, 1), 1, clip=False, plan=plan, start=tf.constant(x_0))
        deviation[target] = float(np.std(x_T))
    assert 0.8 < deviation["x0"] < 1.4 and deviation["eps"] > 2


def test_inversion_plans_exist_for_every_schedule_and_count():
    for sched in (
        ddpm.ddpm_schedule(1e-4, 1e-4, 1),
        ddpm.ddpm_schedule(1e-4, 1e-3, 3),
        ddpm.ddpm_schedule(0.3, 0.5, 4),
        make_schedule(T=50, schedule="cosine", zero_snr=True),
    ):
        T = ddpm.n_steps(sched)
        for steps in range(1, T + 1):
            plan = sampling.make_inversion(sched, steps, "x0")
            assert plan.times[0] == 0 and plan.times[-1] == T and np.all(np.diff(plan.times) >= 0)
            assert 1 <= plan.lowest <= plan.times[1] and len(plan.coefficients) == len(plan.times) - 1


def test_an_inversion_clips_no_estimate():
    """DDIM from t = 0 to T in float64, for a network whose estimates leave [-1, 1]."""
    image, t = keras.Input((2, 2, 1)), keras.Input((1,))
    entries = {"diffusion": {"beta1": 0.1, "beta2": 0.3, "T": 4}}
    t_image = keras.layers.Reshape((1, 1, 1))(Logbook(entries)(t))
    model = keras.Model([image, t], keras.layers.Add()([keras.layers.Rescaling(-0.8)(image), t_image]))
    ab = np.cumprod(np.append(1, 1 - np.linspace(0.1, 0.3, 4)))
    x_0 = np.linspace(-1, 1, 4).reshape(1, 2, 2, 1)
    x, estimates = x_0, []

    def estimate(x, t):
        eps = -0.8 * x + t / 4
        estimates.append((x - (1 - ab[t]) ** 0.5 * eps) / ab[t] ** 0.5)
        return estimates[-1], eps

    for t, s in itertools.pairwise(range(5)):
        guess, eps = estimate(x, max(t, 1))
        there = ab[s] ** 0.5 * (guess if t else x_0) + (1 - ab[s]) ** 0.5 * eps
        if t:  # x_t = √ᾱ_t x̂_0 + √(1 - ᾱ_t) ε̂ with the x̂_0 of x_s, solved for ε̂
            guess, _ = estimate(there, s)
            there = ab[s] ** 0.5 * guess + (1 - ab[s]) ** 0.5 * (x - ab[t] ** 0.5 * guess) / (1 - ab[t]) ** 0.5
        x = there
    assert np.abs(estimates).max() > 1.2
    np.testing.assert_allclose(rd.invert(x_0.astype(np.float32), model, verbose=0), x, atol=1e-5)


def test_my_sample_and_invert_take_arrays(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder)
    images = np.load("images.npy")[:2]
    noise = rd.invert(images, steps=10, verbose=0)
    assert noise.dtype == np.float32 and noise.shape == images.shape
    np.testing.assert_allclose(noise, rd.invert(images / np.float32(127.5) - 1, steps=10, verbose=0), atol=1e-5)
    one, other = (rd.my_sample(noise=tf.constant(noise), sampler="ddim", seed=k, verbose=0, clip=False) for k in (1, 2))
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - images.astype(int)).mean() < 40  # of a network that has hardly been trained
    how = {"n_sample": 2, "steps": 5, "seed": 3, "verbose": 0, "clip": False}
    few = rd.my_sample(sampler="dpm++", **how)
    assert few.shape == images.shape and np.any(few != rd.my_sample(**how))


def test_images_of_0_to_1_are_warned_of_once(capsys):
    model, images = unconditional(0.1), np.full((2, 2, 2, 1), 0.5, np.float32)
    for given, verbose, said in (
        (images, 1, True),
        (images, 0, False),
        (images - 1, 1, False),
        (np.full((2, 2, 2, 1), 1, np.uint8), 1, False),
    ):
        rd.invert(given, model, steps=2, verbose=verbose)
        error = capsys.readouterr().err
        assert len(error.splitlines()) == said and ("2 * images - 1" in error) == said


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"sampler": "euler"}, "ddpm, ddim, dpm\\+\\+, langevin, got 'euler'"),
        ({"steps": 21}, "from 1 to 20, .*got 21"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"spacing": "uniform", "sampler": "ddpm"}, "spacing uniform has no effect with all T steps"),
        ({"spacing": "cubic", "steps": 5}, "uniform, quadratic, logsnr, got 'cubic'"),
        ({"sampler": "ddim", "eta": 1.5}, "eta must be a number from 0 to 1, got 1.5"),
        ({"sampler": "ddim", "eta": float("nan")}, "from 0 to 1, got nan"),
        (
            {"sampler": "dpm++", "eta": 0.5},
            "eta applies only to sampler ddim, and the sampler is dpm\\+\\+; omit eta, or choose ddim",
        ),
        ({"eta": 0.5}, "the sampler is ddpm; omit eta"),
        ({"corrector": -1}, "corrector must be an integer from 0 to 4095, got -1"),
        ({"corrector": 1.5}, "got 1.5"),
        ({"corrector": 1, "snr": 0}, "snr must be a number from 1e-06 to 10, got 0"),
        ({"corrector": 1, "snr": "0.1"}, "got '0.1'"),
        ({"noise": np.zeros((1, 32, 32, 3), np.uint8)}, "finite floating-point numbers, got uint8"),
        ({"noise": np.full((1, 32, 32, 3), 1e300)}, "finite floating-point numbers, got float64"),
        ({"sampler": ""}, "langevin, got ''"),
        ({"corrector": 1, "snr": float("nan")}, "got nan"),
        (
            {"corrector": 1, "sampler": "langevin"},
            "corrector applies only to sampler ddpm, ddim or dpm.., and the sampler is langevin",
        ),
        ({"noise": np.zeros((2, 32, 32, 1), np.float32)}, r"noise must be an array of shape \(n, 32, 32, 3\), .* \(2,"),
        ({"noise": np.zeros((32, 32, 3), np.float32)}, r"shape \(n, 32, 32, 3\), n at least 1, got \(32, 32, 3\)"),
        ({"noise": 3}, r"shape \(n, 32, 32, 3\), n at least 1, got \(\)"),
        (
            {"noise": np.zeros((3, 32, 32, 3), np.float32), "n_sample": 2},
            "for 3 images, so n_sample must be 3 or omitted, got 2",
        ),
        ({"noise": np.full((1, 32, 32, 3), "a")}, "array of finite floating-point numbers, got <U1"),
        ({"noise": np.full((1, 32, 32, 3), np.nan)}, "array of finite floating-point numbers, got float64"),
        ({"steps": 2.5}, "integer of at least 1, got 2.5"),
        ({"sampler": "ddim", "eta": None}, "from 0 to 1, got None"),
        ({"image_shape": 64}, "image_shape must be \\(32, 32, 3\\) .*got 64"),
        ({"model": None}, "a path, or a Keras model that has been built, got NoneType"),
        ({"model": "."}, "is a folder"),
    ],
)
def test_impossible_sampling_arguments_get_one_sentence(trained, wrong, words):
    with pytest.raises(ValueError, match=words):
        rd.my_sample(**{"model": str(trained[0] / "model.keras"), "verbose": 0, **wrong})


@pytest.mark.parametrize(
    "images, words",
    [
        (
            np.zeros((1, 32, 32, 1), np.uint8),
            r"images must be an array of shape \(n, 32, 32, 3\), .* got \(1, 32, 32, 1\)",
        ),
        (np.full((1, 32, 32, 3), 300), "0 … 255, got 300"),
        (np.full((1, 32, 32, 3), 1.5), "-1 … 1, got 1.5"),
        (np.full((1, 32, 32, 3), np.nan), "finite numbers"),
        (np.zeros((0, 32, 32, 3)), "shape"),
    ],
)
def test_images_that_cannot_be_inverted_are_one_sentence(trained, images, words):
    with pytest.raises(ValueError, match=words):
        rd.invert(images, str(trained[0] / "model.keras"), verbose=0)
