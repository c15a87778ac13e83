"""What has been read from a folder of photographs, kept for the next time, as reading thousands takes a minute.

In Keras' own folder (`~/.keras/datasets`, or where `KERAS_HOME` says), one file for each folder, size and number of
channels. It counts only as long as the names, sizes and times of all files in the folder are what they were. A cache
that cannot be written or read is no loss: the pictures are read anew.
"""

import contextlib
import hashlib
import json
import os
import tempfile

import numpy as np
import PIL

from support import files

RULES = 2  # raised whenever the code reads files differently than before
WORTH = 2.0  # seconds of reading from which on the pictures are kept


def home():
    """The folder for what can be had again: Keras' own, by its rule, as importing Keras to ask takes seconds.

    The rule is in keras/src/backend/config.py and in `get_file`. A user without a home has "~" for one, and what
    cannot be written is replaced by /tmp.
    """
    temporary = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()
    user = os.path.expanduser("~")
    user = user if os.access(user, os.W_OK) else temporary
    folder = os.path.expanduser(os.environ.get("KERAS_HOME", os.path.join(user, ".keras")))
    if folder[:1] in ("", "~") or not _can_be_written(folder):
        folder = os.path.join(temporary, ".keras")
    return os.path.join(folder, "datasets")


def _can_be_written(folder):
    """Whether files can be put into a folder, which may have to be made first."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return os.access(folder, os.W_OK)


def path_of(folder, image_size, channels):
    """The file that keeps the pictures of a folder."""
    name = hashlib.blake2b(os.fsencode(os.path.realpath(folder)), digest_size=8).hexdigest()
    return os.path.join(home(), f"pictures-{name}-{image_size}x{channels}.npz")


def stamp(folder, names, formats):
    """A fingerprint of the files, names, sizes and times of change, and of what reads them: Pillow, its formats, we."""
    fingerprint = hashlib.blake2b(repr((PIL.__version__, formats, RULES)).encode(), digest_size=16)
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
