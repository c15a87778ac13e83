"""Training and reverse steps, beside the matrix rate of the card and beside PyTorch."""

import csv
import os
import statistics
import tempfile

import common

from gpu_checks import check, scripts


def matrix_rate(size, precision):
    """Floating-point operations a second in products of large matrices."""
    _, dtype = common.start_tensorflow(precision)
    return 2 * size.matrix**3 / common.median_seconds(common.multiply_matrices(size.matrix, dtype), 10)


def measure_training(size, precision, xla, parts):
    import training_step

    rate = matrix_rate(size, precision)
    _, dtype = common.start_tensorflow(precision)
    options = {"parts": parts, "xla": xla}
    step = training_step.ours("naive", size.n_feat, size.image_size, size.batch, dtype, options)
    (first,) = common.time_calls(step, 1)
    seconds = common.median_seconds(step, 20)
    operations = common.operations("naive", size.n_feat, size.image_size, size.batch)
    return {
        "ms a step": round(1e3 * seconds, 2),
        "images per second": round(size.batch / seconds, 1),
        "fraction of the matrix rate": round(operations / seconds / rate, 3),
        "TFLOP/s of matrices": round(rate / 1e12, 2),
        "first step, seconds": round(first, 1),
        "hours for 1,800 epochs of 12,500 images": round(1800 * 12500 / size.batch * seconds / 3600, 1),
    }


for name, (precision, xla, parts) in {
    "training_bfloat16_xla": ("bfloat16", True, 1),
    "training_tf32_xla": ("tf32", True, 1),
    "training_float32_xla": ("float32", True, 1),
    "training_bfloat16_without_xla": ("bfloat16", False, 1),
    "training_tf32_without_xla": ("tf32", False, 1),
    "training_bfloat16_xla_in_two_parts": ("bfloat16", True, 2),
}.items():
    check("speed", 60, name=name, precision=precision, xla=xla, parts=parts)(measure_training)


def measure_gpu_preset(size, optimizer):
    """The preset gpu-16gb with one optimizer or the other, from the table that training writes."""
    options = "--optimizer", optimizer, "--n-epochs", 20
    with tempfile.TemporaryDirectory() as folder:
        scripts.expect(scripts.train(size, folder, *scripts.gpu_preset(size), *options))
        with open(os.path.join(folder, "model.csv"), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        speed = statistics.median(float(row["images_per_second"]) for row in rows[10:])
        return {"images per second": round(speed, 1), "ms a step": round(1e3 * size.batch / speed, 2)}


for optimizer in "adam", "muon":
    check("speed", 120, name=f"training_gpu_16gb_with_{optimizer}", optimizer=optimizer)(measure_gpu_preset)


def measure_torch(size, precision, compiled):
    import torch
    import training_step

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    dtype = "float32" if precision == "tf32" else precision
    fused = torch.cuda.is_available() or None
    step = training_step.torchs(
        "naive", size.n_feat, size.image_size, size.batch, dtype, "channels_last", fused, compiled
    )
    seconds = common.median_seconds(step, 20)
    return {"ms a step": round(1e3 * seconds, 2), "images per second": round(size.batch / seconds, 1)}


for precision in "bfloat16", "tf32":
    check("speed", 60, ("torch",), f"torch_{precision}", precision=precision, compiled=False)(measure_torch)
    name = f"torch_{precision}_compiled"
    check("speed", 120, ("torch", "gpu"), name, precision=precision, compiled=True)(measure_torch)


@check("speed", 120)
def reverse_steps(size):
    """Milliseconds of one reverse step for batches of 1, 16 and 64, and seconds for a whole reverse process."""
    import reverse_step

    results = {}
    for batch in (1, 16, 64) if size.full else (1, 2):
        once = reverse_step.ours("naive", size.n_feat, size.image_size, batch, "my_sample")
        seconds = common.median_seconds(once, 10) / reverse_step.TOGETHER
        results[f"ms a step, batch {batch}"] = round(1e3 * seconds, 2)
        results[f"seconds for {batch} image{'s' * (batch > 1)} in 1,000 steps"] = round(1000 * seconds, 1)
    return results


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
    seconds = common.median_seconds(lambda: model.train_on_batch([x, t], x), 10)
    return {"device": str(jax.devices()[0]), "ms a step": round(1e3 * seconds, 2)}
