"""Images that are called by a name: one table, from which --help, errors and the held-out images of a set follow."""

import dataclasses
import difflib
import os
from collections.abc import Callable

import numpy as np

from data import arrays, cats, classes, drawings, hubs, keras_sets
from data.pixels import fit_images
from data.report import Report


@dataclasses.dataclass(frozen=True)
class Named:
    """A source of images that is called by a name.

    Attributes:
        about: what the images are, for --help.
        read: a function from the source as typed, (height, width), channels (1 or 3), levels (255 or 65535) and whether
            classes are needed to images (N, height, width, channels), 0 … levels, and a `Report`, with labels and
            classes where there are any.
        held_out: a function from the source as typed to the source of its held-out images, or to None; it is what
            `held-out` means for models that were trained on all images of this source.
        photographs: whether they may be mirrored for training.
        licence, address: of a published set.
    """

    about: str
    read: Callable[[str, tuple[int, int], int, int, bool], tuple[np.ndarray, Report]]
    held_out: Callable[[str], str | None] = lambda source: None
    photographs: bool = False
    licence: str = ""
    address: str = ""


def _draw(source, size, channels, levels, _):
    """The built-in drawings; the new ones are for evaluating models that were trained on the first."""
    seed = int(source != "drawings")
    images = fit_images(drawings.draw_cats(max(size), seed=seed), size, channels, levels)
    return images, Report(source, labels=drawings.choose_furs(seed=seed), classes=list(drawings.FURS))


def _read_cats(source, size, channels, levels, _):
    """The cats of the slides, prepared first if that has not been done."""
    skipped = cats.prepare_if_missing()
    images, *_ = arrays.read_array_file(cats.CATS, size, channels)
    labels, names = classes.read_labels(cats.CATS, len(images))
    return fit_images(images, size, channels, levels), Report(source, skipped=skipped, labels=labels, classes=names)


SOURCES = {
    "drawings": Named("built-in cartoon cats", _draw, lambda source: "new-drawings"),
    "new-drawings": Named("as many others", _draw),
    "cats": Named(
        "photographs of the slides, downloaded if missing",
        _read_cats,
        photographs=True,
        licence="CDLA-Permissive-2.0",
        address="https://www.microsoft.com/download/details.aspx?id=54765",
    ),
}
for name, known in keras_sets.SETS.items():
    facts = {"photographs": known.photographs, "licence": known.licence, "address": known.address}
    SOURCES[name] = Named(known.about, keras_sets.read, lambda source: source + keras_sets.TEST, **facts)
    SOURCES[name + keras_sets.TEST] = Named(f"test part of {name}", keras_sets.read, **facts)
for prefix, hub in hubs.HUBS.items():
    SOURCES[f"{prefix}:NAME"] = Named(hub.about, hubs.read, hubs.find_test_part)


def _key(source):
    """The key in `SOURCES` that a source has if it is one of them: what follows a colon is NAME there."""
    word, colon, _ = source.partition(":")
    return f"{word}:NAME" if colon else word


def find(source: str | os.PathLike) -> Named | None:
    """The named source that is meant, or None for a path: `drawings` is a name, `./drawings` or a `Path` is not."""
    return SOURCES.get(_key(source)) if isinstance(source, str) else None


def find_held_out(source: str | None) -> str | None:
    """The source of the images that are held out from a source as its test part, or None."""
    named = source and find(source)
    return named.held_out(source) if named else None


def suggest(source: str) -> str:
    """The end of an error about a source that does not exist: the name that may have been meant, or nothing."""
    word, colon, _ = source.lower().partition(":")
    close = difflib.get_close_matches(f"{word}:NAME" if colon else word, SOURCES, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def describe() -> str:
    """The names for --help, without test parts."""
    parts = {find_held_out(name) for name in SOURCES}
    names = [f"{name} ({named.about})" for name, named in SOURCES.items() if name not in parts]
    return ", ".join(names)


def read(
    source: str, size: tuple[int, int], channels: int, levels: int, with_classes: bool
) -> tuple[np.ndarray, Report]:
    """Reads a source that `find` finds; arguments and result as of `Named.read`.

    Args:
        with_classes: whether the report has labels and classes.

    Raises:
        ValueError: if it has no such images, or no classes.
        OSError: if it cannot be downloaded.
    """
    named = SOURCES[_key(source)]
    if channels not in (1, 3):
        raise ValueError(f"{source} can be read with channels 3 or 1, colour or grey, not {channels}")
    images, report = named.read(source, size, channels, levels, with_classes)
    report.photographs = named.photographs
    if named.address:
        report.origin = f"{source}: {named.about}, licence {named.licence}, {named.address}"
    if os.path.isdir(source):
        report.notes.append(f"{source} means the set of that name; for the folder of that name write .{os.sep}{source}")
    if not with_classes:
        report.labels, report.classes = None, []
    elif report.labels is None:
        raise ValueError(f"{source} has no labels, so no classes; {classes.ADVICE.removeprefix('or ')}")
    return images, report
