"""Do the metrics order known cases as they should?

    python benchmarks/sanity.py --features pixels                                  drawings, no downloads
    python benchmarks/sanity.py --features efficientnet --data CATS --other DOGS   photographs; some minutes

Every row compares a set of images with the same held-out ones. `near-copies` is the fraction of them that nearly repeat
a training image (`metrics.copy_ratios`).
"""

import argparse

import common
import numpy as np
from PIL import Image, ImageFilter

import data
from evaluation import metrics
from evaluation.features import extractor
from support import device


def blurred(images):
    """Gaussian blur with a radius of a sixteenth of the image."""
    blur = ImageFilter.GaussianBlur(images.shape[1] / 16)
    return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in images])


def noisy(images, rng, fraction=0.3):
    """Mixes a fraction of noise into every pixel."""
    return np.clip((1 - fraction) * images + fraction * rng.normal(128, 128, images.shape), 0, 255).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="drawings", help="real images (drawings)")
    parser.add_argument("--other", help="images of another kind, which make up half of one row (--data upside down)")
    parser.add_argument("--image-size", type=int, default=32, help="height and width in pixels (32)")
    parser.add_argument("--count", type=int, default=500, help="number of images per set (500)")
    parser.add_argument("--features", default="pixels", help="feature extractor, as for evaluate.py (pixels)")
    options = parser.parse_args()
    device.start_tensorflow()
    rng, n = np.random.default_rng(0), options.count
    images, _ = data.load_images(options.data, options.image_size)
    images = images[rng.permutation(len(images))]
    if len(images) < 3 * n:
        parser.error(f"needs {3 * n:,} images, and {options.data} has {len(images):,}")
    held_out, real, training = images[:n], images[n : 2 * n], images[2 * n :]
    other = data.load_images(options.other, options.image_size)[0][:n] if options.other else real[:, ::-1]
    cases = {
        "real": real,
        "training images": training[:n],
        "50 images, repeated": training[np.arange(n) % 50],
        "half of another kind": np.concatenate([real[: n // 2], other[: n - n // 2]]),
        "blurred": blurred(real),
        "a third noise": noisy(real, rng),
        "nothing but noise": rng.integers(0, 256, real.shape).astype(np.uint8),
    }
    print(common.machine("tensorflow", "numpy"))
    extract = extractor(options.features)
    held_out_features, training_features = extract(held_out), extract(training)
    rows = [("compared with held-out images", "KID", "Fréchet", "precision", "recall", "near-copies")]
    for name, images in cases.items():
        features = extract(images)
        cells = []
        for metric in metrics.kid, metrics.frechet, metrics.precision, metrics.recall:
            value, error = metrics.with_error(metric, held_out_features, features)
            cells.append(f"{value:.3g} ± {error:.1g}")
        cells.append(f"{metrics.copy_ratios(features, training_features, held_out_features)[1]:.2f}")
        rows.append((name, *cells))
    common.table(f"{n} images each of {options.data}, features: {options.features}", rows)


if __name__ == "__main__":
    main()
