"""What one training step does, and the loop around it: t, noise, flips, weights, EMA, rate, batches, seeds, saves."""

import collections
import contextlib
import copy
import os
import subprocess
import sys
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import environment, prepare_network, tiny_network
from PIL import Image

import data
import ddpm
import diffusion_model
import unet
from data import drawings
from diffusion import model_file, reverse, sampling
from diffusion.options import Sampling
from support import device, files, grids, lock
from training import checkpoint, history, preparation, train_step, training_run
from training.images import Images

T = 20
DIFFUSION = {"beta1": 0.01, "beta2": 0.3, "T": T}
CLEAN = {"beta1": 1e-8, "beta2": 1e-8, "T": 1}  # hardly any noise, so that images can be told apart after it
ALPHABAR = np.cumprod([1, *(1 - np.linspace(0.01, 0.3, T))])


def alphabar(t):
    return ALPHABAR[t][:, None, None, None]


def noising(seed=0, diffusion=DIFFUSION):
    """`diffusion_model.noising` as a function from NumPy to NumPy that returns x_t, t/T and ε."""
    noisy = diffusion_model.noising(ddpm.ddpm_schedule(**diffusion), seed)
    return lambda x_0, step: [a.numpy() for a in noisy(tf.constant(x_0, tf.float32), tf.constant(step, tf.int64))][:3]


# --- t and noise ------------------------------------------------------------------------------------------------------


def chi_square(counts):
    """How far counts are from even ones, in standard deviations above the expected χ²."""
    expected, freedom = counts.mean(), counts.size - 1
    return (np.sum((counts - expected) ** 2 / expected) - freedom) / (2 * freedom) ** 0.5


def test_t_is_uniform_and_independent_of_other_t_and_the_noise():
    noisy, x_0 = noising(), np.zeros((500, 1, 1, 1))
    steps = [noisy(x_0, step) for step in range(80)]
    t = np.stack([T * t_input[:, 0] for _, t_input, _ in steps])
    np.testing.assert_allclose(t, np.rint(t), atol=1e-5)
    t = np.rint(t).astype(int)
    assert set(t.ravel()) == set(range(1, T + 1))
    assert chi_square(np.bincount(t.ravel())[1:]) < 4
    for one, other in (t[:, 1:], t[:, :-1]), (t[1:], t[:-1]), (t[2:], t[:-2]):
        pairs = np.bincount((one * T + other - T - 1).ravel(), minlength=T * T)
        assert chi_square(pairs) < 4

    eps = np.stack([eps[:, 0, 0, 0] for _, _, eps in steps]).astype(np.float64)
    assert abs(eps.mean()) < 4 / eps.size**0.5 and eps.var() == pytest.approx(1, abs=4 * (2 / eps.size) ** 0.5)
    pairs = [(t, eps), (t, np.abs(eps)), (t[1:], eps[:-1]), (t[:-1], eps[1:]), (eps[1:], eps[:-1])]
    for one, other in [*pairs, (eps[:, 1:], eps[:, :-1])]:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / one.size**0.5


def test_training_and_sampling_never_draw_from_one_key_twice(monkeypatch):
    """Two draws from one key come from the same bits, even where no correlation shows it."""
    keys = []

    def recording(function):
        def draw(shape, seed, *more, **named):
            keys.append(tuple(int(number) for number in seed))
            return function(shape, seed, *more, **named)

        return draw

    for name in "stateless_normal", "stateless_uniform", "stateless_truncated_normal":
        monkeypatch.setattr(tf.random, name, recording(getattr(tf.random, name)))
    tf.config.run_functions_eagerly(True)
    try:
        noisy = noising(seed=5)
        for step in range(60):
            noisy(np.zeros((2, 1, 1, 1)), step)
        for t in range(1, T + 2):
            for draw in range(3):
                sampling.standard_normal(5, t, tf.range(3), (1, 1, 1), draw)
    finally:
        tf.config.run_functions_eagerly(False)
    assert len(keys) >= 2 * 60 + 9 * (T + 1)
    assert len(set(keys)) == len(keys)


def test_x_t_is_noised_with_the_t_given_to_the_network():
    x_0 = np.random.default_rng(0).uniform(-1, 1, (64, 8, 8, 3)).astype(np.float32)
    x_t, t_input, eps = noising()(x_0, 3)
    assert t_input.shape == (64, 1) and t_input.dtype == x_t.dtype == eps.dtype == np.float32
    ab = alphabar(np.rint(T * t_input[:, 0]).astype(int))
    np.testing.assert_allclose(x_t, ab**0.5 * x_0 + (1 - ab) ** 0.5 * eps.astype(np.float64), atol=1e-5)
    vectors = eps.reshape(64, -1)
    assert np.abs(np.corrcoef(vectors)[np.triu_indices(64, 1)]).max() < 5 / vectors.shape[1] ** 0.5


