"""The learned schedule beside NumPy's float64: γ, its gradient by finite differences, training, files, refusals."""

import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, tiny_network
from PIL import Image
from test_training import assert_equal_to_the_bit

import reverse_diffusion as rd
from diffusion import model_file
from diffusion.layers import LearnedSchedule
from diffusion.schedules import make_schedule
from training import checkpoint, validation
from training.learned_schedule import schedule_gradients

PLAIN = [word for word, before in zip(TINY, ("", *TINY[:-1]), strict=True) if "--beta2" not in (word, before)]
LEARNED = (*PLAIN, "--schedule", "learned", "--lr-decay", "none", "--sample-steps", "5")
NAMES = ("start", "width", "line", "heights", "steepness", "centres")


@pytest.fixture
def layer():
    layer = LearnedSchedule(-6.0, 3.0, units=4)
    layer.build((None, 1))
    rng = np.random.default_rng(0)
    for name in "heights", "centres", "line":
        weight = getattr(layer, name)
        weight.assign(np.asarray(weight) + 2 * rng.standard_normal(weight.shape))
    return layer


def softplus(x):
    return np.log1p(np.exp(x))


def gamma_and_slope(weights, tau):
    """γ and γ' in float64, from a dict of the layer's weights."""
    line, heights, steepness = (softplus(weights[name]) for name in ("line", "heights", "steepness"))

    def g(tau):
        return line * tau + (heights / (1 + np.exp(-steepness * (tau[:, None] - weights["centres"])))).sum(1)

    low, high = g(np.array([0.0, 1.0]))
    width, step = softplus(weights["width"]), 1e-5
    slope = (g(tau + step) - g(tau - step)) / (2 * step)
    return weights["start"] + width * (g(tau) - low) / (high - low), width * slope / (high - low)


def weights_of(layer):
    return {name: np.asarray(getattr(layer, name), np.float64) for name in NAMES}


def test_gamma_rises_everywhere_between_its_ends(layer):
    tau = np.linspace(0, 1, 100_001, dtype=np.float32)
    expected, slope = gamma_and_slope(weights_of(layer), tau.astype(np.float64))
    (start, width), (shape, got_slope) = layer.ends(), layer.shape_and_slope(tf.constant(tau))
    np.testing.assert_allclose(start + width * shape, expected, atol=2e-5)
    np.testing.assert_allclose(width * got_slope, slope, rtol=1e-3)
    assert np.all(slope > 0) and expected[0] == pytest.approx(-6) and expected[-1] == pytest.approx(3)
    for T in 2, 20, 1000:
        ab = layer.alphabar(T)
        tau = np.linspace(0, 1, T)
        np.testing.assert_allclose(ab[1:], 1 / (1 + np.exp(gamma_and_slope(weights_of(layer), tau)[0])), rtol=1e-4)
        assert ab[0] == 1 and ab.dtype == np.float64 and np.all(np.diff(ab) < 0)


def test_a_new_layer_is_the_schedule_that_its_name_makes():
    layer = LearnedSchedule(-13.3, 5.0)
    layer.build((None, 1))
    np.testing.assert_allclose(layer.alphabar(1000), make_schedule("learned").alphabar, rtol=2e-2)


def network_with(layer, target, weighting, T=20):
    """ε̂, x̂_0, … = w (x_t + t/T) + b, whose schedule is the layer's."""
    base = tiny_network((4, 4, 1))
    base.layers[-1].set_weights([np.full((1, 1, 1, 1), 0.3), np.full(1, -0.2)])
    network = keras.Model(base.inputs, layer(base.outputs[0]))
    diffusion = {"beta1": 1e-4, "beta2": 0.02, "T": T, "schedule": "learned", "target": target}
    model_file.metadata(network).update(diffusion=diffusion, settings={"weighting": weighting})
    return network


