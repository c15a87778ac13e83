"""The training script, run as a user runs it."""

import csv
import importlib.util
import os
import re
import shutil
import signal
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT, SMALL, TINY, iterations, prepare_network, tiny_network, write_images
from PIL import Image
from tensorflow.compat.v1.train import summary_iterator

import ddpm
import reverse_diffusion
from data import splits
from diffusion import model_file
from diffusion.layers import Logbook
from diffusion.networks import NETWORKS
from diffusion.schedules import make_schedule
from support import device
from training import checkpoint, preparation, run_settings, settings, tensorboard, training_run, validation
from training.train_step import is_wide_kernel

EPOCH_LINE = re.compile(r"^Epoch :(\d+) loss :(\d+\.\d+(?:e-?\d+)?)$", re.MULTILINE)


def losses(process):
    """The epoch lines of a run as a dict."""
    return {int(epoch): float(loss) for epoch, loss in EPOCH_LINE.findall(process.stdout)}


def state(path):
    """Everything that training has made of a model: weights and optimizer."""
    model = keras.models.load_model(path)
    return [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]


def assert_equal_to_the_bit(one, other):
    for a, b in zip(state(one), state(other), strict=True):
        np.testing.assert_array_equal(a, b)


def refused(process, status, *words):
    """One sentence on stderr with these words in it, and that exit status."""
    assert process.returncode == status, process.stderr
    lines = process.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("diffusion_model.py: "), process.stderr
    for word in words:
        assert word in lines[0]


def test_a_run_says_what_it_does_and_writes_model_and_images(trained):
    folder, process = trained
    assert process.stdout.startswith("diffusion_model.py: starting TensorFlow")
    for word in "first", "CPU", "images.npy: 48 images, 32×32×3", "2 epochs of 3 steps", "model.keras, samples.png":
        assert word in process.stdout
    assert process.stderr == ""
    assert list(losses(process)) == [0, 1]
    made = sorted(os.listdir(folder))
    assert made == ["images.npy", "model.csv", "model.keras", "samples-epoch0001.png", "samples.png"]
    assert Image.open(folder / "samples.png").size == (4 * 98, 4 * 98)  # 32 pixels shown as 96


def test_first_loss_is_the_loss_of_predicting_no_noise(trained):
    assert 2.5 < losses(trained[1])[0] < 3.2  # three batches, each about 1 at first


def test_the_model_is_one_compiled_keras_file_with_its_settings(trained):
    model = keras.models.load_model(trained[0] / "model.keras")
    assert int(model.optimizer.iterations) == 6
    book = model_file.metadata(model)
    diffusion = {"beta1": 1e-4, "beta2": 0.5, "T": 20, "schedule": "linear", "zero_snr": False, "target": "eps"}
    assert book["diffusion"] == diffusion
    assert book["data"]["count"] == 48
    assert book["progress"] == {"epoch": 2, "images": 0, "loss": 0.0, "seconds": 0.0, "step": 6, "epoch_steps": 0}


def test_file_holds_ema_weights_and_raw_weights_separately(tiny_trained):
    averages = keras.models.load_model(tiny_trained / "model.keras").get_weights()
    raw = checkpoint.open_for_training(str(tiny_trained / "model.keras")).network.get_weights()
    assert any(np.any(a != r) for a, r in zip(averages, raw, strict=True))


def test_equal_parts_give_equal_bits_on_any_number_of_cores(train_tiny, black_grids, monkeypatch):
    rows = []
    for cores in 1, 5:
        monkeypatch.setattr(device, "cores", lambda cores=cores: cores)
        keras.backend.clear_session()  # TensorFlow adds gradients up in the order of the layers' automatic names
        options = ("--parts", "2", "--n-epochs", "2", "--validation", "0.3", "--model", f"on-{cores}.keras")
        train_tiny(*TINY, *options)
        rows.append([{**row, "seconds": "", "images_per_second": ""} for row in rows_of(f"on-{cores}.csv")])
    assert_equal_to_the_bit("on-1.keras", "on-5.keras")
    assert rows[0] == rows[1] and rows[0][1]["held_out_loss"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or device.cores() < 2, reason="the cores cannot be limited")
