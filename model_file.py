"""The owner of `model.keras`: one complete file with the network, its training state and its settings.

* The layers' weights in the file are the averages of training (Keras' `use_ema`), so that whoever
  loads it with plain Keras samples from them. The raw weights, from which training goes on, stand
  in their place among the optimizer's variables; `exchange_averages` changes the two.
* Settings and progress are the `entries` of the network's `Logbook` layer:
  `diffusion` (beta1, beta2, T), `data` (source, count, digest), `settings` (how it was trained,
  as the options of the script are called) and `progress` (see `diffusion_model.py`).
* Precision, compiler and cores belong to a run. The file is always float32.
"""

import contextlib
import hashlib
import os
import socket
import warnings
import zipfile

import keras
import numpy as np

import files
import unet
from parts import divide_training

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no model {path}; `python diffusion_model.py` trains one")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a Keras model, or not all of one; take another file or a copy of it")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # Keras reads the weights here and there, past the check sums
                raise ValueError("its check sums are wrong")
        with _no_warning_is_an_error(silent=compile):  # Keras also only warns of an optimizer state that does not fit
            model = keras.models.load_model(path, compile=compile)
    except MemoryError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be loaded as a model, take another file or a copy of it: {why}") from error
    if len(model.inputs) != 2 or model.inputs[0].shape != model.outputs[0].shape:
        raise ValueError(f"{path} is a model, but none that takes [image, t/T] and predicts noise")
    return model


@contextlib.contextmanager
def _no_warning_is_an_error(silent):
    """Warnings end nothing. Their filters are those of the whole process, and so are changed only where they must be.

    Args:
        silent: whether warnings are not wanted at all.
    """
    if not silent and all(action != "error" for action, *_ in warnings.filters):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_with_schedule(path):
    """Loads a model and returns it with its logbook, which must hold a noise schedule.

    Raises:
        FileNotFoundError, ValueError: as `open_model`, and if it carries none.
    """
    model = open_model(path)
    if "diffusion" not in logbook(model):
        raise ValueError(f"{path} carries no noise schedule; train it with diffusion_model.py")
    return model, logbook(model)


def fingerprint(model):
    """The number of steps that a model was trained, and 8 digits that differ for other weights: `step4736-1f60a9c2`."""
    weights = hashlib.blake2b(digest_size=4)
    for weight in model.get_weights():
        weights.update(np.ascontiguousarray(weight))
    return f"step{logbook(model)['progress']['step']}-{weights.hexdigest()}"


def open_for_training(path):
    """Loads a model that `save` has written, with its optimizer and with the raw weights in place.

    Raises:
        FileNotFoundError, ValueError: as `open_model`, and if it was not written by this program.
    """
    model = open_model(path, compile=True)
    book = logbook(model)
    if {"diffusion", "data", "settings", "progress"} - book.keys():
        raise ValueError(f"{path} carries no training settings, so training cannot go on from it; name another --model")
    optimizer = getattr(model, "optimizer", None)
    if not getattr(optimizer, "use_ema", False) or (int(optimizer.iterations) == 0) != (book["progress"]["step"] == 0):
        raise ValueError(
            f"{path} has lost its optimizer's state, so training cannot go on from it; name another --model"
        )
    exchange_averages(model)
    return model


def compile_for_run(model, optimizer, precision, xla, parts=1):
    """Makes a model ready to train in the precision, with the compiler and on the cores of this run.

    In float16 the loss is scaled up, so that small gradients do not vanish; `save` notes the scale.
    """
    model.compile(loss="mse", optimizer=optimizer)  # what the file will say; the rest is this run's
    model.jit_compile = xla
    if precision == "float16":
        before = logbook(model)["progress"].get("loss_scale", {"scale": 2.0**15, "age": 0})
        model.optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=before["scale"])
        model.optimizer.build(model.trainable_variables)
        model.optimizer.step_counter.assign(before["age"])
    unet.set_precision(model, precision)
    divide_training(model, parts)


def save(model, path):
    """Writes the model in training to `path`, complete or not at all.

    Raises:
        OSError: if it cannot be written; what was there before is untouched.
        FloatingPointError: if a weight, an average or a slot of the optimizer is not finite.
    """
    scaler, optimizer, precision = model.optimizer, _adam(model), model.dtype_policy.compute_dtype
    if scaler is not optimizer:
        scale = {"scale": float(scaler.dynamic_scale), "age": int(scaler.step_counter)}
        logbook(model)["progress"]["loss_scale"] = scale
    for variable in (*model.variables, *optimizer.variables):
        if not keras.ops.all(keras.ops.isfinite(variable)):
            raise FloatingPointError(f"{variable.path} is not finite")

    model.optimizer = optimizer
    unet.set_precision(model, "float32")
    exchange_averages(model)
    try:
        with files.replacing(path) as draft:
            model.save(draft)
    except (RuntimeError, ValueError, zipfile.LargeZipFile) as error:  # HDF5's ways to say that a disk is full
        raise OSError(str(error)) from error
    finally:
        exchange_averages(model)
        unet.set_precision(model, precision)
        model.optimizer = scaler


def exchange_averages(model):
    """Puts the averages in the place of the weights, and the weights in theirs."""
    averages = _adam(model)._model_variables_moving_average
    for weight, average in zip(model.trainable_variables, averages, strict=True):
        value = weight.value + 0  # a copy: `weight` is overwritten next
        weight.assign(average)
        average.assign(value)


def _adam(model):
    """The optimizer itself, without the loss scaling that float16 puts around it."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


class Lock:
    """Keeps a second run away from a model file in its `with` block; it ends with its process, however that ends.

    `missing` is a sentence on why there is no lock, where the file system knows none, or None.

    Raises:
        OSError: if another run holds it.
    """

    def __init__(self, path):
        folder, name = os.path.split(os.path.realpath(path))
        self.path, self.handle, self.missing = os.path.join(folder, f".{name}.lock"), None, None
        while self.handle is None:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from None
            try:
                if fcntl is None:
                    raise OSError("this system has no locks for files")
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(handle, 200).decode(errors="replace") or "unknown"
                os.close(handle)
                raise OSError(
                    f"{path} is being trained by another run ({owner}); wait for it, stop it, or name another --model"
                ) from None
            except OSError as error:
                self.missing = f"{path} cannot be locked here ({error}), so see to it that no second run trains it"
            if os.path.exists(self.path) and os.path.samestat(os.fstat(handle), os.stat(self.path)):
                self.handle = handle
            else:  # its owner has just removed it
                os.close(handle)
        os.ftruncate(self.handle, 0)
        os.write(self.handle, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()

    def release(self):
        with contextlib.suppress(OSError):
            os.unlink(self.path)
            os.close(self.handle)
