"""Images that are called by a name: the table, the sets of Keras, and those of two packages for data sets."""

import dataclasses
import gzip
import io
import os
import pathlib
import pickle
import sys
import tarfile
import urllib.error

import numpy as np
import pytest
from conftest import ROOT
from data_helpers import BLUE, GREEN, RED, encode, noise, plain, write

from data import cache, hubs, keras_sets, load_images, named, pixels
from support import console

# The table.


def test_the_names_are_these():
    keras_names = {"mnist", "fashion-mnist", "cifar10", "cifar100"}
    assert set(keras_sets.SETS) == keras_names
    hub_names = {"tfds:NAME", "hf:NAME"}
    tests = {f"{name}-test" for name in keras_names}
    assert set(named.SOURCES) == {"drawings", "new-drawings", "cats"} | keras_names | tests | hub_names


def test_names_are_told_from_paths():
    for name in named.SOURCES:
        assert named.find(name) is named.SOURCES[name]
        assert named.find(f"./{name}") is None and named.find(pathlib.Path(name)) is None
    assert named.find("hf:someone/flowers,split=test") is named.SOURCES["hf:NAME"]
    assert named.find("C:\\images") is None and named.find("mnist.npz") is None


@pytest.mark.parametrize(
    "source, test_part",
    [
        *(("drawings", "new-drawings"), ("new-drawings", None), ("cats", None), ("./drawings", None), (None, None)),
        *(("mnist", "mnist-test"), ("mnist-test", None), ("cifar100", "cifar100-test")),
        ("tfds:cifar10", "tfds:cifar10,split=test"),
        ("hf:me/cars,split=train[:10%],image=photo", "hf:me/cars,split=test,image=photo"),
        ("hf:me/cars,split=test", None),
    ],
)
def test_the_test_part_of_a_set_is_its_held_out_source(source, test_part):
    assert named.find_held_out(source) == test_part


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("Drawings", "drawings"),
        ("cifar-10", "cifar10"),
        ("fashion_mnist", "fashion-mnist"),
        ("tdfs:mnist", "tfds:NAME"),
    ],
)
def test_mistyped_names_are_answered_by_the_nearest(typed, meant):
    with pytest.raises(FileNotFoundError, match=f"no folder or file {typed}.*; did you mean {meant}\\?$"):
        load_images(typed, 8)


def test_other_missing_sources_suggest_no_name():
    with pytest.raises(FileNotFoundError, match="to read images from$"):
        load_images("photographs/holiday", 8)


def test_help_names_every_set_but_test_parts():
    text = named.describe()
    assert all(name in text for name in named.SOURCES if "new-" not in name and "-test" not in name)
    assert "new-drawings" not in text and "-test" not in text


def test_the_page_has_every_set_with_its_facts():
    with open(os.path.join(ROOT, "docs", "data.md"), encoding="utf-8") as file:
        page = file.read()
    for name, known in named.SOURCES.items():
        assert f"`{name}`" in page
        row = next((line for line in page.splitlines() if line.startswith(f"| `{name}` |") and line.count("|") > 5), "")
        keras_set = keras_sets.SETS.get(name)
        facts = [known.licence, known.address] if "-test" not in name else []
        facts += [f"{count:,}" for count in keras_set.counts] if keras_set else []
        facts += ["| yes |" if known.photographs else "| no |"] if row else []
        assert all(fact in row for fact in facts), name


def three(source, size, channels, levels, _):
    images = pixels.fit_images(noise(3, 10, 12, 3), size, channels, levels)
    return images, named.Report(source, labels=np.int32([0, 1, 0]), classes=["cup", "pot"])


@pytest.fixture
def cups(monkeypatch):
    """A source of three images that is nothing but an entry in the table."""
    entry = named.Named("things", three, lambda source: "new-cups", True, "CC0", "https://example.org")
    monkeypatch.setitem(named.SOURCES, "cups", entry)