def test_parts_and_threads_give_the_same_bits_on_fewer_cores(run, tmp_path):
    """In processes of their own, as TensorFlow asks for the number of cores when it starts."""
    write_images(tmp_path)
    script = os.path.join(ROOT, "diffusion_model.py")
    limited = "import os, runpy, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv.pop())])"
    for cores in 1, device.cores():
        options = (*SMALL, "--n-epochs", "2", "--parts", "2", "--model", f"on-{cores}.keras", cores)
        code = f"{limited}; runpy.run_path({script!r}, run_name='__main__')"
        process = run("-c", code, *options, TF_NUM_INTRAOP_THREADS="1")
        assert process.returncode == 0, process.stderr
    assert_equal_to_the_bit(tmp_path / "on-1.keras", tmp_path / f"on-{device.cores()}.keras")


@pytest.mark.parametrize("parts", [1, 2])
def test_resuming_with_many_saves_is_bit_exact(train_tiny, black_grids, tmp_path, parts):
    options = (*TINY, "--parts", parts, "--ema", "0.9")
    at_once = train_tiny(*options, "--n-epochs", "5", "--model", "at-once.keras")
    first = train_tiny(*options, "--n-epochs", "2")
    resumed = train_tiny(*options, "--n-epochs", "5", "--keep", "2", "--save-every", "0", "--lr-decay", "cosine")
    assert "over all 5 epochs" in resumed
    assert EPOCH_LINE.findall(at_once)[:1] == EPOCH_LINE.findall(first)[:1] and len(EPOCH_LINE.findall(at_once)) == 5

    inside = model_file.metadata(keras.models.load_model("model-epoch0004.keras"))["progress"]
    assert (inside["epoch"], inside["images"], inside["epoch_steps"]) == (4, 12, 1)  # the first save after its end
    shutil.copy("model-epoch0004.keras", "again.keras")
    shutil.copy("model.csv", "again.csv")
    lines = EPOCH_LINE.findall(train_tiny(*options, "--model", "again.keras"))  # from inside an epoch
    assert lines == EPOCH_LINE.findall(resumed)[-1:]
    assert_equal_to_the_bit("again.keras", "model.keras")
    assert sorted(name for name in os.listdir() if "-epoch" in name) == [
        "model-epoch0004.keras",
        "model-epoch0005.keras",
    ]


def test_early_copy_is_kept_to_guide_the_finished_model(train_tiny, black_grids):
    """Whether the run is interrupted before that step or not: the same bits as a run that ended there."""
    options = (*TINY, "--ema", "0.9", "--parts", "1", "--lr-decay", "none")
    train_tiny(*options, "--n-epochs", "1", "--model", "ended.keras")  # two steps
    said = train_tiny(*options, "--n-epochs", "3", "--model", "at-once.keras", "--weaker-after", "2")
    assert_equal_to_the_bit("at-once-weaker.keras", "ended.keras")
    assert "files     at-once.keras, at-once-samples.png, at-once-weaker.keras\n" in said
    assert "--model at-once.keras --weaker at-once-weaker.keras --guidance 1.5" in said
    shutil.copy("at-once.keras", "model-weaker.keras")  # of an older run
    said = train_tiny(*options, "--n-epochs", "1", "--weaker-after", "4")
    assert "weaker.keras" not in said and "no early copy will be saved: step 4 (--weaker-after) is not among" in said
    assert_equal_to_the_bit("model-weaker.keras", "at-once.keras")  # no copy was made
    os.remove("model-weaker.keras")
    train_tiny(*options, "--n-epochs", "3")  # the file keeps the setting
    train_tiny(*options, "--n-epochs", "2", "--model", "ended.keras")
    assert_equal_to_the_bit("model-weaker.keras", "ended.keras")
    assert_equal_to_the_bit("model.keras", "at-once.keras")


def test_a_grid_that_is_not_finite_ends_no_training(train_tiny, monkeypatch, capsys):
    monkeypatch.setattr(training_run, "to_pixels", lambda x_0: ddpm.to_pixels(np.full((1, 8, 8, 1), np.nan)))
    train_tiny(*TINY, "--n-epochs", "2", "--sample-every", "1")
    assert iterations("model.keras") == 4 and not os.path.exists("samples.png")


