"""Lists the files of a folder that may be training images: no system files, hidden files or our own sample grids."""

import os
import re
from collections.abc import Iterable, Sequence

from support.files import normalise_name

# Names, in lower case, that operating systems, network drives and archive programs give to files of their own.
SYSTEM_NAMES = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "autorun.inf"),
    *("__macosx", "__pycache__", "network trash folder", "temporary items", "lost+found"),
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@synoresource", "@synoeastream"),
}
# The sample grids that training writes beside `model.keras`, and beside `NAME.keras`.
GRID = re.compile(r"(?:(?P<model>.+)-)?samples(?:-epoch\d{4,})?\.png")


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of this name is hidden, or belongs to a system."""
    return name.startswith(".") and name not in (".", "..") or name.lower() in SYSTEM_NAMES


def find_sample_grids(names: Iterable[str]) -> set[str]:
    """Returns the file names of one folder that are sample grids, not training images.

    `samples.png` is one even without a model beside it. Otherwise the grid of a deleted model would be a training
    image in the first run but not in the second, when the new model lies beside it, and the second could not resume.
    NAME-samples.png may be the user's own image, unless `NAME.keras` lies beside it. The grid of a deleted model is
    recognised by its contents, see `grids.SAMPLES`.
    """
    grids, known = [found for found in map(GRID.fullmatch, names) if found], set(map(normalise_name, names))
    return {found[0] for found in grids if found["model"] is None or normalise_name(f"{found['model']}.keras") in known}


def sort_names(names: Iterable[str]) -> list[str]:
    """Sorts file names the same however their accents are stored, so that a folder that has moved keeps its order."""
    return sorted(names, key=lambda name: (normalise_name(name), name))


def earlier_order(names: Sequence[str]) -> list[int] | None:
    """The places of names from `sort_names` in the order of earlier versions, which sorted them as they are stored.

    None if the order is the same.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    return None if order == list(range(len(names))) else order


def list_files(folder: str) -> tuple[list[str], list[tuple[str, OSError]], str | None]:
    """Lists the files below a folder that may be images. Links are followed.

    Returns:
        The sorted names relative to the folder; a pair (name, error) for every sub-folder that could not be listed;
        and a note on what was ignored, or None.
    """
    names, unlisted, seen, hidden, grids = [], [], set(), 0, 0

    def note_error(error):
        unlisted.append((os.path.relpath(error.filename, folder), error))

    for root, folders, files in os.walk(folder, onerror=note_error, followlinks=True):
        status = os.stat(root)  # on some network drives every inode is 0
        identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(root)
        if identity in seen:  # reached before, by a link
            folders.clear()
            continue
        seen.add(identity)
        hidden += sum(map(is_hidden, folders + files))
        folders[:] = sort_names(name for name in folders if not is_hidden(name))
        own = find_sample_grids(files)
        grids += len(own)
        wanted = (name for name in files if name not in own and not is_hidden(name))
        names += [os.path.relpath(os.path.join(root, name), folder) for name in wanted]
    return sort_names(names), unlisted, _describe_ignored(hidden, grids)


def _describe_ignored(hidden, grids):
    parts = []
    if hidden:
        parts.append(f"{hidden} hidden or system file{'s' * (hidden > 1)} or folder{'s' * (hidden > 1)} ignored")
    if grids:
        parts.append(f"{grids} sample grid{'s' * (grids > 1)} ignored")
    return "; ".join(parts) or None