def test_one_entry_makes_a_source(cups, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, report = load_images("cups", "8x6", classes=True)
    expected = [pixels.crop_and_resize(image, (8, 6), 3) for image in noise(3, 10, 12, 3)]
    np.testing.assert_array_equal(images, expected)
    assert report.labels.tolist() == [0, 1, 0] and report.classes == ["cup", "pot"] and report.photographs
    assert report.origin == "cups: things, licence CC0, https://example.org" and str(report) == ""
    assert load_images("cups", 8)[1].labels is None and load_images("cups", 8)[1].classes == []
    deep, _ = load_images("cups", "8x6", bit_depth=16)
    np.testing.assert_array_equal(deep, np.uint16(expected) * 257)
    with pytest.raises(ValueError, match="cups can be read with channels 3 or 1"):
        load_images("cups", 8, channels=4)
    write(tmp_path, {"cups/a.png": RED})
    assert load_images("cups", 8)[1].notes == [
        f"cups means the set of that name; for the folder of that name write .{os.sep}cups"
    ]
    assert len(load_images("./cups", 8)[0]) == 1


def test_a_set_without_labels_has_no_classes(cups, monkeypatch):
    monkeypatch.setitem(named.SOURCES, "cups", named.Named("", lambda *a: (noise(2, 8, 8, 3), named.Report("cups"))))
    with pytest.raises(ValueError, match="cups has no labels, so no classes; omit --classes"):
        load_images("cups", 8, classes=True)


def test_training_says_the_licence_once(cups, capsys):
    from training import images

    settings = {"preset": "first", "image_size": 8, "channels": 3, "classes": True, "seed": 0, "batch_size": 2}
    settings |= {"bit_depth": None, "flip": None, "n_epochs": 1, "sample_every": 1, "validation": None}
    metadata = {"progress": {}}
    images.choose_data({"data": "cups"}, settings, metadata, "model.keras")
    assert capsys.readouterr().out.count("licence CC0") == 1
    assert metadata["classes"] == ["cup", "pot"] and metadata["data"]["source"] == "cups" and settings["flip"]
    images.choose_data({}, settings, metadata, "model.keras")  # as a resumed run does
    assert "licence" not in capsys.readouterr().out


# The sets of Keras, from files as Keras downloads them.

GREY, COLOUR = noise(12, 28, 28, seed=1), noise(12, 32, 32, 3, seed=2)
LABELS = {10: np.uint8([9, 0, 3, 3, 1, 2, 8, 7, 6, 5, 4, 9]), 100: np.uint8([99, 0, 30, 3, 1, 2, 8, 7, 6, 5, 4, 98])}
COUNTS = {"mnist": (9, 3), "fashion-mnist": (9, 3), "cifar10": (50_000, 3), "cifar100": (9, 3)}  # as written here


def write_mnist(folder, images=GREY, labels=LABELS[10]):
    arrays = {"x_train": images[:9], "y_train": labels[:9], "x_test": images[9:], "y_test": labels[9:]}
    np.savez(folder / "mnist.npz", **arrays)


def write_fashion(folder, *_):
    (folder / "fashion-mnist").mkdir()
    for part, rows in ("train", slice(9)), ("t10k", slice(9, 12)):
        for kind, head, values in ("labels-idx1", 8, LABELS[10][rows]), ("images-idx3", 16, GREY[rows]):
            with gzip.open(folder / "fashion-mnist" / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes(head) + values.tobytes())


def write_cifar(folder, name, batches, key):
    """An archive of pickled batches: rows of 3,072 bytes, red before green before blue."""
    with tarfile.open(folder / f"{name}-target_archive", "w:gz") as archive:
        for batch, rows in batches.items():
            labels = LABELS[10 if key == b"labels" else 100][rows].tolist()
            content = pickle.dumps({b"data": COLOUR[rows].transpose(0, 3, 1, 2).reshape(-1, 3072), key: labels})
            member = tarfile.TarInfo(f"{name}/{batch}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_cifar10(folder):
    batches = {f"data_batch_{k + 1}": slice(k, k + 1) for k in range(5)} | {"test_batch": slice(9, 12)}
    write_cifar(folder, "cifar-10-batches-py", batches, b"labels")


def write_cifar100(folder):
    write_cifar(folder, "cifar-100-python", {"train": slice(9), "test": slice(9, 12)}, b"fine_labels")


WRITERS = {"mnist": write_mnist, "fashion-mnist": write_fashion, "cifar10": write_cifar10, "cifar100": write_cifar100}


@pytest.fixture
def keras_home(tmp_path, monkeypatch):
    """The folder of Keras' data sets, where any digest is right, sets have few images and there is no internet."""
    import keras

    config, file_utils = keras.src.backend.config, keras.src.utils.file_utils
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(config, "_KERAS_DIR", str(tmp_path / "keras"))
    monkeypatch.setattr(file_utils, "validate_file", lambda *a, **k: True)

    def fail(url, *_):
        raise urllib.error.URLError("no internet")

    monkeypatch.setattr(file_utils, "urlretrieve", fail)
    for name, counts in COUNTS.items():
        monkeypatch.setitem(keras_sets.SETS, name, dataclasses.replace(keras_sets.SETS[name], counts=counts))
    folder = tmp_path / "keras" / "datasets"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", WRITERS)
def test_sets_of_keras_are_read_with_their_classes(keras_home, capsys, name):
    WRITERS[name](keras_home)
    grey = "mnist" in name
    images, labels = (GREY[..., None], LABELS[10]) if grey else (COLOUR, LABELS[10 if name == "cifar10" else 100])
    size, channels = (28, 1) if grey else (32, 3)
    parts = {name: slice(9), f"{name}-test": slice(9, 12)}
    if name == "cifar10":  # Keras makes 50,000 of any training images, which takes a second
        del parts[name]
    for source, rows in parts.items():
        found, report = load_images(source, size, channels, classes=True)
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, images[rows])
        np.testing.assert_array_equal(report.labels, labels[rows])
        assert report.labels.dtype == np.int32 and len(report.classes) == len(set(report.classes)) == (
            100 if name == "cifar100" else 10
        )
        assert report.source == source and report.photographs == (not grey) and "licence" in report.origin
    assert capsys.readouterr().out == ""  # nothing is downloaded


def test_classes_of_keras_sets_are_the_published_ones():
    """Their first, last and some between; CIFAR-100's names are in alphabetical order."""
    assert keras_sets.SETS["mnist"].classes == tuple(map(str, range(10)))
    assert keras_sets.SETS["fashion-mnist"].classes[8:] == ("Bag", "Ankle boot")
    assert keras_sets.SETS["cifar10"].classes[3] == "cat" and keras_sets.SETS["cifar10"].classes[9] == "truck"
    names = keras_sets.SETS["cifar100"].classes
    assert list(names) == sorted(names) and (names[0], names[53], names[99]) == ("apple", "orange", "worm")


def test_counts_of_keras_sets_are_the_published_ones():
    assert {name: known.counts for name, known in keras_sets.SETS.items()} == {
        **dict.fromkeys(["mnist", "fashion-mnist"], (60_000, 10_000)),
        **dict.fromkeys(["cifar10", "cifar100"], (50_000, 10_000)),
    }


def test_sets_of_keras_are_resized_and_cached(keras_home, monkeypatch):
    monkeypatch.setattr(cache, "MIN_SECONDS", -1)
    write_mnist(keras_home)
    images, _ = load_images("mnist", "20x16")
    grey = [pixels.crop_and_resize(image[..., None], (20, 16), 3) for image in GREY[:9]]
    np.testing.assert_array_equal(images, grey)
    load, loads = keras_sets._load, []
    monkeypatch.setattr(keras_sets, "_load", lambda *a: loads.append(a) or load(*a))
    again, report = load_images("mnist", "20x16", classes=True)
    np.testing.assert_array_equal(again, grey)
    assert loads == [] and report.labels.tolist() == LABELS[10][:9].tolist()
    assert len(load_images("mnist-test", "20x16")[0]) == 3 and len(loads) == 1  # cached separately
    write_mnist(keras_home, 255 - GREY)
    assert (load_images("mnist", "20x16")[0] != grey).mean() > 0.9 and len(loads) == 2


@pytest.mark.parametrize(
    "images, labels, said",
    [
        (GREY[:11], LABELS[10][:11], r"has uint8 images of shape \(2, 28, 28\) and 2 labels, not \(3, 28, 28\)"),
        (GREY / 255, LABELS[10], "has float64 images.*"),
        (GREY[:, :27], LABELS[10], r"has .*shape \(9, 27, 28\).*"),
        (GREY, LABELS[10] + np.uint8(1), "has labels 1 … 10 of 10 classes"),
    ],
)
def test_a_set_of_keras_is_checked(keras_home, images, labels, said):
    write_mnist(keras_home, images, labels)
    with pytest.raises(OSError, match=f"^mnist .*{said}; delete .*mnist.npz to download"):
        load_images("mnist", 28, 1)


def test_a_broken_set_of_keras_is_one_sentence(keras_home):
    write_fashion(keras_home)
    path = keras_home / "fashion-mnist" / "t10k-images-idx3-ubyte.gz"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match="^fashion-mnist through keras.datasets could not be read .*; delete .*again$"):
        load_images("fashion-mnist", 28, 1)


