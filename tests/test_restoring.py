"""Methods of restoring against closed forms: Gaussians and mixtures, whose denoisers are exact."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import Oracle
from test_guidance import MEANS as CLASS_MEANS
from test_guidance import SCHED, STDS, WEIGHTS, in_float64, predict

import ddpm
from diffusion import measurement, posterior, samplers, sampling
from diffusion.denoiser import Estimate, classifier_free, denoiser
from diffusion.measurement import Task
from diffusion.model_file import TrainedModel
from diffusion.options import METHODS, OPERATIONS, Sampling
from diffusion.reverse import ReverseSteps
from diffusion.schedules import make_schedule
from training import checkpoint

SHAPE = (2, 4, 3)
SIZE = 24
TASKS = {"mask": None, "downscale": 2, "grey": None, "blur": 0.8}
MASK = np.array([[1, 0, 1, 1], [0, 0, 1, 0]])
RNG = np.random.default_rng(0)
MEAN = RNG.uniform(-0.3, 0.3, SIZE)
ROOT = RNG.normal(size=(SIZE, SIZE)) * 0.12
COVARIANCE = ROOT @ ROOT.T + 0.02 * np.eye(SIZE)


def matrix(operation, factor=None):
    """A of an operation as a matrix, pixel by pixel."""
    rows, cells = [], list(np.ndindex(SHAPE))

    def add(weights):
        rows.append([weights.get(cell, 0.0) for cell in cells])

    height, width, channels = SHAPE
    for i, j, c in np.ndindex(SHAPE):
        if operation == "mask":
            add({(i, j, c): float(MASK[i, j])})
        elif operation == "downscale" and i % factor == j % factor == 0:
            add({(i + a, j + b, c): 1 / factor**2 for a, b in np.ndindex(factor, factor)})
        elif operation == "grey" and c == 0:
            add({(i, j, k): 1 / channels for k in range(channels)})
        elif operation == "blur":
            down, across = (
                [np.exp(-((k - at) ** 2) / (2 * factor**2)) for k in range(n)] for at, n in ((i, height), (j, width))
            )
            total = sum(down) * sum(across)
            add({(a, b, c): down[a] * across[b] / total for a, b in np.ndindex(height, width)})
    return np.array(rows)


def gaussian(sched, mean=MEAN, covariance=COVARIANCE, shape=SHAPE):
    """The exact predictor of ε for images from N(mean, covariance)."""
    values, vectors = np.linalg.eigh(covariance)
    values, vectors, mean = (tf.constant(array, tf.float32) for array in (values, vectors, mean))
    alphabar = tf.constant(sched.alphabar, tf.float32)

    def predict_eps(inputs, training=False):
        x_t, t = inputs
        ab = tf.gather(alphabar, tf.cast(tf.round(t * ddpm.n_steps(sched)), tf.int32))
        along = (tf.reshape(x_t, (-1, len(mean))) - tf.sqrt(ab) * mean) @ vectors
        eps = (tf.sqrt(1 - ab) / (ab * values + 1 - ab) * along) @ tf.transpose(vectors)
        return tf.reshape(eps, (-1, *shape))

    return predict_eps


def given(a_matrix, y, variance, mean=MEAN, covariance=COVARIANCE):
    """Mean and covariance of N(mean, covariance) once y = A x + noise is known."""
    gain = covariance @ a_matrix.T @ np.linalg.inv(a_matrix @ covariance @ a_matrix.T + variance * np.eye(len(y)))
    return mean + gain @ (y - a_matrix @ mean), covariance - gain @ a_matrix @ covariance


def tensors(y, variance, count, task):
    """y, mask and noise as tensors, for `count` images with the same measurement."""
    shape = (count, *task.measured_shape(SHAPE))
    masks = np.broadcast_to(MASK[..., None], (count, *MASK.shape, 1))
    arrays = np.broadcast_to(y.reshape(1, *shape[1:]), shape), masks, np.full(count, variance)
    return tuple(tf.constant(array, tf.float32) for array in arrays)


@pytest.fixture
def to_the_end(monkeypatch):
    """Conjugate gradients of MMPS until they have converged."""
    monkeypatch.setitem(posterior.METHODS, "mmps", dataclasses.replace(posterior.METHODS["mmps"], iterations=40))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_and_adjoints_match_matrices(operation):
    task, factor = Task(operation, "mmps", TASKS[operation]), TASKS[operation]
    x = RNG.normal(size=(3, *SHAPE)).astype(np.float32)
    masks = tf.constant(np.broadcast_to(MASK[..., None], (3, 2, 4, 1)), tf.float32)
    expected = x.reshape(3, -1) @ matrix(operation, factor).T
    np.testing.assert_allclose(task.measure(x, masks).numpy().reshape(3, -1), expected, atol=1e-6)
    v = RNG.normal(size=(3, *task.measured_shape(SHAPE))).astype(np.float32)
    back = posterior.adjoint(lambda images: task.measure(images, masks), v, tf.constant(x)).numpy()
    np.testing.assert_allclose(back.reshape(3, -1), v.reshape(3, -1) @ matrix(operation, factor), atol=1e-6)


@pytest.mark.parametrize("variance", [0.04, 1 / 255**2])
@pytest.mark.parametrize("operation, method", list(itertools.product(OPERATIONS, METHODS)))
def test_estimates_are_the_formulas_of_the_methods(operation, method, variance, to_the_end):
    """Of a Gaussian, in float64: MMPS gives the mean of x_0 given x_t and y, the others what their papers say."""
    sched = make_schedule("cosine", T=50)
    task, a = Task(operation, method, TASKS[operation]), matrix(operation, TASKS[operation])
    rng, variance = np.random.default_rng(2), max(variance, 1e-3 * (operation == "blur"))  # else it is hardly solvable
    t, x_t = np.array([3, 20, 45]), rng.normal(size=(3, *SHAPE))
    y = a @ rng.multivariate_normal(MEAN, COVARIANCE) + 0.3
    denoise = task.measured(denoiser(gaussian(sched), sched), sched, *tensors(y, variance, 3, task))
    x_0, eps, _ = denoise(tf.constant(x_t, tf.float32), tf.constant(t))
    for k in range(3):
        ab, x = sched.alphabar[t[k]], x_t[k].ravel()
        mean, spread = given(np.sqrt(ab) * np.eye(SIZE), x, 1 - ab)  # of x_0 given x_t
        slope, off = spread * np.sqrt(ab) / (1 - ab), y - a @ mean
        pixels = (1 - ab) * a @ a.T + variance * np.eye(len(y))
        if method == "mmps":  # both at once
            both = np.concatenate([np.sqrt(ab) * np.eye(SIZE) / np.sqrt(1 - ab), a / np.sqrt(variance)])
            expected = given(both, np.concatenate([x / np.sqrt(1 - ab), y / np.sqrt(variance)]), 1.0)[0]
        elif method == "pigdm":
            expected = mean + (1 - ab) / np.sqrt(ab) * slope @ a.T @ np.linalg.solve(pixels, off)
        elif method == "repaint":
            expected = mean + (1 - ab) * a.T @ np.linalg.solve(pixels, off)
        else:  # a step of DDPM with all T steps then moves by ζ times the gradient of the distance
            before, alpha = sched.alphabar[t[k] - 1], ab / sched.alphabar[t[k] - 1]
            moved = np.sqrt(SIZE / (256 * 256 * 3)) * slope @ a.T @ off / np.linalg.norm(off)
            factor_0, factor_t = np.sqrt(before) * (1 - alpha) / (1 - ab), np.sqrt(alpha) * (1 - before) / (1 - ab)
            step = factor_0 * x_0[k].numpy().ravel() + factor_t * x
            np.testing.assert_allclose(step - factor_0 * mean - factor_t * x, moved, atol=2e-5)
            continue
        np.testing.assert_allclose(x_0[k].numpy().ravel(), expected, atol=2e-3)
    ab = sched.alphabar[t][:, None, None, None]
    np.testing.assert_allclose(np.sqrt(ab) * x_0 + np.sqrt(1 - ab) * eps, x_t, atol=1e-3)


def test_two_iterations_are_exact_for_two_variances():
    """Conjugate gradients need one iteration for each eigenvalue of C; MMPS takes two."""
    sched, covariance = make_schedule("cosine", T=50), np.diag(np.where(np.arange(SIZE) % 2, 0.02, 0.4))
    task, a, rng = Task("mask", "mmps"), matrix("mask"), np.random.default_rng(3)
    y, x_t, ab = a @ rng.normal(size=SIZE), rng.normal(size=SHAPE), sched.alphabar[20]
    oracle = denoiser(gaussian(sched, covariance=covariance), sched)
    found = task.measured(oracle, sched, *tensors(y, 0.04, 1, task))(
        tf.constant(x_t[None], tf.float32), tf.constant([20])
    )
    mean, spread = given(np.sqrt(ab) * np.eye(SIZE), x_t.ravel(), 1 - ab, covariance=covariance)
    np.testing.assert_allclose(found.x_0[0].numpy().ravel(), given(a, y, 0.04, mean, spread)[0], atol=1e-4)


def test_repaint_puts_known_pixels_in_their_place():
    sched, task = make_schedule("cosine", T=50), Task("mask", "repaint")
    y, x_t = RNG.normal(size=(2, *SHAPE)).astype(np.float32) * MASK[..., None], RNG.normal(size=(2, *SHAPE))
    plain = denoiser(gaussian(sched), sched)
    masks = tf.constant(np.broadcast_to(MASK[..., None], (2, 2, 4, 1)), tf.float32)
    x_t, t = tf.constant(x_t, tf.float32), tf.constant([40, 2])
    x_0 = task.measured(plain, sched, tf.constant(y, tf.float32), masks, tf.zeros(2))(x_t, t).x_0
    np.testing.assert_allclose(x_0, np.where(MASK[..., None], y, plain(x_t, t).x_0), atol=1e-4)


def draw(denoise, shape, *plans):
    """x_0 of all images at the end of each plan, float64 (count, pixels); noise is drawn for the whole batch."""

    @tf.function(autograph=False)
    def one(x, memory, t, row, k):
        z = tf.random.stateless_normal(shape, tf.stack([1, k]))
        return samplers.step(denoise, x, tf.repeat(t, shape[0]), row, z, memory)

    for plan in plans:
        x = memory = tf.random.stateless_normal(shape, (0, 0))
        for k, (t, row) in enumerate(zip(plan.times, plan.coefficients, strict=False)):
            x, memory = one(x, memory, tf.constant(t), tf.constant(row), tf.constant(k))
        yield np.float64(x).reshape(shape[0], -1)


@pytest.mark.parametrize("operation, variance", [("mask", 1 / 255**2), ("downscale", 0.01)])
def test_mmps_samples_a_gaussians_posterior(operation, variance, to_the_end):
    """Mean and covariance come nearer to the closed form with more steps."""
    sched = make_schedule("cosine", T=200)
    a, task = matrix(operation, TASKS[operation]), Task(operation, "mmps", TASKS[operation])
    y = a @ np.random.default_rng(1).multivariate_normal(MEAN, COVARIANCE)
    mean, covariance = given(a, y, variance)
    plans = [sampling.make_plan(sched, Sampling("ddim", count, eta=1.0)) for count in (5, 50)]
    denoise = task.measured(denoiser(gaussian(sched), sched), sched, *tensors(y, variance, 1000, task))
    few, many = draw(denoise, (1000, *SHAPE), *plans)
    spread = np.diag(covariance).max()
    assert np.abs(many.mean(axis=0) - mean).max() < 4.5 * np.sqrt(spread / len(many)) + 0.01
    off_few, off_many = (np.linalg.norm(np.cov(x_0.T) - covariance) for x_0 in (few, many))
    assert off_many < 0.2 * np.linalg.norm(covariance) and off_many < 0.5 * off_few
    expected = np.trace(a @ covariance @ a.T) / len(y) + np.mean((a @ mean - y) ** 2)
    assert np.sqrt(np.mean((many @ a.T - y) ** 2)) < 1.1 * np.sqrt(expected) + 1e-3


def test_one_trace_serves_all_masks():
    """Each image of a batch has its own, and images do not depend on their batch."""
    sched, task = ddpm.ddpm_schedule(0.01, 0.3, 20), Task("mask", "mmps")
    masks = np.random.default_rng(0).integers(0, 2, (4, 2, 4, 1)).astype(np.float32)
    y, noise = masks * RNG.normal(size=(4, *SHAPE)).astype(np.float32), np.full(4, 0.01, np.float32)
    trained = TrainedModel(Oracle(gaussian(sched), SHAPE), sched)
    plan = sampling.make_plan(sched, Sampling(steps=5))

    def end(steps, index):
        chosen = tuple(tf.constant(part[index]) for part in (y, masks, noise))
        return list(sampling.sample(steps, plan, 0, index, measurement=chosen))[-1][1].numpy()

    four = ReverseSteps(trained, 4, clip=False, xla=False, task=task)
    together = end(four, [0, 1, 2, 3])
    for order in [2, 0, 3, 1], [1, 1, 3, 1]:
        np.testing.assert_allclose(end(four, order), together[order], atol=1e-4)
    assert four._take.experimental_get_tracing_count() == 1


# --- mixtures, classes, guidance --------------------------------------------------------------------------------------


def guided_in_float64(x_t, t, c, g):
    """x̂_0 of the mixture with guidance g towards a class."""
    eps, without, _ = in_float64(x_t, SCHED.alphabar[t])
    return (x_t - np.sqrt(1 - SCHED.alphabar[t]) * (without + g * (eps[c] - without))) / np.sqrt(SCHED.alphabar[t])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("g, x_t", [(0.0, 0.4), (1.0, 0.4), (2.5, -0.8), (2.5, 0.4)])
def test_measurements_and_guidance_act_together(method, g, x_t):
    """The slope is that of the guided estimate, here by finite differences; MMPS is silent where it is no variance."""
    y, variance, c, t = 0.5, 0.09, 0, 120
    guided = classifier_free(denoiser(predict, SCHED), tf.constant(g))
    given = tf.constant([[[[y]]]]), tf.ones((1, 1, 1, 1)), tf.constant([variance])
    denoise = Task("mask", method).measured(guided, SCHED, *given)
    found = denoise(tf.constant([[[[x_t]]]]), tf.constant([t]), tf.constant([c + 1])).x_0.numpy().item()
    ab, step = SCHED.alphabar[t], 1e-5
    plain = guided_in_float64(x_t, t, c, g)
    slope = (guided_in_float64(x_t + step, t, c, g) - guided_in_float64(x_t - step, t, c, g)) / (2 * step)
    v = (1 - ab) / np.sqrt(ab) * slope
    alpha = ab / SCHED.alphabar[t - 1]
    expected = {
        "mmps": v / (v + variance) if v > -variance else 0,
        "pigdm": v / (1 - ab + variance),
        "dps": v * np.sqrt(alpha) / ((1 - alpha) * abs(y - plain)) / np.sqrt(256 * 256 * 3),
        "repaint": (1 - ab) / (1 - ab + variance),
    }[method]
    assert found == pytest.approx(plain + expected * (y - plain), abs=2e-3)


def test_mmps_chooses_between_the_modes_of_a_mixture():
    """From a blurry measurement of one pixel: how often each of two Gaussians is chosen, and the spread."""
    y, variance = 0.1, 0.25
    denoise = denoiser(lambda inputs: predict([*inputs, tf.zeros_like(inputs[1], tf.int32)]), SCHED)
    given = tf.fill((600, 1, 1, 1), y), tf.ones((600, 1, 1, 1)), tf.fill([600], variance)
    plan = sampling.make_plan(SCHED, Sampling("ddim", 50, eta=1.0))
    (x_0,) = draw(Task("mask", "mmps").measured(denoise, SCHED, *given), (600, 1, 1, 1), plan)
    evidence = WEIGHTS * np.exp(-((y - CLASS_MEANS) ** 2) / (2 * (STDS**2 + variance))) / np.sqrt(STDS**2 + variance)
    posterior_means = (CLASS_MEANS / STDS**2 + y / variance) / (1 / STDS**2 + 1 / variance)
    share = evidence / evidence.sum()
    assert np.mean(x_0 < -0.2) == pytest.approx(share[0], abs=0.08)
    assert x_0.mean() == pytest.approx(share @ posterior_means, abs=0.06)


def test_a_learned_variance_is_left_as_it_is():
    sched, u = make_schedule("cosine", T=20), tf.random.stateless_normal((2, *SHAPE), (0, 0))
    plain = denoiser(gaussian(sched), sched)
    task, x_t, t = Task("grey", "mmps"), tf.random.stateless_normal((2, *SHAPE), (0, 1)), tf.constant([3, 9])
    y = tensors(np.zeros(8), 0.01, 2, task)
    learned = task.measured(lambda x, t, label=None: Estimate(*plain(x, t)[:2], u), sched, *y)(x_t, t)
    np.testing.assert_array_equal(learned.u, u)
    np.testing.assert_array_equal(learned.x_0, task.measured(plain, sched, *y)(x_t, t).x_0)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_known_where_nothing_of_the_image_is_left(method):
    """ᾱ_T = 0: the estimate stays, and nothing is NaN."""
    sched = make_schedule("cosine", T=20, zero_snr=True)
    plain = denoiser(lambda inputs: 0.5 * inputs[0], sched, "v")
    task, x_t, t = Task("mask", method), tf.random.stateless_normal((2, *SHAPE), (0, 1)), tf.constant([20, 9])
    found = task.measured(plain, sched, *tensors(np.zeros(SIZE), 0.01, 2, task))(x_t, t)
    np.testing.assert_array_equal(found.x_0[0], plain(x_t, t).x_0[0])
    assert np.all(np.isfinite(found.x_0)) and np.any(found.x_0[1] != plain(x_t, t).x_0[1])


@pytest.mark.parametrize("precision, within", [("bfloat16", 0.05), ("float16", 0.01)])
def test_slopes_go_through_networks_of_16_bits(precision, within):
    """Also of directions so small that 16 bits would hold nothing of them."""
    image, t = keras.Input((4, 8, 3)), keras.Input((1,))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="tanh")(image)
    x = keras.layers.Add()([x, keras.layers.Reshape((1, 1, 8))(keras.layers.Dense(8)(t))])
    model = keras.Model([image, t], keras.layers.Conv2D(3, 3, padding="same", dtype="float32")(x))
    sched, slopes = ddpm.ddpm_schedule(0.01, 0.3, 20), {}
    x_t, v = (tf.random.stateless_normal((2, 4, 8, 3), (0, k)) for k in range(2))
    for used in "float32", precision:
        checkpoint.set_precision(model, used)
        _, slope = posterior.with_slope(denoiser(model, sched), x_t, tf.constant([3, 15]), None)
        slopes[used], tiny = slope(v).numpy(), slope(1e-9 * v).numpy()
        assert slopes[used].dtype == np.float32
        np.testing.assert_allclose(1e9 * tiny, slopes[used], rtol=1e-3, atol=1e-3)
    error = np.abs(slopes[precision] - slopes["float32"]).max() / np.abs(slopes["float32"]).max()
    assert 0 < error < within


# --- going back and forth ---------------------------------------------------------------------------------------------


def test_noise_of_a_plan_without_revisits_is_numbered_as_before():
    """0 for the step that leaves t, 1, 2, … for the steps before it that stay there."""
    for how in {}, {"corrector": 3, "steps": 7}, {"sampler": "langevin", "steps": 23}:
        plan = sampling.make_plan(make_schedule(T=50), Sampling(**how))
        _, counts = np.unique(plan.times[:-1], return_counts=True)
        np.testing.assert_array_equal(plan.draws, np.concatenate([np.arange(n)[::-1] for n in counts[::-1]]))


def test_revisited_times_have_noise_of_their_own():
    plan = sampling.Plan(np.array([10, 5, 10, 5, 0]), np.zeros((4, 6), np.float32))
    np.testing.assert_array_equal(plan.draws, [1, 1, 0, 0])
    sched = make_schedule("cosine", T=100)
    plan = sampling.revisit(sampling.make_plan(sched, Sampling(steps=20)), sched, 4, 3)
    keys = set(zip(plan.times[:-1].tolist(), plan.draws.tolist(), strict=True))
    assert len(keys) == len(plan.draws)
    noise = [sampling.standard_normal(0, t, [0], (16, 16, 3), draw).numpy().ravel() for t, draw in sorted(keys)]
    correlations = np.corrcoef(noise) - np.eye(len(noise))
    assert np.abs(correlations).max() < 5.5 / np.sqrt(768)


def test_a_revisit_is_a_step_and_the_noise_of_the_steps_again():
    """Mean and covariance of what a plan does to x̂_0 and ε̂, beside the step and q(x_t | x_s) one after the other."""
    sched = make_schedule("cosine", T=100)
    base = sampling.make_plan(sched, Sampling("ddim", 6, eta=0.7))
    plan = sampling.revisit(base, sched, 2, 1)
    t0, t1, t2, t3, t4, t5, end = base.times
    np.testing.assert_array_equal(plan.times, [t0, t1, t2, t3, t2, t3, t4, t5, end])
    np.testing.assert_array_equal(plan.coefficients[[0, 1, 2, 4, 5, 6, 7]], base.coefficients[[0, 1, 2, 2, 3, 4, 5]])
    a, b, sigma = base.coefficients[3, :3].astype(np.float64)
    left = sched.alphabar[t2] / sched.alphabar[t4]
    expected = np.sqrt(left) * a, np.sqrt(left) * b, np.sqrt(left * sigma**2 + 1 - left)
    np.testing.assert_allclose(plan.coefficients[3, :3], expected, rtol=1e-6)


def test_going_back_and_forth_keeps_the_distribution():
    """Of a Gaussian without a measurement, with many steps."""
    sched, task = make_schedule("cosine", T=200), Task("mask", "repaint")
    base = sampling.make_plan(sched, Sampling("dpm++", 60))
    nothing = tf.zeros((500, *SHAPE)), tf.zeros((500, *SHAPE[:2], 1)), tf.ones(500)
    denoise = task.measured(denoiser(gaussian(sched), sched), sched, *nothing)
    (x_0,) = draw(denoise, (500, *SHAPE), sampling.revisit(base, sched, 10, 1))
    assert np.abs(x_0.mean(axis=0) - MEAN).max() < 4.5 * np.sqrt(COVARIANCE.max() / 500)
    assert np.linalg.norm(np.cov(x_0.T) - COVARIANCE) < 0.25 * np.linalg.norm(COVARIANCE)


def test_too_many_revisits_for_the_keys_are_refused():
    sched = make_schedule("cosine", T=20)
    plan = sampling.make_plan(sched, Sampling(steps=10))
    with pytest.raises(ValueError, match="fewer than 4096 visits"):
        sampling.revisit(plan, sched, 2, 4096)
    long = ddpm.ddpm_schedule(1e-9, 1e-5, 2**20 - 1)
    with pytest.raises(ValueError, match=f"a T below {2**20 - 1}"):
        sampling.revisit(sampling.make_plan(long, Sampling(steps=6)), long, 2, 1)


def test_functions_that_measure_nothing_sensible_are_refused():
    for wrong, message in (
        (lambda x: x + 1, "linear function"),
        (lambda x: x**2, "linear function"),
        (lambda x: x - tf.reduce_mean(x, axis=0), "each image of a batch by itself"),
        (lambda x: tf.reduce_sum(x), "operation fails"),
        (lambda x: tf.cast(x, tf.float64), "float32"),
        (lambda x: x @ tf.ones((7, 2)), "operation fails"),
    ):
        with pytest.raises(ValueError, match=message):
            measurement.choose_task(wrong, None, None, (), SHAPE)
