"""Files of earlier versions, in `fixtures/`, resume and sample as they did when they were written.

`before-packages.keras` was trained on 20 images in batches of 6, with T = 20 and β_T = 0.5, and saved after the first
step of its fourth epoch. Beside it lie the images sampled from it then (seed 7), and the losses of its next steps.
`learned-variance.keras` is a `unet` with three classes and a learned variance, trained with Muon, and saved after the
first step of its fourth epoch.
"""

import os

import numpy as np
import pytest
from conftest import prepare_network

import diffusion_model
import reverse_diffusion as rd
from diffusion import model_file
from training import checkpoint, preparation

FIXTURES = os.path.join(os.path.dirname(__file__), "fixtures")
MODEL = os.path.join(FIXTURES, "before-packages.keras")


@pytest.fixture(scope="module")
def then():
    with np.load(os.path.join(FIXTURES, "before-packages.npz")) as file:
        return dict(file)


@pytest.fixture
def source(tmp_path, then):
    """The file of its training images."""
    np.save(tmp_path / "images.npy", then["images"].repeat(8, 1).repeat(8, 2))
    return str(tmp_path / "images.npy")


class EndOfEpoch(Exception):
    pass


class Recorder:
    """Stands in for what surrounds the loop, and ends it after the epoch."""

    def __init__(self):
        self.losses = []

    def before_epoch(self):
        pass

    def after_step(self, loss):
        self.losses.append(loss)

    def after_epoch(self):
        raise EndOfEpoch


def train(model, images):
    recorder = Recorder()
    with pytest.raises(EndOfEpoch):
        diffusion_model.train(model_file.describe(model), images, recorder)
    return recorder.losses


@pytest.mark.parametrize(
    "options, name", [({}, "default"), ({"variance": "posterior", "clip": False}, "posterior_unclipped")]
)
def test_old_file_samples_the_same_images_for_a_seed(then, options, name):
    images = rd.my_sample(n_sample=3, model=MODEL, seed=7, verbose=0, **options)
    assert images.shape == then[name].shape and images.dtype == np.int16
    assert np.abs(images - then[name]).max() <= 1


def test_old_file_resumes_with_equal_losses_and_no_ema_warm_up(then, source):
    """After its 14 steps the momentum of a warm-up would be 15/24."""
    model, images, _ = prepare_network({"data": source, "parts": 1}, MODEL)
    momentum, averages, raw = model_file.metadata(model)["settings"]["ema"], ema_weights(model), []
    train_on_batch = model.train_on_batch

    def recording(*batch, **more):
        loss = train_on_batch(*batch, **more)
        raw.append(np.concatenate([w.ravel() for w in model.get_weights()]))
        return loss

    model.train_on_batch = recording
    assert model_file.metadata(model)["data"]["source"] == source  # where the images are now
    np.testing.assert_allclose(train(model, images), then["losses"], rtol=1e-5)
    progress = model_file.metadata(model)["progress"]
    assert progress["step"] == 16 and progress["images"] == 20 and progress["epoch_steps"] == 4
    assert progress["loss"] == pytest.approx(0.948615312576294 + sum(then["losses"]), rel=1e-6)
    for weights in raw:
        averages = momentum * averages + (1 - momentum) * weights
    np.testing.assert_allclose(ema_weights(model), averages, rtol=1e-5, atol=1e-6)
    assert momentum > 0.9 and np.abs(raw[-1] - averages).max() > 1e-4


def ema_weights(model):
    checkpoint.swap_ema_weights(model)
    weights = np.concatenate([w.ravel() for w in model.get_weights()])
    checkpoint.swap_ema_weights(model)
    return weights


def test_typed_batch_size_applies_at_once_within_an_epoch(source):
    for options, sizes in ({"batch_size": 4}, [4, 4, 4, 2]), ({"batch_size": 40}, [14]):  # 6 images are used already
        model, images, _ = prepare_network({"data": source, **options}, MODEL)
        trained = []
        model.train_on_batch = lambda inputs, target, sizes=trained, **more: sizes.append(len(target)) or 0.5
        train(model, images)
        assert trained == sizes
        progress = model_file.metadata(model)["progress"]
        assert progress["images"] == 20 and progress["epoch_steps"] == 1 + len(sizes)  # what means divide by


def test_images_that_have_moved_are_asked_for():
    with pytest.raises(FileNotFoundError, match="/home/user/images.npy, which no longer exists.*--data NEW"):
        preparation.prepare({}, MODEL)


@pytest.fixture(scope="module")
def classes_then():
    with np.load(os.path.join(FIXTURES, "learned-variance.npz")) as file:
        return dict(file)


LEARNED_VARIANCE = os.path.join(FIXTURES, "learned-variance.keras")


@pytest.mark.parametrize(
    "name, how",
    [
        ("default", {}),
        ("guided", {"label": [0, 1, 2], "guidance": 2.0, "sampler": "ddim", "steps": 5}),
        ("corrected", {"label": "b", "variance": "learned", "steps": 7, "corrector": 1}),
    ],
)
def test_learned_variance_file_samples_the_same_images(classes_then, name, how):
    images = rd.my_sample(n_sample=3, model=LEARNED_VARIANCE, seed=7, verbose=0, **how)
    assert np.abs(images - classes_then[name]).max() <= 1


def test_learned_variance_file_resumes_with_muon(classes_then, tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=classes_then["images"], labels=classes_then["labels"], class_names=["a", "b", "c"])
    model, images, _ = prepare_network({"data": str(path), "parts": 1}, LEARNED_VARIANCE)
    np.testing.assert_allclose(train(model, images), classes_then["losses"], rtol=1e-5)
    weights = np.concatenate([w.ravel() for w in model.get_weights()])[::37]  # of the 56,494
    np.testing.assert_allclose(weights, classes_then["weights"], rtol=1e-4, atol=1e-5)
