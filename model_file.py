"""The owner of `model.keras`: one complete file with the network, its training state and its settings.

* The layers' weights in the file are the averages of training (Keras' `use_ema`), so that whoever
  loads it with plain Keras samples from them. The raw weights, from which training goes on, stand
  in their place among the optimizer's variables; `exchange_averages` changes the two.
* Settings and progress are the `entries` of the network's `Logbook` layer:
  `diffusion` (beta1, beta2, T), `data` (source, count, digest), `settings` (how it was trained,
  as the options of the script are called) and `progress` (see `diffusion_model.py`).
* Precision and compiler belong to a run. The file is always float32.
"""

import os
import warnings
import zipfile

import files
import unet


def logbook(model):
    """The dict of settings and progress that a model carries; empty for a model without any."""
    for layer in model.layers:
        if isinstance(layer, unet.Logbook):
            return layer.entries
    return {}


def open_model(path, compile=False):
    """Loads a model, or says in one sentence why it cannot be loaded.

    Args:
        path: a `.keras` file.
        compile: whether the optimizer is wanted too.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no Keras model, damaged, or of another kind than ours.
    """
    import keras

    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no model {path}; `python diffusion_model.py` trains one")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a Keras model, or not all of one; take another file or a copy of it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Keras only warns of an optimizer state that does not fit
            model = keras.models.load_model(path, compile=compile)
    except MemoryError:
        raise
    except Exception as error:
        why = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"{path} cannot be loaded as a model, take another file or a copy of it: {why}") from error
    if len(model.inputs) != 2 or model.inputs[0].shape != model.outputs[0].shape:
        raise ValueError(f"{path} is a model, but none that takes [image, t/T] and predicts noise")
    return model


def open_for_training(path):
    """Loads a model that `save` has written, with its optimizer and with the raw weights in place.

    Raises:
        FileNotFoundError, ValueError: as `open_model`, and if it was not written by this program.
    """
    model = open_model(path, compile=True)
    entries = logbook(model)
    if {"diffusion", "data", "settings", "progress"} - entries.keys():
        raise ValueError(f"{path} carries no training settings, so training cannot go on from it; name another --model")
    if not getattr(model.optimizer, "use_ema", False) or int(model.optimizer.iterations) != entries["progress"]["step"]:
        raise ValueError(
            f"{path} has lost its optimizer's state, so training cannot go on from it; name another --model"
        )
    exchange_averages(model)
    return model


def save(model, path):
    """Writes the model in training to `path`, complete or not at all.

    Raises:
        OSError: if it cannot be written; what was there before is untouched.
    """
    optimizer, precision = model.optimizer, model.dtype_policy.compute_dtype
    model.optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # float16 scales losses around it
    unet.set_precision(model, "float32")
    exchange_averages(model)
    try:
        with files.replacing(path) as draft:
            model.save(draft)
    finally:
        exchange_averages(model)
        unet.set_precision(model, precision)
        model.optimizer = optimizer


def exchange_averages(model):
    """Puts the averages in the place of the weights, and the weights in theirs."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    for weight, average in zip(model.trainable_variables, optimizer._model_variables_moving_average, strict=True):
        value = weight.value + 0  # a copy: `weight` is overwritten next
        weight.assign(average)
        average.assign(value)
