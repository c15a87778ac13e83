"""Sets of TensorFlow Datasets and of the Hugging Face Hub: `tfds:NAME`, `hf:NAME`, with options after commas.

    tfds:oxford_flowers102                         its training part
    hf:cifar100,split=test,label=coarse_label      another part, and the column with the classes

What the packages download they keep in folders of their own. Images are decoded and resized one after another, so that
nothing else is held in memory, and cached (`data/cache.py`).
"""

import contextlib
import dataclasses
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from data import cache, image_files
from data.report import Report
from support import console, device


@dataclasses.dataclass(frozen=True)
class Query:
    """What stands after `tfds:` or `hf:`.

    Attributes:
        hub: what stands before.
        name: of the set; of `hf:` also a folder.
        split: the part that is read, such as `test` or `train[:10%]`.
        image, label: the columns with the images and their classes; None for the only ones that there are.
        config: the variant of a set that has several.
    """

    hub: str
    name: str
    split: str = "train"
    image: str | None = None
    label: str | None = None
    config: str | None = None

    def __str__(self) -> str:
        more = {key: value for key, value in vars(self).items() if key not in ("hub", "name")}
        options = (f",{key}={value}" for key, value in more.items() if value != getattr(Query, key))
        return f"{self.hub}:{self.name}{''.join(options)}"


OPTIONS = ("split", "image", "label", "config")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A part of a set that lies on this machine.

    Attributes:
        columns: all columns.
        images: those with images.
        classes: those with classes, and the names of the classes.
        count: how many rows there are.
        files: that the rows are in.
        rows: a function from a column with images, and one with classes or None, to pairs: an encoded image, or the
            path of one, and the number of its class, -1 for none.
        licence, address: of the set; no address for a folder.
    """

    columns: list[str]
    images: list[str]
    classes: Mapping[str, list[str]]
    count: int
    files: list[str]
    rows: Callable[[str, str | None], Iterable[tuple[bytes | str, int]]]
    licence: str
    address: str


def parse(source: str) -> Query:
    """Reads a source `HUB:NAME,KEY=VALUE,…`. The path of a folder becomes an absolute one.

    Raises:
        ValueError: if it is not of this form.
    """
    hub, _, rest = source.partition(":")
    name, *words = rest.split(",")
    options = dict(word.partition("=")[::2] for word in words)
    if not name or not all(key in OPTIONS and value for key, value in options.items()):
        known = ", ".join(f"{key}=…" for key in OPTIONS)
        raise ValueError(f"{source}: write {hub}:NAME, and after it, separated by commas, any of {known}")
    return Query(hub, os.path.abspath(name) if hub == "hf" and os.path.isdir(name) else name, **options)


def find_test_part(source: str) -> str | None:
    """The source of the test part of a set, or None for that part itself."""
    query = parse(source)
    part = dataclasses.replace(query, split="test")
    return None if part == query else str(part)


def read(source: str, size: tuple[int, int], channels: int, levels: int, classes: bool) -> tuple[np.ndarray, Report]:
    """Reads a part of a set, downloaded if it is missing.

    Args:
        source: see `parse`.
        size, channels, levels: of the images, see `image_files.read_image`.
        classes: whether there must be classes; without, they are read if one column has some.

    Raises:
        ValueError: if the package is missing, or there is no such set, part or column.
        OSError: if it cannot be downloaded.
    """
    query = parse(source)
    opened = HUBS[query.hub].open(query)
    image = _choose_column(source, "image", query.image, opened.images, opened.columns, needed=True)
    label = _choose_column(source, "label", query.label, list(opened.classes), opened.columns, needed=classes)
    labels = []

    def files():
        with _in_a_sentence(query):
            for k, (file, number) in enumerate(opened.rows(image, label)):
                labels.append(number)
                yield f"image {k}", file

    def open_image(file):
        return file if isinstance(file, str) else io.BytesIO(file)

    def read_rows():
        images, skipped = image_files.read_images(files(), opened.count, open_image, size, channels, levels)
        if len(labels) != opened.count:
            raise OSError(
                f"{query} has {len(labels):,} rows, not {opened.count:,}; delete the package's copy of the set"
            )
        missing = {name for name, _ in skipped}
        kept = [number for k, number in enumerate(labels) if f"image {k}" not in missing]
        return images, skipped, *([np.array(kept, np.int32)] if label else [])

    identity = f"{query} {image} {label}"
    path = cache.cache_path(os.path.join(cache.cache_folder(), identity), size, channels, levels)
    fingerprint = cache.folder_fingerprint(identity, opened.files, image_files.readable_formats())
    images, skipped, numbers = cache.load_or_read(path, fingerprint, read_rows)
    if len(images) == 0:
        raise ValueError(f"{source}: no image could be read; {image_files.summarise_skipped(skipped)}")
    report = Report(str(query), skipped=skipped, labels=numbers, classes=opened.classes.get(label, []))
    if opened.address:
        report.origin = f"{query}: licence {opened.licence or 'on its page'}, {opened.address}"
    return images, report


def _choose_column(source, kind, wanted, fitting, columns, needed):
    """The column that is named, or the only one of its kind; None if there is none of a kind that is not needed."""
    if wanted in fitting:
        return wanted
    if wanted is None and len(fitting) == 1:
        return fitting[0]
    if wanted is None and not needed:
        return None
    found = f"no column {wanted} with {kind}s" if wanted else f"{len(fitting) or 'no'} columns with {kind}s"
    among = f"of those with {kind}s, {', '.join(fitting)}" if fitting else f"of its columns, {', '.join(columns)}"
    raise ValueError(f"{source} has {found}; name one {among}, with ,{kind}=COLUMN")


@contextlib.contextmanager
def _in_a_sentence(query):
    """Failures of a package in one sentence: wrong names as ValueError, all others as OSError."""
    try:
        yield
    except ImportError as error:  # also of packages that theirs need
        package = HUBS[query.hub].package if error.name == HUBS[query.hub].module else error.name
        raise ValueError(f"{query} needs the package {package}: pip install {package}") from error
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{query}: {_first_line(error)}") from error
    except Exception as error:
        raise OSError(
            f"{query} could not be loaded ({_first_line(error)}); try again, or, where there is no internet, copy the "
            "folder of its package from a machine that has downloaded it"
        ) from error


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _absl_warnings_hidden():
    """TensorFlow Datasets warns of functions of its own that it uses."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _open_tfds(query):
    """A set of TensorFlow Datasets, downloaded and prepared if it is missing."""
    with _in_a_sentence(query):
        tfds = importlib.import_module("tensorflow_datasets")
        device.start_tensorflow()
        if not console.can_redraw():
            tfds.disable_progress_bar()
        builder = tfds.builder(f"{query.name}/{query.config}" if query.config else query.name)
        builder.download_and_prepare()
        info, split = builder.info, builder.info.splits[query.split]

    def rows(image, label):
        decoders = tfds.decode.PartialDecoding(
            {name: True for name in (image, label) if name}, decoders={image: tfds.decode.SkipDecoding()}
        )
        with _absl_warnings_hidden():
            part = builder.as_dataset(split=query.split, decoders=decoders)
        for row in part.as_numpy_iterator():
            yield row[image], int(row[label]) if label else -1

    return Opened(
        columns=list(info.features),
        images=[name for name, kind in info.features.items() if isinstance(kind, tfds.features.Image)],
        classes={
            name: [kind.int2str(k) for k in range(kind.num_classes)]
            for name, kind in info.features.items()
            if isinstance(kind, tfds.features.ClassLabel)
        },
        count=split.num_examples,
        files=[os.fspath(path) for path in split.filepaths],
        rows=rows,
        licence=info.redistribution_info.license,
        address=info.homepage or f"https://www.tensorflow.org/datasets/catalog/{query.name}",
    )