def test_an_early_copy_replaces_no_other_file(train_tiny, black_grids):
    options = (*TINY, "--n-epochs", "1", "--weaker-after", "2")
    with open("model-weaker.keras", "w") as file:
        file.write("mine")
    with pytest.raises(ValueError, match="model-weaker.keras is not an early copy of this run"):
        train_tiny(*options)
    with open("model-weaker.keras") as file:
        assert file.read() == "mine" and not os.path.exists("model.keras")
    os.remove("model-weaker.keras")
    os.mkdir("model-weaker.keras")
    with pytest.raises(ValueError, match="is a folder"):
        train_tiny(*options)
    os.rmdir("model-weaker.keras")
    train_tiny(*options)
    os.remove("model.keras")  # trained once more, the copy may be replaced, wherever the images lie
    os.rename("images.npy", "moved.npy")
    train_tiny("--data", "moved.npy", *options[2:])
    assert model_file.open_model("model-weaker.keras").metadata["data"]["source"].endswith("moved.npy")


@pytest.mark.parametrize(
    "other",
    [
        ("--T", "30"),
        ("--n-feat", "16"),
        ("--seed", "1"),
        ("--optimizer", "muon"),
        ("--target", "v"),
        ("--data", "others.npy"),
        ("--data", "relabelled.npz", "--classes"),
    ],
)
def test_an_early_copy_of_another_training_is_not_replaced(train_tiny, black_grids, other):
    images = np.load("images.npy")
    np.save("others.npy", images[::-1])
    labels = np.arange(17) % 2
    np.savez("relabelled.npz", images=images, labels=labels)
    options = (*TINY, "--n-epochs", "1", "--weaker-after", "2")
    if "--classes" in other:  # the same images with other labels
        np.savez("labelled.npz", images=images, labels=1 - labels)
        options = (*options, "--data", "labelled.npz", "--classes")
    train_tiny(*options)
    before = read("model-weaker.keras")
    os.remove("model.keras")
    with pytest.raises(ValueError, match="model-weaker.keras is not an early copy of this run"):
        train_tiny(*options, *other)
    assert read("model-weaker.keras") == before


def test_signal_at_the_step_of_the_early_copy_loses_nothing(train_tiny, monkeypatch):
    """It is saved before the run ends, and a signal meanwhile waits for it."""
    save, locked = checkpoint.save, {}

    def save_and_signal(model, path):
        run.interruption.stop = signal.SIGTERM
        locked[path] = run.interruption.busy.locked()
        save(model, path)

    def keep_run(self, *arguments, **named):
        nonlocal run
        run = self
        build(self, *arguments, **named)

    run, build = None, training_run.TrainingRun.__init__
    monkeypatch.setattr(training_run.TrainingRun, "__init__", keep_run)
    monkeypatch.setattr(checkpoint, "save", save_and_signal)
    with pytest.raises(SystemExit) as end:
        train_tiny(*TINY, "--n-epochs", "3", "--weaker-after", "3")
    assert end.value.code == 128 + signal.SIGTERM
    assert locked == {"model-weaker.keras": True, "model.keras": True}
    for path in locked:
        assert model_file.open_model(path).metadata["progress"]["step"] == 3


def wide_network(shape, n_feat, classes):
    """`tiny_network` with a kernel of 16 rows and columns before it, which Muon trains."""
    image, t = keras.Input(shape), keras.Input((1,))
    features = keras.layers.Conv2D(16, 4, padding="same", activation="silu")(image)
    t_image = keras.layers.Reshape((1, 1, 1))(Logbook(name="logbook")(t))
    out = keras.layers.Conv2D(shape[-1], 1)(keras.layers.Add()([t_image, features]))
    return keras.Model([image, t], out)


