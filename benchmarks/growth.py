"""How do time and memory of a training step grow with the width, the image size and the batch size?

    python benchmarks/growth.py --out docs/growth.png       about 4 minutes on 2 cores

Draws seconds a step on logarithmic axes, beside the arithmetic limit: the operations of a training step at the rate at
which this machine multiplies matrices.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

import common

WIDTHS = [(n_feat, 32, 16) for n_feat in (8, 16, 32, 64, 128)]  # n_feat, image size, batch
SIZES = [(16, size, 16) for size in (32, 64, 96, 128)]
BATCHES = [(16, 32, batch) for batch in (2, 4, 8, 16, 32, 64)]
PANELS = [("n_feat", WIDTHS, 0), ("image size", SIZES, 1), ("batch", BATCHES, 2)]


def matrix_rate():
    """Multiplications and additions a second of float32 matrices, 2048×2048, the best of 8 products."""
    return 2 * 2048**3 / min(common.time_calls(common.multiply_matrices(2048, "float32"), 8))


def one_setting(n_feat, size, batch):
    """Prints seconds a step and the bytes that a process needs for it, in a process of its own."""
    import training_step

    step = training_step.ours("naive", n_feat, size, batch, "float32", {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    seconds, until = [], time.monotonic() + 3
    while len(seconds) < 5 or (time.monotonic() < until and len(seconds) < 100):
        seconds += common.time_calls(step, 1)
    import tensorflow as tf

    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if tf.config.list_physical_devices("GPU"):
        memory = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    print(statistics.median(seconds), memory)


def draw(results, rate, path):
    import figures

    figures.draw_for_files()
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), sharey="row", layout="constrained")
    for (top, bottom), (label, settings, k) in zip(axes.T, PANELS, strict=True):
        x = [setting[k] for setting in settings]
        limit = [common.operations("naive", *s) / rate for s in settings]
        top.loglog(x, [results[s][0] for s in settings], "o-", color="#0072B2", label="measured")
        top.loglog(x, limit, "--", color="#D55E00", label="arithmetic limit")
        bottom.loglog(x, [results[s][1] / 1e6 for s in settings], "o-", color="#0072B2")
        names = ("n_feat {}", "{0}×{0} pixels", "batches of {}")
        fixed = [names[i].format(settings[0][i]) for i in range(3) if i != k]
        top.set_title(", ".join(fixed), fontsize=10)
        bottom.set_xlabel(label)
        for axis in top, bottom:
            axis.set_xticks(x, [str(value) for value in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds a training step")
    axes[1, 0].set_ylabel("megabytes that it adds")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)


def largest_batches(results):
    """Rows: memory of a card, and the largest batch of the slides' setting that should fit, computed.

    The memory of an image is measured at n_feat 16 and 32×32, and grows with n_feat and with the number of pixels.
    Weights, gradients, Adam's two moments and the EMA weights take 5 × 4 bytes a parameter, and a tenth of the card is
    left free.
    """
    one = (results[16, 32, 64][1] - results[16, 32, 16][1]) / 48
    rows = [("memory", "n_feat", "image size", "largest batch, float32 (computed)")]
    for gigabytes in 8, 16, 24, 80:
        for n_feat, size, parameters in (512, 64, 129_329_667), (128, 64, 8_100_483):
            batch = (0.9e9 * gigabytes - 20 * parameters) / (one * n_feat / 16 * (size / 32) ** 2)
            rows.append((f"{gigabytes} GB", n_feat, size, max(0, int(batch))))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE.png", help="image file for the plot (none)")
    parser.add_argument("--setting", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        one_setting(*options.setting)
        return
    print(common.machine("tensorflow", "keras"))
    results, rate = {}, matrix_rate()
    print(f"matrices are multiplied at {rate / 1e9:.0f} GFLOP/s (float32)")
    for setting in dict.fromkeys(WIDTHS + SIZES + BATCHES):
        command = [sys.executable, os.path.abspath(__file__), "--setting", *map(str, setting)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        results[setting] = tuple(map(float, done.stdout.split()))
    rows = [("n_feat", "image size", "batch", "GFLOP a step", "ms a step", "GFLOP/s", "% of the limit", "MB")]
    for setting, (seconds, memory) in results.items():
        work = common.operations("naive", *setting)
        speed = work / seconds
        cells = f"{work / 1e9:.2f}", f"{1e3 * seconds:.1f}", f"{speed / 1e9:.0f}", f"{100 * speed / rate:.0f}"
        rows.append((*setting, *cells, f"{memory / 1e6:.0f}"))
    common.table("a training step, float32; MB: what it adds to the memory of the process", rows)
    common.table("what should fit", largest_batches(results))
    if options.out:
        draw(results, rate, options.out)
        print(f"\n{options.out}")


if __name__ == "__main__":
    main()
