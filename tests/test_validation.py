"""The loss on held-out images, image by image."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, Oracle
from test_guidance import CONSTANTS, conditional

import ddpm
from diffusion.model_file import TrainedModel
from diffusion.sampling import standard_normal
from diffusion.targets import TARGETS
from support import device
from training import checkpoint, validation


def smaller_by(sched, t):
    """The smaller of the squared errors of x̂_0 and ε̂, divided by the squared error of ε̂."""
    return np.minimum(1, (1 - sched.alphabar[t]) / sched.alphabar[t])


@pytest.mark.parametrize("target", TARGETS)
def test_held_out_loss_means_the_same_for_every_target(monkeypatch, target):
    """Of networks whose x̂_0 is off by 0.1 up to SNR = 1 and whose ε̂ is from there on, whatever they predict."""
    monkeypatch.setattr(checkpoint, "swap_ema_weights", lambda model: None)
    sched, images = ddpm.ddpm_schedule(1e-3, 0.3, 20), np.full((40, 2, 2, 1), 255, np.uint8)

    def predict(inputs):
        x_t, t = inputs[0], tf.cast(tf.round(inputs[1][:, 0] * 20), tf.int32)
        ab = tf.gather(tf.constant(sched.alphabar, tf.float32), t)[:, None, None, None]
        off = tf.where(ab > 0.5, 0.1, 0.1 * tf.sqrt((1 - ab) / ab))
        x_0 = 1 - off  # of images that are white
        eps = (x_t - tf.sqrt(ab) * x_0) / tf.sqrt(1 - ab)
        v = tf.sqrt(ab) * eps - tf.sqrt(1 - ab) * x_0
        return {"eps": eps, "x0": x_0 + 0 * x_t, "v": v, "flow": eps - x_0}[target]

    measured = validation.Validation(TrainedModel(Oracle(predict, (2, 2, 1)), sched, target), images).measure()["loss"]
    np.testing.assert_allclose([measured[0], *measured[1]], 0.01, rtol=1e-3)


def test_each_held_out_image_has_its_own_step_and_noise(monkeypatch):
    """70 images are more than a batch and no multiple of one; the network takes x_t itself for the noise."""
    monkeypatch.setattr(checkpoint, "swap_ema_weights", lambda model: None)
    sched, images = (
        ddpm.ddpm_schedule(1e-3, 0.3, 20),
        np.random.default_rng(0).integers(0, 256, (70, 4, 4, 1), np.uint8),
    )
    measured = validation.Validation(TrainedModel(Oracle(lambda inputs: inputs[0], (4, 4, 1)), sched), images)
    assert set(np.bincount(measured.t, minlength=21)[1:]) == {3, 4} and measured.t.min() == 1
    expected = 1 + np.random.default_rng(0).permutation(70) * 20 // 70  # as in every version, so that rows compare
    np.testing.assert_array_equal(measured.t, expected)

    eps = standard_normal(0, 0, tf.range(70), (4, 4, 1))
    x_t = ddpm.q_sample(tf.constant(ddpm.from_pixels(images)), tf.constant(measured.t), eps, sched)
    errors = np.mean((x_t - eps) ** 2, axis=(1, 2, 3)) * smaller_by(sched, measured.t)
    assert len(np.unique(errors)) == 70
    mean, quarters = measured.measure()["loss"]
    assert mean == pytest.approx(errors.mean(), rel=1e-5)
    expected = [errors[(measured.t > 5 * q) & (measured.t <= 5 * q + 5)].mean() for q in range(4)]
    assert quarters == pytest.approx(expected, rel=1e-5)


def test_each_image_is_measured_with_its_own_class(monkeypatch):
    monkeypatch.setattr(checkpoint, "swap_ema_weights", lambda model: None)
    sched, labels = ddpm.ddpm_schedule(1e-3, 0.3, 20), np.array([-1, 0, 1] * 8)
    images = np.random.default_rng(0).integers(0, 256, (24, 2, 2, 1), np.uint8)
    for given in labels, None:  # -1 is no class
        model = conditional(CONSTANTS)
        model.parts = 2
        measured = validation.Validation(TrainedModel(model, sched), images, given)
        eps = standard_normal(0, 0, tf.range(24), (2, 2, 1))
        x_t = ddpm.q_sample(tf.constant(ddpm.from_pixels(images)), tf.constant(measured.t), eps, sched)
        constants = np.array(CONSTANTS)[labels + 1] if given is not None else np.full(24, CONSTANTS[0])
        errors = np.mean((x_t / 2 + constants[:, None, None, None] - eps) ** 2, axis=(1, 2, 3))
        expected = np.mean(errors * smaller_by(sched, measured.t))
        assert measured.measure()["loss"][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("parts, sizes", [(2, [32] * 4), (100, [1] * 128)])
def test_held_out_batches_have_the_parts_of_training(monkeypatch, parts, sizes):
    """So `--parts` gives the same rows on another number of cores. Of two batches of 64 no part is empty."""
    monkeypatch.setattr(checkpoint, "swap_ema_weights", lambda model: None)
    monkeypatch.setattr(device, "cores", lambda: 5)
    asked = []

    def recording(inputs):
        tf.py_function(lambda x_t: asked.append(len(x_t)), [inputs[0]], [])
        return inputs[0]

    network = Oracle(recording, (2, 2, 1))
    network.parts = parts
    validation.Validation(TrainedModel(network, ddpm.ddpm_schedule()), np.zeros((70, 2, 2, 1), np.uint8)).measure()
    assert asked == sizes


def test_classifier_is_measured_on_images_that_have_a_class(monkeypatch):
    """What it says of the others is neither right nor wrong."""
    monkeypatch.setattr(checkpoint, "swap_ema_weights", lambda model: None)
    sched, images = ddpm.ddpm_schedule(1e-3, 0.3, 20), np.zeros((6, 2, 2, 1), np.uint8)
    sure_of_1 = Oracle(lambda inputs: tf.tile([[0.0, 9.0]], (tf.shape(inputs[0])[0], 1)), (2, 2, 1))
    sure_of_1.outputs = [np.empty((1, 2))]
    labels = np.array([-1, 1, -1, 1, 1, 0])
    measured = validation.Validation(TrainedModel(sure_of_1, sched), images, labels).measure()
    assert measured["accuracy"][0] == pytest.approx(3 / 4)
    assert measured["loss"][0] == pytest.approx(9 / 4, rel=1e-2)
    with pytest.raises(ValueError, match="none of the held-out images has a class"):
        validation.Validation(TrainedModel(sure_of_1, sched), images, np.full(6, -1))


@pytest.mark.parametrize("T, count, measured", [(1, 9, [0]), (2, 9, [0, 2]), (20, 3, [0, 1, 2])])
def test_a_quarter_without_images_has_no_loss(monkeypatch, T, count, measured):
    """Of few steps or few images; the ε̂ of a network that says 0 errs by 1 in the mean."""
    monkeypatch.setattr(checkpoint, "swap_ema_weights", lambda model: None)
    silent, images = Oracle(lambda inputs: 0 * inputs[0], (16, 16, 1)), np.zeros((count, 16, 16, 1), np.uint8)
    with np.errstate(all="raise"):
        measure = validation.Validation(
            TrainedModel(silent, ddpm.ddpm_schedule(0.6, 0.6, T)), images
        ).measure  # SNR below 1
        mean, quarters = measure()["loss"]
    assert [q for q in range(4) if quarters[q] is not None] == measured
    assert [mean, *(quarters[q] for q in measured)] == pytest.approx([1] * (1 + len(measured)), abs=0.4)


@pytest.mark.parametrize(
    "held_out, begun", [([5, 4, 3, 3.1, 3.2, 3.3, 3.01], False), ([5, 4, 3, 3.01, 3.2, 3.3, 3.4], True)]
)
def test_overfitting_warning_uses_only_the_last_measurements(held_out, begun):
    training = [5, 4, 3, 2, 1, 0.9, 0.8]
    assert bool(validation.overfitting_warning(list(zip(training, held_out, strict=True)))) == begun


@pytest.mark.parametrize("source, same", [("images.npy", True), ("0.3", False)])
def test_held_out_images_that_are_trained_on_are_noticed(train_tiny, black_grids, source, same):
    said = train_tiny(*TINY, "--n-epochs", "1", "--validation", source)
    assert ("the held-out images are the training images" in said) == same
