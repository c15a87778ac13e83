"""Caches the images read from a folder, as reading thousands of photographs takes a minute.

There is one file for each folder, size, number of channels and of levels, in Keras' own cache (`~/.keras/datasets`, or
below `KERAS_HOME`). It is valid as long as names, sizes and times of all files in the folder are the same. If it cannot
be written or read, the images are read from the folder again. Of several processes that want the same images, on one
machine or on several that share the cache, the first reads them and the others wait for its file.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import PIL

from support import files
from support.lock import taking_turns

VERSION = 3  # increase it whenever files are read, or skipped files described, differently than before
MIN_SECONDS = 2.0  # a folder that is read faster is not cached


def cache_folder() -> str:
    """Returns Keras' folder for data sets, by Keras' own rule: importing Keras to ask for it would take seconds.

    The rule is in keras/src/backend/config.py and in `get_file`. It replaces a home or `KERAS_HOME` that is unknown
    (a path that begins with "~") or not writable by /tmp.
    """
    temporary = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()
    user = os.path.expanduser("~")
    user = user if os.access(user, os.W_OK) else temporary
    folder = os.path.expanduser(os.environ.get("KERAS_HOME", os.path.join(user, ".keras")))
    if folder[:1] in ("", "~") or not _is_writable(folder):
        folder = os.path.join(temporary, ".keras")
    return os.path.join(folder, "datasets")


def _is_writable(folder):
    """Whether files can be written to a folder, which may have to be created first."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return os.access(folder, os.W_OK)


def cache_path(folder: str, size: tuple[int, int], channels: int, levels: int = 255) -> str:
    """Returns the path of the cache file of a folder; for squares of 8 bits earlier versions used the same name."""
    name = hashlib.blake2b(os.fsencode(os.path.realpath(folder)), digest_size=8).hexdigest()
    sides = f"{size[0]}" if size[0] == size[1] else f"{size[0]}x{size[1]}"
    deep = f"-{levels}" if levels != 255 else ""
    return os.path.join(cache_folder(), f"pictures-{name}-{sides}x{channels}{deep}.npz")


def folder_fingerprint(folder: str, names: Iterable[str], formats: Sequence[str]) -> str:
    """Returns a hash of all that the cached images depend on.

    That is the names, sizes and times of change of the files, Pillow's version and formats, and this code's version.
    """
    fingerprint = hashlib.blake2b(repr((PIL.__version__, formats, VERSION)).encode(), digest_size=16)
    for name in names:
        status = None
        with contextlib.suppress(OSError):
            status = os.stat(os.path.join(folder, name))
        state = status and (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        fingerprint.update(os.fsencode(name) + repr(state).encode())
    return fingerprint.hexdigest()


def load_or_read(
    path: str, fingerprint: str, read: Callable[[], tuple]
) -> tuple[np.ndarray, list[tuple[str, str]], np.ndarray | None]:
    """Images, skipped files and labels from a cache file, if it is valid; else what `read` returns, cached if slow.

    Args:
        path: of the cache file.
        fingerprint: of all that the images depend on.
        read: returns images, skipped files and, if there are any, labels.
    """
    if (cached := _load(path, fingerprint)) is not None:
        return cached
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with taking_turns(path) as waited:
        if not waited:
            return _load(path, fingerprint) or _read_and_save(path, fingerprint, read)
    return _load(path, fingerprint) or _read_and_save(path, fingerprint, read)  # not cached, as reading was quick


def _read_and_save(path, fingerprint, read):
    start = time.monotonic()
    images, skipped, *labels = read()
    found = images, skipped, labels[0] if labels else None
    if time.monotonic() - start > MIN_SECONDS:
        _save(path, fingerprint, *found)
    return found


def _load(path, fingerprint):
    """What was saved, or None if it is not cached or the source has changed since."""
    try:
        with np.load(path, allow_pickle=False) as cached:
            if str(cached["fingerprint"]) == fingerprint:
                skipped = [tuple(pair) for pair in json.loads(str(cached["skipped"]))]
                return cached["images"], skipped, cached["labels"] if "labels" in cached.files else None
    except Exception:  # corrupt files raise nearly every kind
        pass
    return None


def _save(path, fingerprint, images, skipped, labels):
    """Writes the cache file; does nothing if that is not possible."""
    more = {} if labels is None else {"labels": labels}
    with contextlib.suppress(OSError), files.replacing(path) as draft:
        np.savez(draft, fingerprint=fingerprint, images=images, skipped=json.dumps(skipped), **more)