def test_muon_run_resumes_bit_exactly_and_keeps_its_optimizer(train_tiny, black_grids, monkeypatch):
    monkeypatch.setitem(NETWORKS, "naive", wide_network)
    options = (*TINY, "--optimizer", "muon", "--lr-decay", "none", "--parts", "1")
    train_tiny(*options, "--n-epochs", "2", "--model", "at-once.keras")
    train_tiny(*options, "--n-epochs", "1")
    train_tiny("--n-epochs", "2", "--parts", "1")
    assert_equal_to_the_bit("model.keras", "at-once.keras")
    model = keras.models.load_model("model.keras")
    assert [is_wide_kernel(weight.shape) for weight in model.trainable_variables] == [True, False, False, False]
    assert type(model.optimizer) is keras.optimizers.Muon and model.optimizer.iterations == 4
    with pytest.raises(ValueError, match="was trained with --optimizer muon, not adam"):
        train_tiny("--optimizer", "adam", "--n-epochs", "3")


def test_stopping_between_any_two_steps_changes_no_bit(train_tiny, black_grids):
    options = (*TINY, "--n-epochs", "3", "--parts", "1")
    train_tiny(*options, "--model", "at-once.keras", "--save-every", "0", "--keep", "9")
    for epoch in 1, 2:
        shutil.copy(f"at-once-epoch{epoch:04d}.keras", "model.keras")
        shutil.copy("at-once.csv", "model.csv")
        train_tiny(*options)
        assert_equal_to_the_bit("at-once.keras", "model.keras")
        assert rows_of("model.csv") == rows_of("at-once.csv")


def rows_of(path):
    """The rows of a table without the times in it."""
    with open(path, newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize(
    "options",
    [
        ("--schedule", "cosine", "--target", "v", "--weighting", "min-snr"),
        ("--schedule", "sigmoid", "--target", "x0", "--t-sampling", "logsnr", "--precision", "bfloat16"),
        ("--schedule", "flow", "--target", "flow", "--sampler", "ddim", "--t-sampling", "logsnr"),
        ("--zero-snr", "--target", "v", "--weighting", "snr", "--parts", "2"),
    ],
)
def test_sampling_takes_schedule_and_target_from_the_file(train_tiny, options):
    tiny = list(TINY)
    if "--schedule" in options:  # which is not the linear one, to which β belongs
        del tiny[tiny.index("--beta2") : tiny.index("--beta2") + 2]
    train_tiny(*tiny, *options, "--n-epochs", "2", "--sample-every", "1", "--validation", "0.3")
    train_tiny("--n-epochs", "3")
    trained = model_file.open_model("model.keras")
    model, sched, target = trained.network, trained.sched, trained.target
    typed = dict(zip(options[::2], options[1::2], strict=False)) if options[0] != "--zero-snr" else {"--target": "v"}
    assert target == typed["--target"] and (sched.alphabar[-1] == 0) == ("--zero-snr" in options or "flow" in options)
    expected = make_schedule(typed.get("--schedule", "linear"), 1e-4, 0.5, 20, "--zero-snr" in options)
    np.testing.assert_array_equal(sched.alphabar, expected.alphabar)

    images = reverse_diffusion.my_sample(n_sample=2, model="model.keras", seed=0, verbose=0)
    other = ddpm.ddpm_schedule(1e-4, 0.5, 20)
    assert images.std() > 0.5
    model_file.metadata(model)["diffusion"]["target"] = "eps" if target != "eps" else "v"
    if not np.array_equal(sched.alphabar, other.alphabar) and sched.alphabar[-1] > 0:
        assert np.any(reverse_diffusion.my_sample(n_sample=2, model=model, seed=0, verbose=0) != images)
    assert all(np.isfinite(float(row["held_out_loss"])) for row in rows_of("model.csv"))


def test_more_epochs_plan_a_new_decay_of_the_learning_rate(tiny_folder, capsys):
    preparation.prepare({"n_epochs": 12, "lr_decay": "cosine"}, "model.keras")
    assert "over all 12 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "typed, said",
    [
        ({"n_epochs": 12}, True),
        ({"n_epochs": 2}, False),
        ({"n_epochs": 12, "lr_decay": "none"}, False),
        ({"learning_rate": 1e-4}, False),
    ],
)
def test_learning_rate_decay_is_printed_only_if_planned_anew(capsys, typed, said):
    before = {**settings.PRESETS["slides"], "preset": "slides", "n_epochs": 2, "lr_decay": "cosine"}
    book = {"settings": before, "progress": {"epoch": 0}}
    run_settings.choose_settings(typed, book, "model.keras", pytest.fail)
    assert ("falls to 0" in capsys.readouterr().out) == said


