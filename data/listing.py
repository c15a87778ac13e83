"""Which files of a folder may be training images: not what systems, editors and this project itself put there."""

import os
import re

# Names, in lower case, that operating systems, network drives and archive programs give to what is not the user's.
SYSTEM_NAMES = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "autorun.inf"),
    *("__macosx", "__pycache__", "network trash folder", "temporary items", "lost+found"),
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@synoresource", "@synoeastream"),
}
# The grids that training writes beside `model.keras`, and beside `NAME.keras`.
GRID = re.compile(r"(?:(?P<model>.+)-)?samples(?:-epoch\d{4,})?\.png")


def is_hidden(name):
    """Whether a file or folder of this name is hidden, or belongs to a system."""
    return name.startswith(".") and name not in (".", "..") or name.lower() in SYSTEM_NAMES


def sample_grids(names):
    """Those of the names of one folder's files that are grids of samples, and no training images.

    `samples.png` is one whether or not there is a model: if a deleted model's grid were read in the first run, and
    not in the second, when the new model lies beside it, the second could not resume. NAME-samples.png may be a
    user's own image, unless `NAME.keras` lies beside it; left from a deleted model, it is known by its contents, see
    `files.SAMPLES`.
    """
    grids = [found for found in map(GRID.fullmatch, names) if found]
    return {found[0] for found in grids if found["model"] is None or f"{found['model']}.keras" in names}


def list_files(folder):
    """The files below a folder, links followed, that may be images.

    Returns:
        Their names relative to the folder, sorted; pairs (name, OSError) of what could not be listed; and a sentence
        on what was skipped, or None.
    """
    names, closed, seen, hidden, grids = [], [], set(), 0, 0

    def note(error):
        closed.append((os.path.relpath(error.filename, folder), error))

    for root, folders, files in os.walk(folder, onerror=note, followlinks=True):
        status = os.stat(root)  # some network drives number nothing: every inode is 0 there
        place = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(root)
        if place in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add(place)
        hidden += sum(map(is_hidden, folders + files))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        own = sample_grids(files)
        grids += len(own)
        wanted = (name for name in files if name not in own and not is_hidden(name))
        names += [os.path.relpath(os.path.join(root, name), folder) for name in wanted]
    return sorted(names), closed, _skipped(hidden, grids)


def _skipped(hidden, grids):
    parts = []
    if hidden:
        parts.append(f"{hidden} hidden or system file{'s' * (hidden > 1)} or folder{'s' * (hidden > 1)} skipped")
    if grids:
        parts.append(f"{grids} grid{'s' * (grids > 1)} of samples skipped")
    return "; ".join(parts) or None
