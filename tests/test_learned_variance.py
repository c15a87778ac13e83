"""The variance of a reverse step that a network learns: its formula, its loss, samples, bits, files."""

import json
import os
import shlex

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, Oracle, tiny_network, wanted_output
from test_training import assert_equal_to_the_bit

import ddpm
import evaluate
import reverse_diffusion as rd
from diffusion import model_file, reverse, sampling
from diffusion.denoiser import autoguided, classifier_free, clipped, denoiser, with_classifier
from diffusion.learned_variance import bound_tables, hybrid_loss, log_ratio
from diffusion.model_file import TrainedModel
from diffusion.options import Sampling
from diffusion.schedules import make_schedule
from evaluation import likelihood
from training import advice, checkpoint
from training.settings import PRESETS, STEPS

SCHED = ddpm.ddpm_schedule(1e-3, 0.5, 20)
BETA = np.linspace(1e-3, 0.5, 20)
ALPHABAR = np.concatenate([[1], np.cumprod(1 - BETA)])
TILDE = BETA * (1 - ALPHABAR[:-1]) / (1 - ALPHABAR[1:])  # β̃_t of t = 1 … T is TILDE[t - 1]
DEVIATION = 0.5  # of images from N(0, 0.25)


def random_images(*seeds, size=4):
    return [np.random.default_rng(seed).standard_normal((20, size, size, 1)).astype(np.float32) for seed in seeds]


def per_image(values):
    """One number for each of t = 1 … T, shaped to multiply the images of a batch."""
    return np.asarray(values)[:, None, None, None]


EVERY_T = tf.range(1, 21)


# --- the formula ------------------------------------------------------------------------------------------------------


def test_u_interpolates_between_both_variances_in_every_step():
    x_t, eps, z, u = random_images(0, 1, 2, 3)
    steps = [ddpm.p_sample(x_t, EVERY_T, eps, z, SCHED, variance, clip=False) for variance in ("posterior", "beta")]
    for value, expected in zip((0.0, 1.0), steps, strict=True):
        learned = log_ratio(np.full_like(u, value), EVERY_T, SCHED)
        got = ddpm.p_sample(x_t, EVERY_T, eps, z, SCHED, learned, clip=False)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    mean = ddpm.p_mean(x_t, EVERY_T, eps, SCHED, clip=False)
    sigma = per_image(TILDE**0.5) * per_image(BETA / np.maximum(TILDE, 1e-30)) ** (u / 2)
    got = ddpm.p_sample(x_t, EVERY_T, eps, z, SCHED, log_ratio(u, EVERY_T, SCHED), clip=False) - mean
    np.testing.assert_allclose(got[1:], sigma[1:] * z[1:], rtol=1e-4, atol=1e-5)
    assert not np.any(got[0])  # the last step adds no noise


@pytest.mark.parametrize("T, zero_snr", [(1, False), (2, False), (1000, False), (1000, True)])
def test_the_range_of_the_variance_is_finite_for_every_schedule(T, zero_snr):
    sched = make_schedule("linear", 0.01, 0.01 if T == 1 else 0.02, T, zero_snr)
    beta, tilde = (sched[name].astype(np.float64) for name in ("beta_t", "posterior_variance"))
    tilde[1] = tilde[2] if T > 1 else beta[1]
    found = ddpm.log_variance_range(sched)
    np.testing.assert_allclose(found[1:], np.log(beta[1:] / tilde[1:]), atol=1e-5)
    assert found[0] == 0 and np.all(found >= 0)


def test_a_term_of_the_bound_knows_the_variance_of_every_pixel():
    x_0, x_t, estimate, u = (images.astype(np.float64) for images in random_images(0, 1, 2, 3))
    beta, before = per_image(BETA[1:]), per_image(ALPHABAR[1:-1])
    mab, tilde = per_image(1 - ALPHABAR[2:]), per_image(TILDE[1:])
    distance = before**0.5 * beta / mab * (x_0 - estimate)[1:]
    p_variance = beta ** u[1:] * tilde ** (1 - u[1:])
    nats = 0.5 * (np.log(p_variance / tilde) + (tilde + distance**2) / p_variance - 1)
    got = ddpm.bound_term(x_0[1:], x_t[1:], EVERY_T[1:], estimate[1:], SCHED, log_ratio(u[1:], EVERY_T[1:], SCHED))
    np.testing.assert_allclose(got, nats.mean(axis=(1, 2, 3)) / np.log(2), rtol=1e-4)


