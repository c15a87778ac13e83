"""Published sets of small images that Keras downloads: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100.

Each has a training part, called by its name, and a test part, `NAME-test`. Keras checks the digests of all but
Fashion-MNIST; counts, shapes and labels are checked here.
"""

import dataclasses
import importlib
import os

import numpy as np

from data import cache
from data.downloads import downloading
from data.pixels import fit_images
from data.report import Report

TEST = "-test"  # ends the names of test parts
CIFAR_100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""


@dataclasses.dataclass(frozen=True)
class KerasSet:
    """What `keras.datasets` delivers under a name.

    Attributes:
        about: what the images show.
        counts: of training and of test images.
        shape: of an image.
        classes: their names.
        files: in Keras' folder, those that are downloaded, or the folder into which an archive is unpacked.
        licence, address: its licence and home page.
    """

    about: str
    counts: tuple[int, int]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    files: tuple[str, ...]
    licence: str
    address: str

    @property
    def photographs(self) -> bool:
        """Whether they may be mirrored: only the colour images are photographs."""
        return len(self.shape) == 3


SETS = {
    "mnist": KerasSet(
        "handwritten digits",
        (60_000, 10_000),
        (28, 28),
        tuple("0123456789"),
        ("mnist.npz",),
        "CC BY-SA 3.0",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "fashion-mnist": KerasSet(
        "clothes, shoes and bags",
        (60_000, 10_000),
        (28, 28),
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        tuple(
            f"fashion-mnist/{part}-{kind}-ubyte.gz"
            for part in ("train", "t10k")
            for kind in ("labels-idx1", "images-idx3")
        ),
        "MIT",
        "https://github.com/zalandoresearch/fashion-mnist",
    ),
    "cifar10": KerasSet(
        "animals and vehicles",
        (50_000, 10_000),
        (32, 32, 3),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        ("cifar-10-batches-py-target_archive",),
        "none stated",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "cifar100": KerasSet(
        "animals, plants, things and scenes",
        (50_000, 10_000),
        (32, 32, 3),
        tuple(CIFAR_100.split()),
        ("cifar-100-python-target_archive",),
        "none stated",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
}


def read(source: str, size: tuple[int, int], channels: int, levels: int, _: bool) -> tuple[np.ndarray, Report]:
    """Reads one part of a set, downloaded if it is missing, with its classes.

    Args:
        source: a name in `SETS`, with `TEST` at its end for the test part.
        size, channels, levels: of the images, see `pixels.crop_and_resize`; 1 or 3 channels.

    Raises:
        OSError: if it cannot be downloaded, or is not what it should be.
    """
    known, folder = SETS[source.removesuffix(TEST)], cache.cache_folder()
    if not all(map(os.path.exists, _paths(source))):
        _load(source)
    path = cache.cache_path(os.path.join(folder, source), size, channels, levels)
    fingerprint = cache.folder_fingerprint(folder, known.files, ())

    def read_part():
        images, labels = _load(source)
        return fit_images(images, size, channels, levels), [], labels

    images, _, labels = cache.load_or_read(path, fingerprint, read_part)
    return images, Report(source, labels=labels, classes=list(known.classes))


def _paths(source):
    """Where Keras keeps the files of a set."""
    return [os.path.join(cache.cache_folder(), file) for file in SETS[source.removesuffix(TEST)].files]


def _load(source):
    """The images of one part, uint8 (N, height, width, channels), and their labels, int32 (N,)."""
    name, paths = source.removesuffix(TEST), _paths(source)
    known, places = SETS[name], " and ".join(paths)
    again = f"delete {places} to download again"
    elsewhere = f"try again, or, where there is no internet, copy {places} from another machine"
    with downloading(f"{name} through keras.datasets", paths, again if all(map(os.path.exists, paths)) else elsewhere):
        parts = importlib.import_module(f"keras.datasets.{name.replace('-', '_')}").load_data()
    for count, (images, labels) in zip(known.counts, parts, strict=True):
        if images.shape != (count, *known.shape) or images.dtype != np.uint8 or len(labels) != count:
            raise OSError(
                f"{name} has {images.dtype} images of shape {images.shape} and {len(labels):,} labels, not "
                f"{(count, *known.shape)}; {again}"
            )
        if not 0 <= labels.min() <= labels.max() < len(known.classes):
            raise OSError(f"{name} has labels {labels.min()} … {labels.max()} of {len(known.classes)} classes; {again}")
    images, labels = parts[source.endswith(TEST)]
    return np.ascontiguousarray(images).reshape(*images.shape[:3], -1), labels.ravel().astype(np.int32)
