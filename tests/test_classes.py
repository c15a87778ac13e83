"""Classes of images: where they come from, that labels stay with their images, and what training makes of them."""

import copy
import os
import pathlib
import re
import unicodedata
import zipfile

import keras
import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from test_guidance import CONSTANTS, conditional

import data
import diffusion_model
import reverse_diffusion as rd
from data import classes, drawings, listing
from data.classes import describe_classes
from data.splits import split_held_out
from diffusion import generate, model_file
from diffusion.layers import Logbook
from diffusion.networks import NETWORKS
from evaluation import inputs
from training import checkpoint, preparation
from training.images import choose_data

CLASSES = ("--classes", "--T", "20", "--beta2", "0.5", "--image-size", "8", "--sample-every", "0")


def save_grey(path, level):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new("L", (8, 8), int(level)).save(path)


def test_the_classes_of_a_folder_are_its_first_sub_folders(tmp_path):
    """Files that give no image have no label either; nested folders belong to the first one on their path."""
    levels = {"dog/a.png": 10, "cat/x/b.png": 20, "cat/c.png": 30, "d.png": 40, "dog/z/e.png": 50}
    for name, level in levels.items():
        save_grey(tmp_path / name, level)
    (tmp_path / "cat/broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    images, report = data.load_images(tmp_path, 8, channels=1, classes=True)
    assert report.classes == ["cat", "dog"] and report.labels.dtype == np.int32
    found = {int(image[0, 0, 0]): int(label) for image, label in zip(images, report.labels, strict=True)}
    assert found == {10: 1, 20: 0, 30: 0, 40: -1, 50: 1}
    assert describe_classes(report.labels, report.classes) == "cat 2, dog 2, none 1"
    assert data.load_images(tmp_path, 8)[1].labels is None


def test_classes_are_in_alphabetical_order_unlike_paths(tmp_path):
    """As a space sorts before the separator of folders, which ends the shorter name in a path."""
    for level, name in enumerate(["cat 2/a.png", "cat/a.png"]):
        save_grey(tmp_path / name, level)
    images, report = data.load_images(tmp_path, 8, channels=1, classes=True)
    assert report.classes == ["cat", "cat 2"]
    np.testing.assert_array_equal(report.labels, 1 - images[:, 0, 0, 0])


def test_the_classes_of_drawings_are_their_furs(monkeypatch):
    images = drawings.draw_cats(64, count=60)
    monkeypatch.setattr(drawings, "draw_cats", lambda size, seed: np.zeros((drawings.COUNT, size, size, 3)))  # quick
    report = data.load_images("drawings", 8, classes=True)[1]
    assert report.classes == list(drawings.FURS) and len(report.labels) == drawings.COUNT
    furs = np.array([fur for fur, _ in drawings.FURS.values()])
    for image, label in zip(images, report.labels, strict=False):
        # The largest, as a muzzle may have the colour of another fur.
        coverage = np.all(image[:, :, None] == furs, axis=-1).mean(axis=(0, 1))
        assert np.argmax(coverage) == label
    assert not np.array_equal(report.labels, data.load_images("new-drawings", 8, classes=True)[1].labels)


IMAGES = np.arange(4, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)


@pytest.mark.parametrize(
    "members, classes",
    [
        ({"labels": [0, 2, 1, 0]}, ["0", "1", "2"]),
        ({"labels": np.array([0, 1, 1, 0], np.uint8), "photographs": True}, ["cat", "dog"]),  # before there were names
        ({"labels": [0, 0, 0, 0], "photographs": True}, ["cat"]),
        ({"labels": [0, 2, 1, 0], "photographs": True}, ["0", "1", "2"]),  # neither cats nor dogs alone
        ({"labels": [0, 1, 1, 0], "class_names": ["red", "green", "blue"]}, ["red", "green", "blue"]),
        ({"labels": [0, 1, 1, 0], "class_names": [b"red", b"green"]}, ["red", "green"]),
    ],
)
def test_the_classes_of_an_array_file_are_its_labels(tmp_path, members, classes):
    np.savez(tmp_path / "a.npz", images=IMAGES, **members)
    _, report = data.load_images(tmp_path / "a.npz", 8, classes=True)
    assert report.classes == classes
    np.testing.assert_array_equal(report.labels, members["labels"])


@pytest.mark.parametrize(
    "members, message",
    [
        ({}, "no array labels.*omit --classes"),
        ({"labels": [0, 1]}, "4 integers"),
        ({"labels": [0, 1, -1, 0]}, "4 integers of at least 0"),
        ({"labels": [0.0, 1, 1, 0]}, "4 integers.*float64"),
        ({"labels": [0, 2, 1, 0], "class_names": ["a", "b"]}, "at least 3 names.*got 2"),
        ({"labels": [0, 1, 1, 0], "class_names": ["a", "a"]}, "all different.*1 of them different"),
        ({"labels": [0, 10**6, 1, 0]}, "1000001 names"),  # corrupt, and too many to be made up
    ],
)
def test_array_files_without_proper_labels_are_refused(tmp_path, members, message):
    np.savez(tmp_path / "a.npz", images=IMAGES, **members)
    with pytest.raises(ValueError, match=message):
        data.load_images(tmp_path / "a.npz", 8, classes=True)
    assert len(data.load_images(tmp_path / "a.npz", 8)[0]) == 4


@pytest.mark.parametrize(
    "names, said",
    [
        (["val/cat/a.png", "Train/dog/a.png"], ["Train, val, which look like splits", "give FOLDER/Train instead"]),
        (["train/a.png", "test/a.png"], ["test, train, which look like splits", "omit --classes"]),
        (["photos/cat/a.png", "photos/dog/a.png"], ["has one class, photos", "give FOLDER/photos instead"]),
        (["cat/a.png", "b.png"], ["has one class, cat", "omit --classes"]),
        (["train/a.png", "bus/a.png"], []),
        (["cat/x/a.png", "dog/a.png"], []),
    ],
)
def test_folders_that_hardly_are_classes_get_a_note(tmp_path, names, said):
    for name in names:
        save_grey(tmp_path / name, 200)
    notes = data.load_images(tmp_path, 8, classes=True)[1].notes
    assert len(notes) == bool(said)
    for words in said:
        assert words.replace("FOLDER", str(tmp_path)) in notes[0] and "\n" not in notes[0]
    assert data.load_images(tmp_path, 8)[1].notes == []


@pytest.mark.parametrize("flip, has_classes, said", [(None, True, True), (True, True, False), (None, False, False)])
def test_mirrored_classes_are_said_unless_asked_for(tmp_path, capsys, flip, has_classes, said):
    for name in "b/1.png", "d/1.png":
        save_grey(tmp_path / name, 9)
    options = {} if flip is None else {"flip": flip}
    book, *_ = choose_classes(data=str(tmp_path), classes=has_classes, **options)
    assert book["settings"]["flip"] and ("--no-flip" in capsys.readouterr().out) == said
    choose_classes(book)  # a resumed run keeps to it
    assert "--no-flip" not in capsys.readouterr().out


def test_many_classes_are_described_by_the_first_eleven():
    names = [chr(ord("a") + k) for k in range(13)]
    twelve = ", ".join(f"{name} 1" for name in names[:12])
    assert describe_classes(np.arange(12), names[:12]) == twelve
    assert describe_classes(np.arange(13), names) == twelve.replace("l 1", "and 2 more")


def test_images_without_classes_are_refused_in_a_sentence(tmp_path):
    save_grey(tmp_path / "flat/a.png", 1)
    np.save(tmp_path / "a.npy", IMAGES)
    for source, message in (tmp_path / "flat", "no sub-folders"), (tmp_path / "a.npy", "no array labels"):
        with pytest.raises(ValueError, match=message):
            data.load_images(source, 8, classes=True)


def labelled(count=60):
    """Images whose grey level says their number, and labels that follow from it."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    return images, (np.arange(count) // 7 % 4 - 1).astype(np.int32)


def numbers(images):
    return images[:, 0, 0, 0]


@pytest.mark.parametrize("start", [0, 8, 13])
def test_labels_are_permuted_with_their_images(start):
    images, labels = labelled()
    for epoch in range(3):
        for batch, batch_labels in data.batches(images, 8, 5, epoch, start, flip=True, labels=labels):
            np.testing.assert_array_equal(batch_labels, labels[numbers(batch)])
    images, held_out = split_held_out(images, 0.3, 1)
    for part, part_labels in zip((images, held_out), split_held_out(labels, 0.3, 1), strict=True):
        np.testing.assert_array_equal(part_labels, labels[part[:, 0, 0, 0]])


def test_labels_are_dropped_at_random_and_the_others_shifted():
    labels = np.repeat(np.arange(-1, 9), 1000).astype(np.int32)
    dropped = diffusion_model.drop_labels(labels, 0.1, 0, 7)
    assert dropped.shape == (10000, 1) and dropped.dtype == np.int32
    kept = dropped[:, 0] == labels + 1
    assert np.all(kept | (dropped[:, 0] == 0))
    for label in range(9):  # each class alike, 0 too
        assert 60 < np.sum(~kept[labels == label]) < 140
    np.testing.assert_array_equal(diffusion_model.drop_labels(labels, 0.1, 0, 7), dropped)
    as_in_every_version = np.random.default_rng([0, 2, 7]).random(10000) < 0.1  # so that a run resumes to the bit
    np.testing.assert_array_equal(dropped[:, 0], np.where(as_in_every_version, 0, labels + 1))
    for other in diffusion_model.drop_labels(labels, 0.1, 0, 8), diffusion_model.drop_labels(labels, 0.1, 1, 7):
        assert not np.array_equal(other, dropped)
    np.testing.assert_array_equal(diffusion_model.drop_labels(labels, 0, 0, 7)[:, 0], labels + 1)
    assert not np.any(diffusion_model.drop_labels(labels, 1, 0, 7))


@pytest.fixture
def asked(monkeypatch):
    """Number of the image, inputs and target of every training image, as the model is given them."""
    seen, batch = [], []
    make, compiled = data.batches, checkpoint.compile_for_run

    def batches(*arguments, **named):
        for images, labels in make(*arguments, **named):
            batch[:] = [numbers(images)]
            yield images, labels

    def compile_for_run(model, *arguments):
        compiled(model, *arguments)
        train = model.train_on_batch

        def train_on_batch(inputs, target, sample_weight):
            seen.append((batch[0], inputs, target, sample_weight))
            return train(inputs, target, sample_weight=sample_weight)

        model.train_on_batch = train_on_batch

    monkeypatch.setattr(data, "batches", batches)
    monkeypatch.setattr(checkpoint, "compile_for_run", compile_for_run)
    return seen


def test_training_and_resuming_pair_labels_with_images(train_tiny, black_grids, asked, tmp_path):
    images, labels = labelled(24)
    np.savez("labelled.npz", images=images[..., 0], labels=labels + 1, class_names=["a", "b", "c", "d"])
    tiny = ("--data", "labelled.npz", *TINY[2:], "--classes", "--validation", "0.25", "--model", "m.keras")
    said = train_tiny(*tiny, "--drop-label", "0", "--n-epochs", "2")
    assert re.search(r"^classes   a \d, b \d, c \d, d \d$", said, re.MULTILINE) and "few images" in said
    train_tiny("--model", "m.keras", "--n-epochs", "3")
    for number, (x_t, t, label), target, _ in asked:
        np.testing.assert_array_equal(np.ravel(label), labels[number] + 2)
        assert target.shape == x_t.shape
    assert len(asked) == 3 * 2
    assert model_file.open_model("m.keras").classes == ["a", "b", "c", "d"]
    rd.my_sample(model="m.keras", n_sample=2, label=["d", "a"], verbose=0)

    for drop in "1", "0.5":
        asked.clear()
        train_tiny(*tiny[:-1], f"{drop}.keras", "--drop-label", drop, "--n-epochs", "20")
        zeros = np.mean(np.concatenate([np.ravel(inputs[2]) for _, inputs, *_ in asked]) == 0)
        assert zeros == 1 if drop == "1" else 0.4 < zeros < 0.6

    before = pathlib.Path("m.keras").read_bytes()
    for changed, message in (
        ({"labels": (labels + 2) % 4}, r"was trained with --data .*other labels"),
        ({"class_names": ["a", "b", "c", "e"]}, "classes a, b, c, d, and .* has a, b, c, e"),
    ):
        members = {"images": images[..., 0], "labels": labels + 1, "class_names": ["a", "b", "c", "d"], **changed}
        np.savez("labelled.npz", **members)
        with pytest.raises(ValueError, match=message):
            train_tiny("--model", "m.keras", "--n-epochs", "4")
    for wrong, message in (
        (("--no-classes",), "trained with --classes; omit --no-classes to resume"),
        (("--new-data", "--data", "images.npy"), "no array labels"),
    ):
        with pytest.raises(ValueError, match=message):
            train_tiny("--model", "m.keras", "--n-epochs", "4", *wrong)
    assert pathlib.Path("m.keras").read_bytes() == before


def test_the_grid_shows_the_classes_in_their_order(train_tiny, monkeypatch):
    from training import training_run

    shown, sample = [], training_run.sample
    monkeypatch.setattr(training_run, "sample", lambda *more, label: shown.append(label) or sample(*more, label=label))
    np.savez("two.npz", images=IMAGES, labels=[0, 1, 1, 0])
    train_tiny("--data", "two.npz", *TINY[2:], "--classes", "--n-epochs", "1")
    train_tiny(*TINY, "--n-epochs", "1", "--model", "without.keras")
    assert shown == [[1] * 8 + [2] * 8, None]


def small_classifier(shape, n_feat, classes, **more):
    """A convolution whose features are averaged over the image."""
    image, t = keras.Input(shape), keras.Input((1,))
    x = keras.layers.Conv2D(n_feat, 5, activation="relu")(image)
    x = keras.layers.Concatenate()([keras.layers.GlobalAveragePooling2D()(x), Logbook(name="logbook")(t)])
    return keras.Model([image, t], keras.layers.Dense(classes)(x))


def test_a_classifier_is_trained_resumed_and_guides(train_tiny, black_grids, monkeypatch):
    """Stripes of two directions, which it tells apart wherever the noise lets it."""
    monkeypatch.setitem(NETWORKS, "classifier", small_classifier)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 96)
    stripes = np.repeat(np.arange(8)[:, None] % 4 // 2, 8, axis=1)
    images = 60 + 120 * np.stack([stripes.T if label else stripes for label in labels])
    images = (images + rng.integers(-30, 30, images.shape)).astype(np.uint8)
    np.savez("stripes.npz", images=images, labels=labels, class_names=["lying down", "standing"])
    network = (
        *("--network", "classifier", "--classes", "--n-feat", "16", "--widths", "1", "--attention", "0"),
        *("--patch", "1", "--learning-rate", "4e-3"),
    )
    run = ("--validation", "0.25", "--validate-every", "10", "--ema", "0.5", "--parts", "1", "--model", "c.keras")
    options = ("--data", "stripes.npz", *TINY[2:], *network, *run)
    said = train_tiny(*options, "--n-epochs", "7") + train_tiny("--model", "c.keras", "--n-epochs", "60")
    accuracy = re.findall(r"^held-out accuracy (\S+); by quarters of t: (\S+)", said, re.MULTILINE)
    assert len(accuracy) == 6 and float(accuracy[-1][0]) > 0.7 and float(accuracy[-1][1]) == 1
    assert "--classifier c.keras --label='lying down'" in said and not os.path.exists("c-samples.png")
    classifier = model_file.open_model("c.keras", classifier=True).network
    clean = [images[:, :, :, None] / 127.5 - 1, np.full((96, 1), 1 / 20)]
    assert np.mean(np.argmax(classifier(clean), axis=1) == labels) == 1
    assert "for all 60 epochs" in train_tiny("--model", "c.keras", "--validate-every", "10", "--parts", "1")

    train_tiny("--data", "stripes.npz", *TINY[2:], "--n-epochs", "1")
    how = {"n_sample": 8, "seed": 0, "verbose": 0, "classifier": "c.keras", "guidance": 5}
    lying, standing = (rd.my_sample(label=name, **how).astype(float) for name in ("lying down", "standing"))
    standing_more = [np.diff(x, axis=2).std() - np.diff(x, axis=1).std() for x in (lying, standing)]
    assert standing_more[0] < standing_more[1]
    for model, classifier, message in (
        ("c.keras", None, "is a classifier"),
        ("model.keras", "model.keras", "not a classif"),
    ):
        with pytest.raises(ValueError, match=message):
            rd.my_sample(model=model, classifier=classifier, label=0, verbose=0)


def test_a_classifier_learns_from_the_images_that_have_a_class(train_tiny, asked):
    for k, name in enumerate(["a/0.png", "a/1.png", "b/0.png", "b/1.png", "0.png", "1.png"]):
        save_grey(os.path.join("folder", name), k)
    network = ("--network", "classifier", "--classes", "--n-feat", "8", "--widths", "1", "--attention", "0")
    train_tiny("--data", "folder", *TINY[2:], *network, "--patch", "1", "--n-epochs", "1")
    ((_, inputs, target, weight),) = asked
    assert len(inputs) == 2 and sorted(target) == [-1, -1, 0, 0, 1, 1]
    np.testing.assert_array_equal(weight, np.reshape(target >= 0, (6, 1, 1, 1)))


def test_classifier_loss_is_cross_entropy_of_labelled_images():
    from diffusion.networks import Classifier

    model = Classifier((8, 8, 1), 8, 3, widths=(1,), attention=0)
    model.compile(optimizer=keras.optimizers.Adam(0.0, use_ema=True))
    model.optimizer.build(model.trainable_variables)
    checkpoint.divide_training(model, parts=2)
    rng = np.random.default_rng(0)
    model.layers[-1].set_weights([rng.standard_normal(w.shape) for w in model.layers[-1].get_weights()])
    inputs = [rng.standard_normal((5, 8, 8, 1)).astype(np.float32), rng.random((5, 1), np.float32)]
    logits = np.asarray(model(inputs), np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(5), [0, 2, 1, 1, 0]]
    target, weight = np.array([0, 2, 1, 1, -1], np.int32), np.array([1, 1, 1, 1, 0], np.float32)
    loss = model.train_on_batch(inputs, target, sample_weight=weight[:, None, None, None])
    assert loss == pytest.approx(expected[:4].sum() / 5, rel=1e-5)


@pytest.mark.parametrize(
    "typed, message",
    [
        (("--network", "classifier"), "add --classes"),
        (("--patch", "2"), "--patch requires --network unet"),
        (("--data", "images.npy", "--classes"), "no array labels"),
        (("--network", "unet", "--image-size", "12"), "multiples of 8"),
    ],
)
def test_unfit_options_are_one_sentence_and_write_nothing(train_tiny, typed, message):
    with pytest.raises(ValueError, match=message):
        train_tiny(*TINY, *typed)
    assert os.listdir() == ["images.npy"]


def test_labels_that_are_corrupt_are_refused_in_a_sentence(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=[0, 1, 1, 0])
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        place = file.getinfo("labels.npy").header_offset
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(b"NUMPY", place) + 130] ^= 1  # in the labels, behind their header
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="a.npz: the array labels cannot be read"):
        data.load_images(tmp_path / "a.npz", 8, classes=True)


def test_a_model_that_never_learned_no_class_says_so(train_tiny, black_grids, capsys):
    """Wherever it is asked for images of no class; also if only images were trained that have one, resumed or not."""
    sentence = "with --drop-label 0 a network never learns to sample without a class: every image needs a label"
    np.savez("two.npz", images=IMAGES, labels=[0, 1, 1, 0])
    tiny = ("--data", "two.npz", *TINY[2:], "--classes")
    assert sentence in train_tiny(*tiny, "--n-epochs", "1", "--drop-label", "0")
    assert sentence in train_tiny("--n-epochs", "2")
    for warns, how in (
        (True, {}),
        (True, {"label": 0, "guidance": 2.0}),
        (False, {"label": 0}),
        (False, {"verbose": 0}),
    ):
        rd.my_sample(steps=1, seed=0, **{"verbose": 1, **how})
        assert (sentence in capsys.readouterr().err) == warns
    rd.invert(np.zeros((1, 8, 8, 1)) - 1, steps=1)
    assert sentence in capsys.readouterr().err
    assert sentence not in train_tiny("--n-epochs", "3", "--drop-label", "0.5")
    assert sentence not in train_tiny("--n-epochs", "4", "--drop-label", "0")  # it has learned them by now
    for k, name in enumerate(["a/0.png", "b/0.png", "0.png"]):
        save_grey(os.path.join("folder", name), k)
    said = train_tiny(
        "--data", "folder", *TINY[2:], "--classes", "--n-epochs", "1", "--drop-label", "0", "--model", "some.keras"
    )
    assert sentence not in said


def test_advice_on_no_class_depends_on_the_metadata():
    def warning(metadata):
        return model_file.warn_of_no_class(model_file.TrainedModel(None, None, metadata=metadata))

    assert "evaluate.py need" in warning({"classes": ["a"], "settings": {"network": "unet", "drop_label": 0.0}})
    for book in (
        {},
        {"classes": ["a"]},
        {"classes": [], "settings": {"network": "unet", "drop_label": 0.0}},
        {"classes": ["a"], "settings": {"network": "unet", "drop_label": 0.1}},
        {"classes": ["a"], "settings": {"network": "classifier", "drop_label": 0.0}},
    ):
        assert warning(book) is None


def choose_classes(book=None, **options):
    """The metadata that a run makes of its options, its training images, and its held-out ones."""
    book = copy.deepcopy(book or {})
    if book:
        preparation.complete(book, learns_variance=False)
    new = {} if book else {"image_size": 8, "channels": 1, "classes": True, "preset": "first"}
    chosen = preparation.choose_settings({**new, **options}, book, "model.keras", lambda: "first")
    book["progress"] = {"images": 0}
    images, held_out = choose_data(options, chosen, book, "model.keras")
    return {**book, "settings": chosen}, images, held_out


@pytest.mark.parametrize(
    "held_out", [["bird", "cat", "dog"], ["bird", "dog"], ["cat", "dog"], ["dog"], ["bird", "cat"], []]
)
def test_held_out_classes_are_matched_by_name(tmp_path, held_out):
    """Each image says its class by its grey level; those beside the sub-folders have none."""
    levels = {"bird": 10, "cat": 20, "dog": 30}
    for folder, names in ("training", levels), ("validation", held_out):
        save_grey(tmp_path / folder / "none.png", 40)
        for name in names:
            save_grey(tmp_path / folder / name / "a.png", levels[name])
    if not held_out:  # an array has its own numbers
        images = np.array([30, 10, 30], np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
        np.savez(tmp_path / "validation.npz", images=images, labels=[0, 1, 0], class_names=["dog", "bird"])
    source = tmp_path / ("validation" if held_out else "validation.npz")
    book, _, found = choose_classes(data=str(tmp_path / "training"), validation=str(source))
    assert book["classes"] == ["bird", "cat", "dog"]
    expected = {10: 0, 20: 1, 30: 2, 40: -1}
    assert found.labels.tolist() == [expected[level] for level in found.images[:, 0, 0, 0]]
    assert found.labels.dtype == np.int32  # as the digest of earlier versions was made of
    choose_classes(book, validation=str(source))

    save_grey(tmp_path / "validation" / "frog" / "a.png", 50)
    with pytest.raises(ValueError, match="--validation .* has the classes frog, .* have only bird, cat, dog;"):
        choose_classes(data=str(tmp_path / "training"), validation=str(tmp_path / "validation"))


def test_held_out_labels_keep_the_digest_of_earlier_versions(tmp_path):
    for name in "training/a/1.png", "training/b/1.png", "training/c/1.png", "validation/a/2.png", "validation/b/2.png":
        save_grey(tmp_path / name, 9)
    book, *_ = choose_classes(data=str(tmp_path / "training"), validation=str(tmp_path / "validation"))
    assert book["validation"]["labels"] == data.digest(np.array([0, 1], np.int32))


NAMES = ["\xe9cole", "caf\xe9", "cafz", "fr\xfchst\xfcck"]  # café comes before cafz only while é is two characters


def write_names(folder, form):
    for k, name in enumerate(NAMES):
        for image in "1\xe8re.png", "1zz.png":
            path = os.path.join(folder, unicodedata.normalize(form, f"{name}/{image}"))
            save_grey(path, 10 * k + ("z" in image))


def test_names_of_moved_classes_stay_the_same(tmp_path):
    """A folder that a Mac has copied: all accents are characters of their own."""
    for form in "NFC", "NFD":
        write_names(tmp_path / form, form)
    composed, decomposed = (data.load_images(tmp_path / form, 8, channels=1, classes=True) for form in ("NFC", "NFD"))
    assert composed[1].classes == decomposed[1].classes == sorted(NAMES)
    np.testing.assert_array_equal(composed[0], decomposed[0])
    np.testing.assert_array_equal(composed[1].labels, decomposed[1].labels)
    in_order = sorted(
        (name, image, 10 * k + j) for k, name in enumerate(NAMES) for j, image in enumerate(("1\xe8re.png", "1zz.png"))
    )
    in_order.sort(key=lambda found: f"{found[0]}/{found[1]}")  # as composed names have always been sorted
    assert composed[0][:, 0, 0, 0].tolist() == [level for *_, level in in_order]

    book, *_ = choose_classes(data=str(tmp_path / "NFC"), validation=str(tmp_path / "NFD"))
    moved, *_ = choose_classes(book, data=str(tmp_path / "NFD"), validation=str(tmp_path / "NFC"))
    assert moved["data"]["digest"] == book["data"]["digest"] and moved["data"]["labels"] == book["data"]["labels"]


@pytest.mark.parametrize("validation", [None, "0.25"])
def test_files_with_decomposed_names_resume(tmp_path, monkeypatch, validation):
    """Earlier versions noted and sorted names as they were stored."""
    write_names(tmp_path / "NFD", "NFD")
    options = {"validation": validation} if validation else {}
    with monkeypatch.context() as earlier:
        for module in listing, classes:
            earlier.setattr(module, "normalise_name", lambda name: name)
        book, images, held_out = choose_classes(data=str(tmp_path / "NFD"), **options)
    assert book["classes"] == sorted(unicodedata.normalize("NFD", name) for name in NAMES)
    resumed, again, held_out_again = choose_classes(book)
    np.testing.assert_array_equal(again.images, images.images)
    np.testing.assert_array_equal(again.labels, images.labels)
    assert held_out is None or np.array_equal(held_out_again.images, held_out.images)
    assert resumed["classes"] == [unicodedata.normalize("NFC", name) for name in book["classes"]]

    sources = inputs.Sources("model.keras", "drawings", str(tmp_path / "NFD"))

    def load(source, recognise=None):
        return data.load_images(source, 8, 1, recognise=recognise)[0]

    np.testing.assert_array_equal(inputs.load_training(load, book, sources)[0], images.images)


def test_labels_and_names_of_models_are_composed():
    decomposed = [unicodedata.normalize("NFD", name) for name in NAMES[:2]]
    networks = conditional(CONSTANTS[::-1], decomposed), conditional(CONSTANTS, NAMES[:2])
    model, composed = map(model_file.describe, networks)
    assert model.classes == NAMES[:2]
    model_file.check_guide(model, "weaker.keras", composed, classifier=False)
    for name in decomposed[1], NAMES[1]:
        for network in model, composed:
            assert generate.as_labels([name, NAMES[0], 1], 3, network).tolist() == [2, 1, 2]


def test_names_that_differ_in_accents_stored_are_duplicates(tmp_path):
    names = ["caf\xe9", "cafe\u0301"]
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=[0, 1, 1, 0], class_names=names)
    with pytest.raises(ValueError, match="2 names, all different"):
        data.load_images(tmp_path / "a.npz", 8, classes=True)
    for level, name in enumerate(names):
        save_grey(tmp_path / "folder" / name / "a.png", level)
    assert data.load_images(tmp_path / "folder", 8, classes=True)[1].classes == names[:1]


def test_other_validation_images_must_have_the_same_classes(train_tiny, tiny_unet):
    np.savez("a.npz", images=IMAGES, labels=[0, 1, 1, 0])
    np.savez("b.npz", images=IMAGES, labels=[0, 1, 2, 0])
    with pytest.raises(ValueError, match="--validation .*b.npz has the classes 2, and the training images have only 0"):
        train_tiny("--data", "a.npz", "--validation", "b.npz", *TINY[2:], "--classes")
    held_out = preparation.prepare(
        {"data": "a.npz", "validation": "a.npz", "classes": True, "image_size": 8, "preset": "first"}, "m.keras"
    )[2]
    np.testing.assert_array_equal(held_out.labels, [0, 1, 1, 0])
