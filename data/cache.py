"""What has been read from a folder of photographs, kept for the next time, as reading thousands takes a minute.

In Keras' own folder (`~/.keras/datasets`, or where `KERAS_HOME` says), one file for each folder, size and number of
channels. It counts only as long as the names, sizes and times of all files in the folder are what they were. A cache
that cannot be written or read is no loss: the pictures are read anew.
"""

import contextlib
import hashlib
import json
import os

import numpy as np
import PIL

import files

WORTH = 2.0  # seconds of reading from which on the pictures are kept


def home():
    """The folder for what can be had again."""
    return os.path.join(os.environ.get("KERAS_HOME", os.path.expanduser("~/.keras")), "datasets")


def path_of(folder, image_size, channels):
    """The file that keeps the pictures of a folder."""
    name = hashlib.blake2b(os.fsencode(os.path.realpath(folder)), digest_size=8).hexdigest()
    return os.path.join(home(), f"pictures-{name}-{image_size}x{channels}.npz")


def stamp(folder, names):
    """A fingerprint of the files: names, sizes and times of change, and of the Pillow that reads them."""
    fingerprint = hashlib.blake2b(PIL.__version__.encode(), digest_size=16)
    for name in names:
        status = None
        with contextlib.suppress(OSError):
            status = os.stat(os.path.join(folder, name))
        state = status and (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        fingerprint.update(os.fsencode(name) + repr(state).encode())
    return fingerprint.hexdigest()


def load(path, stamp):
    """(images, left_out) as `pictures.read_all` returned them, or None if they are not there, or of other files."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["stamp"]) == stamp:
                return kept["images"], [tuple(pair) for pair in json.loads(str(kept["left_out"]))]
    except Exception:  # damaged files raise nearly every kind
        pass
    return None


def save(path, stamp, images, left_out):
    """Keeps them for the next time, if that can be done."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with files.replacing(path) as draft:
            np.savez(draft, stamp=stamp, images=images, left_out=json.dumps(left_out))
