"""How TensorFlow is started on this machine, and what is fast on it.

The choices were measured (`docs/performance.md`). A GPU gets whole batches, and XLA compiles what runs on it. On a CPU
TensorFlow's own kernels are faster than XLA's, and each core does best with a part of the batch to itself
(`diffusion/reverse.py`, `training/train_step.py`): threads that share one operation wait for each other after each.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import threading
import types
from collections.abc import Iterator

MOST_PARTS = 8  # the graph of a step grows with their number, and so does the time before the first
_starting, _turn = threading.Lock(), threading.RLock()
_started_in = None  # the process that TensorFlow was started in


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_tensorflow(parts: int | None = None) -> types.ModuleType:
    """Imports TensorFlow; what it prints while it starts is shown only if the import fails.

    This is the only place that sets environment variables of TensorFlow; what the user has set stays. GPU memory is
    allocated as needed, not all at once.

    Args:
        parts: in our programs the number of parts that batches will be divided into: each gets a fraction of the
            cores, unless TensorFlow has computed something before, Keras is set as the networks need it, matplotlib
            to draw into files, and the garbage collector to leave out what is there by now. None in a process of the
            user (a notebook), whose settings are left alone.

    Returns:
        The module `tensorflow`.

    Raises:
        ValueError: if Keras is set to another backend, and as `check_process`.
    """
    global _started_in
    check_process()
    check_backend()
    if parts is not None:  # Keras imports matplotlib, and a notebook's backend may not be installed here
        os.environ["MPLBACKEND"] = "agg"
    with _starting, _no_garbage_collection():
        tf = _import_tensorflow()
        _started_in = os.getpid()
        if parts is None:
            return tf
        import keras
    if not gc.get_freeze_count():
        gc.freeze()  # what has been imported stays to the end: to look through it takes the collector 0.4 s each time
    keras.config.set_floatx("float32")
    keras.config.set_image_data_format("channels_last")
    if parts > 1 and not has_gpu() and "TF_NUM_INTRAOP_THREADS" not in os.environ:
        with contextlib.suppress(RuntimeError):  # already at work
            tf.config.threading.set_intra_op_parallelism_threads(max(1, cores() // parts))
    return tf


@functools.cache
def _import_tensorflow():
    if "tensorflow" not in sys.modules:  # later they would reach nothing but child processes
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no INFO lines of devices and compilers
        if platform.machine().lower() in ("x86_64", "amd64"):
            os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # by itself TensorFlow does so with AVX-512 only
    with _stderr_held_back():
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            with contextlib.suppress(RuntimeError, ValueError):  # at work already, or limited, in a notebook say
                tf.config.experimental.set_memory_growth(gpu, True)
    return tf


@contextlib.contextmanager
def _no_garbage_collection():
    """An import makes objects by the hundred thousand that stay: looking through them all meanwhile finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_process() -> None:
    """Refuses a process that was forked after TensorFlow was started: it lacks TensorFlow's threads, and would hang.

    Raises:
        ValueError: says what to do.
    """
    if _started_in not in (None, os.getpid()):
        raise ValueError(
            "TensorFlow does not work in a process that was forked after it was started; start processes with "
            'multiprocessing.get_context("spawn"), or before the first call of this module'
        )


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Waits while another thread is in here: Keras cannot trace a model in two threads.

    Forked processes are refused first, as the lock might never be released in them.

    Raises:
        ValueError: as `check_process`.
    """
    check_process()
    with _turn:
        yield


def check_backend() -> None:
    """Refuses Keras backends other than TensorFlow, before anything is imported that would fail with them.

    Raises:
        ValueError: names the setting, and how to change it.
    """
    setting = "KERAS_BACKEND"
    backend = os.environ.get(setting)
    if not backend:
        setting = os.path.join(os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras"), "keras.json")
        try:
            with open(setting, encoding="utf-8") as file:
                backend = json.load(file)["backend"]
        except (OSError, ValueError, LookupError, TypeError):  # Keras takes its default then
            backend = "tensorflow"
    if "keras" in sys.modules:  # imported by the user, perhaps before the setting was changed
        backend = importlib.import_module("keras").config.backend()
    if backend != "tensorflow":
        raise ValueError(
            f"Keras is set to the backend {backend} by {setting}, but this project needs tensorflow; set "
            "KERAS_BACKEND=tensorflow in the environment and start Python again"
        )


# Reads to the end of the stream, then shows what it read. It is killed before that if all is well.
_WATCHER = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"


@contextlib.contextmanager
def _stderr_held_back():
    """Keeps file descriptor 2 silent, and shows what was written to it if the block or the process fails.

    TensorFlow's C++ parts write to it before any setting reaches them. Another process keeps the text, as they may kill
    this one right after their last line, for example on a processor that they do not support.
    """
    try:
        terminal = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        watcher = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _WATCHER],
            stdin=subprocess.PIPE,
            stdout=terminal,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # out of reach of Ctrl-C
        )
    except OSError:  # Python is part of another program
        os.close(terminal)
        yield
        return
    _flush_stderr()
    os.dup2(watcher.stdin.fileno(), 2)
    watcher.stdin.close()
    exit_at_once = os._exit

    def exit_on_purpose(status):  # as after a signal, see `signals.py`
        watcher.kill()
        exit_at_once(status)

    os._exit = exit_on_purpose
    try:
        yield
        watcher.kill()
    except KeyboardInterrupt:
        watcher.kill()
        raise
    finally:
        os._exit = exit_at_once
        _flush_stderr()
        os.dup2(terminal, 2)
        os.close(terminal)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a child process may have the pipe still open
            watcher.wait(timeout=5)


def _flush_stderr():
    with contextlib.suppress(Exception):  # it may be missing, or have no reader
        sys.stderr.flush()


def has_gpu() -> bool:
    """Whether TensorFlow sees a GPU."""
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def prefers_xla(batch_size: int) -> bool:
    """Whether XLA is faster for inference: on a GPU, and for a single image, which cannot be divided among cores.

    It cannot compile the operations that TensorFlow's debuggers, like `enable_check_numerics`, add to functions.
    """
    from tensorflow.python.eager import context

    return (has_gpu() or batch_size == 1) and not context.context().op_callbacks


def overlooks_gpu() -> bool:
    """Whether there is an NVIDIA GPU that TensorFlow does not see although it is not hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return os.path.exists("/dev/nvidia0") and not hidden and not has_gpu()


