"""The cats of the slides: Microsoft's cats-and-dogs archive (Asirra), made into one compact file."""

import http.client
import io
import os
import re
import socket
import urllib.error
import zipfile

import numpy as np

from data import cache, image_files, listing
from support import device, files

URL = "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip"
ANIMALS = ("cat", "dog")  # the labels 0 and 1
MEMBER = re.compile(r"(?:^|/)(cat|dog)s?[./].*?(\d+)\.jpe?g$", re.IGNORECASE)  # PetImages/Cat/7.jpg, train/cat.7.jpg
LARGEST_FILE = 100 * 2**20  # bytes; the photographs have some ten thousand


def download(url=URL):
    """Brings the archive into Keras' cache, once, and returns its path.

    Raises:
        OSError: if it cannot be had; nothing half-written stays.
    """
    device.start_tensorflow()
    import keras

    name, folder = os.path.basename(url), cache.home()
    cached = os.path.join(folder, name)
    if os.path.exists(cached) and not _is_archive(cached):
        os.remove(cached)  # what a killed download has left
    socket.setdefaulttimeout(60)  # a compute node without internet would wait for minutes
    try:
        os.makedirs(folder, exist_ok=True)  # get_file turns away from what is not there
        path = keras.utils.get_file(name, url, cache_dir=os.path.dirname(folder), cache_subdir=os.path.basename(folder))
    except (OSError, http.client.HTTPException, urllib.error.ContentTooShortError) as error:
        raise OSError(f"{url} could not be downloaded: {error}") from error
    except Exception as error:  # get_file raises plain Exceptions
        raise OSError(str(error)) from error
    if not _is_archive(path):
        os.remove(path)
        raise OSError(f"{url} did not bring a zip archive, or not all of it; run the command again")
    return path


def _is_archive(path):
    """Whether it is a zip archive with a list of contents that can be read."""
    try:
        with zipfile.ZipFile(path):
            return True
    except Exception:  # damaged ones raise nearly every kind
        return False


def prepare(archive, out, animals="cats", image_size=64):
    """Reads the photographs in the archive, without unpacking it, and writes them as one `.npz` file.

    Args:
        archive: path of Microsoft's archive, or of Kaggle's `train.zip`.
        out: path of the file to write: `images` uint8 (N, image_size, image_size, 3), `labels`
            uint8 (N,) with 0 for cats and 1 for dogs, and the mark `photographs`.
        animals: `'cats'`, `'dogs'` or `'both'`.

    Returns:
        Number of pictures, and the list of files left out with reasons.

    Raises:
        ValueError: if it is no archive, or holds no such photographs.
    """
    name = image_files.printable(archive)
    if not _is_archive(archive):
        raise ValueError(f"{name} is not a zip archive, or not all of one")
    wanted = ANIMALS if animals == "both" else (animals.removesuffix("s"),)
    with zipfile.ZipFile(archive) as opened:
        labels = {}
        for member in sorted(opened.namelist(), key=lambda member: (len(member), member)):
            found = MEMBER.search(member)
            hidden = any(map(listing.is_hidden, member.split("/")))  # as in __MACOSX/PetImages/Cat/._7.jpg
            if found and not hidden and found[1].lower() in wanted:
                labels[member] = ANIMALS.index(found[1].lower())

        def open_picture(member):
            size = opened.getinfo(member).file_size
            if not 0 < size <= LARGEST_FILE:
                raise ValueError("empty" if size == 0 else f"{size:,} bytes")
            return io.BytesIO(opened.read(member))

        images, left_out = image_files.read_all(list(labels), open_picture, image_size, channels=3)
    if len(images) == 0:
        raise ValueError(
            f"{name} holds no photographs of {animals} (as PetImages/Cat/0.jpg or train/cat.0.jpg): "
            + (image_files.summary(left_out) if left_out else "no file of such a name")
        )
    missing = {member for member, _ in left_out}
    kept = np.array([label for member, label in labels.items() if member not in missing], np.uint8)
    with files.replacing(out) as draft:
        np.savez_compressed(draft, images=images, labels=kept, photographs=True)
    return len(images), left_out
