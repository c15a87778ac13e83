"""How fast is training on several devices, and how much memory does a step take whose parts come one after another?

    python benchmarks/devices.py                                                    1 and 2 processes on 2 cores
    python benchmarks/devices.py --devices 1,2,4 --preset slides --image-size 64    on the GPUs of a machine
    python benchmarks/devices.py --memory                                           of --parts N --sequential

Speed is that of `diffusion_model.py` itself, from the rows of its table, on random images: the median epoch but for the
first ones, of several runs in turn. On a GPU memory is what TensorFlow allocates, on a CPU what the process grows by.
"""

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import tempfile

import common

EPOCHS = 8  # of `STEPS` steps
STEPS = 12
MEMORY = [(16, 64)]  # n_feat, batch
PARTS = (1, 2, 4, 8)


def time_training(preset, size, batch_size, devices):
    """Median seconds of a training step."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        images = np.random.default_rng(0).integers(0, 256, (STEPS * batch_size, size, size, 3), np.uint8)
        np.save(os.path.join(folder, "images.npy"), images)
        run = "--preset", preset, "--image-size", size, "--data", "images.npy", "--batch-size", batch_size
        run = *run, "--n-epochs", EPOCHS, "--devices", devices, "--model", "model.keras"
        quick = "--sampler", "ddim", "--sample-steps", 2, "--sample-every", 0
        command = [sys.executable, os.path.join(common.ROOT, "diffusion_model.py"), *run, *quick]
        done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        with open(os.path.join(folder, "model.csv"), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))[2:]
    return statistics.median(float(row["seconds"]) for row in rows) / STEPS


def speed_rows(preset, size, counts, batch_sizes, rounds):
    """Rows: each batch size on each number of devices, and how many times as fast as on the first."""
    rows = [("batch", "devices", "ms a step", "images per second", "× the first")]
    for batch_size in batch_sizes:
        seconds = {count: [] for count in counts}
        for _ in range(rounds):
            for count in counts:
                seconds[count].append(time_training(preset, size, batch_size, count))
        medians = {count: statistics.median(values) for count, values in seconds.items()}
        for count, median in medians.items():
            gain = medians[counts[0]] / median
            rows.append((batch_size, count, f"{1e3 * median:.1f}", f"{batch_size / median:.1f}", f"{gain:.2f}"))
            print(*rows[-1], flush=True)
    return rows


def step_memory(n_feat, batch_size, parts):
    """Prints the bytes that two steps of the slides' network add to a process."""
    import training_step

    options = {"parts": parts, "sequential": parts > 1, "xla": False}
    step = training_step.ours("naive", n_feat, 64, batch_size, "float32", options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    common.time_calls(step, 2)
    import tensorflow as tf

    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if tf.config.list_physical_devices("GPU"):
        memory = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    print(memory)


def memory_rows():
    """Rows: megabytes of a step for some widths and batches, undivided and with parts one after another."""
    rows = [("n_feat", "batch", *(f"{parts} parts, MB" if parts > 1 else "undivided, MB" for parts in PARTS))]
    for n_feat, batch_size in MEMORY:
        cells = []
        for parts in PARTS:
            words = [sys.executable, os.path.abspath(__file__), "--step", n_feat, batch_size, parts]
            done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            cells.append(f"{int(done.stdout.split()[-1]) / 1e6:.0f}")
        rows.append((n_feat, batch_size, *cells))
        print(*rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2", help="numbers of devices, separated by commas (1,2)")
    parser.add_argument("--preset", default="first", help="preset that is trained, but for its batch size (first)")
    parser.add_argument("--image-size", type=int, default=32, help="height and width of its images (32)")
    parser.add_argument("--batch-sizes", default="16,64", help="batches, separated by commas (16,64)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--step", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step_memory(*options.step)
        return
    print(common.machine("tensorflow", "keras"))
    if options.memory:
        title = "memory of a step: slides' network, 64×64, float32, parts one after another"
        common.table(title, memory_rows())
        return
    counts, batch_sizes = ([int(word) for word in text.split(",")] for text in (options.devices, options.batch_sizes))
    rows = speed_rows(options.preset, options.image_size, counts, batch_sizes, options.rounds)
    common.table(f"training on several devices, preset {options.preset}", rows)


if __name__ == "__main__":
    main()
