"""What a file recommends to sample with, files for sampling alone, and trainings that start from another model."""

import os
import sys

import numpy as np
import pytest
from conftest import TINY

import ddpm
import evaluate
import figures
import reverse_diffusion as rd
from diffusion import model_file
from diffusion.options import Sampling
from training import preparation, publish, run_settings

NOISE = {"n_sample": 2, "seed": 3, "verbose": 0}


@pytest.fixture
def model(train_tiny):
    """A model of T = 20 that recommends seven steps of DDIM."""
    train_tiny(*TINY, "--n-epochs", "1", "--sampler", "ddim", "--sample-steps", "7")
    return model_file.open_model("model.keras").network


def test_my_sample_follows_the_file_unless_told_otherwise(model):
    np.testing.assert_array_equal(rd.my_sample(**NOISE), rd.my_sample(sampler="ddim", steps=7, **NOISE))
    np.testing.assert_array_equal(rd.my_sample(steps=9, **NOISE), rd.my_sample(sampler="ddim", steps=9, **NOISE))
    ancestral = rd.my_sample(sampler="ddpm", **NOISE)
    assert np.any(ancestral != rd.my_sample(**NOISE))
    np.testing.assert_array_equal(ancestral, rd.my_sample(sampler="ddpm", steps=20, **NOISE))
    posterior = rd.my_sample(variance="posterior", **NOISE)
    np.testing.assert_array_equal(posterior, rd.my_sample(sampler="ddpm", variance="posterior", **NOISE))


def test_recommended_sampler_has_defaults_and_at_most_T_steps(model):
    entries = model_file.metadata(model)

    def choose(**asked):
        return model_file.describe(model).choose(Sampling(**asked))

    entries["sampling"] = {"sampler": "ddpm", "steps": 10, "variance": "posterior"}
    assert choose() == Sampling("ddpm", 10, variance="posterior")
    assert choose(steps=7, eta=0.0) == Sampling("ddpm", 7, variance="posterior")
    assert choose(sampler="ddpm") == Sampling("ddpm") and choose(variance="beta") == Sampling("ddpm", variance="beta")
    entries["sampling"] = {"sampler": "dpm++", "steps": 50}  # of 20
    assert choose() == Sampling("dpm++", 20)
    entries["sampling"] = {"sampler": "ddim", "steps": 9, "variance": "posterior"}  # for the day when it is ddpm
    assert choose(eta=0.5) == Sampling("ddim", 9, eta=0.5)
    entries["sampling"] = {"sampler": "ddpm", "steps": None}
    assert choose() == Sampling("ddpm", variance="beta")
    del entries["sampling"]
    assert choose() == Sampling("ddpm", variance="beta") and choose(sampler="ddim") == Sampling("ddim")


def test_the_recommendation_can_change_when_a_run_resumes(model, train_tiny):
    train_tiny("--n-epochs", "2", "--sampler", "dpm++", "--sample-steps", "5")
    recommended = {"sampler": "dpm++", "steps": 5, "variance": "beta"}
    assert model_file.open_model("model.keras").metadata["sampling"] == recommended


@pytest.mark.parametrize("steps, sampler", [(None, "ddpm"), (20, "ddpm"), (7, "ddim")])
def test_old_settings_without_a_sampler_keep_their_meaning(steps, sampler):
    book = {"settings": {"T": 20, "sample_steps": steps}, "progress": {}}
    run_settings.complete(book, learns_variance=False)
    assert book["settings"]["sampler"] == sampler
    slides = {"network": "naive", "target": "eps", "schedule": "linear", "patch": 1, "ema_warmup": False}
    assert {name: book["settings"][name] for name in slides} == slides


def publish_to(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["publish", "model.keras", path])
    publish.main()


def test_published_file_samples_alike_without_optimizer_or_path(model, monkeypatch, train_tiny):
    publish_to("small.keras", monkeypatch)
    np.testing.assert_array_equal(rd.my_sample(model="small.keras", **NOISE), rd.my_sample(**NOISE))
    entries = model_file.open_model("small.keras", compile=True).metadata
    assert entries["data"]["source"] == "images.npy" and entries["progress"]["step"] == 2
    assert os.path.getsize("small.keras") < os.path.getsize("model.keras")
    with pytest.raises(ValueError, match="no optimizer state"):
        train_tiny("--model", "small.keras", "--n-epochs", "2")
    with pytest.raises(SystemExit) as leaving:
        publish_to("model.keras", monkeypatch)
    assert leaving.value.code == 2


