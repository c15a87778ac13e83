"""What a run starts with: held-out images, presets, names of files; and what it leaves behind in its process."""

import copy
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
from conftest import ROOT, write_images
from test_resume import in_a_process

import diffusion_model
from data import drawings
from support import files
from training import preparation, run_settings, settings
from training.images import choose_data


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with images to train on in `images.npy` and others in `others.npy`."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    np.save("others.npy", drawings.draw_cats(32, count=8, seed=1))
    return tmp_path


def choose(book=None, path="model.keras", **options):
    """What a run makes of its options: the logbook that it would save, training images, held-out images."""
    book = copy.deepcopy(book or {})
    if book:
        run_settings.complete(book, learns_variance=False)
    book["settings"] = run_settings.choose_settings(options, book, path, lambda: "first")
    before = {name: book[name] for name in ("data", "validation", "progress", "classes") if name in book}
    images, held_out = choose_data(options, book["settings"], before, path)
    held_out = held_out and held_out.images
    return {**book, "progress": {"images": 0}, **before}, images.images, held_out


def test_validation_source_resumes_from_any_folder_even_if_moved(folder, monkeypatch):
    book, _, _ = choose(data="images.npy", validation="others.npy")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    np.testing.assert_array_equal(choose(book)[2], np.load(folder / "others.npy"))

    shutil.move(folder / "others.npy", "moved.npy")
    with pytest.raises(FileNotFoundError, match="others.npy, which no longer exists.*--validation NEW"):
        choose(book)
    moved, _, held_out = choose(book, validation="moved.npy")
    assert len(held_out) == 8 and moved["validation"]["source"] == os.path.abspath("moved.npy")

    np.save("moved.npy", drawings.draw_cats(32, count=9, seed=1))
    with pytest.raises(
        ValueError, match=r"others.npy \(8 images\), not .*moved.npy \(9\).*--validation NEW.*--new-data"
    ):
        choose(book, validation="moved.npy")
    assert len(choose(book, validation="moved.npy", new_data=True)[2]) == 9


def test_moved_training_images_are_read_from_their_new_path(folder):
    book, _, _ = choose(data="images.npy")
    shutil.move("images.npy", "moved.npy")
    with pytest.raises(FileNotFoundError, match="images.npy, which no longer exists.*--data NEW"):
        choose(book)
    assert choose(book, data="moved.npy")[0]["data"]["source"] == os.path.abspath("moved.npy")
    with pytest.raises(ValueError, match=r"images.npy \(48 images\), not .*others.npy \(8\).*--data NEW.*--new-data"):
        choose(book, data="others.npy")
    with pytest.raises(FileNotFoundError, match="there is no folder or file nowhere.npy"):
        choose(book, data="nowhere.npy")


def test_a_fraction_is_a_number_and_cannot_change(folder):
    book, _, _ = choose(data="images.npy", validation="0.250")
    _, images, held_out = choose(book, validation="0.25")
    assert (len(images), len(held_out)) == (36, 12)
    for other in "0.5", "others.npy":
        with pytest.raises(ValueError, match=f"--validation 0.25, not with {other}.*omit --validation"):
            choose(book, validation=other)

    without, _, _ = choose(data="images.npy")
    with pytest.raises(ValueError, match="without --validation, not with 0.25.*omit --validation"):
        choose(without, validation="0.25")
    assert len(choose(without, validation="others.npy")[2]) == 8


@pytest.mark.parametrize("fraction", ["0", "1.5", "1", "0.001", "nan", "inf", "-0.1"])
def test_a_fraction_leaves_images_on_both_sides(folder, fraction):
    with pytest.raises(ValueError, match=f"--validation.*{fraction} of 48"):
        choose(data="images.npy", validation=fraction)


@pytest.mark.parametrize("text, fraction", [("0.25", 0.25), ("images.npy", None), (None, None)])
def test_validation_of_a_file_that_knows_only_what_was_typed(text, fraction):
    book = {"settings": {"validation": text}, "progress": {"images": 17, "batch_size": 12}}
    run_settings.complete(book, learns_variance=False)
    expected = text and {"source": None if fraction else text, "fraction": fraction}
    assert book["validation"] == expected
    assert book["progress"] == {"images": 17, "epoch_steps": 2, "epoch": 0, "step": 0, "loss": 0.0, "seconds": 0.0}