@pytest.mark.parametrize("target, weighting", [("eps", "none"), ("v", "min-snr"), ("x0", "snr"), ("flow", "none")])
def test_gradients_are_those_of_the_bound_and_of_its_square(layer, target, weighting):
    """Of the ends that of the bound, of the shape that of l², and of the network that of its own loss."""
    network, rng = network_with(layer, target, weighting), np.random.default_rng(1)
    x_0 = (rng.integers(0, 256, (3, 4, 4, 1)) / 127.5 - 1).astype(np.float32)
    eps = rng.standard_normal(x_0.shape).astype(np.float32)
    time, factor = np.array([[0.11], [0.52], [0.93]], np.float32), 1 / x_0.size
    tau = (time[:, 0].astype(np.float64) * 20 - 1) / 19

    def levels(gamma):
        return [np.sqrt(1 / (1 + np.exp(sign * gamma)))[:, None, None, None] for sign in (1, -1)]

    def prediction(gamma, w=0.3, bias=-0.2):
        a, b = levels(gamma)
        return w * (a * x_0 + b * eps + time[:, :, None, None]) + bias

    def error_of_eps(output, gamma):
        a, b = levels(gamma)
        x_t = a * x_0 + b * eps
        found = {"eps": output, "x0": (x_t - a * output) / b, "v": b * x_t + a * output}
        found["flow"] = (x_t + a * output) / (a + b)
        return ((found[target] - eps) ** 2).sum(axis=(1, 2, 3))

    def nats(weights):
        gamma, slope = gamma_and_slope(weights, tau)
        return 0.5 * slope * error_of_eps(prediction(gamma), gamma)

    def ends(weights):
        first, last = weights["start"], weights["start"] + softplus(weights["width"])
        sigma = np.exp(first / 2)
        distance = sigma * eps.astype(np.float64)
        erf = np.vectorize(math.erf)

        def cdf(value):
            return 0.5 * (1 + erf(value / np.sqrt(2)))

        low = np.where(x_0 < -0.999, 0, cdf((-1 / 255 - distance) / sigma))
        high = np.where(x_0 > 0.999, 1, cdf((1 / 255 - distance) / sigma))
        noise = 1 / (1 + np.exp(-last))
        return np.sum(
            0.5 * (noise + (1 - noise) * x_0.astype(np.float64) ** 2 - 1 - np.log(noise)) - np.log(high - low)
        )

    def differences(function, name):
        here, step, found = weights_of(layer), 1e-4, []
        for k in np.ndindex(here[name].shape):
            ways = [{**here, name: here[name] + sign * step * _unit(here[name], k)} for sign in (1, -1)]
            found.append((function(ways[0]) - function(ways[1])) / (2 * step))
        return np.reshape(found, here[name].shape)

    loss, gradients = schedule_gradients(model_file.describe(network))(
        [tf.constant(x_0), tf.constant(time)], tf.constant(eps), tf.constant(factor, tf.float32), lambda x: x
    )
    got = {
        weight.path.split("/")[-1]: g.numpy() for weight, g in zip(network.trainable_weights, gradients, strict=True)
    }
    for name in "start", "width":
        expected = differences(lambda weights: factor * (nats(weights).sum() + ends(weights)), name)
        np.testing.assert_allclose(got[name], expected, rtol=2e-3)
    for name in NAMES[2:]:
        expected = differences(lambda weights: factor**2 * (nats(weights) ** 2).sum(), name)
        np.testing.assert_allclose(got[name], expected, rtol=5e-3, atol=1e-3 * np.abs(expected).max())

    gamma = gamma_and_slope(weights_of(layer), tau)[0]
    (a, b), snr = levels(gamma), np.exp(-gamma)
    wanted = {"eps": eps, "x0": x_0, "v": a * eps - b * x_0, "flow": eps - x_0}[target]
    per_x_0 = {"eps": snr, "x0": 1 + 0 * snr, "v": snr + 1, "flow": (1 + snr**0.5) ** 2}[target]
    weight = {"none": 1 + 0 * snr, "snr": snr / per_x_0, "min-snr": np.minimum(snr, 5) / per_x_0}[weighting]

    def own_loss(w, bias):
        return factor * (weight * ((prediction(gamma, w, bias) - wanted) ** 2).sum(axis=(1, 2, 3))).sum()

    assert float(loss) == pytest.approx(own_loss(0.3, -0.2), rel=1e-4)
    for name, (dw, db) in {"kernel": (1e-4, 0), "bias": (0, 1e-4)}.items():
        expected = (own_loss(0.3 + dw, -0.2 + db) - own_loss(0.3 - dw, -0.2 - db)) / 2e-4
        assert got[name].ravel()[0] == pytest.approx(expected, rel=2e-3)


def _unit(values, place):
    unit = np.zeros(values.shape)
    unit[place] = 1
    return unit


@pytest.mark.slow
def test_training_makes_the_estimate_of_the_bound_steadier(train_tiny):
    train_tiny(*LEARNED, "--n-epochs", "1", "--learning-rate", "1e-12", "--model", "before.keras")
    train_tiny(*LEARNED, "--n-epochs", "150", "--learning-rate", "0.02", "--ema", "0", "--model", "after.keras")
    before, after = (model_file.open_model(f"{name}.keras") for name in ("before", "after"))
    assert after.sched.alphabar[1] != pytest.approx(before.sched.alphabar[1], rel=1e-6)
    x_0 = tf.constant(np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 1)) / 127.5 - 1, tf.float32)
    eps, tau = tf.random.stateless_normal(x_0.shape, (0, 1)), np.random.default_rng(1).random(2000)

    def spread(layer):
        gamma, slope = gamma_and_slope(weights_of(layer), tau)
        a, b = (np.sqrt(1 / (1 + np.exp(sign * gamma)))[:, None, None, None].astype(np.float32) for sign in (1, -1))
        time = tf.constant((1 + 19 * tau[:, None]) / 20, tf.float32)
        error = tf.reduce_sum((after.network([a * x_0 + b * eps, time]) - eps) ** 2, axis=(1, 2, 3)).numpy()
        nats = 0.5 * slope * error
        return nats.std() / nats.mean()

    assert spread(after.schedule_layer) < 0.9 * spread(before.schedule_layer)
    tau = np.linspace(0, 1, 100_001)
    assert np.all(np.diff(gamma_and_slope(weights_of(after.schedule_layer), tau)[0]) > 0)