def test_decoder_probabilities_sum_to_1_for_every_variance():
    values = tf.reshape(tf.range(256, dtype=tf.float32) / 127.5 - 1, (256, 1, 1, 1))
    bits, x_1, slides = [], 0.1 + 0 * values, ddpm.ddpm_schedule()
    for u in 0.0, 0.4, 1.0:
        learned = log_ratio(tf.fill(values.shape, u), tf.ones(256, tf.int32), slides)
        decoded = ddpm.bound_decoder(values, x_1, x_1, slides, learned).numpy()
        assert np.sum(2.0**-decoded) == pytest.approx(1, abs=1e-5)
        bits.append(decoded.min())
    assert bits == sorted(bits) and bits[0] < bits[2] - 0.1
    fixed = [ddpm.bound_decoder(values, x_1, x_1, slides, name).numpy().min() for name in ("posterior", "beta")]
    assert bits[::2] == pytest.approx(fixed, rel=1e-5)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_hybrid_loss_is_bound_term_plus_weighted_squared_error(target):
    x_0, eps, predicted, u = random_images(0, 1, 2, 3)
    x_t = ddpm.q_sample(x_0, EVERY_T, eps, SCHED)
    wanted = wanted_output(x_0, EVERY_T, eps, SCHED, target)
    estimate = denoiser(lambda inputs: predicted, SCHED, target)(x_t, EVERY_T)[0]
    bits = ddpm.bound_term(x_0, x_t, EVERY_T, estimate, SCHED, log_ratio(u, EVERY_T, SCHED))
    loss, errors = hybrid_loss(SCHED, target), tf.square(predicted - wanted)
    bound_loss = loss(errors, u, tf.zeros((20, 1, 1, 1)), EVERY_T)
    np.testing.assert_allclose(tf.reduce_mean(bound_loss, axis=(1, 2, 3))[1:], 1e-3 * bits[1:], rtol=1e-3)
    with_weight = loss(errors, u, tf.fill((20, 1, 1, 1), 3.0), EVERY_T)
    np.testing.assert_allclose(with_weight, bound_loss + 3 * errors, rtol=1e-5)


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_hybrid_loss_is_least_at_the_exact_variance(target):
    """Var(x_0 | x_t) = V; the reverse step has β̃ plus the variance of its mean, which is linear in x_0."""
    ab = ALPHABAR[1:]
    V = DEVIATION**2 * (1 - ab) / (ab * DEVIATION**2 + 1 - ab)
    error = {"x0": V, "eps": ab / (1 - ab) * V, "v": V / (1 - ab)}[target]
    u, hybrid = tf.linspace(-0.5, 1.5, 20001), hybrid_loss(SCHED, target)
    for t in range(2, 21):
        values = tf.reshape(u, (1, 1, -1, 1))
        loss = hybrid(tf.fill(values.shape, np.float32(error[t - 1])), values, 0.0, tf.constant([t]))
        assert float(u[np.argmin(loss)]) == pytest.approx(exact_u()[t - 1], abs=0.01)


def exact_u():
    """u of the reverse step from t = 1 … T for images from N(0, 0.25)."""
    ab, before = ALPHABAR[1:], ALPHABAR[:-1]
    V = DEVIATION**2 * (1 - ab) / (ab * DEVIATION**2 + 1 - ab)
    variance = TILDE + (before**0.5 * BETA / (1 - ab)) ** 2 * V
    return np.append(0.0, np.log(variance[1:] / TILDE[1:]) / np.log(BETA[1:] / TILDE[1:]))