def parts_for(batch_size: int) -> int:
    """Number of parts for a batch: one for each core; one on a GPU."""
    return 1 if has_gpu() else min(batch_size, cores(), MOST_PARTS)


def large_gpu() -> bool:
    """Whether the slides' setting fits on the first GPU: about 20 GB of activations and 3 of weights (computed)."""
    import tensorflow as tf
    from tensorflow.python.client import device_lib

    if not has_gpu():
        return False
    # The question makes the GPU's allocator. Without this it would take all memory, whatever was set before.
    growing = tf.compat.v1.ConfigProto(gpu_options=tf.compat.v1.GPUOptions(allow_growth=True))
    gpus = [device for device in device_lib.list_local_devices(growing) if device.device_type == "GPU"]
    return gpus[0].memory_limit > 28e9


def out_of_memory(error: Exception) -> bool:
    """Whether a TensorFlow error means that the GPU's memory is too small; cuDNN has a message of its own for it."""
    import tensorflow as tf

    return isinstance(error, tf.errors.ResourceExhaustedError) or "No algorithm worked" in str(error)


def name() -> str:
    """The GPUs, or the number of CPU cores."""
    return ", ".join(gpu.get("device_name", "GPU") for gpu in _gpus()) or f"CPU, {cores()} core{'s' * (cores() != 1)}"


def has_bfloat16() -> bool:
    """Whether no GPU here is older than NVIDIA's Ampere, the first that is faster in bfloat16 than in float32."""
    return all(gpu.get("compute_capability", (8, 0)) >= (8, 0) for gpu in _gpus())


def _gpus():
    """What TensorFlow knows about each GPU, as dicts."""
    import tensorflow as tf

    return [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