@pytest.mark.parametrize("name", WRITERS)
def test_no_internet_is_one_sentence_with_a_way_out(keras_home, capsys, name):
    with pytest.raises(OSError, match=f"{name} through keras.datasets could not .*no internet.*copy") as error:
        load_images(name, 8)
    assert not isinstance(error.value, FileNotFoundError)  # so that the exit status is 1
    assert capsys.readouterr().out == f"downloading {name} through keras.datasets\n"
    assert [path for path in keras_home.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_of_a_download_is_for_terminals_only(keras_home, monkeypatch, capsys, terminal):
    import keras

    def copy(url, path, report):
        write_mnist(pathlib.Path(path).parent)
        for block in range(21):
            report(block, 1000, 20_000)

    monkeypatch.setattr(keras.src.utils.file_utils, "urlretrieve", copy)
    monkeypatch.setattr(console, "can_redraw", lambda: terminal)
    assert len(load_images("mnist", 28, 1)[0]) == 9
    said = capsys.readouterr().out
    assert ("20000/20000" in said) if terminal else said == "downloading mnist through keras.datasets\n"
    assert keras.config.is_interactive_logging_enabled()


def test_ctrl_c_during_a_download_leaves_nothing(keras_home, monkeypatch):
    import keras

    def interrupt(url, path, report):
        pathlib.Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.src.utils.file_utils, "urlretrieve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_images("mnist", 28, 1)
    assert list(keras_home.iterdir()) == []


# Sets of the packages, here with stand-ins for these.

ROWS = [(encode(plain((12, 10), (20 * k, 0, 90)), "PNG"), k % 2) for k in range(5)]
BROKEN = [*ROWS[:2], (b"no image", 1), *ROWS[2:]]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that makes `hf:` open these rows, and a list of the columns that were read."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    reads = []

    def give(rows, images=("img",), classes=("kind",), count=None):
        def read(*columns):
            reads.append(columns)
            return iter(rows)

        columns = ["id", *images, *classes]
        names = {name: ["cup", "pot"] for name in classes}
        opened = hubs.Opened(columns, list(images), names, count or len(rows), [], read, "", "https://example.org")
        entry = hubs.HUBS["hf"]._replace(open=lambda query: opened)
        monkeypatch.setitem(hubs.HUBS, "hf", entry)
        return reads

    return give


def test_rows_become_images_with_classes(hub):
    hub(ROWS)
    images, report = load_images("hf:me/cups", 8, classes=True)
    assert images[:, 0, 0].tolist() == [[20 * k, 0, 90] for k in range(5)]
    assert report.labels.tolist() == [0, 1, 0, 1, 0] and report.classes == ["cup", "pot"]
    assert report.origin == "hf:me/cups: licence on its page, https://example.org" and not report.photographs


def test_broken_rows_are_skipped_with_their_labels(hub):
    hub(BROKEN)
    images, report = load_images("hf:me/cups", 8, classes=True)
    assert len(images) == 5 and report.labels.tolist() == [0, 1, 0, 1, 0]
    assert report.skipped == [("image 2", "not an image")]


def test_rows_are_cached_by_their_columns(hub, monkeypatch):
    monkeypatch.setattr(cache, "MIN_SECONDS", -1)
    reads = hub(BROKEN, images=("img", "mask"))
    for _ in range(2):
        images, report = load_images("hf:me/cups,image=img", 8, classes=True)
        assert len(images) == 5 and report.labels.tolist() == [0, 1, 0, 1, 0] and len(report.skipped) == 1
    load_images("hf:me/cups,image=mask", 8)
    assert reads == [("img", "kind"), ("mask", "kind")]


def test_rows_are_read_only_a_few_in_advance(hub):
    taken = []

    class Rows(list):
        def __iter__(self):
            for row in ROWS * 400:
                taken.append(row)
                yield row

    hub(Rows(ROWS * 400))
    from data import image_files

    read_image, done = image_files.read_image, []
    try:
        image_files.read_image = lambda *a: done.append(len(taken) - len(done)) or read_image(*a)
        assert len(load_images("hf:me/cups", 8)[0]) == 2000
    finally:
        image_files.read_image = read_image
    assert max(done) < 16 * (4 * (os.cpu_count() or 1) + 4) < 2000 or os.cpu_count() > 28


@pytest.mark.parametrize("error, expected", [(KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("gone"), OSError)])
def test_a_stream_that_ends_early_leaves_no_cache(hub, tmp_path, monkeypatch, error, expected):
    monkeypatch.setattr(cache, "MIN_SECONDS", -1)

    class Rows(list):
        def __iter__(self):
            yield from ROWS
            raise error

    hub(Rows(BROKEN))
    with pytest.raises(expected):
        load_images("hf:me/cups", 8)
    assert list(tmp_path.rglob("*.npz")) == []


@pytest.mark.parametrize(
    "source, columns, said",
    [
        ("hf:", {}, "write hf:NAME"),
        ("hf:cups,part=test", {}, "hf:cups,part=test: write hf:NAME.*split=…, image=…, label=…, config=…"),
        ("hf:cups,split=", {}, "write hf:NAME"),
        (
            "hf:cups,image=photo",
            {},
            "no column photo with images; name one of those with images, img, with ,image=COLUMN",
        ),
        ("hf:cups", {"images": ("img", "mask")}, "2 columns with images; name one of those with images, img, mask"),
        ("hf:cups", {"images": ()}, "no columns with images; name one of its columns, id, kind"),
        ("hf:cups,label=id", {}, "no column id with labels; name one of those with labels, kind"),
        (
            "hf:cups",
            {"classes": ("fine", "coarse")},
            "hf:cups has 2 columns with labels.*fine, coarse, with ,label=COLUMN",
        ),
        ("hf:cups", {"classes": ()}, "hf:cups has no columns with labels; .* of its columns, id, img"),
        ("hf:cups", {"count": 9}, "hf:cups has 5 rows, not 9"),
    ],
)
def test_unusable_sets_of_packages_are_one_sentence(hub, source, columns, said):
    hub(ROWS, **columns)
    with pytest.raises((ValueError, OSError), match=said):
        load_images(source, 8, classes=True)


@pytest.mark.parametrize(
    "source, module, package",
    [("tfds:mnist", "tensorflow_datasets", "tensorflow-datasets"), ("hf:mnist", "datasets", "datasets")],
)
def test_a_missing_package_is_named_with_its_pip_line(monkeypatch, source, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{source} needs the package {package}: pip install {package}$"):
        load_images(source, 8)


# The packages themselves, where they are installed, with sets made here.

COLOURS = [(40 * k, 0, 90) for k in range(6)]


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """A folder with tables of two parts, as a set of the Hub has them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for part, colours in ("train", COLOURS), ("test", COLOURS[:4]):
        columns = {
            "img": [plain((12, 10), colour) for colour in colours],
            "kind": [k % 2 for k in range(len(colours))],
            "word": ["pot" if k % 3 else "cup" for k in range(len(colours))],
        }
        kinds = {"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cup", "pot"])}
        kinds["word"] = datasets.Value("string")
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        table.to_parquet(tmp_path / "set" / "data" / f"{part}-00000-of-00001.parquet")
    return f"hf:{tmp_path / 'set'}"


def test_sets_of_the_hugging_face_hub_are_read(hugging_face, tmp_path, capsys):
    images, report = load_images(hugging_face, 8, classes=True)
    assert images[:, 0, 0].tolist() == list(map(list, COLOURS))
    assert report.labels.tolist() == [0, 1] * 3 and report.classes == ["cup", "pot"] and report.source == hugging_face
    assert len(load_images(named.find_held_out(hugging_face), 8)[0]) == 4
    assert len(load_images(f"{hugging_face},split=train[:50%]", 8)[0]) == 3
    words = load_images(f"{hugging_face},label=word", 8, classes=True)[1]
    assert words.labels.tolist() == [0, 1, 1, 0, 1, 1] and words.classes == ["cup", "pot"]
    write(tmp_path, {"files/train/cup/a.png": RED, "files/train/pot/b.png": BLUE, "files/train/pot/c.png": GREEN})
    images, report = load_images(f"hf:{tmp_path / 'files'}", 8, classes=True)  # paths instead of encoded images
    assert images[:, 0, 0].tolist() == [list(RED), list(BLUE), list(GREEN)] and report.labels.tolist() == [0, 1, 1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "options, said",
    [
        (",split=valid", "Unknown split .valid.*train.*test"),
        (",image=kind", "no column kind with images; name one of those with images, img"),
        (",label=sort", "no column sort with labels; name one of those with labels, kind"),
        (",config=small", "small.* not found"),
        ("/missing", "missing"),
    ],
)
def test_wrong_options_of_the_hub_are_one_sentence(hugging_face, options, said):
    with pytest.raises((ValueError, OSError), match=f"^{hugging_face}.*{said}") as error:
        load_images(hugging_face + options, 8)
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture
def tensorflow_datasets(tmp_path, monkeypatch):
    """A set of two parts, as TensorFlow Datasets keeps it when it is prepared."""
    tfds = pytest.importorskip("tensorflow_datasets")
    import tensorflow as tf

    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    kinds = {
        "picture": tfds.features.Image(shape=(None, None, 3)),
        "kind": tfds.features.ClassLabel(names=["cup", "pot"]),
    }
    parts = {}
    for part, colours in ("train", COLOURS), ("test", COLOURS[:4]):
        pictures = np.stack([np.full((10, 12, 3), colour, np.uint8) for colour in colours])
        parts[part] = tf.data.Dataset.from_tensor_slices({"picture": pictures, "kind": np.arange(len(colours)) % 2})
    tfds.dataset_builders.store_as_tfds_dataset(
        "crockery",
        version="1.0.0",
        features=tfds.features.FeaturesDict(kinds),
        split_datasets=parts,
        data_dir=tmp_path / "tfds",
        homepage="https://example.org",
    )
    tfds.core.add_data_dir(tmp_path / "tfds")
    return "tfds:crockery"


def test_sets_of_tensorflow_datasets_are_read(tensorflow_datasets, capsys):
    images, report = load_images("tfds:crockery", 8, classes=True)
    order = np.argsort(images[:, 0, 0, 0])  # the package shuffles what it stores
    assert images[order, 0, 0].tolist() == list(map(list, COLOURS))
    assert report.labels[order].tolist() == [0, 1] * 3 and report.classes == ["cup", "pot"]
    assert report.origin == "tfds:crockery: licence on its page, https://example.org"
    np.testing.assert_array_equal(load_images("tfds:crockery", 8)[0], images)
    assert capsys.readouterr().err == ""
    assert len(load_images("tfds:crockery,split=test", 8)[0]) == 4
    assert len(load_images("tfds:crockery,split=train[:50%]", 8)[0]) == 3
    for source, said in (
        ("tfds:crockery,split=valid", "Unknown split .valid.*train"),
        ("tfds:crockery,image=kind", "no column kind with images; name one of those with images, picture"),
        ("tfds:crokery", "crokery not found"),
    ):
        with pytest.raises(ValueError, match=f"^{source}.*{said}") as error:
            load_images(source, 8)
        assert len(str(error.value).splitlines()) == 1
