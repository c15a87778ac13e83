"""What reading a source of images gives besides them."""

import dataclasses

import numpy as np

from data import image_files
from support.scale import Scale


@dataclasses.dataclass
class Report:
    """Where images came from, how they were read, and which files were skipped.

    Attributes:
        source: a name of `named.SOURCES` as typed, or an absolute path.
        photographs: whether the images are known to be photographs, which may be mirrored for training.
        notes: sentences on how the source was read.
        skipped: a pair (file name, reason) for every file that gave no image.
        labels: the class of each image, int32 (N,), 0 for the first and -1 for none; None if it was not asked for.
        classes: the names of the classes.
        scale: which values of the source the integers of the images stand for.
        origin: the licence and the home page of a published set, in a sentence; empty for others.
    """

    source: str
    photographs: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    labels: np.ndarray | None = None
    classes: list[str] = dataclasses.field(default_factory=list)
    scale: Scale = Scale()
    origin: str = ""

    def __str__(self) -> str:
        return "\n".join([*self.notes, *([image_files.summarise_skipped(self.skipped)] if self.skipped else [])])
