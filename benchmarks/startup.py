"""How long does it take from the command to the first training step, and from `my_sample` to the first reverse step?

    python benchmarks/startup.py        about 2 minutes on 2 cores

Prints the seconds of each stage of the start: medians of several starts, each in a new process.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import common

TRAINING = """
import time; start = time.perf_counter(); stages = {}
def stage(name):
    global start
    now = time.perf_counter(); stages[name] = now - start; start = now
import data
from support import console, device
stage("NumPy, Pillow, our modules")
tf = device.start_tensorflow(parts=device.MOST_PARTS); import keras
stage("TensorFlow and Keras")
import ddpm, diffusion_model
from training import preparation
images, _ = data.load_images("drawings", 32)
stage("2,048 drawings")
trained, *_ = preparation.prepare({"preset": "first", "data": "images.npy"}, "model.keras")
stage("network and optimizer")
noisy = diffusion_model.noising(ddpm.ddpm_schedule(1e-4, 0.02, 1000), 0)
x_t, t, eps, _ = noisy(ddpm.from_pixels(next(data.batches(images, 16, 0, 0))[0]), tf.constant(0, tf.int64))
trained.network.train_on_batch([x_t, t], eps)
stage("first step: the graph")
trained.network.train_on_batch([x_t, t], eps)
stage("second step")
print(stages)
"""
SAMPLING = """
import time; start = time.perf_counter(); stages = {}
def stage(name):
    global start
    now = time.perf_counter(); stages[name] = now - start; start = now
from support import device
tf = device.start_tensorflow(parts=COUNT)
stage("TensorFlow and Keras")
import reverse_diffusion as rd
from diffusion import generate
from diffusion.sampling import make_plan, sample
trained = generate.load(*generate.load_key("model.keras"))
stage("the model from its file")
reverse = generate.compiled_steps(trained)(True, COUNT, None)
all_steps = sample(reverse, make_plan(trained.sched), 0, range(COUNT), every=True)
next(all_steps)
stage("noise")
next(all_steps)
stage("first step: the graph")
next(all_steps)
stage("second step")
print(stages)
"""


def start(code, folder):
    """Seconds of each stage of a new process."""
    environment = {**os.environ, "PYTHONPATH": common.ROOT}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return eval(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of starts of each case (5)")
    options = parser.parse_args()
    print(common.machine("tensorflow", "keras"))
    with tempfile.TemporaryDirectory() as folder:
        import numpy as np

        from data import drawings

        np.save(os.path.join(folder, "images.npy"), drawings.draw_cats(32, count=16))
        script = os.path.join(common.ROOT, "diffusion_model.py")
        quick = ["--data", "images.npy", "--n-epochs", "1", "--T", "50", "--beta2", "0.3", "--sample-every", "0"]
        subprocess.run([sys.executable, script, *quick], cwd=folder, check=True, capture_output=True)
        starts = {
            "python diffusion_model.py, the settings of the first run": TRAINING,
            "my_sample(), one image": SAMPLING.replace("COUNT", "1"),
            "my_sample(n_sample=16)": SAMPLING.replace("COUNT", "16"),
        }
        for title, code in starts.items():
            if code is TRAINING:
                os.rename(os.path.join(folder, "model.keras"), os.path.join(folder, "kept.keras"))
            runs = [start(code, folder) for _ in range(options.rounds)]
            if code is TRAINING:
                os.rename(os.path.join(folder, "kept.keras"), os.path.join(folder, "model.keras"))
            medians = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
            rows = [("", "seconds"), *((stage, f"{seconds:.2f}") for stage, seconds in medians.items())]
            rows.append(("to the end of the first step", f"{sum(medians.values()) - medians['second step']:.2f}"))
            common.table(title, rows)


if __name__ == "__main__":
    main()
