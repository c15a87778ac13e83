"""Runs the scripts of the project as a user does, in processes of their own."""

import os
import signal
import subprocess
import sys
import time

import common


def command(name, *arguments):
    return [sys.executable, os.path.join(common.ROOT, name), *map(str, arguments)]


def send_sigterm(process):
    process.send_signal(signal.SIGTERM)


def run(name, *arguments, folder, until=None, hit=send_sigterm):
    """Runs a script; after the first line that contains `until`, if given, hits its process, by default with SIGTERM.

    Returns:
        Exit status, everything that was printed, and the seconds from the signal to the end (None without a signal).
    """
    process = subprocess.Popen(
        command(name, *arguments), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed, stopped = [], None
    for line in process.stdout:
        printed.append(line)
        if until and until in line and stopped is None:
            hit(process)
            stopped = time.monotonic()
    status = process.wait()
    return status, "".join(printed), stopped and time.monotonic() - stopped


def expect(ended, wanted=0):
    """What a script printed, from what `run` returned.

    Raises:
        RuntimeError: with everything that was printed, if the exit status is not the wanted one.
    """
    status, printed, _ = ended
    if status != wanted:
        raise RuntimeError(f"exit status {status} instead of {wanted}:\n{printed}")
    return printed


def train(size, folder, *options, until=None, **more):
    """Runs `diffusion_model.py` for 3 steps an epoch on random images, in the setting of the slides."""
    import numpy as np

    images = os.path.join(folder, "images.npy")
    if not os.path.exists(images):
        shape = (3 * size.batch, size.image_size, size.image_size, 3)
        np.save(images, np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    setting = {
        "--preset": "slides",
        "--data": "images.npy",
        "--n-feat": size.n_feat,
        "--image-size": size.image_size,
        "--batch-size": size.batch,
        "--T": size.T,
        "--sample-every": 0,
        "--sampler": "ddim",
        "--sample-steps": 5,
    }
    if size.T < 1000:
        setting["--beta2"] = 0.5
    words = [word for option in setting.items() for word in option]
    return run("diffusion_model.py", *words, *options, folder=folder, until=until, **more)


def gpu_preset(size):
    """Options of `train` that replace the slides' network by the preset gpu-16gb."""
    from training.settings import PRESETS

    return "--preset", "gpu-16gb", "--n-feat", PRESETS["gpu-16gb"]["n_feat"] if size.full else 8
