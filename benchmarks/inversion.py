"""Does inverting an image give noise of N(0, 1), and does sampling from it give the image back?

    python benchmarks/inversion.py --model model.keras --steps 20 50 100

Prints for each number of steps the standard deviation of the noise, which should be 1, and the mean absolute difference
in grey levels between the images and what DDIM samples from their noise: over all images, and for the worst one.
"""

import argparse

import common
import numpy as np

from support import device


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model.keras", help="trained model (model.keras)")
    parser.add_argument("--data", default="new-drawings", help="held-out images (new-drawings)")
    parser.add_argument("--count", type=int, default=32, help="number of images (32)")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100], help="numbers of steps (20 50 100)")
    options = parser.parse_args()
    device.start_tensorflow(parts=device.MOST_PARTS)
    import data
    import reverse_diffusion as rd
    from diffusion import generate

    print(common.machine("tensorflow", "keras"))
    *size, channels = generate.open_model(options.model).image_shape
    images = data.load_images(options.data, tuple(size), channels)[0][: options.count]
    print("| steps | deviation | way back, grey levels | worst image |\n|---|---|---|---|")
    for steps in options.steps:
        noise = rd.invert(images, options.model, steps, verbose=0)
        how = {"sampler": "ddim", "steps": steps, "clip": False, "verbose": 0}
        away = np.abs(rd.my_sample(model=options.model, noise=noise, **how) - images.astype(int))
        print(f"| {steps} | {noise.std():.2f} | {away.mean():.1f} | {away.mean(axis=(1, 2, 3)).max():.1f} |")


if __name__ == "__main__":
    main()
