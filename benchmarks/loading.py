"""How fast are photographs read from a folder, and does training wait for them?

    python benchmarks/loading.py                  generates 10,000 JPEGs first; about 5 minutes on 2 cores
    python benchmarks/loading.py --data FOLDER    your photographs

Reads all images of a folder at 64×64, once from the files and once from the cache, beside the same Pillow calls in a
pool of processes, one for each core. Then measures the time in which one batch for a training step is prepared.
"""

import argparse
import concurrent.futures
import contextlib
import os
import shutil
import statistics
import tempfile
import time

import common
import numpy as np
from PIL import Image, ImageOps

import data
from data import cache
from support import device

SIZE = 64


def make_photographs(folder, count):
    """JPEGs with fine detail, and about as large as in the cats-and-dogs archive, around 400×350."""
    rng = np.random.default_rng(0)
    for k in range(count):
        width, height = (int(side) for side in rng.integers(300, 500, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        grain = rng.normal(0, 12, (height, width, 1))
        image = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(os.path.join(folder, f"{k:05}.jpg"), quality=90)


def read_one(path):
    """What a Pillow user would write; `draft`, the fastest way to reduce a JPEG, included."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * SIZE, 2 * SIZE))
        image = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS))


def with_pillow(folder):
    """All images of the folder, read by as many processes as there are cores."""
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    with concurrent.futures.ProcessPoolExecutor(device.cores()) as pool:
        return np.stack(list(pool.map(read_one, paths, chunksize=64)))


def forget(folder):
    """Removes the project's cache of the folder."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(cache.cache_path(folder, (SIZE, SIZE), 3))


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FOLDER", help="folder of photographs, without sub-folders (generated)")
    parser.add_argument("--count", type=int, default=10_000, help="number of photographs to generate (10,000)")
    parser.add_argument("--rounds", type=int, default=3, help="number of times that everything is read (3)")
    options = parser.parse_args()
    print(common.machine("pillow", "numpy"))
    folder = options.data or tempfile.mkdtemp()
    try:
        if not options.data:
            make_photographs(folder, options.count)
        ours, pillow, again = [], [], []
        for _ in range(options.rounds):
            forget(folder)
            ours.append(seconds(data.load_images, folder, SIZE))
            again.append(seconds(data.load_images, folder, SIZE))
            pillow.append(seconds(with_pillow, folder))
        images, _ = data.load_images(folder, SIZE)
    finally:
        forget(folder)
        if not options.data:
            shutil.rmtree(folder)
    one, other, second = (statistics.median(times) for times in (ours, pillow, again))
    common.table(
        f"{len(images):,} images from a folder to {SIZE}×{SIZE}",
        [
            ("", "seconds", "× Pillow"),
            ("this project, first time", f"{one:.1f}", f"{other / one:.2f}"),
            ("this project, second time", f"{second:.2f}", f"{other / second:.0f}"),
            (f"Pillow in {device.cores()} processes", f"{other:.1f}", "1.00"),
        ],
    )

    batch = 16
    start = time.perf_counter()
    batches = sum(1 for _ in data.batches(images, batch, 0, 0, flip=True))
    each = (time.perf_counter() - start) / batches
    common.table(
        f"one batch of {batch} images {SIZE}×{SIZE}, mirrored at random",
        [("", "milliseconds"), ("shuffled, mirrored, as float32", f"{1e3 * each:.3f}")],
    )


if __name__ == "__main__":
    main()
