"""What several test files use: scripts run as a user runs them, and one small trained model."""

import gc
import io
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import threading
import time
import types
import zipfile

import forked
import h5py
import numpy as np
import pytest

from support import device, files

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("diffusion_model.py", "reverse_diffusion.py", "evaluate.py", "figures.py", "start.py")
TENSORFLOW_SETTINGS = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "1"}  # as `support.device` sets them
os.environ.update({**TENSORFLOW_SETTINGS, **os.environ})
os.environ["MPLBACKEND"] = "agg"  # Keras imports matplotlib, and a notebook's backend may not be installed here

gc.disable()  # until all modules are there, which stay to the end

SLIDES = (
    *shlex.split("--network naive --target eps --schedule linear --weighting none --optimizer adam"),
    *shlex.split("--sampler ddpm --sample-steps 20 --variance beta"),
)
# 48 images, 3 steps an epoch. The smallest network there is, compiled in a third of the time of that of the slides.
SMALL = (
    *shlex.split("--data images.npy --n-feat 8 --batch-size 16 --lr-decay none --T 20 --beta2 0.5"),
    *SLIDES,
    *shlex.split("--network unet --widths 1 --attention 0"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than cores, as some tests wait for signals and clocks, unless xdist's variable says how many."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else device.cores() + 1


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def command(*arguments):
    return [sys.executable, *(os.path.join(ROOT, a) if a in SCRIPTS else str(a) for a in arguments)]


def environment(**more):
    as_users_have_it = {name: value for name, value in os.environ.items() if name not in TENSORFLOW_SETTINGS}
    return {**as_users_have_it, "PYTHONPATH": ROOT, **more}


def start(folder, *arguments, fresh=False, **more):
    """Starts a script, or Python with any arguments, in a folder; more is set in the environment.

    Scripts are forked from a process that has TensorFlow, unless they shall be started `fresh`, as a user does.
    """
    if arguments[0] in SCRIPTS and forked.POSSIBLE and not (fresh or more):
        return forked.Process(command(*arguments)[1:], folder, environment())
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(*arguments), cwd=folder, env=environment(**more), stdout=pipe, stderr=pipe, text=True
    )


def finish(process, printed="", timeout=400):
    """The finished process, killed if it takes longer, with all that it has printed."""
    too_late = threading.Timer(timeout, process.kill)
    too_late.start()
    errors = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # a full pipe would block it
    reader.start()
    printed += process.stdout.read()  # communicate() would miss what has been read ahead
    reader.join()
    process.wait()
    too_late.cancel()
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors[0])


@pytest.fixture
def run(tmp_path):
    """Runs what `start` starts in a temporary folder; returns the finished process."""
    return lambda *arguments, timeout=400, **more: finish(start(tmp_path, *arguments, **more), timeout=timeout)


def write_images(folder, count=48):
    from data import drawings

    np.save(folder / "images.npy", drawings.draw_cats(32, count=count))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, worker_id):
    """A folder with a small model trained for two epochs by the script, and what the script printed.

    Made by whichever of the processes of a test run comes first; the others wait for it.
    """
    base = tmp_path_factory.getbasetemp()  # of this process
    folder = (base if worker_id == "master" else base.parent) / "trained"
    printed = folder.with_suffix(".pickle")
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + 400
        while not printed.exists() and time.monotonic() < end:
            time.sleep(0.1)
    else:
        write_images(folder)
        process = finish(
            start(folder, "diffusion_model.py", *SMALL, "--n-epochs", "2", "--sample-every", "1", fresh=True)
        )
        with files.replacing(printed) as draft, open(draft, "wb") as file:
            pickle.dump(process, file)
    process = pickle.loads(printed.read_bytes())
    assert process.returncode == 0, process.stderr
    return folder, process


def iterations(path):
    """How many steps the optimizer in the file of a model has taken."""
    with zipfile.ZipFile(path) as file, h5py.File(io.BytesIO(file.read("model.weights.h5"))) as weights:
        return int(weights["optimizer/vars/0"][()])