def test_noise_and_t_depend_on_seed_and_step():
    x_0 = np.zeros((16, 8, 8, 1))
    one = noising(seed=1)(x_0, 7)
    for same, again in zip(one, noising(seed=1)(x_0, 7), strict=True):
        np.testing.assert_array_equal(same, again)
    for other in noising(seed=2)(x_0, 7), noising(seed=1)(x_0, 8), noising(seed=1)(x_0, 6):
        assert np.any(other[1] != one[1]) and not np.any(other[2] == one[2])


# --- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decay, warmup, epoch, images, step, rate",
    [
        ("none", 0, 0, 0, 0, 4e-3),
        ("none", 0, 3, 8, 11, 4e-3),
        ("none", 3, 0, 0, 0, 1e-3),  # a quarter, a half, three quarters, all of it
        ("none", 3, 0, 4, 1, 2e-3),
        ("none", 3, 0, 8, 2, 3e-3),
        ("none", 3, 1, 0, 3, 4e-3),
        ("none", 3, 3, 8, 11, 4e-3),
        ("cosine", 0, 0, 0, 0, 4e-3),
        ("cosine", 0, 0, 4, 1, 3.9021130325903e-3),  # (1 + cos 18°) / 2 of it
        ("cosine", 0, 1, 0, 3, 3.4142135623731e-3),  # 45°
        ("cosine", 0, 2, 0, 6, 2e-3),  # 90°
        ("cosine", 0, 3, 0, 9, 5.857864376269e-4),  # 135°
        ("cosine", 0, 3, 8, 11, 2.46233188097e-5),  # 171°, the very last step
        ("cosine", 3, 0, 4, 1, 1.9510565162952e-3),  # half the rate at 18°
    ],
)
def test_the_learning_rate_at_points_computed_by_hand(decay, warmup, epoch, images, step, rate):
    """Four epochs of ten images in batches of four."""
    settings = {"learning_rate": 4e-3, "lr_decay": decay, "warmup": warmup, "n_epochs": 4, "batch_size": 4}
    progress = {"epoch": epoch, "images": images, "step": step}
    assert diffusion_model.learning_rate(settings, progress, 10) == pytest.approx(rate, rel=1e-10)


# --- the loop ---------------------------------------------------------------------------------------------------------


SHAPE = (8, 8, 1)


pytestmark = pytest.mark.usefixtures("tiny_networks")


def random_images(count, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def new_options(images, **more):
    """The options of a new run with such images, whose settings differ from every preset."""
    slides = {"network": "naive", "target": "eps", "schedule": "linear", "weighting": "none", "optimizer": "adam"}
    slides["learning_rate"] = 4e-3
    kind = {"data": str(images), "preset": "first", "image_size": 8, "channels": 1, "ema": 0.9}
    return {**kind, **slides, **DIFFUSION, **more}


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A file of a run that is one step into its first epoch: 16 of its 48 images.

    In its own folder, with the paths of model and images and the metadata.
    """
    folder = tmp_path / "begun"
    folder.mkdir()
    path, images = str(folder / "model.keras"), str(folder / "images.npy")
    np.save(images, random_images(48))
    model, *_ = prepare_network(new_options(images, n_epochs=4), path)
    take_step(model)
    book = model_file.metadata(model)
    book["progress"].update(step=1, images=16, epoch_steps=1, loss=1.25, seconds=2.5)
    checkpoint.save(model, path)
    return types.SimpleNamespace(path=path, images=images, book=book)


def take_step(model):
    """One step of the optimizer, with 1 for every gradient."""
    model.optimizer.apply([keras.ops.ones_like(w) for w in model.trainable_weights], model.trainable_weights)


def new_run(begun, precision="float32", n_parts=1, **more):
    """A tiny network at the beginning of a run with the metadata of `begun`, but for what `more` changes in them."""
    model, book = tiny_network(SHAPE), copy.deepcopy(begun.book)
    book["progress"].update(step=0, images=0, epoch_steps=0, loss=0.0, seconds=0.0)
    for part, values in more.items():
        book[part].update(values)
    model_file.metadata(model).update(book)
    optimizer = keras.optimizers.Adam(use_ema=True, ema_momentum=book["settings"]["ema"])
    optimizer.build(model.trainable_variables)
    checkpoint.compile_for_run(model, optimizer, precision, xla=False, parts=n_parts)
    return model


class Counting:
    """Stands in for the keeper: starts new epochs and records what it is told after each step."""

    def __init__(self, progress):
        self.progress, self.seen = progress, []

    def before_epoch(self):
        pass

    def after_step(self, loss):
        self.seen.append((loss, {**self.progress}))

    def after_epoch(self):
        self.progress.update(epoch=self.progress["epoch"] + 1, images=0, epoch_steps=0, loss=0.0, seconds=0.0)

    def at_the_end(self):
        pass


Step = collections.namedtuple("Step", "x_t t_input eps rate")


def steps_of(model, images):
    """Runs the loop without training: what the network is given in each step, and the optimizer's rate at that time."""
    steps = []

    def train_on_batch(x, y, *more, **named):
        steps.append(Step(*(np.asarray(a) for a in (*x[:2], y)), float(model.optimizer.learning_rate)))
        return 1.0

    model.train_on_batch = train_on_batch
    diffusion_model.train(model_file.describe(model), Images(images), Counting(model_file.metadata(model)["progress"]))
    return steps


def sizes(steps):
    return [len(step.x_t) for step in steps]


def grey_levels(count):
    """Images of one grey level each, which identifies them."""
    return np.broadcast_to(6 * np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 1))