def _open_hf(query):
    """A set of the Hugging Face Hub, or a folder in a form that its package reads."""
    with _in_a_sentence(query):
        datasets = importlib.import_module("datasets")
        if not console.can_redraw():
            datasets.disable_progress_bars()
        table = datasets.load_dataset(query.name, query.config, split=query.split)
        files = [file["filename"] for file in table.cache_files]
        if query.label in table.column_names and isinstance(table.features[query.label], datasets.Value):
            table = table.class_encode_column(query.label)  # text and numbers

    def rows(image, label):
        encoded = table.select_columns([name for name in (image, label) if name])
        for row in encoded.cast_column(image, datasets.Image(decode=False)):
            number = row[label] if label else None
            yield row[image]["bytes"] or row[image]["path"], -1 if number is None else number

    return Opened(
        columns=table.column_names,
        images=[name for name, kind in table.features.items() if isinstance(kind, datasets.Image)],
        classes={name: kind.names for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)},
        count=len(table),
        files=files,
        rows=rows,
        licence=table.info.license,
        address="" if os.path.isabs(query.name) else f"https://huggingface.co/datasets/{query.name}",
    )


class Hub(NamedTuple):
    """A collection of sets: for --help; the package that reads it, as pip and as Python call it; how to open a set."""

    about: str
    package: str
    module: str
    open: Callable[[Query], Opened]


HUBS = {
    "tfds": Hub("a set of TensorFlow Datasets", "tensorflow-datasets", "tensorflow_datasets", _open_tfds),
    "hf": Hub("a set of the Hugging Face Hub", "datasets", "datasets", _open_hf),
}