def test_a_run_with_a_learned_schedule_resumes_bit_exactly(train_tiny, black_grids):
    more = (*LEARNED, "--optimizer", "muon", "--precision", "bfloat16", "--ema", "0.5", "--learning-rate", "0.01")
    for epochs, model in ("4", "whole.keras"), ("2", "resumed.keras"), ("4", "resumed.keras"):
        keras.backend.clear_session()
        train_tiny(*more, "--n-epochs", epochs, "--model", model)
    assert_equal_to_the_bit("whole.keras", "resumed.keras")
    whole = model_file.open_model("whole.keras")
    assert whole.schedule_layer.dtype_policy.name == "float32"
    raw = checkpoint.open_for_training("whole.keras")  # of which the file has the EMA
    assert raw.sched.alphabar[-1] == whole.sched.alphabar[-1]
    optimizer = raw.network.optimizer
    for weight in raw.schedule_layer.trainable_weights:  # which are no matrices for Muon
        assert optimizer.adam_velocities[optimizer._get_variable_index(weight)] is not None
    assert model_file.describe(raw.network).sched.alphabar[-1] != whole.sched.alphabar[-1]


def test_samples_grids_and_held_out_loss_follow_the_schedule(train_tiny, monkeypatch):
    np.save("new.npy", np.random.default_rng(5).integers(0, 256, (40, 8, 8)).astype(np.uint8))
    grids = ("--sample-every", "1", "--learning-rate", "0.05", "--ema", "0.5", "--validation", "new.npy")
    said = train_tiny(*LEARNED, *grids, "--n-epochs", "3")
    trained = model_file.open_model("model.keras")
    assert np.abs(trained.sched.alphabar - make_schedule("learned", T=20).alphabar).max() > 1e-3

    # The last held-out loss is the one of the file, whose schedule was not there when the run began.
    trained.network.parts, images = 1, np.load("new.npy")[..., None]
    monkeypatch.setattr(checkpoint, "swap_ema_weights", lambda network: None)
    loss = validation.Validation(trained, images).measure()["loss"][0]
    printed = re.findall(r"^held-out loss (\S+);", said, re.MULTILINE)
    assert len(printed) == 3 and float(printed[-1]) == pytest.approx(loss, abs=6e-5)

    how = {"n_sample": 16, "seed": 0, "verbose": 0}
    grid = np.asarray(Image.open("samples.png").convert("L"))
    own = rd.my_sample(**how)
    np.testing.assert_array_equal(grid[1:97:12, 1:97:12], own[0, :, :, 0])  # of an enlarged grid
    for options in {"sampler": "ddim", "steps": 7}, {"sampler": "dpm++", "steps": 7}:
        assert np.any(rd.my_sample(**how, **options) != own)
    assert np.all(np.isfinite(rd.invert(np.full((1, 8, 8, 1), 100, np.uint8), steps=10, verbose=0)))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--zero-snr", "--target", "v"), "--schedule learned does not go with --zero-snr"),
        (("--beta1", "0.1"), "--beta1 has no effect without --schedule linear"),
        (("--T", "1"), "--schedule learned does not go with --T 1"),
        (("--t-sampling", "logsnr"), "--t-sampling has no effect with --schedule learned"),
        (("--weaker-after", "3"), "--weaker-after has no effect with --schedule learned"),
        (("--network", "classifier", "--classes"), "--schedule learned does not go with --network classifier"),
        (("--network", "unet", "--learn-variance"), "--schedule learned does not go with --learn-variance"),
    ],
)
def test_what_a_learned_schedule_cannot_have_is_refused(train_tiny, options, message):
    learned = [
        word for word, before in zip(LEARNED, ("", *LEARNED[:-1]), strict=True) if "--beta2" not in (word, before)
    ]
    with pytest.raises(ValueError, match=message):
        train_tiny(*learned, *options, "--n-epochs", "1")


def test_moments_of_the_bound_are_those_of_other_draws():
    """γ(τ) = 5 τ², errors that depend on γ: drawn along the straight line they give what the weights give."""
    from bound_variance import second_moments

    tau = (np.arange(100_000) + 0.5) / 100_000

    def error(gamma):
        return 1 / (1 + gamma) + np.sin(gamma) ** 2

    learned, straight = second_moments(10 * tau, error(5 * tau**2), 5)
    assert np.isclose(learned, np.mean((10 * tau * error(5 * tau**2) / 2) ** 2))
    assert np.isclose(straight, np.mean((5 * error(5 * tau) / 2) ** 2), rtol=1e-4)