def levels(steps):
    """The grey levels in the order in which the network was given them."""
    values = np.concatenate([step.x_t for step in steps]).mean(axis=(1, 2, 3))
    return np.rint((values + 1) * 127.5 / 6).astype(int).tolist()


def test_each_epoch_shows_every_image_once_in_a_new_order(begun):
    settings = {"batch_size": 16, "n_epochs": 3}
    orders = []
    for seed in 0, 1:
        order = levels(steps_of(new_run(begun, diffusion=CLEAN, settings={**settings, "seed": seed}), grey_levels(40)))
        orders += [order[:40], order[40:80], order[80:]]
    for k, order in enumerate(orders):
        assert sorted(order) == list(range(40))
        assert order not in orders[:k]


@pytest.mark.parametrize("flip", [True, False])
def test_flip_mirrors_about_half_of_the_images(begun, flip):
    images = np.zeros((64, 8, 8, 1), np.uint8)
    images[:, :, :4] = 255  # white on the left
    model = new_run(begun, diffusion=CLEAN, settings={"flip": flip, "n_epochs": 2})
    x = np.concatenate([step.x_t for step in steps_of(model, images)])
    mirrored = x[:, 0, 0, 0] < x[:, 0, -1, 0]
    upright = np.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
    np.testing.assert_allclose(upright, images[0] / 127.5 - 1 + 0 * x, atol=1e-3)
    first, second = mirrored[:64], mirrored[64:]
    assert (20 < first.sum() < 44 and np.any(first != second)) if flip else not mirrored.any()


def test_noise_is_never_repeated_and_resuming_draws_the_rest(begun):
    images, settings = random_images(20), {"batch_size": 8, "n_epochs": 3, "seed": 4}
    steps = steps_of(new_run(begun, settings=settings), images)
    assert sizes(steps) == [8, 8, 4] * 3
    eps = [image.tobytes() for step in steps for image in step.eps]
    assert len(set(eps)) == len(eps)
    assert len({step.t_input.tobytes() for step in steps}) == len(steps)

    place = {"epoch": 1, "images": 8, "step": 4}
    rest = steps_of(new_run(begun, progress=place, settings=settings), images)
    assert len(rest) == 5
    for step, again in zip(steps[4:], rest, strict=True):
        for one, other in zip(step, again, strict=True):
            np.testing.assert_array_equal(one, other)

    others = steps_of(new_run(begun, settings={**settings, "seed": 5}), images)
    assert not {image.tobytes() for step in others for image in step.eps} & set(eps)


@pytest.mark.parametrize("decay", ["none", "cosine"])
def test_optimizer_takes_each_step_at_the_scheduled_rate(begun, decay):
    settings = {"learning_rate": 8e-3, "lr_decay": decay, "warmup": 4, "n_epochs": 3, "batch_size": 8}
    steps = steps_of(new_run(begun, settings=settings), random_images(24))
    step = np.arange(9)
    expected = 8e-3 * np.minimum(1, (step + 1) / 5)
    if decay == "cosine":
        expected *= np.cos(np.pi / 2 * step / 9) ** 2  # half a cosine over the nine steps
    np.testing.assert_allclose([s.rate for s in steps], expected, rtol=1e-6)


