"""The owner of `model.keras`: one complete file with the network, its training state and its settings.

* The layers' weights in the file are the EMA weights (Keras' `use_ema`), so that plain Keras loads what images are
  sampled from. The raw weights, from which training resumes, stand in their place among the optimizer's variables;
  `swap_ema_weights` exchanges the two.
* The metadata, see `diffusion/model_file.py`, have its settings and progress.
* Precision, compiler and number of parts belong to a run. The file is always float32.
"""

import math
import zipfile

import keras

from diffusion.layers import ClassLayer, LearnedSchedule, Logbook
from diffusion.model_file import TrainedModel, describe, first_not_finite, metadata, open_model, output_layer
from support import files
from training.train_step import divide_training
from training.workers import Workers
from unet import TimeLayer

FIRST_LOSS_SCALE = 2.0**15  # of training in float16


def open_for_training(path: str) -> TrainedModel:
    """Loads a model that `save` has written, with its optimizer and the raw weights in place.

    Raises:
        FileNotFoundError, ValueError: as `open_model`, and if it was not written by this program.
    """
    trained = open_model(path, compile=True, classifier=None)
    if {"diffusion", "data", "settings", "progress"} - trained.metadata.keys():
        raise ValueError(f"{path} has no training metadata, so training cannot resume from it; choose another --model")
    optimizer, progress = getattr(trained.network, "optimizer", None), trained.metadata["progress"]
    # Overflowing float16 steps are skipped and halve the loss scale; possibly every step so far.
    skipped = math.log2(FIRST_LOSS_SCALE / progress.get("loss_scale", {"scale": FIRST_LOSS_SCALE})["scale"])
    none_taken = progress["step"] in (0, skipped)
    if not getattr(optimizer, "use_ema", False) or (int(optimizer.iterations) == 0) != none_taken:
        raise ValueError(
            f"{path} has no optimizer state, so training cannot resume from it; choose another --model, and start it "
            f"from this one with --init {path}"
        )
    swap_ema_weights(trained.network)
    return trained


def compile_for_run(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    precision: str,
    xla: bool,
    parts: int = 1,
    ema_warmup: bool = False,
    sequential: bool = False,
    workers: Workers | None = None,
) -> None:
    """Compiles a model to train in a precision, with or without XLA, as `train_step.divide_training` says.

    In float16 the loss is scaled up, so that small gradients do not vanish; `save` notes the scale.
    """
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if describe(model).is_classifier else "mse"
    model.compile(loss=loss, optimizer=optimizer)  # for the file; the rest belongs to this run
    model.jit_compile = xla
    if precision == "float16":
        before = metadata(model)["progress"].get("loss_scale", {"scale": FIRST_LOSS_SCALE, "age": 0})
        model.optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=before["scale"])
        model.optimizer.build(model.trainable_variables)
        model.optimizer.step_counter.assign(before["age"])
    set_precision(model, precision)
    divide_training(model, parts, ema_warmup, sequential, workers)


def save(model: keras.Model, path: str) -> None:
    """Writes the model in training to `path`, completely or not at all.

    Raises:
        OSError: if it cannot be written; what was there before is untouched.
        FloatingPointError: if a weight, an average or a slot of the optimizer is not finite.
    """
    scaler, optimizer, precision = model.optimizer, _adam(model), model.dtype_policy.compute_dtype
    if scaler is not optimizer:
        scale = {"scale": float(scaler.dynamic_scale), "age": int(scaler.step_counter)}
        metadata(model)["progress"]["loss_scale"] = scale
    if broken := first_not_finite([*model.variables, *optimizer.variables]):
        raise FloatingPointError(f"{broken} is not finite")

    model.optimizer = optimizer
    set_precision(model, "float32")
    swap_ema_weights(model)
    try:
        with files.replacing(path) as draft:
            model.save(draft)
    except (RuntimeError, ValueError, zipfile.LargeZipFile) as error:  # HDF5's ways to say that a disk is full
        raise OSError(str(error)) from error
    finally:
        swap_ema_weights(model)
        set_precision(model, precision)
        model.optimizer = scaler


def set_precision(model: keras.Model, precision: str) -> None:
    """Makes the layers compute in a precision; the weights stay float32.

    The precision belongs to a run, not to a file, so a training run sets it after building or
    loading the model and sets float32 while it saves.

    Args:
        precision: 'float32', 'bfloat16' or 'float16'.
    """
    model.dtype_policy = keras.DTypePolicy("float32" if precision == "float32" else f"mixed_{precision}")
    unchanged = output_layer(model)
    for layer in model.layers:
        if layer is not unchanged and not isinstance(layer, (TimeLayer, ClassLayer, LearnedSchedule, Logbook)):
            for part in layer._flatten_layers():
                part.dtype_policy = model.dtype_policy


def swap_ema_weights(model: keras.Model) -> None:
    """Exchanges the weights of the layers with their exponential moving averages in the optimizer."""
    averages = _adam(model)._model_variables_moving_average
    for weight, average in zip(model.trainable_variables, averages, strict=True):
        value = weight.value + 0  # a copy: `weight` is overwritten next
        weight.assign(average)
        average.assign(value)


def _adam(model):
    """The optimizer itself, without the loss scaling that float16 puts around it."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)
