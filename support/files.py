"""Writes files completely or not at all: after any interruption the old or the new file is there, complete."""

import contextlib
import errno
import glob
import os
import shutil
import socket
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np

DAY = 86400  # seconds after which a draft of another computer counts as abandoned


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Yields a path to write to; when the block ends without an error, that file replaces `path`.

    The draft is written in a folder of its own beside the target, `.NAME.saving-HOST-PID-…`, which also catches other
    files that the writer makes. Several processes may write one file: the last to finish wins, and each file is
    complete. Drafts of killed writers are removed. A symbolic link stays a link.

    Raises:
        OSError: if it cannot be written; the old file is untouched then.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    for left in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(name)}.saving*")):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    try:
        workshop = tempfile.mkdtemp(prefix=f".{name}.saving-{socket.gethostname()}-{os.getpid()}-", dir=folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    try:
        draft = os.path.join(workshop, name)
        yield draft
        _flush_file(draft)
        os.replace(draft, path)
        _flush_folder(folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _is_abandoned(workshop):
    """Whether the process that made this folder is gone."""
    _, _, owner = os.path.basename(workshop).rpartition(".saving")
    host, _, pid = owner.strip("-").rpartition("-")[0].rpartition("-")
    if not pid.isdigit():  # earlier versions wrote into `.NAME.saving`
        return True
    if host == socket.gethostname() and os.name == "posix":  # elsewhere signal 0 is not a mere question
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:  # it belongs to another user
            pass
        return False
    with contextlib.suppress(OSError):
        return time.time() - os.path.getmtime(workshop) > DAY
    return False


def check_writable(path: str | os.PathLike) -> None:
    """Raises the OSError with which writing to `path` would fail, and removes what a killed writer left.

    Raises:
        ValueError: if it is a folder.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; name a file")
    with contextlib.suppress(_Unwritten), replacing(path):
        raise _Unwritten


class _Unwritten(Exception):
    pass


def normalise_name(name: str) -> str:
    """The name of a file or a class with composed accents (NFC); on macOS and in its archives é may be two signs."""
    return unicodedata.normalize("NFC", name)


def same_file(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two paths are one file: by links, or by names that differ only in case or in the form of accents.

    Where one of them is missing, the file system cannot be asked whether it tells such names apart; some do not.
    """
    if os.path.exists(one) and os.path.exists(other):
        status = os.stat(one)
        if status.st_ino:  # on some network drives every inode is 0
            return os.path.samestat(status, os.stat(other))
    names = (normalise_name(os.path.realpath(path)).casefold() for path in (one, other))
    return len(set(names)) == 1


def check_distinct(outputs: Iterable[tuple[str, str | None]], inputs: Iterable[str | None]) -> None:
    """Checks that files to be written replace neither an input nor each other.

    Folders of images do not count, as files may be written into them.

    Args:
        outputs: pairs of what a file is, for example its option, and its path, or None for no file.
        inputs: paths, of models as `model_file.locate` returns them; None for none.

    Raises:
        ValueError: if one does; the sentence names it.
    """
    taken = [path for path in inputs if path and not os.path.isdir(path)]
    for what, path in outputs:
        for other in taken if path else ():
            if same_file(path, other):
                raise ValueError(
                    f"{what} {path} would overwrite another file of this command, {other}; choose another name"
                )
        taken += [path] if path else []


def check_outputs(outputs: Iterable[tuple[str, str | None]], inputs: Iterable[str | None]) -> None:
    """Checks, before any work, that results replace neither an input nor each other, and can be written.

    Args:
        outputs, inputs: see `check_distinct`.

    Raises:
        ValueError, OSError: if not.
    """
    outputs = [(option, path) for option, path in outputs if path]
    check_distinct(outputs, inputs)
    for option, path in outputs:
        try:
            check_writable(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no folder for {option} {path}; make it first") from error
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise OSError(f"{path} cannot be written ({why}); choose another {option}") from error


def make_folder(option: str, folder: str) -> None:
    """Makes a folder if it is missing.

    Raises:
        ValueError: if a file is in its place; the sentence names the option.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{option} must name a folder, but {error.filename} is a file") from error


def _flush_file(path):
    """Flushes the content of a file to the disk, where the file system supports it."""
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes for writers only
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # some network and FUSE file systems
            raise
    finally:
        os.close(handle)


def _flush_folder(path):
    """Flushes the entries of a folder to the disk. The file is complete without it, so failures are ignored."""
    with contextlib.suppress(OSError):  # Windows opens no folders; network file systems give EINVAL, EIO, EACCES, …
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_array(array: np.ndarray, path: str) -> None:
    """Writes an array as a `.npy` file."""
    with replacing(path) as draft, open(draft, "wb") as file:
        np.save(file, array, allow_pickle=False)


def script_name(name: str) -> str:
    """The path of one of our scripts from the current folder."""
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), name)
    with contextlib.suppress(ValueError):  # another drive of Windows
        return os.path.relpath(path)
    return path


def table_name(path: str) -> str:
    """`model.csv` beside `model.keras`: the table of epochs."""
    return os.path.splitext(path)[0] + ".csv"


def weaker_name(path: str) -> str:
    """`model-weaker.keras` beside `model.keras`: the model as it was early in its training."""
    return os.path.splitext(path)[0] + "-weaker.keras"


def grid_name(path: str, suffix: str = "") -> str:
    """`samples.png` beside `model.keras`, `NAME-samples.png` beside another `NAME.keras`."""
    folder, name = os.path.split(os.path.splitext(path)[0])
    return os.path.join(folder, "-".join(filter(None, [name if name != "model" else "", "samples", suffix])) + ".png")