def test_a_finished_model_says_so_and_how_to_train_further(train_tiny, tiny_folder):
    before, sampled = read("model.keras"), os.stat("samples.png").st_mtime_ns
    said = train_tiny()
    assert "3 epochs" in said and "--n-epochs 6" in said
    assert read("model.keras") == before and os.stat("samples.png").st_mtime_ns == sampled

    os.utime("samples.png", (0, 0))  # as if the run had been killed before it sampled its last grid
    train_tiny()
    assert os.stat("samples.png").st_mtime_ns > 0 and read("model.keras") == before


def test_finished_model_stores_new_sampling_settings(train_tiny):
    train_tiny(*TINY, "--n-epochs", "2")
    before, weights = read("samples.png"), state("model.keras")
    said = train_tiny("--sampler", "dpm++", "--sample-steps", "7")
    assert "the new settings are saved in model.keras" in said and "has been trained for all 2 epochs" in said
    recommended = model_file.open_model("model.keras").metadata["sampling"]
    assert (recommended["sampler"], recommended["steps"]) == ("dpm++", 7)
    assert read("samples.png") != before
    for now, then in zip(state("model.keras"), weights, strict=True):
        np.testing.assert_array_equal(now, then)
    assert "the new settings are saved" not in train_tiny("--sampler", "dpm++")


def test_a_finished_model_of_an_earlier_version_stays_as_it_is(train_tiny, black_grids):
    """It recommends no sampler, and a run that is only asked whether it has finished does not begin to."""
    train_tiny(*TINY, "--n-epochs", "1")
    model = checkpoint.open_for_training("model.keras").network
    del model_file.metadata(model)["sampling"]
    checkpoint.save(model, "model.keras")
    os.utime("samples.png")
    before, sampled = read("model.keras"), os.stat("samples.png").st_mtime_ns
    assert "the new settings are saved" not in train_tiny()
    assert read("model.keras") == before and os.stat("samples.png").st_mtime_ns == sampled


def test_resumed_run_says_which_options_it_ignores(train_tiny, black_grids):
    train_tiny(*TINY, "--n-epochs", "2")
    before = read("model.keras")
    said = train_tiny("--n-epochs", "1", "--init", "drawings")
    assert "--n-epochs 1 is ignored, as model.keras has been trained for 2 epochs" in said
    assert "--init is ignored, as model.keras exists" in said and "has been trained for all 2 epochs" in said
    assert read("model.keras") == before
    train_tiny("--n-epochs", "3", "--keep", "1", "--save-every", "0")
    shutil.copy("model.keras", "unfinished.keras")
    model = checkpoint.open_for_training("unfinished.keras").network
    model_file.metadata(model)["settings"]["n_epochs"] = 9
    checkpoint.save(model, "unfinished.keras")
    with pytest.raises(
        ValueError, match="has been trained for 3 epochs, more than --n-epochs 1; omit --n-epochs to train on to 9"
    ):
        train_tiny("--model", "unfinished.keras", "--n-epochs", "1")


