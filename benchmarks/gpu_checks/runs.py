"""Does it run at all: precisions, XLA, determinism, out of memory, exact resume, SIGTERM."""

import dataclasses
import os
import re
import subprocess
import tempfile
import time

from gpu_checks import check, scripts


@check("runs", 20)
def find_device(size):
    """Names the devices, versions, and whether memory grows as it is needed."""
    from support import device

    tf = device.start_tensorflow()
    gpus = tf.config.list_physical_devices("GPU")
    build = tf.sysconfig.get_build_info()
    facts = {"name": device.name(), "gpus": len(gpus), "tensorflow": tf.__version__}
    facts["cuda"] = f"CUDA {build.get('cuda_version', 'none')}, cuDNN {build.get('cudnn_version', 'none')}"
    facts["memory growth"] = all(tf.config.experimental.get_memory_growth(gpu) for gpu in gpus)
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        facts["driver, memory"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        facts["driver, memory"] = "nvidia-smi is not there"
    return facts


def train_and_report(size, options):
    """Trains an epoch; the device and the loss that were printed."""
    with tempfile.TemporaryDirectory() as folder:
        printed = scripts.expect(scripts.train(size, folder, "--n-epochs", 1, *options))
        device = re.search(r"^device +(.*)$", printed, re.MULTILINE)[1]
        return {"device": device, "epoch": re.search(r"^Epoch :0 loss :(.*)$", printed, re.MULTILINE)[1]}


for name, options in {
    "train_with_xla": ("--xla",),
    "train_without_xla": ("--no-xla",),
    "train_in_bfloat16": ("--precision", "bfloat16"),
    "train_in_float16": ("--precision", "float16"),
}.items():
    check("runs", 120, name=name, options=options)(train_and_report)


@check("runs", 240)
def resume_exactly(size):
    """Two epochs at once and one by one, deterministic: the weights must agree to the bit."""
    import numpy as np

    from support import device

    device.start_tensorflow()  # a GPU's memory as it is needed: trainings run beside this process
    import keras

    import unet  # noqa: F401  registers the layers

    weights = []
    for epochs in (2,), (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            for n_epochs in epochs:
                scripts.expect(scripts.train(size, folder, "--deterministic", "--n-epochs", n_epochs))
            weights.append(keras.models.load_model(os.path.join(folder, "model.keras"), compile=False).get_weights())
    worst = max(float(np.abs(one - other).max()) for one, other in zip(*weights, strict=True))
    if worst:
        raise RuntimeError(f"the weights of a resumed run differ by up to {worst}")
    return {"largest difference of weights": worst}


@check("runs", 90)
def stop_by_sigterm(size):
    """From the signal, after some steps, to the end of the process with everything saved."""
    with tempfile.TemporaryDirectory() as folder:
        ended = scripts.train(size, folder, "--n-epochs", 100000, until="Epoch :3")
        saved = re.search(r"stopped after ([\d,]+) steps", scripts.expect(ended, 143))
        return {"seconds": round(ended[2], 2), "saved after step": saved[1]}


def train_and_sample(size, training, sampling):
    """Trains an epoch with some options; seconds in which `reverse_diffusion.py` samples 4 images with others."""
    with tempfile.TemporaryDirectory() as folder:
        scripts.expect(scripts.train(size, folder, "--n-epochs", 1, *training))
        words = "--n-sample", 4, "--seed", 0, *sampling
        start = time.monotonic()
        scripts.expect(scripts.run("reverse_diffusion.py", *words, folder=folder))
        return {"seconds, 4 images, start included": round(time.monotonic() - start, 1)}


@check("runs", 90)
def sample_with_my_sample(size):
    """`my_sample` of a model just trained, in the precision that it takes by itself."""
    return train_and_sample(size, (), ("--sampler", "ddpm", "--steps", size.T))


@check("runs", 180)
def sample_guided_by_an_early_copy(size):
    """The network `unet` trained with Muon in bfloat16, and guided by the copy after its first step."""
    training = *scripts.gpu_preset(size), "--weaker-after", 1, "--optimizer", "muon"
    return train_and_sample(size, training, ("--weaker", "model-weaker.keras", "--guidance", 1.5))


@check("runs", 180)
def sample_with_a_learned_variance(size):
    """The network `unet` learns the variance of a step in bfloat16, and samples with it."""
    return train_and_sample(size, (*scripts.gpu_preset(size), "--variance", "learned", "--weaker-after", 0), ())


@check("runs", 300, needs=("tensorflow", "gpu"))
def run_out_of_memory(size):
    """At an absurd batch size: one sentence, whose advice is followed until it fits."""
    tried, batch = [], size.absurd_batch
    with tempfile.TemporaryDirectory() as folder:
        while True:
            ended = scripts.train(dataclasses.replace(size, batch=batch), folder, "--n-epochs", 1)
            tried.append(batch)
            if ended[0] == 0:
                return {"tried": tried, "fits": batch}
            printed = scripts.expect(ended, 1)
            advice = re.search(r"do not fit in memory; add .*--batch-size (\d+)", printed)
            if not advice:
                raise RuntimeError(f"no advice at batches of {batch}:\n{printed}")
            batch = int(advice[1])
            os.remove(os.path.join(folder, "images.npy"))
