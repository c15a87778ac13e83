"""What sampling asks of the network and which noise it adds: t/T, x_T and every z, recorded on the way."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import generate

import ddpm
import diffusion_model
import reverse_diffusion as rd
import unet
from diffusion import samplers, sampling
from diffusion.denoiser import clipped, denoiser
from diffusion.model_file import TrainedModel
from evaluation import likelihood
from training import checkpoint, validation

T = 20
DIFFUSION = {"beta1": 0.01, "beta2": 0.3, "T": T}
BETA = np.array([0, *np.linspace(0.01, 0.3, T)])
ALPHABAR = np.cumprod(1 - BETA)
SHAPE = (8, 8, 1)


@pytest.fixture
def eagerly():
    """TensorFlow's functions run as Python, so that what passes through them can be recorded."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


class Witness:
    """A linear noise predictor that records every x_t and t/T it is asked for, image by image."""

    def __init__(self):
        self.x, self.t = [], []

    def predict(self, inputs):
        x_t, t_input = inputs
        if hasattr(x_t, "numpy"):  # not while Keras builds the network
            assert t_input.dtype == tf.float32 and t_input.shape == (len(x_t), 1)
            self.x.extend(x_t.numpy())
            self.t.extend(t_input.numpy()[:, 0])
        return 0.5 * x_t + 0.1

    def at(self, t):
        """The images x_t in the order in which they were given."""
        return np.stack([x for x, t_input in zip(self.x, self.t, strict=True) if t_input == np.float32(t) / T])


@keras.saving.register_keras_serializable("Tests")
class Asked(keras.layers.Layer):
    """Asks a witness; the layer itself has no weights."""

    def __init__(self, witness):
        super().__init__()
        self.predict = witness.predict

    def call(self, inputs):
        return self.predict(inputs)


@pytest.fixture
def witness():
    return Witness()


@pytest.fixture
def model(witness):
    """The witness as a network that carries its noise schedule."""
    image, t = keras.Input(SHAPE), keras.Input((1,))
    return keras.Model([image, t], Asked(witness)([image, unet.Logbook({"diffusion": DIFFUSION})(t)]))


def correlations(vectors):
    """The correlation of every pair of different rows."""
    return np.corrcoef(vectors)[np.triu_indices(len(vectors), 1)]


def assert_independent_noise(arrays):
    """Draws from N(0, 1), no two of them equal or correlated."""
    vectors = np.reshape(arrays, (len(arrays), -1)).astype(np.float64)
    assert abs(vectors.mean()) < 5 / vectors.size**0.5
    assert vectors.var() == pytest.approx(1, abs=5 * (2 / vectors.size) ** 0.5)
    assert np.abs(correlations(vectors)).max() < 5.5 / vectors.shape[1] ** 0.5


def test_the_network_is_asked_once_for_every_t_from_T_down_to_1(eagerly, witness, model):
    rd.my_sample(n_sample=2, model=model, seed=0, verbose=0)
    assert witness.t == [np.float32(t) / np.float32(T) for t in range(T, 0, -1) for _ in range(2)]


def test_t_over_T_is_equal_in_training_sampling_and_evaluation(eagerly, witness, model):
    sched, images = ddpm.ddpm_schedule(**DIFFUSION), np.zeros((2 * T, *SHAPE), np.uint8)
    noisy, asked = diffusion_model.noising(sched, 0), {}
    steps = [noisy(tf.zeros((32, *SHAPE)), tf.constant(step, tf.int64)) for step in range(10)]
    asked["training"] = {float(t) for _, t_input, *_ in steps for t in t_input[:, 0]}

    def numbers():
        """What was asked since the last time."""
        seen = {float(t) for t in witness.t}
        witness.t.clear()
        return seen

    rd.my_sample(n_sample=1, model=model, seed=0, verbose=0)
    asked["sampling"] = numbers()
    compile_with_ema(model)
    validation.Validation(TrainedModel(model, sched), images).measure()
    asked["validation"] = numbers()
    likelihood.measure_denoising(denoiser(witness.predict, sched), sched, images[:2], 0, 2)
    asked["evaluation"] = numbers()
    expected = {float(np.float32(t) / np.float32(T)) for t in range(1, T + 1)}
    for where, seen in asked.items():
        assert seen == expected, where


def compile_with_ema(model):
    optimizer = keras.optimizers.Adam(use_ema=True)
    optimizer.build(model.trainable_variables)
    checkpoint.compile_for_run(model, optimizer, "float32", xla=False)