def read(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture(scope="module")
def opened(trained):
    """The model in that folder, for those who do not change it."""
    return checkpoint.open_for_training(str(trained[0] / "model.keras"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"T": 30}, ("--T 20", "30", "--model")),
        ({"beta2": 0.4}, ("--beta2 0.5", "0.4")),
        ({"image_size": 64}, ("--image-size 32", "64")),
        ({"n_feat": 16}, ("--n-feat 8", "16")),
        ({"channels": 1}, ("--channels 3", "1")),
        ({"seed": 1}, ("--seed 0", "1")),
        ({"schedule": "cosine"}, ("--schedule linear", "cosine")),
        ({"target": "v"}, ("--target eps", "v")),
        ({"zero_snr": True, "target": "v"}, ("without --zero-snr; omit --zero-snr",)),
        ({"preset": "slides"}, ("--preset first", "slides")),
        ({"data": "others.npy"}, ("images.npy (48", "others.npy (5)", "--new-data", "--model")),
    ],
)
def test_options_that_contradict_the_file_are_refused(model_folder, opened, monkeypatch, options, words):
    monkeypatch.chdir(model_folder)
    monkeypatch.setattr(checkpoint, "open_for_training", lambda path: opened)
    np.save("others.npy", np.zeros((5, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError) as error:
        preparation.prepare({"n_epochs": 3, **options}, "model.keras")
    for word in ("model.keras", *words):
        assert word in str(error.value)


def test_a_file_older_than_some_settings_takes_their_defaults(tiny_folder):
    model = keras.models.load_model("model.keras")
    book = model_file.metadata(model)
    del book["settings"]["flip"], book["progress"]["seconds"]
    model.save("older.keras")
    model, *_ = prepare_network({"n_epochs": 4}, "older.keras")
    book = model_file.metadata(model)
    assert not book["settings"]["flip"] and book["settings"]["n_epochs"] == 4
    assert book["progress"]["seconds"] == 0 and book["progress"]["step"] == 6


def test_contradicting_option_ends_the_script_in_one_sentence(run, tiny_folder):
    before = (tiny_folder / "model.keras").read_bytes()
    refused(run("diffusion_model.py", "--n-epochs", "4", "--T", "30"), 2, "model.keras", "--T 20", "30", "--model")
    assert (tiny_folder / "model.keras").read_bytes() == before


def test_new_data_and_precision_may_be_chosen_on_resuming(train_tiny, black_grids):
    train_tiny(*TINY, "--n-epochs", "1")
    np.save("others.npy", np.zeros((5, 8, 8), np.uint8))
    train_tiny("--data", "others.npy", "--new-data", "--n-epochs", "2", "--precision", "bfloat16", "--batch-size", "64")
    model = keras.models.load_model("model.keras")
    assert model_file.metadata(model)["data"]["count"] == 5
    assert int(model.optimizer.iterations) == 3  # fewer images than a batch are one step
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}


def test_model_resumed_in_float16_stays_in_float16(train_tiny):
    train_tiny(*TINY, "--n-epochs", "1")
    assert "float16" in train_tiny("--n-epochs", "2", "--precision", "float16")
    assert "float16" in train_tiny("--n-epochs", "3")
    assert iterations("model.keras") == 6


@pytest.mark.slow
def test_loss_falls_well_below_the_loss_of_predicting_no_noise(run, tmp_path):
    options = ("--data", "drawings", "--n-feat", "8", "--T", "100", "--beta2", "0.2", "--n-epochs", "2")
    process = run("diffusion_model.py", *options, "--lr-decay", "none", "--sample-every", "0")
    assert process.returncode == 0, process.stderr
    assert losses(process)[0] / 128 < 0.6 and losses(process)[1] / 128 < 0.3


@pytest.mark.parametrize(
    "options, words",
    [
        (("--n-epochs", "-3"), ("--n-epochs", "integer", "-3")),
        (("--n-epochs", "0"), ("--n-epochs",)),
        (("--T", "0"), ("--T", "'0'")),
        (("--batch-size", "many"), ("--batch-size", "'many'")),
        (("--learning-rate", "nan"), ("--learning-rate", "nan")),
        (("--learning-rate", "-1"), ("--learning-rate",)),
        (("--ema", "1"), ("--ema",)),
        (("--epochs", "3"), ("--epochs",)),
        (("--preset", "second"), ("--preset", "second")),
        (("--model", "model.h5"), (".keras", "model.h5")),
        (("--seed", "-1"), ("--seed", "from 0 to 4294967295")),
        (("--data", ""), ("--data is empty",)),
        (("--beta1", "abc"), ("--beta1", "a number", "'abc'")),
        (("--model", "nowhere/model.keras"), ("nowhere",)),
        (("more",), ("more",)),
    ],
)
def test_wrong_options_get_one_sentence_at_once(run, options, words):
    refused(run("diffusion_model.py", *options, timeout=20), 2, *words)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"data": "nowhere"}, ("nowhere",)),
        ({"data": ""}, ("the source of images is empty",)),
        ({"data": "empty"}, ("empty", "no image")),
        ({"data": "text.txt"}, ("text.txt",)),
        ({"beta1": 0.5}, ("beta1", "0.5")),
        ({"zero_snr": True, "target": "eps"}, ("--zero-snr", "--target v")),
        ({"schedule": "flow", "preset": "slides"}, ("with --schedule flow x_T", "--target eps", "--target flow")),
        ({"beta2": float("nan")}, ("beta2",)),
        ({"image_size": 48, "data": "grays.npy", "network": "naive"}, ("48", "multiples of 32")),
        ({"n_feat": 12, "data": "grays.npy"}, ("n_feat", "multiple of 8", "12")),
        ({"model": "text.keras"}, ("text.keras", "not a complete Keras model")),
        ({"model": "folder.keras"}, ("folder.keras is a folder",)),
        ({"model": "foreign.keras"}, ("foreign.keras",)),
    ],
)
def test_unusable_inputs_are_refused_in_one_sentence(tmp_path, monkeypatch, options, words):
    unusable(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        preparation.prepare(options, options.get("model", "model.keras"))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def unusable(folder):
    """Things that are no images and no models."""
    np.save(folder / "grays.npy", np.zeros((2, 48, 48), np.uint8))
    (folder / "empty").mkdir()
    (folder / "folder.keras").mkdir()
    (folder / "text.txt").write_text("hello")
    (folder / "text.keras").write_text("hello")
    inputs = keras.Input((3,))
    keras.Model(inputs, keras.layers.Dense(2)(inputs)).save(folder / "foreign.keras")


@pytest.mark.parametrize("options", [("--data", "empty"), ("--model", "text.keras")])
def test_script_refuses_unusable_inputs_and_changes_no_file(run, tmp_path, options):
    unusable(tmp_path)
    before = sorted(os.listdir(tmp_path))
    refused(run("diffusion_model.py", *options), 2, options[1])
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "text.keras").read_text() == "hello"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_failed_work(run):
    refused(run("diffusion_model.py", "--model", "/sys/model.keras"), 1, "/sys")