def test_only_the_variance_learns_from_the_bound():
    predicted, wanted, u = (tf.constant(images) for images in random_images(0, 1, 2))
    with tf.GradientTape() as tape:
        tape.watch([predicted, u])
        loss = tf.reduce_sum(
            hybrid_loss(SCHED, "v")(tf.square(predicted - wanted), u, tf.fill((20, 1, 1, 1), 0.7), EVERY_T)
        )
    predicted_gradient, u_gradient = tape.gradient(loss, [predicted, u])
    np.testing.assert_allclose(predicted_gradient, 2 * 0.7 * (predicted - wanted), rtol=1e-5)
    ratio, k, d = (column[1:, None, None, None] for column in bound_tables(SCHED, "v").T)
    error = k * np.square(predicted.numpy() - wanted.numpy(), dtype=np.float64) + d
    slope = 1e-3 * 0.5 * ratio * (1 - (1 + error) * np.exp(-ratio * u.numpy())) / np.log(2)
    np.testing.assert_allclose(u_gradient, slope, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
@pytest.mark.parametrize("T", [1, 2, 1000])
def test_best_variance_at_t_1_adds_the_error_and_a_bin(target, T):
    """ν = β̃_2 e^{ru} is best where it is the mean square of the distance to all values of the pixel's bin."""
    sched = ddpm.ddpm_schedule(0.01, 0.01 if T == 1 else 0.02, T)
    beta = np.linspace(0.01, 0.02, T) if T > 1 else np.array([0.01])
    smallest = beta[1] * beta[0] / (1 - (1 - beta[0]) * (1 - beta[1])) if T > 1 else beta[0]
    ratio, k, d = bound_tables(sched, target)[1]
    in_x_0 = {"eps": beta[0] / (1 - beta[0]), "x0": 1, "v": beta[0]}[target]  # squared, of an error 1 of the target
    variance = 0.003 * in_x_0 + (2 / 255) ** 2 / 12
    assert smallest * (1 + k * 0.003 + d) == pytest.approx(variance, rel=1e-5)
    assert ratio == pytest.approx(np.log(beta[0] / smallest), abs=1e-6)


def test_hybrid_loss_at_t_1_is_nearly_the_decoder_term():
    """For deviations as small as in the first steps of the slides, and up to a constant, the difference at u = 0."""
    sched, x_0 = ddpm.ddpm_schedule(), tf.fill((1, 1, 1, 1), 100 / 127.5 - 1)
    hybrid, t = hybrid_loss(sched, "x0"), tf.constant([1])
    for error in 0.002, 0.005, 0.008:
        found = []
        for u in 0.0, 0.5, 1.0, 2.0:
            u_image = tf.fill(x_0.shape, u)
            bits = float(ddpm.bound_decoder(x_0, x_0, x_0 + error, sched, log_ratio(u_image, t, sched))[0])
            scaled_loss = 1e3 * float(tf.squeeze(hybrid(tf.fill((1, 1, 1, 1), error**2), u_image, 0.0, t)))
            found.append((bits, scaled_loss))
        decoder, loss = np.array(found).T
        np.testing.assert_allclose(decoder - decoder[0], loss - loss[0], atol=0.08)


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_new_network_learns_nearly_as_without_a_variance(target):
    """In the layers before the output, which both share, the bound counts little beside the squared error."""
    x_0, eps = random_images(0, 1, size=8)
    x_0, sched = 0.5 * x_0, make_schedule(schedule="cosine")
    t = tf.range(1, 1001, 50)
    x_t, wanted = ddpm.q_sample(x_0, t, eps, sched), wanted_output(x_0, t, eps, sched, target)
    hybrid = hybrid_loss(sched, target)
    shared = tf.Variable(np.random.default_rng(2).standard_normal((8, 8, 1, 16)).astype(np.float32))
    out = np.random.default_rng(3).standard_normal((2, 16)).astype(np.float32) / 100

    def gradient(share):
        with tf.GradientTape() as tape:
            predicted, u = (tf.reduce_sum(shared * row, axis=-1) for row in out)
            error = hybrid(tf.square(predicted - wanted), (u + 1) / 2, tf.ones((20, 1, 1, 1)), t)
            loss = tf.reduce_mean(error) if share else tf.reduce_mean(tf.square(predicted - wanted))
        return tape.gradient(loss, shared).numpy()

    with_bound, without = gradient(True), gradient(False)
    assert x_t.shape == (20, 8, 8, 1) and np.linalg.norm(with_bound - without) < 0.5 * np.linalg.norm(without)


@pytest.mark.parametrize("parts", [1, 2])
def test_training_step_has_the_hybrid_loss(parts):
    x_t, wanted = random_images(0, 1, size=8)
    keras.utils.set_random_seed(0)
    model = tiny_network((8, 8, 1), learn_variance=True)
    model_file.metadata(model)["diffusion"] = {"beta1": 1e-3, "beta2": 0.5, "T": 20}
    model.set_weights([weight + 0.1 for weight in model.get_weights()])
    optimizer = keras.optimizers.SGD(0.0, use_ema=True)
    optimizer.build(model.trainable_variables)
    checkpoint.compile_for_run(model, optimizer, "float32", False, parts)
    weight = np.random.default_rng(2).random((20, 1, 1, 1)).astype(np.float32)
    inputs = [x_t, np.linspace(0.05, 1, 20, dtype=np.float32)[:, None]]
    output = np.asarray(model(inputs), np.float64)
    ratio, k, d = (column[1:, None, None, None] for column in bound_tables(SCHED, "eps").T)
    w, error = weight.astype(np.float64), (output[..., :1] - wanted) ** 2
    log_ratio = ratio * (output[..., 1:] + 1) / 2
    bits = 0.5 * (np.exp(-log_ratio) * (1 + k * error + d) - 1 + log_ratio) / np.log(2)
    assert model.train_on_batch(inputs, wanted, sample_weight=weight) == pytest.approx(
        np.mean(w * error + 1e-3 * bits), rel=1e-5
    )
    assert np.mean(1e-3 * bits) > 5e-4 * np.mean(w * error)  # so that it is not lost in the tolerance


# --- samples and bits -------------------------------------------------------------------------------------------------


def oracle(u_of, shape=(32, 32, 1)):
    """ε̂ of images from N(0, 0.25), exact, and a u for each t = 1 … T, as a network of twice the channels gives them."""

    def predict(inputs):
        x_t, t = inputs[0], tf.cast(tf.round(inputs[1][:, 0] * 20), tf.int32)
        ab = tf.gather(tf.constant(ALPHABAR, tf.float32), t)[:, None, None, None]
        u = tf.gather(tf.constant(np.append(0, u_of), tf.float32), t)[:, None, None, None] + 0 * x_t
        return tf.concat([(1 - ab) ** 0.5 * x_t / (ab * DEVIATION**2 + 1 - ab), 2 * u - 1], axis=-1)

    found = Oracle(predict, shape)
    found.outputs = [np.empty((1, *shape[:2], 2 * shape[2]))]
    return found


def end(network, batch=32, **how):
    steps = reverse.ReverseSteps(TrainedModel(network, SCHED), batch, clip=False, xla=False)
    return list(sampling.sample(steps, sampling.make_plan(SCHED, Sampling(**how)), 0, range(batch)))[-1][1].numpy()


def test_learned_variance_gives_samples_the_variance_of_the_data():
    """β is too much, β̃ too little; the last step, to the mean of x_0 given x_1, leaves out what is between them."""
    network = oracle(exact_u())
    expected = DEVIATION**2 - DEVIATION**2 * (1 - ALPHABAR[1]) / (ALPHABAR[1] * DEVIATION**2 + 1 - ALPHABAR[1])
    found = {variance: end(network, variance=variance).var() for variance in ("beta", "posterior", "learned")}
    assert found["learned"] == pytest.approx(expected, rel=0.02)
    assert found["posterior"] < 0.95 * expected and found["beta"] > 1.05 * expected


@pytest.mark.parametrize("how", [{}, {"steps": 7}, {"steps": 5, "corrector": 1}])
def test_constant_u_is_a_fixed_variance_for_strides_too(how):
    for u, variance in (0, "posterior"), (1, "beta"):
        network = oracle(np.full(20, u))
        got, expected = (end(network, 4, variance=name, **how) for name in ("learned", variance))
        np.testing.assert_allclose(got, expected, atol=1e-4)
        assert np.any(end(oracle(np.full(20, 0.5)), 4, variance="learned", **how) != expected)


def test_other_samplers_leave_a_learned_variance_alone():
    for how in {"sampler": "ddim"}, {"sampler": "dpm++", "steps": 9}, {"sampler": "langevin"}, {"variance": "beta"}:
        np.testing.assert_array_equal(*(end(oracle(np.full(20, u)), 4, **how) for u in (0.2, 0.7)))


def test_guidance_moves_estimates_and_keeps_the_class_variance():
    x_t, t, label = tf.constant(random_images(0)[0]), EVERY_T, tf.fill(20, 1)

    def network(inputs):
        class_number = tf.cast(inputs[2], tf.float32)[:, :, None, None] if len(inputs) > 2 else tf.zeros((20, 1, 1, 1))
        return tf.concat([inputs[0] * (0.1 + 0.2 * class_number), 0.5 + class_number + 0 * inputs[0]], axis=-1)

    def plain(inputs):
        return network(inputs)[..., :1]

    g, weaker = tf.constant(2.0), denoiser(lambda inputs: 0.3 * inputs[0], SCHED)
    classify = lambda inputs: 3 * inputs[0][:, 0, 0] * [1.0, -1.0]  # noqa: E731
    both = [denoiser(function, SCHED) for function in (network, plain)]
    for wrap, u in (
        (lambda denoise: classifier_free(denoise, g), 1.25),
        (lambda denoise: with_classifier(denoise, classify, SCHED, g), 0.75),
        (lambda denoise: autoguided(denoise, weaker, g), 1.25),
    ):
        estimate, expected = (clipped(wrap(denoise), SCHED)(x_t, t, label) for denoise in both)
        for got, wanted in zip(estimate[:2], expected[:2], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(estimate.u, u + 0 * x_t)
        assert expected.u is None


def test_bits_of_a_gaussian_are_fewest_with_the_learned_variance():
    pixels = np.clip(np.rint(127.5 * (1 + DEVIATION * np.random.default_rng(0).standard_normal((40, 8, 8, 1)))), 0, 255)
    ways = likelihood.WAYS + likelihood.LEARNED
    denoise = denoiser(oracle(exact_u()), SCHED)
    found = likelihood.measure_denoising(denoise, SCHED, pixels.astype(np.uint8), 0, 20, ways=ways)
    rows = likelihood.bound_rows(found, ways)
    for clip in "clipped", "not clipped":
        bits = {name: rows[f"bits/dim, {name}, {clip}"]["value"] for name in ("β", "β̃", "learned")}
        assert bits["learned"] < min(bits["β"], bits["β̃"]) - 0.05
    assert len(likelihood.bound_rows(found | {"bits": found["bits"][:, :4]})) == 5


# --- files ------------------------------------------------------------------------------------------------------------

UNET = ("--network", "unet", "--n-feat", "8", "--widths", "1", "--attention", "0", "--patch", "1")  # compiled quickly
LEARNED = (*TINY, *UNET, "--variance", "learned", "--target", "v", "--sample-steps", "5")


def test_learned_variance_is_trained_and_recommended_by_the_file(train_tiny, tiny_unet):
    train_tiny(*LEARNED, "--n-epochs", "2", "--model", "two.keras")
    model = model_file.open_model("two.keras")
    assert model.learns_variance and model.recommended.variance == "learned"
    how = {"model": "two.keras", "seed": 0, "n_sample": 2, "verbose": 0}
    np.testing.assert_array_equal(rd.my_sample(**how), rd.my_sample(**how, steps=5, variance="learned"))
    assert np.any(rd.my_sample(**how) != rd.my_sample(**how, steps=5, variance="beta"))

    train_tiny("--variance", "posterior", "--n-epochs", "3", "--model", "two.keras")  # of grids, and it learns on
    model = model_file.open_model("two.keras")
    assert model.learns_variance and model.recommended.variance == "posterior"


@pytest.mark.slow
def test_learned_variance_run_resumes_bit_exactly(train_tiny, black_grids):
    """In the layers of `Unet`, with Muon, in bfloat16; from the copy that is saved after the first step of an epoch."""
    more = (*LEARNED, "--lr-decay", "none", "--precision", "bfloat16", "--optimizer", "muon", "--n-epochs", "2")
    train_tiny(*more, "--model", "whole.keras", "--save-every", "0", "--keep", "9")
    os.rename("whole-epoch0001.keras", "resumed.keras")
    keras.backend.clear_session()  # TensorFlow adds gradients up in the order of the layers' automatic names
    said = train_tiny(*more, "--model", "resumed.keras")
    assert "resuming after 1 epochs, 3 steps" in said and model_file.open_model("resumed.keras").learns_variance
    assert_equal_to_the_bit("whole.keras", "resumed.keras")


def test_learned_variance_is_refused_without_a_network_for_it(train_tiny, tiny_unet, black_grids):
    train_tiny(*TINY, "--n-epochs", "1", "--model", "plain.keras")
    train_tiny(*TINY, *UNET, "--n-epochs", "1", "--model", "unet.keras")
    for model, message in (
        ("plain.keras", "--variance learned requires --network unet"),
        ("new.keras", "--variance learned requires --network unet"),
        ("unet.keras", "--variance learned needs a network that has learned it"),
    ):
        network = UNET if model == "unet.keras" else ()
        with pytest.raises(ValueError, match=message):
            train_tiny(*TINY, *network, "--n-epochs", "2", "--model", model, "--variance", "learned")
    with pytest.raises(ValueError, match="variance learned needs a network that learns it"):
        rd.my_sample(model="plain.keras", variance="learned", verbose=0)
    with pytest.raises(ValueError, match="variance must be one of beta, posterior"):
        ddpm.p_sample(*random_images(0), EVERY_T, *random_images(1, 2), SCHED, "learned")


def test_evaluate_reports_learned_variance(train_tiny, tiny_unet, black_grids, monkeypatch):
    train_tiny(*LEARNED, "--n-epochs", "1", "--model", "model.keras")
    np.save("new.npy", np.random.default_rng(1).integers(0, 256, (20, 8, 8)).astype(np.uint8))
    monkeypatch.setattr("sys.argv", shlex.split("evaluate.py --data new.npy --only bits,loss --draws 2"))
    evaluate.main()
    with open("model-evaluation.json", encoding="utf-8") as file:
        assert np.isfinite(json.load(file)["bits/dim, learned, clipped"]["value"])


def test_expected_loss_is_unknown_for_learned_variance():
    """Its loss has another part."""
    settings = {**PRESETS["first"], "n_epochs": STEPS["first"] // advice.EPOCH, "flip": False}
    assert "expected 0.155" in advice.on_loss(settings, "drawings", 0, 0.15)
    assert advice.on_loss({**settings, "learn_variance": True}, "drawings", 0, 0.15) is None


def test_learn_variance_is_fixed_by_the_file_and_recommended(train_tiny, tiny_unet, black_grids):
    """`--variance learned` is its old spelling for a new model; grids may use another variance."""
    new = [word for word, before in zip(LEARNED, ("", *LEARNED), strict=False) if "--variance" not in (word, before)]
    train_tiny(*new, "--learn-variance", "--n-epochs", "1", "--model", "a.keras")
    train_tiny(*new, "--learn-variance", "--variance", "beta", "--n-epochs", "1", "--model", "b.keras")
    train_tiny(*LEARNED, "--n-epochs", "1", "--model", "c.keras")
    for name, variance in ("a", "learned"), ("b", "beta"), ("c", "learned"):
        model = model_file.open_model(f"{name}.keras")
        assert model.learns_variance and model.metadata["settings"]["learn_variance"] is True
        assert model.recommended.variance == variance
    with pytest.raises(ValueError, match="c.keras was trained with --learn-variance; omit --no-learn-variance"):
        train_tiny("--model", "c.keras", "--no-learn-variance", "--n-epochs", "2")
    for wrong, message in (
        ((*TINY, "--learn-variance"), "--learn-variance requires --network unet"),
        ((*LEARNED, "--no-learn-variance"), "--variance learned needs a network that has learned it"),
    ):
        with pytest.raises(ValueError, match=message):
            train_tiny(*wrong, "--n-epochs", "1", "--model", "new.keras")
