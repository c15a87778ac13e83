"""The cats of the slides: Microsoft's cats-and-dogs archive (Asirra), converted to one compact file."""

import io
import os
import re
import zipfile

import numpy as np

from data import cache, image_files, listing, pixels
from data.downloads import downloading
from support import console, files

CATS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cats64.npz")  # written by `python -m data cats`
URL = "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip"
ANIMALS = ("cat", "dog")  # the labels 0 and 1
MEMBER = re.compile(r"(?:^|/)(cat|dog)s?[./].*?(\d+)\.jpe?g$", re.IGNORECASE)  # PetImages/Cat/7.jpg, train/cat.7.jpg
BY_HAND = "try again, or download it in a browser and give it with --archive"
MAX_BYTES = 100 * 2**20  # of one photograph; in the archive they have some ten thousand


def download(url: str = URL) -> str:
    """Downloads the archive into Keras' cache, unless it is there, and returns its path.

    Raises:
        OSError: if the download fails; no incomplete file remains.
    """
    name, folder = os.path.basename(url), cache.cache_folder()
    cached = os.path.join(folder, name)
    if os.path.exists(cached) and not _is_archive(cached):
        os.remove(cached)  # left by a killed download
    with downloading(url, [cached], BY_HAND):
        import keras

        path = keras.utils.get_file(name, url, cache_dir=os.path.dirname(folder), cache_subdir=os.path.basename(folder))
    if not _is_archive(path):
        os.remove(path)
        raise OSError(f"{url} did not return a complete zip archive; try again, or give another --url")
    return path


def _is_archive(path):
    """Whether a file is a zip archive whose list of contents can be read."""
    try:
        with zipfile.ZipFile(path):
            return True
    except Exception:  # corrupt ones raise nearly every kind
        return False


def prepare_if_missing() -> list[tuple[str, str]]:
    """Downloads and prepares the cats of the slides, unless that has been done. Returns skipped files, as `prepare`.

    Raises:
        OSError: if that fails; nothing incomplete remains.
    """
    if os.path.exists(CATS):
        return []
    console.say("the cats of the slides are not prepared yet: 800 MB to download, once")
    files.check_writable(CATS)  # fail before the work, not after it
    return prepare(download(), CATS)[1]


def prepare(
    archive: str, out: str, animals: str = "cats", image_size: int | str = 64
) -> tuple[int, list[tuple[str, str]]]:
    """Reads the photographs in the archive, without unpacking it, and writes them to one `.npz` file.

    Args:
        archive: path of Microsoft's archive, or of Kaggle's `train.zip`.
        out: path of the output file with the arrays `images`, uint8 (N, height, width, 3), `labels`,
            uint8 (N,) with 0 for cats and 1 for dogs, `class_names`, and `photographs`, a boolean that is True.
        animals: `'cats'`, `'dogs'` or `'both'`.

    Returns:
        The number of images, and a pair (file name, reason) for every file that was skipped.

    Raises:
        ValueError: if the file is not an archive, or holds no photographs of these animals.
    """
    name = image_files.escape_name(archive)
    if not _is_archive(archive):
        raise ValueError(f"{name} is not a complete zip archive; omit --archive to download one")
    wanted = ANIMALS if animals == "both" else (animals.removesuffix("s"),)
    with zipfile.ZipFile(archive) as opened:
        label_of = {}
        for member in sorted(opened.namelist(), key=lambda member: (len(member), member)):
            found = MEMBER.search(member)
            hidden = any(map(listing.is_hidden, member.split("/")))  # as in __MACOSX/PetImages/Cat/._7.jpg
            if found and not hidden and found[1].lower() in wanted:
                label_of[member] = ANIMALS.index(found[1].lower())

        def open_image(member):
            size = opened.getinfo(member).file_size
            if not 0 < size <= MAX_BYTES:
                raise ValueError("empty" if size == 0 else f"{size:,} bytes")
            return io.BytesIO(opened.read(member))

        members = zip(label_of, label_of, strict=True)
        size = pixels.as_size(image_size)
        images, skipped = image_files.read_images(members, len(label_of), open_image, size, channels=3)
    if len(images) == 0:
        raise ValueError(
            f"{name} holds no readable photographs of {animals}, named like PetImages/Cat/0.jpg or train/cat.0.jpg: "
            + (image_files.summarise_skipped(skipped) if skipped else "no file has such a name")
        )
    missing = {member for member, _ in skipped}
    labels = np.array([label for member, label in label_of.items() if member not in missing], np.uint8)
    with files.replacing(out) as draft:
        np.savez_compressed(draft, images=images, labels=labels, class_names=ANIMALS, photographs=True)
    return len(images), skipped