def test_the_preset_may_be_typed_again(folder):
    book, _, _ = choose(data="images.npy", preset="first", n_feat=8)
    assert choose(book, preset="first")[0]["settings"]["n_feat"] == 8
    assert choose(data="images.npy", preset="first", beta2=0.1)[0]["settings"]["schedule"] == "linear"
    assert choose(data="images.npy", preset="first", target="v")[0]["settings"]["weighting"] == "none"
    assert choose(data="images.npy", preset="first", target="v", weighting="snr")[0]["settings"]["weighting"] == "snr"
    with pytest.raises(ValueError, match="--preset first, not slides; omit --preset"):
        choose(book, preset="slides")


def test_settings_marked_as_fixed_are_refused_and_others_are_not():
    """`docs/options.md` marks each setting; `--validation` has tests of its own."""
    with open(os.path.join(ROOT, "docs", "options.md"), encoding="utf-8") as file:
        table = file.read().split("## Presets")[0]
    marks = dict(re.findall(r"^\| `(--[\w-]+).* \| ?(fixed|run|) \|$", table, re.MULTILINE))
    book = {"settings": {**settings.PRESETS["slides"], "preset": "slides"}, "progress": {"epoch": 0}}
    flags = {option.flag: option.name for option in settings.SETTINGS if option.name != "validation"}
    assert flags.keys() <= marks.keys() and not {marks[flag] for flag in flags} - {"fixed", ""}
    for flag, name in flags.items():
        if marks[flag] != "fixed":
            value = 400 if name == "n_epochs" else "another"
            chosen = run_settings.choose_settings({name: value}, book, "model.keras", pytest.fail)
            assert chosen == {**book["settings"], name: value}
            continue
        before = book["settings"][name]
        how = f"with{'' if before else 'out'} {flag}" if isinstance(before, bool) else f"with {flag} .*, not another"
        with pytest.raises(ValueError, match=f"model.keras was trained {how}; omit {flag} to"):
            run_settings.choose_settings({name: "another"}, book, "model.keras", pytest.fail)


@pytest.mark.parametrize("steps, sampler", [(None, "ddpm"), (20, "ddpm"), (19, "ddim")])
def test_files_that_name_no_sampler_had_ddim_for_few_steps(steps, sampler):
    book = {"settings": {"T": 20, "sample_steps": steps}, "progress": {}}
    run_settings.complete(book, learns_variance=False)
    assert book["settings"]["sampler"] == sampler


def test_a_target_that_is_the_presets_changes_no_weighting(folder, capsys):
    """Only another target does, and it is said; so is the schedule that a typed β brings."""
    for typed, weighting, said in (
        ({"target": "x0"}, "min-snr", ""),
        ({"target": "v"}, "none", "weighting none, as min-snr of the preset belongs to its --target x0\n"),
        ({"target": "v", "weighting": "snr"}, "snr", ""),
        ({"beta2": 0.1}, "min-snr", "schedule  linear, as --beta1 and --beta2 belong to it\n"),
        ({"beta2": 0.1, "schedule": "linear"}, "min-snr", ""),
    ):
        chosen = run_settings.choose_settings({"preset": "first", **typed}, {}, "m.keras", None)
        assert chosen["weighting"] == weighting and capsys.readouterr().out == said
        assert chosen["schedule"] == ("linear" if "beta2" in typed else "cosine")


@pytest.mark.parametrize(
    "typed, message",
    [
        ({"schedule": "cosine", "beta2": 0.3}, "--beta2 has no effect without --schedule linear"),
        ({"schedule": "sigmoid", "beta1": 1e-4}, "--beta1 has no effect without --schedule linear"),
        ({"drop_label": 0.2}, "--drop-label has no effect without --classes"),
        ({"drop_label": 0.2, "classes": True, "network": "classifier"}, "--drop-label has no effect with --network"),
        ({"weaker_after": 5, "classes": True, "network": "classifier"}, "--weaker-after has no effect with --network"),
        ({"validate_every": 2}, "--validate-every has no effect without --validation"),
    ],
)
def test_options_without_effect_are_refused(typed, message):
    chosen = run_settings.choose_settings({"preset": "first", **typed}, {}, "m.keras", None)
    with pytest.raises(ValueError, match=f"{message}.*; change that, or omit --"):
        preparation.check_effects(chosen, typed)


