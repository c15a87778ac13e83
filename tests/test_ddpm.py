"""The mathematics against independent computations: closed forms, Bayes' rule on a grid, simulation."""

import itertools
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, generate, wanted_output

import ddpm
from diffusion import reverse, samplers, targets
from diffusion.denoiser import denoiser
from diffusion.sampling import standard_normal
from diffusion.schedules import SCHEDULES, make_schedule

BETA1, BETA2, T = 1e-4, 0.02, 1000


@pytest.fixture(scope="module")
def sched():
    return ddpm.ddpm_schedule(BETA1, BETA2, T)


def exact(T=T, beta1=BETA1, beta2=BETA2):
    """β, α and ᾱ for t = 0 … T in Python's own floats, one product after the other."""
    beta = [0.0] + [beta1 + (beta2 - beta1) * k / max(T - 1, 1) for k in range(T)]
    alpha = [1 - b for b in beta]
    alphabar = [1.0]
    for a in alpha[1:]:
        alphabar.append(alphabar[-1] * a)
    return np.array(beta), np.array(alpha), np.array(alphabar)


def images(value, n=1):
    return tf.fill((n, 1, 1, 1), tf.constant(value, tf.float32))


def steps(*t):
    return tf.constant(t, tf.int32)


def test_tables_match_the_formulas_in_float64(sched):
    beta, alpha, alphabar = exact()
    before = np.concatenate([[1], alphabar[:-1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = {
            "beta_t": beta,
            "alpha_t": alpha,
            "alphabar_t": alphabar,
            "sqrtab": alphabar**0.5,
            "sqrtmab": (1 - alphabar) ** 0.5,
            "oneover_sqrta": alpha**-0.5,
            "mab_over_sqrtmab": (1 - alpha) / (1 - alphabar) ** 0.5,
            "sqrt_beta_t": beta**0.5,
            "posterior_variance": beta * (1 - before) / (1 - alphabar),
            "posterior_mean_coef1": before**0.5 * beta / (1 - alphabar),
            "posterior_mean_coef2": alpha**0.5 * (1 - before) / (1 - alphabar),
        }
    assert sched.keys() == expected.keys()
    for name, table in expected.items():
        assert sched[name].dtype == np.float32 and sched[name].shape == (T + 1,)
        np.testing.assert_allclose(sched[name][1:], table[1:], rtol=3e-7, atol=1e-12, err_msg=name)
    assert sched.alphabar.dtype == np.float64
    np.testing.assert_allclose(sched.alphabar, alphabar, rtol=1e-12)


def test_index_zero_is_the_clean_image(sched):
    zero = {name: table[0] for name, table in sched.items()}
    assert zero == {
        "beta_t": 0,
        "alpha_t": 1,
        "alphabar_t": 1,
        "sqrtab": 1,
        "sqrtmab": 0,
        "oneover_sqrta": 1,
        "mab_over_sqrtmab": 0,
        "sqrt_beta_t": 0,
        "posterior_variance": 0,
        "posterior_mean_coef1": 0,
        "posterior_mean_coef2": 1,
    }


def test_known_values_of_the_slides_schedule(sched):
    assert sched["beta_t"][1] == np.float32(1e-4) and sched["beta_t"][T] == np.float32(0.02)
    assert sched["sqrtab"][T] == pytest.approx(0.0063528, abs=5e-8)
    assert sched["posterior_variance"][1] == 0
    assert sched["posterior_variance"][2] / sched["beta_t"][2] == pytest.approx(0.4547, abs=1e-4)


def test_a_single_step_is_a_schedule():
    assert ddpm.ddpm_schedule(0.5, 0.5, 1)["alphabar_t"].tolist() == [1, 0.5]


@pytest.mark.parametrize(
    "beta1, beta2, T",
    [
        (0, 0.02, 10),
        (-0.1, 0.02, 10),
        (1e-4, 1, 10),
        (0.03, 0.02, 10),
        (float("nan"), 0.02, 10),
        (1e-4, float("nan"), 10),
        (1e-4, 0.02, 0),
        (1e-4, 0.02, -3),
        (1e-4, 0.02, 2.5),
        (1e-4, 0.02, float("nan")),
        (1e-4, 0.02, float("inf")),
        (1e-4, 0.02, 1),
    ],
)
def test_an_impossible_schedule_is_refused_in_a_sentence(beta1, beta2, T):
    with pytest.raises(ValueError, match=r"^(beta1|beta2|T) .*(must|single step)"):
        ddpm.ddpm_schedule(beta1, beta2, T)


def test_noising_in_one_go_is_the_chain_of_small_steps(sched):
    rng = np.random.default_rng(0)
    beta, _, _ = exact()
    n, x_0 = 200_000, 0.7
    x = np.full(n, x_0)
    for t in range(1, 301):
        x = np.sqrt(1 - beta[t]) * x + np.sqrt(beta[t]) * rng.standard_normal(n)
        if t in (1, 2, 50, 300):
            mean = ddpm.q_sample(images(x_0), steps(t), images(0), sched).numpy().item()
            deviation = ddpm.q_sample(images(0), steps(t), images(1), sched).numpy().item()
            assert x.mean() == pytest.approx(mean, abs=5 * deviation / n**0.5)
            assert x.std() == pytest.approx(deviation, rel=5 / (2 * n) ** 0.5)


def test_every_image_has_its_own_t(sched):
    x_0, eps = tf.random.stateless_normal((3, 4, 5, 2), (0, 1)), tf.random.stateless_normal((3, 4, 5, 2), (0, 2))
    together = ddpm.q_sample(x_0, steps(1, 500, 1000), eps, sched)
    for k, t in enumerate((1, 500, 1000)):
        alone = ddpm.q_sample(x_0[k : k + 1], steps(t), eps[k : k + 1], sched)
        np.testing.assert_array_equal(together[k], alone[0])


def test_predict_x0_undoes_q_sample(sched):
    x_0, eps = (
        tf.random.stateless_uniform((4, 8, 8, 3), (0, 1), -1, 1),
        tf.random.stateless_normal((4, 8, 8, 3), (0, 2)),
    )
    t = steps(0, 1, 300, 700)
    back = ddpm.predict_x0(ddpm.q_sample(x_0, t, eps, sched), t, eps, sched)
    np.testing.assert_allclose(back, x_0, atol=2e-5)


def bayes(t, x_t, x_0):
    """Mean and variance of q(x_{t-1} | x_t, x_0) by Bayes' rule, summed over a fine grid."""
    beta, alpha, alphabar = exact()
    centre, spread = alphabar[t - 1] ** 0.5 * x_0, (1 - alphabar[t - 1]) ** 0.5
    x = np.linspace(centre - 12 * spread, centre + 12 * spread, 400_001)
    log = -((x - centre) ** 2) / (2 * spread**2) - (x_t - alpha[t] ** 0.5 * x) ** 2 / (2 * beta[t])
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    mean = (weight * x).sum()
    return mean, (weight * (x - mean) ** 2).sum()


@pytest.mark.parametrize("t", [2, 3, 10, 500, 1000])
@pytest.mark.parametrize("clip", [True, False])
def test_one_reverse_step_with_the_true_noise_is_bayes_rule(sched, t, clip):
    _, _, alphabar = exact()
    x_0, eps = 0.4, -0.8
    x_t = alphabar[t] ** 0.5 * x_0 + (1 - alphabar[t]) ** 0.5 * eps
    mean, variance = bayes(t, x_t, x_0)

    def step(z):
        return ddpm.p_sample(images(x_t), steps(t), images(eps), images(z), sched, "posterior", clip).numpy().item()

    assert step(0.0) == pytest.approx(mean, abs=3e-5)  # x_0 by way of √ᾱ_t, in float32
    assert step(1.0) - step(0.0) == pytest.approx(variance**0.5, rel=1e-4, abs=1e-6)


def test_the_variance_of_the_slides_is_beta(sched):
    z = images(1.0)
    with_noise = ddpm.p_sample(images(0.1), steps(700), images(0.2), z, sched)
    without = ddpm.p_sample(images(0.1), steps(700), images(0.2), 0 * z, sched)
    assert (with_noise - without).numpy().item() == pytest.approx(exact()[0][700] ** 0.5, rel=1e-5)


def test_the_mean_without_clipping_is_the_formula_of_the_slides(sched):
    beta, alpha, alphabar = exact()
    x_t, eps, t = 1.3, 0.6, 400
    expected = (x_t - (1 - alpha[t]) / (1 - alphabar[t]) ** 0.5 * eps) / alpha[t] ** 0.5
    mean = ddpm.p_sample(images(x_t), steps(t), images(eps), images(0.0), sched, clip=False)
    assert mean.numpy().item() == pytest.approx(expected, rel=1e-6)


def test_clipping_bounds_the_estimate_of_the_image(sched):
    _, alpha, alphabar = exact()
    t, x_t = 900, 3.0  # with eps = -1 the estimate of x_0 is far beyond 1
    beta = 1 - alpha[t]
    expected = (alphabar[t - 1] ** 0.5 * beta * 1 + alpha[t] ** 0.5 * (1 - alphabar[t - 1]) * x_t) / (1 - alphabar[t])
    mean = ddpm.p_sample(images(x_t), steps(t), images(-1.0), images(0.0), sched)
    assert mean.numpy().item() == pytest.approx(expected, rel=1e-5)


def test_last_step_adds_no_noise_and_step_0_changes_nothing(sched):
    for variance in "beta", "posterior":
        for clip in True, False:
            calm = ddpm.p_sample(images(0.3), steps(1), images(0.5), images(0.0), sched, variance, clip)
            noisy = ddpm.p_sample(images(0.3), steps(1), images(0.5), images(9.0), sched, variance, clip)
            assert calm.numpy() == noisy.numpy()
            same = ddpm.p_sample(images(0.3), steps(0), images(0.5), images(9.0), sched, variance, clip)
            assert same.numpy().item() == np.float32(0.3)


def test_an_unknown_variance_is_refused(sched):
    with pytest.raises(ValueError, match="beta, posterior, got 'small'"):
        ddpm.p_sample(images(0), steps(1), images(0), images(0), sched, "small")


def test_functions_agree_inside_and_outside_of_a_graph(sched):
    x, eps, z = (tf.random.stateless_normal((2, 4, 4, 3), (0, k)) for k in range(3))
    t = steps(3, 800)
    for function in ddpm.q_sample, ddpm.predict_x0:
        np.testing.assert_allclose(tf.function(function)(x, t, eps, sched), function(x, t, eps, sched), rtol=1e-5)
    graph = tf.function(lambda: ddpm.p_sample(x, t, eps, z, sched))()
    np.testing.assert_allclose(graph, ddpm.p_sample(x, t, eps, z, sched), rtol=1e-5, atol=1e-6)


def test_noise_depends_on_seed_step_and_image():
    def draw(seed, t, index, shape=(4, 4, 2)):
        return standard_normal(tf.constant(seed, tf.int64), tf.constant(t), tf.constant(index), shape).numpy()

    first = draw(7, 20, [0, 1, 2])
    np.testing.assert_array_equal(first[1:], draw(7, 20, [1, 2]))
    drawn = [first[k] for k in range(3)] + [draw(8, 20, [0])[0], draw(7, 21, [0])[0], draw(2**40, 20, [0])[0]]
    for k, one in enumerate(drawn):
        assert not any(np.any(one == other) for other in drawn[:k])
    many = draw(1, 1, list(range(20)), (40, 40, 2))
    assert abs(many.mean()) < 5 / many.size**0.5 and many.var() == pytest.approx(1, abs=5 * (2 / many.size) ** 0.5)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_exact_predictor_samples_the_gaussian_of_the_recursion(variance):
    """For data N(m, s²) the best noise predictor is linear, and so mean and variance of every x_t are known."""
    T, m, s = 50, 0.3, 0.2
    sched = ddpm.ddpm_schedule(1e-3, 0.2, T)
    beta, alpha, alphabar = exact(T, 1e-3, 0.2)

    def predict_eps(inputs):
        x_t, t_input = inputs
        t = tf.cast(tf.round(t_input * T), tf.int32)
        ab = tf.reshape(tf.gather(tf.constant(alphabar, tf.float32), t), (-1, 1, 1, 1))
        return (1 - ab) ** 0.5 * (x_t - ab**0.5 * m) / (ab * s**2 + 1 - ab)

    *_, (t, x_0) = generate(predict_eps, sched, (64, 64, 1), 40, 3, variance, clip=False)
    assert t == 0

    mean, var = 0.0, 1.0
    for t in range(T, 0, -1):  # x_{t-1} = a x_t + b + σ z
        gain = (1 - alphabar[t]) ** 0.5 / (alphabar[t] * s**2 + 1 - alphabar[t])
        share = beta[t] / (1 - alphabar[t]) ** 0.5 * gain
        a, b = (1 - share) / alpha[t] ** 0.5, share * alphabar[t] ** 0.5 * m / alpha[t] ** 0.5
        noise = beta[t] if variance == "beta" else beta[t] * (1 - alphabar[t - 1]) / (1 - alphabar[t])
        mean, var = a * mean + b, a**2 * var + (noise if t > 1 else 0)
    n = x_0.size
    assert x_0.mean() == pytest.approx(mean, abs=5 * (var / n) ** 0.5)
    assert x_0.var() == pytest.approx(var, rel=5 * (2 / n) ** 0.5)


def test_exact_predictor_samples_the_data_distribution():
    """With the slides' schedule and s = 0.5 the reverse chain must end in N(m, s²), up to the steps' size."""
    m, s = -0.2, 0.5
    sched = ddpm.ddpm_schedule(BETA1, BETA2, T)
    ab_table = tf.constant(exact()[2], tf.float32)

    def predict_eps(inputs):
        x_t, t_input = inputs
        ab = tf.reshape(tf.gather(ab_table, tf.cast(tf.round(t_input * T), tf.int32)), (-1, 1, 1, 1))
        return (1 - ab) ** 0.5 * (x_t - ab**0.5 * m) / (ab * s**2 + 1 - ab)

    *_, (_, x_0) = generate(predict_eps, sched, (32, 32, 1), 64, clip=False)
    assert x_0.mean() == pytest.approx(m, abs=0.01)
    assert x_0.std() == pytest.approx(s, abs=0.01)


def test_steps_taken_together_equal_single_steps(monkeypatch):
    sched = ddpm.ddpm_schedule(BETA1, BETA2, 25)

    def run(**more):
        return dict(generate(lambda i: tf.sin(3 * i[0]) * i[1][:, None, None], sched, (8, 8, 1), 2, seed=4, **more))

    one_by_one = run(every=True)
    assert list(one_by_one) == list(range(25, -1, -1))
    monkeypatch.setattr(reverse.ReverseSteps, "QUICK", 100)
    together = run()
    assert list(together) == [25, 24, 14, 4, 0]
    for t, x_t in together.items():
        np.testing.assert_array_equal(x_t, one_by_one[t])
    monkeypatch.setattr(reverse.ReverseSteps, "QUICK", 0)  # steps that take long are shown one by one
    assert list(run()) == list(one_by_one)


def test_from_pixels_is_exact_float32_and_to_pixels_its_inverse():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x_0 = ddpm.from_pixels(pixels)
    assert x_0.dtype == np.float32 and x_0.shape == pixels.shape
    values = x_0.ravel()
    assert values[0] == -1 and values[255] == 1 and (np.diff(values) > 0).all()
    np.testing.assert_allclose(values, [(2 * v - 255) / 255 for v in range(256)], rtol=0, atol=1.2e-7)
    np.testing.assert_array_equal(ddpm.to_pixels(x_0), pixels)


def test_pixels_are_rounded_and_clipped():
    values = np.array([-3, -1, -0.9999, 0, 0.5, 1, 1.2], np.float32)
    pixels = ddpm.to_pixels(values)
    assert pixels.dtype == np.int16 and pixels.tolist() == [0, 0, 0, 128, 191, 255, 255]


# --- the bound --------------------------------------------------------------------------------------------------------


def gaussian(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("t", [2, 3, 50, 400, 1000])
def test_a_term_of_the_bound_is_the_integral_of_the_divergence(sched, variance, clip, t):
    beta, alpha, alphabar = exact()
    x_0, x_t, eps = -0.4, 0.7, 0.9
    ab, before, b, a = alphabar[t], alphabar[t - 1], beta[t], alpha[t]
    tilde = b * (1 - before) / (1 - ab)

    def mean_given(x):
        return before**0.5 * b / (1 - ab) * x + a**0.5 * (1 - before) / (1 - ab) * x_t

    guess = (x_t - (1 - ab) ** 0.5 * eps) / ab**0.5
    mean_p = mean_given(np.clip(guess, -1, 1) if clip else guess)
    x = np.linspace(-1, 1, 400_001) * 12 * tilde**0.5 + mean_given(x_0)
    q, p = gaussian(x, mean_given(x_0), tilde), (mean_p, b if variance == "beta" else tilde)
    log_p = -((x - p[0]) ** 2) / (2 * p[1]) - 0.5 * np.log(2 * np.pi * p[1])
    nats = np.trapezoid(q * (np.log(np.maximum(q, 1e-300)) - log_p), x)
    estimate = ddpm.predict_x0(images(x_t), steps(t), images(eps), sched)
    estimate = np.clip(estimate, -1, 1) if clip else estimate
    got = ddpm.bound_term(images(x_0), images(x_t), steps(t), estimate, sched, variance)
    assert float(got[0]) == pytest.approx(nats / np.log(2), rel=2e-4, abs=1e-6)


def test_the_prior_term_is_the_integral_of_the_divergence(sched):
    alphabar = exact()[2]
    x_0, x = 0.8, np.linspace(-12, 12, 400_001)
    q, p = gaussian(x, alphabar[-1] ** 0.5 * x_0, 1 - alphabar[-1]), gaussian(x, 0, 1)
    bits = np.trapezoid(q * np.log2(q / p), x)
    assert float(ddpm.bound_prior(images(x_0), sched)[0]) == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_the_decoder_shares_all_probability_among_256_values(sched, variance):
    from math import erf

    x_1, eps = 0.123, 0.4
    values = tf.reshape(tf.range(256, dtype=tf.float32) / 127.5 - 1, (256, 1, 1, 1))
    x_1_of_all, eps_of_all = (tf.broadcast_to(images(v), values.shape) for v in (x_1, eps))
    estimate = ddpm.predict_x0(x_1_of_all, tf.ones(256, tf.int32), eps_of_all, sched)
    bits = ddpm.bound_decoder(values, x_1_of_all, estimate, sched, variance).numpy()
    assert np.sum(2.0**-bits) == pytest.approx(1, abs=1e-5)

    beta, alpha, alphabar = exact()
    sigma = (beta[1] if variance == "beta" else beta[2] * (1 - alphabar[1]) / (1 - alphabar[2])) ** 0.5
    mean = (x_1 - (1 - alpha[1]) ** 0.5 * eps) / alpha[1] ** 0.5
    for k in 140, 142, 143:
        low, high = ((k / 127.5 - 1 + side / 255 - mean) / sigma / 2**0.5 for side in (-1, 1))
        assert bits[k] == pytest.approx(-np.log2((erf(high) - erf(low)) / 2), rel=1e-3)
    assert np.all(np.isfinite(bits)) and bits[0] > 100


def test_running_program_ignores_changes_of_its_source(run, tmp_path):
    shutil.copy(os.path.join(ROOT, "ddpm.py"), tmp_path)
    for package in "diffusion", "support":
        shutil.copytree(os.path.join(ROOT, package), tmp_path / package)
    code = (
        "import glob, sys; sys.path.insert(0, '.')\n"
        "import ddpm, conftest\n"
        "assert ddpm.__file__.startswith(sys.argv[1])\n"
        "sched = ddpm.ddpm_schedule(1e-3, 0.3, 40)\n"
        "from diffusion import reverse, sampling\n"
        "for path in glob.glob('**/*.py', recursive=True): open(path, 'w').write('# another program\\n' * 1000)\n"
        "(t, x_0) = conftest.generate(lambda inputs: inputs[0] / 2, sched, (2, 2, 1), 3)[-1]\n"
        "print(t, x_0.shape)"
    )
    process = run("-c", code, tmp_path, TF_CPP_MIN_LOG_LEVEL="2", PYTHONPATH=os.pathsep.join([ROOT, ROOT + "/tests"]))
    assert process.stdout == "0 (3, 2, 2, 1)\n" and "AutoGraph" not in process.stderr, process.stderr


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_bound_terms_of_a_gaussian_match_the_closed_form(sched, variance):
    """For data N(m, s²) the best predictor errs by the variance ᾱs²/(ᾱs² + 1 - ᾱ); every term follows from that."""
    m, s, rng = 0.1, 0.3, np.random.default_rng(0)
    beta, alpha, alphabar = exact()
    x_0 = (m + s * rng.standard_normal((64, 16, 16, 1))).astype(np.float32)
    for t in 2, 30, 500, 1000:
        ab = alphabar[t]
        noise = rng.standard_normal(x_0.shape).astype(np.float32)
        x_t = ab**0.5 * x_0 + (1 - ab) ** 0.5 * noise
        eps = (1 - ab) ** 0.5 * (x_t - ab**0.5 * m) / (ab * s**2 + 1 - ab)
        estimate = ddpm.predict_x0(x_t, tf.fill(64, t), eps.astype(np.float32), sched)
        got = ddpm.bound_term(x_0, x_t, tf.fill(64, t), estimate, sched, variance).numpy()
        tilde = beta[t] * (1 - alphabar[t - 1]) / (1 - ab)
        p_variance = beta[t] if variance == "beta" else tilde
        error = beta[t] ** 2 / (alpha[t] * (1 - ab)) * ab * s**2 / (ab * s**2 + 1 - ab)
        nats = 0.5 * (np.log(p_variance / tilde) + (tilde + error) / p_variance - 1)
        assert got.mean() == pytest.approx(nats / np.log(2), abs=5 * got.std() / 8 + 1e-7)


# --- schedules, targets, weights --------------------------------------------------------------------------------------


def test_cosine_and_sigmoid_schedules_match_the_papers():
    for T in 10, 1000:
        u = np.arange(T + 1) / T
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        cosine = make_schedule(T=T, schedule="cosine").alphabar
        np.testing.assert_allclose(cosine[:-1], (f / f[0])[:-1], rtol=1e-9)  # only the last β is clipped
        assert 1 - cosine[-1] / cosine[-2] == pytest.approx(0.999)

        def sigmoid(x):
            return 1 / (1 + np.exp(-x))

        v_start, v_end = sigmoid(-3.0), sigmoid(3.0)
        gamma = (v_end - sigmoid(u * 6 - 3)) / (v_end - v_start)
        got = make_schedule(T=T, schedule="sigmoid").alphabar
        np.testing.assert_allclose(got[:-1], gamma[:-1], rtol=1e-9)
        assert 1 - got[-1] / got[-2] == pytest.approx(0.999)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("T", [1, 2, 20, 1000])
def test_schedules_fall_from_1_and_all_tables_are_finite(schedule, zero_snr, T):
    sched = make_schedule(schedule, 0.01, 0.01 if T == 1 else 0.02, T, zero_snr)
    assert sched.alphabar[0] == 1 and np.all(np.diff(sched.alphabar) < 0) and ddpm.n_steps(sched) == T
    assert (sched.alphabar[-1] == 0) == (zero_snr or schedule == "flow")
    for name, table in sched.items():
        assert table.shape == (T + 1,) and np.all(np.isfinite(table)), name


def test_zero_terminal_snr_moves_the_end_and_not_the_beginning():
    before, after = (make_schedule(zero_snr=zero).alphabar ** 0.5 for zero in (False, True))
    assert after[1] == pytest.approx(before[1], rel=1e-12) and after[-1] == 0
    scale = before[1] / (before[1] - before[-1])
    np.testing.assert_allclose(after[1:], (before[1:] - before[-1]) * scale, atol=1e-12)


def test_unknown_schedule_target_or_weighting_lists_the_choices(sched):
    with pytest.raises(ValueError, match="linear, cosine, sigmoid, flow, learned, got 'cubic'"):
        make_schedule(schedule="cubic")
    with pytest.raises(ValueError, match="eps, x0, v, flow, got 'image'"):
        targets.find_target("image")
    with pytest.raises(ValueError, match="none, min-snr, snr, got 'p2'"):
        targets.loss_weights(sched.alphabar, "eps", "p2")


KINDS = [*itertools.product(("linear", "cosine"), (False, True)), ("sigmoid", False), ("flow", True)]


def some_pairs(schedule, zero_snr, n=40):
    """A schedule, some t, and images, their noise and x_t there; with ᾱ_T = 0 the last t too."""
    sched, rng = make_schedule(schedule=schedule, zero_snr=zero_snr), np.random.default_rng(0)
    t = np.concatenate([[1, 2, 500, 999], rng.integers(1, 1000, n - 4)])
    t[-1] = 1000 if zero_snr else 990
    x_0, eps = rng.uniform(-1, 1, (n, 4, 4, 1)), rng.standard_normal((n, 4, 4, 1))
    ab = sched.alphabar[t][:, None, None, None]
    return sched, t, x_0, eps, ab**0.5 * x_0 + (1 - ab) ** 0.5 * eps


@pytest.mark.parametrize("target", targets.TARGETS)
@pytest.mark.parametrize("schedule, zero_snr", KINDS)
def test_perfect_network_gives_image_and_noise_for_every_target(target, schedule, zero_snr):
    if target == "eps" and zero_snr:
        return  # refused
    sched, t, x_0, eps, x_t = some_pairs(schedule, zero_snr)
    x_0, eps, x_t = (tf.constant(a, tf.float32) for a in (x_0, eps, x_t))
    perfect = wanted_output(x_0, tf.constant(t), eps, sched, target)
    denoise = denoiser(lambda inputs: perfect, sched, target)
    got_x_0, got_eps, u = denoise(x_t, tf.constant(t))
    assert u is None
    scale = np.maximum(1, 1e-6 / sched["sqrtab"][t])[:, None, None, None] if target == "eps" else 1
    np.testing.assert_allclose((got_x_0 - x_0) / scale, 0 * x_0, atol=2e-4)
    np.testing.assert_allclose(got_eps, eps, atol=2e-4)


@pytest.mark.parametrize("weighting", ["snr", "min-snr"])
@pytest.mark.parametrize("schedule, zero_snr", KINDS)
def test_weighted_error_of_an_estimate_is_equal_for_all_targets(weighting, schedule, zero_snr):
    sched, t, x_0, eps, x_t = some_pairs(schedule, zero_snr)
    ab = sched.alphabar[t][:, None, None, None]
    snr = ab / (1 - ab)
    guess = x_0 + 0.1 * np.random.default_rng(1).standard_normal(x_0.shape)
    guess_eps = (x_t - ab**0.5 * guess) / (1 - ab) ** 0.5
    guesses = {"eps": guess_eps, "x0": guess, "v": ab**0.5 * guess_eps - (1 - ab) ** 0.5 * guess}
    guesses["flow"] = guess_eps - guess
    wanted = {"eps": eps, "x0": x_0, "v": ab**0.5 * eps - (1 - ab) ** 0.5 * x_0, "flow": eps - x_0}
    expected = (np.minimum(snr, 5) if weighting == "min-snr" else snr) * (guess - x_0) ** 2
    for target in wanted:
        weight = targets.loss_weights(sched.alphabar, target, weighting)[t][:, None, None, None]
        error = weight * (guesses[target] - wanted[target]) ** 2
        inside = slice(0, -1) if zero_snr and target == "eps" else slice(None)
        np.testing.assert_allclose(error[inside], expected[inside], rtol=1e-5, atol=1e-12)
    for target in wanted:
        assert np.all(targets.loss_weights(sched.alphabar, target, "none") == 1)


# --- flow matching ----------------------------------------------------------------------------------------------------


def test_flow_schedule_is_the_straight_path_scaled():
    """x_t / (a + b) = (1 - s) x_0 + s ε with s = t/T, as far as 1 - ᾱ_t is exact."""
    for T in 1, 2, 7, 1000:
        ab, s = make_schedule("flow", T=T).alphabar, np.arange(T + 1) / T
        a, b = ab**0.5, (1 - ab) ** 0.5
        np.testing.assert_allclose(a / (a + b), 1 - s, atol=1e-15)
        np.testing.assert_allclose(b / (a + b), s, rtol=1e-10)
        assert ab[0] == 1 and ab[-1] == 0


@pytest.mark.parametrize("schedule, zero_snr", KINDS)
def test_flow_is_the_velocity_of_a_straight_path(schedule, zero_snr):
    """Estimates, squared error and one Euler step of dy/ds = û, y = x_t / (a + b), in float64."""
    _, t, x_0, eps, x_t = some_pairs(schedule, zero_snr)
    sched, flow = make_schedule(schedule=schedule, zero_snr=zero_snr), targets.TARGETS["flow"]
    ab = sched.alphabar[t][:, None, None, None]
    a, b = ab**0.5, (1 - ab) ** 0.5
    s, y = b / (a + b), x_t / (a + b)
    got_x_0, got_eps = flow.estimates(x_t, flow.wanted(x_0, eps, a, b), a, b)
    np.testing.assert_allclose(got_x_0, x_0, atol=1e-13)
    np.testing.assert_allclose(got_eps, eps, atol=1e-13)

    u = flow.wanted(x_0, eps, a, b) + np.random.default_rng(1).standard_normal(x_0.shape)  # an imperfect network
    got_x_0, got_eps = flow.estimates(x_t, u, a, b)
    np.testing.assert_allclose(got_x_0, y - s * u, atol=1e-13)
    np.testing.assert_allclose(got_eps, y + (1 - s) * u, atol=1e-13)
    np.testing.assert_allclose((u - flow.wanted(x_0, eps, a, b)) ** 2, flow.error(ab) * (x_0 - got_x_0) ** 2, rtol=1e-8)

    earlier = sched.alphabar[t - 1][:, None, None, None]
    a_s, b_s = earlier**0.5, (1 - earlier) ** 0.5
    euler = y + (b_s / (a_s + b_s) - s) * u
    ddim = a_s * got_x_0 + b_s * got_eps
    np.testing.assert_allclose(ddim / (a_s + b_s), euler, atol=1e-13)
    rows = samplers.coefficients(sched, np.array([1000, 600, 250, 1, 0]), "ddim")  # which are DDIM's
    later = sched.alphabar[[600, 250, 1, 0]]
    np.testing.assert_allclose(rows[:, :2], np.stack([later**0.5, (1 - later) ** 0.5], axis=1), atol=1e-7)


@pytest.mark.parametrize("schedule, zero_snr", KINDS)
def test_steps_around_log_snr_0_are_drawn_most_often(schedule, zero_snr):
    """Against a sum over a fine grid of log-SNR, each point of which goes to the nearest t."""
    sched = make_schedule(T=50, beta2=0.3, schedule=schedule, zero_snr=zero_snr)
    got = targets.log_snr_probabilities(sched.alphabar)
    ab = sched.alphabar[1:]
    log_snr = np.log(np.maximum(ab, 1e-300) / (1 - ab))
    grid = np.linspace(-30, 30, 400_001)
    density = np.exp(-np.abs(grid) / 0.5)
    finite = np.where(ab > 0, log_snr, -np.inf)
    nearest = np.abs(grid[:, None] - np.where(np.isfinite(finite), finite, -1e9)[None]).argmin(axis=1)
    expected = np.bincount(nearest, weights=density, minlength=50) / density.sum()
    assert got.shape == (50,) and got.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(got, 0.9 * expected + 0.1 / 50, atol=2e-4)  # a tenth is uniform
    assert abs(log_snr[got.argmax()]) < 1.5


def test_an_unknown_name_is_refused_wherever_it_is_given(sched):
    x = np.zeros((1, 2, 2, 1), np.float32)
    for function, arguments in (
        (targets.loss_weights, (sched.alphabar, "velocity")),
        (targets.find_target, ("velocity",)),
        (denoiser, (None, sched, "velocity")),
    ):
        with pytest.raises(ValueError, match="target must be one of eps, x0, v, flow, got 'velocity'"):
            function(*arguments)
    with pytest.raises(ValueError, match="variance must be one of beta, posterior, got 'small'"):
        ddpm.bound_decoder(x, x, x, sched, "small")


def test_schedules_that_end_without_signal_are_refused():
    with pytest.raises(ValueError, match="beta2 = 0.999 with T = 1000 leaves nothing"):
        ddpm.ddpm_schedule(1e-4, 0.999)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        denoiser(None, make_schedule(zero_snr=True), "eps")


def test_betas_belong_to_the_linear_schedule_alone():
    with pytest.raises(ValueError, match="must be equal"):
        ddpm.ddpm_schedule(T=1)
    assert make_schedule(T=1, schedule="cosine").alphabar[1] == pytest.approx(0.001)  # β clipped at 0.999


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_are_made_of_finite_values_only(value):
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        ddpm.to_pixels(np.array([[[[0.0], [value]]]]))