# --- held-out images ------------------------------------------------------------------------------------------------


def test_held_out_images_are_measured_and_not_trained_on(train_tiny, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8)).astype(np.uint8)
    np.save("images.npy", images)
    with_board = importlib.util.find_spec("tensorboard") is not None
    options = (*TINY, "--batch-size", "16", "--validation", "0.25", "--validate-every", "2", "--sample-every", "1")
    if with_board:
        options += ("--tensorboard", "board")
    said = train_tiny(*options, "--n-epochs", "4")
    assert "48 images" in said
    held_out_lines = re.findall(r"^held-out loss (\S+); by quarters of t: (.*)$", said, re.MULTILINE)
    assert len(held_out_lines) == 2
    assert keras.models.load_model("model.keras").output_shape == (None, 8, 8, 1)

    rows = rows_of("model.csv")
    assert [row["held_out_loss"] != "" for row in rows] == [False, True, False, True]
    quarters = [float(rows[3][f"held_out_q{q}"]) for q in (1, 2, 3, 4)]
    assert np.mean(quarters) == pytest.approx(float(rows[3]["held_out_loss"]), rel=1e-5)  # 4 images in each
    assert held_out_lines[1][1].split() == [f"{q:.4f}" for q in quarters]

    model, *halves = prepare_network({"n_epochs": 5}, "model.keras")  # divided as before
    for half, expected in zip(halves, splits.split_held_out(images[..., None], 0.25, seed=0), strict=True):
        np.testing.assert_array_equal(half.images, expected)

    if not with_board:
        with pytest.raises(ValueError, match="pip install tensorboard"):
            train_tiny("--n-epochs", "5", "--tensorboard", "board")
        return
    tensorboard.Board("board", model_file.describe(model)).epoch(4, {"loss": 1.0})  # resumes
    events = [event for path in (tmp_path / "board").iterdir() for event in summary_iterator(str(path))]
    tags = {value.tag for event in events for value in event.summary.value}
    assert {"loss", "learning rate", "held-out/all", "held-out/q4", "samples"} <= tags
    assert sum(bool(event.graph_def) for event in events) == 1
    assert {event.step for event in events for value in event.summary.value if value.tag == "loss"} == {0, 1, 2, 3, 4}