@pytest.mark.parametrize(
    "typed",
    [
        {"beta2": 0.3},
        {"drop_label": 0.2, "classes": True},
        {"weaker_after": 0, "classes": True, "network": "classifier"},
        {"validate_every": 2, "validation": "0.1"},
        {"variance": "learned", "network": "unet", "sampler": "ddim"},
        {"variance": "posterior"},
    ],
)
def test_options_with_an_effect_are_taken(capsys, typed):
    chosen = run_settings.choose_settings({"preset": "first", **typed}, {}, "m.keras", None)
    preparation.check_effects(chosen, typed)
    assert "no effect" not in capsys.readouterr().out


def test_variance_without_effect_on_ddim_is_reported(capsys):
    typed = {"variance": "posterior", "sampler": "ddim"}
    preparation.check_effects(run_settings.choose_settings({"preset": "first", **typed}, {}, "m.keras", None), typed)
    assert "--variance posterior has no effect with --sampler ddim, only with ddpm" in capsys.readouterr().out


@pytest.mark.parametrize("seed, fits", [("4294967295", True), ("4294967296", False), ("5000000000", False)])
def test_a_seed_that_keras_does_not_take_is_refused_by_name(seed, fits, capsys):
    if fits:
        assert settings.parse_options("", ["--seed", seed])["seed"] == int(seed)
    else:
        with pytest.raises(SystemExit):
            settings.parse_options("", ["--seed", seed])
        assert "--seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path, suffix, name",
    [
        ("model.keras", "", "samples.png"),
        ("model.keras", "epoch0010", "samples-epoch0010.png"),
        ("cats.keras", "", "cats-samples.png"),
        ("a/cats.keras", "epoch0010", "a/cats-samples-epoch0010.png"),
        ("a.model/model.keras", "", "a.model/samples.png"),
    ],
)
def test_grids_carry_the_name_of_their_model(path, suffix, name):
    assert files.grid_name(path, suffix) == os.path.normpath(name)


def test_run_leaves_neither_lock_nor_signal_handlers(tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusion_model.py"])
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    before = [signal.getsignal(number) for number in numbers]
    for _ in range(2):
        diffusion_model.main()
        assert "has been trained for all 3 epochs" in capsys.readouterr().out
        assert [signal.getsignal(number) for number in numbers] == before and signal.set_wakeup_fd(-1) == -1
        assert not [name for name in os.listdir(".") if name.endswith(".lock")]
    monkeypatch.setattr(sys, "argv", ["diffusion_model.py", "--T", "30"])
    with pytest.raises(SystemExit):
        diffusion_model.main()
    assert [signal.getsignal(number) for number in numbers] == before
    assert not [name for name in os.listdir(".") if name.endswith(".lock")]


def test_signal_in_interactive_python_ends_only_the_run():
    done = in_a_process(
        "sys.ps1 = '>>> '\n"
        "for _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.3)\n"
        "try:\n    i.end()\nexcept SystemExit as error:\n    print(error.code)\n"
        "i.__exit__()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(1)\n"
        "except KeyboardInterrupt:\n    print('prompt')\n"
        "sys.exit(7)\n"
    )
    assert done.returncode == 7 and done.stdout.splitlines()[-2:] == ["130", "prompt"]


@pytest.mark.parametrize(
    "typed",
    [
        {"schedule": "learned", "zero_snr": True},
        {"zero_snr": True, "drop_label": 0.2},
        {"zero_snr": True, "data": "none"},
    ],
)
def test_advice_comes_only_after_all_refusals(typed, tmp_path, capsys):
    with pytest.raises((ValueError, FileNotFoundError)):
        preparation.prepare({"preset": "first", "weighting": "min-snr", **typed}, str(tmp_path / "m.keras"))
    assert "try --weighting none" not in capsys.readouterr().out