@pytest.fixture
def model_folder(trained, tmp_path):
    """A copy of that folder, the current one of `run`."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


class Oracle:
    """Stands in for a network: any function of [x_t, t/T], or [x_t, t/T, label], for images of a shape."""

    parts = 1  # of a batch in training

    def __init__(self, function, shape, labels=False):
        self.function, self.inputs = function, [np.empty((1, *shape)), np.empty((1, 1)), *[np.empty((1, 1))] * labels]
        self.outputs = self.inputs[:1]

    def __call__(self, inputs, training=False):
        return self.function(inputs)


def generate(function, sched, shape, count, seed=0, variance="beta", clip=True, plan=None, **more):
    """All (t, x_t) of a reverse process in which the noise is predicted by a function."""
    from diffusion.model_file import TrainedModel
    from diffusion.options import Sampling
    from diffusion.reverse import ReverseSteps
    from diffusion.sampling import make_plan, sample

    steps = ReverseSteps(TrainedModel(Oracle(function, shape), sched), count, clip, xla=False)
    plan = make_plan(sched, Sampling(variance=variance)) if plan is None else plan
    return [(t, x_t.numpy()) for t, x_t in sample(steps, plan, seed, range(count), **more)]


def prepare_network(options, path):
    """The network, the images and the held-out images with which training starts."""
    from training import preparation

    trained, images, held_out = preparation.prepare(options, path)
    return trained.network, images, held_out


def wanted_output(x_0, t, eps, sched, target):
    """What a network that predicts this target is trained to predict."""
    from ddpm import signal_and_noise
    from diffusion.targets import find_target

    return find_target(target).wanted(x_0, eps, *signal_and_noise(t, x_0, sched))


def tiny_network(shape, n_feat=None, classes=0, learn_variance=False, **of_unet):
    """ε̂ = w (x_t + t/T) + b for each channel: what a step makes of such a network can be computed by hand.

    With classes a number for each is added to t/T. A learned variance is as many channels more.
    """
    import keras

    from diffusion.layers import ClassLayer, Logbook

    image, t = keras.Input(shape), keras.Input((1,))
    labels = [keras.Input((1,), dtype="int32")] if classes else []
    added = Logbook(name="logbook")(t)
    for label in labels:
        added = keras.layers.Add()([added, ClassLayer(classes, 1)(label)])
    t_image = keras.layers.Reshape((1, 1, 1))(added)
    out = keras.layers.Conv2D((2 if learn_variance else 1) * shape[-1], 1)
    return keras.Model([image, t, *labels], out(keras.layers.Add()([t_image, image])))


@pytest.fixture
def tiny_networks(monkeypatch):
    """`prepare` starts with such networks, which are built in no time, instead of the slides'."""
    from diffusion.networks import NETWORKS

    monkeypatch.setitem(NETWORKS, "naive", tiny_network)


@pytest.fixture
def tiny_unet(monkeypatch):
    """Such a network is `--network unet` too, for what has nothing to do with its layers."""
    from diffusion.networks import NETWORKS

    monkeypatch.setitem(NETWORKS, "unet", tiny_network)


# 17 grey images of 8×8 pixels in batches of 12, so that the second batch of an epoch is a smaller one.
TINY = (
    *shlex.split("--data images.npy --image-size 8 --channels 1 --batch-size 12 --T 20 --beta2 0.5"),
    *shlex.split("--lr-decay cosine --sample-every 0"),
    *SLIDES,
)


@pytest.fixture
def train_tiny(tiny_networks, tmp_path, monkeypatch, capsys):
    """A function that trains a tiny network here as the script does, in a temporary folder; returns what it says."""
    monkeypatch.chdir(tmp_path)
    save_tiny_images()

    def train(*words):
        capsys.readouterr()
        train_here(words)
        return capsys.readouterr().out

    return train


@pytest.fixture
def black_grids(monkeypatch):
    """Grids show black images, for what has nothing to do with them: to sample them takes as long as to train."""
    from training import training_run

    monkeypatch.setattr(
        training_run.Grids, "sample", lambda grids: np.zeros((16, *grids.model.inputs[0].shape[1:]), np.int16)
    )


def save_tiny_images():
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (17, 8, 8)).astype(np.uint8))


def train_here(words, workers=None):
    import diffusion_model
    from support.signals import Interruption
    from training import settings

    options = settings.parse_options("", [str(word) for word in words])
    diffusion_model.train_model(options, options["model"], Interruption(), workers)


@pytest.fixture(scope="session")
def tiny_trained(tmp_path_factory):
    """A folder with a tiny network that was trained for three epochs, and its images."""
    from diffusion.networks import NETWORKS

    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(NETWORKS, "naive", tiny_network)
        save_tiny_images()
        train_here([*TINY, "--n-epochs", "3"])
    return folder


@pytest.fixture
def tiny_folder(tiny_trained, tmp_path, monkeypatch):
    """A copy of that folder, the current one."""
    shutil.copytree(tiny_trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A function that runs evaluate.py in this process: its exit status, and what it prints."""
    import evaluate

    def run(*options):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *options])
        capsys.readouterr()
        try:
            evaluate.main()
            status = 0
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return types.SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)

    return run