def test_tensorboard_folder_that_is_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if TensorBoard were installed
    (tmp_path / "board").write_text("")
    with pytest.raises(ValueError, match="--tensorboard must name a folder, but .*board is a file"):
        tensorboard.Board(str(tmp_path / "board"), None)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_single_step_is_trained_and_sampled(train_tiny, tmp_path):
    """All its held-out images are in the first quarter of t."""
    one_step = "--T", "1", "--beta1", "0.5", "--sample-steps", "1"
    said = train_tiny(*TINY, *one_step, "--validation", "0.25", "--n-epochs", "1")
    assert re.search(r"^held-out loss (\S+); by quarters of t: \1 - - -$", said, re.MULTILINE)
    (row,) = rows_of("model.csv")
    assert row["held_out_q1"] == row["held_out_loss"] != "" and "nan" not in said + (tmp_path / "model.csv").read_text()
    assert {row[f"held_out_q{q}"] for q in (2, 3, 4)} == {""}
    assert np.unique(reverse_diffusion.my_sample(model="model.keras", n_sample=2, seed=0, verbose=0)).size > 1


def test_the_held_out_loss_is_the_loss_of_the_ema_weights():
    model = tiny_network((16, 16, 1))
    optimizer = keras.optimizers.Adam(use_ema=True)
    optimizer.build(model.trainable_variables)
    checkpoint.compile_for_run(model, optimizer, "float32", xla=False)
    for average in optimizer._model_variables_moving_average:
        average.assign(average * 0)  # such weights predict 0, whose error is the mean square of the noise
    model.layers[-1].bias.assign(model.layers[-1].bias + 5)
    sched = ddpm.ddpm_schedule(1e-4, 0.02, 1000)
    loss, quarters = validation.Validation(
        model_file.TrainedModel(model, sched), np.zeros((900, 16, 16, 1), np.uint8)
    ).measure()["loss"]
    ab = sched.alphabar[1:]
    expected = np.minimum(1, (1 - ab) / ab).reshape(4, 250).mean(axis=1)
    assert loss == pytest.approx(expected.mean(), abs=0.02) and quarters == pytest.approx(expected, abs=0.03)
    assert float(model.layers[-1].bias[0]) == 5  # as before


def test_held_out_images_are_a_fraction_that_depends_on_the_seed():
    images = np.arange(100)
    training, held_out = splits.split_held_out(images, 0.1, seed=3)
    assert len(held_out) == 10 and sorted([*training, *held_out]) == list(range(100))
    assert list(training) == sorted(training)
    assert list(splits.split_held_out(images, 0.1, seed=3)[1]) == list(held_out)
    assert list(splits.split_held_out(images, 0.1, seed=4)[1]) != list(held_out)
    order = np.random.default_rng([3, 1]).permutation(100)  # which files of every version rest on
    assert list(held_out) == sorted(order[:10])


@pytest.mark.parametrize(
    "training, held_out, begun",
    [
        ([5, 4, 3, 2, 1], [5, 4, 3, 2, 1], False),
        ([5, 4, 3, 2, 1, 0.9], [5, 4, 3, 3.2, 3.3, 3.4], True),
        ([5, 4, 3, 2, 1, 0.9], [5, 4, 3, 3.2, 3.3, 3.01], False),  # once more near its best
        ([5, 4, 3, 3.1, 3.2, 3.3], [5, 4, 3, 3.2, 3.3, 3.4], False),  # training got worse too: something else
        ([5, 4, 3, 2, 1], [5, 4, 3, 3.2, 3.3], False),  # too soon to say
    ],
)
def test_overfitting_is_a_falling_loss_with_rising_held_out_loss(training, held_out, begun):
    assert bool(validation.overfitting_warning(list(zip(training, held_out, strict=True)))) == begun


@pytest.mark.parametrize("share", ["0", "1.5", "0.001", "nowhere"])
def test_unusable_validation_is_refused(model_folder, monkeypatch, share):
    monkeypatch.chdir(model_folder)
    with pytest.raises((ValueError, FileNotFoundError), match="--validation|nowhere"):
        preparation.prepare({"data": "images.npy", "validation": share}, "new.keras")
