"""Several cards: the same losses as on one, speed, an interrupted run on fewer of them, a killed process."""

import csv
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time

from gpu_checks import check, scripts

SEVERAL = ("tensorflow", "gpus")


def count_devices(size):
    """All GPUs; two processes where the sizes are those for a computer without any."""
    from support import launcher

    return len(launcher.find_gpus()) if size.full else 2


def epoch_loss(printed, epoch=0):
    return float(re.search(rf"^Epoch :{epoch} loss :(.*)$", printed, re.MULTILINE)[1])


@check("devices", 240, SEVERAL)
def losses_on_several_devices(size):
    """Two epochs on one device and on all: the sums of losses must agree to rounding."""
    losses = {}
    for devices in 1, count_devices(size):
        with tempfile.TemporaryDirectory() as folder:
            options = "--devices", devices, "--n-epochs", 2, "--precision", "float32"
            printed = scripts.expect(scripts.train(size, folder, *options))
            losses[f"loss on {devices}"] = epoch_loss(printed, 1)
    one, several = losses.values()
    if abs(several - one) > 1e-2 * one:
        raise RuntimeError(f"the losses differ: {losses}")
    return losses


@check("devices", 240, SEVERAL)
def resume_on_fewer_devices(size):
    """SIGTERM on all devices, then an epoch more on one."""
    with tempfile.TemporaryDirectory() as folder:
        options = "--n-epochs", 100000, "--devices", count_devices(size)
        ended = scripts.train(size, folder, *options, until="Epoch :1")
        step = int(re.search(r"stopped after ([\d,]+) steps", scripts.expect(ended, 143))[1].replace(",", ""))
        printed = scripts.expect(scripts.train(size, folder, "--n-epochs", step // 3 + 1, "--devices", 1))
        return {"seconds to stop": round(ended[2], 2), "step": step, "loss": epoch_loss(printed, step // 3)}


@check("devices", 180, SEVERAL)
def kill_a_process(size):
    """kill -9 of the last process: the job must end within a minute, and name it."""
    with tempfile.TemporaryDirectory() as folder:
        options = "--n-epochs", 100000, "--devices", count_devices(size)
        status, printed, seconds = scripts.train(size, folder, *options, until="Epoch :1", hit=kill_last_worker)
        if status != 137 or not re.search(r"worker \d of \d .* was killed by SIGKILL", printed) or seconds > 60:
            raise RuntimeError(f"exit status {status} after {seconds:.0f} s:\n{printed}")
        return {"seconds to the end": round(seconds, 2)}


def kill_last_worker(process):
    """Kills the youngest child of the process that started the workers."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(max(map(int, children.split())), signal.SIGKILL)


@check("devices", 400, SEVERAL)
def speed_on_several_devices(size):
    """Images per second on 1, 2, 4, … devices, each with as many images as one alone."""
    results, devices = {}, 1
    while devices <= count_devices(size):
        with tempfile.TemporaryDirectory() as folder:
            options = "--devices", devices, "--batch-size", devices * size.batch, "--n-epochs", 12
            scripts.expect(scripts.train(size, folder, *options))
            with open(os.path.join(folder, "model.csv"), newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))[4:]
        results[f"images per second on {devices}"] = round(
            statistics.median(float(row["images_per_second"]) for row in rows), 1
        )
        devices *= 2
    return results


@check("devices", 120, SEVERAL)
def sample_on_several_devices(size):
    """16 images on one device and on all, which may differ by a grey level."""
    import numpy as np

    samples, seconds = [], {}
    with tempfile.TemporaryDirectory() as folder:
        scripts.expect(scripts.train(size, folder, "--n-epochs", 1))
        for devices in 1, count_devices(size):
            begun = time.monotonic()
            words = "--n-sample", 16, "--seed", 0, "--npy", f"{devices}.npy", "--devices", devices
            scripts.expect(scripts.run("reverse_diffusion.py", *words, folder=folder))
            seconds[f"seconds on {devices}"] = round(time.monotonic() - begun, 1)
            samples.append(np.load(os.path.join(folder, f"{devices}.npy")).astype(int))
    worst = int(np.abs(samples[0] - samples[1]).max())
    if worst > 2:
        raise RuntimeError(f"images differ by up to {worst} grey levels")
    return {"largest difference": worst, **seconds}