def test_x_T_and_the_noise_of_every_step_are_independent():
    """A step that returns its noise shows all of it: first x_T, then two draws at each t, for three images each."""
    times = np.append(np.repeat(np.arange(T, 0, -1, dtype=np.int32), 2), np.int32(0))
    only_noise = sampling.Plan(times, np.tile(np.float32([0, 0, 1, 0, 0, 0]), (2 * T, 1)))
    sched = ddpm.ddpm_schedule(**DIFFUSION)
    drawn = generate(lambda inputs: inputs[0], sched, (32, 32, 1), 3, seed=7, every=True, plan=only_noise)
    drawn = np.concatenate([x_t for _, x_t in drawn])
    assert len(drawn) == 3 * (2 * T + 1)
    assert_independent_noise(drawn)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_sampling_is_algorithm_2_with_fresh_noise_in_each_step(eagerly, witness, model, variance):
    """x_T … x_1 as the network saw them, and x_0 as it was returned, against the slides' formula in float64."""
    n = 12
    images = rd.my_sample(n_sample=n, model=model, seed=3, variance=variance, clip=False, verbose=0)
    noise = [witness.at(T)]
    for t in range(T, 0, -1):
        x_t = witness.at(t).astype(np.float64)
        assert len(x_t) == n
        mean = (x_t - BETA[t] / (1 - ALPHABAR[t]) ** 0.5 * (0.5 * x_t + 0.1)) / (1 - BETA[t]) ** 0.5
        if t > 1:
            square = BETA[t] if variance == "beta" else BETA[t] * (1 - ALPHABAR[t - 1]) / (1 - ALPHABAR[t])
            noise.append((witness.at(t - 1) - mean) / square**0.5)
    assert_independent_noise(np.concatenate(noise))
    assert np.abs(images - np.clip((mean + 1) * 127.5, 0, 255)).max() < 0.51


def test_seed_0_is_repeatable_and_seed_none_is_not(eagerly, model):
    def sample(seed):
        return rd.my_sample(n_sample=1, model=model, seed=seed, verbose=0)

    np.testing.assert_array_equal(sample(0), sample(0))
    assert np.any(sample(None) != sample(None))


def test_validation_spreads_t_evenly_with_noise_for_each_image(eagerly, witness, model):
    images = np.random.default_rng(0).integers(0, 256, (2 * T, *SHAPE)).astype(np.uint8)
    compile_with_ema(model)
    measure = validation.Validation(TrainedModel(model, ddpm.ddpm_schedule(**DIFFUSION)), images).measure
    loss, quarters = measure()["loss"]
    t, x_t = np.rint(np.array(witness.t[: 2 * T]) * T).astype(int), np.array(witness.x[: 2 * T], np.float64)
    assert sorted(t) == sorted([*range(1, T + 1)] * 2)

    ab = ALPHABAR[t][:, None, None, None]
    eps = (x_t - ab**0.5 * ddpm.from_pixels(images)) / (1 - ab) ** 0.5
    assert_independent_noise(eps)
    errors = np.mean((0.5 * x_t + 0.1 - eps) ** 2, axis=(1, 2, 3))
    errors = errors * np.minimum(1, (1 - ALPHABAR[t]) / ALPHABAR[t])  # the smaller of the errors of x̂_0 and ε̂
    assert loss == pytest.approx(errors.mean(), rel=1e-4)
    assert quarters == pytest.approx([errors[(t > 5 * q) & (t <= 5 * q + 5)].mean() for q in range(4)], rel=1e-4)
    assert measure() == {"loss": (loss, quarters)}


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_a_step_of_the_sampler_is_the_step_of_the_slides(variance, clip):
    """`samplers.step` with its float64 coefficients, and `ddpm.p_sample` with the tables, at every t."""
    sched, rng = ddpm.ddpm_schedule(**DIFFUSION), np.random.default_rng(0)
    times = np.arange(T, -1, -1)
    coefficients = samplers.coefficients(sched, times, "ddpm", variance)
    x_t, eps, z = rng.standard_normal((3, T, *SHAPE)).astype(np.float32)
    denoise = denoiser(lambda inputs: eps[T - int(np.rint(inputs[1][0, 0] * T))][None], sched)
    denoise = clipped(denoise, sched) if clip else denoise
    for k, t in enumerate(times[:-1]):
        t_ind, row = tf.constant([t]), slice(k, k + 1)
        expected = ddpm.p_sample(x_t[row], t_ind, eps[row], z[row], sched, variance, clip)
        got, _ = samplers.step(denoise, x_t[row], t_ind, coefficients[k], z[row], 1e6 * z[row])
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