@pytest.mark.parametrize("n_parts", [1, 2])
def test_training_is_adam_on_the_squared_error_with_ema(begun, n_parts):
    """The whole of training for a network of two weights, in NumPy's float64."""
    images, settings = random_images(24), {"batch_size": 8, "n_epochs": 1, "lr_decay": "cosine", "ema": 0.7}
    model = new_run(begun, n_parts=n_parts, settings={**settings, "warmup": 1})
    model.layers[-1].set_weights([np.full((1, 1, 1, 1), 0.3), np.full(1, -0.2)])
    rates = [step.rate for step in steps_of(model, images)]
    del model.train_on_batch
    book = model_file.metadata(model)
    book["progress"].update(epoch=0, images=0, step=0, loss=0.0)
    counting = Counting(book["progress"])
    diffusion_model.train(model_file.describe(model), Images(images), counting)

    noisy, weights, m, v = noising(book["settings"]["seed"]), np.array([0.3, -0.2]), np.zeros(2), np.zeros(2)
    average, losses = weights.copy(), []
    for step, (batch, _) in enumerate(data.batches(images, 8, book["settings"]["seed"], 0)):
        x_t, t_input, eps = (a.astype(np.float64) for a in noisy(ddpm.from_pixels(batch), step))
        x = x_t + t_input[:, :, None, None]
        error = weights[0] * x + weights[1] - eps
        losses.append(np.mean(error**2))
        slope = np.array([np.mean(2 * error * x), np.mean(2 * error)])
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        rate = rates[step] * (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
        weights = weights - rate * m / (v**0.5 + 1e-7)
        average = 0.7 * average + 0.3 * weights if step else weights  # Keras starts its average from the first weights
    np.testing.assert_allclose(flat(model), weights, rtol=1e-4)
    checkpoint.swap_ema_weights(model)
    np.testing.assert_allclose(flat(model), average, rtol=1e-4)

    assert [loss for loss, _ in counting.seen] == pytest.approx(losses, rel=1e-4)
    for k, (_, progress) in enumerate(counting.seen, start=1):
        assert progress["loss"] == pytest.approx(sum(losses[:k]), rel=1e-4)
        assert (progress["epoch"], progress["images"], progress["step"]) == (0, 8 * k, k)


def orthogonalized(matrix):
    """U p(S) Vᵀ in float64, where p is five times the quintic of Muon; singular values end between 0.7 and 1.2."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt(np.sum(s**2))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ np.diag(s) @ v, s


@pytest.mark.parametrize("precision, n_parts", [("float32", 2), ("float16", 1)])
def test_muon_orthogonalizes_kernels_and_leaves_the_rest_to_adam(precision, n_parts):
    image, t = keras.Input((4, 4, 16)), keras.Input((1,))
    x = keras.layers.Conv2D(24, 3, padding="same", name="kernel")(unet.Logbook({"progress": {}})(image))
    x = keras.layers.Conv2DTranspose(16, 1, name="transposed")(x)
    model = keras.Model([image, t], keras.layers.DepthwiseConv2D(1, name="narrow")(x))
    optimizer = preparation.build_optimizer({"optimizer": "muon", "learning_rate": 0.05, "ema": 0.9})
    optimizer.build(model.trainable_variables)
    checkpoint.compile_for_run(model, optimizer, precision, xla=False, parts=n_parts)
    draw = np.random.default_rng(0).standard_normal
    weights = {w.path: w.numpy().astype(np.float64) for w in model.trainable_weights}
    momentum, variance = ({path: np.zeros_like(w) for path, w in weights.items()} for _ in range(2))
    spreads = []
    for step in range(1, 4):
        x_t, target = (draw((6, 4, 4, 16)).astype(np.float32) for _ in range(2))
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model([x_t, np.zeros((6, 1))], training=True) - target) ** 2)
        gradients = tape.gradient(loss, [w.value for w in model.trainable_weights])
        model.train_on_batch([x_t, np.zeros((6, 1), np.float32)], target)
        for w, gradient in zip(model.trainable_weights, gradients, strict=True):
            g, m, v = gradient.numpy().astype(np.float64), momentum[w.path], variance[w.path]
            if w.path in ("kernel/kernel", "transposed/kernel"):
                m = 0.95 * m + g
                matrix = (g + 0.95 * m).reshape(-1, w.shape[-1])
                change, spread = orthogonalized(matrix)
                spreads += [*spread[np.linalg.svd(matrix, compute_uv=False) > 0.2 * np.linalg.norm(matrix, 2)]]
                change = 0.2 * np.sqrt(max(matrix.shape)) * change.reshape(w.shape)
            else:
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                change = np.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m / (np.sqrt(v) + 1e-7)
            weights[w.path], momentum[w.path], variance[w.path] = weights[w.path] - 0.05 * change, m, v
            error = np.abs(w.numpy() - weights[w.path]).max()
            assert error < (1e-4 if precision == "float32" else 0.02), (w.path, step)
    assert min(spreads) > 0.6 and max(spreads) < 1.3


def test_muon_trains_wide_kernels_and_decays_nothing():
    shapes = (3, 3, 16, 16), (1, 1, 16, 64), (3, 3, 16, 15), (1, 1, 15, 64), (3, 3, 32, 3), (64, 64), (64,)
    assert [train_step.is_wide_kernel(shape) for shape in shapes] == [True, True, *[False] * 5]
    optimizer = preparation.build_optimizer({"optimizer": "muon", "learning_rate": 1e-3, "ema": 0.9})
    assert optimizer.weight_decay is None and optimizer.adam_weight_decay is None
    layer = unet.ClassLayer(4, 32)
    layer.build((None, 1))
    optimizer.build(layer.trainable_variables)
    assert layer.trainable_variables and all(v is not None for v in optimizer.adam_velocities)


def flat(model):
    return np.concatenate([w.ravel() for w in model.get_weights()])


# --- new and resumed runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resumed, typed, momentum",
    [(False, 0.5, 0.5), (True, None, 0.9), (True, 0.5, 0.5), (True, 0.0, 0.0)],
)
def test_ema_weights_use_the_requested_momentum(begun, tmp_path, resumed, typed, momentum):
    typed = {} if typed is None else {"ema": typed}
    options = typed if resumed else new_options(begun.images, **typed)
    model, *_ = prepare_network(options, begun.path if resumed else str(tmp_path / "model.keras"))
    expected = ema_weights(model)
    for step in range(4):
        model.optimizer.learning_rate = 0.1 * (step + 1)
        take_step(model)
        keeps = momentum if resumed or step else 0  # Keras starts its average from the first weights
        expected = keeps * expected + (1 - keeps) * flat(model)
        np.testing.assert_allclose(ema_weights(model), expected, atol=1e-5)


def ema_weights(model):
    checkpoint.swap_ema_weights(model)
    values = flat(model)
    checkpoint.swap_ema_weights(model)
    return values


def settings_of(options, path):
    return model_file.metadata(prepare_network(options, str(path))[0])["settings"]


def write_photographs(folder):
    """Six small JPEG and PNG files."""
    folder.mkdir()
    for k, image in enumerate(random_images(6, (20, 24, 3), seed=3)):
        Image.fromarray(image).save(folder / f"{k}.{'jpg' if k % 2 else 'png'}")


@pytest.mark.parametrize(
    "source, typed, flip",
    [
        ("photographs", None, True),
        ("photographs", False, False),
        ("images.npy", None, False),
        ("images.npy", True, True),
        ("drawings", None, False),
    ],
)
def test_flip_is_on_by_default_for_photographs_only(tmp_path, monkeypatch, source, typed, flip):
    monkeypatch.setattr(drawings, "draw_cats", lambda *args, **more: random_images(6, (8, 8, 3)))  # 2,048 take a second
    write_photographs(tmp_path / "photographs")
    np.save(tmp_path / "images.npy", random_images(6))
    options = new_options(source if source == "drawings" else tmp_path / source)
    settings = settings_of({**options, **({} if typed is None else {"flip": typed})}, tmp_path / "model.keras")
    assert settings["flip"] is flip


def test_new_data_restart_the_epoch_and_choose_flip_again(begun, tmp_path):
    write_photographs(tmp_path / "photographs")
    assert not begun.book["settings"]["flip"]
    model, *_ = prepare_network({"data": str(tmp_path / "photographs"), "new_data": True}, begun.path)
    book = model_file.metadata(model)
    assert book["progress"] == {"epoch": 0, "step": 1, "images": 0, "epoch_steps": 0, "loss": 0.0, "seconds": 0.0}
    assert book["settings"]["flip"] is True and book["data"]["count"] == 6


def test_the_same_data_resume_inside_the_epoch(begun):
    model, *_ = prepare_network({"data": begun.images, "new_data": True}, begun.path)
    progress = model_file.metadata(model)["progress"]
    assert (progress["images"], progress["loss"], progress["seconds"]) == (16, 1.25, 2.5)


def test_beta1_is_fixed_by_the_file(begun):
    with pytest.raises(ValueError, match="--beta1 0.01, not 0.02"):
        preparation.prepare({"beta1": 0.02}, begun.path)


@pytest.mark.parametrize(
    "count, typed, n_epochs, sample_every",
    [
        (40, {}, 1366, 683),  # of three steps each
        (5, {}, 4100, 2050),
        (48, {"n_epochs": 1}, 1, 1),
        (48, {"n_epochs": 3}, 3, 2),
        (48, {"n_epochs": 3, "sample_every": 0}, 3, 0),
    ],
)
def test_a_first_run_has_4100_steps_and_a_grid_half_way(tmp_path, count, typed, n_epochs, sample_every):
    np.save(tmp_path / "images.npy", random_images(count))
    settings = settings_of(new_options(tmp_path / "images.npy", batch_size=16, **typed), tmp_path / "model.keras")
    assert (settings["n_epochs"], settings["sample_every"]) == (n_epochs, sample_every)


@pytest.mark.parametrize(
    "typed, xla",
    [
        ({}, True),
        ({"xla": False}, False),
        ({"deterministic": True}, False),
        ({"deterministic": True, "xla": True}, False),
    ],
)
def test_a_gpu_gets_xla_unless_the_run_is_to_be_deterministic(begun, monkeypatch, typed, xla):
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "large_gpu", lambda: False)
    assert prepare_network(typed, begun.path)[0].jit_compile is xla


def test_resumed_float16_run_keeps_its_loss_scale_and_counter(begun):
    model, *_ = prepare_network({"precision": "float16"}, begun.path)
    scaler = model.optimizer
    scaler.dynamic_scale.assign(2.0**11)
    scaler.step_counter.assign(7)
    checkpoint.save(model, begun.path)
    assert (
        model.optimizer is scaler and model.dtype_policy.compute_dtype == "float16"
    )  # the run itself continues with it
    scaler = prepare_network({}, begun.path)[0].optimizer
    assert float(scaler.dynamic_scale) == 2.0**11 and int(scaler.step_counter) == 7
    assert float(scaler.scale_loss(1.0)) == 2.0**11


@pytest.mark.parametrize(
    "precision, halvings, resumes", [("float16", 1, True), ("float16", 0, False), ("float32", 0, False)]
)
def test_a_file_resumes_if_float16_skipped_all_its_steps(begun, precision, halvings, resumes):
    """Each halves the scale, and Adam has taken none; else Adam has lost its state."""
    model, *_ = prepare_network({"precision": precision}, begun.path)
    checkpoint._adam(model).iterations.assign(0)
    if precision == "float16":
        model.optimizer.dynamic_scale.assign(2.0 ** (15 - halvings))
    checkpoint.save(model, begun.path)
    with contextlib.nullcontext() if resumes else pytest.raises(ValueError, match="has no optimizer"):
        preparation.prepare({}, begun.path)


# --- saves and grids around the loop ----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def new_keeper(model, folder, save_every=1e9, keep=0):
    """A keeper of an uninterrupted run."""
    nobody = types.SimpleNamespace(stop=None, save_asked=False, busy=contextlib.nullcontext())
    return training_run.TrainingRun(model_file.describe(model), str(folder / "model.keras"), save_every, keep, nobody)


def count_step(run, seconds=0.0, clock=None):
    """Counts a step as the loop does."""
    if clock:
        clock.now += seconds
    run.progress["step"] += 1
    run.progress["images"] += 16
    run.progress["epoch_steps"] += 1
    run.progress["loss"] += 1.0
    run.after_step(1.0)


def test_run_is_saved_every_ten_minutes_and_once_when_asked(begun, tmp_path, clock, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda model, path: saved.append(run.progress["step"]))
    run = new_keeper(new_run(begun), tmp_path, save_every=10)
    for _ in range(25):
        count_step(run, 61, clock)
    assert saved == [10, 20]
    run.interruption.save_asked = True
    for _ in range(3):
        count_step(run, 1, clock)
    assert saved == [10, 20, 26]


def test_seconds_of_an_epoch_are_summed_over_its_steps(begun, tmp_path, clock):
    run = new_keeper(new_run(begun), tmp_path)
    for seconds in 3, 2, 4:
        count_step(run, seconds, clock)
    assert run.progress["seconds"] == pytest.approx(9)
    run.after_epoch()
    assert run.progress == {**run.progress, "epoch": 1, "step": 3, "images": 0, "loss": 0.0, "seconds": 0.0}


def test_failing_saves_are_reported_once_and_the_last_is_fatal(begun, tmp_path, monkeypatch, capsys):
    works = True

    def save(model, path):
        if not works:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", save)
    run, reports = new_keeper(new_run(begun), tmp_path, save_every=-1), []
    for works in (True, False, False, True, False, False):
        count_step(run)
        reports.append(len(capsys.readouterr().err.splitlines()))
    assert reports == [0, 1, 0, 0, 1, 0]
    with pytest.raises(SystemExit) as end:
        run.save(last=True)
    assert end.value.code == 1 and "could not be saved; all steps after 4 are lost" in capsys.readouterr().err


def test_grids_show_the_ema_weights_and_a_save_comes_first(begun, tmp_path, monkeypatch):
    """The first grid compiles a step, and the model is saved before. Noise of -100 gives white images, of 100 black."""
    events, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (events.append("save"), save(*arguments)))
    monkeypatch.setattr(grids, "save_grid", lambda images, path, *more, **named: events.append(images))
    model = new_run(begun)
    model.layers[-1].set_weights([np.zeros((1, 1, 1, 1)), np.full(1, -100)])
    checkpoint.swap_ema_weights(model)
    model.layers[-1].set_weights([np.zeros((1, 1, 1, 1)), np.full(1, 100)])
    run = new_keeper(model, tmp_path)
    count_step(run)
    for _ in range(2):
        run.make_grid(str(tmp_path / "grid.png"))
        assert float(model.layers[-1].bias[0]) == 100  # the raw weights are back
    count_step(run)
    run.make_grid(str(tmp_path / "grid.png"))
    what, *sampled = events
    assert what == "save" and len(sampled) == 3
    for images in sampled:
        assert images.shape == (16, *SHAPE) and np.all(images == 255)


def test_grids_are_always_made_from_the_same_noise(begun, tmp_path, monkeypatch):
    sampled = []
    monkeypatch.setattr(grids, "save_grid", lambda images, path, *more, **named: sampled.append(images))
    run = new_keeper(new_run(begun), tmp_path)
    for _ in range(2):
        count_step(run)
        run.make_grid(str(tmp_path / "grid.png"))
    np.testing.assert_array_equal(*sampled)
    assert sampled[0].std() > 5


def test_grids_are_sampled_as_the_file_recommends(begun, tmp_path):
    sched = ddpm.ddpm_schedule(**DIFFUSION)
    for count, sampler, variance in (None, "ddpm", "beta"), (T, "ddpm", "posterior"), (5, "dpm++", "beta"):
        recommended = {"sampler": sampler, "steps": count, "variance": variance}
        plan = new_keeper(new_run(begun, sampling=recommended), tmp_path).grids.plan
        expected = sampling.make_plan(sched, Sampling(sampler, count, variance=variance if sampler == "ddpm" else None))
        np.testing.assert_array_equal(plan.times, expected.times)
        np.testing.assert_array_equal(plan.coefficients, expected.coefficients)


@pytest.mark.parametrize(
    "place, exists, steps, made",
    [
        ({"epoch": 1}, False, 0, False),
        ({"epoch": 2}, False, 0, True),  # the run was killed before it made it
        ({"epoch": 2}, True, 0, False),
        ({"epoch": 2, "images": 16}, False, 0, False),
        ({"epoch": 1, "images": 32}, False, 1, True),
        ({"epoch": 1, "images": 32}, True, 1, True),  # another run has left it
        ({"epoch": 0, "images": 32}, False, 1, False),
    ],
)
def test_grid_follows_every_second_epoch_unless_already_made(begun, tmp_path, monkeypatch, place, exists, steps, made):
    made_now = []
    monkeypatch.setattr(
        grids, "save_grid", lambda images, path, *more, **named: made_now.append(os.path.basename(path))
    )
    if exists:
        (tmp_path / "samples-epoch0002.png").write_bytes(b"")
    run = new_keeper(new_run(begun, progress=place, settings={"sample_every": 2}), tmp_path)
    for _ in range(steps):
        count_step(run)
        run.after_epoch()
    run.before_epoch()
    assert made_now == (["samples-epoch0002.png"] if made else [])


def test_keep_removes_only_the_oldest_kept_epochs(begun, tmp_path):
    folder = tmp_path / "run [1]"  # such brackets are wildcards
    folder.mkdir()
    others = ["model-epoch-best.keras", "other-epoch0001.keras", "model-epoch0001.png"]
    for name in others:
        (folder / name).write_bytes(b"")
    run = new_keeper(new_run(begun), folder, keep=2)
    for _ in range(4):
        count_step(run)
        run.after_epoch()
        run.save()
    expected = ["model-epoch0003.keras", "model-epoch0004.keras", "model.keras", "model.csv"]
    assert sorted(os.listdir(folder)) == sorted([*others, *expected])


def test_a_table_without_held_out_columns_is_extended(tmp_path):
    path = tmp_path / "model.csv"
    path.write_text("epoch,step,loss_sum,loss_mean,seconds,images_per_second,learning_rate\n0,3,2.7,0.9,1,48,0.004\n")
    table = history.History(str(path), 1)
    table.rows.append((1, 6, 2.1, 0.7, "1.000", "48.0", 0.004, 0.8, 0.1, 0.2, 0.3, 0.4))
    assert table.held_out() == [(0.7, 0.8)]
    table.write()
    lines = path.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "0", "1"]
    assert len({line.count(",") for line in lines}) == 1


# --- files, locks and signals -----------------------------------------------------------------------------------------


def test_a_file_is_synced_to_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """Otherwise a power cut may leave an empty file in the place of a complete one."""
    happened, fsync, replace = [], os.fsync, os.replace

    def noting_fsync(handle):
        happened.append(("on disk", os.fstat(handle).st_ino))
        fsync(handle)

    def noting_replace(source, target):
        happened.append(("replaced", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    with files.replacing(tmp_path / "a.txt") as draft, open(draft, "w") as file:
        file.write("new")
    number = (tmp_path / "a.txt").stat().st_ino
    assert happened[:2] == [("on disk", number), ("replaced", number)]


@pytest.mark.skipif(lock.fcntl is None, reason="this system has no locks for files")
def test_lock_file_removed_while_locking_is_made_again(tmp_path, monkeypatch):
    """A lock on a file that has no name any more would keep no other run away."""
    path, flock = str(tmp_path / "model.keras"), lock.fcntl.flock

    def removed_before_it_is_locked(handle, how):
        monkeypatch.setattr(lock.fcntl, "flock", flock)
        os.remove(tmp_path / ".model.keras.lock")
        flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", removed_before_it_is_locked)
    held = lock.Lock(path)
    with pytest.raises(OSError, match=f"process {os.getpid()} "):
        lock.Lock(path)
    held.release()
    lock.Lock(path).release()
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize(
    "code, status, printed",
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "bye"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "bye"),
        ("os.kill(os.getpid(), signal.SIGHUP)", 129, "bye"),
        ("os.close(1); os.kill(os.getpid(), signal.SIGHUP)", 129, ""),  # the terminal is gone
        ("i.nothing_to_lose = lambda: False; twice(signal.SIGTERM); print('continues'); i.end()", 143, "continues bye"),
    ],
)
def test_signal_ends_the_program_with_its_exit_status(code, status, printed):
    begin = """
import os, signal, time
from support.console import say
from support.signals import Interruption

def twice(number):
    for _ in range(2):
        os.kill(os.getpid(), number)
        time.sleep(0.2)
    while i.stop is None:
        time.sleep(0.01)

i = Interruption().__enter__()
i.farewell = lambda: say("bye")
"""
    command = [sys.executable, "-c", begin + code + "\ntime.sleep(20)"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.split(), done.stderr) == (status, printed.split(), "")


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, expected", [(1, (1, 1)), (64, (1, 64)), (65, (2, 33)), (200, (4, 50))])
def test_batches_of_sampling_are_equal_and_at_most_64(count, expected):
    assert reverse.even_batches(tiny_network(SHAPE), count) == expected


def test_batches_of_sampling_fit_in_memory(monkeypatch):
    """The largest feature map of this network has 8 × 8 × 3 floats; four such maps are alive at once."""
    monkeypatch.setattr(reverse, "MEMORY", 10 * 4 * 4 * 8 * 8 * 3)
    assert reverse.even_batches(tiny_network((8, 8, 3)), 20) == (2, 10)
    assert reverse.even_batches(tiny_network((8, 8, 3)), 21) == (3, 7)
    monkeypatch.setattr(reverse, "MEMORY", 1)
    assert reverse.even_batches(tiny_network((8, 8, 3)), 3) == (3, 1)


class ByHand:
    """The layers of the slides in NumPy's float64, with the weights of Keras layers."""

    @staticmethod
    def relu(x):
        return np.maximum(x, 0)

    @staticmethod
    def weights(layer):
        return [w.astype(np.float64) for w in layer.get_weights()]

    def convolve(self, layer, x):
        (kernel, bias), padded = self.weights(layer), np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1:3]
        return bias + sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))

    def enlarge(self, layer, x):
        """A transposed convolution whose kernel is as large as its stride."""
        kernel, bias = self.weights(layer)
        n, height, width, _ = x.shape
        size, features = kernel.shape[0], kernel.shape[2]
        pixels = np.einsum("nhwc,abfc->nhawbf", x, kernel)
        return pixels.reshape(n, size * height, size * width, features) + bias

    def normalize(self, layer, x):
        gamma, beta = self.weights(layer)
        groups = x.reshape(*x.shape[:3], 8, -1)
        mean, variance = (f(groups, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
        return gamma * ((groups - mean) / (variance + 1e-3) ** 0.5).reshape(x.shape) + beta

    def conv3(self, layer, x):
        first = self.relu(self.normalize(layer.Norm_1, self.convolve(layer.Conv2D_1, x)))
        second = self.relu(self.normalize(layer.Norm_2, self.convolve(layer.Conv2D_2, first)))
        return first + second if layer.is_res else second

    def down(self, layer, x):
        x = self.conv3(layer.Conv3, x)
        return self.blocks(x, 2).max(axis=(2, 4))

    @staticmethod
    def blocks(x, size):
        n, height, width, features = x.shape
        return x.reshape(n, height // size, size, width // size, size, features)

    def up(self, layer, x, skip):
        x = self.enlarge(layer.Conv2DTranspose, np.concatenate([x, skip], axis=-1))
        return self.conv3(layer.Conv3_2, self.conv3(layer.Conv3_1, x))

    def time(self, layer, t):
        (kernel, phase), (kernel_2, bias) = self.weights(layer.Dense_1), self.weights(layer.Dense_2)
        return (np.sin(t @ kernel + phase) @ kernel_2 + bias)[:, None, None]


def test_the_network_of_the_slides_computes_what_numpy_does():
    """Files of every version rest on this: the order of the layers and of what they join, and all constants."""
    model, hand = unet.NaiveUnet((64, 32, 3), 16), ByHand()
    rng = np.random.default_rng(1)
    model.set_weights([w + 0.1 * rng.standard_normal(w.shape) for w in model.get_weights()])
    image, t = rng.standard_normal((2, 64, 32, 3)).astype(np.float32), rng.random((2, 1)).astype(np.float32)

    def layers(kind):
        return [layer for layer in model.layers if type(layer) is kind]

    (entrance,), downs, ups = layers(unet.Conv3Layer), layers(unet.UnetDownLayer), layers(unet.UnetUpLayer)
    (time_layer,), (bottom,) = layers(unet.TimeLayer), layers(keras.layers.Conv2DTranspose)
    (norm,) = layers(unet.GroupNormalization)
    x = hand.conv3(entrance, image)
    d1 = hand.down(downs[0], x)
    d2 = hand.down(downs[1], d1)
    d3 = hand.down(downs[2], d2)
    middle = hand.blocks(d3, 4).mean(axis=(2, 4)) + hand.time(time_layer, t)
    middle = hand.relu(hand.normalize(norm, hand.relu(hand.enlarge(bottom, middle))))
    up = hand.up(ups[2], hand.up(ups[1], hand.up(ups[0], middle, d3), d2), d1)
    expected = hand.convolve(model.layers[-1], np.concatenate([up, x], axis=-1))
    np.testing.assert_allclose(model([image, t]), expected, atol=2e-4 * expected.std())