def test_pretrained_models_are_found_by_their_names(model, monkeypatch, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    os.rename("model.keras", folder / "cats.keras")
    monkeypatch.setattr(model_file, "PRETRAINED", str(folder))
    os.mkdir("cats")  # a folder of that name is no model
    assert model_file.locate("cats") == str(folder / "cats.keras") and model_file.locate("dogs") == "dogs"
    assert rd.my_sample(model="cats", **NOISE).shape == (2, 8, 8, 1)
    with pytest.raises(FileNotFoundError, match="no model .*dogs"):
        rd.my_sample(model="dogs")


def test_no_script_overwrites_its_model(tmp_path, monkeypatch, capsys):
    """Which is known by the name `cats`, by its path and by links."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_file, "PRETRAINED", "models")
    os.mkdir("models")
    for name in "models/cats.keras", "own.keras":
        with open(name, "w") as file:
            file.write("weights")
    for name in "link.png", "link.npy", "new.csv":
        os.symlink("models/cats.keras", name)
    for script, words in (
        (publish, ("cats", "models/cats.keras")),
        (rd, ("--model", "cats", "--out", "link.png")),
        (rd, ("--model", "own.keras", "--classifier", "models/cats.keras", "--label", "a", "--out", "link.png")),
        (rd, ("--model", "own.keras", "--weaker", "cats", "--guidance", "2", "--npy", "link.npy")),
        (rd, ("--npy", "link.npy", "--weaker", "cats", "--guidance", "2", "--out", "a.png")),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        with pytest.raises(SystemExit) as leaving:
            script.main()
        assert leaving.value.code == 2 and "would overwrite" in capsys.readouterr().err
    for words in (
        ("--model", "cats", "--out", "models/cats.keras"),
        ("--model", "own.keras", "--weaker", "cats", "--guidance", "2", "--out", "models/cats.keras"),
        ("--model", "own.keras", "--features", "models/cats.keras", "--figure", "link.png"),
    ):
        with pytest.raises(ValueError, match="--(out|figure) .* would overwrite"):
            evaluate.check_outputs(evaluate.parse_options(["--data", "drawings", *words]), {})
    for options, path in (
        ({"init": "cats"}, "models/cats.keras"),
        ({"init": "cats"}, "new.keras"),  # by its table
        ({"data": "link.npy"}, "new.keras"),
        ({"init": "new-epoch0010.keras", "keep": 2}, "new.keras"),
        ({"tensorboard": "samples.png"}, "model.keras"),
    ):
        with pytest.raises(ValueError, match="would overwrite"):
            preparation.check_files(options, path)
    preparation.check_files({"init": "new-epoch0010.keras", "data": "drawings", "validation": "0.1"}, "own.keras")
    with pytest.raises(ValueError, match="the early copy own.keras would overwrite"):
        preparation.check_early_copy(None, "own.keras", ["own.keras"])
    with pytest.raises(ValueError, match="--out figures/schedule.png would overwrite"):
        os.mkdir("figures")
        os.symlink("../own.keras", "figures/schedule.png")
        figures.prepare_files("figures", ["schedule"], ["own.keras"])
    for name in "models/cats.keras", "own.keras":
        with open(name) as file:
            assert file.read() == "weights"


def test_a_training_starts_from_the_weights_of_another(model, train_tiny):
    start = ("--model", "b.keras", "--init", "model.keras")
    said = train_tiny(*TINY, *start, "--n-epochs", "1", "--learning-rate", "1e-12")
    assert "start     2 of 2 parameters from model.keras\n" in said
    for ours, theirs in zip(model_file.open_model("b.keras").network.weights, model.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert "parameters from" not in train_tiny(*start, "--n-epochs", "2")


def test_init_from_an_unfit_or_missing_model_is_refused(model, train_tiny):
    from diffusion.networks import Unet
    from training import transfer

    wide = Unet((8, 8, 1), 8, widths=(1,), attention=0)
    with pytest.raises(ValueError, match="--init model.keras has no layer of the same shape"):
        transfer.start_from(wide, "model.keras")
    with pytest.raises(FileNotFoundError, match="nowhere.keras"):
        train_tiny(*TINY, "--n-epochs", "1", "--model", "c.keras", "--init", "nowhere.keras")
    assert not os.path.exists("c.keras")


def test_layers_are_found_by_kind_and_place_and_new_ones_named(tmp_path, capsys):
    from diffusion.networks import Unet
    from training import transfer

    trained, new = Unet((8, 8, 1), 8, widths=(1,), attention=0), Unet((8, 8, 1), 8, 2, widths=(1,), attention=0)
    for weight in trained.weights:
        weight.assign(np.random.default_rng(0).standard_normal(weight.shape))
    trained.save(tmp_path / "trained.keras")
    transfer.start_from(new, str(tmp_path / "trained.keras"))
    said = capsys.readouterr().out
    assert "newly initialised: ClassLayer 0\n" in said
    class_layer = next(layer for layer in new.layers if type(layer).__name__ == "ClassLayer")
    taken = [weight for weight in new.weights if all(weight is not own for own in class_layer.weights)]
    for weight, source in zip(taken, trained.weights, strict=True):
        np.testing.assert_array_equal(weight, source)


def test_the_pretrained_model_knows_drawings_it_has_not_seen():
    import tensorflow as tf

    from data import drawings
    from diffusion.denoiser import denoiser

    path = model_file.locate("drawings")
    assert os.path.getsize(path) < 6e6
    trained = model_file.open_model("drawings")
    model, entries = trained.network, trained.metadata
    assert os.sep not in entries["data"]["source"] and entries["sampling"]["steps"] == 50
    sched, target = trained.sched, trained.target
    x_0 = ddpm.from_pixels(drawings.draw_cats(32, count=16, seed=1))
    t = tf.fill([16], 500)
    x_t = ddpm.q_sample(x_0, t, tf.random.stateless_normal(x_0.shape, [0, 1]), sched)
    guess = denoiser(lambda inputs: model(inputs), sched, target)(x_t, t).x_0
    error, error_of_mean = np.mean((guess - x_0) ** 2), np.mean((x_0.mean(axis=0) - x_0) ** 2)
    assert error < 0.1 * error_of_mean


def start_with(tmp_path, capsys, kind, classes, new_classes, **differences):
    """A new model that started from a trained one with random weights, that one, and what was said."""
    from diffusion.networks import Classifier, Unet
    from training import transfer

    def build(names, **diffusion):
        count = [len(names)] if names else []
        built = (Unet if kind == "unet" else Classifier)((8, 8, 1), 8, *count, widths=(1,), attention=0)
        entries = {"beta1": 1e-4, "beta2": 0.02, "T": 100, "target": "eps", **diffusion}
        model_file.metadata(built).update(diffusion=entries, classes=names)
        return built

    trained, new = build(classes), build(new_classes, **differences)
    for weight in trained.weights:
        weight.assign(np.random.default_rng(0).standard_normal(weight.shape))
    trained.save(tmp_path / "trained.keras")
    transfer.start_from(new, str(tmp_path / "trained.keras"))
    return new, trained, capsys.readouterr().out


@pytest.mark.parametrize(
    "kind, classes, new_classes, differences, said",
    [
        ("unet", [], [], {}, None),
        ("unet", [], [], {"target": "v"}, "trained with --target eps, not v"),
        ("unet", [], [], {"beta2": 0.1}, "trained with another noise schedule"),
        ("unet", [], [], {"target": "v", "T": 50}, "trained with --target eps, not v and another noise schedule"),
        ("classifier", ["a", "b"], ["a", "b"], {}, None),
        ("classifier", ["a", "b"], ["b", "a"], {}, "trained with the classes a, b"),
    ],
)
def test_output_stays_new_where_it_means_something_else(
    tmp_path, capsys, kind, classes, new_classes, differences, said
):
    new, trained, printed = start_with(tmp_path, capsys, kind, classes, new_classes, **differences)
    for layer, source in zip(new.layers, trained.layers, strict=True):
        taken = all(np.array_equal(*pair) for pair in zip(layer.get_weights(), source.get_weights(), strict=True))
        assert taken == (said is None or layer is not new.layers[-1])
    assert (said or "parameters") in printed and ("the output layer is newly initialised" in printed) == bool(said)


def test_embeddings_of_classes_are_taken_by_name(tmp_path, capsys):
    new, trained, said = start_with(tmp_path, capsys, "unet", ["cat", "dog"], ["bird", "dog", "cat"])
    ours, theirs = (next(w for w in model.weights if "class_layer" in w.path).numpy() for model in (new, trained))
    np.testing.assert_array_equal(ours[[0, 2, 3]], theirs[[0, 2, 1]])
    assert not np.any(np.all(ours[1] == theirs, axis=1)) and "lacks: bird\n" in said
