"""How much an estimate of the bound varies with the t that is drawn: before and after a schedule was learned.

    python benchmarks/bound_variance.py --model learned.keras --data new-drawings

The bound of an image is the mean over τ of γ'(τ) ‖ε - ε̂‖² / 2 (see `training/learned_schedule.py`), whatever the shape
of γ between its ends. Drawn at one τ it varies with the shape, which `--schedule learned` learns so that it varies
least. The straight line in log-SNR is what it begins with. Both are estimated from the same draws: what one schedule
draws uniformly the other draws in proportion to the slopes.
"""

import argparse

import common
import numpy as np


def second_moments(slope, error, width):
    """E[l²] for τ drawn uniformly: with these slopes of γ, and with the straight line between the same ends.

    Args:
        slope: γ'(τ) at uniform τ, (draws,) float64.
        error: ‖ε - ε̂‖² there.
        width: γ(1) - γ(0).
    """
    return np.mean((slope * error / 2) ** 2), np.mean(width * slope * (error / 2) ** 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FILE.keras", help="a model of --schedule learned")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="images that it was not trained on")
    parser.add_argument("--count", type=int, default=500, metavar="N", help="number of images (500)")
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="number of t for each image (10)")
    options = parser.parse_args()
    common.start_tensorflow("float32")
    import data
    from diffusion import model_file, reverse
    from evaluation.likelihood import measure_denoising
    from evaluation.metrics import random_subset

    trained = model_file.open_with_schedule(options.model)
    *size, channels = trained.image_shape
    images = random_subset(data.load_images(options.data, tuple(size), channels)[0], options.count)
    denoise = reverse.denoiser_of(trained, 1)
    measured = measure_denoising(denoise, trained.sched, images, options.draws, 64, levels=trained.levels)
    alphabar = trained.sched.alphabar[1:]
    gamma = np.log1p(-alphabar) - np.log(alphabar)
    slope = np.gradient(gamma) * (len(gamma) - 1)
    t = measured["t"].ravel()
    error = measured["error"].ravel().astype(np.float64) / np.log(2)  # mean over the dimensions, in bits
    learned, straight = second_moments(slope[t - 1], error, gamma[-1] - gamma[0])
    mean = np.mean(slope[t - 1] * error / 2)
    print(common.machine("tensorflow", "keras"))
    rows = [("schedule", "mean", "standard deviation of one draw")]
    rows += [("straight in log-SNR, as it began", f"{mean:.3f}", f"{np.sqrt(straight - mean**2):.3f}")]
    rows += [("learned", f"{mean:.3f}", f"{np.sqrt(learned - mean**2):.3f}")]
    common.table(f"bits per dimension of E[γ' ‖ε - ε̂‖² / 2], {len(images)} images, {options.draws} draws each", rows)


if __name__ == "__main__":
    main()
