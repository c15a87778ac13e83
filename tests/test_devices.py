"""Training on several devices, a process for each, gives what one process gives; here all of them are CPU cores."""

import contextlib
import io
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest
from conftest import SMALL, TINY, finish, iterations, save_tiny_images, start, tiny_network, train_here, write_images
from test_resume import progress, read_until, table
from test_training import assert_equal_to_the_bit, losses

from support.launcher import free_ports

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="tried on Linux only")


def weights(path):
    """All variables in the file of a model, of the network and of its optimizer."""
    found = []
    with zipfile.ZipFile(path) as file, h5py.File(io.BytesIO(file.read("model.weights.h5"))) as content:
        content.visititems(lambda name, part: found.append(part[()]) if isinstance(part, h5py.Dataset) else None)
    return found


def assert_equal_to_rounding(one, other, tolerance=1e-5):
    for a, b in zip(weights(one), weights(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(a).max()))


def train_as_worker(index, count, ports, folder, words):
    """What one worker does, in a process of its own, with a tiny network and without grids."""
    os.chdir(folder)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from diffusion.networks import NETWORKS
    from support import device
    from support.worker import Worker

    device.start_tensorflow(parts=8)
    from training import training_run
    from training.workers import Workers

    NETWORKS["naive"] = tiny_network
    training_run.Grids.sample = lambda grids: np.zeros((16, 8, 8, 1), np.int16)
    workers = Workers(Worker(index, count))
    with open(f"worker-{index}.txt", "w") as printed, contextlib.redirect_stdout(printed):
        train_here(words, workers)
    os._exit(0)


def train_in_workers(count, folder, words):
    """Trains in processes that are forked from one that has imported TensorFlow, and what the first one printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "keras", "numpy"])
    how = count, free_ports(count), str(folder), words
    workers = [context.Process(target=train_as_worker, args=(index, *how), daemon=True) for index in range(count)]
    for worker in workers:
        worker.start()
    workers[0].join(120)
    status = workers[0].exitcode
    for worker in workers:
        worker.kill()
    assert status == 0
    return (folder / "worker-0.txt").read_text()


def test_two_workers_train_like_one_process(train_tiny, tmp_path, black_grids):
    """The last batch of an epoch has one image, so none for the first worker."""
    words = [*TINY, *shlex.split("--batch-size 8 --validation 0.06 --n-epochs 3 --model")]
    alone = train_tiny(*words, "one.keras")
    together = train_in_workers(2, tmp_path, [*words, "two.keras"])
    assert "2 like this one, with 4 of the 8 images of a batch each" in together
    numbers = [[float(word) for word in text.split() if word.replace(".", "").isdigit()] for text in (alone, together)]
    epochs = [{k: float(v) for k, v in row.items() if v} for row in (*table("one.csv"), *table("two.csv"))]
    for one, two in zip(epochs[:3], epochs[3:], strict=True):
        assert one.keys() == two.keys() and one == pytest.approx(two, rel=1e-5) and "held_out_loss" in one
    assert_equal_to_rounding("one.keras", "two.keras")
